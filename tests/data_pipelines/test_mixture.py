"""Shares of tokens, by hand and at every point of a long stream."""

from __future__ import annotations

import itertools
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.fim import Sample
from data_pipelines.mixture import mixed_stream


class _Lengths:
    """A stream of samples of the given lengths, cut to the room there is."""

    def __init__(self, lengths: itertools.cycle[int]) -> None:
        self.lengths = lengths

    def take(self, room: int) -> Sample:
        return Sample(np.zeros(min(next(self.lengths), room), np.int32), 0, "", 0)


def test_the_order_by_hand() -> None:
    streams = [_Lengths(itertools.cycle([1])), _Lengths(itertools.cycle([1]))]
    taken = [sample.source for sample in itertools.islice(mixed_stream(streams, [0.75, 0.25], 1, lambda: 1), 8)]
    # deadlines (taken + 1) / share, of those not ahead: 1.33 4 -> a; b alone is not ahead (a has 1 > 0.75) -> b;
    # a has 1 <= 1.5: deadline 2.67 -> a; a 2 <= 2.25 -> a; then at 3 and 1 of 4 both are even, and it begins again
    assert taken == [0, 1, 0, 0, 0, 1, 0, 0]


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40),
)
def test_whatever_the_shares_and_lengths_nobody_is_off_by_more_than_one_longest(
    weights: list[float], lengths: list[int]
) -> None:
    shares = np.array(weights) / sum(weights)
    streams = [_Lengths(itertools.cycle(lengths[place:] + lengths[:place])) for place in range(len(shares))]
    tokens = np.zeros(len(shares))
    for sample in itertools.islice(mixed_stream(streams, shares.tolist(), 50, lambda: 50), 400):
        tokens[sample.source] += len(sample)
        assert np.abs(tokens - tokens.sum() * shares).max() <= 50 + 1e-6


def test_at_any_point_a_source_is_off_by_at_most_one_longest_sample() -> None:
    draw = random.Random(5)
    shares, longest = [0.85, 0.08, 0.07], 4096
    means = [1500, 400, 900]  # document probabilities would make 93/2/5 of these
    lengths = [itertools.cycle([min(longest, 1 + int(draw.expovariate(1 / mean))) for _ in range(997)]) for mean in means]
    tokens = np.zeros(3)
    for sample in itertools.islice(
        mixed_stream([_Lengths(item) for item in lengths], shares, longest, lambda: longest), 50_000
    ):
        tokens[sample.source] += len(sample)
        off = np.abs(tokens - tokens.sum() * np.array(shares))
        assert off.max() <= longest
    assert np.abs(tokens / tokens.sum() - shares).max() < 0.001  # 0.1 points


def test_shares_that_are_rounded_down_never_run_out_of_sources() -> None:
    streams = [_Lengths(itertools.cycle([4096])) for _ in range(3)]
    stream = mixed_stream(streams, [0.3333333] * 3, 4096, lambda: 4096)
    taken = [sample.source for sample in itertools.islice(stream, 30_000)]
    assert [taken.count(source) for source in range(3)] == [10_000] * 3


def test_no_sample_is_longer_than_the_room() -> None:
    streams = [_Lengths(itertools.cycle([100])), _Lengths(itertools.cycle([7]))]
    assert all(len(sample) <= 16 for sample in itertools.islice(mixed_stream(streams, [0.5, 0.5], 16, lambda: 16), 200))
