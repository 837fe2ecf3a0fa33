"""Lengths of documents: counted right, described right, and those that training reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from codetune.artifacts import open_rows, read_json, row_order
from codetune.lengths import LengthCounts, describe_counts, length_table, trained_lengths
from codetune.recipe import load_recipe
from codetune.train import train


def test_a_description_by_hand() -> None:
    counts = LengthCounts(2, row_tokens=10)
    counts.add([0, 0, 1], [2, 2, 4])
    counts.add([1], [10])
    described = counts.describe(["python", "prose"])
    assert described["python"] == {
        "documents": 2,
        "tokens": 4,
        "longest": 2,
        "percentiles": {"10": 2, "50": 2, "90": 2},
        "token_percentiles": {"10": 2, "50": 2, "90": 2},
        "up_to": {"2": [2, 4]},
    }
    # lengths 2 2 4 10: half of the 18 tokens are in the longest
    assert described["all"] == {
        "documents": 4,
        "tokens": 18,
        "longest": 10,
        "percentiles": {"10": 2, "50": 2, "90": 10},
        "token_percentiles": {"10": 2, "50": 10, "90": 10},
        "up_to": {"2": [2, 4], "4": [1, 4], "10": [1, 10]},
    }
    assert "to 2: 22.2%, to 4: 22.2%, to 10: 55.6%" in length_table(described)


def test_percentiles_are_numpys() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 1000)
    described = describe_counts(np.bincount(lengths, minlength=301))
    for percent, found in described["percentiles"].items():
        assert found == np.percentile(lengths, int(percent), method="inverted_cdf")
    tokens = np.repeat(lengths, lengths)
    for percent, found in described["token_percentiles"].items():
        assert found == np.percentile(tokens, int(percent), method="inverted_cdf")
    assert sum(documents for documents, _ in described["up_to"].values()) == 1000
    assert sum(tokens for _, tokens in described["up_to"].values()) == lengths.sum()


def test_lanes_add_up() -> None:
    parts = [LengthCounts(1, 8), LengthCounts(1, 8)]
    parts[0].add([0, 0], [3, 8])
    parts[1].add([0], [3])
    assert parts[0].sparse(0) == [[3, 1], [8, 1]]
    total = LengthCounts(1, 8)
    for part in parts:
        total.add_sparse(0, part.sparse(0))
    assert total.sparse(0) == [[3, 2], [8, 1]]


def test_what_is_reported_is_what_training_read(make_run: Callable[..., Path]) -> None:
    """28 of 32 rows, and 27, so that a part of a block is met too."""
    recipe = load_recipe(make_run(**{"training.train_tokens": 7 * 256, "probes.infill_prompts": 0}))
    rows = open_rows(recipe.rows_dir)
    expected: Counter[tuple[int, int]] = Counter()
    for number in row_order(recipe.seed, rows.block_rows, 0, 28).tolist():
        row = rows.row(number)
        expected.update(zip(row["sources"].tolist(), row["document_lengths"].tolist(), strict=True))
    odd: Counter[int] = Counter()
    for number in row_order(recipe.seed, rows.block_rows, 0, 27).tolist():
        odd.update(rows.row(number)["document_lengths"].tolist())
    assert dict(odd) == {n: int(c) for n, c in enumerate(trained_lengths(rows, recipe.seed, 27).counts_SL.sum(0)) if c}
    order = row_order(recipe.seed, rows.block_rows, 0, 32).tolist()
    first, last, unread = order[0], order[26], order[27]  # of a whole block, of the part of one, and of none
    without = trained_lengths(rows, recipe.seed, 27, skip_rows=(first, last, unread)).counts_SL.sum(0)
    for number in (first, last):
        odd.subtract(rows.row(number)["document_lengths"].tolist())
    assert {n: c for n, c in odd.items() if c} == {n: int(c) for n, c in enumerate(without) if c}
    counts = trained_lengths(rows, recipe.seed, 28)
    assert {(s, length): n for s in (0, 1) for length, n in counts.sparse(s)} == dict(expected)
    reported = read_json(train(recipe) / "manifest.json")["lengths"]
    assert reported["all"]["documents"] == sum(expected.values())
    assert reported["all"]["tokens"] == sum(length * n for (_, length), n in expected.items())
