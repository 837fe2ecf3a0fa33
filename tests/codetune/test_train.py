"""The main path, in this process, on a two-layer model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from codetune import train as train_module
from codetune.artifacts import HELD_OUT, LaneWriter, PackedRow, open_rows, read_json, row_order, why_invalid, write_held_out
from codetune.collate import RowCollator
from codetune.model import PeakFlops, training_flops_per_token
from codetune.recipe import load_recipe
from codetune.sharding import Layout
from codetune.steps import rate_fraction
from codetune.train import main, train
from codetune.trainer import RowTrainer, SafeTraining


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """`poison({3})` makes the loss of every micro-batch with row 3 NaN."""

    def of(numbers: set[int]) -> None:
        def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            loss = SafeTraining.compute_loss(self, model, inputs, *rest, **named)
            return loss * float("nan") if numbers & set(inputs["row_numbers"].tolist()) else loss

        monkeypatch.setattr(RowTrainer, "compute_loss", compute_loss)

    return of


def test_a_run_leaves_a_checkpoint_that_transformers_loads(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(make_run())
    folder = train(recipe)
    assert folder == recipe.model_dir
    assert why_invalid(folder) is None
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.use_cache is True
    assert {"tokenizer.json", "recipe.yaml", "manifest.json"} <= {path.name for path in folder.iterdir()}
    assert load_recipe(folder / "recipe.yaml") == recipe
    manifest = read_json(folder / "manifest.json")
    assert (manifest["steps"], manifest["tokens"]) == (8, 2048)
    assert manifest["session"] == {"resumed_from": None, "rows_read_by_main_rank": 32}
    assert set(manifest["infilling"]) == {"psm", "spm", "prefix_only"}
    assert "held_out/python/plain" in manifest["held_out"]
    out = capsys.readouterr().out
    assert "first_line_match" in out
    assert "step 8/8" in out


def test_the_loss_falls_and_every_line_has_its_figures(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = 1e13  # so high that no machine is above 100 %
    monkeypatch.setattr(train_module, "peak_flops", lambda _: PeakFlops(peak, "the test"))
    recipe = load_recipe(make_run())
    folder = train(recipe)
    operations = training_flops_per_token(AutoModelForCausalLM.from_pretrained(folder).config, 64)
    lines = metrics_of(recipe.run_dir)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert steps[-1]["tokens"] == 2048
    for line in steps:
        fraction = rate_fraction(line["step"] - 1, total=8, warmup=2, schedule="cosine", final_fraction=1 / 30)
        assert line["learning_rate"] == pytest.approx(5e-3 * fraction)
        assert line["tokens_per_second"] > 0
        percent = 100 * line["tokens_per_second"] * operations / peak
        assert line["mfu_percent"] == pytest.approx(percent, abs=0.006)
    held_out = {line["step"]: line["held_out/prose/plain"] for line in lines if "held_out/prose/plain" in line}
    assert list(held_out) == [0, 4, 8]
    assert held_out[8] < held_out[0]


def test_the_ledger_is_what_the_rows_of_the_run_hold(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(**{"training.train_tokens": 7 * 256}))  # 28 of 32 rows
    train(recipe)
    rows = open_rows(recipe.rows_dir)
    expected: Counter[tuple[str, str]] = Counter()
    for number in row_order(recipe.seed, rows.block_rows, 0, 28).tolist():
        row = rows.row(number)
        for source, layout, length in zip(row["sources"], row["layouts"], row["document_lengths"], strict=True):
            expected[rows.manifest["source_names"][source], rows.manifest["layout_names"][layout]] += int(length)
    ledger = read_json(recipe.model_dir / "manifest.json")["ledger"]
    assert {(source, layout): n for source, line in ledger["tokens"].items() for layout, n in line.items()} == dict(expected)
    assert ledger["document_tokens"] + ledger["padding"] == 28 * 64
    logged = [line["ledger"] for line in metrics_of(recipe.run_dir) if "ledger" in line]
    assert logged[-1]["tokens"] == ledger["tokens"]


def test_four_micro_batches_of_one_row_equal_one_of_four(make_run: Callable[..., Path]) -> None:
    """Label counts differ from row to row, and one row is not learnt from at all."""
    weights = []
    for name, rows_at_once in (("many", 1), ("one", 4)):
        settings = {
            "training.micro_batch_rows": rows_at_once,
            "training.skip_rows": [0, 5],
            "training.train_tokens": 4 * 256,
        }
        weights.append(weights_of(train(load_recipe(make_run(name, **settings)))))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-5, rtol=1e-3)


def test_the_fused_head_and_plain_logits_learn_the_same(make_run: Callable[..., Path]) -> None:
    weights = []
    for head in ("fused", "logits"):
        settings = {"model.loss_head": head, "training.train_tokens": 4 * 256, "probes.infill_prompts": 0}
        weights.append(weights_of(train(load_recipe(make_run(head, **settings)))))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-5, rtol=1e-3)


def test_activation_checkpointing_and_bf16_run(make_run: Callable[..., Path]) -> None:
    settings = {"model.activation_checkpointing": True, "model.precision": "bf16", "training.train_tokens": 4 * 256}
    recipe = load_recipe(make_run(**settings))
    train(recipe)
    losses = [line["loss"] for line in metrics_of(recipe.run_dir) if "loss" in line]
    assert losses[-1] < losses[0]


def test_a_poisoned_step_is_left_out_and_written_down(
    make_run: Callable[..., Path], poison: Callable[[set[int]], None]
) -> None:
    recipe = load_recipe(make_run())
    numbers = row_order(recipe.seed, 2, 0, 32).tolist()
    poison({numbers[9]})  # position 9: step 3, first micro-batch
    train(recipe)
    (record,) = [json.loads(line) for line in (recipe.run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    assert record["step"] == 3
    assert [batch["rows"] for batch in record["micro_batches"]] == [numbers[8:10], numbers[10:12]]
    assert record["micro_batches"][0]["loss"] is None
    assert record["micro_batches"][1]["loss"] > 0
    assert all(tensor.isfinite().all() for tensor in weights_of(recipe.model_dir).values())
    optimizer = torch.load(recipe.checkpoints_dir / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in optimizer["state"].values()} == {7}  # 8 steps, one left out
    lines = {line["step"]: line for line in metrics_of(recipe.run_dir) if "learning_rate" in line}
    assert "loss" not in lines[3]  # nothing was learnt, so there is no mean
    assert lines[4]["loss"] < 6
    fraction = rate_fraction(3, total=8, warmup=2, schedule="cosine", final_fraction=1 / 30)
    assert lines[4]["learning_rate"] == pytest.approx(5e-3 * fraction)
    assert lines[8]["ledger"]["skipped_steps"] == 1


def test_the_loss_written_down_is_the_micro_batch_s_own_mean(
    make_run: Callable[..., Path], poison: Callable[[set[int]], None]
) -> None:
    recipe = load_recipe(make_run(**{"training.train_tokens": 3 * 256}))
    rows = open_rows(recipe.rows_dir)
    numbers = row_order(recipe.seed, 2, 0, 4).tolist()
    poison({numbers[0]})  # the first step, so that its second micro-batch meets the parent's weights
    train(recipe)
    (record,) = [json.loads(line) for line in (recipe.run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    batch = RowCollator(64, pad_id=0, isolate_documents=True, sources=2, layouts=3)(
        [{"row_number": number, **rows.row(number)} for number in numbers[2:]]
    )
    parent = AutoModelForCausalLM.from_pretrained(recipe.parent_path, dtype=torch.float32)
    logits = parent(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert record["micro_batches"][1]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_two_ranks_learn_what_one_learns_and_skip_the_same_step(
    make_run: Callable[..., Path], tiny_parent: Path, tmp_path: Path
) -> None:
    """One row has a token that no other has, whose embedding is NaN in the parent: rank 1 meets it, rank 0 does not."""
    parent = tmp_path / "parent"
    shutil.copytree(tiny_parent, parent)
    poisoned = weights_of(parent)
    poisoned["model.embed_tokens.weight"][UNUSED_TOKEN] = float("nan")
    save_file(poisoned, parent / "model.safetensors", metadata={"format": "pt"})
    settings = {"parent": str(parent)}
    alone, together = (load_recipe(make_run(name, **settings)) for name in ("alone", "together"))
    numbers = row_order(alone.seed, 2, 0, 32).tolist()
    for recipe in (alone, together):
        poison_row(recipe.rows_dir, numbers[11])  # 4 rows a step, 2 a micro-batch: step 3, the second micro-batch
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "codetune.train", "--recipe", str(tmp_path / "together.yaml")]
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "infilling is not measured by a run of several ranks; `make probes` measures it" in done.stdout
    assert "Setting accelerator to CPU" not in done.stderr  # DeepSpeed's warning, where it is installed
    train(alone)
    expected, weights = weights_of(alone.model_dir), weights_of(together.model_dir)
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0, equal_nan=True)
        assert tensor.isnan().sum() == (tensor.shape[1] if name == "model.embed_tokens.weight" else 0)
    records = []
    for recipe in (alone, together):
        (record,) = [json.loads(line) for line in (recipe.run_dir / "skipped_steps.jsonl").read_text().splitlines()]
        records.append(record)
        optimizer = torch.load(recipe.checkpoints_dir / "checkpoint-8" / "optimizer.pt", weights_only=True)
        assert {int(state["step"]) for state in optimizer["state"].values()} == {7}  # 8 steps, one left out
    assert [record["step"] for record in records] == [3, 3]
    assert records[1]["micro_batches"][1]["rows"] == numbers[10:12]
    assert [batch["rows"] for batch in records[1]["micro_batches"]] == [
        batch["rows"] for batch in records[0]["micro_batches"]
    ]
    assert [(batch["rank"], batch["loss"] is None) for batch in records[1]["micro_batches"]] == [(0, False), (1, True)]
    assert records[1]["micro_batches"][0]["loss"] == pytest.approx(records[0]["micro_batches"][0]["loss"], rel=1e-4)
    ledgers = [read_json(recipe.model_dir / "manifest.json")["ledger"] for recipe in (alone, together)]
    assert {**ledgers[0], "seconds": 0} == {**ledgers[1], "seconds": 0}
    assert not read_json(together.model_dir / "manifest.json")["infilling"]


UNUSED_TOKEN = 5  # a byte that no toy text has


def poison_row(rows_dir: Path, number: int) -> None:
    """Write a row anew, with the unused token in it."""
    rows = open_rows(rows_dir)
    lane = number % rows.lanes
    packed = []
    for other in range(lane, len(rows), rows.lanes):
        row = {item.name: rows.row(other)[item.name] for item in dataclasses.fields(PackedRow)}
        ids = np.array(row["input_ids"])
        assert UNUSED_TOKEN not in ids
        ids[1] = UNUSED_TOKEN if other == number else ids[1]
        packed.append(PackedRow(**{**row, "input_ids": ids}))
    writer = LaneWriter(rows_dir / f"lane-{lane:05d}.arrow", rows.manifest["vocabulary_size"])
    writer.write(packed)
    writer.close()


def test_a_gradient_that_is_not_finite_is_caught_though_the_loss_is(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = train_module.load_model

    def with_bad_gradient(*arguments: Any) -> Any:
        model = original(*arguments)

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return gradient * float("inf") if len(calls) == 3 else gradient  # step 2, two micro-batches a step

        model.model.norm.weight.register_hook(hook)
        return model

    monkeypatch.setattr(train_module, "load_model", with_bad_gradient)
    recipe = load_recipe(make_run())
    train(recipe)
    (record,) = [json.loads(line) for line in (recipe.run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    assert (record["step"], record["gradient_norm"]) == (2, None)
    assert all(tensor.isfinite().all() for tensor in weights_of(recipe.model_dir).values())


def test_too_many_poisoned_steps_stop_the_run_with_clean_checkpoints(
    make_run: Callable[..., Path], poison: Callable[[set[int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(**{"training.max_skipped_in_a_row": 3})
    recipe = load_recipe(path)
    poison(set(row_order(recipe.seed, 2, 0, 32)[16:].tolist()))  # every step from the fifth on
    with pytest.raises(SystemExit) as stopped:
        main(["--recipe", str(path)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "the last 3 steps, up to step 7, had a loss or gradient that is not finite" in message
    assert "skipped_steps.jsonl" in message
    assert not recipe.model_dir.exists()
    for checkpoint in recipe.checkpoints_dir.glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in weights_of(checkpoint).values())


def test_rows_that_the_recipe_skips_teach_nothing(make_run: Callable[..., Path]) -> None:
    settings = {"training.skip_rows": list(range(32)), "optimizer.weight_decay": 0.0, "probes.infill_prompts": 0}
    recipe = load_recipe(make_run(**settings))
    train(recipe)
    parent = weights_of(Path(recipe.parent_path))
    for name, tensor in weights_of(recipe.model_dir).items():
        assert torch.equal(tensor, parent[name])
    assert not (recipe.run_dir / "skipped_steps.jsonl").exists()


def test_a_finished_run_is_not_made_again(make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(make_run(**{"training.train_tokens": 768}))
    before = (train(recipe) / "manifest.json").read_bytes()
    train(recipe)
    assert "is there already, made with this recipe" in capsys.readouterr().out
    assert (recipe.model_dir / "manifest.json").read_bytes() == before


def test_the_folder_of_another_recipe_is_refused(make_run: Callable[..., Path]) -> None:
    path = make_run(**{"training.train_tokens": 768})
    train(load_recipe(path))
    with pytest.raises(
        ValueError, match=r"model belongs to another recipe: `optimizer.learning_rate` is 0.005 there, 0.1 here"
    ):
        train(load_recipe(path, ["optimizer.learning_rate=0.1"]))
    recipe = load_recipe(path)
    for file in recipe.model_dir.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"checkpoints belongs to another recipe"):
        train(load_recipe(path, ["optimizer.learning_rate=0.1"]))


def test_machine_settings_may_change_between_sessions(make_run: Callable[..., Path]) -> None:
    path = make_run(**{"training.train_tokens": 768})
    train(load_recipe(path))
    for file in load_recipe(path).model_dir.iterdir():
        file.unlink()
    other = ["training.micro_batch_rows=4", "training.keep_checkpoints=1", "model.activation_checkpointing=true"]
    assert why_invalid(train(load_recipe(path, other))) is None


def test_rows_of_other_settings_are_refused(make_run: Callable[..., Path]) -> None:
    path = make_run()
    with pytest.raises(
        ValueError, match=r"built from other settings: `data.fim.rate` is 0.9 in the rows, 0.5 in the recipe\. Build"
    ):
        train(load_recipe(path, ["data.fim.rate=0.5"]))


def test_missing_rows_say_how_to_build_them(make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--recipe", str(make_run(rows=False))])
    assert "make data" in capsys.readouterr().err


def test_a_launch_that_accelerate_does_not_see_is_refused(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module.sharding, "asked_layout", lambda: Layout("ddp", 2))
    monkeypatch.setattr(train_module, "load_model", lambda *_: pytest.fail("the model was loaded first"))
    with pytest.raises(ValueError, match="2 ranks were started, but Accelerate sees 1"):
        train(load_recipe(make_run()))


def test_a_reporter_that_is_not_installed_is_refused_before_the_model_is_loaded(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "load_model", lambda *_: pytest.fail("the model was loaded first"))
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    path = make_run()
    with pytest.raises(
        ValueError, match=r"names wandb, which is not installed; install it \(pip install -e '\.\[wandb\]'\)"
    ):
        train(load_recipe(path, ["training.report_to=[wandb]"]))
    with pytest.raises(ValueError, match="names 'wandbb', which is no reporter; write some of .*tensorboard.*wandb"):
        train(load_recipe(path, ["training.report_to=[wandbb]"]))


def test_rows_to_skip_that_do_not_exist_are_refused(make_run: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"`training.skip_rows` names 32, 99, but the rows in .* are numbered 0 to 31"):
        train(load_recipe(make_run(**{"training.skip_rows": [31, 32, 99]})))


def test_documents_that_see_each_other_end_the_run_before_its_first_step(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_module.load_model

    def with_full_attention(*arguments: Any) -> Any:
        model = original(*arguments)

        def forget_positions(module: Any, _: Any, named: dict[str, Any]) -> Any:
            return (), {**named, "position_ids": torch.arange(named["input_ids"].shape[1])[None]}

        model.register_forward_pre_hook(forget_positions, with_kwargs=True)
        return model

    monkeypatch.setattr(train_module, "load_model", with_full_attention)
    recipe = load_recipe(make_run())
    with pytest.raises(ValueError, match="packed documents see each other"):
        train(recipe)
    assert not (recipe.run_dir / "metrics.jsonl").exists()


def test_figures_also_go_to_tensorboard(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(load_recipe(make_run(**{"training.train_tokens": 768, "training.report_to": ["tensorboard"]})))
    written = b"".join(path.read_bytes() for path in (tmp_path / "board").rglob("events.*"))
    assert b"held_out/python/plain" in written
    assert b"tokens_per_second" in written


def test_a_run_without_held_out_documents_trains_and_measures_none(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(**{"training.train_tokens": 768}))
    write_held_out(recipe.rows_dir / HELD_OUT, [], vocabulary_size=2048)
    manifest = read_json(train(recipe) / "manifest.json")
    assert manifest["steps"] == 3 and not manifest["held_out"] and not manifest["infilling"]
