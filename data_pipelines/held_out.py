"""Which documents training must not see, and how near copies of them are recognised.

What comes in: source plans and the settings of the held-out set. What goes out: `HeldOut`, which holds the documents to
measure on and answers two questions about a training document: is its group held out, and is it a near copy of one that
is measured on. It can be pickled, and saved as JSON for other processes.

A group (repository, package, article) is held out by a hash with a salt of its own: neither the recipe's seed nor the
stage matters, so what was held out in one stage was never trained on in another.

A text equal to one that is measured on, whatever the space in it, is found by its hash. A near copy is found by its lines.
Lines of 20 characters and more, without the space around them, that stand in the documents measured on are remembered; those
that stand in two groups, or three documents, are boilerplate (licence headers, imports) and say nothing. A training document
is a near copy when at least half of its other long lines are remembered ones, and these are at least three, or at least 200
characters. Both cost about 12 ms of one core per million characters, where tokenizing takes 250 (`bench/bytes_read.py`
prints the rate of reading with and without it). What it does not see: copies with every line changed (renamed, reformatted),
and copies of held-out documents that are not measured on and live in a group that is trained on.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from codetune.artifacts import read_json, write_json
from codetune.recipe import HeldOutSettings
from data_pipelines.documents import Document, Drops, SourcePlan, documents_of_groups

SALT = b"codetune held-out groups, version 1\0"
LINE_CHARACTERS = 20  # shorter lines occur by chance
COPIED_LINES = 3
OPENING_WORDS = 6
COPIED_CHARACTERS = 200
SPREAD_GROUPS = 8  # documents to measure on come from at least this many groups, where there are as many


@lru_cache(maxsize=100_000)
def is_held_out_group(group: str, fraction: float) -> bool:
    """Whether a group is held out: a fixed hash of its name, as a number from 0 to 1, below the fraction."""
    digest = hashlib.blake2b(SALT + group.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


@dataclass(frozen=True)
class HeldOut:
    """Documents to measure on, per source, and the lines by which their near copies are known."""

    fraction: float
    documents: dict[str, tuple[Document, ...]]
    lines: frozenset[str]
    boilerplate: frozenset[str]
    openings: frozenset[str]  # the first words of the documents, so that few others are hashed
    texts: frozenset[bytes]  # hashes of the whole documents
    searched: dict[str, int] = field(default_factory=dict)  # documents looked at per source
    long: dict[str, tuple[Document, ...]] = field(default_factory=dict)  # those that a growing context is measured on

    def excludes(self, group: str) -> bool:
        return is_held_out_group(group, self.fraction)

    def is_near_copy(self, text: str) -> bool:
        """Whether the text is one that is measured on, or half of its distinct telling long lines are (see above).

        Example: with the lines "alpha" * 5, "beta" * 6 and "gamma" * 5 held out, a text of these three and one more is.
        """
        # the interpreter's own loops: this runs on every training document
        if _first_words(text) in self.openings and _hash_of_words(text) in self.texts:
            return True
        lines = set(map(str.strip, text.split("\n")))
        copied = lines & self.lines
        if len(copied) < COPIED_LINES and sum(map(len, copied)) < COPIED_CHARACTERS:
            return False
        long = sum(map(LINE_CHARACTERS.__le__, map(len, lines))) - len(lines & self.boilerplate)
        return 2 * len(copied) >= long

    def save(self, path: Path) -> None:
        documents, long = (
            {source: [asdict(document) for document in found] for source, found in kind.items()}
            for kind in (self.documents, self.long)
        )
        facts = {"fraction": self.fraction, "searched": self.searched}
        write_json(path, {**facts, "documents": documents, "long": long})

    @staticmethod
    def load(path: Path) -> HeldOut:
        """What `save` wrote; the lines are worked out again from the documents.

        Raises:
            ValueError: no such file, or damaged.
        """
        tree = read_json(path)
        documents, long = (
            {name: tuple(Document(**item) for item in found) for name, found in tree[kind].items()}
            for kind in ("documents", "long")
        )
        return held_out_of(documents, tree["fraction"], tree["searched"], long)


def long_lines(text: str) -> set[str]:
    return {line for line in map(str.strip, text.split("\n")) if len(line) >= LINE_CHARACTERS}


def _first_words(text: str) -> str:
    return " ".join(text.split(None, OPENING_WORDS)[:OPENING_WORDS])


def _hash_of_words(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def held_out_of(
    documents: dict[str, tuple[Document, ...]],
    fraction: float,
    searched: dict[str, int],
    long: dict[str, tuple[Document, ...]] | None = None,
) -> HeldOut:
    """The held-out set of these documents and long ones, its lines divided into telling ones and boilerplate.

    A document that stands whole in several groups counts once: its lines tell of it, they are no boilerplate.
    """
    every = [*documents.values(), *(long or {}).values()]
    distinct = {_hash_of_words(document.text): document for found in every for document in reversed(found)}
    owners: dict[str, list[str]] = defaultdict(list)  # of each line, the group of each document it stands in
    for document in distinct.values():
        for line in long_lines(document.text):
            owners[line].append(document.group)
    telling = frozenset(line for line, groups in owners.items() if len(groups) < 3 and len(set(groups)) == 1)
    openings = frozenset(_first_words(document.text) for document in distinct.values())
    texts = frozenset(distinct)
    return HeldOut(fraction, documents, telling, frozenset(owners) - telling, openings, texts, searched, long or {})


def collect_held_out(
    plans: Sequence[SourcePlan], settings: HeldOutSettings, long: dict[str, tuple[Document, ...]] | None = None
) -> HeldOut:
    """Find the documents to measure on: for each source the first ones of held-out groups, from several groups.

    `long` holds the long ones (`long_documents.py`), which are watched over for near copies like the others.

    The search ends once there are enough from enough groups, or `search_documents` were looked at. A source none of
    whose groups is held out gets an empty tuple, and a line on stderr says so.
    """
    documents, searched = {}, {}
    for plan in plans:
        documents[plan.name], searched[plan.name] = _search(plan, settings)
        if not documents[plan.name] and settings.documents_per_source:
            print(
                f"held out: nothing of data.sources.{plan.name}: none of the {searched[plan.name]} documents looked at is "
                f"in a held-out group, nothing is measured on it; raise data.held_out.fraction ({settings.fraction:g}) or "
                f"data.held_out.search_documents ({settings.search_documents})",
                file=sys.stderr,
            )
    return held_out_of(documents, settings.fraction, searched, long)


def _search(plan: SourcePlan, settings: HeldOutSettings) -> tuple[tuple[Document, ...], int]:
    count = settings.documents_per_source
    if count == 0:
        return (), 0
    if plan.settings.kind == "generated":
        from data_pipelines.generated import generated_held_out_documents

        made = generated_held_out_documents(count)
        return tuple(Document(text, place, plan.name, family, "Python", 0) for text, place, family in made), count
    found: dict[str, list[Document]] = {}
    looked_at = total = 0
    for document in documents_of_groups(plan, lambda group: is_held_out_group(group, settings.fraction), Drops()):
        looked_at += 1
        if document is not None:
            found.setdefault(document.group, []).append(document)
            total += 1
        spread = len(found) >= min(SPREAD_GROUPS, count)
        if looked_at >= settings.search_documents or (total >= count and spread) or total >= SPREAD_GROUPS * count:
            break
    return tuple(in_turns(found.values(), count)), looked_at


def in_turns(groups: Iterable[list[Document]], count: int) -> list[Document]:
    """One document of each group, then a second of each, until there are `count`.

    Example: [a1, a2, a3], [b1], 3 -> a1, b1, a2
    """
    groups = list(groups)
    longest = max((len(group) for group in groups), default=0)
    turns = [group[turn] for turn in range(longest) for group in groups if turn < len(group)]
    return turns[:count]
