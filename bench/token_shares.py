"""Realised token shares of the tiny stage1 mix, at every row in the order in which training reads them.

The recipe's share of all tokens read so far is the reference; a source may be off by one longest unit (a row) in every lane,
and by 0.1 points once tokens exceed 1,000 times that. Beside it: the stream of samples of one lane before packing, at every
sample, and the finished rows as a whole.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from bench.corpus import embedded_recipe, lane_streams
from codetune.artifacts import Rows, open_rows, row_order
from codetune.recipe import Recipe
from data_pipelines.build import build
from data_pipelines.mixture import mixed_stream

MINUTES = 4
TRAIN_TOKENS = 2_457_600


def furthest_in_stream(recipe: Recipe, folder: Path) -> tuple[float, int, int]:
    """Most tokens that a source is off its share after any sample of one lane; samples' longest, tokens looked at."""
    shares = [source.share for source in recipe.need_data().sources.values()]
    row_tokens = recipe.need_data().sequence_tokens
    taken = [0] * len(shares)
    worst, longest, total = 0.0, 0, 0
    for sample in mixed_stream(lane_streams(recipe, folder), shares, row_tokens, lambda: row_tokens):
        taken[sample.source] += len(sample)
        longest, total = max(longest, len(sample)), sum(taken)
        worst = max(worst, *(abs(tokens - share * total) for tokens, share in zip(taken, shares, strict=True)))
        if total > TRAIN_TOKENS // 2:
            return worst, longest, total
    raise AssertionError("a stream of samples has no end")


def deviations(rows: Rows, seed: int, shares: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """After each row that training reads: tokens so far (R), and how many each source is off its share (R, K)."""
    order = row_order(seed, rows.block_rows, 0, len(rows))
    tokens_RK = np.zeros((len(order), len(shares)))
    for place, number in enumerate(order.tolist()):
        row = rows.row(number)
        np.add.at(tokens_RK[place], row["sources"], row["document_lengths"])
    taken_RK = tokens_RK.cumsum(0)
    return taken_RK.sum(1), np.abs(taken_RK - taken_RK.sum(1, keepdims=True) * np.array(shares))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        recipe = embedded_recipe(Path(name), [f"training.train_tokens={TRAIN_TOKENS}"])
        data = recipe.need_data()
        stream_worst, longest, total = furthest_in_stream(recipe, Path(name) / "lane")
        print(
            f"stream of one lane, {total:,} tokens, longest sample {longest}: at most {stream_worst:.0f} tokens off a share"
        )
        rows = open_rows(build(recipe))
        for source, facts in rows.manifest["sources"].items():
            off = (facts["share_realised"] - facts["share"]) * 100
            print(f"rows: {source:<12} {facts['share_realised']:.4%} of {facts['share']:.2%} ({off:+.4f} points)")
        tokens_R, off_RK = deviations(rows, recipe.seed, [source.share for source in data.sources.values()])
    unit = rows.lanes * longest
    late = tokens_R > 1000 * unit
    worst, points = off_RK.max() / unit, (off_RK[late].max(1) / tokens_R[late]).max() * 100
    print(f"rows: {int(tokens_R[-1]):,} tokens in {rows.lanes} lanes; 1,000 x lanes x longest = {1000 * unit:,}")
    print(f"\nin training, after any row: {worst:.3f} longest units a lane off a share (to reach: at most 1)")
    print(f"in training, after any row from {1000 * unit:,} tokens on: {points:.4f} points (to reach: under 0.1)")
    figures = {"units_a_lane": worst, "points_late": points, "units_in_stream": stream_worst / longest}
    print("RESULT " + json.dumps(figures | {"reached": bool(worst <= 1 and points < 0.1)}))


if __name__ == "__main__":
    main()
