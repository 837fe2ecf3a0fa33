"""Texts compared with a reference: smoothed BLEU as CodeXGLUE computes it, edit similarity, exact matches.

What comes in: two texts. What goes out: figures between 0 and 1. Each of these exists in several versions that differ by
points, so each is pinned here and held to published figures by tests:

    smoothed_bleu     of CodeXGLUE's code-to-text: tokens split at punctuation, lower case, one added to counts and totals
    from
                      bigrams on, a brevity penalty of 1 - (reference + 1) / (prediction + 1), the mean over sentences
    edit_similarity   difflib's ratio in whole per cent, as fuzzywuzzy gives without its optional package; with that package
                      it gives about two points more for the same texts
    exact_match       the same words between white space
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence

ORDERS = 4  # n-grams up to this
# How NIST's scorer splits text, in this order.
_SPLITS = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ESCAPES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def split_punctuation(text: str) -> str:
    """Words and single marks, a space between them.

    Example: "x.y(1)" -> "x . y ( 1 )"
    """
    return " ".join(re.findall(r"\w+|[^\s\w]", text))


def bleu_tokens(text: str) -> list[str]:
    """A text as the scorer counts it."""
    text = split_punctuation(text.strip().lower())
    for escaped, plain in _ESCAPES:
        text = text.replace(escaped, plain)
    text = f" {text} "
    for pattern, replacement in _SPLITS:
        text = pattern.sub(replacement, text)
    return text.split()


def smoothed_bleu(prediction: str, reference: str) -> float:
    """BLEU-4 of one sentence against one reference, between 0 and 1."""
    hypothesis, wanted = bleu_tokens(prediction), bleu_tokens(reference)
    if not hypothesis:
        return 0.0  # subtle: by CodeXGLUE's script nothing at all scores exp(-words of the reference), 0.37 for one word
    log_sum = 0.0
    for order in range(1, ORDERS + 1):
        mine, theirs = _ngrams(hypothesis, order), _ngrams(wanted, order)
        right = sum(min(count, theirs[gram]) for gram, count in mine.items())
        total = max(len(hypothesis) - order + 1, 0)
        added = 1 if order > 1 else 0
        log_sum += math.log(right + added + sys.float_info.min) - math.log(total + added + sys.float_info.min)
    penalty = min(0.0, 1 - (len(wanted) + 1) / (len(hypothesis) + 1))
    return math.exp(log_sum / ORDERS + penalty)


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[place : place + order]) for place in range(len(tokens) - order + 1))


def edit_similarity(prediction: str, reference: str) -> float:
    """How much of two texts is the same, in whole per cent, as a share.

    Example: "ab", "ab" -> 1.0; "", "ab" -> 0.0
    """
    if not prediction or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, prediction, reference).ratio()) / 100


def exact_match(prediction: str, reference: str) -> float:
    """Whether the words are the same, white space aside."""
    return float(prediction.split() == reference.split())


def first_line(text: str) -> str:
    """The first line that is not blank, without its line end; nothing where all are blank."""
    return next((line for line in re.split(r"\r\n|\r|\n", text) if line.strip()), "")
