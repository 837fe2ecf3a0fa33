"""Self-instruct killed at random moments and started again, and with one worker or two: are the triplets the same bytes?

Reference: one run with one worker that nobody killed, of the same plan, smaller than tiny's.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.self_instruct_run import ROOT, command, environment, run, triplets
from codetune.artifacts import read_json

MINUTES = 8
SMALLER = (
    "self_instruct.question_prompts=3",
    "self_instruct.solutions.samples=3",
    "self_instruct.questions.engine.group_requests=1",
    "self_instruct.tests.engine.group_requests=4",
    "self_instruct.solutions.engine.group_requests=6",
)
MOST_KILLS = 6


def bytes_of(runs: Path) -> tuple[str, int, int]:
    """A hash of what must be the same, and how many questions and triplets there are."""
    digest = hashlib.sha256()
    for name in ("triplets.jsonl", "questions.json"):
        digest.update((triplets(runs) / name).read_bytes())
    funnel = read_json(triplets(runs) / "manifest.json")["funnel"]
    return digest.hexdigest()[:16], funnel["clean"], funnel["kept"]


def killed(runs: Path, words: list[str], most_seconds: float) -> int:
    """Start it, kill it at a random moment with all its processes, again and again until it ends by itself; how often."""
    draw, kills = random.Random(1), 0
    while True:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            process.wait(draw.uniform(0.2, 1.0) * most_seconds if kills < MOST_KILLS else None)
        except subprocess.TimeoutExpired:
            done = sum(path.stat().st_size for path in (runs / "tiny" / "self_instruct" / "work").rglob("*.jsonl"))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            print(f"  killed; {done:,} bytes of completions and verdicts were there", flush=True)
            continue
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"it ended with exit code {process.returncode}: {errors.decode()[-2000:]}")
        return kills


def main() -> None:
    found, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2):
            runs, start = Path(folder) / f"workers-{workers}", time.monotonic()
            run(command(runs, "--workers", str(workers), settings=SMALLER))
            found[f"{workers} worker{'s' * (workers - 1)}"], seconds[workers] = bytes_of(runs), time.monotonic() - start
        runs = Path(folder) / "killed"
        kills = killed(runs, command(runs, "--workers", "2", settings=SMALLER), 0.6 * seconds[2])
        found[f"2 workers, killed {kills} times"] = bytes_of(runs)
    for name, (digest, questions, kept) in found.items():
        print(f"{name:<28} {digest}  {questions} questions, {kept} kept")
    same = len(set(found.values())) == 1
    print(f"the same bytes: {'yes' if same else 'NO'}")
    facts = {name: dict(zip(("hash", "questions", "kept"), value, strict=True)) for name, value in found.items()}
    print("RESULT " + json.dumps({"same": same, "kills": kills, "runs": facts}))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
