"""APPS: programs that read standard input, and functions that are called, test by test; two-shot and zero-shot.

What comes in: problems with inputs and outputs. What goes out: tasks whose answers pass when every test passes; grading
stops at the first that fails, and the share passed until then is a figure. Scores are given for each level too.

Each test runs the program anew with a real pipe as its standard input, in the sandbox. Outputs are compared line by line,
then word by word, numbers within 1e-6 (`harness: strict`); `harness: apps` is as lenient as the authors' script: sets of
words and relative tolerances. Calls are made by the tests' own process.

The paper prints neither its two examples nor the fence: the examples here are ours, one of each kind, in three backticks.
A share of the published solutions is known to fail their own tests: up to a tenth may, and results name them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from codetune.problems import APPS_LEVELS, ContestProblem
from codetune.sandbox import Job, Limits, Verdict
from eval import scores
from eval.tasks import MIB, Asker, Cut, Grade, Question, Reason, Run, Task

INSTRUCTION = (
    "Write a python code to solve the following coding problem that obeys the constraints and passes the example test "
    "cases. The output code needs to {guide}. Please wrap your code answer using ```:\n{question}"
)
GUIDES = {True: "read from and write to standard IO", False: "use the provided function signature"}
# What the authors' script puts in front of every solution, numpy left out.
PREAMBLE = """\
import sys, time, itertools, collections, math, fractions, random, heapq, bisect, re, string, copy, functools, operator
from itertools import accumulate, product, permutations, combinations
from collections import Counter, OrderedDict, deque, defaultdict, ChainMap
from functools import lru_cache, reduce
from math import sqrt, sin, cos, tan, ceil, fabs, floor, gcd, exp, log, log2
from typing import *
from heapq import *
from bisect import *
sys.set_int_max_str_digits(0)
"""
SHOTS = (
    (
        True,
        "A shop keeps a list of prices. Print the sum of the two lowest prices.\n\nInput\nThe first line has n "
        "(2 <= n <= 1000). The second line has n whole numbers.\n\nOutput\nOne whole number.\n\nExample\nInput\n4\n"
        "5 1 7 3\nOutput\n4\n",
        "n = int(input())\nprices = sorted(map(int, input().split()))\nprint(prices[0] + prices[1])\n",
    ),
    (
        False,
        "Given a word, return the word with its vowels in upper case and all other letters as they are.\n\nExample\n"
        'raise_vowels("stream") is "strEAm"\n\ndef raise_vowels(word):\n',
        "def raise_vowels(word):\n    return ''.join(letter.upper() if letter in 'aeiou' else letter for letter in word)\n",
    ),
)
# Behind the solution, on the tests' side: find the function, call it, compare. Data comes as JSON text, never as code.
CALL = """\
import json, sys
sys.set_int_max_str_digits(0)
_arguments, _expected = json.loads({data!r})
def _keys(item):
    return {{int(key) if key.lstrip("-").isdigit() else key: value for key, value in item.items()}}
_arguments = [_keys(item) if isinstance(item, dict) else item for item in _arguments]
_function = Solution().{name} if {in_class} else {name}
def _plain(value):
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
def _same(left, right):
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_same(one, other) for one, other in zip(left, right))
    if type(left) is float or type(right) is float:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        return numbers and abs(left - right) <= 1e-6 * max(1, abs(right))
    return left == right
_result = _plain(_function(*_arguments))
_wanted = _plain(_expected)
assert _same(_result, _wanted) or (isinstance(_wanted, list) and len(_wanted) > 0 and _same(_result, _wanted[0]))
"""


class Apps(Task):
    """A question with inputs and outputs."""

    forms = ("two-shot", "zero-shot")
    most_failing = 0.1
    stops = ("\nQ:",)

    def asked_by_design(self, problems: list[ContestProblem]) -> list[ContestProblem]:
        return [one for one in problems if one.inputs]

    def select(self, problems: list[ContestProblem]) -> list[ContestProblem]:
        """Those of the levels that are asked for, with tests."""
        wrong = set(self.settings.levels) - set(APPS_LEVELS)
        if wrong:
            raise ValueError(f"tasks.{self.name}.levels: {', '.join(sorted(wrong))}; there are {', '.join(APPS_LEVELS)}")
        with_tests = [one for one in problems if one.inputs]
        self.without_tests = len(problems) - len(with_tests)
        return super().select([one for one in with_tests if not self.settings.levels or one.level in self.settings.levels])

    def notes(self) -> dict[str, Any]:
        return {"without tests, left out": self.without_tests} if self.without_tests else {}

    def question(self, problem: ContestProblem, asker: Asker) -> Question:
        message = ask(problem.function is None, problem.question, problem.starter)
        if self.form == "zero-shot":
            return Question(problem.id, message, problem, self.chat_or_text(asker, message), ())
        shots = "".join(f"Q: {ask(reads, text, '')}\nA: ```\n{code}```\n\n" for reads, text, code in SHOTS)
        return Question(problem.id, f"{shots}Q: {message}\nA: ```\n", problem)

    def stops_of(self, question: Question) -> tuple[str, ...]:
        return (
            ("```", "\nQ:") if self.form == "two-shot" and self.settings.stop_strings is None else super().stops_of(question)
        )

    def cut(self, question: Question, text: str, ended: str) -> Cut:
        if self.form == "two-shot":
            return Cut(text, True, None if text.strip() else Reason.EMPTY)
        _, fence, rest = text.partition("```")
        code, end, _ = rest.partition("```")
        if not fence:
            return Cut(text, True, None if text.strip() else Reason.EMPTY, ("no-fence",))
        first, line_end, others = code.partition("\n")
        code = others if line_end and first.strip().isalnum() and len(first.strip()) < 12 else code
        return Cut(code, True, None if code.strip() else Reason.EMPTY, () if end else ("no-end-fence",))

    def reference(self, problem: ContestProblem) -> Cut | None:
        return Cut(problem.solutions[0], True) if problem.solutions else None

    def limits(self) -> Limits:
        wall, memory = self.settings.timeout_seconds, self.settings.memory_mib * MIB
        return Limits(wall_seconds=wall, memory_bytes=memory, output_bytes=16 * MIB)

    def grade(self, question: Question, cut: Cut, run: Run) -> Grade:
        problem = question.problem
        assert isinstance(problem, ContestProblem)
        grade, passed = Grade(None, Reason.NO_CHECK), 0
        for given, expected in zip(problem.inputs, problem.outputs, strict=True):
            grade = self.grade_test(problem, cut.text, given, expected, run)
            if not grade.passed:
                break
            passed += 1
        share = {"tests_passed_until_failure": passed / len(problem.inputs)}
        return Grade(**{**vars(grade), "figures": share})

    def grade_test(self, problem: ContestProblem, code: str, given: Any, expected: Any, run: Run) -> Grade:
        """One test of one program."""
        program = with_preamble(code)
        if problem.function is not None:
            data = json.dumps([list(given) if isinstance(given, list) else [given], expected])
            facts = {"data": data, "name": problem.function, "in_class": "class Solution" in code}
            return Grade.of_result(run(Job(program, CALL.format(**facts), judge=self.settings.judge, limits=self.limits())))
        stdin = given if isinstance(given, str) else "\n".join(map(str, given))
        wanted = expected if isinstance(expected, str) else "\n".join(map(str, expected))
        result = run(Job(program, stdin=stdin, limits=self.limits()))
        same = same_output if self.settings.harness == "strict" else lenient_output
        whole = result.stdout_bytes <= self.limits().output_bytes
        if result.verdict is not Verdict.FINISHED:
            return Grade.of_result(result)
        if whole and same(result.stdout, wanted):
            return Grade(**{**vars(Grade.of_result(result)), "passed": True, "reason": Reason.PASSED})
        return Grade(**{**vars(Grade.of_result(result)), "passed": False, "reason": Reason.WRONG})

    def more_scores(self, grades: Mapping[str, Sequence[Grade]]) -> dict[str, scores.Score | None]:
        """pass@k of each level, and the mean share of tests until the first failure."""
        levels = {problem.id: problem.level for problem in self.problems}
        made: dict[str, scores.Score | None] = {}
        for level in APPS_LEVELS:
            found = [given for one, given in grades.items() if levels[one] == level]
            counts = [(len(given), sum(bool(grade.passed) for grade in given)) for given in found]
            for k in self.settings.k if counts else ():
                name = f"{level}/pass@{k}"
                made[name] = scores.pass_at_k_score(counts, k, self.decoding, self.settings.seed)
        return made


def ask(reads_input: bool, question: str, starter: str) -> str:
    """The instruction with the question (paper, Figure 14)."""
    text = f"{question.rstrip()}\n\n{starter}".rstrip()
    return INSTRUCTION.format(guide=GUIDES[reads_input], question=text)


def with_preamble(code: str) -> str:
    """A solution behind the usual imports; imports from the future stay first, as Python wants them."""
    lines = code.splitlines(keepends=True)
    future = [line for line in lines if line.startswith("from __future__")]
    rest = [line for line in lines if not line.startswith("from __future__")]
    return "".join([*future, PREAMBLE, *rest])


def same_output(output: str, expected: str) -> bool:
    """Line by line, else word by word with numbers within 1e-6; white space at ends does not count.

    Example: "1.0000001 a", "1 a" -> True; "a b", "b a" -> False
    """
    left, right = output.strip().splitlines(), expected.strip().splitlines()
    if [line.rstrip() for line in left] == [line.rstrip() for line in right]:
        return True
    words, wanted = output.split(), expected.split()
    return len(words) == len(wanted) and all(map(same_word, words, wanted))


def same_word(word: str, wanted: str) -> bool:
    """Equal, or numbers of which one is written as a fraction, and near each other."""
    if word == wanted:
        return True
    if not any(mark in word + wanted for mark in ".eE"):
        return False  # whole numbers are equal or not
    try:
        one, other = float(word), float(wanted)
    except ValueError:
        return False
    return math.isfinite(one) and math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)


def lenient_output(output: str, expected: str) -> bool:
    """As the authors' script has it: also the same set of words on each line, or the same numbers within 1e-5."""
    if same_output(output, expected):
        return True
    left, right = (text.strip().splitlines() for text in (output, expected))
    if {frozenset(line.split()) for line in left if line.strip()} == {
        frozenset(line.split()) for line in right if line.strip()
    }:
        return True
    try:
        numbers, wanted = ([float(word) for word in text.split()] for text in (output, expected))
    except ValueError:
        return False
    pairs = zip(numbers, wanted, strict=False)
    return len(numbers) == len(wanted) and all(math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-8) for one, other in pairs)
