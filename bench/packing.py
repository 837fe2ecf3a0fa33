"""Packing of real source files into 4,096-token rows: fill, documents that fit and were cut, and tokens in against out.

A document was cut though it fits when its pieces, put together in the finished rows, are no longer than a row. Reference for
conservation: tokens counted where they are encoded, against tokens read back from the rows on disk and the counted rest. The
tiny recipe's own rows of 256 tokens are printed beside it.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path

from bench.corpus import embedded_recipe, real_code, recipe_for, train_tokenizer, write_parquet
from codetune.artifacts import Rows, open_rows
from data_pipelines.build import build

MINUTES = 3


def cut_though_fitting(rows: Rows) -> tuple[int, int]:
    """Documents in more than one piece whose tokens together fit in a row, and documents looked at."""
    tokens: dict[tuple[int, str, int], int] = defaultdict(int)
    pieces: dict[tuple[int, str, int], int] = defaultdict(int)
    for number in range(len(rows)):
        row = rows.row(number)
        for source, name, turn, length in zip(
            row["sources"], row["ids"], row["passes"], row["document_lengths"], strict=True
        ):
            key = (int(source), str(name), int(turn))
            tokens[key] += int(length)
            pieces[key] += 1
    wrong = sum(pieces[key] > 1 and tokens[key] <= rows.sequence_tokens for key in tokens)
    return wrong, len(tokens)


def report(rows: Rows, name: str) -> dict[str, float]:
    manifest = rows.manifest
    wrong, documents = cut_though_fitting(rows)
    in_rows = sum(len(rows.row(number)["input_ids"]) for number in range(len(rows)))
    encoded = rest = 0
    for facts in manifest["sources"].values():
        encoded += facts["tokens_encoded"]
        rest += facts["tokens_not_packed"] + facts["tokens_not_taken"]
    print(f"{name}: fill {manifest['fill']:.4%} of {manifest['rows']:,} rows")
    print(f"{name}: {wrong} of {documents:,} documents cut though they fit")
    same = encoded == in_rows + rest
    print(f"{name}: tokens encoded {encoded:,} = in rows {in_rows:,} + counted rest {rest:,}: {same}")
    return {"fill": manifest["fill"], "cut_though_fitting": wrong, "lost": encoded - in_rows - rest}


def main() -> None:
    documents = real_code(30_000_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parquet(folder / "code.parquet", documents)
        parent = train_tokenizer(folder / "tokenizer", documents[::10])
        source = {"code": {"kind": "parquet", "share": 1.0, "path": str(folder / "code.parquet"), "id_column": "id"}}
        long_rows = report(open_rows(build(recipe_for(folder, parent, source, rows=1536))), "4,096 tokens, whole files")
        tiny = report(open_rows(build(embedded_recipe(folder / "tiny", []))), "256 tokens, tiny's documents")
    print(f"\nfill at 4,096 tokens: {long_rows['fill']:.4%} (to reach: 99.5 %)")
    print(f"documents cut though they fit: {long_rows['cut_though_fitting']} and {tiny['cut_though_fitting']} (to reach: 0)")
    print(f"tokens lost: {long_rows['lost']} and {tiny['lost']} (to reach: 0)")
    print("RESULT " + json.dumps({"at_4096": long_rows, "tiny": tiny}))


if __name__ == "__main__":
    main()
