"""Curation: nothing lost, the same data set however it ran, bad input counted or refused."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "codetune")]
from hub_server import HubServer  # noqa: E402
from hub_server import Repository as HubRepository  # noqa: E402
from model_hub import ATTRIBUTES, TOKEN, ModelHub  # noqa: E402
from slurm_cluster import real_slurm  # noqa: E402

from codetune.artifacts import read_json  # noqa: E402
from codetune.recipe import SourceSettings, load_recipe  # noqa: E402
from data_pipelines.curate import curate, distribution_licenses, shard_of  # noqa: E402
from data_pipelines.curated import push, show  # noqa: E402
from data_pipelines.documents import Drops, plan_source, read_documents  # noqa: E402

ROOT = Path(__file__).parents[2]


def code(seed: int, lines: int = 12) -> str:
    """A function that no other seed gives."""
    draw = np.random.default_rng(seed)
    names = [
        f"{chr(97 + int(a))}{int(b)}" for a, b in zip(draw.integers(0, 26, 40), draw.integers(0, 10**6, 40), strict=True)
    ]
    body = "".join(f"    {names[i % 40]} = {names[(i * 7) % 40]} + {int(draw.integers(10**6))}\n" for i in range(lines))
    return f"def {names[0]}({names[1]}):\n{body}    return {names[2]}\n"


def record(text: Any, number: int, **more: Any) -> dict[str, Any]:
    return {
        "text": text,
        "path": f"file{number}.py",
        "repo": f"repo{number % 4}",
        "license": "MIT",
        "lang": "Python",
        **more,
    }


RECORDS = [
    *(record(code(number), number) for number in range(30)),
    record(code(3), 100),  # an exact copy
    record(code(5).replace("return", "return  "), 101),  # a near copy: another space
    record(code(40), 7),  # an id that is there already, with another text
    record("x = 1\n", 102),  # too short
    record("a" * 1200 + " = 1\n", 103),  # a long line
    record(code(41), 104, license=["MIT", "GPL-3.0-only"]),
    record(code(42), 105, license=None),
    record(code(43), 106, license=["MIT", "Apache-2.0"]),
    record(None, 107),
    record(code(44) + "key = 'AKIA" + "Q3EGRT5XLPW7MZ2B'\n", 108),
    {"path": "file109.py", "repo": "repo1"},
]
DROPPED = {
    "exact_copy": 1,
    "near_copy": 1,
    "too_short": 1,
    "long_line": 1,
    "license_not_allowed": 1,
    "license_unknown": 1,
    "missing_text_value": 2,
}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    source = {
        "kind": "jsonl",
        "path": str(folder / "*.jsonl"),
        "id_column": "path",
        "group_column": "repo",
        "license_column": "license",
        "language_column": "lang",
    }
    return {
        "sources": {"code": source},
        "shards": 2,
        "tasks": 1,
        "licenses": {"allowed": ["mit", "apache-2.0"]},
        "near_copies": {"buckets": 4, "hashes": 2},
        "decontamination": {"enabled": False},
        **changes,
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for part in range(2):
        (folder / f"part{part}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in RECORDS[part::2]))
    return folder


@pytest.fixture
def write_recipe(tmp_path: Path, corpus: Path) -> Callable[..., Path]:
    def write(name: str = "curate", **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump(
                {"name": name, "size": "test", "runs": str(tmp_path / "runs"), "curate": settings(corpus, **changes)}
            )
        )
        return path

    return write


def contents(dataset: Path) -> dict[str, str]:
    """A hash of every file of a data set that a task wrote."""
    return {
        path.relative_to(dataset).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(dataset.rglob("*.parquet"))
    }


def test_every_document_is_kept_or_counted_under_one_reason(write_recipe: Callable[..., Path]) -> None:
    dataset = curate(load_recipe(write_recipe()))
    source = read_json(dataset / "curate.json")["sources"]["code"]
    assert source["drops"] == DROPPED
    assert (source["documents_read"], source["documents"]) == (len(RECORDS), len(RECORDS) - sum(DROPPED.values()))
    assert source["repeated_ids"] == 1
    assert source["redacted"] == {"keys": 1}
    assert sum(source["lengths"]["kept"].values()) == source["documents"]
    assert sum(source["languages"].values()) == sum(source["licenses"].values()) == source["documents"]
    assert source["licenses"]["Apache-2.0 + MIT"] == 1
    assert sum(source["language_tokens"].values()) == source["tokens"] > 0
    assert sum(source["language_bytes"].values()) == source["bytes"] > 0
    # x, =, 1; one long name, =, 1; what has no text has no tokens
    assert [source["dropped_tokens"][reason] for reason in ("too_short", "long_line", "missing_text_value")] == [3, 3, 0]


def test_ids_are_unique_over_repositories_and_shards(write_recipe: Callable[..., Path], corpus: Path) -> None:
    """The same path in several repositories, whose shards are not the same; and one that looks like a repeated one."""
    for path in corpus.iterdir():
        path.unlink()
    groups = {shard_of(f"repo{number}", 2): f"repo{number}" for number in range(20)}
    repos = [groups[0], groups[1], groups[1], groups[0]]
    paths = ["setup.py", "setup.py", "setup.py", "setup.py~2"]
    rows = [record(code(number), number, path=paths[number], repo=repos[number]) for number in range(4)]
    rows += [record(code(9), 9), record(code(10), 10, path="notes.txt~7")]
    (corpus / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets = [curate(load_recipe(write_recipe(f"tasks{tasks}", tasks=tasks))) for tasks in (1, 2)]
    source = read_json(datasets[0] / "curate.json")["sources"]["code"]
    found = [row for path in sorted(datasets[0].rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    names = ["setup.py", "setup.py~2", "setup.py~3", "setup.py~4"]
    assert sorted(row["id"] for row in found) == sorted([*names, "file9.py", "notes.txt~7"])
    assert source["repeated_ids"] == 3 and source["documents"] == 6
    assert {row["text"]: row["group"] for row in found} == {row["text"]: row["repo"] for row in rows}
    assert contents(datasets[0]) == contents(datasets[1])


def test_the_data_set_is_read_by_datasets_and_by_a_recipe(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    from datasets import load_dataset

    dataset = curate(load_recipe(write_recipe()))
    loaded: Any = load_dataset(str(dataset), "code", split="train", cache_dir=str(tmp_path / "cache"))
    source = SourceSettings("parquet", 1.0, path=str(dataset / "code/*.parquet"), id_column="id", group_column="group")
    plan = plan_source("code", source, 1, tmp_path / "work", False)
    documents = list(read_documents(plan, 0, 1, 0, Drops(), None))
    assert [item.text for item in documents] == loaded["text"]
    assert [item.id for item in documents] == loaded["id"]
    assert len(set(loaded["id"])) == len(loaded) and "file7.py~2" in loaded["id"]
    assert "AKIA" not in "".join(loaded["text"]) and "key = '<KEY>'\n" in "".join(loaded["text"])
    # files of one repository stand together
    groups = loaded["group"]
    runs = [group for place, group in enumerate(groups) if place == 0 or groups[place - 1] != group]
    assert len(runs) == len(set(groups))
    card = yaml.safe_load((dataset / "README.md").read_text().split("---")[1])
    assert [config["config_name"] for config in card["configs"]] == ["code"]


def test_the_same_bytes_with_one_task_and_with_two(write_recipe: Callable[..., Path]) -> None:
    one = curate(load_recipe(write_recipe("one")))
    two = curate(load_recipe(write_recipe("two", tasks=2)), workers=1)
    assert contents(one) == contents(two)
    assert read_json(one / "curate.json")["sources"]["code"]["drops"] == DROPPED
    again = read_json(two / "curate.json")["sources"]["code"]
    small = {"near_copies": {"enabled": False}, "shards": 1}
    together = curate(load_recipe(write_recipe("together", tasks=2, **small)), workers=2)  # in processes of their own
    assert contents(together) == contents(curate(load_recipe(write_recipe("small", **small))))
    assert again == read_json(one / "curate.json")["sources"]["code"] | {"facts": again["facts"]}


def test_killed_and_started_again(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    whole = curate(load_recipe(write_recipe("whole")))
    recipe = write_recipe("killed")
    partial = tmp_path / "runs/test/killed/curate.partial"
    command = [sys.executable, "-m", "data_pipelines.curate", "--recipe", str(recipe), "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
    while not (partial / "logs/order/completions/00000").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    try:  # datatrove's manager lives on, and must not hold the folder's lock
        assert curate(load_recipe(recipe)) == tmp_path / "runs/test/killed/dataset"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert not partial.exists()
    assert contents(whole) == contents(tmp_path / "runs/test/killed/dataset")


def test_a_finished_data_set_is_taken_as_it_is_and_another_is_refused(
    write_recipe: Callable[..., Path], capsys: Any
) -> None:
    dataset = curate(load_recipe(write_recipe()))
    before = (dataset / "curate.json").stat().st_mtime_ns
    assert curate(load_recipe(write_recipe(tasks=2))) == dataset
    assert "is finished" in capsys.readouterr().out
    assert (dataset / "curate.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="not made by these settings"):
        curate(load_recipe(write_recipe(shards=3)))


def test_what_was_dropped_can_be_looked_at(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe())
    dataset = curate(recipe)
    said = show(recipe, "near_copy", 5)
    # the two files differ in one line, by one space
    assert sorted(line[1:].strip().replace("  ", " ") for line in said.splitlines() if line[:2] in ("+ ", "- "))[
        0
    ].startswith("return")
    assert "1.00 alike to code file" in said
    assert "GPL-3.0-only" in show(recipe, "license_not_allowed", 5)
    assert "line 1 has 1,204 characters" in show(recipe, "long_line", 5)
    with pytest.raises(ValueError, match="there are exact_copy, license_not_allowed"):
        show(recipe, "boredom", 5)
    page = (dataset.with_name("curation") / "statistics.md").read_text()
    for reason in DROPPED:
        assert f"### code: {reason}" in page
    assert "AKIA" not in page and "1.00 alike to code file" in page
    lengths = [line.split("|")[2:5] for line in page.splitlines() if line.startswith("| 256 to 511 |")]
    [(read, kept, bar)] = [[part.strip() for part in parts] for parts in lengths]
    assert int(read) > int(kept) > 0 and bar == "█" * bar.count("█") + "░" * bar.count("░")
    assert bar.count("█") + bar.count("░") == 30 and bar.count("█") == -(-30 * int(kept) // int(read))


def test_files_that_are_left_out_by_what_stands_in_them_can_be_looked_at(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    made, packed = "# Code generated by a tool. DO NOT EDIT.\n" + code(1), b"x = 1\0\1\2"
    (folder / "made.py").write_text(made)
    (folder / "packed.py").write_bytes(packed)
    (folder / "fine.py").write_text(code(2))
    source = {"kind": "folder", "path": str(folder)}
    recipe = load_recipe(write_recipe(sources={"code": source}, licenses={"unknown": "keep"}))
    facts = read_json(curate(recipe) / "curate.json")["sources"]["code"]
    assert facts["drops"] == {"generated_file": 1, "binary": 1}
    assert facts["dropped_bytes"] == {"generated_file": len(made), "binary": len(packed)}
    assert facts["bytes_read"] == len(made) + len(packed) + len(code(2))
    assert facts["dropped_bytes_by_language"]["generated_file"] == {"Python": len(made)}
    assert "DO NOT EDIT" in show(recipe, "generated_file", 5) and "x = 1\\x00" in show(recipe, "binary", 5)


def test_what_a_terminal_would_obey_is_written_out(write_recipe: Callable[..., Path], corpus: Path) -> None:
    (corpus / "more.jsonl").write_text(json.dumps(record(code(50) + "# \x1b[2J\x07\x1b[2J\x07\x1b[2J\x07\r\n", 200)))
    recipe = load_recipe(write_recipe())
    curate(recipe)
    said = show(recipe, "binary", 5)
    assert "\\x1b[2J\\x07" in said and "\x1b" not in said and "control characters" in said


# ---------------------------------------------------------------------------------------------------------------------
# Executors


def stub(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_jobs_of_slurm_run_from_another_folder(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script that sbatch is given, run by bash for each place of its array, without PYTHONPATH and elsewhere."""
    commands, elsewhere = tmp_path / "commands", tmp_path / "elsewhere"
    commands.mkdir()
    elsewhere.mkdir()
    array = """cp "${@: -1}" job.sh; last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' job.sh)
    for place in $(seq 0 $last); do
      env -u PYTHONPATH SLURM_JOB_ID=7 SLURM_ARRAY_TASK_ID=$place SLURM_NODELIST=here RUN_OFFSET=0 \\
        PATH=/usr/bin:/bin bash job.sh >> log 2>&1
    done; echo Submitted batch job 7"""
    stub(commands / "sbatch", f"cd '{elsewhere}'\n{array}\n")
    stub(commands / "squeue", "exit 0\n")
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("options: [--partition=cpu, --gpus=1]\ntime: '01:00:00'\nenvironment: {OMP_NUM_THREADS: '1'}\n")
    small = {"near_copies": {"enabled": False}, "shards": 1}
    reference = curate(load_recipe(write_recipe("reference", **small)))
    dataset = curate(load_recipe(write_recipe("slurm", executor="slurm", **small)), 2, cluster)
    assert contents(dataset) == contents(reference)
    script = (elsewhere / "job.sh").read_text()
    assert "#SBATCH --partition=cpu\n" in script and "gpus" not in script and "#SBATCH --time=01:00:00\n" in script


@pytest.mark.slow
def test_a_real_slurm_makes_the_same_data_set(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Array jobs of every phase on slurmctld and two slurmd, submitted from another folder."""
    small = {"near_copies": {"buckets": 2, "hashes": 2}, "shards": 2}
    with real_slurm() as slurm:
        reference = curate(load_recipe(write_recipe("reference", **small)))
        recipe = load_recipe(write_recipe("slurm", executor="slurm", tasks=2, **small))
        monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        cluster = tmp_path / "cluster.yaml"
        cluster.write_text("time: '00:10:00'\nenvironment: {OMP_NUM_THREADS: '1', HF_HUB_OFFLINE: '1'}\n")
        dataset = curate(recipe, 2, cluster)
        assert slurm.call(["squeue", "--noheader"]) == ""
    assert contents(dataset) == contents(reference)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install -e '.[ray]'")
@pytest.mark.slow
def test_ray_makes_the_same_data_set_from_another_folder(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """By the command, whose own module has another name on Ray's workers."""
    small = {"near_copies": {"enabled": False}, "shards": 1}
    local = curate(load_recipe(write_recipe("local", **small)))
    recipe = write_recipe("ray", executor="ray", tasks=2, **small)
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-m", "data_pipelines.curate", "--recipe", str(recipe), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    environment["RAY_worker_niceness"] = "0"  # Ray's 15 starves its workers beside other tests
    done = subprocess.run(
        command, env=environment, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "runs/test/ray/dataset") == contents(local)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub

LOAD = """
import json, sys
from datasets import load_dataset
print(json.dumps(list(load_dataset("me/set", "code", split="train", cache_dir=sys.argv[1])["id"])))
"""


@pytest.fixture
def model_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    from huggingface_hub import constants

    with ModelHub() as hub:
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": hub.url}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_data_set_goes_to_the_hub_in_one_commit_and_is_loaded_from_there(
    write_recipe: Callable[..., Path], model_hub: ModelHub, tmp_path: Path
) -> None:
    dataset = curate(load_recipe(write_recipe()))
    files = [f"code/train-0000{number}-of-00002.parquet" for number in range(2)]
    listed = push(dataset, "me/set", dry_run=True)
    assert model_hub.calls == [] and [line.split()[-1] for line in listed.splitlines()[1:-1]] == [
        "README.md",
        *files,
        "manifest.json",
    ]
    assert push(dataset, "me/set") == f"curate: {model_hub.url}/datasets/me/set/tree/main"
    repository = model_hub.repositories["me/set"]
    sent = repository.commits[-1].files
    assert repository.private and len(repository.commits) == 2  # the first is the Hub's own
    assert set(sent) == {*ATTRIBUTES, "README.md", "manifest.json", *files}
    assert {name: sent[name] for name in files} == {name: (dataset / name).read_bytes() for name in files}
    assert str(tmp_path).encode() not in sent["README.md"] + sent["manifest.json"]
    assert json.loads(sent["manifest.json"])["sources"] == read_json(dataset / "curate.json")["sources"]
    assert "held exactly this already" in push(dataset, "me/set") and len(repository.commits) == 2
    with HubServer({"me/set": HubRepository(dict(sent))}) as server:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(tmp_path / "cache")],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    assert len(json.loads(done.stdout.splitlines()[-1])) == len(RECORDS) - sum(DROPPED.values())


def test_what_stands_on_the_hub_already_is_not_written_over(write_recipe: Callable[..., Path], model_hub: ModelHub) -> None:
    dataset = curate(load_recipe(write_recipe()))
    model_hub.make("me/taken", {"notes.txt": b"mine"})
    with pytest.raises(
        ValueError, match=r"me/taken, revision main, holds files that no curation has put there; nothing was"
    ):
        push(dataset, "me/taken")
    push(dataset, "me/set")
    other = curate(load_recipe(write_recipe("other", exact_copies="keep", near_copies={"enabled": False})))
    with pytest.raises(ValueError, match="holds a data set curated by other settings; nothing was uploaded"):
        push(other, "me/set")
    push(other, "me/set", replace=True)
    with pytest.raises(ValueError, match="the token is me's, who may write to me, team"):
        push(dataset, "stranger/set")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_rows_that_are_no_documents_are_counted(write_recipe: Callable[..., Path], corpus: Path) -> None:
    for path in corpus.iterdir():
        path.unlink()
    lines = [json.dumps(record(code(number), number)).encode() for number in range(3)]
    lines += [
        b"{not json",
        json.dumps(record("a\0b" * 40, 9)).encode(),
        b'{"text": "caf\xe9", "path": "l", "license": "MIT"}',
    ]
    lines += [json.dumps(record(code(4).replace("return", "return 'é'"), 4), ensure_ascii=False).encode(), b""]
    (corpus / "bad.jsonl").write_bytes(b"\n".join(lines))
    (corpus / "empty.jsonl").write_bytes(b"")
    source = read_json(curate(load_recipe(write_recipe())) / "curate.json")["sources"]["code"]
    assert source["drops"] == {"not_json": 1, "nul_bytes": 1, "undecodable": 1}
    assert (source["documents_read"], source["documents"]) == (7, 4)


@pytest.mark.parametrize(
    ("kind", "name", "data", "message"),
    [
        ("parquet", "bad.parquet", b"PAR1 and no more", "not readable as parquet"),
        (
            "jsonl",
            "bad.jsonl.gz",
            gzip.compress(json.dumps(record(code(1), 1)).encode() * 50)[:-20],
            "the gzip file is cut off",
        ),
        (
            "jsonl",
            "bad.jsonl.zst",
            zstandard.compress(b"".join(b'{"text": "%s"}\n' % os.urandom(900).hex().encode() for _ in range(300)))[:-500],
            "the zstd file is cut off",
        ),
        ("jsonl", "bad.jsonl.zst", b"no zstd at all, but text" * 20, "not readable as zstd"),
        ("jsonl", "none.jsonl", None, "no file matches"),
    ],
    ids=["no parquet", "gzip cut off", "zstd cut off", "no zstd", "no file"],
)
def test_files_that_cannot_be_read_are_refused(
    write_recipe: Callable[..., Path], tmp_path: Path, kind: str, name: str, data: bytes | None, message: str
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    if data is not None:
        (folder / name).write_bytes(data)
    source = {"kind": kind, "path": str(folder / f"*{name[-4:]}")}
    with pytest.raises(ValueError, match=message):
        curate(load_recipe(write_recipe(sources={"code": source}, licenses={"unknown": "keep"})))


def test_a_licence_may_be_a_list_with_nothing_in_it_and_an_empty_file_is_counted(
    write_recipe: Callable[..., Path], corpus: Path
) -> None:
    for path in corpus.iterdir():
        path.unlink()
    licenses = [
        "MIT",
        ["MIT"],
        ["MIT", None],
        [None],
        [],
        None,
        "NOASSERTION",
        ["Apache-2.0", "MIT"],
        ["GPL-3.0-only"],
        {"a": 1},
    ]
    lines = [json.dumps(record(code(place), place, license=value)) for place, value in enumerate(licenses)]
    (corpus / "some.jsonl").write_text("\n".join(lines))
    (corpus / "nothing.jsonl").write_bytes(b"")
    rules = {"allowed": ["MIT", "Apache-2.0"], "unknown": "keep"}
    source = read_json(curate(load_recipe(write_recipe(licenses=rules))) / "curate.json")["sources"]["code"]
    assert source["licenses"] == {"MIT": 3, "unknown": 5, "Apache-2.0 + MIT": 1}
    assert source["drops"] == {"license_not_allowed": 1}
    assert (source["facts"]["files"], source["facts"]["empty_files"]) == (2, 1)


def test_a_column_that_is_not_there_is_named(write_recipe: Callable[..., Path], corpus: Path) -> None:
    source = {"kind": "jsonl", "path": str(corpus / "*.jsonl"), "text_column": "contents"}
    with pytest.raises(ValueError, match=r"text_column is `contents`, but .* has the columns"):
        curate(load_recipe(write_recipe(sources={"code": source})))


def test_a_benchmark_that_the_recipe_names_and_that_is_not_here_is_refused(write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"`curate.decontamination.benchmarks` names gsm8k, which is not here"):
        curate(load_recipe(write_recipe(decontamination={"benchmarks": ["gsm8k"]})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {}}, "`curate.sources` is empty"),
        ({"sources": {"a": {"kind": "jsonl"}}}, r"`curate.sources.a.path` is missing"),
        (
            {"sources": {"a": {"kind": "jsonl", "path": "x", "share": 0.5}}},
            r"`curate.sources.a.share` does nothing while curating",
        ),
        ({"sources": {"a": {"kind": "jsonl", "path": "x", "licenses": ["MIT"]}}}, r"belongs to curate.licenses.allowed"),
        ({"sources": {"a": {"kind": "generated"}}}, "needs no curation"),
        ({"redact": ["names"]}, "there are keys, emails, ip_addresses"),
        ({"code_by_language": {"HTML": {}}}, "write the language in lower case, html"),
        ({"executor": "kubernetes"}, "write one of local, slurm, ray"),
        ({"near_copies": {"similarity": 0.0}}, "write a number above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    write_recipe: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write_recipe(**changes))


def test_licences_of_installed_packages_are_their_own() -> None:
    assert distribution_licenses("python-stdlib") == ("PSF-2.0",)
    assert distribution_licenses("PyYAML") == ("MIT",)
    assert "BSD-3-Clause" in distribution_licenses("numpy")  # an expression of several
