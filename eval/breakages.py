r"""Functions broken on purpose, one small change each, for the benchmark of program repair.

What comes in: the source of a right function. What goes out: sources that differ from it in one place, as programmers err:
an operator, a comparison, a constant, a name, a condition turned round, a statement that is missing. The change is made in
the text, so that comments and layout stay. Nothing is drawn: whoever wants one of them chooses.

The trade: one change in one place, which a reader of the failing test can find; real faults may span several. What this does
not do: say whether a change matters. Some change nothing that a test sees; `eval.repair` runs the tests and refuses those.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

# Operators by the way they are written, and what each is mistaken for.
OPERATORS = {"+": "-", "-": "+", "*": "+", "/": "//", "//": "/", "%": "//", "**": "*", "and": "or", "or": "and"}
COMPARISONS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "in": "not in",
    "not in": "in",
    "is": "is not",
    "is not": "is",
}
KINDS = ("comparison", "operator", "constant", "name", "condition", "missing")
BETWEEN = re.compile(r"[()\s\\]")  # what may stand beside an operator between its operands; a line may go on


@dataclass(frozen=True)
class Breakage:
    """A broken source, and what was done to it."""

    kind: str  # one of KINDS
    line: int  # of the change, counted from 1
    change: str  # for people: `<` -> `<=`
    source: str


class Text:
    """A source with the places of its nodes as offsets in the text (ast counts columns in bytes)."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines = [f"{line}\n" for line in source.split("\n")]  # as ast counts them: a form feed ends no line
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def offset(self, line: int, column_bytes: int) -> int:
        text = self.lines[line - 1].encode("utf-8")[:column_bytes].decode("utf-8")
        return self.starts[line - 1] + len(text)

    def span(self, node: ast.AST) -> tuple[int, int]:
        found = [getattr(node, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")]
        return self.offset(found[0], found[1]), self.offset(found[2], found[3])

    def operator(self, left: ast.AST, right: ast.AST) -> tuple[int, int]:
        """Where the operator between two operands is written; brackets and white space around it left out."""
        start, end = self.span(left)[1], self.span(right)[0]
        while start < end and BETWEEN.match(self.source[start]):
            start += 1
        while end > start and BETWEEN.match(self.source[end - 1]):
            end -= 1
        return start, end


def breakages(source: str, first_line: int = 1) -> list[Breakage]:
    r"""Every source that differs in one place from that line on, in the order of their places; all of them parse.

    Example: "def f(x):\n    return x + 1\n" -> `x - 1`, `x + 2`

    Raises:
        SyntaxError: the source does not parse.
    """
    tree, text = ast.parse(source), Text(source)
    original = ast.dump(tree)
    found = []
    for kind, (start, end), new in changes(tree, text):
        line = source.count("\n", 0, start) + 1
        if line < first_line:
            continue
        broken = source[:start] + new + source[end:]
        try:
            changed = ast.dump(ast.parse(broken))
        except SyntaxError:
            continue  # an operator across lines and comments: not a change that this text allows
        if changed != original:
            old = " ".join(source[start:end].split())
            found.append(Breakage(kind, line, f"`{old}` -> `{new.strip()}`" if new.strip() else f"without `{old}`", broken))
    return sorted(found, key=lambda one: (one.line, KINDS.index(one.kind), one.source))


def changes(tree: ast.Module, text: Text) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Each change as its kind, the place in the text, and what is written there instead."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            yield from replaced("operator", text, text.operator(node.left, node.right), OPERATORS)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from replaced("operator", text, text.operator(left, right), OPERATORS)
        elif isinstance(node, ast.AugAssign):
            start, end = text.operator(node.target, node.value)  # `+=`
            yield from replaced("operator", text, (start, end - 1), OPERATORS)
        elif isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, right in zip(operands, operands[1:], strict=False):
                yield from replaced("comparison", text, text.operator(left, right), COMPARISONS)
        elif isinstance(node, ast.Constant) and id(node) not in docstrings:
            if isinstance(node.value, bool):
                yield "constant", text.span(node), str(not node.value)
            elif isinstance(node.value, int):
                yield "constant", text.span(node), str(node.value + 1)
        elif isinstance(node, ast.If | ast.While):
            start, end = text.span(node.test)
            yield "condition", (start, end), f"not ({text.source[start:end]})"
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        yield from other_names(function, text)
    yield from missing_statements(tree, text)


def replaced(
    kind: str, text: Text, place: tuple[int, int], table: dict[str, str]
) -> Iterator[tuple[str, tuple[int, int], str]]:
    """The operator at a place, mistaken for its neighbour; none where something else is written there (a comment, say)."""
    written = " ".join(text.source[slice(*place)].split())
    if written in table:
        yield kind, place, table[written]


def other_names(function: ast.FunctionDef | ast.AsyncFunctionDef, text: Text) -> Iterator[tuple[str, tuple[int, int], str]]:
    """A variable read where the next one, in the order of their first appearance, was meant."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    inside = sorted(
        (node for node in ast.walk(function) if isinstance(node, ast.Name)), key=lambda node: (node.lineno, node.col_offset)
    )
    names += [node.id for node in inside if isinstance(node.ctx, ast.Store)]
    names = list(dict.fromkeys(names))
    for node in inside:
        if isinstance(node.ctx, ast.Load) and node.id in names and len(names) > 1:
            yield "name", text.span(node), names[(names.index(node.id) + 1) % len(names)]


def missing_statements(tree: ast.Module, text: Text) -> Iterator[tuple[str, tuple[int, int], str]]:
    """A simple statement or a whole `if` left out, where others remain in its block; no definition, import or return."""
    wanted = (ast.Assign, ast.AugAssign, ast.Expr, ast.If, ast.Continue, ast.Break)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module):
            continue
        for name in ("body", "orelse"):
            block = getattr(node, name, None)
            if not isinstance(block, list) or len(block) < 2:
                continue
            for statement in block:
                documents = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                if isinstance(statement, wanted) and not documents:
                    start = text.starts[statement.lineno - 1]
                    end = text.starts[statement.end_lineno or statement.lineno]
                    alone = not text.source[start : text.span(statement)[0]].strip()
                    if alone:  # not behind another one on the same line, and no `elif`
                        yield "missing", (start, end), ""
