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

from codetune.artifacts import read_json, row_order, why_invalid
from codetune.recipe import load_recipe
from codetune.tokens import open_codec

ROOT = Path(__file__).parents[2]
STEPS, BATCH_ROWS, POISONED_STEP, STOP = 8, 4, 3, 4
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
    return row_order(7, 16, 0, STEPS * BATCH_ROWS).tolist()[POISONED_STEP * BATCH_ROWS - 1]


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


@pytest.fixture(scope="session")
def runs(
    make_run_in: Callable[..., Path], wide_parent: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """`runs("zero3")`: what the runs of one layout left; made once in a session. `alone` is one rank in this process."""
    made: dict[str, dict[str, Any]] = {}

    def of(layout: str) -> dict[str, Any]:
        if layout in made:
            return made[layout]
        folder = tmp_path_factory.mktemp(layout)
        paths = {
            name: make_run_in(folder, name, **{"parent": str(wide_parent), "probes.infill_prompts": 0})
            for name in ("straight", "poisoned", "resumed", "elastic")
        }
        jobs: list[dict[str, Any]] = [
            {"recipe": str(paths["straight"]), "rows": str(folder / "rows")},
            {"recipe": str(paths["poisoned"]), "poison": poisoned_row()},
            {"recipe": str(paths["resumed"]), "die_after": STOP},
            {"recipe": str(paths["resumed"])},
            {"recipe": str(paths["elastic"]), "die_after": STOP},
        ]
        made[layout] = {name: load_recipe(path) for name, path in paths.items()}
        made[layout] |= {"folder": folder, "out": launch_jobs(layout, 2, folder, jobs)}
        return made[layout]

    return of


@pytest.fixture(scope="session")
def alone(make_run_in: Callable[..., Path], wide_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same runs by one rank, in this process."""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for name, poison in (("straight", None), ("poisoned", poisoned_row())):
        found[name] = load_recipe(make_run_in(folder, name, **{"parent": str(wide_parent), "probes.infill_prompts": 0}))
        jobs = folder / f"{name}.json"
        jobs.write_text(json.dumps([{"recipe": str(folder / f"{name}.yaml"), "poison": poison}]), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).with_name("on_ranks.py")), str(jobs)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_learn_what_one_learns(layout: str, runs: Callable[[str], Any], alone: dict[str, Any]) -> None:
    ours, reference = runs(layout)["straight"], alone["straight"]
    assert losses_of(ours.run_dir) == pytest.approx(losses_of(reference.run_dir), rel=1e-5)
    assert rows_of(runs(layout)["folder"] / "rows", 2) == {
        step: set(row_order(7, 16, (step - 1) * BATCH_ROWS, BATCH_ROWS).tolist()) for step in range(1, STEPS + 1)
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
