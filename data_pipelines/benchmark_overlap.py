"""Documents that hold much of a benchmark's text are found, and named with the problem that they hold.

What comes in: every text of every benchmark that `codetune.problems` can read here (prompts, solutions, tests, and prompt
and solution put together). What goes out: an `Index`, saved once and read by every worker, and for a document the `Hit`s
above the threshold: at least `overlap` of the different n-grams of one such text stand in it. n-grams are of words and
numbers in lower case, so that spaces, quotes, brackets and line ends make no difference.

The trade: a share of one text instead of a single common n-gram. One n-gram in common is what licence headers, imports
and rows of numbers have with benchmarks that are files from GitHub; half of a short problem is not. A text with fewer
words than an n-gram has none: it cannot be told from ordinary code, and is counted as such (`too_short`). What this does
not find: problems said in other words, or with most of their names changed (docs/curate.md says how many).

`decontaminate.py` is the stricter rule of self-instruct, where what is dropped is asked for again: one common run is enough.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codetune.artifacts import read_json, write_json
from codetune.problems import BenchmarkText, benchmark_texts
from codetune.recipe import DecontaminationSettings
from data_pipelines.shingles import shingles, words

INDEX, FACTS = "benchmarks.npz", "benchmarks.json"


@dataclass(frozen=True)
class Hit:
    """A text of a problem, and how much of it stands in a document."""

    benchmark: str
    problem: str
    kind: str  # prompt, solution, tests, prompt and solution
    share: float


@dataclass(frozen=True)
class Index:
    """n-grams of all texts: sorted hashes, and for each the texts that it stands in."""

    hashes: np.ndarray  # sorted
    texts: np.ndarray  # number of a text, beside each hash; a hash stands once for each of its texts
    sizes: np.ndarray  # different n-grams of each text
    names: list[tuple[str, str, str]]  # benchmark, problem, kind of each text
    ngram_words: int
    facts: dict[str, Any]

    def hits(self, text: str, overlap: float) -> list[Hit]:
        """Texts of which at least `overlap` stands in this one, the most complete first."""
        if not len(self.hashes):
            return []
        grams = shingles(words(text), self.ngram_words)
        first = np.searchsorted(self.hashes, grams, "left")
        last = np.searchsorted(self.hashes, grams, "right")
        some = first < last
        if not some.any():
            return []
        found = np.concatenate([self.texts[a:b] for a, b in zip(first[some], last[some], strict=True)])
        numbers, counts = np.unique(found, return_counts=True)
        shares = counts / self.sizes[numbers]
        chosen = [(float(share), int(number)) for share, number in zip(shares, numbers, strict=True) if share >= overlap]
        return [
            Hit(*self.names[number], round(share, 4))
            for share, number in sorted(chosen, key=lambda item: (-item[0], item[1]))
        ]

    def save(self, folder: Path) -> None:
        with (folder / INDEX).open("wb") as file:
            np.savez(file, hashes=self.hashes, texts=self.texts, sizes=self.sizes)
        write_json(folder / FACTS, {"names": self.names, "ngram_words": self.ngram_words, "facts": self.facts})


def load_index(folder: Path) -> Index:
    arrays, rest = np.load(folder / INDEX), read_json(folder / FACTS)
    names = [(name[0], name[1], name[2]) for name in rest["names"]]
    return Index(arrays["hashes"], arrays["texts"], arrays["sizes"], names, rest["ngram_words"], rest["facts"])


def build_index(settings: DecontaminationSettings) -> Index:
    """The index of the benchmarks that a recipe names, or of all that can be read here.

    Raises:
        ValueError: a benchmark that the recipe names is not here; a damaged file.
    """
    found = benchmark_texts(settings.data, names=settings.benchmarks or None, hub=settings.hub)
    if settings.benchmarks and found.missing:
        name, why = next(iter(found.missing.items()))
        raise ValueError(f"`curate.decontamination.benchmarks` names {name}, which is not here: {why}")
    index = index_of(found.texts, settings.ngram_words)
    return dataclasses.replace(index, facts=index.facts | {"read": found.read, "missing": found.missing})


def index_of(texts: Iterable[BenchmarkText], ngram_words: int) -> Index:
    """The index of these texts; the same text twice in one benchmark stands once."""
    names: list[tuple[str, str, str]] = []
    grams: list[np.ndarray] = []
    known: set[tuple[str, str]] = set()
    counted: dict[str, Counter[str]] = {}
    for benchmark, problem, kind, text in _with_whole_problems(texts):
        counts = counted.setdefault(benchmark, Counter())
        if (benchmark, text) in known:
            continue
        known.add((benchmark, text))
        own = shingles(words(text), ngram_words)
        counts["texts" if len(own) else "too_short"] += 1
        if len(own):
            names.append((benchmark, problem, kind))
            grams.append(own)
    sizes = np.array([len(own) for own in grams], np.int64)
    hashes = np.concatenate(grams) if grams else np.empty(0, np.uint64)
    numbers = np.repeat(np.arange(len(grams), dtype=np.int32), sizes)
    order = np.argsort(hashes, kind="stable")
    facts = {"benchmarks": {name: dict(counts) for name, counts in counted.items()}, "ngrams": len(hashes)}
    return Index(hashes[order], numbers[order], sizes, names, ngram_words, facts)


def _with_whole_problems(texts: Iterable[BenchmarkText]) -> Iterator[tuple[str, str, str, str]]:
    """Each text, and behind a problem's texts its prompt and first solution as one: as a copied program has them."""
    current: list[BenchmarkText] = []
    for text in texts:
        if current and (current[0].benchmark, current[0].problem) != (text.benchmark, text.problem):
            yield from _whole(current)
            current = []
        current.append(text)
        yield text.benchmark, text.problem, text.kind, text.text
    yield from _whole(current)


def _whole(texts: list[BenchmarkText]) -> Iterator[tuple[str, str, str, str]]:
    prompts = [text.text for text in texts if text.kind == "prompt"]
    solutions = [text.text for text in texts if text.kind == "solution"]
    if prompts and solutions and prompts[0] not in solutions[0]:
        yield texts[0].benchmark, texts[0].problem, "prompt and solution", f"{prompts[0]}\n{solutions[0]}"
