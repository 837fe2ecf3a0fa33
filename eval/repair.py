r"""Program repair: a broken function and the test that it fails in, the function mended out. The debugging use of a model.

What comes in: HumanEval's reference solutions, each broken in one place by `eval.breakages`, or a file `repair.jsonl` of
your own in the data folder (lines with `task_id`, `broken`, `reference`, `test`, `entry_point`; tests as HumanEval writes
them). What goes out: a task for `eval.run`, judged by all of the function's tests; the model is shown one that fails.

That a broken function fails is not assumed: its tests are run when the problems are loaded. A change that no test sees is
refused and the next one tried; a function without any change that is seen is left out, and both are counted. In a file, a
broken function that passes is an error. Which change is taken follows from the seed and the problem's id alone.

The trade: one small change in a right function is easier than what people get wrong. Forms: `tests` shows no docstring, so
that the fault must be found from code and test; `docstring` shows it; `chat` asks for the whole function in a fenced block.
"""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from codetune.problems import DataMissing, FunctionProblem, Loaded, RepairProblem
from codetune.sandbox import ExecutionResult, Job, Limits, Sandbox, Verdict
from eval import scores
from eval.breakages import KINDS, Breakage, breakages
from eval.functions import HUMAN_EVAL_STOPS, before_function, last_block
from eval.tasks import MIB, Asker, Cut, Grade, Question, Reason, Run, Task, TaskSettings

TRIES = 12  # changes of one function that are run at most
SEEN = ("assertion", "exception")  # how a test must fail; a fault that never ends shows no test
PLACE = re.compile(r"at line (\d+) of the tests")
REQUEST = "# This function is wrong: the test below it fails.\n{broken}\n\n{test}\n\n# The same function, mended.\n{header}"
CHAT_REQUEST = (
    "The following Python function is wrong: the test below it fails. Answer with the whole function, mended, in one block "
    "of code.\n\n```python\n{broken}\n```\n\n```python\n{test}\n```\n"
)


@dataclass(frozen=True)
class Repairs(Loaded):
    """Problems with what became of the changes that were tried."""

    tried: int = 0  # changes that were run
    unseen: int = 0  # refused: their tests pass
    undecided: int = 0  # refused: they do not end, or end in another way than by a failed test
    left_out: tuple[str, ...] = field(default=())  # problems without any change that a test sees


# ---------------------------------------------------------------------------------------------------------------------
# Problems


def repair_problems(settings: TaskSettings, load: Callable[[str], Loaded], sandbox: Callable[[], Sandbox]) -> Repairs:
    """The problems of `repair.jsonl` where the data has it, else HumanEval's functions, broken; all of them were run.

    Raises:
        ValueError: a broken function of the file passes its tests, or nothing can be seen to fail.
    """
    limits = Limits(wall_seconds=settings.timeout_seconds, memory_bytes=settings.memory_mib * MIB)
    try:
        return own_problems(load("repair"), limits, sandbox)
    except DataMissing:
        return made_problems(load("humaneval"), settings, limits, sandbox)


def own_problems(loaded: Loaded, limits: Limits, sandbox: Callable[[], Sandbox]) -> Repairs:
    """Problems of a file; each of them must fail as it is."""
    given = [problem for problem in loaded.problems if isinstance(problem, RepairProblem)]
    results = sandbox().run_many(job_of(one, one.broken, limits) for one in given)
    found = []
    for one, result in zip(given, results, strict=True):
        if result.reason not in SEEN:
            state = "passes" if result.passed else f"ends without a failed test ({result.reason}) under"
            raise ValueError(f"{loaded.source}: the broken function of {one.id} {state} its tests; mend or remove the line")
        found.append(with_failing(one, result))
    return Repairs(loaded.benchmark, tuple(found), loaded.source, loaded.published, tried=len(found))


def made_problems(loaded: Loaded, settings: TaskSettings, limits: Limits, sandbox: Callable[[], Sandbox]) -> Repairs:
    """One broken function for each of HumanEval's that can be broken so that a test sees it."""
    asked = set(settings.ids)
    wanted = [one for one in loaded.problems if isinstance(one, FunctionProblem) and (not asked or one.id in asked)]
    waiting = {one.id: ordered_breakages(one, settings.seed) for one in wanted[: settings.limit]}
    by_id, found = {one.id: one for one in wanted}, dict[str, RepairProblem]()
    counts = Counter[str]()
    for _ in range(TRIES):
        # The next change of every function that has none yet; of many functions at once, so that every core is busy.
        tried = {one: repair_of(by_id[one], next(left, None)) for one, left in waiting.items() if one not in found}
        now = [problem for problem in tried.values() if problem is not None]
        for problem, result in zip(now, sandbox().run_many(job_of(one, one.broken, limits) for one in now), strict=True):
            counts["passed" if result.passed else "seen" if result.reason in SEEN else "other"] += 1
            if result.reason in SEEN:
                found[problem.id] = with_failing(problem, result)
    left_out = tuple(one for one in waiting if one not in found)
    source = f"made of {loaded.source}, seed {settings.seed}"
    if not found:
        raise ValueError(f"{source}: no change in {', '.join(waiting)[:60]} makes a test fail; name other problems")
    problems = tuple(found[one] for one in waiting if one in found)
    return Repairs(
        "repair", problems, source, None, sum(counts.values()), counts["passed"], counts["other"], left_out=left_out
    )


def ordered_breakages(problem: FunctionProblem, seed: int) -> Iterator[Breakage]:
    """Changes of one solution, a kind at a time so that none crowds out the others, in an order of the seed and the id."""
    generator = random.Random(f"{seed} {problem.id}")
    found = breakages(problem.prompt + problem.reference, problem.prompt.count("\n") + 1)
    generator.shuffle(found)
    kinds = list(KINDS)
    generator.shuffle(kinds)
    left = {kind: [one for one in found if one.kind == kind] for kind in kinds}
    while any(left.values()):
        for kind in kinds:
            if left[kind]:
                yield left[kind].pop()


def repair_of(problem: FunctionProblem, breakage: Breakage | None) -> RepairProblem | None:
    if breakage is None:
        return None
    reference = problem.prompt + problem.reference
    place = f"line {breakage.line}: {breakage.change}"
    texts = (breakage.source, problem.tests, reference, problem.entry_point or "")
    return RepairProblem("repair", problem.id, *texts, kind=breakage.kind, change=place)


def job_of(problem: RepairProblem, program: str, limits: Limits, judge: Any = "separate") -> Job:
    """A program with the problem's tests; helpers that tests call are the right ones, whatever was written."""
    helpers = before_function(problem.reference, problem.entry_point)
    tests = f"{problem.tests}\ncheck({problem.entry_point})"
    return Job(program, tests, problem.entry_point, prompt=helpers, judge=judge, limits=limits)


def with_failing(problem: RepairProblem, result: ExecutionResult) -> RepairProblem:
    """The problem with the test that was seen to fail."""
    assert result.verdict is Verdict.FAIL
    places = PLACE.findall(result.detail)
    shown = failing_test(problem.tests, int(places[-1]) if places else 0, problem.entry_point)
    return RepairProblem(**{**vars(problem), "failing": shown})


def failing_test(tests: str, line: int, entry_point: str) -> str:
    r"""The statement of `check` on a line, with the function's own name; the whole of `check` where it needs what is before.

    Example: "def check(candidate):\n    assert candidate(1) == 2\n", 2, "f" -> "assert f(1) == 2"
    """
    checks = [node for node in ast.parse(tests).body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if not checks:
        return tests.strip()
    body = checks[0].body
    made_here = {node.id for node in ast.walk(checks[0]) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    lines = tests.split("\n")
    chosen = [one for one in body if one.lineno <= line <= (one.end_lineno or line)]
    if len(chosen) != 1 or made_here & {node.id for node in ast.walk(chosen[0]) if isinstance(node, ast.Name)}:
        chosen = body
    text = textwrap.dedent("\n".join(lines[chosen[0].lineno - 1 : chosen[-1].end_lineno]))
    return re.sub(r"\bcandidate\b", entry_point, text).strip()


# ---------------------------------------------------------------------------------------------------------------------
# The task


class Repair(Task):
    """A function that fails a test, to be mended."""

    forms = ("tests", "docstring", "chat")
    stops = HUMAN_EVAL_STOPS
    floor_name = "with nothing changed"

    def question(self, problem: RepairProblem, asker: Asker) -> Question:
        if self.form == "chat":
            broken = without_docstring(problem.broken, problem.entry_point).strip()
            message = CHAT_REQUEST.format(broken=broken, test=problem.failing)
            return Question(problem.id, message, problem, asker.chat(message), stop_strings=())
        bare = self.form == "tests"
        broken = (without_docstring(problem.broken, problem.entry_point) if bare else problem.broken).strip()
        header = header_of(problem.broken, problem.entry_point, docstring=not bare)
        return Question(problem.id, REQUEST.format(broken=broken, test=problem.failing, header=header), problem)

    def cut(self, question: Question, text: str, ended: str) -> Cut:
        problem = question.problem
        assert isinstance(problem, RepairProblem)
        if not text.strip():
            return Cut(text, problem=Reason.EMPTY)
        before = before_function(problem.reference, problem.entry_point)
        notes: tuple[str, ...] = ()
        if self.form == "chat":
            block = last_block(text, problem.entry_point)
            notes = () if block is not None else ("no-fenced-block",)
            program = f"{before}\n{text if block is None else block}"
        else:
            program = before + header_of(problem.broken, problem.entry_point, docstring=False) + text
        if same_code(program, problem.broken, problem.entry_point):
            notes = (*notes, "unchanged")
        return Cut(program, whole_program=True, notes=notes)

    def grade(self, question: Question, cut: Cut, run: Run) -> Grade:
        problem = question.problem
        assert isinstance(problem, RepairProblem)
        return Grade.of_result(run(job_of(problem, cut.text, self.limits(), self.settings.judge)))

    def reference(self, problem: RepairProblem) -> Cut:
        return Cut(problem.reference, whole_program=True)

    def floor(self, problem: RepairProblem) -> Cut:
        return Cut(problem.broken, whole_program=True)

    def more_scores(self, grades: Mapping[str, Sequence[Grade]]) -> dict[str, scores.Score | None]:
        """pass@k of each kind of fault."""
        kinds = {problem.id: problem.kind for problem in self.problems}
        made: dict[str, scores.Score | None] = {}
        for kind in sorted(set(kinds.values())):
            counts = [(len(got), sum(bool(one.passed) for one in got)) for key, got in grades.items() if kinds[key] == kind]
            for k in self.settings.k:
                made[f"{kind}/pass@{k}"] = scores.pass_at_k_score(counts, k, self.decoding, self.settings.seed)
        return made

    def notes(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"faults": dict(sorted(Counter(one.kind for one in self.problems).items()))}
        if isinstance(self.loaded, Repairs):
            facts["changes that were run"] = self.loaded.tried
            facts["of them refused: no test sees them"] = self.loaded.unseen
            facts["of them refused: they end in no failed test"] = self.loaded.undecided
            facts["functions left out: no change is seen"] = list(self.loaded.left_out)
        return facts


def find_function(tree: ast.Module, entry_point: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    found = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == entry_point
    ]
    if not found:
        raise ValueError(f"no function `{entry_point}` at the top of a broken source: {ast.unparse(tree)[:60]!r}")
    return found[-1]


def docstring_lines(source: str, entry_point: str) -> tuple[int, int]:
    """First and last line of a function's docstring, from 1; (n, n - 1) where it has none, n being its body's first line."""
    body = find_function(ast.parse(source), entry_point).body
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first.lineno, first.end_lineno or first.lineno
    return first.lineno, first.lineno - 1


def without_docstring(source: str, entry_point: str) -> str:
    r"""Example: 'def f():\n    "Doc."\n    return 1\n' -> 'def f():\n    return 1\n'"""
    first, last = docstring_lines(source, entry_point)
    lines = source.split("\n")
    return "\n".join([*lines[: first - 1], *lines[last:]])


def header_of(source: str, entry_point: str, *, docstring: bool) -> str:
    """The function's first lines, up to its body, with or without the docstring; ends with a line end."""
    first, last = docstring_lines(source, entry_point)
    start = find_function(ast.parse(source), entry_point).lineno
    lines = source.split("\n")[start - 1 : last if docstring else first - 1]
    return "".join(f"{line}\n" for line in lines)


def same_code(program: str, broken: str, entry_point: str) -> bool:
    """Whether a program's function is the broken one, comments, layout and docstring aside."""
    try:
        texts = [without_docstring(source, entry_point) for source in (program, broken)]
        one, other = (ast.dump(find_function(ast.parse(text), entry_point)) for text in texts)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return one == other
