"""Small Python functions written by a program: code that a model of a million parameters can learn to fill in.

What comes in: a lane and a pass. What goes out: documents of about 50 tokens. A function has two values, and two or three
steps that work on them; its name says which:

    def add_cap(total, count):
        value = total
        size = count
        value = value + size
        value = min(value, size)
        return value, size

Real code holds about 3 nats a token for so small a model, which hides the skill of filling in; here nearly all that is left
to learn is it. The two values have names of their own, drawn anew for each function: a model that sees only what stands
before the cut has to guess them where they first appear, and one that looks at what stands behind it need not.

A family is a template: the sequence of steps. About one in eight is held out, by a hash, and never given to training,
whatever the names; a score on those is about filling in and not about remembering a template.

The trade: these functions do nothing useful and teach nothing about real code; a recipe says what share of its tokens they
are, and loss on real code is reported apart. Nothing here is run, except by the parser in the tests.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence

DOCUMENTS_PER_PASS = 20_000  # about 1.1 million tokens
NAMES: Sequence[str] = "value count total item name text size word number point level result".split()
# Step -> what it does with the first value and the second one.
STEPS: dict[str, str] = {
    "add": "{a} + {b}",
    "scale": "{a} * {b}",
    "reduce": "{a} - {b}",
    "divide": "{a} / {b}",
    "cap": "min({a}, {b})",
    "raise": "max({a}, {b})",
    "pair": "[{a}, {b}]",
    "join": "str({a}) + {b}",
    "pick": "{a}[{b}]",
    "test": "{a} > {b}",
    "call": "{b}({a})",
    "fall": "{a} or {b}",
}
LENGTHS = (2, 3)
HELD_OUT_IN = 8  # one family in so many


def families() -> Iterator[tuple[str, ...]]:
    """Every template: sequences of different steps."""
    for length in LENGTHS:
        yield from itertools.permutations(STEPS, length)


def is_held_out_family(steps: Sequence[str]) -> bool:
    """Whether a template is kept out of training: a hash of its steps, and nothing else, decides.

    The first two steps do: were it the whole sequence, a longer trained template could begin like a held-out one.
    """
    digest = hashlib.blake2b(" ".join(steps[:2]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_IN == 0


def generated_documents(lane: int, lanes: int, pass_index: int) -> Iterator[tuple[str, str, str]]:
    """Text, id and family of one lane's documents in one pass.

    Document `i` of a pass belongs to lane `i % lanes`; it depends on the pass and `i` alone, so any number of lanes deals
    out the same documents. Each pass draws new ones.
    """
    for number in range(lane, DOCUMENTS_PER_PASS, lanes):
        yield _document(f"{pass_index}/{number}", held_out=False)


def generated_held_out_documents(count: int) -> Iterator[tuple[str, str, str]]:
    """Text, id and family of documents of held-out families, which training never sees."""
    for number in range(count):
        yield _document(f"held-out/{number}", held_out=True)


def _document(place: str, held_out: bool) -> tuple[str, str, str]:
    draw = random.Random(f"generated {place}")
    steps = _draw_steps(draw)
    while is_held_out_family(steps) != held_out:
        steps = _draw_steps(draw)
    family = "-".join(steps)
    return _function(draw, steps), f"generated/{family}/{place}", family


def _draw_steps(draw: random.Random) -> list[str]:
    """A template; both lengths are equally likely, so that the short ones are not drowned by the many long ones."""
    return draw.sample(list(STEPS), draw.choice(LENGTHS))


def _function(draw: random.Random, steps: Sequence[str]) -> str:
    """The text; no name is used for two things."""
    first, second, a, b = draw.sample(list(NAMES), 4)
    lines = [f"def {'_'.join(steps)}({first}, {second}):", f"    {a} = {first}", f"    {b} = {second}"]
    lines += [f"    {a} = {STEPS[step].format(a=a, b=b)}" for step in steps]
    return "\n".join([*lines, f"    return {a}, {b}"]) + "\n"
