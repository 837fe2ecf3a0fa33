"""Exact shares of tokens: which source is read next.

What comes in: one stream per source and its share. What goes out: samples in the order in which they are to be packed. At
any point every source is within one longest sample of its share, and the whole state is one counter per source. (Drawing
documents by probability turned 85/8/7 into 93/2/5 on plausible document lengths.)

The rule is earliest eligible virtual deadline first (Stoica and Abdel-Wahab, 1995), known from fair scheduling: among the
sources that are not ahead of their share, the one whose deficit would first reach one longest sample. The simpler rule,
smallest `tokens_taken / share`, lets a source with a large share fall behind by up to share x (sources - 1) samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from data_pipelines.fim import Sample


class Stream(Protocol):
    """Whatever gives the next sample of one source, no longer than `room` tokens."""

    def take(self, room: int) -> Sample: ...


def next_source(taken: Sequence[int], shares: Sequence[float], longest: int) -> int:
    """The source to read next, from the tokens taken of each; ties go to the one that stands first in the recipe.

    Example: shares 0.75 and 0.25, samples of one token: 0 1 0 0 | 0 1 0 0 | ...
    """
    total = sum(taken)
    eligible = [place for place, tokens in enumerate(taken) if tokens <= shares[place] * total * (1 + 1e-12)]
    return min(eligible, key=lambda place: ((taken[place] + longest) / shares[place], place))


def mixed_stream(
    streams: Sequence[Stream], shares: Sequence[float], longest: int, room: Callable[[], int]
) -> Iterator[Sample]:
    """Samples without end. `longest` is the length of a row, `room` says how long the next sample may be."""
    taken = [0] * len(streams)
    # recipes may be off by rounding (three times 0.3333333), but a mixture that adds up to less than one would one day
    # find every source ahead of its share
    shares = [share / sum(shares) for share in shares]
    while True:
        source = next_source(taken, shares, longest)
        sample = streams[source].take(room())
        sample.source = source
        taken[source] += len(sample)
        yield sample
