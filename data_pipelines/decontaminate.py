"""Which texts share words with the benchmarks: n-grams, looked up one text at a time.

In: the texts of `codetune.problems` (prompts, solutions, tests). Out: `Contamination.find(text)`, the benchmark and problem
whose words stand in a text, or None. Words are runs of letters, digits and underscores, in lower case, so that neither
punctuation nor layout hides a copy. A text is contaminated if it shares a run of `ngram_words` words with a problem; a
benchmark's prompt that is shorter than that, down to `SHORT_WORDS`, counts as one run as a whole. Runs that stand in several
problems of one benchmark (`def check(candidate): ...`, "write a python function to find the") are phrases of the benchmark,
not of a problem, and say nothing.

What it does not see: a problem in other words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codetune.problems import BenchmarkTexts

SHORT_WORDS = 6
COMMON_PROBLEMS = 3  # a run in so many problems of a benchmark is its phrase
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Found:
    """A run of words that a text shares with a problem."""

    benchmark: str
    problem: str
    words: str


class Contamination:
    """The runs of words of all benchmarks that could be read."""

    def __init__(self, benchmarks: BenchmarkTexts, ngram_words: int) -> None:
        self.ngram_words = ngram_words
        self.read, self.missing = dict(benchmarks.read), dict(benchmarks.missing)
        owners: dict[bytes, tuple[str, str]] = {}
        problems: dict[tuple[bytes, str], set[str]] = {}
        lengths = set()
        for item in benchmarks.texts:
            words = words_of(item.text)
            size = ngram_words
            if len(words) < ngram_words:
                if item.kind != "prompt" or len(words) < SHORT_WORDS:
                    continue
                size = len(words)
            lengths.add(size)
            for run in runs(words, size):
                key = _key(run)
                problems.setdefault((key, item.benchmark), set()).add(item.problem)
                owners.setdefault(key, (item.benchmark, item.problem))
        common = {key for (key, _), found in problems.items() if len(found) >= COMMON_PROBLEMS}
        self._owners = {key: owner for key, owner in owners.items() if key not in common}
        self._lengths = sorted(lengths)

    def find(self, text: str) -> Found | None:
        """The first run of the text that stands in a problem."""
        words = words_of(text)
        for size in self._lengths:
            for run in runs(words, size):
                owner = self._owners.get(_key(run))
                if owner is not None:
                    return Found(*owner, " ".join(run))
        return None


def words_of(text: str) -> list[str]:
    """Example: "def Add(a, b_1):" -> ["def", "add", "a", "b_1"]"""
    return _WORD.findall(text.lower())


def runs(words: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Every `size` words that follow each other."""
    return (words[start : start + size] for start in range(len(words) - size + 1))


def _key(run: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(run).encode("utf-8", "surrogatepass"), digest_size=12).digest()
