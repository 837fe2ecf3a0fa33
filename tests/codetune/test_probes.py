"""Held-out losses against a calculation by hand, and infilling prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from codetune import adapter, probes
from codetune.artifacts import HELD_OUT, HeldOutSample, read_held_out, write_held_out
from codetune.recipe import load_recipe
from codetune.tokens import Codec


@pytest.fixture
def model(tiny_parent: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_parent, dtype=torch.float32)
    adapter.add_fused_head(model)
    return model


@pytest.fixture
def samples(make_run: Callable[..., Path]) -> list[HeldOutSample]:
    return read_held_out(load_recipe(make_run()).rows_dir / HELD_OUT)


def losses_alone(model: Any, sample: HeldOutSample) -> list[float]:
    """Loss of every token of one sample, from all logits, one at a time."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits[0]
    pairs = enumerate(sample.input_ids[1:])
    return [0.0, *(torch.nn.functional.cross_entropy(logits[place], torch.tensor(token)).item() for place, token in pairs)]


def test_held_out_samples_are_read_as_they_were_written(samples: list[HeldOutSample], tmp_path: Path) -> None:
    write_held_out(tmp_path / HELD_OUT, samples, 400)
    assert read_held_out(tmp_path / HELD_OUT) == samples
    write_held_out(tmp_path / HELD_OUT, [], 400)
    assert read_held_out(tmp_path / HELD_OUT) == []
    with pytest.raises(ValueError, match="nothing: not readable .* build the rows again with `make data`"):
        read_held_out(tmp_path / "nothing")


def test_losses_are_those_of_each_document_alone(model: Any, samples: list[HeldOutSample]) -> None:
    figures = probes.held_out_losses(model, samples, {"python": "both", "prose": "both"}, tokens_per_batch=100)
    python = [sample for sample in samples if sample.source == "python"]
    plain = [losses_alone(model, sample) for sample in python if sample.layout == "plain"]
    expected = sum(map(sum, plain)) / sum(len(losses) - 1 for losses in plain)
    assert figures["held_out/python/plain"] == pytest.approx(expected, abs=1e-5)
    for layout, name in (("psm", "psm"), ("spm", "spm"), ("plain_border", "border"), ("plain_joint", "joint")):
        nats, characters, ends = 0.0, 0, []
        for sample in python:
            if sample.layout == layout and sample.cut == "span":
                losses = losses_alone(model, sample)
                nats += sum(losses[sample.middle_start : sample.middle_start + sample.middle_tokens])
                characters += len(sample.middle)
                ends.append(losses[sample.end_position])
        assert figures[f"held_out/python/{name}_middle"] == pytest.approx(nats / characters, abs=1e-5)
        if layout in ("psm", "spm"):
            assert figures[f"held_out/python/{layout}_end"] == pytest.approx(sum(ends) / len(ends), abs=1e-5)
    everything = [losses_alone(model, sample) for sample in samples if sample.layout == "plain"]
    both = sum(map(sum, everything)) / sum(len(losses) - 1 for losses in everything)
    assert figures["held_out/group:both/plain"] == pytest.approx(both, abs=1e-5)
    assert not [name for name in probes.held_out_losses(model, samples, {}, tokens_per_batch=100) if "group:" in name]


def test_figures_do_not_depend_on_the_batch_and_training_mode_comes_back(model: Any, samples: list[HeldOutSample]) -> None:
    model.train()
    small, large = (probes.held_out_losses(model, samples, {}, tokens_per_batch=size) for size in (1, 10_000))
    assert model.training
    assert small == pytest.approx(large, abs=1e-5)


class TwoRanks:
    """Stands where an accelerator is; sums of both ranks are added up by hand below."""

    num_processes, device = 2, "cpu"

    def __init__(self, rank: int, seen: list[torch.Tensor]) -> None:
        self.process_index, self.seen = rank, seen

    def reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        self.seen.append(value.clone())
        return value


def test_ranks_share_the_batches_and_none_is_counted_twice(model: Any, samples: list[HeldOutSample]) -> None:
    seen: list[torch.Tensor] = []
    for rank in (0, 1):
        probes.held_out_losses(model, samples, {}, tokens_per_batch=50, accelerator=TwoRanks(rank, seen))
    expected = probes.held_out_losses(model, samples, {}, tokens_per_batch=50)
    assert probes.figures_of(["prose", "python"], seen[0] + seen[1], {}) == pytest.approx(expected)


def test_batches_are_of_like_length_and_bounded() -> None:
    assert probes.length_batches([3, 9, 4], 10) == [[1], [2, 0]]
    assert probes.length_batches([5, 5, 5], 4) == [[0], [1], [2]]
    assert probes.length_batches([], 4) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [("x = 1\ny", ("x = 1", True)), ("x = 1", ("x = 1", False)), ("\n  a\n", ("  a", True)), (" \n", ("", False))],
)
def test_the_first_line_is_the_first_that_is_not_blank(text: str, expected: tuple[str, bool]) -> None:
    assert probes.first_line(text) == expected


def test_prompts_are_lines_taken_from_each_source_in_turn() -> None:
    def sample(source: str, middle: str, cut: str = "line", layout: str = "psm") -> HeldOutSample:
        return HeldOutSample([], layout, source, middle, cut=cut, middle=middle)

    samples = [sample("a", "1"), sample("a", "2"), sample("a", " \n"), sample("a", "3"), sample("b", "4")]
    samples += [sample("b", "5", cut="span"), sample("b", "6", layout="spm")]
    assert [chosen.middle for chosen in probes.choose_prompts(samples, "psm", 3)] == ["1", "4", "2"]
    samples[0] = dataclasses.replace(samples[0], middle_start=9)  # a prompt of 9 tokens
    assert [chosen.middle for chosen in probes.choose_prompts(samples, "psm", 3, longest=9)] == ["1", "4", "2"]
    assert [chosen.middle for chosen in probes.choose_prompts(samples, "psm", 3, longest=8)] == ["2", "4", "3"]


def test_padded_generation_gives_what_each_prompt_gives_alone(
    model: Any, tiny_codec: Codec, samples: list[HeldOutSample]
) -> None:
    chosen = probes.choose_prompts(samples, "psm", 4)
    prompts = [tiny_codec.psm_prompt(sample.prefix, sample.suffix) for sample in chosen]
    prompts += [prompts[0][:5], [1]]
    together = probes.generate_greedy(model, prompts, [2], 0, new_tokens=9, tokens_per_batch=10_000)
    alone = [probes.generate_greedy(model, [prompt], [2], 0, new_tokens=9, tokens_per_batch=1)[0] for prompt in prompts]
    assert together == alone
    for prompt, completion in zip(prompts, alone, strict=True):  # against a loop over plain forward passes
        ids = list(prompt)
        for token in completion:
            with torch.no_grad():
                assert int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize(
    ("form", "completion", "ended", "expected"),
    [
        ("psm", "x = 1", True, {"first_line_match": 1.0, "stop_rate": 1.0, "exact_match": 1.0}),
        ("psm", "x = 1", False, {"first_line_match": 1.0, "stop_rate": 0.0, "exact_match": 0.0}),  # ran into the limit
        ("spm", "x = 12", True, {"first_line_match": 0.0, "stop_rate": 1.0, "exact_match": 0.0}),
        ("prefix_only", "x = 12\ny", False, {"first_line_match": 1.0}),  # cannot know where the middle ends
        ("prefix_only", "y = 12\ny", False, {"first_line_match": 0.0}),
    ],
)
def test_completions_are_scored(
    tiny_codec: Codec, form: str, completion: str, ended: bool, expected: dict[str, float]
) -> None:
    end: Sequence[int] = [tiny_codec.need_infill().end] if ended else []
    sample = HeldOutSample([], "psm", "python", "d", prefix="p", middle="x = 1", suffix="s")
    ids = [*tiny_codec.encode_bare(completion), *end]
    assert probes.score_completion(tiny_codec, form, sample, ids) == expected


def test_a_model_that_learnt_to_stop_is_seen_to_stop(model: Any, tiny_codec: Codec, samples: list[HeldOutSample]) -> None:
    """Overfit on the very samples that are asked; greedy completions must then be the middles."""
    chosen = [sample for sample in samples if sample.layout in ("psm", "spm") and sample.cut == "line"]
    length = max(len(sample.input_ids) for sample in chosen)
    rows = torch.tensor([[*sample.input_ids, *[0] * (length - len(sample.input_ids))] for sample in chosen])
    labels = torch.tensor([[*sample.input_ids, *[-100] * (length - len(sample.input_ids))] for sample in chosen])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        model(input_ids=rows, labels=labels, fused_lm_head=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = probes.infill_report(model, tiny_codec, samples, {"python": "code"}, 4, new_tokens=20)
    assert set(report["psm"]) == {"all", "python", "prose"}
    both = probes.infill_report(model, tiny_codec, samples, {"python": "x", "prose": "x"}, 2, new_tokens=2)
    assert both["spm"]["group:x"]["prompts"] == both["spm"]["all"]["prompts"] == 2
    for form in ("psm", "spm"):
        assert report[form]["all"] == {"prompts": 4, "first_line_match": 1.0, "stop_rate": 1.0, "exact_match": 1.0}
    short = probes.infill_report(model, tiny_codec, samples, {}, 4, new_tokens=2)
    assert short["psm"]["all"]["stop_rate"] == 0.0  # running into the limit is no stop


def test_the_command_prints_both_tables(
    make_run: Callable[..., Path], tiny_parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load_recipe(make_run()).rows_dir
    probes.main(["--checkpoint", str(tiny_parent), "--rows", str(rows), "--prompts", "2", "--new-tokens", "4"])
    out = capsys.readouterr().out
    assert "psm_middle" in out
    assert "prefix_only" in out
    write_held_out(rows / HELD_OUT, [], 400)
    with pytest.raises(SystemExit):
        probes.main(["--checkpoint", str(tiny_parent), "--rows", str(rows)])
    assert "no held-out samples there" in capsys.readouterr().err
