"""Curation with one task, with two, on Ray, and killed in three phases and started again: the same documents or not.

Reference: SHA-256 of every parquet file of the data set that one task makes of installed packages
(`recipes/curate/smoke.yaml`). All are started from another folder; Ray is a real one on this machine, with two workers.
Killed: SIGKILL to the process and whatever it has started, while it reads, while it orders shards and while it compares,
each time started again with the same command.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from codetune.artifacts import read_json

MINUTES = 3
ROOT = Path(__file__).parents[1]
KILLED_IN = ("clean", "order", "buckets")  # phases, by the marks of their tasks
BUCKETS = "curate.near_copies.buckets=4"  # a task each; Ray starts a process for every one
WAYS: dict[str, tuple[str, ...]] = {
    "one task": ("curate.tasks=1",),
    "two tasks": ("curate.tasks=2",),
    "Ray, two tasks": ("curate.tasks=2", "curate.executor=ray"),
    "killed and restarted": ("curate.tasks=2",),
}


def start(runs: Path, settings: tuple[str, ...], folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "data_pipelines.curate", "--recipe", str(ROOT / "recipes/curate/smoke.yaml")]
    command += ["--workers", "2", "--set", f"runs={runs}", BUCKETS, *settings]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "RAY_worker_niceness": "0"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it has started: datatrove's manager and workers outlive it."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_in(phase: str, runs: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether it was at work in this phase, or had just ended it, when it was killed."""
    marks = runs / "smoke" / "curate" / "curate.partial" / "logs" / phase
    while not marks.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    running = process.poll() is None
    end(process)
    return running


def measure(way: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    runs, kills = folder / "runs", 0
    if way.startswith("killed"):
        for phase in KILLED_IN:
            kills += kill_in(phase, runs, start(runs, WAYS[way], folder))
    process = start(runs, WAYS[way], folder)
    code = process.wait()
    if code:
        raise RuntimeError(f"{way} ended with {code}:\n{(folder / 'log').read_text()}")
    dataset = runs / "smoke" / "curate" / "dataset"
    files = {path.relative_to(dataset).as_posix(): path for path in sorted(dataset.rglob("*.parquet"))}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    sources = read_json(dataset / "curate.json")["sources"]
    counts = {name: (source["documents_read"], source["documents"], source["drops"]) for name, source in sources.items()}
    return {"hashes": hashes, "counts": counts, "kills": kills}


def main() -> None:
    ways = [way for way in WAYS if "Ray" not in way or importlib.util.find_spec("ray") is not None]
    with tempfile.TemporaryDirectory() as name:
        found = {way: measure(way, Path(name) / str(place)) for place, way in enumerate(ways)}
    first = found["one task"]
    counts = first["counts"].values()
    read, kept = sum(item[0] for item in counts), sum(item[1] for item in counts)
    dropped = sum(sum(item[2].values()) for item in counts)
    print(f"one task: {read:,} documents read = {kept:,} kept + {dropped:,} dropped; {len(first['hashes'])} files")
    figures: dict[str, Any] = {"read": read, "kept": kept, "dropped": dropped, "files": len(first["hashes"])}
    for way in ways[1:]:
        same = (found[way]["hashes"], found[way]["counts"]) == (first["hashes"], first["counts"])
        figures[way] = {"same": same, "kills_that_met_it": found[way]["kills"]}
        told = f", killed {found[way]['kills']} times at work" if found[way]["kills"] else ""
        print(f"{way}: {'the same bytes and counts' if same else 'DIFFERENT'}{told}")
    if len(ways) < len(WAYS):
        print("Ray is not installed (pip install -e '.[ray]') and was left out")
    assert read == kept + dropped
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
