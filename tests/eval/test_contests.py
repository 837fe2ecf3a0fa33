"""APPS: programs read real input, functions are called, and outputs are compared as the settings say."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codetune.problems import ContestProblem, Loaded, load_problems
from codetune.sandbox import Sandbox
from eval.contests import Apps, lenient_output, same_output, with_preamble
from eval.tasks import Asker, Cut, Grade, Reason, TaskSettings

SUM = ContestProblem("apps", "0", "Add.", "introductory", ("1 2\n", "5 5\n", "1 1\n"), ("3\n", "10\n", "2"), None, "", ())
CALL = ContestProblem("apps", "1", "Keys.", "interview", ([[3, 1]], [[2]]), ([1, 3], [[2]]), "order", "", ())


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(workers=2) as sandbox:
        yield sandbox


def task_of(*problems: ContestProblem, **settings: Any) -> Apps:
    return Apps("apps", TaskSettings("apps", timeout_seconds=1.0, **settings), Loaded("apps", problems, "here", None))


def grade(problem: ContestProblem, code: str, box: Sandbox, **settings: Any) -> Grade:
    task = task_of(problem, **settings)
    (question,) = task.questions(Asker(stored=True))
    return task.grade(question, Cut(code, True), box.run)


@pytest.mark.parametrize(
    ("code", "passed", "reason", "share"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)\n", True, Reason.PASSED, 1.0),
        (
            "import sys\na, b = map(int, sys.stdin.buffer.readline().split())\nprint(a + b)\nsys.exit()\n",
            True,
            Reason.PASSED,
            1.0,
        ),
        ("a, b = map(int, input().split())\nprint(a * b + 1 if b == 2 else 10)\n", False, Reason.WRONG, 2 / 3),
        ("print(3)\n", False, Reason.WRONG, 1 / 3),
        ("input(); input()\n", False, Reason.EXCEPTION, 0.0),
        ("while True: pass\n", False, Reason.TIMEOUT, 0.0),
        ("print(", False, Reason.EXCEPTION, 0.0),
    ],
)
def test_programs_are_run_test_by_test(code: str, passed: bool, reason: Reason, share: float, box: Sandbox) -> None:
    found = grade(SUM, code, box)
    assert (found.passed, found.reason) == (passed, reason)
    assert found.figures["tests_passed_until_failure"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("code", "passed"),
    [
        ("class Solution:\n    def order(self, x: List[int]) -> List[int]:\n        return sorted(x)\n", True),
        ("def order(x):\n    return tuple(sorted(x))\n", True),
        ("def order(x):\n    return x\n", False),
        ("class Solution:\n    def other(self, x):\n        return sorted(x)\n", False),
        ("import os\nos._exit(0)\n", False),
    ],
)
def test_functions_and_methods_are_called(code: str, passed: bool, box: Sandbox) -> None:
    assert grade(CALL, code, box).passed is passed


@pytest.mark.parametrize(
    ("output", "expected", "strict", "lenient"),
    [
        ("1 2\n3\n", "1 2 \n3", True, True),
        ("1 2 3", "1 2\n3\n", True, True),
        ("0.3333333", "0.33333331", True, True),
        ("7", "8", False, False),
        ("1000000", "1000001", False, True),  # whole numbers are not near each other, but for the authors' script
        ("b a", "a b", False, True),  # sets of words
        ("nan", "1.0", False, False),
        ("", "1", False, False),
    ],
)
def test_outputs_are_compared_as_asked(output: str, expected: str, strict: bool, lenient: bool) -> None:
    assert (same_output(output, expected), lenient_output(output, expected)) == (strict, lenient)


def test_questions_have_two_examples_and_say_how_to_read() -> None:
    task = task_of(SUM, CALL)
    first, second = task.questions(Asker(stored=True))
    assert first.text.count("Q: ") == 3 and first.text.endswith("A: ```\n")
    assert "read from and write to standard IO. Please wrap your code answer using ```:\nAdd." in first.text
    assert "use the provided function signature. Please wrap your code answer using ```:\nKeys." in second.text
    assert task.stops_of(first) == ("```", "\nQ:")


def test_fenced_answers_are_unwrapped() -> None:
    task = task_of(SUM, form="zero-shot")
    (question,) = task.questions(Asker(stored=True))
    assert task.cut(question, "Here:\n```python\nprint(1)\n```\nDone.", "eos").text == "print(1)\n"
    assert task.cut(question, "print(1)", "eos").notes == ("no-fence",)
    assert task.cut(question, "```\nprint(1)", "length").notes == ("no-end-fence",)


def test_levels_are_chosen_and_scored_apart() -> None:
    with pytest.raises(ValueError, match="hard; there are introductory"):
        task_of(SUM, levels=("hard",))
    bare = ContestProblem("apps", "2", "None.", "interview", (), (), None, "", ())
    task = task_of(SUM, CALL, bare)
    assert task.notes() == {"without tests, left out": 1} and len(task.problems) == 2
    right, wrong = Grade(True, Reason.PASSED), Grade(False, Reason.WRONG)
    found = task.scores({"0": [right], "1": [wrong]})
    values = {name: score.value for name, score in found.items() if score is not None}
    assert values == {"pass@1": 0.5, "introductory/pass@1": 1.0, "interview/pass@1": 0.0}


def test_future_imports_stay_first() -> None:
    assert with_preamble("from __future__ import annotations\nx = 1\n").startswith("from __future__")
    compile(with_preamble("from __future__ import annotations\nx = 1\n"), "program", "exec")


def test_recorded_verdicts_of_two_published_problems(box: Sandbox) -> None:
    folder = os.environ.get("CODETUNE_TEST_DATA")
    if not folder:
        pytest.skip("CODETUNE_TEST_DATA does not name a folder with APPS problems")
    loaded = load_problems("apps", folder, hub=False)
    task = Apps("apps", TaskSettings("apps", timeout_seconds=4.0, harness="apps"), loaded)
    for question in task.questions(Asker(stored=True)):
        assert isinstance(question.problem, ContestProblem)
        for solution in question.problem.solutions[:5]:
            assert task.grade(question, Cut(solution, True), box.run).passed, solution
        recorded = json.loads((Path(folder) / "apps" / question.id / "gen_solutions.json").read_text())
        for row in recorded[:8]:
            found = task.grade(question, Cut(row["code"], True), box.run)
            assert found.passed == bool(row["result"] is True), (row["result"], found)
