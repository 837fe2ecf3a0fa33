"""Losses of a long text in chunks are those of one forward pass, whatever the chunk; buckets and last tokens add up."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.losses
from codetune import artifacts
from codetune.generate import EngineSettings
from codetune.tokens import Codec, open_codec
from eval.losses import add_buckets, chunked_losses, context, held_out, keys
from eval.target import Target
from eval.tasks import TaskRefused, TaskSettings


@pytest.fixture(scope="module")
def target(tiny_parent: Path) -> Target:
    return Target(EngineSettings(model=str(tiny_parent)))


def one_shot(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0].double()
    return -logits_TV.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunks_give_the_losses_of_one_pass(target: Target, chunk: int) -> None:
    model = target.engine().model
    ids = torch.randint(0, model.config.vocab_size, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    whole_T = one_shot(model, ids)  # 300 tokens, where the model was made for 128
    found_T = chunked_losses(model, ids, chunk)
    assert found_T.shape == (299,) and torch.allclose(found_T.double(), whole_T, atol=1e-5, rtol=0)
    last_T = chunked_losses(model, ids, chunk, first=250)
    assert torch.allclose(last_T.double(), whole_T[249:], atol=1e-5, rtol=0)


def test_no_logits_but_those_of_a_chunk_are_made(target: Target) -> None:
    model = target.engine().model
    made: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, given, logits_TV: made.append(len(logits_TV)))
    chunked_losses(model, list(range(5, 205)), 50, first=120)
    hook.remove()
    assert max(made) <= 50 and sum(made) == 200 - 120  # and none for tokens that are not measured


def test_each_token_is_in_one_bucket() -> None:
    sums: dict[str, list[float]] = {}
    add_buckets(sums, torch.arange(1.0, 40.0))  # the loss of position p is p
    assert {name: count for name, (_, count) in sums.items()} == {
        "position/8": 7,
        "position/16": 8,
        "position/32": 16,
        "position/64": 8,
    }
    assert sums["position/8"][0] == sum(range(1, 8)) and sum(total for total, _ in sums.values()) == sum(range(1, 40))


def test_the_same_last_tokens_are_measured_under_every_length(target: Target, tmp_path: Path) -> None:
    (tmp_path / "long").mkdir()
    text = "value = total + 1\n" * 4000
    (tmp_path / "long" / "a.py").write_text(text)
    (tmp_path / "long" / "short.py").write_text("x")  # below 50 kB
    settings = TaskSettings("context", lengths=(64, 200), target_tokens=16)
    figures = context(settings, target, None, tmp_path)
    codec = target.engine().codec
    ids = codec.plain(codec.encode(text), last=False)[:200]
    whole = one_shot(target.engine().model, ids)[-16:].mean().item()
    short = one_shot(target.engine().model, ids[-64:])[-16:].mean().item()
    assert figures["last/200"] == pytest.approx(whole, abs=1e-5) and figures["last/64"] == pytest.approx(short, abs=1e-5)
    assert figures["documents"] == 1.0 and math.isfinite(figures["position/8"])
    with pytest.raises(TaskRefused, match="no document of 100000 tokens"):
        context(TaskSettings("context", lengths=(100_000,)), target, None, tmp_path)


def test_a_killed_measurement_goes_on_behind_what_it_has(
    target: Target, make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codetune.recipe import load_recipe

    rows, path = load_recipe(make_run()).rows_dir, tmp_path / "keys.measured.jsonl"
    settings = TaskSettings("keys", lengths=(100, 120), depths=(0.5,), prompts=2)
    whole = keys(settings, target, rows, None, path)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4 and set(whole) == {f"key/{n}/0.5/{what}" for n in (100, 120) for what in ("found", "nats")}
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])  # killed while the last line was written
    measured: list[int] = []
    real = eval.losses.target_results
    monkeypatch.setattr(
        eval.losses, "target_results", lambda model, rows, *more: measured.append(len(rows)) or real(model, rows, *more)
    )
    assert keys(settings, target, rows, None, path) == whole and measured == [1]
    assert sorted(path.read_bytes().splitlines()) == sorted(line.strip() for line in lines)
    answer = json.loads(lines[0])["answer"].strip()
    assert answer.isdigit() and len(answer) == 2  # each prompt's line says which number was to be found


def test_losses_on_held_out_documents_need_rows_of_the_same_tokenizer(
    target: Target, make_run: Callable[..., Path], tiny_codec: Codec
) -> None:
    from codetune.recipe import load_recipe

    rows = load_recipe(make_run()).rows_dir
    figures = held_out(TaskSettings("held-out"), target, rows, None)
    assert any(name.startswith("span/") and name.endswith("/psm_middle") for name in figures)
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    found = keys(TaskSettings("keys", lengths=(120,), depths=(0.5,), prompts=2), target, rows, None)
    assert found["key/120/0.5/found"]["value"] in (0.0, 0.5, 1.0) and found["key/120/0.5/found"]["problems"] == 2
    manifest = artifacts.read_json(rows / "manifest.json")
    artifacts.write_json(rows / "manifest.json", {**manifest, "tokenizer": "another"})
    with pytest.raises(TaskRefused, match="another tokenizer"):
        held_out(TaskSettings("held-out"), target, rows, None)
    assert open_codec(target.settings.model or "").fingerprint == tiny_codec.fingerprint
