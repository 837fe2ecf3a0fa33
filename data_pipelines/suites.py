"""Tests that a model wrote: taken out of its answer, and refused where passing them would mean nothing.

In: an answer with asserts between [TESTS] and [/TESTS], and the question. Out: a `Suite`, or a `Refused` with a reason that
is counted. What is checked, in this order:

    by reading    there is a block, it was not cut off, it parses; nothing but asserts and imports of harmless modules; no
                  name that is not defined, no builtin that reaches out (open, exec, ...), no attribute with two
                  underscores; every assert calls one and the same function, the one that the question names if it names
                  one; equal asserts count once, and enough different ones are left; no call is expected to give two values
    by running    no stub passes all of the asserts: a function that returns nothing, each constant that stands in the
                  asserts, common constants, each argument unchanged, all arguments, the first one's length or truth

What this does not see: tests that are wrong in the same way as the solution, and tests that are right but few.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OPEN_TAG, CLOSE_TAG = "[TESTS]", "[/TESTS]"
MODULES = frozenset(
    (
        "math",
        "cmath",
        "itertools",
        "collections",
        "string",
        "re",
        "datetime",
        "decimal",
        "fractions",
        "functools",
        "operator",
    )
    + ("statistics", "random", "copy", "json", "heapq", "bisect", "typing", "textwrap", "calendar")
)
REACH_OUT = frozenset(
    ("open", "exec", "eval", "compile", "input", "print", "breakpoint", "exit", "quit", "help", "globals", "locals", "vars")
    + ("getattr", "setattr", "delattr", "memoryview", "super", "object", "type", "classmethod", "staticmethod", "property")
    + ("license", "copyright", "credits", "dir", "id")
)
BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_")) - REACH_OUT
COMMON_CONSTANTS = ("True", "False", "0", "1", "-1", "''", "[]", "{}", "()", "set()", "0.0")
MAX_CONSTANTS = 24  # of the asserts, tried as constant functions
MAX_CHARACTERS = 20_000


@dataclass(frozen=True)
class Refused:
    """Why an answer is not gone on with."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Suite:
    """Asserts about one function."""

    entry_point: str
    imports: tuple[str, ...]
    asserts: tuple[str, ...]  # each one line, as `ast` writes it
    duplicates: int = 0  # equal asserts that were taken out

    @property
    def text(self) -> str:
        return "\n".join([*self.imports, *self.asserts]) + "\n"


def find_block(text: str, open_tag: str, close_tag: str, *, stopped: bool) -> str | Refused:
    """What stands between two tags.

    `stopped` says that the answer ended by itself or at a stop string, which stands for a closing tag that the engine took
    off; an answer that ran into its limit and has no closing tag is cut off.

    Example: "Sure! [TESTS] a [/TESTS] bye" -> " a "
    """
    if not text.strip():
        return Refused("nothing")
    start = text.find(open_tag)
    if start < 0:
        return Refused("no-tag", f"no {open_tag}")
    block = text[start + len(open_tag) :]
    end = block.find(close_tag)
    if end < 0 and not stopped:
        return Refused("cut-off", f"no {close_tag}")
    block = block if end < 0 else block[:end]
    return block if block.strip() else Refused("nothing", f"nothing behind {open_tag}")


def without_fence(block: str) -> str:
    r"""A block without the fence that some models put around code inside of the tags.

    Example: "```python\nx = 1\n```" -> "x = 1"
    """
    found = re.fullmatch(r"\s*```[A-Za-z0-9]*\n(.*?)(?:\n?```)?\s*", block, re.DOTALL)
    return found[1] if found else block


def parse_suite(text: str, question: str, *, stopped: bool, minimum_asserts: int) -> Suite | Refused:
    """The asserts of an answer, vetted by reading; `vacuous_stub` is still to be asked."""
    block = find_block(text, OPEN_TAG, CLOSE_TAG, stopped=stopped)
    if isinstance(block, Refused):
        return block
    tree = parsed(without_fence(block))
    if isinstance(tree, Refused):
        return tree
    imports, asserts = [], []
    for statement in tree.body:
        if isinstance(statement, ast.Assert):
            asserts.append(statement)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            imports.append(statement)
        else:
            return Refused("not-an-assert", ast.unparse(statement)[:200])
    for problem in (_wrong_import(imports), _wrong_names(asserts, imports)):
        if problem is not None:
            return problem
    entry_point = _entry_point(asserts, imports, question)
    if isinstance(entry_point, Refused):
        return entry_point
    lines = [ast.unparse(statement) for statement in asserts]
    different = tuple(dict.fromkeys(lines))
    if len(different) < minimum_asserts:
        return Refused("too-few", f"{len(different)} different asserts of {len(lines)}")
    contradiction = _contradiction(asserts)
    if contradiction is not None:
        return contradiction
    return Suite(entry_point, tuple(map(ast.unparse, imports)), different, len(lines) - len(different))


def parsed(source: str) -> ast.Module | Refused:
    """The syntax tree; what the parser cannot take, however deep or strange, is refused."""
    if len(source) > MAX_CHARACTERS:
        return Refused("too-long", f"{len(source):,} characters")
    try:
        tree = ast.parse(source)
        ast.unparse(tree).encode()  # a lone surrogate in a literal cannot be written down
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Refused("syntax", str(error)[:200])
    return tree


def _wrong_import(imports: list[ast.Import | ast.ImportFrom]) -> Refused | None:
    for statement in imports:
        names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else [statement.module or "."]
        wrong = [name for name in names if name.partition(".")[0] not in MODULES]
        if wrong or any(alias.name == "*" for alias in statement.names):
            return Refused("import", ast.unparse(statement))
    return None


def _imported(imports: list[ast.Import | ast.ImportFrom]) -> set[str]:
    return {(alias.asname or alias.name).partition(".")[0] for statement in imports for alias in statement.names}


def _wrong_names(asserts: list[ast.Assert], imports: list[ast.Import | ast.ImportFrom]) -> Refused | None:
    """A name that nobody defines, one that reaches out of the tests, or an attribute that reaches into Python."""
    known = BUILTINS | _imported(imports)
    for statement in asserts:
        bound = {
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        }
        bound |= {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
        called = {id(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call)}
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
                return Refused("forbidden-name", node.attr)
            if isinstance(node, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
                return Refused("not-an-assert", ast.unparse(statement)[:200])
            if not isinstance(node, ast.Name) or node.id in bound or node.id in known:
                continue
            if node.id in REACH_OUT or node.id.startswith("_"):
                return Refused("forbidden-name", node.id)
            if id(node) not in called:
                return Refused("undefined-name", node.id)
    return None


def _entry_point(asserts: list[ast.Assert], imports: list[ast.Import | ast.ImportFrom], question: str) -> str | Refused:
    """The one function that is neither builtin nor imported nor bound in the assert, called in each of them."""
    named = named_functions(question)
    known = (BUILTINS - named) | _imported(imports)  # some questions ask for a `sum` of their own
    names: list[str] = []
    for statement in asserts:
        own = {
            node.func.id
            for node in ast.walk(statement)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in known
        }
        if not own:
            return Refused("no-call", ast.unparse(statement)[:200])
        names += sorted(own)
    different = sorted(set(names))
    if not different:
        return Refused("no-assert")
    if len(different) > 1:
        return Refused("several-functions", ", ".join(different)[:200])
    if named and different[0] not in named:
        return Refused("other-function", f"{different[0]} instead of {', '.join(sorted(named))}"[:200])
    return different[0]


def named_functions(question: str) -> set[str]:
    """Functions that a question names, with arguments or between quotes; empty where it leaves the name open.

    Example: "Write a function add(a, b) that ..." -> {"add"}
    """
    called = re.findall(r"\b([A-Za-z_]\w*)\(", question)
    behind = re.findall(r"\bfunction (?:called |named )?[`'\"]?([A-Za-z_]\w*)[`'\"(]", question)
    return {*behind, *(name for name in called if not hasattr(builtins, name))}


@dataclass
class Expected:
    """What the asserts say of one call."""

    equal: list[Any]
    unequal: list[Any]
    truths: set[bool]

    @property
    def is_possible(self) -> bool:
        """Whether a value could satisfy all of it."""
        truths = self.truths | {bool(value) for value in self.equal}
        same = all(value == self.equal[0] for value in self.equal)
        return same and len(truths) < 2 and not any(value in self.unequal for value in self.equal)


def _contradiction(asserts: list[ast.Assert]) -> Refused | None:
    """An assert that expects another value of a call than one before it, or that compares a call with itself."""
    calls: dict[str, Expected] = {}
    for statement in asserts:
        test, truth = statement.test, True
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, truth = test.operand, False
        if isinstance(test, ast.Call):
            expected = calls.setdefault(ast.dump(test), Expected([], [], set()))
            expected.truths.add(truth)
        elif isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is | ast.NotEq):
            left, right = test.left, test.comparators[0]
            call, value = (left, right) if isinstance(left, ast.Call) else (right, left)
            if ast.dump(call) == ast.dump(value):
                return Refused("vacuous", f"compares with itself: {ast.unparse(statement)[:200]}")
            try:
                literal = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue  # not written out: running it will tell
            expected = calls.setdefault(ast.dump(call), Expected([], [], set()))
            is_equal = truth != isinstance(test.ops[0], ast.NotEq)
            (expected.equal if is_equal else expected.unequal).append(literal)
        else:
            continue
        if not expected.is_possible:
            return Refused("contradictory", ast.unparse(statement)[:200])
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Stubs: functions that know nothing of the question


@dataclass(frozen=True)
class Stub:
    """A function that solves nothing."""

    name: str
    program: str


def stubs(suite: Suite) -> Iterator[Stub]:
    """Functions that no worthwhile tests let pass: empty, constant, identity and their like."""
    yield Stub("empty", _stub(suite, "pass"))
    for number, constant in enumerate(_constants(suite)):
        yield Stub(f"constant {constant[:60]}", _stub(suite, f"return {constant}"))
        if number + 1 == MAX_CONSTANTS:
            break
    for constant in COMMON_CONSTANTS:
        yield Stub(f"constant {constant}", _stub(suite, f"return {constant}"))
    for place in range(_most_arguments(suite)):
        yield Stub(f"argument {place + 1}", _stub(suite, f"return [*arguments, *named.values()][{place}]"))
    yield Stub("all arguments", _stub(suite, "return arguments"))
    yield Stub("length of the first argument", _stub(suite, "return len(arguments[0])"))
    yield Stub("truth of the first argument", _stub(suite, "return bool(arguments[0])"))


def _stub(suite: Suite, body: str) -> str:
    return "\n".join([*suite.imports, f"def {suite.entry_point}(*arguments, **named):", f"    {body}", ""])


def _calls(suite: Suite) -> Iterator[tuple[ast.Assert, list[ast.Call]]]:
    for line in suite.asserts:
        statement = ast.parse(line).body[0]
        assert isinstance(statement, ast.Assert)
        found = [node for node in ast.walk(statement) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        yield statement, [node for node in found if isinstance(node.func, ast.Name) and node.func.id == suite.entry_point]


def _constants(suite: Suite) -> list[str]:
    """Expressions outside of the calls that need neither the function nor a variable: what it might return."""
    found: dict[str, None] = {}
    for statement, calls in _calls(suite):
        inside = {id(node) for call in calls for node in ast.walk(call)}
        for node in ast.walk(statement.test):
            if id(node) in inside or not isinstance(node, ast.expr):
                continue
            names = [part for part in ast.walk(node) if isinstance(part, ast.Name | ast.Call) or id(part) in inside]
            if not names and not isinstance(node, ast.Compare | ast.BoolOp):
                found.setdefault(ast.unparse(node))
    return list(found)


def _most_arguments(suite: Suite) -> int:
    return max((len(call.args) + len(call.keywords) for _, calls in _calls(suite) for call in calls), default=0)
