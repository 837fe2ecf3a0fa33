"""Samples into rows: best fit over groups of rows, or plain concatenation.

What comes in: samples, none longer than a row. What goes out: rows, each a list of samples in order of arrival.

Best fit (the default): samples are gathered until best-fit decreasing puts them into two rows more than a group has; the
least full row waits for the next group, and so does the row that the shares can best do without. The others come in an order
in which every source stays at its share from row to row (`balanced_order`): packed by length, a group would begin with one
source and end with another. A sample that fits in a row is never cut. Because groups follow one another from the start,
building more rows later leaves the earlier ones as they are. Samples still waiting at the very end are counted (`waiting`).

Where a stage is short and some of its shares are small (conversations beside 2 % of text), two rows that wait are much: most
of them are short samples, and short ones are of a few sources. There, samples that wait are exchanged for placed ones until
no exchange brings the shares nearer to the recipe's (`best_exchange`). The other stages do without.

Concatenation (Llama's own way): rows are filled to the last token; the sample that reaches the end of a row is cut there
by its source, which is asked for no more than the room that is left.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from codetune.artifacts import permutation
from data_pipelines.fim import Sample

LOSS_OF_ROW = 64  # an exchange may cost a row the 64th part of its tokens


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the row where it leaves the least room.

    Example: lengths [3, 5, 2, 6], capacity 8 -> [[3, 2], [1, 0]] (6 + 2 and 5 + 3, as places in `lengths`)
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), sorted; full rows are taken out
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[place]
        assert length <= capacity, f"a sample of {length} tokens for rows of {capacity}"
        found = bisect_left(rooms, (length, -1))
        if found < len(rooms):
            room, row = rooms.pop(found)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(place)
        if room > length:
            insort(rooms, (room - length, row))
    return rows


def balanced_order(tokens_RK: np.ndarray, shares_K: np.ndarray, taken_K: np.ndarray, draw_R: np.ndarray) -> list[int]:
    """Rows (R) in an order that keeps each source (K) near its share of the tokens so far, `taken_K` included.

    The next row is the one after which the source that is furthest off is least far off; `draw_R`, a permutation, decides
    between equals. (Left to chance, a mix of five sources strays by three to five rows.)

    Example: rows [4 0], [4 0], [0 4], [0 4], shares one half each, drawn 0 1 2 3 -> [0, 2, 1, 3]
    """
    ahead_RK = (tokens_RK - tokens_RK.sum(1, keepdims=True) * shares_K)[draw_R]
    ahead_K = taken_K - taken_K.sum() * shares_K
    left = np.arange(len(draw_R))
    order = []
    while left.size:
        place = int(np.abs(ahead_K + ahead_RK[left]).max(1).argmin())
        ahead_K = ahead_K + ahead_RK[left[place]]
        order.append(int(draw_R[left[place]]))
        left = np.delete(left, place)
    return order


@dataclass(frozen=True)
class Exchange:
    """Samples that wait, in place of one that has its place in a row."""

    incoming: tuple[int, ...]
    outgoing: int


def best_exchange(
    lengths_N: np.ndarray,
    sources_N: np.ndarray,
    rooms_N: np.ndarray,
    ahead_K: np.ndarray,
    shares_K: np.ndarray,
    most_loss: int,
) -> Exchange | None:
    """The exchange after which the sources (K) are nearest to their shares, by the sum of squares; None if all are worse.

    `rooms_N` has, for a placed sample (N), what is free in its row; -1 for one that waits. One sample of a source that is
    ahead goes out; in come one of a source that is behind, or some of its shortest. A row loses at most `most_loss` tokens.

    Example: lengths [60, 20, 30], sources [0, 1, 1], rooms [0, -1, -1], ahead [40, -40], shares [.5, .5] -> 1 and 2 for 0
    """
    best, found = float((ahead_K**2).sum()) - 0.5, None
    placed_N = rooms_N >= 0
    for source in np.flatnonzero(ahead_K < 0):
        waiting = [int(place) for place in np.flatnonzero(~placed_N & (sources_N == source))]
        waiting.sort(key=lambda place: (int(lengths_N[place]), place))
        bundles = [tuple(waiting[: count + 1]) for count in range(len(waiting))] + [(place,) for place in waiting[1:]]
        for other in np.flatnonzero(ahead_K > 0):
            places_M = np.flatnonzero(placed_N & (sources_N == other))
            for bundle in bundles:
                tokens = int(lengths_N[list(bundle)].sum())
                fits_M = (lengths_N[places_M] + rooms_N[places_M] >= tokens) & (lengths_N[places_M] - most_loss <= tokens)
                out_F = places_M[fits_M]
                if not out_F.size:
                    continue
                gain_F = tokens - lengths_N[out_F]
                after_FK = ahead_K - gain_F[:, None] * shares_K
                after_FK[:, source] += tokens
                after_FK[:, other] -= lengths_N[out_F]
                off_F = (after_FK**2).sum(1)
                place = int(off_F.argmin())
                if off_F[place] < best:
                    best, found = float(off_F[place]), Exchange(bundle, int(out_F[place]))
    return found


class GroupPacker:
    """Best-fit packing of a stream, one group of rows at a time."""

    def __init__(
        self, row_tokens: int, group_rows: int, shares: Sequence[float] = (1.0,), seed: int = 0, *, exchanges: bool = False
    ) -> None:
        self.row_tokens = row_tokens
        self.group_rows = group_rows
        self.exchanges = exchanges  # of waiting samples for placed ones, for the sake of the shares
        self.waiting: list[Sample] = []
        self._shares_K = np.asarray(shares) / sum(shares)
        self._taken_K = np.zeros(len(shares))  # tokens in rows so far
        self._seed, self._group = seed, 0
        self._fill = 0.9  # of the last group's rows; the first guess is low, since too many samples cannot be given back

    def room(self) -> int:
        return self.row_tokens

    def next_group(self, samples: Iterator[Sample]) -> list[list[Sample]]:
        """The next `group_rows` rows."""
        lengths = [len(sample) for sample in self.waiting]
        tokens, packed = sum(lengths), []
        enough = int(self.group_rows * self.row_tokens * self._fill)
        while len(packed) < self.group_rows + 2:
            while tokens < enough or not lengths:
                self.waiting.append(next(samples))
                lengths.append(len(self.waiting[-1]))
                tokens += lengths[-1]
            packed = pack_best_fit(lengths, self.row_tokens)
            enough = tokens + self.row_tokens // 2
        fullness = [sum(lengths[place] for place in row) for row in packed]
        fullest = sorted(range(len(packed)), key=lambda row: (-fullness[row], row))[: self.group_rows + 1]
        chosen = self._in_balance([packed[row] for row in sorted(fullest)])
        if self.exchanges:
            self._exchange(chosen)
        group = [[self.waiting[place] for place in sorted(row)] for row in chosen]
        used = {place for row in chosen for place in row}
        self._fill = sum(lengths[place] for place in used) / (self.group_rows * self.row_tokens)
        self.waiting = [sample for place, sample in enumerate(self.waiting) if place not in used]
        return group

    def _in_balance(self, rows: list[list[int]]) -> list[list[int]]:
        """All of these rows but one, in the order in which they are given out."""
        tokens_RK = np.zeros((len(rows), len(self._shares_K)))
        for number, row in enumerate(rows):
            for place in row:
                tokens_RK[number, self.waiting[place].source] += len(self.waiting[place])
        draw_R = permutation(self._seed, self._group, len(rows))
        order = balanced_order(tokens_RK, self._shares_K, self._taken_K, draw_R)[: self.group_rows]
        self._taken_K += tokens_RK[order].sum(0)
        self._group += 1
        return [rows[number] for number in order]

    def _exchange(self, rows: list[list[int]]) -> None:
        """Exchange waiting samples for those in these rows, while that brings the shares nearer."""
        lengths_N = np.asarray([len(sample) for sample in self.waiting])
        sources_N = np.asarray([sample.source for sample in self.waiting])
        row_of = {place: row for row, places in enumerate(rows) for place in places}
        most_loss = self.row_tokens // LOSS_OF_ROW
        while True:
            free = [self.row_tokens - sum(int(lengths_N[place]) for place in row) for row in rows]
            rooms_N = np.asarray([free[row_of[place]] if place in row_of else -1 for place in range(len(self.waiting))])
            ahead_K = self._taken_K - self._taken_K.sum() * self._shares_K
            found = best_exchange(lengths_N, sources_N, rooms_N, ahead_K, self._shares_K, most_loss)
            if found is None:
                return
            row = row_of.pop(found.outgoing)
            rows[row].remove(found.outgoing)
            rows[row].extend(found.incoming)
            row_of |= dict.fromkeys(found.incoming, row)
            np.add.at(self._taken_K, sources_N[list(found.incoming)], lengths_N[list(found.incoming)])
            self._taken_K[sources_N[found.outgoing]] -= lengths_N[found.outgoing]


class Concatenator:
    """Plain concatenation: every row is full, and documents run on from one row to a later one."""

    def __init__(self, row_tokens: int, group_rows: int) -> None:
        self.row_tokens = row_tokens
        self.group_rows = group_rows
        self.waiting: list[Sample] = []
        self._filled = 0

    def room(self) -> int:
        return self.row_tokens - self._filled

    def next_group(self, samples: Iterator[Sample]) -> list[list[Sample]]:
        """The next `group_rows` rows, each exactly full."""
        group = []
        for _ in range(self.group_rows):
            row: list[Sample] = []
            self._filled = 0
            while self._filled < self.row_tokens:
                sample = next(samples)
                row.append(sample)
                self._filled += len(sample)
            group.append(row)
        self._filled = 0
        return group
