"""Tests that a model wrote: what is taken, what is refused and why, and that no stub passes what is left."""

from __future__ import annotations

import sys

import pytest

from codetune.recipe import AskSettings, SelfInstructSettings
from codetune.sandbox import STRONGEST_FIRST, probe, run_program
from data_pipelines.suites import Refused, Suite, find_block, named_functions, parse_suite, stubs, without_fence
from data_pipelines.verdicts import try_stubs

needs_isolation = pytest.mark.skipif(
    sys.platform != "linux" or all(probe(tier) for tier in STRONGEST_FIRST), reason="no isolation works here"
)
QUESTION = "Write a function add(a, b) that returns the sum of two numbers."
ASK = AskSettings("prompt", 10)
SETTINGS = SelfInstructSettings(ASK, ASK, ASK, "topics", "seeds", 1)


def suite_of(body: str, question: str = QUESTION, minimum: int = 2) -> Suite | Refused:
    return parse_suite(f"[TESTS]\n{body}\n[/TESTS]", question, stopped=True, minimum_asserts=minimum)


def test_asserts_between_the_tags_are_taken() -> None:
    answer = "Sure!\n[TESTS]\n#Test case 1:\nassert add(1, 2) == 3\n#Test case 2:\nassert add(-1, 1) == 0\n[/TESTS]\nBye."
    suite = parse_suite(answer, QUESTION, stopped=False, minimum_asserts=2)
    assert isinstance(suite, Suite)
    assert (suite.entry_point, suite.asserts) == ("add", ("assert add(1, 2) == 3", "assert add(-1, 1) == 0"))
    assert suite.text == "assert add(1, 2) == 3\nassert add(-1, 1) == 0\n"


def test_imports_stand_before_the_asserts_and_equal_asserts_count_once() -> None:
    suite = suite_of("import math\nassert math.isclose(add(1, 2), 3)\nassert add(0,0)==0\nassert add(0, 0) == 0")
    assert isinstance(suite, Suite)
    assert suite.text == "import math\nassert math.isclose(add(1, 2), 3)\nassert add(0, 0) == 0\n"
    assert suite.duplicates == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("Here are some tests for you.", "syntax"),
        ("assert add(1, 2) ==", "syntax"),
        ("def add(a, b):\n    return a + b\nassert add(1, 2) == 3", "not-an-assert"),
        ("for n in (1, 2):\n    assert add(n, 0) == n", "not-an-assert"),
        ("assert (x := add(1, 2)) == 3\nassert add(0, 0) == 0", "not-an-assert"),
        ("import os\nassert add(1, 2) == 3", "import"),
        ("from math import *\nassert add(1, 2) == 3", "import"),
        ("assert add(1, 2) == 3\nassert open('x') or add(0, 0) == 0", "forbidden-name"),
        ("assert add(1, 2).__class__ == int\nassert add(0, 0) == 0", "forbidden-name"),
        ("assert add(x, 2) == 3\nassert add(0, 0) == 0", "undefined-name"),
        ("assert 1 + 2 == 3\nassert add(0, 0) == 0", "no-call"),
        ("assert True", "no-call"),
        ("assert plus(1, 2) == 3\nassert plus(0, 0) == 0", "other-function"),
        ("assert add(1, 2) == 3\nassert plus(0, 0) == 0", "several-functions"),
        ("assert add(1, 2) == 3", "too-few"),
        ("assert add(1, 2) == 3\nassert add(1,2) == 3", "too-few"),
        ("assert add(1, 2) == 3\nassert add(1, 2) == 4", "contradictory"),
        ("assert add(1, 2)\nassert not add(1, 2)", "contradictory"),
        ("assert add(1, 2) == 3\nassert add(1, 2) != 3", "contradictory"),
        ("assert add(1, 2) == 3\nassert not add(1, 2)", "contradictory"),
        ("assert not add(1, 2) == 3\nassert 3 == add(1, 2)", "contradictory"),
        ("assert add(1, 2) == add(1, 2)\nassert add(0, 0) == 0", "vacuous"),
        ("# nothing but a note", "no-assert"),
    ],
)
def test_what_is_refused_by_reading(body: str, reason: str) -> None:
    found = suite_of(body)
    assert isinstance(found, Refused), found
    assert found.reason == reason


def test_asserts_that_agree_are_no_contradiction() -> None:
    assert isinstance(
        suite_of("assert add(2, 2) == 4\nassert add(2, 2)\nassert add(2, 2) != 5\nassert add(2, 2) == 2 * 2"), Suite
    )
    assert isinstance(suite_of("assert add(1, 2) != 4\nassert add(1, 2) != 5"), Suite)


@pytest.mark.parametrize(
    ("answer", "stopped", "reason"),
    [
        ("", True, "nothing"),
        (" \n", False, "nothing"),
        ("I cannot do that.", True, "no-tag"),
        ("[TESTS]\nassert add(1, 2) == 3\nassert add(", False, "cut-off"),
        ("[TESTS]  [/TESTS]", True, "nothing"),
    ],
)
def test_answers_without_a_block(answer: str, stopped: bool, reason: str) -> None:
    found = parse_suite(answer, QUESTION, stopped=stopped, minimum_asserts=1)
    assert isinstance(found, Refused)
    assert found.reason == reason


@pytest.mark.parametrize(
    "text", ["(" * 5000, "[TESTS]" * 9000, "assert add(" + "-" * 19_000 + "1)", "\0", "x = '\ud800'", "é" * 30_000]
)
def test_strange_text_is_refused_and_nothing_breaks(text: str) -> None:
    assert isinstance(parse_suite(f"[TESTS]{text}", QUESTION, stopped=True, minimum_asserts=1), Refused)


def test_a_stop_string_closes_a_block_and_a_limit_does_not() -> None:
    assert find_block("[TESTS] a", "[TESTS]", "[/TESTS]", stopped=True) == " a"
    assert isinstance(find_block("[TESTS] a", "[TESTS]", "[/TESTS]", stopped=False), Refused)
    assert find_block("x [TESTS] a [/TESTS] b [TESTS] c", "[TESTS]", "[/TESTS]", stopped=False) == " a "


def test_a_fence_inside_of_the_tags_is_taken_off() -> None:
    assert without_fence("\n```python\nx = 1\n```\n") == "x = 1"
    assert without_fence("x = '```'\n") == "x = '```'\n"


def test_which_functions_a_question_names() -> None:
    assert named_functions(QUESTION) == {"add"}
    assert named_functions("Write a function called `sum` that adds.") == {"sum"}
    assert named_functions("Write a function sum(n) that uses len(x).") == {"sum"}
    assert named_functions("Write a function that adds two numbers.") == set()


def test_a_question_may_ask_for_a_function_with_a_builtins_name() -> None:
    suite = suite_of("assert sum([1, 2]) == 3\nassert sum([]) == 0", "Write a function sum(items) that adds them.")
    assert isinstance(suite, Suite)
    assert suite.entry_point == "sum"


@needs_isolation
@pytest.mark.parametrize(
    ("body", "passed_by"),
    [
        ("assert add(1, 2) is None\nassert add(2, 2) is None", "empty"),
        ("assert add(1, 2) == 3\nassert add(2, 1) == 3", "constant 3"),
        ("assert add(1, 2)\nassert add(2, 1)", "constant True"),
        ("assert isinstance(add(1, 2), list)\nassert len(add(3, 4)) == 0", "constant []"),
        ("assert add(1, 0) == 1\nassert add(2, 0) == 2", "argument 1"),
        ("assert add(0, 1) == 1\nassert add(a=0, b=2) == 2", "argument 2"),
        ("assert add([1], 0) == 1\nassert add([1, 2], 0) == 2", "length of the first argument"),
        ("assert add(0, 1) == False\nassert add(2, 1) == True", "truth of the first argument"),
        ("assert add(1, 2) == (1, 2)\nassert add(3, 4) == (3, 4)", "all arguments"),
    ],
)
def test_tests_that_a_stub_passes_are_vacuous(body: str, passed_by: str) -> None:
    suite = suite_of(body)
    assert isinstance(suite, Suite), suite
    refused, count = try_stubs({"q": suite}, SETTINGS)["q"]
    assert refused is not None
    assert (refused.reason, refused.detail.rpartition(": ")[2]) == ("vacuous", passed_by)
    assert count >= 1


@needs_isolation
def test_tests_that_mean_something_are_passed_by_no_stub_but_by_a_solution() -> None:
    suite = suite_of("assert add(1, 2) == 3\nassert add(2, 2) == 4\nassert add(-1, 1) == 0")
    assert isinstance(suite, Suite)
    assert try_stubs({"q": suite}, SETTINGS)["q"] == (None, len(list(stubs(suite))))
    assert run_program("def add(a, b):\n    return a + b\n", suite.text, entry_point="add").passed


@needs_isolation
@pytest.mark.parametrize(
    ("expression", "reason"), [("sum(range(10**13))", "tests-time-out"), ("[0 for n in range(10**13)]", "tests-memory")]
)
def test_tests_without_an_end_cost_one_program(expression: str, reason: str) -> None:
    suite = suite_of(f"assert {expression} and add(1, 2) == 3\nassert add(0, 0) == 0")
    assert isinstance(suite, Suite)
    refused, count = try_stubs({"q": suite}, SETTINGS)["q"]
    assert (refused and refused.reason, count) == (reason, 1)
