"""Rows into batches: the order of the permutation, labels, positions, and what the ledger counts.

What comes in: rows on disk and a seed. What goes out: dicts of tensors, the only kind of batch the model sees. Legend:
B rows, T tokens (`sequence_tokens`), K = sources x layouts.

    input_ids_BT     the row, padded at the end; a row that the recipe skips is all padding
    labels_BT        -100 on padding, at the first token of what is attended to (nothing before it foretells it: of every
                     document where they are isolated, else of the row), and outside the loss mask
    position_ids_BT  starts again at every document where documents are isolated, the padding being one more; else 0 to T - 1

There is no attention mask, on purpose: transformers isolates documents by positions that start again only where there is
none (and no cache). A row is read straight from the memory-mapped Arrow table, which is faster than the formatted read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from codetune.artifacts import Rows, expand_runs, row_order

COLUMNS = ("input_ids", "document_lengths", "loss_runs", "sources", "layouts")


class RowDataset(torch.utils.data.Dataset):
    """Map-style: position in the run -> row. Position `p` has the same row on every machine, for ever."""

    def __init__(self, rows: Rows, seed: int, length: int) -> None:
        needed = -(-length // rows.block_rows) * rows.block_rows
        if needed > len(rows):
            raise ValueError(
                f"{rows.path}: the run reads {length} rows in blocks of {rows.block_rows}, so it needs {needed}; there are "
                f"{len(rows)}. Build them for this recipe with `make data`"
            )
        self.rows, self.seed, self.length = rows, seed, length
        self.rows_read = 0  # by this process
        self._block, self._numbers = -1, np.zeros(0, np.int64)
        self._columns = table_columns(rows)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        self.rows_read += 1
        number = self.row_number(position)
        return {"row_number": number, **read_row(self._columns, self.rows.index_of(number))}

    def row_number(self, position: int) -> int:
        block, place = divmod(position, self.rows.block_rows)
        if block != self._block:
            start = block * self.rows.block_rows
            self._block, self._numbers = block, row_order(self.seed, self.rows.block_rows, start, self.rows.block_rows)
        return int(self._numbers[place])


def table_columns(rows: Rows) -> dict[str, Any]:
    table = rows.dataset.data
    return {name: table.column(name) for name in COLUMNS}


def read_row(columns: dict[str, Any], index: int) -> dict[str, np.ndarray]:
    """The columns of one row as arrays, without a copy where Arrow allows it."""
    return {name: column[index].values.to_numpy(zero_copy_only=False) for name, column in columns.items()}


@dataclass(frozen=True)
class RowCollator:
    """Makes a batch of rows."""

    sequence_tokens: int
    pad_id: int
    isolate_documents: bool
    sources: int
    layouts: int
    skip_rows: frozenset[int] = frozenset()
    rows_are_shared: bool = False  # between ranks: tensors hold a value per token then, and the rest travels as lists

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        laid_out = [self.lay_out(row) for row in rows]
        input_ids_BT, labels_BT, position_ids_BT = (torch.from_numpy(np.stack(part)) for part in zip(*laid_out, strict=True))
        numbers = torch.tensor([row["row_number"] for row in rows])
        counts_BK = torch.from_numpy(np.stack([self.count(row) for row in rows]))
        return {
            "input_ids": input_ids_BT,
            "labels": labels_BT,
            "position_ids": position_ids_BT,
            "row_numbers": numbers.tolist() if self.rows_are_shared else numbers,
            "document_tokens": counts_BK.tolist() if self.rows_are_shared else counts_BK,
        }

    def lay_out(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, labels and positions of one row, each (T,) int64.

        Example: documents [7 8 9] and [5 6] in a row of 6, pad 0: ids 7 8 9 5 6 0, labels - 8 9 - 6 -, positions 0 1 2 0 1 0
        """
        length, total = len(row["input_ids"]), self.sequence_tokens
        if length > total:
            raise ValueError(f"row {row['row_number']} has {length} tokens, more than `data.sequence_tokens` ({total})")
        input_ids_T = np.full(total, self.pad_id, np.int64)
        if row["row_number"] in self.skip_rows:
            # not even read: nothing learnt from a row does not keep what is not finite in it from the gradient
            return input_ids_T, np.full(total, -100, np.int64), np.arange(total)
        input_ids_T[:length] = row["input_ids"]
        lengths = [*row["document_lengths"].tolist(), *([total - length] if length < total else [])]
        starts = np.cumsum([0, *lengths[:-1]])
        labels_T = np.full(total, -100, np.int64)
        learnt_T = expand_runs(row["loss_runs"], length)
        labels_T[:length] = np.where(learnt_T, input_ids_T[:length], -100)
        labels_T[starts if self.isolate_documents else 0] = -100
        position_ids_T = np.arange(total)
        if self.isolate_documents:
            position_ids_T = position_ids_T - np.repeat(starts, lengths)
        return input_ids_T, labels_T, position_ids_T

    def count(self, row: dict[str, Any]) -> np.ndarray:
        """Tokens of one row per source and layout, (K,) int64, source-major; padding and skipped rows are not counted."""
        if row["row_number"] in self.skip_rows:
            return np.zeros(self.sources * self.layouts, np.int64)
        cell = row["sources"].astype(np.int64) * self.layouts + row["layouts"]
        counts = np.bincount(cell, weights=row["document_lengths"], minlength=self.sources * self.layouts)
        return counts.astype(np.int64)
