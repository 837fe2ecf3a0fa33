"""One micro-batch poisoned with NaN on one rank of two, under DDP, ZeRO-2, ZeRO-3 and FSDP2, against one rank poisoned so.

A tiny Llama and toy rows, made here; `accelerate launch` with the files of recipes/accelerate, on CPU ranks. The second
rank's loss in one step is NaN. What is compared, with one rank's run of the same: that the step is written down with its
rows and left out on both ranks, that weights are finite and those of the reference, which they could not be had a gradient
or a state of the optimizer leaked into later steps.

    python -m bench.poison
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

from bench.toy_run import BATCH_ROWS, largest_difference, launch, make_parent, make_run
from codetune.artifacts import open_rows, row_order
from codetune.recipe import load_recipe

MINUTES = 3
LAYOUTS = ("ddp", "zero2", "zero3", "fsdp2")
STEPS, POISONED_STEP, NOISE = 16, 6, 1e-6


def main() -> None:
    """Print what became of the step under each layout."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parent = make_parent(folder / "parent", vocabulary=2048)
        alone = make_run(folder / "alone", parent, STEPS)
        recipe = load_recipe(alone)
        block_rows = open_rows(recipe.rows_dir).block_rows
        row = row_order(recipe.seed, block_rows, 0, STEPS * BATCH_ROWS).tolist()[POISONED_STEP * BATCH_ROWS - 1]
        launch("cpu", 1, alone, poison=row)
        for layout in LAYOUTS:
            path = make_run(folder / layout, parent, STEPS)
            launch(layout, 2, path, poison=row)
            lines = (load_recipe(path).run_dir / "skipped_steps.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            poisoned = [batch for batch in records[0]["micro_batches"] if batch["loss"] is None]
            recorded = len(records) == 1 and records[0]["step"] == POISONED_STEP
            recorded = recorded and [(batch["rank"], row in batch["rows"]) for batch in poisoned] == [(1, True)]
            difference = largest_difference(path, alone)
            figures[layout] = {"recorded": recorded, "weights": None if math.isnan(difference) else difference}
            told = "written down with its row, rank 1 alone" if recorded else "NOT written down as it was"
            print(f"{layout:6} step {POISONED_STEP} {told}; largest difference of a weight from one rank's {difference:.1e}")
    reached = all(each["recorded"] and each["weights"] is not None and each["weights"] < NOISE for each in figures.values())
    print(f"left out on both ranks, weights finite and equal: {reached} (to reach: under all four)")
    print("RESULT " + json.dumps({**figures, "reached": reached}))


if __name__ == "__main__":
    main()
