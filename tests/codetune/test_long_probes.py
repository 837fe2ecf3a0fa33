"""The same targets whatever the context, and keys that stand where they should, on models whose answers are known."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from codetune import long_probes
from codetune.artifacts import HELD_OUT, HeldOutSample, read_held_out, read_json
from codetune.long_probes import KEY_QUESTION, context_losses, key_figures, key_prompt, key_prompts, long_context_table
from codetune.recipe import ProbeSettings, load_recipe
from codetune.tokens import Codec
from codetune.train import train

VOCABULARY = 50


def long_sample(ids: list[int]) -> HeldOutSample:
    return HeldOutSample(ids, "long", "python", "long document")


class Known(torch.nn.Module):
    """Its logits are a function of what it is given."""

    def __init__(self, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.logits_of, self.seen = logits_of, []

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **named: Any) -> Any:
        assert named["use_cache"] is False
        self.seen.append((input_ids.tolist(), logits_to_keep.tolist()))
        return SimpleNamespace(logits=self.logits_of(input_ids)[:, logits_to_keep])


def counts_what_it_sees(input_ids_BT: torch.Tensor) -> torch.Tensor:
    """At place t, t + 1 tokens seen: the logit of token 7 is the number of them, of every other 0."""
    logits = torch.zeros(*input_ids_BT.shape, VOCABULARY)
    logits[..., 7] = torch.arange(1, input_ids_BT.shape[1] + 1).float()
    return logits


def test_the_targets_are_the_same_under_every_context() -> None:
    document = [*range(20, 40), 7, 7]
    model = Known(counts_what_it_sees)
    figures = context_losses(model, [long_sample(document)], [4, 8, 22], target_tokens=2, tokens_per_batch=8)
    for length in (4, 8, 22):
        seen = (length - 2, length - 1)  # tokens before the first and the second 7
        losses = [-torch.log_softmax(torch.tensor([float(n), *[0.0] * (VOCABULARY - 1)]), 0)[0].item() for n in seen]
        assert figures[f"context/{length}"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert sorted(len(ids) for batch, _ in model.seen for ids in batch) == [4, 8, 22]
    for batch, keep in model.seen:
        assert all(ids[-2:] == [7, 7] and ids == document[-len(ids) :] for ids in batch)
        assert keep == [len(batch[0]) - 3, len(batch[0]) - 2]  # no other logits are made


def test_losses_are_those_of_all_logits(tiny_parent: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_parent, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 300, (120,), generator=draw).tolist() for _ in range(3)]
    samples = [*map(long_sample, documents), HeldOutSample([5, 6], "plain", "python", "short")]
    figures = context_losses(model, samples, [20, 120], target_tokens=16, tokens_per_batch=50)
    for length in (20, 120):
        ids = torch.tensor([document[-length:] for document in documents])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(logits[:, -17:-1].flatten(0, 1), ids[:, -16:].flatten())
        assert figures[f"context/{length}"] == pytest.approx(expected.item(), abs=1e-5)


def test_long_documents_that_are_missing_or_short_are_named() -> None:
    with pytest.raises(ValueError, match=r"documents of 64 tokens, and there are none; set `data.held_out.long_documents`"):
        context_losses(Known(counts_what_it_sees), [], [64], 8, 100)
    with pytest.raises(ValueError, match="the shortest has 10 tokens"):
        context_losses(Known(counts_what_it_sees), [long_sample([1] * 10)], [64], 8, 100)


# ---------------------------------------------------------------------------------------------------------------------
# Keys

TEXTS = [f"def f{n}(x):\n    y = x + {n}\n\n    return y\n" for n in range(12)]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [200, 600])
def test_a_prompt_is_built_right(tiny_codec: Codec, tokens: int, depth: float) -> None:
    prompt = key_prompt(tiny_codec, TEXTS, tokens, depth, random.Random(3))
    text = tiny_codec.decode_start(prompt.input_ids)
    number = text[-2:]
    assert 10 <= int(number) <= 99
    assert text.endswith(f"\n{KEY_QUESTION}{number}")
    assert prompt.input_ids[0] == tiny_codec.bos_id and tiny_codec.eos_id not in prompt.input_ids
    assert tokens - 40 <= len(prompt.input_ids) <= tokens  # whole lines
    key = f'def my_function() -> int:\n    """The program calls this function at its end."""\n    return {number}\n'
    assert text.count(key) == 1 and text.count("my_function") == 2
    before, behind = text.split(key)
    assert before == "" or before.endswith("\n\n")  # between two functions, never inside one
    place = len(before) / (len(before) + len(behind) - len(KEY_QUESTION) - 2)
    assert place == pytest.approx(depth, abs=0.2)
    # what stands before the answer says nothing of it, and the answer is no more than the number and its space
    asked = tiny_codec.decode_start(prompt.input_ids[: prompt.answer_start])
    assert f"{asked}{tiny_codec.decode_bare(prompt.input_ids[prompt.answer_start :])}".endswith(f"== {number}")
    assert asked.rstrip().endswith("==")


def test_prompts_are_the_same_every_time_and_differ_in_their_numbers(tiny_codec: Codec) -> None:
    samples = [HeldOutSample(tiny_codec.plain(tiny_codec.encode(text)), "plain", "python", text[:6]) for text in TEXTS]
    settings = ProbeSettings(key_lengths=(200,), key_depths=(0.0, 0.4), key_prompts=5)
    first, again = (key_prompts(tiny_codec, samples, settings) for _ in range(2))
    assert first == again
    assert [(p.tokens, p.depth) for p in first] == [(200, 0.0)] * 5 + [(200, 0.4)] * 5
    numbers = {tiny_codec.decode_start(prompt.input_ids)[-2:] for prompt in first}
    assert len(numbers) > 3
    prose = ProbeSettings(key_lengths=(200,), key_source="prose")
    with pytest.raises(ValueError, match="needs held-out documents of the source 'prose'"):
        key_prompts(tiny_codec, samples, prose)


def test_a_model_that_copies_finds_every_key_and_one_that_does_not_finds_none(tiny_codec: Codec) -> None:
    prompts = [key_prompt(tiny_codec, TEXTS, 200, 0.4, random.Random(n)) for n in range(4)]

    def sure_of_the_next(input_ids_BT: torch.Tensor) -> torch.Tensor:
        following = torch.nn.functional.pad(input_ids_BT[:, 1:], (0, 1))
        return 20.0 * torch.nn.functional.one_hot(following, tiny_codec.vocabulary_size).float()

    found = key_figures(Known(sure_of_the_next), prompts, tokens_per_batch=500)
    assert found["key/200/0.4/found"] == 1.0
    assert found["key/200/0.4/nats"] < 1e-4

    def knows_nothing(input_ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*input_ids_BT.shape, tiny_codec.vocabulary_size)

    lost = key_figures(Known(knows_nothing), prompts, tokens_per_batch=500)
    answers = [len(prompt.input_ids) - prompt.answer_start for prompt in prompts]
    uniform = torch.tensor(float(tiny_codec.vocabulary_size)).log().item()
    assert lost["key/200/0.4/found"] == 0.0
    assert lost["key/200/0.4/nats"] == pytest.approx(uniform * sum(answers) / 4, rel=1e-5)


def test_what_counts_as_found_is_what_greedy_generation_writes(tiny_parent: Path, tiny_codec: Codec) -> None:
    """On prompts whose answer is what an untrained model happens to write, and on their neighbours."""
    model = AutoModelForCausalLM.from_pretrained(tiny_parent, dtype=torch.float32)
    for seed in range(6):
        prompt = key_prompt(tiny_codec, TEXTS, 100, 0.0, random.Random(seed))
        asked = prompt.input_ids[: prompt.answer_start]
        written = model.generate(torch.tensor([asked]), max_new_tokens=2, do_sample=False)[0, len(asked) :].tolist()
        for answer, expected in ((written, 1.0), ([written[0], (written[1] + 1) % 300], 0.0), ([*written[:1]], 1.0)):
            other = long_probes.KeyPrompt(100, 0.0, [*asked, *answer], len(asked))
            assert key_figures(model, [other], 500)["key/100/0/found"] == expected


# ---------------------------------------------------------------------------------------------------------------------
# In a run


def long_run(make_run: Callable[..., Path], at: str) -> Any:
    """A run on toy rows; the toys have no long documents of their own, so some are put beside them."""
    from codetune.artifacts import write_held_out

    settings = {
        "probes.context_lengths": [32, 96],
        "probes.context_target_tokens": 8,
        "probes.key_lengths": [96],
        "probes.key_prompts": 2,
        "probes.long_context_at": at,
        "data.held_out": {"long_documents": 2, "long_tokens": 96},
        "probes.infill_prompts": 0,
    }
    recipe = load_recipe(make_run(at, **settings))
    folder = recipe.rows_dir / HELD_OUT
    draw = random.Random(0)
    samples = [*read_held_out(folder), *(long_sample([draw.randrange(3, 300) for _ in range(96)]) for _ in range(2))]
    write_held_out(folder, samples, 400)
    return recipe


def test_they_run_at_the_end_or_whenever_losses_are_measured(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    steps = {}
    for at in ("end", "evaluations"):
        recipe = long_run(make_run, at)
        train(recipe)
        lines = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
        steps[at] = [line["step"] for line in lines if "context/96" in line]
        manifest = read_json(recipe.model_dir / "manifest.json")
        assert set(manifest["long_context"]) == {"context/32", "context/96"} | {
            f"key/96/{depth}/{figure}" for depth in ("0", "0.2", "0.4") for figure in ("found", "nats")
        }
        assert all(name.startswith("held_out/") for name in manifest["held_out"])
    assert steps == {"end": [8], "evaluations": [0, 4, 8]}
    printed = capsys.readouterr().out
    assert "loss of the same tokens, nats, as the context before them grows (rows of training: 64 tokens)" in printed
    assert "key found" in printed


def test_the_table_shows_both_probes() -> None:
    table = long_context_table(
        {"context/256": 1.25, "key/256/0.2/found": 0.5, "key/256/0.2/nats": 2.0, "held_out/x/plain": 1.0}
    )
    assert "256" in table.splitlines()[1] and "1.2500" in table
    assert "50.0%" in table and "held_out" not in table
    assert long_context_table({}) == ""
