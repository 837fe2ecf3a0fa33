"""Several ranks, launched for real: every file of recipes/accelerate, through `accelerate launch`, on CPU ranks by gloo.

One launch of a layout makes several runs, since starting costs more than they do: left alone, poisoned, ended at a
checkpoint and gone on with. The parent's embedding is large enough for ZeRO-3 to share out (smaller ones it keeps whole).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from codetune.artifacts import newest_valid_checkpoint, read_json, row_order, why_invalid
from codetune.recipe import load_recipe
from codetune.tokens import open_codec

ROOT = Path(__file__).parents[2]
STEPS, BATCH_ROWS, POISONED_STEP, STOP = 8, 4, 3, 4
LANES = 2  # of toy rows, whose order is drawn among one row of each
NOISE = 1e-6  # of weights near 0.02 after eight steps of 5e-3; two orders of adding up are 1.5e-7 apart here
LAYOUTS = [
    pytest.param("ddp", marks=pytest.mark.xdist_group("ddp")),
    pytest.param("zero2", marks=[pytest.mark.xdist_group("zero2"), pytest.mark.compiler]),
    pytest.param("zero3", marks=[pytest.mark.xdist_group("zero3"), pytest.mark.compiler]),
    pytest.param("fsdp2", marks=pytest.mark.xdist_group("fsdp2")),
]


@pytest.fixture(scope="session")
def wide_parent(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Path:
    """A two-layer Llama with an embedding of 131,072 weights, above what ZeRO-3 keeps whole."""
    return save_llama(tmp_path_factory.mktemp("wide") / "model", tiny_tokenizer, hidden_size=64, vocab_size=2048)


def launch(config: str, ranks: int, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with a file of ours; only the device is another one."""
    if config.startswith(("zero", "ulysses")) and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here, which DeepSpeed's CPU operator needs")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(ROOT / f"recipes/accelerate/{config}.yaml"), "--num_processes", str(ranks)]
    command += ["--main_process_port", "0", *arguments]
    settings = {"CODETUNE_CPU_RANKS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return subprocess.run(
        command, env={**os.environ, **settings, **environment}, capture_output=True, text=True, timeout=600, check=False
    )


def launch_jobs(config: str, ranks: int, folder: Path, jobs: list[dict[str, Any]]) -> str:
    """Run jobs of `on_ranks.py` in one launch; what the main rank printed."""
    path = folder / f"{config}-{ranks}.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    done = launch(config, ranks, [str(Path(__file__).with_name("on_ranks.py")), str(path)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def poisoned_row() -> int:
    """A row in the third step's last micro-batch, which is the second rank's alone."""
    return row_order(7, LANES, 0, STEPS * BATCH_ROWS).tolist()[POISONED_STEP * BATCH_ROWS - 1]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def rows_of(path: Path, ranks: int) -> dict[int, set[int]]:
    """Step -> rows that all ranks read in it, each by one rank, once."""
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        for line in Path(f"{path}.{rank}").read_text().splitlines():
            step, _, numbers = json.loads(line)
            found.setdefault(step, []).extend(numbers)
    assert all(len(set(numbers)) == len(numbers) for numbers in found.values())
    return {step: set(numbers) for step, numbers in found.items()}


FULL_ATTENTION = {"data.packing.isolate_documents": False, "data.packing.strategy": "concatenate"}


@pytest.fixture(scope="session")
def make_runs(
    make_run_in: Callable[..., Path], wide_parent: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """`make_runs("straight", "poisoned")`: recipes of those names with the same rows, in a folder of their own."""

    def make(*names: str, **settings: Any) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("runs")
        everywhere = {"parent": str(wide_parent), "probes.infill_prompts": 0, **settings}
        return {name: load_recipe(make_run_in(folder, name, **everywhere)) for name in names} | {"folder": folder}

    return make


def job(made: dict[str, Any], name: str, **more: Any) -> dict[str, Any]:
    return {"recipe": str(made["folder"] / f"{name}.yaml"), **more}


@pytest.fixture(scope="session")
def runs(make_runs: Callable[..., dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """`runs("zero3")`: what the runs of two ranks under one layout left; made once in a session."""
    made: dict[str, dict[str, Any]] = {}

    def of(layout: str) -> dict[str, Any]:
        if layout not in made:
            found = made[layout] = make_runs("straight", "talking", "poisoned", "resumed", "elastic", "mistaken", "rounded")
            jobs = [
                job(found, "straight", rows=str(found["folder"] / "rows")),
                job(found, "talking", sft=True),
                job(found, "poisoned", poison=poisoned_row()),
                job(found, "resumed", die_after=STOP),
                job(found, "resumed"),
                job(found, "elastic", die_after=STOP),
                job(found, "rounded", set=["model.precision=bf16", "model.activation_checkpointing=true"]),
            ]
            jobs += [job(found, "mistaken", believes="alone")] if layout == "ddp" else []
            jobs += [job(found, "mistaken", believes="whole")] if layout == "fsdp2" else []
            found["out"] = launch_jobs(layout, 2, found["folder"], jobs)
        return made[layout]

    return of


@pytest.fixture(scope="session")
def alone(make_runs: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The same by one rank, launched with gpu.yaml; "mixed" is one whose documents see each other."""
    found, mixed = make_runs("straight", "poisoned"), make_runs("straight", **FULL_ATTENTION)
    jobs = [job(found, "straight"), job(found, "poisoned", poison=poisoned_row()), job(mixed, "straight")]
    launch_jobs("gpu", 1, found["folder"], jobs)
    return found | {"mixed": mixed["straight"]}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trainer_of_conversations_makes_the_same_steps(layout: str, runs: Callable[[str], dict[str, Any]]) -> None:
    """trl's SFTTrainer under the mixin, on the rows that the stock trainer had: the same losses, the same weights."""
    found = runs(layout)
    straight, talking = found["straight"], found["talking"]
    assert losses_of(talking.run_dir) == losses_of(straight.run_dir)
    own, other = weights_of(talking.model_dir), weights_of(straight.model_dir)
    assert all(torch.equal(own[name], weight) for name, weight in other.items())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_learn_what_one_learns(layout: str, runs: Callable[[str], Any], alone: dict[str, Any]) -> None:
    ours, reference = runs(layout)["straight"], alone["straight"]
    assert losses_of(ours.run_dir) == pytest.approx(losses_of(reference.run_dir), rel=1e-5)
    assert rows_of(runs(layout)["folder"] / "rows", 2) == {
        step: set(row_order(7, LANES, (step - 1) * BATCH_ROWS, BATCH_ROWS).tolist()) for step in range(1, STEPS + 1)
    }
    expected, weights = weights_of(reference.model_dir), weights_of(ours.model_dir)
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=NOISE, rtol=0)
    for figure, value in read_json(reference.model_dir / "manifest.json")["held_out"].items():
        assert read_json(ours.model_dir / "manifest.json")["held_out"][figure] == pytest.approx(value, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_two_ranks_export_is_an_ordinary_folder(layout: str, runs: Callable[[str], Any], wide_parent: Path) -> None:
    recipe = runs(layout)["straight"]
    assert why_invalid(recipe.model_dir) is None
    model = AutoModelForCausalLM.from_pretrained(recipe.model_dir)
    for name, tensor in weights_of(recipe.model_dir).items():
        assert torch.equal(model.get_parameter(name), tensor)
    assert open_codec(recipe.model_dir).fingerprint == open_codec(wide_parent).fingerprint
    assert open_codec(recipe.model_dir).infill == open_codec(wide_parent).infill
    assert type(model.lm_head) is torch.nn.Linear
    assert model.config.use_cache is True


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_poisoned_on_one_rank_is_left_out_on_both(
    layout: str, runs: Callable[[str], Any], alone: dict[str, Any]
) -> None:
    ours, reference = runs(layout)["poisoned"], alone["poisoned"]
    (record,) = [json.loads(line) for line in (ours.run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    assert record["step"] == POISONED_STEP
    poisoned = [batch for batch in record["micro_batches"] if batch["loss"] is None]
    assert [(batch["rank"], poisoned_row() in batch["rows"]) for batch in poisoned] == [(1, True)]
    expected, weights = weights_of(reference.model_dir), weights_of(ours.model_dir)
    for name, tensor in expected.items():  # and so nothing leaked into later steps, or into the optimizer's state
        assert weights[name].isfinite().all()
        torch.testing.assert_close(weights[name], tensor, atol=NOISE, rtol=0)
    assert losses_of(ours.run_dir) == pytest.approx(losses_of(reference.run_dir), rel=1e-5)
    lines = [json.loads(line) for line in (ours.run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    lines = [json.loads(line) for line in (reference.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rates == [line["learning_rate"] for line in lines if "learning_rate" in line]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_two_ranks_goes_on_to_the_same_bits(layout: str, runs: Callable[[str], Any]) -> None:
    resumed, straight = runs(layout)["resumed"], runs(layout)["straight"]
    manifest = read_json(resumed.model_dir / "manifest.json")
    assert manifest["session"]["resumed_from"] == f"checkpoint-{STOP}"
    assert manifest["session"]["rows_read_by_main_rank"] == (STEPS - STOP) * BATCH_ROWS // 2
    for name, tensor in weights_of(straight.model_dir).items():
        assert torch.equal(weights_of(resumed.model_dir)[name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_two_ranks_goes_on_with_one_on_the_same_batches(layout: str, runs: Callable[[str], Any]) -> None:
    """And with another micro-batch, accumulation and number of workers."""
    made = runs(layout)
    recipe, folder = made["elastic"], made["folder"]
    checkpoint = recipe.checkpoints_dir / f"checkpoint-{STOP}"
    goes_on = job(
        made, "elastic", set=["training.micro_batch_rows=1", "training.loader_workers=2"], rows=str(folder / "later")
    )
    zero = layout.startswith("zero")
    jobs = [job(made, "elastic"), {"convert": str(checkpoint)}, goes_on] if zero else [goes_on]
    out = launch_jobs("cpu" if layout == "ddp" else layout, 1, folder, jobs)
    if zero:
        assert f"checkpoint-{STOP} was written by 2 rank(s) under {layout}, and this is 1" in out
        assert f"Convert them once (python -m codetune.sharding {checkpoint})" in out
    assert f"going on from {checkpoint}" in out
    assert rows_of(folder / "later", 1) == {
        step: set(row_order(7, LANES, (step - 1) * BATCH_ROWS, BATCH_ROWS).tolist()) for step in range(STOP + 1, STEPS + 1)
    }
    assert losses_of(recipe.run_dir) == pytest.approx(losses_of(made["straight"].run_dir), rel=1e-5)
    expected, weights = weights_of(made["straight"].model_dir), weights_of(recipe.model_dir)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=NOISE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_and_recomputation_learn_about_the_same_and_losses_are_not_rounded(
    layout: str, runs: Callable[[str], Any]
) -> None:
    found, exact = (losses_of(runs(layout)[name].run_dir) for name in ("rounded", "straight"))
    assert found == pytest.approx(exact, rel=2e-3)
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in found)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_damaged_shard_is_passed_over_and_named(layout: str, runs: Callable[[str], Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(runs(layout)["straight"].checkpoints_dir, folder)
    shards = "*/__1_0.distcp" if layout == "fsdp2" else "global_step*/*rank_1_mp_rank_00_optim_states.pt"
    truncated = next((folder / "checkpoint-8").glob(shards))
    truncated.write_bytes(truncated.read_bytes()[:-100])
    found, (sentence,) = newest_valid_checkpoint(folder)
    assert found == folder / "checkpoint-6"
    assert f"checkpoint-8: skipped, {truncated.relative_to(folder / 'checkpoint-8')} has" in sentence
    missing = next((folder / "checkpoint-6").glob(shards))
    missing.unlink()
    found, sentences = newest_valid_checkpoint(folder)
    assert found is None
    assert sentences[1].endswith(f"skipped, {missing.relative_to(folder / 'checkpoint-6')} is missing")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[:1])
def test_ranks_that_would_each_train_alone_are_refused(layout: str, runs: Callable[[str], Any]) -> None:
    assert "error: 2 ranks were started, but Accelerate sees 1: each would train alone" in runs(layout)["out"]
    assert not runs(layout)["mistaken"].model_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[3:])
def test_a_model_that_is_not_shared_out_as_asked_is_refused(layout: str, runs: Callable[[str], Any]) -> None:
    assert "the launcher asked for fsdp2 over 2 rank(s), but Accelerate chose MULTI_CPU" in runs(layout)["out"]
    assert not runs(layout)["mistaken"].model_dir.exists()


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.xdist_group("ulysses")
def test_two_ranks_that_share_rows_learn_what_one_learns_and_refuse_to_mix_documents(
    make_runs: Callable[..., dict[str, Any]], alone: dict[str, Any]
) -> None:
    made, isolated = make_runs("straight", **FULL_ATTENTION), make_runs("refused", "checked")
    recipe, reference, folder = made["straight"], alone["mixed"], made["folder"]
    # DeepSpeed takes one model that shares rows in a process
    out = launch_jobs("ulysses", 2, folder, [job(isolated, "refused"), job(made, "straight")])
    straight = weights_of(recipe.model_dir)
    for name, tensor in weights_of(reference.model_dir).items():
        torch.testing.assert_close(straight[name], tensor, atol=NOISE, rtol=0)
    assert losses_of(recipe.run_dir) == pytest.approx(losses_of(reference.run_dir), rel=1e-5)
    ledgers = [read_json(found.model_dir / "manifest.json")["ledger"] for found in (recipe, reference)]
    assert {**ledgers[0], "seconds": 0} == {**ledgers[1], "seconds": 0}

    shutil.rmtree(recipe.model_dir)
    shutil.rmtree(recipe.checkpoints_dir / f"checkpoint-{STEPS}")
    out += launch_jobs("ulysses", 2, folder, [job(made, "straight")])
    assert f"going on from {recipe.checkpoints_dir / f'checkpoint-{STEPS - 2}'}" in out
    for name, tensor in weights_of(recipe.model_dir).items():
        assert torch.equal(tensor, straight[name])

    out += launch_jobs("ulysses", 2, folder, [job(isolated, "checked", unchecked=True)])
    assert "`model.attention` is sdpa, for which DeepSpeed drops the mask where ranks share rows" in out
    assert "packed documents see each other: their logits differ by" in out
    assert not isolated["refused"].model_dir.exists() and not isolated["checked"].model_dir.exists()


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.xdist_group("zero3")
def test_optimizer_and_weights_kept_in_memory_learn_the_same(
    make_runs: Callable[..., dict[str, Any]], alone: dict[str, Any]
) -> None:
    made = make_runs("straight")
    launch_jobs("zero3_offload", 2, made["folder"], [job(made, "straight")])
    for name, tensor in weights_of(alone["straight"].model_dir).items():
        torch.testing.assert_close(weights_of(made["straight"].model_dir)[name], tensor, atol=NOISE, rtol=0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is here")
def test_a_launch_for_gpus_that_finds_none_is_refused(make_runs: Callable[..., dict[str, Any]]) -> None:
    made = make_runs("straight")
    arguments = ["-m", "codetune.train", "--recipe", str(made["folder"] / "straight.yaml")]
    for config, ranks in (("ddp", 2), ("gpu", 1)):
        done = launch(config, ranks, arguments, CODETUNE_CPU_RANKS="0")
        assert done.returncode != 0
        assert "error: the launch is one for GPUs, and this machine shows none" in done.stderr
        assert "CODETUNE_CPU_RANKS=1" in done.stderr


def test_every_launch_file_is_launched_here() -> None:
    launched = {"cpu", "gpu", "ulysses", "zero3_offload", *(parameter.values[0] for parameter in LAYOUTS)}
    assert {path.stem for path in (ROOT / "recipes/accelerate").glob("*.yaml")} == launched
