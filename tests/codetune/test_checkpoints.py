"""Checkpoints appear whole or not at all, and a run that is killed ends as if it had not been."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from codetune import checkpoints
from codetune.artifacts import cannot_write, exclusive, newest_valid_checkpoint, read_json, why_invalid, write_json
from codetune.checkpoints import numbered_checkpoints, remove_leftovers, rotate_checkpoints
from codetune.recipe import load_recipe
from codetune.tokens import open_codec
from codetune.train import main, train

STEPS = 40
LONG = {"training.train_tokens": STEPS * 256, "training.save_tokens": 5 * 256, "probes.infill_prompts": 0}


@pytest.fixture(scope="module")
def straight(make_run_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished model of a long run that nothing happened to."""
    return train(load_recipe(make_run_in(tmp_path_factory.mktemp("straight"), **LONG)))


@pytest.fixture(scope="module")
def straight_short(make_run_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a short run."""
    return train(load_recipe(make_run_in(tmp_path_factory.mktemp("short"))))


def test_a_run_killed_three_times_ends_bit_identical(
    make_run: Callable[..., Path], processes: Any, wait_until: Callable[..., None], straight: Path
) -> None:
    path = make_run(**LONG)
    recipe = load_recipe(path)
    folder = recipe.checkpoints_dir
    moments = [
        lambda: (folder / "checkpoint-10").exists(),  # at a whole checkpoint
        lambda: (folder / ".incomplete-checkpoint-20").exists(),  # in the middle of writing one
        lambda: '"step": 33' in (recipe.run_dir / "metrics.jsonl").read_text(),  # between two
    ]
    checkpoint = None
    for moment in moments:
        process = processes.Process(target=main, args=(["--recipe", str(path)],))
        process.start()
        wait_until(moment, process.is_alive)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        checkpoint, _ = newest_valid_checkpoint(folder)
        assert checkpoint is not None
        assert all(why_invalid(found) is None for found in numbered_checkpoints(folder))
    assert checkpoint is not None
    start = int(checkpoint.name.removeprefix("checkpoint-"))
    train(recipe)
    for file in ("model.safetensors", "config.json"):
        assert (recipe.model_dir / file).read_bytes() == (straight / file).read_bytes()
    manifest, expected = (read_json(folder / "manifest.json") for folder in (recipe.model_dir, straight))
    assert {**manifest["ledger"], "seconds": 0} == {**expected["ledger"], "seconds": 0}
    assert manifest["held_out"] == expected["held_out"]
    assert manifest["session"] == {"resumed_from": f"checkpoint-{start}", "rows_read_by_main_rank": (STEPS - start) * 4}
    steps = [line for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) == STEPS


def test_a_run_goes_on_with_another_micro_batch(make_run: Callable[..., Path], straight_short: Path) -> None:
    path = make_run()
    recipe = load_recipe(path)
    train(recipe)
    shutil.rmtree(recipe.model_dir)
    shutil.rmtree(recipe.checkpoints_dir / "checkpoint-8")
    train(load_recipe(path, ["training.micro_batch_rows=1", "training.loader_workers=2"]))
    for each, other in zip(_weights(recipe.model_dir), _weights(straight_short), strict=True):
        torch.testing.assert_close(each, other, atol=2e-5, rtol=1e-3)


def _weights(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


def test_ctrl_c_saves_says_so_and_the_run_goes_on(make_run: Callable[..., Path], straight: Path) -> None:
    path = make_run(**LONG)
    recipe = load_recipe(path)
    command = [sys.executable, "-m", "codetune.train", "--recipe", str(path)]
    source = str(Path(__file__).parents[2] / "src")
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": source}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = recipe.run_dir / "metrics.jsonl"
    end = time.monotonic() + 300  # on a machine that is busy with other tests
    while not (metrics.exists() and '"step": 3' in metrics.read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "SIGINT: stopping after this step, with a checkpoint" in err
    checkpoint, skipped = newest_valid_checkpoint(recipe.checkpoints_dir)
    assert checkpoint is not None and not skipped
    assert f"stopped (SIGINT); the same command goes on from {checkpoint}" in out
    assert not recipe.model_dir.exists()
    train(recipe)
    assert (recipe.model_dir / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_passed_over_and_named(
    make_run: Callable[..., Path], straight_short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(make_run(**{"training.keep_checkpoints": 3}))
    train(recipe)
    shutil.rmtree(recipe.model_dir)
    weights = recipe.checkpoints_dir / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (recipe.checkpoints_dir / "checkpoint-6" / "manifest.json").unlink()
    (recipe.checkpoints_dir / "checkpoint-100").mkdir()
    train(recipe)
    out = capsys.readouterr().out
    assert "checkpoint-100: skipped, it has no manifest.json" in out
    assert "checkpoint-8: skipped, model.safetensors has" in out
    assert "checkpoint-6: skipped, it has no manifest.json" in out
    assert "going on from" in out and "checkpoint-4" in out
    assert (recipe.model_dir / "model.safetensors").read_bytes() == (straight_short / "model.safetensors").read_bytes()


def test_a_checkpoint_of_other_rows_is_refused(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(**{"training.train_tokens": 768}))
    train(recipe)
    shutil.rmtree(recipe.model_dir)
    manifest = read_json(recipe.rows_dir / "manifest.json")
    write_json(recipe.rows_dir / "manifest.json", {**manifest, "fingerprint": "built anew"})
    with pytest.raises(ValueError, match=r"checkpoint-3 was trained on other rows than those in .*remove .*model and "):
        train(recipe)


def test_a_changed_parent_or_changed_rows_are_noticed(
    make_run: Callable[..., Path], tiny_parent: Path, tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(tiny_parent, parent)
    recipe = load_recipe(make_run(**{"training.train_tokens": 768, "parent": str(parent)}))
    train(recipe)
    manifest = read_json(recipe.rows_dir / "manifest.json")
    write_json(recipe.rows_dir / "manifest.json", {**manifest, "fingerprint": "built anew"})
    with pytest.raises(ValueError, match=r"model was trained on other rows than those in .* now; put back .* or remove "):
        train(recipe)
    write_json(recipe.rows_dir / "manifest.json", manifest)
    config = (parent / "config.json").read_text()
    (parent / "config.json").write_text(config.replace("1e-06", "1e-03"))
    with pytest.raises(ValueError, match=r"model was trained on another parent than .* \(hash \w+ then, \w+ now\)"):
        train(recipe)
    shutil.rmtree(recipe.model_dir)
    with pytest.raises(ValueError, match=r"checkpoint-3 was trained on another parent than .*remove .*checkpoints to start"):
        train(recipe)
    (parent / "config.json").write_text(config)
    assert why_invalid(train(recipe)) is None
    shutil.rmtree(parent)
    shutil.rmtree(recipe.rows_dir)
    assert train(recipe) == recipe.model_dir  # a finished model outlives what it was made of


def test_a_checkpoint_in_between_stands_alone(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(**{"training.train_tokens": 768}))
    train(recipe)
    checkpoint = recipe.checkpoints_dir / "checkpoint-2"
    assert load_recipe(checkpoint / "recipe.yaml") == recipe
    assert open_codec(checkpoint).fingerprint == open_codec(recipe.parent_path).fingerprint
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.use_cache is True
    assert why_invalid(checkpoint) is None


def _hold(folder: Path, ready: Any) -> None:
    with exclusive(folder, "holding"):
        ready.set()
        time.sleep(60)


def test_a_second_session_on_a_run_folder_is_refused_until_the_first_is_dead(
    make_run: Callable[..., Path], processes: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(**{"training.train_tokens": 768})
    recipe = load_recipe(path)
    ready = processes.Event()
    holder = processes.Process(target=_hold, args=(recipe.run_dir, ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(SystemExit) as ended:
        main(["--recipe", str(path)])
    assert ended.value.code == 2
    message = f"another session (process {holder.pid}) is working in {recipe.run_dir}; wait for it, or stop it"
    assert message in capsys.readouterr().err
    assert not recipe.checkpoints_dir.exists()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert why_invalid(train(recipe)) is None


def _train_with_small_files(path: str, most_bytes: int, after: int) -> None:
    """Train while the system refuses to write files beyond a size, as a full disk does, after a checkpoint."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original = checkpoints.seal_folder

    def seal(folder: Path, manifest: dict[str, Any]) -> None:
        original(folder, manifest)
        if manifest["step"] == after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    checkpoints.seal_folder = seal
    main(["--recipe", path])


def test_a_disk_that_fills_leaves_the_older_checkpoints(
    make_run: Callable[..., Path], processes: Any, straight: Path
) -> None:
    path = make_run(**LONG)
    recipe = load_recipe(path)
    process = processes.Process(target=_train_with_small_files, args=(str(path), 100_000, 10))
    process.start()
    process.join()
    assert process.exitcode == 2
    assert [found.name for found in numbered_checkpoints(recipe.checkpoints_dir)] == ["checkpoint-5", "checkpoint-10"]
    assert all(why_invalid(found) is None for found in numbered_checkpoints(recipe.checkpoints_dir))
    assert not list(recipe.checkpoints_dir.glob(".incomplete*"))
    train(recipe)
    assert (recipe.model_dir / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_disk_that_fills_at_the_end_is_one_clear_message(
    make_run: Callable[..., Path], processes: Any, straight_short: Path, tmp_path: Path
) -> None:
    path = make_run()
    recipe = load_recipe(path)
    process = processes.Process(target=_main_with_its_errors_in, args=(str(tmp_path / "stderr"), str(path), 100_000, 8))
    process.start()
    process.join()
    assert process.exitcode == 2
    message = (tmp_path / "stderr").read_text()
    assert "Traceback" not in message
    assert f"{recipe.model_dir} could not be written (" in message
    assert "File too large" in message
    assert not recipe.model_dir.exists()
    assert not list(recipe.run_dir.glob(".incomplete*"))
    assert [found.name for found in numbered_checkpoints(recipe.checkpoints_dir)][-1] == "checkpoint-8"
    train(recipe)
    assert (recipe.model_dir / "model.safetensors").read_bytes() == (straight_short / "model.safetensors").read_bytes()


def _main_with_its_errors_in(errors: str, path: str, most_bytes: int, after: int) -> None:
    with open(errors, "w", encoding="utf-8") as sys.stderr:
        _train_with_small_files(path, most_bytes, after)


def test_no_space_for_a_checkpoint_is_one_clear_message(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = checkpoints.seal_folder

    def seal(folder: Path, manifest: dict[str, Any]) -> None:
        if manifest["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(folder, manifest)

    monkeypatch.setattr(checkpoints, "seal_folder", seal)
    path = make_run()
    with pytest.raises(SystemExit) as ended:
        main(["--recipe", str(path)])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "checkpoint-4 could not be written (OSError: [Errno 28] No space left on device)" in message
    assert "Nothing half-written was kept; whole checkpoints: checkpoint-2" in message


def test_rotation_keeps_the_newest_and_never_counts_later_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    rotate_checkpoints(tmp_path, keep=2, newest=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-100",
        "checkpoint-6",
        "checkpoint-8",
        "checkpoint-old",
    ]


def test_leftovers_of_a_kill_are_removed_and_checkpoints_are_not(tmp_path: Path) -> None:
    for name in (".incomplete-checkpoint-4-ab", ".deleted-checkpoint-2", ".replaced-checkpoint-2-ab", "checkpoint-2"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_whose_replacement_was_killed_gets_its_name_back(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "weights").write_text("old")
    killed = """
import os, pathlib, signal, sys
from codetune import artifacts
rename = pathlib.Path.rename
def once(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.rename = once
with artifacts.whole_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("new")
"""
    done = subprocess.run([sys.executable, "-c", killed, str(tmp_path / "checkpoint-10")], check=False)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "checkpoint-10").exists()
    remove_leftovers(tmp_path, "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert (tmp_path / "checkpoint-10" / "weights").read_text() == "old"


def test_leftovers_of_a_killed_export_are_removed_though_the_run_is_finished(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(**{"training.train_tokens": 768}))
    train(recipe)
    for name in (".incomplete-model-12345678", ".replaced-model-12345678", ".incomplete-rows-12345678"):
        (recipe.run_dir / name).mkdir()
    train(recipe)
    left = [path.name for path in recipe.run_dir.iterdir() if path.name.startswith((".incomplete", ".replaced"))]
    assert left == [".incomplete-rows-12345678"]  # the build's own, which may be at work


def test_a_folder_that_cannot_be_written_to_is_one_clear_message(make_run: Callable[..., Path]) -> None:
    path = make_run()
    recipe = load_recipe(path)
    recipe.checkpoints_dir.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"cannot be written to .*mend that"):
        train(recipe)


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free some space there"), (errno.EACCES, "change its permissions")]
)
def test_a_full_disk_is_not_told_to_change_its_permissions(number: int, advice: str) -> None:
    told = cannot_write(Path("runs/x"), OSError(number, os.strerror(number)))
    assert told.startswith("runs/x: cannot be written to (")
    assert told.endswith(f"; {advice}, or write elsewhere with --set runs=FOLDER")
