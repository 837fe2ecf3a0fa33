"""Program repair: broken functions differ in one place, are seen to fail before they are asked, and the mended ones pass."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codetune.problems import Loaded, RepairProblem, load_problems
from codetune.sandbox import Sandbox
from eval.breakages import KINDS, breakages
from eval.repair import Repair, Repairs, failing_test, header_of, repair_problems, same_code, without_docstring
from eval.run import Options, run_suite
from eval.tasks import Asker, Reason, Suite, TaskSettings

CLAMP = '''def clamp(x, low, high):
    """Keep x in bounds."""
    if x < low and True:  # too small
        return low
    y = x
    return min(y, high + 0)
'''
TESTS = "def check(candidate):\n    assert candidate(0, 1, 3) == 1\n    assert candidate(5, 1, 3) == 3\n"
HUMAN_EVAL = load_problems("humaneval", hub=False)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(workers=2) as sandbox:
        yield sandbox


def load_without_file(name: str) -> Loaded:
    return load_problems(name, hub=False)


def repairs(box: Sandbox, **settings: Any) -> Repairs:
    return repair_problems(TaskSettings("repair", **settings), load_without_file, lambda: box)


def test_breakages_are_one_change_each_and_keep_the_text_around_it() -> None:
    found = breakages(CLAMP)
    assert {one.kind for one in found} == set(KINDS)
    by_change = {one.change: one for one in found}
    assert by_change["`<` -> `<=`"].source == CLAMP.replace("x < low", "x <= low")
    assert by_change["`and` -> `or`"].source == CLAMP.replace("and", "or")
    assert by_change["`True` -> `False`"].source == CLAMP.replace("True", "False")
    assert by_change["`0` -> `1`"].source == CLAMP.replace("+ 0", "+ 1")
    assert by_change["`+` -> `-`"].source == CLAMP.replace("+ 0", "- 0")
    assert by_change["`x < low and True` -> `not (x < low and True)`"].line == 3
    assert by_change["without `y = x`"].source == CLAMP.replace("    y = x\n", "")
    assert by_change["`y` -> `x`"].source == CLAMP.replace("min(y", "min(x")
    assert all("Keep x in bounds" in one.source for one in found)
    assert len({one.source for one in found}) == len(found)


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("def f(a, b):\n    return (a) \\\n        not in (b)\n", "`not in` -> `in`"),
        ("def f(a):\n    a *= 2\n    return a\n", "`*` -> `+`"),
        ("def f(a):\n    return 'é' + a + 'é'\n", "`+` -> `-`"),
        ("def f(a):\n    return a == 1 != 2\n", "`!=` -> `==`"),
    ],
)
def test_operators_are_found_where_they_are_written(source: str, change: str) -> None:
    found = [one for one in breakages(source) if one.change == change]
    assert found and all(ast.dump(ast.parse(one.source)) != ast.dump(ast.parse(source)) for one in found)


def test_changes_begin_at_the_line_that_is_asked_for() -> None:
    assert {one.line for one in breakages(CLAMP, 5)} == {5, 6}


def test_every_broken_function_was_seen_to_fail_and_the_others_are_counted(box: Sandbox) -> None:
    ids = ("HumanEval/0", "HumanEval/2", "HumanEval/8", "HumanEval/13")
    made = repairs(box, ids=ids)
    assert made.tried == len(made.problems) + made.unseen + made.undecided
    assert {one.id for one in made.problems} | set(made.left_out) == set(ids)
    task = Repair("repair", TaskSettings("repair"), made)
    questions = task.questions(Asker(stored=True))
    for question in questions:
        problem = question.problem
        assert isinstance(problem, RepairProblem) and problem.failing
        broken, right = (task.grade(question, cut, box.run) for cut in (task.floor(problem), task.reference(problem)))
        assert broken.passed is False and broken.reason in (Reason.WRONG, Reason.EXCEPTION) and right.passed
    again = repairs(box, ids=ids)
    assert again.problems == made.problems
    assert repairs(box, ids=ids, seed=1).problems != made.problems
    assert task.notes()["changes that were run"] == made.tried


def test_a_change_that_no_test_sees_is_refused(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first change of a function leaves it as right as it was; the next one is taken."""
    import eval.repair as module
    from eval.breakages import Breakage

    (problem, *_) = HUMAN_EVAL.problems
    right = problem.prompt + problem.reference  # pyright: ignore[reportAttributeAccessIssue]
    unseen = Breakage("name", 1, "nothing", right.replace("distance", "gap"))
    seen = Breakage("constant", 1, "all", right.replace("return False", "return True"))
    monkeypatch.setattr(module, "ordered_breakages", lambda one, seed: iter([unseen, seen]))
    made = repairs(box, limit=1)
    (taken,) = made.problems
    assert isinstance(taken, RepairProblem)
    assert (made.tried, made.unseen, taken.change) == (2, 1, "line 1: all")
    monkeypatch.setattr(module, "ordered_breakages", lambda one, seed: iter([unseen]))
    with pytest.raises(ValueError, match="no change in HumanEval/0 makes a test fail"):
        repairs(box, limit=1)


def test_questions_show_the_fault_and_a_failing_test_and_ask_for_the_function(box: Sandbox) -> None:
    problem = RepairProblem("repair", "1", CLAMP.replace("high + 0", "high + 1"), TESTS, CLAMP, "clamp")
    made = repair_problems(TaskSettings("repair"), lambda name: Loaded(name, (problem,), "repair.jsonl", None), lambda: box)
    task = Repair("repair", TaskSettings("repair"), made)
    (question,) = task.questions(Asker(stored=True))
    assert question.text.endswith("# The same function, mended.\ndef clamp(x, low, high):\n")
    assert "\n\nassert clamp(5, 1, 3) == 3\n\n" in question.text and "Keep x in bounds" not in question.text
    assert "high + 1" in question.text
    body = "    return max(low, min(x, high))\n"
    assert task.grade(question, task.cut(question, body, "eos"), box.run).passed
    same = without_docstring(problem.broken, "clamp").split("\n", 1)[1]
    unchanged = task.cut(question, f"    # looks right\n{same}", "eos")
    assert unchanged.notes == ("unchanged",) and not task.grade(question, unchanged, box.run).passed
    assert task.cut(question, "\n", "eos").problem is Reason.EMPTY
    documented = Repair("repair", TaskSettings("repair", form="docstring"), made).questions(Asker(stored=True))[0]
    assert documented.text.endswith('def clamp(x, low, high):\n    """Keep x in bounds."""\n')
    chat = Repair("repair", TaskSettings("repair", form="chat"), made)
    (asked,) = chat.questions(Asker(render_chat=lambda message: (1, len(message))))
    assert asked.token_ids == (1, len(asked.text)) and "clamp(5, 1, 3) == 3" in asked.text
    answer = chat.cut(asked, f"Like so:\n```python\n{CLAMP}```\n", "eos")
    assert chat.grade(asked, answer, box.run).passed and answer.notes == ()


def test_a_file_whose_broken_function_passes_is_refused(box: Sandbox, tmp_path: Path) -> None:
    rows = [
        {"task_id": "1", "broken": CLAMP.replace("+ 0", "+ 1"), "reference": CLAMP, "test": TESTS, "entry_point": "clamp"},
        {"task_id": "2", "broken": CLAMP, "reference": CLAMP, "test": TESTS, "entry_point": "clamp"},
    ]
    path = tmp_path / "repair.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    load = lambda name: load_problems(name, tmp_path, hub=False)  # noqa: E731
    with pytest.raises(ValueError, match=r"repair.jsonl: the broken function of 2 passes its tests; mend or remove"):
        repair_problems(TaskSettings("repair"), load, lambda: box)
    path.write_text(f"{json.dumps(rows[0])}\n")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"task_id": "1", "solution": CLAMP}) + "\n")
    options = Options(tmp_path / "out", data=tmp_path, hub=False, completions={"repair": answers})
    facts = run_suite(Suite("one", {"repair": TaskSettings("repair")}), None, options)["tasks"]["repair"]
    assert facts["state"] == "done" and facts["scores"]["pass@1"]["value"] == 1.0
    assert facts["scores"]["own/pass@1"]["problems"] == 1
    assert facts["references"]["floor"] == {"name": "with nothing changed", "passed": 0, "of": 1}


def test_the_failing_test_is_shown_alone_where_it_stands_by_itself() -> None:
    tests = "def check(candidate):\n    assert candidate(1) == 2\n    for n in (3, 4):\n        assert candidate(n)\n"
    assert failing_test(tests, 2, "f") == "assert f(1) == 2"
    assert failing_test(tests, 4, "f").startswith("assert f(1) == 2\nfor n in (3, 4):\n    assert f(n)")
    assert failing_test("assert candidate(1)\n", 1, "f") == "assert candidate(1)"


def test_headers_and_docstrings() -> None:
    source = "import os\n\n\ndef g(\n    x,\n):\n    return x\n"
    assert header_of(source, "g", docstring=True) == header_of(source, "g", docstring=False) == "def g(\n    x,\n):\n"
    assert without_docstring(source, "g") == source
    assert same_code(CLAMP, without_docstring(CLAMP, "clamp"), "clamp") and not same_code("(", CLAMP, "clamp")
