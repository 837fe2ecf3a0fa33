"""Values on their way between the solution's process and the tests' process: plain data, checked, never pickled.

In: a Python value. Out: JSON text, and back. What arrives is built out of a fixed list of types (None, bool, int,
float, str, bytes, list, tuple, set, frozenset, dict, complex, range, Decimal, Fraction, deque, dates, namedtuples,
numpy arrays); a value of a subclass travels as its plain base, so no method of the solution's comes along. Anything
else becomes a handle: a number by which the other side can be asked about the object. Lists, dicts and sets that occur
twice stay one object, so that aliases and cycles survive. The trade: about 0.1 ms a call. What it does not do: keep the
identity of immutable values, or the order of sets.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import itertools
import json
import math
import operator
import sys
from collections.abc import Callable
from typing import Any

Make = Callable[[Any], Any]  # an object that is not plain -> its tagged form, or an Unsupported exception
SCALARS = frozenset((type(None), bool, float, str))
LONG_BITS = 10_000  # integers above this travel in hexadecimal: decimal digits are limited, and slow
MOST_ITEMS = 1_000_000  # taken of an iterator that is handed over
# Functions that both sides have. They travel by name, and the receiver uses its own.
NAMED: dict[str, Any] = {
    **{
        name: getattr(sys.modules["builtins"], name)
        for name in (
            "abs all any ascii bin bool bytes chr complex dict divmod enumerate filter float format frozenset hash hex id "
            "int isinstance issubclass iter len list map max min next object oct ord pow print range repr reversed round "
            "set slice sorted str sum tuple type zip"
        ).split()
    },
    **{
        name: value
        for name, value in vars(sys.modules["builtins"]).items()
        if isinstance(value, type) and issubclass(value, Exception)
    },
    **{f"math.{name}": value for name, value in vars(math).items() if callable(value)},
    **{f"operator.{name}": value for name, value in vars(operator).items() if callable(value) and not name.startswith("_")},
}
_NAMES = {id(value): name for name, value in reversed(NAMED.items())}
_LAZY = tuple(
    {
        type(value)
        for value in (
            iter([]),
            iter(()),
            iter(""),
            iter(range(0)),
            iter(set()),
            iter({}),
            reversed([]),
            (item for item in ()),
        )
    }
    | {map, filter, zip, enumerate, reversed, itertools.chain, itertools.islice}
)
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))


class Unsupported(Exception):
    """A value that cannot be handed to another process."""


class Encoder:
    """Turns values into tagged JSON; `make_handle` says what becomes of objects that are not plain.

    `known` are lists, dicts and sets of the other side, by identity: they travel as the number they have there.
    """

    def __init__(self, make_handle: Make, known: dict[int, int] | None = None) -> None:
        self.make_handle = make_handle
        self.known = known or {}
        self.seen: dict[int, int] = {}
        self.mutable: list[Any] = []

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is int:
            return value if value.bit_length() < LONG_BITS else ["i", hex(value)]
        if kind is list or kind is dict or kind is set:
            return self._container(value, kind)
        if kind is tuple:
            return ["t", *map(self.encode, value)]
        return self._less_common(value, kind)

    def _container(self, value: Any, kind: type) -> Any:
        place = self.known.get(id(value))
        if place is not None:
            return ["@", place]
        place = self.seen.get(id(value))
        if place is not None:
            return ["=", place]
        self.seen[id(value)] = len(self.mutable)
        self.mutable.append(value)
        return self.contents(value, kind)

    def contents(self, value: Any, kind: type) -> Any:
        """A list, dict or set by what is in it."""
        if kind is dict:
            items = itertools.chain.from_iterable(dict.items(value))
            return ["d", *map(self.encode, list(items))]
        items = list.__iter__(value) if kind is list else set.__iter__(value)
        return ["l" if kind is list else "s", *map(self.encode, items)]

    def _less_common(self, value: Any, kind: Any) -> Any:  # noqa: C901  one branch per type
        if issubclass(kind, int | float | str | bytes | bytearray) and not _is_enumeration(kind):
            return self._subclass_of_scalar(value)
        if isinstance(value, tuple):
            fields = getattr(kind, "_fields", None)
            if isinstance(fields, tuple) and len(fields) == tuple.__len__(value):
                return ["n", kind.__name__, list(fields), *map(self.encode, tuple.__iter__(value))]
            return ["t", *map(self.encode, tuple.__iter__(value))]
        if isinstance(value, collections.deque):
            return ["q", value.maxlen, *map(self.encode, collections.deque.__iter__(value))]
        for base in (list, dict, set):
            if isinstance(value, base):
                return self._container(value, base)
        if isinstance(value, frozenset):
            return ["f", *map(self.encode, frozenset.__iter__(value))]
        if isinstance(value, complex):
            return ["c", value.real, value.imag]
        if kind is range:
            return ["r", value.start, value.stop, value.step]
        if kind is slice:
            return ["sl", *map(self.encode, (value.start, value.stop, value.step))]
        if value is Ellipsis:
            return ["e"]
        if value is NotImplemented:
            return ["ni"]
        if isinstance(value, decimal.Decimal):
            return ["D", decimal.Decimal.__str__(value)]
        if isinstance(value, fractions.Fraction):
            return ["F", hex(value.numerator), hex(value.denominator)]
        if kind in _DATES:
            return ["T", kind.__name__, _DATES[kind][0](value)]
        if kind in _VIEWS:
            return self._container(list(value), list)
        name = _NAMES.get(id(value))
        if name is not None:
            return ["g", name]
        numeric = _numpy_form(value, kind)
        if numeric is not None:
            return numeric if type(numeric) is not list else ["a", numeric[0], self.encode(numeric[1])]
        return self.make_handle(value)

    def _subclass_of_scalar(self, value: Any) -> Any:
        if isinstance(value, int):
            return self.encode(int(int.__int__(value)))
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, str):
            return str.__str__(value)
        return ["b" if isinstance(value, bytes) else "B", bytes(value).decode("latin-1")]

    def text(self, value: Any) -> str:
        return json.dumps(self.encode(value), separators=(",", ":"))


def lazy_items(value: Any) -> list[Any] | None:
    """What an iterator of the common kinds holds, or None: another kind, or no end in sight."""
    if not isinstance(value, _LAZY):
        return None
    items = list(itertools.islice(value, MOST_ITEMS + 1))
    return items if len(items) <= MOST_ITEMS else None


def _is_enumeration(kind: type) -> bool:
    module = sys.modules.get("enum")
    return module is not None and issubclass(kind, module.Enum)


def _numpy_form(value: Any, kind: type) -> Any:
    """A numpy scalar as the plain one it holds; an array as [dtype, nested lists]; None for everything else."""
    module = sys.modules.get("numpy")
    if module is None or getattr(kind, "__module__", None) != "numpy":
        return None
    if isinstance(value, module.generic):
        plain = value.item()
        return plain if type(plain) in SCALARS or type(plain) is int else None
    if isinstance(value, module.ndarray) and value.dtype.kind in "biufcUS":
        return [value.dtype.str, value.tolist()]
    return None


_DATES: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    datetime.datetime: (datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    datetime.date: (datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: (datetime.time.isoformat, datetime.time.fromisoformat),
    datetime.timedelta: (
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: datetime.timedelta(*parts),
    ),
}
_DATES_BY_NAME = {kind.__name__: functions[1] for kind, functions in _DATES.items()}


class Malformed(Exception):
    """What arrived is not what an encoder writes."""


class Decoder:
    """Builds values out of tagged JSON. `known` are this side's objects by number, `find_handle` answers for handles."""

    def __init__(self, find_handle: Callable[[list[Any]], Any], known: list[Any] | None = None) -> None:
        self.find_handle = find_handle
        self.known = known or []
        self.mutable: list[Any] = []

    def decode(self, form: Any) -> Any:
        if type(form) is not list:
            if type(form) is dict:
                raise Malformed("an object where a tagged list belongs")
            return form
        if not form or type(form[0]) is not str:
            raise Malformed("a list without a tag")
        tag = form[0]
        if tag == "l":
            return self.fill([], form)
        if tag == "d":
            return self.fill({}, form)
        if tag == "s":
            return self.fill(set(), form)
        if tag == "t":
            return tuple(map(self.decode, form[1:]))
        try:
            return self._less_common(tag, form)
        except (ValueError, TypeError, IndexError, ArithmeticError, KeyError, AttributeError) as error:
            raise Malformed(f"a value tagged {tag!r} that cannot be built") from error

    def fill(self, value: Any, form: list[Any], remember: bool = True) -> Any:
        """Fill an empty list, dict or set; it is known from before its items are, since one may refer to it."""
        if remember:
            self.mutable.append(value)
        items = map(self.decode, form[1:])
        try:
            if isinstance(value, list):
                value.extend(items)
            elif isinstance(value, set):
                value.update(items)
            else:
                pairs = list(items)
                value.update(zip(pairs[::2], pairs[1::2], strict=True))
        except (TypeError, ValueError) as error:
            raise Malformed("a key that cannot be one") from error
        return value

    def _less_common(self, tag: str, form: list[Any]) -> Any:  # noqa: C901  one branch per type
        if tag == "@":
            return self.known[_place(form[1])]
        if tag == "=":
            return self.mutable[_place(form[1])]
        if tag == "i":
            return int(form[1], 16)
        if tag in ("b", "B"):
            data = form[1].encode("latin-1")
            return data if tag == "b" else bytearray(data)
        if tag == "f":
            return frozenset(map(self.decode, form[1:]))
        if tag == "n":
            names = [name for name in form[2] if type(name) is str]
            return collections.namedtuple(form[1], names)(*map(self.decode, form[3:]))
        if tag == "q":
            return collections.deque(map(self.decode, form[2:]), maxlen=form[1])
        if tag == "c":
            return complex(float(form[1]), float(form[2]))
        if tag == "r":
            return range(form[1], form[2], form[3])
        if tag == "sl":
            return slice(*map(self.decode, form[1:4]))
        if tag == "e":
            return ...
        if tag == "ni":
            return NotImplemented
        if tag == "D":
            return decimal.Decimal(form[1])
        if tag == "F":
            return fractions.Fraction(int(form[1], 16), int(form[2], 16))
        if tag == "T":
            return _DATES_BY_NAME[form[1]](form[2])
        if tag == "g":
            return NAMED[form[1]]
        if tag == "it":
            return iter(list(map(self.decode, form[1:])))
        if tag == "a":
            import numpy

            return numpy.array(self.decode(form[2]), dtype=numpy.dtype(form[1]))
        return self.find_handle(form)


def _place(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise Malformed("a reference that is no number")
    return number
