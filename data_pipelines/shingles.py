"""Texts as 64-bit hashes of neighbouring words: what near copies and benchmark overlap are told by.

What comes in: a text. What goes out: numpy arrays. `code_tokens` are words, numbers and single marks, whitespace left
out, so that a reformatted file has the same ones; `words` are those of `decontaminate.py`, in lower case, so that quotes,
brackets and commas make no difference either. A token is hashed once per process (xxhash), n neighbours are put together
with array arithmetic: ten times as fast as joining and hashing strings, and two different shingles are equal with a
probability of 2^-64.
"""

from __future__ import annotations

import re

import numpy as np
import xxhash

from data_pipelines.decontaminate import words_of

_CODE = re.compile(r"\w+|[^\w\s]")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
CACHED_TOKENS = 1 << 16  # some 10 MB


class _Hashes(dict[str, int]):
    """Token -> hash, filled as tokens are met, emptied when it is full: memory stays flat."""

    def __missing__(self, token: str) -> int:
        if len(self) >= CACHED_TOKENS:
            self.clear()
        value = self[token] = xxhash.xxh64_intdigest(token.encode("utf-8", "surrogatepass"))
        return value


_hash_of = _Hashes().__getitem__


def code_tokens(text: str) -> np.ndarray:
    """Hashes of the tokens of a text, in order. Example: `f(x_1)` has 4 tokens"""
    return np.fromiter(map(_hash_of, _CODE.findall(text)), np.uint64)


def words(text: str) -> np.ndarray:
    """Hashes of the words of a text, in order. Example: `f("A b", 1)` has the words f, a, b, 1"""
    return np.fromiter(map(_hash_of, words_of(text)), np.uint64)


def shingles(tokens: np.ndarray, count: int) -> np.ndarray:
    """The different runs of `count` tokens, as sorted hashes; none where there are fewer tokens."""
    length = len(tokens) - count + 1
    if length < 1:
        return np.empty(0, np.uint64)
    total = np.zeros(length, np.uint64)
    for offset in range(count):
        total = total * _FACTOR + tokens[offset : offset + length]
    total ^= total >> np.uint64(29)
    total *= _MIX
    total ^= total >> np.uint64(32)
    return np.unique(total)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Similarity of two sets of shingles: common ones over all. Example: {1, 2, 3} and {2, 3, 4} give 0.5"""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common) if common else 0.0
