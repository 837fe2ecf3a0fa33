"""Small Python functions written by a program: code that a model of a million parameters can learn to fill in.

What comes in: names of template families, a lane, a pass. What goes out: documents of about 80 tokens. A family is the
heart of a function (a running total, a guard, a tally, ...) with drawn names; around it stand a few plain steps that all
families share (an assignment, a check, a print), so that no two documents need have the same form. The names bind a
document together: nearly every name stands in it twice or more, and where one use is cut out, another one (often only the
one *behind* the cut) tells what belongs there. Real code holds about 3 nats a token for so small a model, which hides that
skill; here nearly all that is left to learn is it.

Families in `HELD_OUT_FAMILIES` are never given to training. They share names, the plain steps and single constructs with the
training families, not their hearts: a score on them is about infilling, not about remembering a template.

The trade: these functions do nothing useful and teach nothing about real code; a recipe says what share of its tokens they
are, and loss on real code is reported apart. Nothing here is run, except by the parser in the tests.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
DOCUMENTS_PER_PASS = 20_000  # about 1.5 million tokens

NAMES: Sequence[str] = (
    "value index count total item name line text key size part word time state number point group level code "
    "path data file order form field table rate width weight score color"
).split()
VERBS: Sequence[str] = "get make find read set add show update".split()


class _Draw:
    """One document's draws: names never repeat in it unless the template repeats them."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self._names: list[str] = self.random.sample(NAMES, len(NAMES))

    def names(self, count: int) -> list[str]:
        """The next unused names."""
        taken, self._names = self._names[:count], self._names[count:]
        return taken

    def verb(self) -> str:
        return self.random.choice(VERBS)

    def number(self, low: int = 2, high: int = 9) -> int:
        return self.random.randint(low, high)

    def one_of(self, *options: str) -> str:
        return self.random.choice(options)

    def pick(self, *options: T) -> T:
        return self.random.choice(options)

    def head(self, out: str, *inputs: str) -> list[str]:
        """The first two lines of a function, the same for every family.

        Example: `def find_width(rate, size):` and `Find the width of rate and size.`
        """
        verb = self.verb()
        return [
            f"def {verb}_{out}({', '.join(inputs)}):",
            f'    """{verb.title()} the {out} of {" and ".join(inputs)}."""',
        ]


@dataclass(frozen=True)
class _Heart:
    """What makes a family: names that are given, lines, and the name that they work out."""

    out: str
    inputs: tuple[str, ...]
    lines: list[str]


def _function(draw: _Draw, heart: _Heart) -> list[str]:
    """A whole function: plain steps on the inputs, the heart, plain steps on what it worked out."""
    before = [line for name in heart.inputs for line in _step_before(draw, name)]
    after: list[str] = []
    out = heart.out
    for _ in range(draw.number(0, 2)):
        out, lines = _step_after(draw, out, draw.one_of(*heart.inputs))
        after += lines
    return [*draw.head(out, *heart.inputs), *before, *heart.lines, *after, f"    return {out}"]


def _step_before(draw: _Draw, name: str) -> list[str]:
    """Often nothing, sometimes a line about one input."""
    return draw.pick([], [], [], [f"    print({name})"], [f"    assert {name}"])


def _step_after(draw: _Draw, out: str, given: str) -> tuple[str, list[str]]:
    """A step that takes the result further, and the name of the result after it."""
    (new,) = draw.names(1)
    return draw.pick(
        (new, [f"    {new} = {out} + {given}"]),
        (new, [f"    {new} = {given} * {out}"]),
        (new, [f"    {new} = max({given}, {out})"]),
        (new, [f"    {new} = [{given}, {out}]"]),
        (out, [f"    print({given}, {out})"]),
        (out, [f"    if {out} == {given}:", "        return None"]),
    )


def _chain(draw: _Draw) -> _Heart:
    a, b, *steps = draw.names(2 + draw.number(2, 4))
    pairs = zip([a, *steps], steps, strict=False)
    return _Heart(steps[-1], (a, b), [f"    {target} = {source} {draw.one_of('+', '*')} {b}" for source, target in pairs])


def _running_total(draw: _Draw) -> _Heart:
    items, item, total, factor = draw.names(4)
    lines = [
        f"    {total} = 0",
        f"    for {item} in {items}:",
        f"        {total} += {item} * {factor}",
    ]
    return _Heart(total, (items, factor), lines)


def _guard(draw: _Draw) -> _Heart:
    a, b, c = draw.names(3)
    lines = [
        f"    if {a} < {b}:",
        "        return None",
        f"    {c} = {a} - {b}",
        f"    if {c} > {b}:",
        f"        {c} = {b}",
    ]
    return _Heart(c, (a, b), lines)


def _conversion(draw: _Draw) -> _Heart:
    a, b, c, d = draw.names(4)
    lines = [
        f"    {a} = {draw.number()}",
        f"    {d} = {b} * {a}",
        f"    {c} = {d} / {a}",
    ]
    return _Heart(c, (b,), lines)


def _build_text(draw: _Draw) -> _Heart:
    items, item, out, mark = draw.names(4)
    lines = [
        f"    {out} = []",
        f"    for {item} in {items}:",
        f"        {out}.append({mark} + str({item}))",
    ]
    return _Heart(out, (items, mark), lines)


def _tally(draw: _Draw) -> _Heart:
    items, item, counts = draw.names(3)
    lines = [
        f"    {counts} = {{}}",
        f"    for {item} in {items}:",
        f"        {counts}[{item}] = {counts}.get({item}, 0) + 1",
    ]
    return _Heart(counts, (items,), lines)


def _bounds(draw: _Draw) -> _Heart:
    a, low, high = draw.names(3)
    lines = [
        f"    if {a} < {low}:",
        f"        {a} = {low}",
        f"    elif {a} > {high}:",
        f"        {a} = {high}",
    ]
    return _Heart(a, (a, low, high), lines)


def _small_class(draw: _Draw) -> list[str]:
    owner, a, b, c = draw.names(4)
    return [
        f"class {owner.title()}:",
        f"    def __init__(self, {a}, {b}):",
        f"        self.{a} = {a}",
        f"        self.{b} = {b}",
        "",
        f"    def {draw.verb()}_{c}(self):",
        f"        {c} = self.{a} + self.{b}",
        f"        return {c}",
    ]


def _countdown(draw: _Draw) -> _Heart:
    a, b, c = draw.names(3)
    lines = [
        f"    {b} = 0",
        f"    while {a} > 0:",
        f"        {a} -= {c}",
        f"        {b} += 1",
    ]
    return _Heart(b, (a, c), lines)


def _selection(draw: _Draw) -> _Heart:
    items, item, kept, limit = draw.names(4)
    lines = [
        f"    {kept} = []",
        f"    for {item} in {items}:",
        f"        if {item} < {limit}:",
        f"            {kept}.append({item})",
    ]
    return _Heart(kept, (items, limit), lines)


def _parse(draw: _Draw) -> _Heart:
    a, b, c = draw.names(3)
    lines = [
        "    try:",
        f"        {b} = int({a})",
        "    except ValueError:",
        f"        {b} = {c}",
    ]
    return _Heart(b, (a, c), lines)


def _record(draw: _Draw) -> _Heart:
    a, b, c, d, e = draw.names(5)
    lines = [
        f"    {c} = {a} * {draw.number()}",
        f"    {d} = {b} + {c}",
        f'    {e} = {{"{a}": {a}, "{c}": {c}, "{d}": {d}}}',
    ]
    return _Heart(e, (a, b), lines)


def _closure(draw: _Draw) -> list[str]:
    a, b, c = draw.names(3)
    inner = draw.verb()
    return [
        *draw.head(c, a),
        f"    def {inner}_{b}({b}):",
        f"        {c} = {b} * {a}",
        f"        return {c}",
        "",
        f"    return {inner}_{b}",
    ]


def _best(draw: _Draw) -> _Heart:
    items, item, best, start = draw.names(4)
    lines = [
        f"    {best} = {start}",
        f"    for {item} in {items}:",
        f"        if {item} > {best}:",
        f"            {best} = {item}",
    ]
    return _Heart(best, (items, start), lines)


def _branches(draw: _Draw) -> _Heart:
    a, b, c = draw.names(3)
    lines = [
        f"    if {a} == 0:",
        f"        {c} = {b}",
        f"    elif {a} == 1:",
        f"        {c} = {b} + {a}",
        "    else:",
        f"        {c} = {b} * {a}",
    ]
    return _Heart(c, (a, b), lines)


def _pairs(draw: _Draw) -> _Heart:
    a, b, left, right, out = draw.names(5)
    lines = [
        f"    {out} = []",
        f"    for {left}, {right} in zip({a}, {b}):",
        f"        {out}.append({left} + {right})",
    ]
    return _Heart(out, (a, b), lines)


def _recurrence(draw: _Draw) -> _Heart:
    a, b, c, d = draw.names(4)
    lines = [
        f"    {a} = 0",
        f"    {b} = 1",
        f"    for {d} in range({c}):",
        f"        {a}, {b} = {b}, {a} + {b}",
    ]
    return _Heart(a, (c,), lines)


def _skipping(draw: _Draw) -> _Heart:
    items, item, total, skipped = draw.names(4)
    lines = [
        f"    {total} = 0",
        f"    for {item} in {items}:",
        f"        if {item} == {skipped}:",
        "            continue",
        f"        {total} += {item}",
    ]
    return _Heart(total, (items, skipped), lines)


def _unpack(draw: _Draw) -> _Heart:
    text, left, right, out = draw.names(4)
    lines = [
        f"    {left}, {right} = {text}.split()",
        f"    {out} = int({left}) - int({right})",
    ]
    return _Heart(out, (text,), lines)


def _checks(draw: _Draw) -> _Heart:
    a, b, c = draw.names(3)
    lines = [
        f"    assert {a} > 0",
        f"    assert {b} > 0",
        f"    {c} = {a} / {b}",
        f"    print({a}, {b}, {c})",
    ]
    return _Heart(c, (a, b), lines)


def _average(draw: _Draw) -> _Heart:
    """Held out: two sums in one loop, then their quotient."""
    items, item, total, seen, share = draw.names(5)
    lines = [
        f"    {total} = 0",
        f"    {seen} = 0",
        f"    for {item} in {items}:",
        f"        {total} += {item}",
        f"        {seen} += 1",
        f"    {share} = {total} / {seen}",
    ]
    return _Heart(share, (items,), lines)


def _options(draw: _Draw) -> _Heart:
    """Held out: settings looked up by name, then put together."""
    given, a, b, c = draw.names(4)
    lines = [
        f'    {a} = {given}.get("{a}", 0)',
        f'    {b} = {given}.get("{b}", 1)',
        f"    {c} = {a} + {b}",
        f"    print({a}, {b}, {c})",
    ]
    return _Heart(c, (given,), lines)


def _series(draw: _Draw) -> _Heart:
    """Held out: steps of its own making up to a limit."""
    start, stop, step, value = draw.names(4)
    lines = [
        f"    {step} = {draw.number()}",
        f"    {value} = {start}",
        f"    while {value} < {stop}:",
        f"        {value} += {step}",
    ]
    return _Heart(value, (start, stop), lines)


def _exchange(draw: _Draw) -> _Heart:
    """Held out: two names put in order, their difference taken."""
    a, b, c = draw.names(3)
    lines = [
        f"    if {a} < {b}:",
        f"        {a}, {b} = {b}, {a}",
        f"    {c} = {a} - {b}",
        f"    assert {c} > 0",
    ]
    return _Heart(c, (a, b), lines)


Template = Callable[[_Draw], "_Heart | list[str]"]
_TRAINING: dict[str, Template] = {
    "chain": _chain,
    "running_total": _running_total,
    "guard": _guard,
    "conversion": _conversion,
    "build_text": _build_text,
    "tally": _tally,
    "bounds": _bounds,
    "small_class": _small_class,
    "countdown": _countdown,
    "selection": _selection,
    "parse": _parse,
    "record": _record,
    "closure": _closure,
    "best": _best,
    "branches": _branches,
    "pairs": _pairs,
    "recurrence": _recurrence,
    "skipping": _skipping,
    "unpack": _unpack,
    "checks": _checks,
}
_HELD_OUT: dict[str, Template] = {
    "average": _average,
    "options": _options,
    "series": _series,
    "exchange": _exchange,
}
FAMILIES = tuple(_TRAINING)
HELD_OUT_FAMILIES = tuple(_HELD_OUT)


def generated_documents(families: tuple[str, ...], lane: int, lanes: int, pass_index: int) -> Iterator[tuple[str, str, str]]:
    """Text, id and family of one lane's documents in one pass.

    Document `i` of a pass belongs to lane `i % lanes`; its family and its draws depend on the families, the pass and `i`
    alone, so any number of lanes deals out the same documents. Each pass draws new ones.

    Raises:
        ValueError: a family that does not exist, or that is held out.
    """
    chosen = families or FAMILIES
    for name in chosen:
        if name not in _TRAINING:
            held_out = "; it is held out, to measure on" if name in _HELD_OUT else ""
            raise ValueError(f"no training family {name!r} of generated code{held_out}; write some of {', '.join(FAMILIES)}")
    for number in range(lane, DOCUMENTS_PER_PASS, lanes):
        family = chosen[random.Random(f"family {pass_index} {number}").randrange(len(chosen))]
        yield _document(_TRAINING[family], family, f"{pass_index}/{number}")


def generated_held_out_documents(count: int) -> Iterator[tuple[str, str, str]]:
    """Text, id and family of documents of the held-out families, which training never sees, the families in turn."""
    for number in range(count):
        family = HELD_OUT_FAMILIES[number % len(HELD_OUT_FAMILIES)]
        yield _document(_HELD_OUT[family], family, f"held-out/{number}")


def _document(template: Template, family: str, place: str) -> tuple[str, str, str]:
    identity = f"generated/{family}/{place}"
    draw = _Draw(identity)
    made = template(draw)
    lines = _function(draw, made) if isinstance(made, _Heart) else made
    return "\n".join(lines) + "\n", identity, family
