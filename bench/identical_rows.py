"""Rows built with one worker, with two, and killed twice and restarted: the same bytes or not.

Reference: SHA-256 of every file of the one-worker build of `recipes/stage1/tiny.yaml` in four lanes. `timing.json` (seconds
and workers) is left out, and the folder's own path in `manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.corpus import embedded_recipe
from codetune.artifacts import fail

MINUTES = 4


def hashes(folder: Path, runs: Path) -> dict[str, str]:
    """SHA-256 by file name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "timing.json":
            content = path.read_bytes().replace(str(runs).encode(), b"RUNS")
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def wait_for_rows(runs: Path, process: subprocess.Popen[bytes]) -> None:
    """Until this process has written rows: a progress file is new or has changed."""
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("progress-0*")}
    while process.poll() is None:
        now = {path: path.stat().st_mtime_ns for path in runs.rglob("progress-0000[0-9]")}
        if any(before.get(path) != changed for path, changed in now.items()):
            return
        time.sleep(0.02)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = ["data.lanes=4", "training.train_tokens=2457600"]
        parent = embedded_recipe(folder, overrides).parent_path
        results = {}
        effective = 0
        for case, workers, kills in (("one_worker", 1, 0), ("two_workers", 2, 0), ("killed_twice", 2, 2)):
            runs = folder / case
            command = [sys.executable, "-m", "data_pipelines.build", "--recipe", "recipes/stage1/tiny.yaml"]
            command += ["--workers", str(workers), "--set", *overrides, f"runs={runs}", f"parent={parent}"]
            for kill in range(kills):
                process = subprocess.Popen(
                    command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                wait_for_rows(runs, process)
                effective += process.poll() is None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                print(f"{case}: kill {kill + 1}; lanes finished: {len(list(runs.rglob('completions/*')))}")
            subprocess.run(command, check=True, capture_output=True)
            results[case] = hashes(runs / "tiny" / "stage1" / "rows", runs)
            print(f"{case}: {len(results[case])} files")
        differing = {
            case: [file for file in results["one_worker"] if found.get(file) != results["one_worker"][file]]
            for case, found in results.items()
        }
        same = all(found == results["one_worker"] for found in results.values())
    print(f"\nfiles that differ: {differing}")
    print(f"byte-identical: {same} (to reach: True); kills that met a running build: {effective} of 2")
    if effective < 2:
        fail("a build ended before it could be killed; the figure means nothing")
    print("RESULT " + json.dumps({"byte_identical": same, "files": len(results["one_worker"]), "kills": effective}))


if __name__ == "__main__":
    main()
