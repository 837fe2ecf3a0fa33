"""Realised token shares of the tiny stage1 mix, at every point of a lane and in the finished rows.

At every point: the stream of samples of one lane of `recipes/stage1/tiny.yaml`, run on until tokens exceed 8,000 times the
longest sample; reference: the recipe's share of all tokens so far. In rows: what the manifest of `make data` counts.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from bench.corpus import embedded_recipe, lane_streams
from codetune.artifacts import open_rows
from data_pipelines.build import build
from data_pipelines.mixture import mixed_stream

MINUTES = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        recipe = embedded_recipe(Path(name), ["training.train_tokens=2457600"])
        data = recipe.need_data()
        row_tokens = data.sequence_tokens
        shares = [source.share for source in data.sources.values()]
        taken = [0] * len(shares)
        worst = 0.0
        longest = total = 0
        streams = lane_streams(recipe, Path(name) / "lane")
        for sample in mixed_stream(streams, shares, row_tokens, lambda: row_tokens):
            taken[sample.source] += len(sample)
            longest = max(longest, len(sample))
            total = sum(taken)
            worst = max(worst, *(abs(tokens - share * total) for tokens, share in zip(taken, shares, strict=True)))
            if total > 1000 * row_tokens * 8:
                break
        points = max(abs(tokens / total - share) for tokens, share in zip(taken, shares, strict=True)) * 100
        print(f"one lane, {total:,} tokens, longest sample {longest}: at any point at most {worst:.0f} tokens off a share")
        print(f"distance at the end {points:.4f} points")
        manifest = open_rows(build(recipe)).manifest
        rows_points = 0.0
        for source, facts in manifest["sources"].items():
            off = (facts["share_realised"] - facts["share"]) * 100
            rows_points = max(rows_points, abs(off))
            print(f"rows: {source:<12} {facts['share_realised']:.4%} of {facts['share']:.2%} ({off:+.4f} points)")
        lanes = manifest["lanes"]
        print(
            f"rows: {manifest['tokens']:,} tokens in {lanes} lane(s); 1,000 x lanes x longest = {1000 * lanes * longest:,}"
        )
    print(f"\nworst distance at any point, in longest samples: {worst / longest:.3f} (to reach: at most 1)")
    print(f"largest distance in finished rows: {rows_points:.4f} points (to reach, from that many tokens on: under 0.1)")
    figures = {"worst_in_longest_samples": worst / longest, "points_in_stream": points, "points_in_rows": rows_points}
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
