"""Packing, by hand, and what must hold for every packing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipelines.fim import Sample
from data_pipelines.mixture import mixed_stream
from data_pipelines.packing import Concatenator, Exchange, GroupPacker, balanced_order, best_exchange, pack_best_fit


def _samples(lengths: Iterator[int] | list[int]) -> Iterator[Sample]:
    for number, length in enumerate(lengths):
        yield Sample(np.full(length, number, np.int32), 0, str(number), 0)


def _lengths(seed: int, low: int, high: int) -> Iterator[int]:
    draw = random.Random(seed)
    while True:
        yield draw.randint(low, high)


def test_best_fit_by_hand() -> None:
    # 6 opens a row; 5 does not fit beside it and opens another; 3 goes where least room is left (with 5); 2 fills the first
    assert pack_best_fit([3, 5, 2, 6], 8) == [[3, 2], [1, 0]]
    assert pack_best_fit([8, 8], 8) == [[0], [1]]
    assert pack_best_fit([], 8) == []


def test_every_sample_is_packed_once_and_no_row_is_too_long() -> None:
    lengths = list(itertools.islice(_lengths(1, 1, 64), 500))
    rows = pack_best_fit(lengths, 64)
    assert sorted(place for row in rows for place in row) == list(range(500))
    assert all(sum(lengths[place] for place in row) <= 64 for row in rows)


@pytest.mark.parametrize("packer_class", [GroupPacker, Concatenator])
def test_rows_come_in_whole_groups_and_nothing_is_lost(packer_class: type[GroupPacker] | type[Concatenator]) -> None:
    packer = packer_class(64, 16)
    taken: list[Sample] = []

    def recorded() -> Iterator[Sample]:
        for length in _lengths(2, 1, 64):
            sample = Sample(np.full(min(length, packer.room()), len(taken), np.int32), 0, str(len(taken)), 0)
            taken.append(sample)
            yield sample

    source = recorded()
    rows = [row for _ in range(8) for row in packer.next_group(source)]
    assert len(rows) == 8 * 16
    packed = [sample for row in rows for sample in row]
    assert sorted(int(s.document_id) for s in [*packed, *packer.waiting]) == list(range(len(taken)))
    assert all(sum(map(len, row)) <= 64 for row in rows)
    if packer_class is Concatenator:
        assert all(sum(map(len, row)) == 64 for row in rows) and not packer.waiting


def test_a_sample_that_fits_is_never_cut() -> None:
    packer = GroupPacker(64, 16)
    rows = packer.next_group(_samples(_lengths(3, 1, 64)))
    wanted = list(itertools.islice(_lengths(3, 1, 64), 2000))
    assert all(len(sample) == wanted[int(sample.document_id)] for row in rows for sample in row)


def test_short_documents_fill_rows() -> None:
    packer = GroupPacker(4096, 64)
    samples = _samples(_lengths(4, 20, 3000))
    rows = [row for _ in range(4) for row in packer.next_group(samples)]
    assert sum(len(sample) for row in rows for sample in row) / (len(rows) * 4096) >= 0.995
    assert sum(map(len, packer.waiting)) < 3 * 4096


def test_more_rows_later_leave_the_earlier_ones_alone() -> None:
    few, many = GroupPacker(64, 16), GroupPacker(64, 16)
    source_few, source_many = _samples(_lengths(5, 1, 64)), _samples(_lengths(5, 1, 64))
    first = [few.next_group(source_few) for _ in range(2)]
    longer = [many.next_group(source_many) for _ in range(6)]
    names = [[[sample.document_id for sample in row] for row in group] for group in first]
    assert names == [[[sample.document_id for sample in row] for row in group] for group in longer[:2]]


def test_rows_in_balance_by_hand() -> None:
    halves = np.array([0.5, 0.5])
    rows = np.array([[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [0.0, 4.0]])
    assert balanced_order(rows, halves, np.zeros(2), np.arange(4)) == [0, 2, 1, 3]
    assert balanced_order(rows, halves, np.zeros(2), np.array([3, 2, 1, 0])) == [3, 1, 2, 0]
    # the first source is ahead by 4 tokens already, so two rows of the second one come first
    assert balanced_order(rows, halves, np.array([4.0, 0.0]), np.arange(4)) == [2, 0, 3, 1]


class _Toys:
    """A source of samples of drawn lengths."""

    def __init__(self, seed: int, low: int, high: int) -> None:
        self.lengths = _lengths(seed, low, high)

    def take(self, room: int) -> Sample:
        return Sample(np.zeros(min(next(self.lengths), room), np.int32), 0, "", 0)


def test_every_source_stays_at_its_share_from_row_to_row() -> None:
    shares, row = (0.5, 0.2, 0.15, 0.08, 0.07), 256
    streams = [_Toys(0, 30, 60), _Toys(1, 60, 256), _Toys(2, 100, 256), _Toys(3, 150, 256), _Toys(4, 200, 256)]
    packer = GroupPacker(row, 128, shares, seed=5)
    samples = mixed_stream(streams, shares, row, packer.room)
    taken, worst, by_chance = np.zeros(5), 0.0, 0.0
    for _ in range(12):
        group = packer.next_group(samples)
        shuffled, strayed = random.Random(0).sample(group, len(group)), taken.copy()
        for given, other in zip(group, shuffled, strict=True):
            for counts, packed in ((taken, given), (strayed, other)):
                for sample in packed:
                    counts[sample.source] += len(sample)
            worst = max(worst, np.abs(taken - taken.sum() * np.array(shares)).max())
            by_chance = max(by_chance, np.abs(strayed - strayed.sum() * np.array(shares)).max())
    assert worst <= row  # one longest sample
    assert by_chance > 2 * row  # which an order by chance does not keep


def test_the_best_exchange_by_hand() -> None:
    # 60 of a source that is 40 ahead go out, 20 + 30 of one that is 40 behind come in, 10 slots are lost: 40 + 5 - 60 = -15
    # and -40 + 5 + 50 = 15. One alone would lose 30 or 40 slots, and may not.
    halves, ahead = np.array([0.5, 0.5]), np.array([40.0, -40.0])
    lengths, sources, rooms = np.array([60, 20, 30]), np.array([0, 1, 1]), np.array([0, -1, -1])
    assert best_exchange(lengths, sources, rooms, ahead, halves, 10) == Exchange((1, 2), 0)
    assert best_exchange(lengths, sources, rooms, ahead, halves, 9) is None
    # what comes in is 10 longer: it needs a row with 10 free slots
    longer = np.array([40, 20, 30])
    assert best_exchange(longer, sources, np.array([9, -1, -1]), ahead, halves, 0) is None
    assert best_exchange(longer, sources, np.array([10, -1, -1]), ahead, halves, 0) == Exchange((1, 2), 0)
    assert best_exchange(lengths, sources, rooms, np.array([4.0, -4.0]), halves, 10) is None, "it would be further off"


class _Counted:
    """A source of samples of drawn lengths, each with a number of its own in `given`."""

    def __init__(self, seed: int, low: int, high: int, given: list[Sample]) -> None:
        self.lengths, self.given = _lengths(seed, low, high), given

    def take(self, room: int) -> Sample:
        self.given.append(Sample(np.zeros(min(next(self.lengths), room), np.int32), 0, str(len(self.given)), 0))
        return self.given[-1]


def test_exchanges_lose_nothing_and_bring_few_rows_to_their_shares() -> None:
    """Many long samples of one source and few short ones of three others, as rehearsal is in the rows of conversations."""
    shares, bounds = (0.92, 0.03, 0.015, 0.035), ((120, 520), (40, 70), (50, 60), (120, 380))
    off = {}
    for exchanges in (False, True):
        given: list[Sample] = []
        packer = GroupPacker(1024, 50, shares, exchanges=exchanges)
        streams = [_Counted(seed, *bound, given) for seed, bound in enumerate(bounds)]
        samples = mixed_stream(streams, shares, 1024, packer.room)
        rows = [row for _ in range(4) for row in packer.next_group(samples)]
        placed = [sample for row in rows for sample in row]
        assert sorted(int(sample.document_id) for sample in (*placed, *packer.waiting)) == list(range(len(given)))
        assert len(rows) == 200 and all(sum(map(len, row)) <= 1024 for row in rows)
        tokens = np.zeros(4)
        np.add.at(tokens, [sample.source for sample in placed], [len(sample) for sample in placed])
        assert tokens.sum() > 0.985 * 200 * 1024
        off[exchanges] = float(np.abs(tokens / tokens.sum() - shares).max())
    assert off[True] < 0.0005 < off[False]
