"""What clusters do to a run, done to a run: asked to stop at any moment, no time, no space, leaps of the loss."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from codetune import checkpoints, probes
from codetune.artifacts import newest_valid_checkpoint, open_rows, read_json, row_order, why_invalid
from codetune.checkpoints import numbered_checkpoints
from codetune.guard import LEAST, SpikeWatch
from codetune.recipe import Recipe, load_recipe
from codetune.tokens import Codec
from codetune.train import check_spikes, main, train
from codetune.trainer import RowTrainer, SafeTraining
from data_pipelines.build import explain_row
from data_pipelines.spikes import describe, read_records, worst_first
from data_pipelines.spikes import main as spikes

Poison = Any  # tests/conftest.py's

SOURCE = str(Path(__file__).parents[2] / "src")
STEPS = 40
LONG = {"training.train_tokens": STEPS * 256, "training.save_tokens": 5 * 256, "probes.infill_prompts": 0}


@pytest.fixture(scope="module")
def straight(make_run_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished model of a long run that nothing happened to."""
    return train(load_recipe(make_run_in(tmp_path_factory.mktemp("straight"), **LONG)))


def run_slowly(path: str, arguments: list[str], slow: dict[str, float], folder: str) -> None:
    """The command, with parts that take longer and leave a file of their name; its errors in a file."""

    def slowed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name in slow:
                Path(folder, name).touch()
                time.sleep(slow[name])
            return function(*args, **kwargs)

        return call

    length_batches = probes.length_batches
    probes.length_batches = lambda lengths, tokens: length_batches(lengths, min(tokens, 512))  # several to an evaluation
    probes.sample_losses = slowed("evaluation", probes.sample_losses)
    checkpoints.seal_folder = slowed("save", checkpoints.seal_folder)
    with open(Path(folder, "stderr"), "w", encoding="utf-8") as sys.stderr:
        main(["--recipe", path, *arguments])


@pytest.fixture
def start(processes: Any, tmp_path: Path) -> Callable[..., Any]:
    """`start(path, "--minutes", "1", evaluation=0.2)` starts the command in a process of its own."""

    def begin(path: Path, *arguments: str, **slow: float) -> Any:
        process = processes.Process(target=run_slowly, args=(str(path), list(arguments), slow, str(tmp_path)))
        process.start()
        return process

    return begin


def metrics_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def same_weights(model: Path, other: Path) -> bool:
    return (model / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def steps_of(folder: Path) -> list[int]:
    assert all(why_invalid(found) is None for found in numbered_checkpoints(folder))
    return [int(found.name.removeprefix("checkpoint-")) for found in numbered_checkpoints(folder)]


# ---------------------------------------------------------------------------------------------------------------------
# Being asked to stop


def test_a_signal_ends_a_long_evaluation_and_the_next_session_makes_it_anew(
    make_run: Callable[..., Path], start: Callable[..., Any], wait_until: Callable[..., None], straight: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(path := make_run(**LONG))
    process = start(path, evaluation=0.1)
    wait_until(lambda: any(line["step"] == 3 for line in metrics_of(recipe.run_dir)), process.is_alive)
    (tmp_path / "evaluation").unlink()
    wait_until((tmp_path / "evaluation").exists, process.is_alive)
    os.kill(process.pid, signal.SIGUSR1)
    process.join()
    assert process.exitcode == 75
    assert steps_of(recipe.checkpoints_dir) == [4]  # the step before the evaluation, and not one of every five
    ended = read_json(recipe.run_dir / "ended.json")
    assert (ended["state"], ended["reason"], ended["checkpoint"]) == ("stopped", "SIGUSR1", "checkpoint-4")
    assert not [line for line in metrics_of(recipe.run_dir) if line["step"] == 4 and "held_out/python/plain" in line]
    train(recipe)
    assert same_weights(recipe.model_dir, straight)
    held_out = [
        [(line["step"], line["held_out/python/plain"]) for line in metrics_of(folder) if "held_out/python/plain" in line]
        for folder in (recipe.run_dir, straight.parent)
    ]
    assert [step for step, _ in held_out[0]] == [step for step, _ in held_out[1]] == list(range(0, STEPS + 1, 4))
    assert [loss for _, loss in held_out[0]] == pytest.approx([loss for _, loss in held_out[1]], abs=1e-5)
    assert read_json(recipe.run_dir / "ended.json")["state"] == "finished"


def test_a_signal_while_loading_or_measuring_the_parent_leaves_nothing(
    make_run: Callable[..., Path], start: Callable[..., Any], wait_until: Callable[..., None], tmp_path: Path
) -> None:
    recipe = load_recipe(path := make_run())
    process = start(path, evaluation=0.2)
    wait_until((tmp_path / "evaluation").exists, process.is_alive)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 75
    assert not numbered_checkpoints(recipe.checkpoints_dir)
    ended = read_json(recipe.run_dir / "ended.json")
    assert (ended["state"], ended["reason"], ended["checkpoint"]) == ("stopped", "SIGTERM", None)


def test_a_signal_during_the_last_save_is_not_followed_by_another(
    make_run: Callable[..., Path], start: Callable[..., Any], wait_until: Callable[..., None], straight: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(path := make_run(**LONG, **{"training.background_saves": False}))
    process = start(path, save=0.5)
    wait_until((tmp_path / "save").exists, process.is_alive)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 75
    assert steps_of(recipe.checkpoints_dir) == [5]
    train(recipe)
    assert same_weights(recipe.model_dir, straight)


def test_a_signal_during_a_save_in_the_background_waits_for_it_and_saves_again(
    make_run: Callable[..., Path], start: Callable[..., Any], wait_until: Callable[..., None], straight: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(path := make_run(**LONG))
    process = start(path, save=0.5)
    wait_until((tmp_path / "save").exists, process.is_alive)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 75
    steps = steps_of(recipe.checkpoints_dir)
    assert steps[0] == 5
    assert len(steps) in (1, 2)  # one where the signal came before the copy was made
    train(recipe)
    assert same_weights(recipe.model_dir, straight)


def test_a_save_that_outlasts_the_grace_period_is_given_up(
    make_run: Callable[..., Path], start: Callable[..., Any], wait_until: Callable[..., None], straight: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(path := make_run(**LONG))
    assert start(path).join() is None
    for folder in (recipe.model_dir, *numbered_checkpoints(recipe.checkpoints_dir)[1:]):
        shutil.rmtree(folder)
    process = start(path, "--grace-seconds", "0.6", save=30)
    wait_until((tmp_path / "save").exists, process.is_alive)
    os.kill(process.pid, signal.SIGTERM)
    begin = time.monotonic()
    process.join()
    assert time.monotonic() - begin < 10
    assert process.exitcode == 75
    assert steps_of(recipe.checkpoints_dir) == [35]  # the newest but one of the first session
    assert not list(recipe.checkpoints_dir.glob(".incomplete*"))
    ended = read_json(recipe.run_dir / "ended.json")
    assert (ended["state"], ended["reason"], ended["checkpoint"]) == ("stopped", "SIGTERM, and given up", "checkpoint-35")
    assert "given up: the time ran out" in (tmp_path / "stderr").read_text()
    train(recipe)
    assert same_weights(recipe.model_dir, straight)


def test_what_the_whole_group_is_sent_does_not_take_the_loaders_down(
    make_run: Callable[..., Path], wait_until: Callable[..., None], straight: Path
) -> None:
    """Schedulers signal every process of a job: the two workers, which would die of it, too."""
    path = make_run(**LONG)
    recipe = load_recipe(path)
    command = [sys.executable, "-m", "codetune.train", "--recipe", str(path), "--set", "training.loader_workers=2"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: any(line["step"] == 3 for line in metrics_of(recipe.run_dir)), lambda: process.poll() is None)
    assert len(psutil.Process(process.pid).children()) >= 2
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 75, out
    assert "Traceback" not in out
    assert out.count("stopping after this step") == 1
    train(recipe)
    assert same_weights(recipe.model_dir, straight)


def test_a_time_budget_ends_the_run_in_time_with_a_checkpoint(
    make_run: Callable[..., Path], start: Callable[..., Any], straight: Path
) -> None:
    recipe = load_recipe(path := make_run(**LONG))
    process = start(path, "--minutes", "0.5", evaluation=3.0)  # half a minute, and ten evaluations of several seconds
    begin = time.monotonic()
    process.join()
    assert time.monotonic() - begin < 30
    assert process.exitcode == 75
    (ended, steps) = read_json(recipe.run_dir / "ended.json"), steps_of(recipe.checkpoints_dir)
    assert (ended["state"], ended["reason"], ended["checkpoint"]) == (
        "stopped",
        "the time budget",
        f"checkpoint-{steps[-1]}",
    )
    assert 0 < steps[-1] < STEPS
    train(recipe)
    assert same_weights(recipe.model_dir, straight)


def test_a_budget_shorter_than_one_save_is_one_message_and_changes_nothing(
    make_run: Callable[..., Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = load_recipe(path := make_run(**LONG))
    start(path).join()
    shutil.rmtree(recipe.model_dir)
    (recipe.checkpoints_dir / "save_seconds.json").write_text('{"longest": 600.0, "last": 1.0}')
    before = steps_of(recipe.checkpoints_dir)
    process = start(path, "--minutes", "2")
    process.join()
    assert process.exitcode == 2
    message = (tmp_path / "stderr").read_text()
    assert "Traceback" not in message
    assert "the time budget (--minutes) leaves 1" in message
    assert "one save is expected to take up to 900.0 s; give it more. Nothing was trained, and nothing changed" in message
    assert steps_of(recipe.checkpoints_dir) == before
    process = start(path, "--minutes", "0.0001")
    process.join()
    assert process.exitcode == 2
    assert "the budget was spent" in (tmp_path / "stderr").read_text()
    assert steps_of(recipe.checkpoints_dir) == before


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoints there are


def test_save_now_makes_a_checkpoint_that_stays(
    make_run: Callable[..., Path], start: Callable[..., Any], wait_until: Callable[..., None]
) -> None:
    recipe = load_recipe(path := make_run(**LONG))
    process = start(path, evaluation=0.05)
    wait_until(lambda: any(line["step"] == 1 for line in metrics_of(recipe.run_dir)), process.is_alive)
    (recipe.run_dir / "save-now").touch()
    wait_until(lambda: not (recipe.run_dir / "save-now").exists(), process.is_alive)
    asked = [found for found in numbered_checkpoints(recipe.checkpoints_dir) if read_json(found / "manifest.json")["kept"]]
    assert len(asked) == 1
    process.join()
    assert process.exitcode == 0
    step = int(asked[0].name.removeprefix("checkpoint-"))
    assert steps_of(recipe.checkpoints_dir) == sorted({step, 35, 40})


def test_stop_now_saves_and_ends(
    make_run: Callable[..., Path], start: Callable[..., Any], wait_until: Callable[..., None], straight: Path
) -> None:
    recipe = load_recipe(path := make_run(**LONG))
    process = start(path, evaluation=0.05)
    wait_until(lambda: any(line["step"] == 1 for line in metrics_of(recipe.run_dir)), process.is_alive)
    (recipe.run_dir / "stop-now").touch()
    process.join()
    assert process.exitcode == 75
    assert not (recipe.run_dir / "stop-now").exists()
    assert read_json(recipe.run_dir / "ended.json")["reason"] == "stop-now"
    assert steps_of(recipe.checkpoints_dir)
    train(recipe)
    assert same_weights(recipe.model_dir, straight)


def test_some_checkpoints_are_never_deleted(make_run: Callable[..., Path]) -> None:
    settings = {"training.save_tokens": 2 * 256, "training.keep_tokens": 5 * 256, "training.train_tokens": 20 * 256}
    recipe = load_recipe(make_run(**settings, **{"probes.infill_prompts": 0}))
    train(recipe)
    assert steps_of(recipe.checkpoints_dir) == [5, 10, 15, 16, 18, 20]  # 16 and 18 are the newest two light ones
    kept = {path.name: read_json(path / "manifest.json")["kept"] for path in numbered_checkpoints(recipe.checkpoints_dir)}
    assert [name for name, value in kept.items() if value] == [f"checkpoint-{step}" for step in (5, 10, 15, 20)]


def test_in_the_background_the_same_files_are_written(make_run: Callable[..., Path]) -> None:
    settings = {"training.train_tokens": 6 * 256, "training.keep_checkpoints": 9, "probes.infill_prompts": 0}
    runs = [
        load_recipe(make_run(name, **settings, **{"training.background_saves": background}))
        for name, background in (("behind", True), ("before", False))
    ]
    for recipe in runs:
        train(recipe)
    assert steps_of(runs[0].checkpoints_dir) == steps_of(runs[1].checkpoints_dir) == [2, 4, 6]
    for step in (2, 4, 6):
        behind, before = (recipe.checkpoints_dir / f"checkpoint-{step}" for recipe in runs)
        names = {path.name for path in behind.iterdir()}
        assert names == {path.name for path in before.iterdir()}
        for name in names & {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}:
            assert (behind / name).read_bytes() == (before / name).read_bytes(), name
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            one, other = (torch.load(folder / name, weights_only=False) for folder in (behind, before))
            assert same(one, other), name
    saves = [line for line in metrics_of(runs[0].run_dir) if "save_seconds" in line]
    assert [line["save_step"] for line in saves] == [2, 4, 6]
    assert all(0 <= line["save_waited_seconds"] <= line["save_seconds"] + 0.1 for line in saves)


def same(one: Any, other: Any) -> bool:
    """Equal, to the bit, whatever it is made of."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool((one == other).all()) if hasattr(one, "all") else one == other


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_a_missing_file_and_a_stale_lock_are_passed_over(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(**LONG))
    train(recipe)
    shutil.rmtree(recipe.model_dir)
    (recipe.run_dir / ".lock").write_text("123456789 of another machine\n")
    newest = recipe.checkpoints_dir / "checkpoint-40"
    (newest / "optimizer.pt").unlink()
    checkpoint, sentences = newest_valid_checkpoint(recipe.checkpoints_dir)
    assert checkpoint == recipe.checkpoints_dir / "checkpoint-35"
    assert sentences == [f"{newest}: skipped, optimizer.pt is missing"]
    train(recipe)
    assert read_json(recipe.model_dir / "manifest.json")["session"]["resumed_from"] == "checkpoint-35"


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew_by_itself(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(**{"training.train_tokens": 4 * 256}))
    train(recipe)
    shutil.rmtree(recipe.model_dir)
    for found in numbered_checkpoints(recipe.checkpoints_dir):
        (found / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"none of the 2 checkpoint.* is whole \(model.safetensors is missing\); put back"):
        train(recipe)
    shutil.rmtree(recipe.checkpoints_dir)
    assert why_invalid(train(recipe)) is None


SMALL_DISK = """
import json, subprocess, sys
from pathlib import Path
small, recipe = sys.argv[1], sys.argv[2]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=%d" % int(sys.argv[3]), "none", small], check=True)
done = subprocess.run([*sys.argv[4:], "-m", "codetune.train", "--recipe", recipe], capture_output=True, text=True)
from codetune.artifacts import why_invalid
found = {path.name: why_invalid(path) for path in Path(small).rglob("checkpoint-*")}
left = [path.name for path in Path(small).rglob(".incomplete*")]
print(json.dumps([done.returncode, done.stderr, found, left]))
"""


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this machine lets nobody mount a small file system")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_disk_that_fills_ends_every_rank_with_one_message_and_whole_checkpoints(
    make_run: Callable[..., Path], tmp_path: Path, ranks: int
) -> None:
    """A file system that holds a few checkpoints of about 0.6 MB, and not all eight."""
    (tmp_path / "small").mkdir()
    settings = {**LONG, "training.keep_checkpoints": 9, "runs": str(tmp_path / "runs")}
    path = make_run(**settings)
    recipe = load_recipe(path)
    recipe.checkpoints_dir.symlink_to(tmp_path / "small")
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", SMALL_DISK, str(tmp_path / "small"), str(path), "1900000", *launch],
        env={**os.environ, "PYTHONPATH": SOURCE, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    code, errors, found, left = json.loads(done.stdout.splitlines()[-1])
    assert code == (2 if ranks == 1 else 1), errors  # torchrun makes 1 of every code
    (full,) = {int(step) for step in re.findall(r"checkpoint-(\d+) could not be written \(", errors)}
    whole = [f"checkpoint-{step}" for step in range(5, full, 5)]
    assert len(whole) >= 2
    assert found == dict.fromkeys(whole), errors
    assert not left
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    # The second rank meets the full disk or hears of it, unless torchrun ends it before that.
    assert 1 <= len(messages) <= ranks, errors
    assert all("could not be written" in message for message in messages)
    assert "); 0 MB were free there. " in errors  # what failed is told in the library's words, of which there are many
    assert f"Nothing half-written was kept; whole checkpoints: {', '.join(whole)}. Free" in errors
    assert errors.count("Traceback (most recent call last)") == ranks - 1  # torchrun's own


# ---------------------------------------------------------------------------------------------------------------------
# Leaps of the loss


def test_a_leap_is_told_from_scatter() -> None:
    """Losses 2.0 and 2.2 in turns: median 2.1, distance 0.1, so one deviation is 0.14826 and eight reach to 3.286."""
    watch = SpikeWatch(8.0)
    for step in range(LEAST):
        assert watch.judge(loss=50.0, gradient_norm=1.0) == {}  # too early to judge
        watch.remember(loss=2.0 + 0.2 * (step % 2), gradient_norm=1.0)
    assert watch.judge(loss=3.28, gradient_norm=1.07) == {}
    found = watch.judge(loss=3.29, gradient_norm=1.0)
    assert found == {"loss": 3.29, "loss_median": pytest.approx(2.1), "loss_deviations": pytest.approx(1.19 / 0.14826)}
    assert set(watch.judge(loss=2.1, gradient_norm=1.09)) == {
        "gradient_norm",
        "gradient_norm_median",
        "gradient_norm_deviations",
    }  # figures that never scatter: a hundredth of the median is one deviation
    assert watch.judge(loss=float("nan"), gradient_norm=0.1) == {}
    other = SpikeWatch(8.0)
    other.restore(json.loads(json.dumps(watch.to_dict())))
    assert other.judge(loss=3.29, gradient_norm=1.0) == found
    assert SpikeWatch(None).judge(loss=1e9, gradient_norm=1e9) == {}


@pytest.fixture
def leap(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """`leap({3})` makes the loss of every micro-batch with row 3 twenty times what it is."""

    def of(numbers: set[int]) -> None:
        def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            loss = SafeTraining.compute_loss(self, model, inputs, *rest, **named)
            return loss * (20.0 if numbers & set(inputs["row_numbers"].tolist()) else 1.0)

        monkeypatch.setattr(RowTrainer, "compute_loss", compute_loss)

    return of


@pytest.mark.parametrize("action", ["record", "skip"])
def test_a_spike_is_written_down_and_left_out_where_the_recipe_says_so(
    make_run: Callable[..., Path], leap: Callable[[set[int]], None], action: str
) -> None:
    settings = {**LONG, "training.spikes": action, "training.spike_deviations": 30.0}
    recipe = load_recipe(make_run(**settings))
    numbers = row_order(recipe.seed, 2, 0, STEPS * 4).tolist()
    leap({numbers[35 * 4 + 2]})  # step 36, second micro-batch
    train(recipe)
    (record,) = [json.loads(line) for line in (recipe.run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    assert (record["step"], record["reason"], record["skipped"]) == (36, "spike", action == "skip")
    assert record["loss"] > 5 * record["loss_median"]
    assert record["micro_batches"][1]["rows"] == numbers[35 * 4 + 2 : 36 * 4]
    assert record["micro_batches"][1]["loss"] > 10 * record["micro_batches"][0]["loss"]
    optimizer = torch.load(recipe.checkpoints_dir / "checkpoint-40" / "optimizer.pt", weights_only=True)
    made = STEPS if action == "record" else STEPS - 1
    assert {int(state["step"]) for state in optimizer["state"].values()} == {made}
    assert metrics_of(recipe.run_dir)[-1]["step"] == STEPS


def test_a_resumed_run_judges_a_leap_as_one_that_went_on(
    make_run: Callable[..., Path], leap: Callable[[set[int]], None]
) -> None:
    settings = {**LONG, "training.spikes": "skip", "training.spike_deviations": 30.0, "training.keep_checkpoints": 9}
    recipe = load_recipe(make_run(**settings))
    numbers = row_order(recipe.seed, 2, 0, STEPS * 4).tolist()
    leap({numbers[35 * 4]})
    weights = (train(recipe) / "model.safetensors").read_bytes()
    shutil.rmtree(recipe.model_dir)
    for step in (35, 40):
        shutil.rmtree(recipe.checkpoints_dir / f"checkpoint-{step}")
    assert (train(recipe) / "model.safetensors").read_bytes() == weights
    assert len((recipe.run_dir / "skipped_steps.jsonl").read_text().splitlines()) == 1


def test_a_poisoned_step_is_made_without_the_rows_that_the_next_session_skips(
    make_run: Callable[..., Path], poison: Poison
) -> None:
    """The row is not finite in the middle of the model, as one that overflows is: to take its labels is not enough."""
    settings = {"parent": str(poison.parent), "training.keep_checkpoints": 9, "probes.infill_prompts": 0}
    path, straight_path = make_run("poisoned", **settings), make_run("straight", **settings)
    recipe = load_recipe(path)
    bad = row_order(recipe.seed, 2, 0, 32).tolist()[3 * 4 + 1]  # step 4, first micro-batch
    without = [f"training.skip_rows=[{bad}]"]
    for one in (recipe, load_recipe(straight_path)):
        poison.row(one.rows_dir, bad)
    train(recipe)
    (record,) = read_records(recipe.run_dir / "skipped_steps.jsonl")
    assert (record["step"], record["reason"], record["skipped"]) == (4, "not finite", True)
    assert bad in record["micro_batches"][0]["rows"]
    shutil.rmtree(recipe.model_dir)
    for step in (4, 6, 8):
        shutil.rmtree(recipe.checkpoints_dir / f"checkpoint-{step}")
    train(load_recipe(path, without))
    assert read_json(recipe.model_dir / "manifest.json")["session"]["resumed_from"] == "checkpoint-2"
    assert not (recipe.run_dir / "skipped_steps.jsonl").read_text()
    optimizer = torch.load(recipe.checkpoints_dir / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in optimizer["state"].values()} == {8}  # none left out
    assert "loss" in next(line for line in metrics_of(recipe.run_dir) if line["step"] == 4)
    assert same_weights(recipe.model_dir, train(load_recipe(straight_path, without)))


def test_one_command_leads_from_the_step_to_the_text(
    make_run: Callable[..., Path], poison: Poison, tiny_codec: Codec, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(**{"parent": str(poison.parent), "probes.infill_prompts": 0})
    recipe = load_recipe(path)
    numbers = row_order(recipe.seed, 2, 0, 32).tolist()
    poison.row(recipe.rows_dir, numbers[3 * 4 + 2])  # step 4, second micro-batch
    shutil.copytree(poison.parent, recipe.rows_dir / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    train(recipe)
    capsys.readouterr()
    spikes(["--recipe", str(path)])
    out = capsys.readouterr().out
    assert "=== step 4, not finite, left out: loss not finite, gradient norm not finite" in out
    assert f"rank 0, micro-batch 1: loss not finite, rows {numbers[14:16]}" in out
    texts = [explain_row(open_rows(recipe.rows_dir), number) for number in numbers[14:16]]
    assert "\n".join(texts) in out
    assert "micro-batch 0:" not in out
    assert f"training.skip_rows=[{','.join(map(str, sorted(numbers[14:16])))}]" in out
    spikes(["--recipe", str(path), "--step", "4", "--micro-batches", "9"])
    out = capsys.readouterr().out
    assert out.index("micro-batch 1:") < out.index("micro-batch 0:")
    with pytest.raises(SystemExit):
        spikes(["--recipe", str(path), "--step", "5"])
    assert "has no step 5; it has 4" in capsys.readouterr().err
    (recipe.run_dir / "skipped_steps.jsonl").unlink()
    with pytest.raises(SystemExit):
        spikes(["--recipe", str(path)])
    assert "no step of this run has leapt or was left out" in capsys.readouterr().err


def test_the_worst_micro_batch_comes_first_and_a_leap_is_told_with_what_is_usual() -> None:
    batches = [{"loss": 2.0}, {"loss": None}, {"loss": 3.0}]
    assert [batch["loss"] for batch in worst_first(batches)] == [None, 3.0, 2.0]
    record = {"step": 412, "reason": "spike", "skipped": False, "loss": 5.2, "gradient_norm": 0.4}
    record |= {"loss_median": 2.1, "loss_deviations": 14.21}
    assert describe(record) == "step 412, a spike, made: loss 5.2 (usual 2.1, 14.2 deviations), gradient norm 0.4"


def test_leaving_leaps_out_is_refused_where_the_engine_has_updated_already(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(rows=False), ["training.spikes=skip"])
    for layout in ("zero2", "zero3"):
        with pytest.raises(ValueError, match=r"`training.spikes` is skip, which DeepSpeed cannot do: .*; write record, or"):
            check_spikes(recipe, layout)
    for layout in ("none", "ddp", "fsdp"):
        check_spikes(recipe, layout)


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks


def test_two_ranks_stop_and_save_together_whichever_was_asked(
    make_run: Callable[..., Path], wait_until: Callable[..., None]
) -> None:
    """SIGTERM to rank 1 alone, then SIGUSR1 to both; and a file in between. The weights end as those of a run left alone."""
    alone, asked = make_run("alone", **LONG), make_run("asked", **LONG)
    assert launch(alone).wait(300) == 0
    recipe = load_recipe(asked)
    process = launch(asked)
    wait_until(lambda: len(metrics_of(recipe.run_dir)) >= 3, lambda: process.poll() is None)
    (recipe.run_dir / "save-now").touch()
    wait_until(lambda: not (recipe.run_dir / "save-now").exists(), lambda: process.poll() is None)
    os.kill(ranks_of(process)[1], signal.SIGTERM)
    out, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "stopped (SIGTERM); the same command goes on from" in out
    assert_stopped(recipe, "SIGTERM", errors)
    process = launch(asked)
    seen = len(metrics_of(recipe.run_dir))
    wait_until(lambda: len(metrics_of(recipe.run_dir)) > seen + 2, lambda: process.poll() is None)
    for rank in ranks_of(process):
        os.kill(rank, signal.SIGUSR1)
    _, errors = process.communicate(timeout=200)
    assert_stopped(recipe, "SIGUSR1", errors)
    assert launch(asked).wait(300) == 0
    assert read_json(recipe.run_dir / "ended.json")["state"] == "finished"
    assert same_weights(recipe.model_dir, load_recipe(alone).model_dir)


def launch(path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [*command, "-m", "codetune.train", "--recipe", str(path), *arguments],
        env={**os.environ, "PYTHONPATH": SOURCE, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Processes of the ranks, in their order."""
    children = psutil.Process(process.pid).children()
    return [child.pid for child in sorted(children, key=lambda child: int(child.environ()["RANK"]))]


def assert_stopped(recipe: Recipe, reason: str, errors: str) -> None:
    steps = steps_of(recipe.checkpoints_dir)
    ended = read_json(recipe.run_dir / "ended.json")
    assert (ended["state"], ended["exit_code"], ended["reason"]) == ("stopped", 75, reason)
    assert ended["checkpoint"] == f"checkpoint-{steps[-1]}"
    assert not list(recipe.checkpoints_dir.glob(".incomplete*"))
    assert "exitcode  : 75" in errors  # in torchrun's report; its own code is 1
