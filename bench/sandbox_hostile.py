"""Hostile and awkward programs by family: verdicts and side effects, in every isolation that works on this machine.

Reference: the verdict and the absence of side effects that each program of bench/hostile_programs.py is listed with.
The same forgeries are run with the tests in the program's own process beside it, which shows what a process border is
for.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys

from bench.hostile_programs import UNDECIDABLE, Case, Watch, cases, numpy_case
from codetune.sandbox import STRONGEST_FIRST, Sandbox, probe

MINUTES = 6


def expected_here(case: Case, tier: str) -> tuple[str, ...]:
    """Without a process namespace no program may start another one, so the right ones that must do so fail there."""
    return ("fail",) if case.starts_processes and tier != "namespaces" else case.expected


def measure(tier: str) -> dict[str, object]:
    """Every case in one isolation."""
    wrong: list[str] = []
    families: dict[str, list[bool]] = collections.defaultdict(list)
    with Watch() as watch:
        with Sandbox(tier, workers=2) as sandbox:
            everything = [*cases(), numpy_case()]
            jobs = [case.job(watch.places) for case in everything]
            for case, result in zip(everything, sandbox.run_many(jobs), strict=True):
                touched = watch.touched(result.stdout + result.stderr)
                good = str(result.verdict) in expected_here(case, tier) and not touched
                families[case.family].append(good)
                if not good:
                    wrong.append(f"{case.family}: {case.name}: {result.verdict} ({result.reason}) {touched}")
        left = watch.left_behind([])
    print(f"\nisolation {tier}: {sum(map(len, families.values()))} programs")
    for family, results in families.items():
        print(f"  {family:<24} {sum(results):>3} of {len(results):>3} as they must be")
    print(f"  left behind: {left or 'nothing'}")
    for line in wrong:
        print(f"  NOT SO: {line}")
    return {"programs": sum(map(len, families.values())), "not_so": wrong, "left": left}


def main() -> None:
    figures: dict[str, object] = {tier: measure(tier) for tier in STRONGEST_FIRST if probe(tier) is None}
    with Watch() as watch, Sandbox(workers=2) as sandbox:
        forgeries = [case for case in cases() if case.family in ("forgeries", "endings")]
        together = [dataclasses.replace(case, judge="same-process").job(watch.places) for case in forgeries]
        forged = [case.name for case, result in zip(forgeries, sandbox.run_many(together), strict=True) if result.passed]
        print(f"\nthe same {len(forgeries)} endings and forgeries, tests in the same process: {len(forged)} forged a pass")
        for name in forged:
            print(f"  {name}")
        print("\nwhat a process border cannot decide, since the program is asked for the answer:")
        undecided = []
        for name, (program, tests) in UNDECIDABLE.items():
            result = sandbox.run(Case("undecidable", name, program, tests=tests).job(watch.places))
            undecided.append(name)
            print(f"  {name}: {result.verdict}")
    print("RESULT " + json.dumps({**figures, "forged_in_the_same_process": forged, "undecidable": undecided}))
    sys.exit(0)


if __name__ == "__main__":
    main()
