"""Self-instruct at tiny: the funnel of a real small model, and whether what it kept passes again and a constant passes none.

Reference: the same triplets, replayed in a fresh process: taken out of the stored completions, run, and asked for again.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from bench.self_instruct_run import command, run, triplets
from codetune.artifacts import read_json
from codetune.sandbox import Job, Sandbox
from data_pipelines.triplets import read_triplets

MINUTES = 5
CONSTANTS = ("None", "True", "False", "0", "1", "-1", "''", "'a'", "[]", "{}", "()", "[1, 2, 3]", "0.0", "arguments[0]")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        start = time.monotonic()
        said = run(command(runs, "--workers", "2"))
        seconds = time.monotonic() - start
        print("\n".join(line for line in said.splitlines() if not line.startswith("triplets:")))
        replayed = run(command(runs, "--replay", "all", "--regenerate"))
        print("\n".join(line for line in replayed.splitlines() if line.startswith(("replayed", "regenerated"))))
        manifest = read_json(triplets(runs) / "manifest.json")
        kept = list(read_triplets(triplets(runs)))
    jobs = [
        Job(f"def {triplet.entry_point}(*arguments):\n    return {constant}\n", triplet.tests, triplet.entry_point)
        for triplet in kept
        for constant in CONSTANTS
    ]
    jobs += [Job(triplet.solution, triplet.tests, triplet.entry_point) for triplet in kept]
    with Sandbox(workers=2) as sandbox:
        passed = [result.passed for result in sandbox.run_many(jobs)]
    constants, solutions = passed[: len(kept) * len(CONSTANTS)], passed[len(kept) * len(CONSTANTS) :]
    print(f"run again: {sum(solutions)} of {len(kept)} kept triplets pass (to reach: all)")
    print(f"{len(CONSTANTS)} constant and identity functions: {sum(constants)} of {len(constants)} pass (to reach: 0)")
    print("kept:")
    for triplet in kept:
        print(f"  {triplet.question} | {' '.join(triplet.solution.split())[:100]}")
    print(f"seconds in all, two workers: {seconds:.0f}")
    figures = {"funnel": manifest["funnel"], "drops": manifest["drops"], "seconds": round(seconds)}
    figures |= {"passed_again": sum(solutions), "constants_passed": sum(constants), "asked": manifest["asked"]}
    print("RESULT " + json.dumps(figures))
    sys.exit(0)


if __name__ == "__main__":
    main()
