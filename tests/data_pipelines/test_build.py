"""Rows from real files through the command itself: what is in them, and that nothing but the recipe decides it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from codetune.artifacts import Rows, open_rows
from codetune.recipe import Recipe, load_recipe
from codetune.tokens import open_codec
from data_pipelines.build import build, explain_row
from data_pipelines.executors import worker_count

ROW = 128
WORDS = ["alpha", "beta", "gamma", "delta", "width", "height", "index", "total", "value", "items"]


def _text(source: str, number: int) -> str:
    """A document of 1 to 40 lines, some longer than a row, every one different."""
    lines = 1 + number * 7 % 40 if number % 5 == 0 else 1 + number % 4
    names = [WORDS[(number * 3 + line) % 10] for line in range(lines)]
    return "".join(f"{source}_{number}_{line} = {name} + {line}\n" for line, name in enumerate(names))


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_parent: Path) -> Path:
    for source, count in (("code", 400), ("code_text", 120), ("text", 90)):
        records = [{"text": _text(source, number), "group": f"{source}-{number // 3}"} for number in range(count)]
        (tmp_path / f"{source}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shares = {"code": 0.85, "code_text": 0.08, "text": 0.07}
    sources = {
        name: {"kind": "jsonl", "share": share, "path": str(tmp_path / f"{name}.jsonl"), "group_column": "group"}
        for name, share in shares.items()
    }
    data = {"sequence_tokens": ROW, "lanes": 2, "sources": sources, "packing": {"group_rows": 16}}
    data["held_out"] = {"fraction": 0.1, "documents_per_source": 8}
    tree = {
        "name": "stage1",
        "size": "test",
        "parent": str(tiny_parent),
        "runs": str(tmp_path / "runs"),
        "data": data,
        "training": {"train_tokens": ROW * 100, "batch_tokens": ROW * 4},
        "optimizer": {"learning_rate": 1.0e-3},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _command(recipe_file: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "data_pipelines.build", "--recipe", str(recipe_file), *more]


def _documents(rows: Rows) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Every document in every row: its facts and its ids."""
    for number in range(len(rows)):
        row, start = rows.row(number), 0
        assert sum(row["document_lengths"]) == len(row["input_ids"]) <= rows.sequence_tokens
        for place, length in enumerate(row["document_lengths"].tolist()):
            facts = {name: row[name][place] for name in ("ids", "sources", "layouts", "kinds", "passes", "pieces")}
            yield facts, row["input_ids"][start : start + length].tolist()
            start += length


def test_rows_hold_the_documents_in_the_recipes_shares(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    rows = open_rows(build(recipe))
    codec = open_codec(recipe.parent_path)
    manifest = rows.manifest
    assert len(rows) == 128  # 100 rows in whole groups of 16 in each of two lanes
    assert manifest["fill"] > 0.95  # what documents of about a quarter of a row allow
    sources = list(recipe.need_data().sources)
    cut: dict[tuple[Any, ...], dict[int, list[int]]] = {}
    seen: dict[str, int] = dict.fromkeys(sources, 0)
    for facts, ids in _documents(rows):
        source, layout = sources[facts["sources"]], manifest["layout_names"][facts["layouts"]]
        seen[source] += len(ids)
        key = (facts["sources"], facts["ids"], facts["passes"])
        if ids[0] == codec.bos_id and ids[-1] in (codec.eos_id, codec.need_infill().end):
            text = codec.unfim(ids, layout)
            number = int(text.split(" ")[0].removeprefix(f"{source}_").split("_")[0])
            assert text == _text(source, number)
        else:
            cut.setdefault(key, {})[int(facts["pieces"])] = ids
        assert ids.count(codec.bos_id) == (1 if facts["pieces"] == 0 else 0) and codec.bos_id not in ids[1:]
    waiting = 0
    for (
        pieces
    ) in cut.values():  # a document longer than a row: whole again, or a piece of it still waits, or was not reached
        if sorted(pieces) != list(range(len(pieces))):
            waiting += 1
            continue
        assert all(len(pieces[place]) == ROW for place in range(len(pieces) - 1))
        joined = [token for place in sorted(pieces) for token in pieces[place]]
        if joined[-1] == codec.eos_id:
            text = codec.unfim(joined, "plain")
            source, number = text.split(" ")[0].rsplit("_", 2)[:2]
            assert text == _text(source, int(number))
    assert waiting <= 2 * rows.lanes and len(cut) > 4 * rows.lanes  # two rows wait in each lane
    total = sum(seen.values())
    for name, settings in recipe.need_data().sources.items():
        facts = manifest["sources"][name]
        assert seen[name] == sum(facts["tokens_in_rows"].values())
        assert seen[name] + facts["tokens_not_packed"] + facts["tokens_not_taken"] == facts["tokens_encoded"]
        assert abs(seen[name] - settings.share * total) <= 2 * (ROW + facts["tokens_not_packed"])
    assert manifest["tokens"] == total


def test_held_out_groups_are_in_no_row(recipe_file: Path) -> None:
    from codetune.artifacts import HELD_OUT, read_held_out
    from data_pipelines.held_out import is_held_out_group

    recipe = load_recipe(recipe_file)
    rows = open_rows(build(recipe))
    codec = open_codec(recipe.parent_path)
    held = {
        f"{source}-{n}"
        for source in ("code", "code_text", "text")
        for n in range(140)
        if is_held_out_group(f"{source}-{n}", 0.1)
    }
    for facts, ids in _documents(rows):
        if facts["pieces"] == 0:
            text = codec.unfim(ids, rows.manifest["layout_names"][facts["layouts"]]) if ids[-1] != ids[0] else ""
            source, number = text.split(" ")[0].rsplit("_", 2)[:2]
            assert f"{source}-{int(number) // 3}" not in held
    samples = read_held_out(rows.path / HELD_OUT)
    assert {sample.layout for sample in samples} == {"plain", "plain_border", "plain_joint", "psm", "spm"}
    for sample in samples:
        assert len(sample.input_ids) <= ROW
        if sample.layout in ("psm", "plain_border"):
            middle = sample.input_ids[sample.middle_start : sample.middle_start + sample.middle_tokens]
            assert codec.decode_bare(middle) == sample.middle and sample.middle_characters == len(sample.middle)
        if sample.layout in ("psm", "spm"):
            assert sample.input_ids[sample.end_position] == codec.need_infill().end
            assert codec.unfim(sample.input_ids, sample.layout) == sample.prefix + sample.middle + sample.suffix
        if sample.layout in ("spm", "plain_joint"):
            middle = codec.decode_bare(sample.input_ids[sample.middle_start : sample.middle_start + sample.middle_tokens])
            assert middle.endswith(sample.middle) and len(middle) == sample.middle_characters


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "timing.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_workers_and_interruptions_do_not_change_a_byte(recipe_file: Path, tmp_path: Path) -> None:
    more = ["--set", "training.train_tokens=512000"]
    found = {}
    for name, workers in (("one", "1"), ("two", "2"), ("killed", "2"), ("killed between lanes", "1")):
        command = _command(recipe_file, *more, f"runs={tmp_path / name}", "--workers", workers)
        finished_lane = tmp_path / name / "test" / "stage1" / "rows.partial" / "lane-00000.arrow"
        for _ in range(2 if workers == "2" and name == "killed" else name == "killed between lanes"):
            process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            if workers == "2":
                _wait_for_progress(tmp_path / name, process)
            else:
                _wait_for((finished_lane.with_name("work") / "progress-00001").exists, process)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        before = finished_lane.stat().st_mtime_ns if finished_lane.exists() else None
        assert (before is not None) == (name == "killed between lanes")
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr
        if before is not None:  # a finished lane is not built again
            assert (tmp_path / name / "test" / "stage1" / "rows" / "lane-00000.arrow").stat().st_mtime_ns == before
        found[name] = _hashes(tmp_path / name / "test" / "stage1" / "rows")
    # where the rows are is written in the manifest as part of the recipe; everything else is equal to the byte
    for hashes in found.values():
        hashes.pop("manifest.json")
    assert found["one"] == found["two"] == found["killed"] == found["killed between lanes"]
    assert "lane-00001.arrow" in found["one"]


def _wait_for_progress(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Until this process has written rows, so that the kill falls into the middle of its work."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("progress-*")}
    found = lambda: list(folder.rglob("progress-0000[0-9]"))  # noqa: E731
    _wait_for(lambda: any(path.stat().st_mtime_ns != before.get(path) for path in found()), process)


def _wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    for _ in range(6000):
        assert process.poll() is None, "the build ended before it could be stopped"
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("the build never began")


def test_a_longer_stage_keeps_the_rows_of_a_shorter_one(recipe_file: Path, tmp_path: Path) -> None:
    few = open_rows(build(load_recipe(recipe_file)))
    many = open_rows(build(load_recipe(recipe_file, [f"training.train_tokens={ROW * 300}", f"runs={tmp_path / 'longer'}"])))
    assert len(many) > len(few)
    for number in range(len(few)):
        assert few.row(number)["input_ids"].tolist() == many.row(number)["input_ids"].tolist()


def test_a_changed_recipe_takes_over_an_unfinished_build(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match="ran dry"):
        build(load_recipe(recipe_file, ["data.sources.text.repeat=false", f"training.train_tokens={ROW * 4000}"]))
    rows = open_rows(build(load_recipe(recipe_file, ["seed=5"])))
    assert rows.manifest["recipe"]["seed"] == 5


def test_notes_do_not_make_other_rows(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(load_recipe(recipe_file))
    build(load_recipe(recipe_file, ["data.sources.text.license_note=mine", "data.sources.text.group=words"]))
    assert "is finished" in capsys.readouterr().out


def test_a_folder_that_is_not_ours_is_left_alone(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    recipe.rows_dir.mkdir(parents=True)
    (recipe.rows_dir / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no rows; move it away"):
        build(recipe)
    assert (recipe.rows_dir / "thesis.txt").read_text() == "mine"


def test_two_builds_in_one_folder_are_refused(recipe_file: Path) -> None:
    from codetune.artifacts import exclusive

    recipe = load_recipe(recipe_file)
    with exclusive(recipe.run_dir, "a test"):
        second = subprocess.run(_command(recipe_file), capture_output=True, text=True, check=False)
    assert second.returncode == 2 and "another session" in second.stderr and "Traceback" not in second.stderr


def test_rows_longer_than_the_context_are_refused_before_anything_is_built(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match="context of 128 positions"):
        build(load_recipe(recipe_file, ["data.sequence_tokens=256", "training.batch_tokens=1024"]))


def test_concatenated_rows_are_full_and_infill_only_whole_documents(recipe_file: Path) -> None:
    more = ["data.packing.strategy=concatenate", "data.packing.isolate_documents=false"]
    recipe = load_recipe(recipe_file, more)
    rows = open_rows(build(recipe))
    codec = open_codec(recipe.parent_path)
    infill = codec.need_infill()
    assert rows.manifest["fill"] == 1.0
    layouts = set()
    for facts, ids in _documents(rows):
        layout = rows.manifest["layout_names"][facts["layouts"]]
        layouts.add(layout)
        if layout == "plain":
            assert infill.prefix not in ids
        else:
            assert ids[1] == infill.prefix and ids[-1] == infill.end and ids.count(infill.middle) == 1
    assert layouts == {"plain", "psm", "spm"}


def test_a_row_can_be_explained(recipe_file: Path) -> None:
    rows = open_rows(build(load_recipe(recipe_file)))
    shown = explain_row(rows, 5)
    first = rows.row(5)["ids"][0]
    assert first in shown and "row 5 of" in shown and "code" in shown
    with pytest.raises(ValueError, match="numbered 0 to 127"):
        explain_row(rows, 128)


def test_a_finished_build_is_kept_and_another_recipe_is_refused(recipe_file: Path) -> None:
    build(load_recipe(recipe_file))
    again = subprocess.run(_command(recipe_file), capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "is finished" in again.stdout
    other = subprocess.run(_command(recipe_file, "--set", "data.fim.rate=0.5"), capture_output=True, text=True, check=False)
    assert other.returncode == 2 and "data.fim.rate was 0.9, is 0.5" in other.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.sources.text.repeat=false", "source `text` ran dry in lane"),
        ("data.sources.text.max_passes=1", "`max_passes` is 1"),
        ("data.lanes=500", "data.lanes"),
        ("data.sources.text.text_column=body", "body"),
        ("parent=missing/folder", "no tokenizer found"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_message(recipe_file: Path, setting: str, message: str) -> None:
    overrides = [setting, f"training.train_tokens={ROW * 4000}"]
    with pytest.raises(ValueError, match=message):
        build(load_recipe(recipe_file, overrides))
    assert not load_recipe(recipe_file).rows_dir.exists()


def test_a_full_disk_is_said_and_the_build_goes_on_later(recipe_file: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        command = _command(recipe_file, "--set", f"runs={small}", f"training.train_tokens={ROW * 1000}", "--workers", "1")
        full = subprocess.run(command, capture_output=True, text=True, check=False)
        assert full.returncode == 2 and "free" in full.stderr and "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
        assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_ctrl_c_leaves_a_state_that_goes_on(recipe_file: Path) -> None:
    command = _command(recipe_file, "--set", f"training.train_tokens={ROW * 200_000}", "--workers", "2")
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    recipe: Recipe = load_recipe(recipe_file)
    _wait_for_progress(recipe.run_dir, process)  # type: ignore[arg-type]
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command again" in errors
    assert not recipe.rows_dir.exists()
    shorter = _command(recipe_file, "--workers", "2")  # and what is there stands in nobody's way
    assert subprocess.run(shorter, capture_output=True, text=True, check=False).returncode == 0
    assert len(open_rows(recipe.rows_dir)) >= 100


def test_no_workers_are_refused() -> None:
    for text in ("0", "-2"):
        with pytest.raises(ArgumentTypeError, match=f"{text}; write 1 or more"):
            worker_count(text)
    assert worker_count("3") == 3
