"""Rows into batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codetune.artifacts import open_rows, row_order
from codetune.collate import COLUMNS, RowCollator, RowDataset
from codetune.recipe import load_recipe


def row(number: int = 0, loss_runs: tuple[int, ...] = ()) -> dict[str, Any]:
    """Documents [7 8 9] and [5 6], of sources 1 and 0, layouts psm and plain."""
    return {
        "row_number": number,
        "input_ids": np.array([7, 8, 9, 5, 6], np.uint16),
        "document_lengths": np.array([3, 2], np.int32),
        "loss_runs": np.array(loss_runs, np.int32),
        "sources": np.array([1, 0], np.uint8),
        "layouts": np.array([1, 0], np.uint8),
    }


def collator(**changes: Any) -> RowCollator:
    settings = {"sequence_tokens": 7, "pad_id": 3, "isolate_documents": True, "sources": 2, "layouts": 3}
    return RowCollator(**(settings | changes))


def test_labels_positions_and_padding_of_a_row() -> None:
    batch = collator()([row()])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 5, 6, 3, 3]]
    assert batch["labels"].tolist() == [[-100, 8, 9, -100, 6, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    assert "attention_mask" not in batch


def test_positions_run_on_where_documents_are_not_isolated() -> None:
    batch = collator(isolate_documents=False)([row()])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert batch["labels"].tolist() == [[-100, 8, 9, 5, 6, -100, -100]]  # 5 is foretold by the document before it


def test_nothing_is_learnt_outside_the_loss_mask() -> None:
    batch = collator()([row(loss_runs=(2, 2, 1))])  # learnt from: indices 2 and 3, and 3 starts a document
    assert batch["labels"].tolist() == [[-100, -100, 9, -100, -100, -100, -100]]


def test_a_skipped_row_keeps_its_place_and_nothing_of_it_is_read() -> None:
    batch = collator(skip_rows=frozenset({4}))([row(3), row(4)])
    assert batch["row_numbers"].tolist() == [3, 4]
    assert batch["labels"][0].ne(-100).any()
    assert batch["labels"][1].eq(-100).all()
    assert batch["input_ids"][1].eq(3).all()
    assert batch["position_ids"][1].tolist() == list(range(7))
    assert batch["document_tokens"].tolist() == [[2, 0, 0, 0, 3, 0], [0, 0, 0, 0, 0, 0]]


def test_tokens_are_counted_per_source_and_layout_without_padding() -> None:
    counts = collator()([row()])["document_tokens"]
    assert counts.tolist() == [[2, 0, 0, 0, 3, 0]]  # source 0 plain; source 1 psm


def test_a_row_longer_than_the_recipe_says_is_refused() -> None:
    with pytest.raises(ValueError, match="row 0 has 5 tokens, more than"):
        collator(sequence_tokens=4)([row()])


def test_the_dataset_is_the_permutation_of_the_rows(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run())
    rows = open_rows(recipe.rows_dir)
    dataset = RowDataset(rows, recipe.seed, 32)
    numbers = [dataset[place]["row_number"] for place in (31, 0, 17, *range(32))][3:]
    assert numbers == row_order(recipe.seed, rows.block_rows, 0, 32).tolist()
    for place in (0, 5, 31):
        expected, got = rows.row(numbers[place]), dataset[place]
        for name in COLUMNS:
            np.testing.assert_array_equal(got[name], expected[name])


def test_too_few_rows_are_refused(make_run: Callable[..., Path]) -> None:
    rows = open_rows(load_recipe(make_run()).rows_dir)
    with pytest.raises(ValueError, match=r"needs 34; there are 32\. Build them for this recipe with `make data`"):
        RowDataset(rows, 0, 33)
