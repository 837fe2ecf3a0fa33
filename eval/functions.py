"""Python functions judged by their tests: HumanEval, HumanEval+, MBPP (three-shot and zero-shot), MBPP+.

What comes in: problems as published. What goes out: tasks for `eval.run`. The paper's settings are the defaults:
HumanEval's prompt is not stripped, completions end at the seven stop strings that its authors named; MBPP's three examples
are its tasks 2, 3 and 4, as in Austin et al., and its test split is 11 to 510.

What differs by necessity: a chat model's answer to HumanEval is its last whole fenced block that defines the function, since
the paper does not say how it asked. The examples' code has CRLF line ends in MBPP's file, and is shown with LF.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from codetune.problems import FunctionProblem, Loaded, TaskProblem
from codetune.sandbox import Job, Verdict
from eval.tasks import Asker, Cut, Grade, Question, Reason, Run, Task, TaskRefused, TaskSettings

HUMAN_EVAL_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")
MBPP_SHOTS = (2, 3, 4)
MBPP_TEST = range(11, 511)
FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CHAT_REQUEST = (
    "Complete the following Python function. Answer with the whole function, in one block of code.\n\n"
    "```python\n{prompt}```\n"
)


class HumanEval(Task):
    """The beginning of a function, written on by the model."""

    forms = ("unstripped", "stripped", "chat")
    stops = HUMAN_EVAL_STOPS

    def question(self, problem: FunctionProblem, asker: Asker) -> Question:
        if self.form == "chat":
            message = CHAT_REQUEST.format(prompt=problem.prompt)
            return Question(problem.id, message, problem, asker.chat(message), stop_strings=())
        text = problem.prompt.strip() if self.form == "stripped" else problem.prompt
        return Question(problem.id, text, problem)

    def cut(self, question: Question, text: str, ended: str) -> Cut:
        problem = question.problem
        assert isinstance(problem, FunctionProblem)
        if self.form != "chat":
            return Cut(text, problem=None if text.strip() else Reason.EMPTY)
        block = last_block(text, problem.entry_point or "")
        notes = () if block is not None else ("no-fenced-block",)
        code = f"{before_function(problem.prompt, problem.entry_point or '')}\n{text if block is None else block}"
        return Cut(code, whole_program=True, notes=notes)

    def grade(self, question: Question, cut: Cut, run: Run) -> Grade:
        problem = question.problem
        assert isinstance(problem, FunctionProblem)
        program = cut.text if cut.whole_program else question.text + cut.text
        tests = f"{problem.tests}\ncheck({problem.entry_point})"
        job = Job(
            program, tests, problem.entry_point, prompt=problem.prompt, judge=self.settings.judge, limits=self.limits()
        )
        return Grade.of_result(run(job))

    def reference(self, problem: FunctionProblem) -> Cut:
        return Cut(problem.prompt + problem.reference, whole_program=True)


def last_block(text: str, entry_point: str) -> str | None:
    r"""The last whole fenced block that defines the function; None where there is none.

    Example: "```\ndef f(): pass\n```\ntext", "f" -> "def f(): pass\n"
    """
    pattern = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    blocks = [block for block in FENCE.findall(text) if pattern.search(block)]
    return blocks[-1] if blocks else None


def before_function(prompt: str, entry_point: str) -> str:
    """Imports and helpers of a prompt: what stands before the function that is asked for."""
    found = re.search(rf"^def\s+{re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return prompt[: found.start()] if found else prompt


class Mbpp(Task):
    """A sentence and three asserts, answered with a function."""

    forms = ("three-shot", "zero-shot")

    def __init__(self, name: str, settings: TaskSettings, loaded: Loaded) -> None:
        super().__init__(name, settings, loaded)
        by_number = {problem.number: problem for problem in loaded.problems if isinstance(problem, TaskProblem)}
        missing = [number for number in MBPP_SHOTS if number not in by_number]
        if self.form == "three-shot" and missing:
            raise TaskRefused(f"the three examples are tasks 2, 3 and 4, and the data lacks {missing}")
        shots = [by_number[number] for number in MBPP_SHOTS] if self.form == "three-shot" else []
        self.shots = "".join(
            f"{request(shot)}[BEGIN]\n{shot.reference.replace(chr(13), '').strip()}\n[DONE]\n\n" for shot in shots
        )
        self.stops = ("[DONE]",) if self.form == "three-shot" else ("[/PYTHON]",)

    def asked_by_design(self, problems: list[TaskProblem]) -> list[TaskProblem]:
        """The test split."""
        return [problem for problem in problems if problem.number in MBPP_TEST]

    def question(self, problem: TaskProblem, asker: Asker) -> Question:
        if self.form == "three-shot":
            return Question(problem.id, f"{self.shots}{request(problem)}[BEGIN]\n", problem)
        message = zero_shot_request(problem)
        return Question(problem.id, message, problem, self.chat_or_text(asker, message))

    def cut(self, question: Question, text: str, ended: str) -> Cut:
        if self.form == "three-shot":
            return Cut(
                text,
                True,
                None if text.strip() else Reason.EMPTY,
                () if ended in ("stop_string", "given") else ("no-end-tag",),
            )
        return cut_tagged(text, ended)

    def grade(self, question: Question, cut: Cut, run: Run) -> Grade:
        problem = question.problem
        assert isinstance(problem, TaskProblem)
        # The setup comes behind the program, as upstream runs it: two of them make objects of the program's own class.
        tests = "\n".join([*([problem.setup] if problem.setup else []), problem.tests or "\n".join(problem.asserts)])
        function = tested_function(problem)
        if self.settings.judge == "separate":
            result = run(Job(cut.text, tests, function, limits=self.limits()))
            if result.verdict is not Verdict.UNSUPPORTED:
                return Grade.of_result(result)
        # Tests that hand over objects of their own classes cannot be apart from the program; results say so.
        return Grade.of_result(run(Job(cut.text, tests, function, judge="same-process", limits=self.limits())))

    def reference(self, problem: TaskProblem) -> Cut:
        return Cut(problem.reference, whole_program=True)


def request(problem: TaskProblem) -> str:
    """The question as Austin et al. put it."""
    tests = "\n".join(problem.asserts)
    return (
        f"You are an expert Python programmer, and here is your task: {problem.text} Your code should pass these tests:"
        f"\n\n{tests}\n"
    )


def zero_shot_request(problem: TaskProblem) -> str:
    """The question with tags (paper, Figure 13)."""
    return f"{request(problem)}Your code should start with a [PYTHON] tag and end with a [/PYTHON] tag."


def cut_tagged(text: str, ended: str) -> Cut:
    """The code between the first `[PYTHON]` and the next `[/PYTHON]`.

    Without the end tag the rest is taken, and counted; without the first one the answer has not the form that was asked for.
    """
    _, begin, rest = text.partition("[PYTHON]")
    if not begin:
        return Cut(text, True, Reason.FORMAT, ("no-start-tag",))
    code, end, _ = rest.partition("[/PYTHON]")
    return Cut(code, True, None if code.strip() else Reason.EMPTY, () if end or ended == "stop_string" else ("no-end-tag",))


def tested_function(problem: TaskProblem) -> str | None:
    """The function that the asserts call and the reference defines; one of them has a builtin's name."""
    wanted = set(defined_functions(problem.reference))
    calls = [node.func for one in problem.asserts for node in ast.walk(ast.parse(one)) if isinstance(node, ast.Call)]
    return next((name.id for name in calls if isinstance(name, ast.Name) and name.id in wanted), None)


def defined_functions(source: str) -> list[str]:
    """Names of the functions that a source defines at its top; none where it does not parse."""
    try:
        tree: Any = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
