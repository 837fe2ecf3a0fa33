"""How long the documents in rows are: what a stage on long rows was really trained on.

What comes in: the lengths of documents as they lie in rows, pieces of a document that was cut counting one by one. What goes
out: for each source and for all, numbers and a table. Counts are exact (one counter per length), so percentiles are too.

The trade: a counter for every length up to a row, 128 KB a source at 16,384 tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from codetune.artifacts import Rows, row_order

ROWS_AT_ONCE = 65_536  # read together when lengths are counted again from finished rows
PERCENTILES = (10, 50, 90)


class LengthCounts:
    """Documents of each length, by source: `counts_SL`, S sources, L lengths from 0 to a whole row."""

    def __init__(self, sources: int, row_tokens: int) -> None:
        self.counts_SL = np.zeros((sources, row_tokens + 1), np.int64)

    def add(self, sources: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray, times: int = 1) -> None:
        np.add.at(self.counts_SL, (np.asarray(sources, np.int64), np.asarray(lengths, np.int64)), times)

    def add_sparse(self, source: int, pairs: Sequence[Sequence[int]]) -> None:
        """Add what `sparse` gave."""
        for length, count in pairs:
            self.counts_SL[source, length] += count

    def sparse(self, source: int) -> list[list[int]]:
        """Pairs of length and count, where there are any. Example: two documents of 5 tokens -> [[5, 2]]"""
        (lengths,) = np.nonzero(self.counts_SL[source])
        return [[int(length), int(self.counts_SL[source, length])] for length in lengths]

    def describe(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """For each source that has documents, and for `all`: see `describe_counts`."""
        lines = {name: self.counts_SL[place] for place, name in enumerate(names)} | {"all": self.counts_SL.sum(0)}
        return {name: describe_counts(counts_L) for name, counts_L in lines.items() if counts_L.any()}


def describe_counts(counts_L: np.ndarray) -> dict[str, Any]:
    """Documents, tokens, percentiles, and a histogram by powers of two.

    `percentiles` are those of documents; `token_percentiles` say how long the document is that a token stands in. `up_to`
    maps the upper end of each bin to its documents and tokens.

    Example: lengths 2, 2, 4 -> 3 documents, 8 tokens, percentile 50 is 2, token percentile 90 is 4,
    up_to {2: [2, 4], 4: [1, 4]}
    """
    lengths_L = np.arange(len(counts_L))
    tokens_L = counts_L * lengths_L
    edges = [1]
    while edges[-1] < len(counts_L) - 1:
        edges.append(min(2 * edges[-1], len(counts_L) - 1))
    bins, start = {}, 0
    for edge in edges:
        documents, tokens = int(counts_L[start : edge + 1].sum()), int(tokens_L[start : edge + 1].sum())
        if documents:
            bins[str(edge)] = [documents, tokens]
        start = edge + 1
    return {
        "documents": int(counts_L.sum()),
        "tokens": int(tokens_L.sum()),
        "longest": int(np.nonzero(counts_L)[0][-1]),
        "percentiles": _percentiles(counts_L),
        "token_percentiles": _percentiles(tokens_L),
        "up_to": bins,
    }


def _percentiles(weights_L: np.ndarray) -> dict[str, int]:
    """The smallest length that so many percent of the weight do not exceed."""
    running_L = np.cumsum(weights_L)
    wanted = {p: -(-running_L[-1] * p // 100) for p in PERCENTILES}
    return {str(p): int(np.searchsorted(running_L, max(weight, 1))) for p, weight in wanted.items()}


def trained_lengths(rows: Rows, seed: int, row_count: int, skip_rows: Collection[int] = ()) -> LengthCounts:
    """Lengths in the first `row_count` rows of the order that training reads, but for `skip_rows`: all it was trained on.

    Whole blocks of the order are whole runs of every lane, read at once; only the rows of the last block are picked.
    """
    counts = LengthCounts(len(rows.manifest["source_names"]), rows.sequence_tokens)
    blocks, rest = divmod(row_count, rows.block_rows)
    in_lane, lane_rows = blocks * (rows.block_rows // rows.lanes), len(rows) // rows.lanes
    for lane in range(rows.lanes):
        for start in range(0, in_lane, ROWS_AT_ONCE):
            _add_run(counts, rows, lane * lane_rows + start, min(ROWS_AT_ONCE, in_lane - start))
    last = set(row_order(seed, rows.block_rows, blocks * rows.block_rows, rest).tolist())
    for number in last.difference(skip_rows):
        _add_run(counts, rows, rows.index_of(number), 1)
    for number in {number for number in skip_rows if number < blocks * rows.block_rows}:
        _add_run(counts, rows, rows.index_of(number), 1, times=-1)
    return counts


def _add_run(counts: LengthCounts, rows: Rows, start: int, count: int, times: int = 1) -> None:
    columns = (rows.dataset.data.column(name).slice(start, count) for name in ("sources", "document_lengths"))
    sources, lengths = (column.combine_chunks().flatten().to_numpy() for column in columns)
    counts.add(sources, lengths, times)


def length_table(described: Mapping[str, Mapping[str, Any]]) -> str:
    """The distribution as a table for people: percentiles by source, then the histogram of all."""
    if not described:
        return "documents in rows: none"
    heads = ("documents", "p10", "p50", "p90", "longest", "p50 of tokens")
    lines = [f"{'documents in rows':<20}" + "".join(f"{head:>14}" for head in heads)]
    for name, facts in described.items():
        cells = [facts["documents"], *facts["percentiles"].values(), facts["longest"], facts["token_percentiles"]["50"]]
        lines.append(f"{name:<20}" + "".join(f"{cell:>14,}" for cell in cells))
    everything = described["all"]
    shares = [f"to {int(edge):,}: {tokens / everything['tokens']:.1%}" for edge, (_, tokens) in everything["up_to"].items()]
    return "\n".join([*lines, f"tokens by the length of their document: {', '.join(shares)}"])
