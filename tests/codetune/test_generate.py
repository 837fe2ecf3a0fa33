"""Generation: plans, stops, the file that is gone on with, and the engine that runs here."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from codetune.completions import Plan, cut_at_stop, make_plan, sample_seed
from codetune.engine_local import LocalEngine, choose_tokens, uniform
from codetune.generate import Engine, EngineSettings, Prompt, Sampling, generate, open_engine, read_completions
from codetune.tokens import Codec

TEXTS = ("def", "value value total", "x = 1\nfor", "return total + 1 0 1", "if x :", "y", "range ( x )", "total " * 20)
PROMPTS = [Prompt(f"p{number}", text) for number, text in enumerate(TEXTS)]
GREEDY = Sampling(12)
RANDOM = Sampling(12, temperature=0.9, top_p=0.8, samples=3, seed=5)


@pytest.fixture(scope="module")
def engine(tiny_parent: Path) -> Iterator[LocalEngine]:
    with open_engine(EngineSettings(model=str(tiny_parent), batch_rows=4, group_requests=5)) as opened:
        assert isinstance(opened, LocalEngine)
        yield opened


def alone(engine: LocalEngine, prompt: Prompt, tokens: int, **settings: Any) -> list[int]:
    """transformers' own `generate`, one prompt at a time."""
    ids = engine.codec.plain(engine.codec.encode(prompt.text), last=False)
    out_BT = engine.model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0, **settings
    )
    return out_BT[0, len(ids) :].tolist()


# --- The engine that runs here ---------------------------------------------------------------------------------------


def test_greedy_completions_are_those_of_transformers_one_by_one(engine: LocalEngine) -> None:
    written = {completion.prompt_id: completion for completion in generate(engine, PROMPTS, GREEDY)}
    assert {prompt.id: alone(engine, prompt, 12) for prompt in PROMPTS} == {
        name: list(completion.token_ids) for name, completion in written.items()
    }


def test_positions_may_be_read_as_if_the_base_were_another(tiny_parent: Path, engine: LocalEngine) -> None:
    """Table 18's second row: the base changed where it is read, without any training."""
    settings = EngineSettings(model=str(tiny_parent), batch_rows=4, group_requests=5, rope_base=1e6)
    with open_engine(settings) as opened:
        assert isinstance(opened, LocalEngine)
        found = opened.model.model.rotary_emb.inv_freq
        size = 2 * len(found)
        assert found.tolist() == pytest.approx([1e6 ** (-2 * pair / size) for pair in range(size // 2)], rel=1e-5)
        assert opened.describe()["rope_base"] == 1e6 and opened.context_tokens == engine.context_tokens
    assert "rope_base" not in engine.describe()  # plans of earlier completions stay what they were
    assert not torch.equal(found, engine.model.model.rotary_emb.inv_freq)
    with pytest.raises(ValueError, match="changed by the transformers engine alone, and this one is vllm"):
        open_engine(EngineSettings(kind="vllm", model=str(tiny_parent), rope_base=1e6))


def test_rows_that_stop_make_room_and_the_others_go_on_unchanged(engine: LocalEngine) -> None:
    first = {prompt.id: alone(engine, prompt, 12) for prompt in PROMPTS}
    stop = first["p1"][3]  # some rows meet it early, some late, some never
    sampling = Sampling(12, stop_ids=(stop,))
    written = {completion.prompt_id: completion for completion in generate(engine, PROMPTS, sampling)}
    for name, ids in first.items():
        wanted = ids[: ids.index(stop) + 1] if stop in ids else ids
        assert list(written[name].token_ids) == wanted
        assert written[name].stop_reason == ("stop_id" if stop in ids else "length")
    assert len({len(completion.token_ids) for completion in written.values()}) > 1


def test_a_sample_is_the_same_whatever_else_is_asked_for(engine: LocalEngine) -> None:
    together = {(c.prompt_id, c.sample): c.token_ids for c in generate(engine, PROMPTS, RANDOM)}
    apart = {(c.prompt_id, c.sample): c.token_ids for c in generate(engine, PROMPTS[2:4], RANDOM)}
    assert apart == {key: together[key] for key in apart}
    assert len(set(together.values())) > len(PROMPTS), "samples of one prompt differ"


def test_tokens_are_drawn_with_the_probabilities_that_transformers_has() -> None:
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 0.7])
    sampling = Sampling(1, temperature=0.7, top_p=0.8)
    none: Any = None
    filtered_1V = TopPLogitsWarper(0.8)(none, TemperatureLogitsWarper(0.7)(none, logits_V[None]))
    wanted_V = filtered_1V.softmax(-1)[0]
    draws = 4000
    grid = [(step + 0.5) / draws for step in range(draws)]  # evenly over [0, 1): frequencies are then the probabilities
    drawn = choose_tokens(logits_V.expand(draws, -1), sampling, grid)
    got_V = torch.bincount(torch.tensor(drawn), minlength=6) / draws
    assert torch.allclose(got_V, wanted_V, atol=1.5 / draws)


def test_random_numbers_lie_evenly_and_differ_by_seed_and_step() -> None:
    numbers = [uniform(seed, step) for seed in range(40) for step in range(50)]
    assert len(set(numbers)) == 2000 and all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / 2000 - 0.5) < 0.02
    assert len({sample_seed(0, "p", sample) for sample in range(100)}) == 100
    assert all(0 <= sample_seed(7, "p", sample) < 2**31 for sample in range(100))


def test_infilling_prompts_are_the_ids_that_were_given(engine: LocalEngine) -> None:
    ids = tuple(engine.codec.psm_prompt("def x", "return"))
    (completion,) = generate(engine, [Prompt("fim", "", ids)], Sampling(4))
    assert completion.prompt_tokens == len(ids) and completion.prompt_check == "given"


def test_a_completion_is_given_what_room_the_context_has(engine: LocalEngine) -> None:
    assert engine.context_tokens == 128
    (completion,) = generate(engine, [Prompt("long", "", (1,) + (40,) * 119)], Sampling(50, stop_ids=()))
    assert completion.stop_reason in ("length", "eos") and completion.completion_tokens <= 8
    with pytest.raises(ValueError, match="prompt 'full' has 128 tokens, and the model's context is 128"):
        next(generate(engine, [Prompt("full", "", (1,) + (40,) * 127)], Sampling(5)))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([Prompt("a", "x"), Prompt("a", "y")], "two prompts have the id 'a'"),
        ([Prompt("a", "", (1, 100_000))], "id 100000 is outside of the vocabulary"),
        ([Prompt("a", "", ())], "prompt 'a' has no tokens"),
        ([Prompt("a", "x▁y")], "cannot represent this text"),
    ],
)
def test_prompts_that_cannot_be_asked_are_refused(engine: LocalEngine, prompts: list[Prompt], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(generate(engine, prompts, GREEDY))


@pytest.mark.parametrize("change", [{"max_new_tokens": 0}, {"top_p": 0.0}, {"temperature": -1.0}, {"stop_strings": ("",)}])
def test_sampling_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"sampling: `{next(iter(change))}`"):
        dataclasses.replace(GREEDY, **change)


def test_settings_that_cannot_be_met_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs `model`"):
        open_engine(EngineSettings())
    with pytest.raises(ValueError, match="pip install -e '.\\[vllm\\]'"):
        open_engine(EngineSettings(kind="vllm", model="x/y"))
    with pytest.raises(ValueError, match="no tokenizer"):
        open_engine(EngineSettings(model=str(tmp_path)))


# --- Stops -----------------------------------------------------------------------------------------------------------


def ids_of(codec: Codec, text: str) -> list[int]:
    return codec.encode_bare(text)


def test_the_first_stop_ends_a_completion_whatever_kind_it_is(tiny_codec: Codec) -> None:
    eos = tiny_codec.eos_id
    assert eos is not None
    before, after = ids_of(tiny_codec, "x = 1"), ids_of(tiny_codec, "\nreturn x")
    stops = Sampling(99, stop_strings=("return", "\n"), stop_ids=(before[-1],))
    plain = Sampling(99, stop_strings=("return", "\n"))
    assert cut_at_stop(tiny_codec, [*before, eos, *after], plain, (eos,)) == ((*before, eos), "x = 1", "x = 1", "eos")
    ids, raw, text, reason = cut_at_stop(tiny_codec, [*before, *after, eos], plain, (eos,))
    assert (text, reason) == ("x = 1", "stop_string") and raw.startswith("x = 1\n")
    assert tiny_codec.decode_bare(ids) == raw and len(ids) == len(before) + 1, "nothing is kept behind the stop's last token"
    ids, raw, text, reason = cut_at_stop(tiny_codec, [*before, *after], stops, (eos,))
    assert (raw, reason) == (tiny_codec.decode_bare(before[:-1]), "stop_id") and ids == tuple(before)
    assert cut_at_stop(tiny_codec, before, plain, (eos,)) == (tuple(before), "x = 1", "x = 1", "length")


def test_a_stop_string_across_tokens_is_found_and_ends_the_row(engine: LocalEngine) -> None:
    texts = {prompt.id: engine.codec.decode_bare(alone(engine, prompt, 12)) for prompt in PROMPTS}
    name, text = next((name, text) for name, text in texts.items() if len(text) > 8)
    stop = text[3:7]
    prompt = next(prompt for prompt in PROMPTS if prompt.id == name)
    (completion,) = generate(engine, [prompt], Sampling(12, stop_strings=("never there", stop)))
    assert completion.text == text[: text.index(stop)] and completion.stop_reason == "stop_string"
    ids = engine.write_group(
        _requests(engine, [prompt], Sampling(12, stop_strings=(stop,))), Sampling(12, stop_strings=(stop,))
    )
    assert list(completion.token_ids) == ids[0], "the row itself ended there"


# --- Plans and the file ----------------------------------------------------------------------------------------------


def _plan(engine: Engine, prompts: list[Prompt], sampling: Sampling) -> Plan:
    return make_plan(
        prompts,
        sampling,
        codec=engine.codec,
        context_tokens=engine.context_tokens,
        group_requests=engine.group_requests,
        engine=engine.describe(),
    )


def _requests(engine: Engine, prompts: list[Prompt], sampling: Sampling) -> Any:
    return _plan(engine, prompts, sampling).groups[0]


def test_groups_are_of_similar_length_and_cover_everything(engine: LocalEngine) -> None:
    plan = _plan(engine, PROMPTS, RANDOM)
    lengths = [[request.length for request in group] for group in plan.groups]
    flat = [length for group in lengths for length in group]
    assert flat == sorted(flat, reverse=True)
    assert [len(group) for group in lengths] == [5, 5, 5, 5, 4]
    asked = {(request.prompt.id, request.sample) for group in plan.groups for request in group}
    assert asked == {(prompt.id, sample) for prompt in PROMPTS for sample in range(3)}


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.55, 0.999, 1.0])
def test_a_file_that_was_cut_anywhere_is_gone_on_with(engine: LocalEngine, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "completions.jsonl"
    whole = sorted(generate(engine, PROMPTS, RANDOM, path), key=lambda c: (c.prompt_id, c.sample))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    asked: list[int] = []
    run = engine.write_group
    engine.write_group = lambda requests, sampling: (asked.append(len(requests)), run(requests, sampling))[1]  # pyright: ignore
    try:
        again = sorted(generate(engine, PROMPTS, RANDOM, path), key=lambda c: (c.prompt_id, c.sample))
    finally:
        engine.write_group = run
    assert again == whole == sorted(read_completions(path), key=lambda c: (c.prompt_id, c.sample))
    assert sum(asked) == 24 - 5 * _whole_groups(data[: int(len(data) * kept)]) or kept == 1.0 and not asked


def _whole_groups(data: bytes) -> int:
    lines = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()[1:]]
    return sum(1 for group in range(4) if sum(line["group"] == group for line in lines) == 5)


def test_a_killed_process_loses_no_finished_group(engine: LocalEngine, tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    process = multiprocessing.get_context("fork").Process(target=_write_and_die, args=(engine, path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(read_completions(path))) == 10
    again = sorted(generate(engine, PROMPTS, RANDOM, path), key=lambda c: (c.prompt_id, c.sample))
    assert again == sorted(generate(engine, PROMPTS, RANDOM), key=lambda c: (c.prompt_id, c.sample))


def _write_and_die(engine: LocalEngine, path: Path) -> None:
    for number, _ in enumerate(generate(engine, PROMPTS, RANDOM, path)):
        if number == 7:  # in the second group, which is on the disk already
            os.kill(os.getpid(), signal.SIGKILL)


def test_another_plan_is_refused_and_says_what_differs(engine: LocalEngine, tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    list(generate(engine, PROMPTS[:2], GREEDY, path))
    with pytest.raises(ValueError, match="another plan \\(sampling.temperature was 0.0, now 0.5\\)"):
        next(generate(engine, PROMPTS[:2], Sampling(12, temperature=0.5), path))
    with pytest.raises(ValueError, match="another plan \\(other prompts\\)"):
        next(generate(engine, PROMPTS[:3], GREEDY, path))
    assert len(list(generate(engine, PROMPTS[:2], GREEDY, path))) == 2


def test_a_file_of_something_else_is_left_alone(engine: LocalEngine, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for text in ("no line end", "one line\n", '{"a": 1}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="notes.txt"):
            next(generate(engine, PROMPTS[:1], GREEDY, path))
        assert path.read_text() == text


def test_two_processes_do_not_write_one_file(engine: LocalEngine, tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    first = generate(engine, PROMPTS, RANDOM, path)
    next(first)
    with pytest.raises(ValueError, match="another process is writing"):
        next(generate(engine, PROMPTS, RANDOM, path))
    first.close()  # pyright: ignore[reportAttributeAccessIssue]


# --- vLLM, by a stand-in ---------------------------------------------------------------------------------------------

STAND_IN = """
class SamplingParams:
    def __init__(self, n, temperature, top_p, seed, max_tokens, stop, stop_token_ids, include_stop_str_in_output,
                 skip_special_tokens):
        self.max_tokens, self.seed = max_tokens, seed


class _Output:
    def __init__(self, token_ids):
        self.token_ids = token_ids


class _Answer:
    def __init__(self, token_ids):
        self.outputs = [_Output(token_ids)]


class LLM:
    def __init__(self, model, tokenizer, revision, dtype, tensor_parallel_size, gpu_memory_utilization, generation_config,
                 seed):
        import os
        self.first = int(os.environ.get("CUDA_VISIBLE_DEVICES", "9").split(",")[0])

    def generate(self, prompts, settings, use_tqdm):
        if any(prompt["prompt_token_ids"][-1] == 7 for prompt in prompts):
            raise RuntimeError("out of memory")
        return [_Answer([prompt["prompt_token_ids"][-1], 40 + self.first, 2, 40][: one.max_tokens])
                for prompt, one in zip(prompts, settings, strict=True)]
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")


@pytest.mark.usefixtures("vllm")
def test_vllm_is_given_ids_and_cut_by_the_same_rule(tiny_parent: Path) -> None:
    with open_engine(EngineSettings(kind="vllm", model=str(tiny_parent), group_requests=2)) as engine:
        written = {
            c.prompt_id: c for c in generate(engine, [Prompt("a", "", (1, 41)), Prompt("b", "", (1, 42))], Sampling(9))
        }
    assert written["a"].token_ids == (41, 40, 2) and written["b"].token_ids == (42, 40, 2)
    assert {c.stop_reason for c in written.values()} == {"eos"}


@pytest.mark.usefixtures("vllm")
def test_copies_of_vllm_have_gpus_of_their_own_and_share_the_groups(tiny_parent: Path) -> None:
    settings = EngineSettings(kind="vllm", model=str(tiny_parent), group_requests=1, data_parallel=2, tensor_parallel=2)
    prompts = [Prompt(f"p{number}", "", (1, 41)) for number in range(6)]
    with open_engine(settings) as engine:
        written = list(generate(engine, prompts, Sampling(9)))
        assert sorted(c.prompt_id for c in written) == [prompt.id for prompt in prompts]
        assert {c.token_ids[1] for c in written} <= {40, 42}, "the first GPU of a copy is 0 or 2"
        with pytest.raises(ValueError, match="out of memory"):
            list(generate(engine, [Prompt("bad", "", (1, 7)), Prompt("good", "x")], Sampling(9)))
    with pytest.raises(ValueError, match="8 GPUs, and 4 are visible"):
        list(generate(open_engine(dataclasses.replace(settings, data_parallel=4)), prompts, Sampling(9)))
