"""What manifests, ledgers and results look like, as far as the report reads them.

What comes in: a value out of a JSON or YAML file that may have been damaged, cut off, written by another version or by hand.
What goes out: the same value without the parts that are of another kind than expected, and a sentence for each of those.
Whoever draws may then take a number for a number.

A shape is `NUMBER` (finite, no truth value), `TEXT`, `ANYTHING`, a list with the shape of its items, a mapping of keys to
shapes (`*`: all others; keys that it does not name stay as they are), or several of these. What is null counts as not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

NUMBER, TEXT, ANYTHING = "a finite number", "a text", "anything"
_NOTHING = object()

LEDGER = {"tokens": {"*": {"*": NUMBER}}, "seconds": NUMBER, "skipped_steps": NUMBER}
RECIPE = {"parent": TEXT, "data": {"fim": {"rate": NUMBER}}, "training": {"train_tokens": NUMBER}}
MODEL = {
    "stage": TEXT,
    "recipe": RECIPE,
    "parent": {"path": TEXT},
    "rope": {"base": NUMBER, "context_tokens": NUMBER},
    "hardware": {"devices": NUMBER, "device": TEXT},
    "ledger": LEDGER,
    "tokens": NUMBER,
    "steps": NUMBER,
    "held_out": {"*": NUMBER},
    "long_context": {"*": NUMBER},
}
ROWS = {
    "recipe": RECIPE,
    "rows": NUMBER,
    "sequence_tokens": NUMBER,
    "source_names": [TEXT],
    "layout_names": [TEXT],
    "sources": {"*": {"share": NUMBER, "epochs": NUMBER, "epochs_estimated": NUMBER}},
    "drops": {"*": {"*": NUMBER}},
}
SCORE = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "problems": NUMBER}
RESULTS = {
    "model": {"hash": TEXT},
    "tasks": {
        "*": {
            "state": TEXT,
            "form": TEXT,
            "settings": {"temperature": NUMBER, "benchmark": TEXT, "form": TEXT},
            "data": {"published": NUMBER, "asked": NUMBER},
            "scores": {"*": (NUMBER, SCORE)},
        }
    },
}
ENDED = {"state": TEXT}
CURATED = {"sources": {"*": {"documents": NUMBER, "documents_read": NUMBER}}}
TRIPLETS = {"funnel": {"kept": NUMBER, "asked": NUMBER}}


def number(value: Any) -> float | int | None:
    """The value where it is a finite number, else None.

    Example: 3 -> 3; nan, "3", true and an integer of 400 digits -> None
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def fitting(value: Any, shape: Any, where: str, say: Callable[[str], None]) -> Any:
    """The value as far as it has the shape; None where nothing is left.

    Example: {"tokens": 5, "steps": "x"} as {"tokens": NUMBER, "steps": NUMBER} -> {"tokens": 5}, and one sentence
    """
    found = _fitting(value, shape, where, say)
    return None if found is _NOTHING else found


def _fitting(value: Any, shape: Any, where: str, say: Callable[[str], None]) -> Any:
    if value is None:
        return _NOTHING
    for one in shape if isinstance(shape, tuple) else (shape,):
        if one == ANYTHING or (one == NUMBER and number(value) is not None) or (one == TEXT and isinstance(value, str)):
            return value
        if isinstance(one, Mapping) and isinstance(value, Mapping):
            kept = {}
            for key, item in value.items():
                wanted = one.get(key, one.get("*", ANYTHING))
                part = _fitting(item, wanted, f"{where}.{key}" if where else str(key), say)
                if part is not _NOTHING:
                    kept[key] = part
            return kept
        if isinstance(one, list) and isinstance(value, list):
            items = [_fitting(item, one[0], f"{where}.{place}", say) for place, item in enumerate(value)]
            return [item for item in items if item is not _NOTHING]
    say(f"{where or 'all of it'} is {_shown(value)} instead of {_named(shape)}")
    return _NOTHING


def _named(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(_named(one) for one in shape)
    return "a mapping" if isinstance(shape, Mapping) else "a list" if isinstance(shape, list) else str(shape)


def _shown(value: Any) -> str:
    """The value in a few letters.

    Example: [1, 2, 3] -> a list; "abc" -> 'abc'
    """
    if isinstance(value, Mapping | list):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a very long number"
    return text if len(text) <= 40 else f"{text[:40]}..."
