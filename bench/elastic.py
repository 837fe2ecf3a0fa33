"""Two ranks, then one, then two again, across two kills, against the same run left alone: rows and final loss.

A tiny Llama and toy rows, made here; `accelerate launch` with the files of recipes/accelerate, on CPU ranks. Each session is
killed (SIGKILL to its ranks) once it is past a checkpoint, and the next one has another number of ranks and another
micro-batch. ZeRO's checkpoints are converted in between (`python -m codetune.sharding`). What is compared: the rows of every
step, as the ranks read them, with the order that the seed fixes; the loss of every step and the exported weights.

    python -m bench.elastic
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.toy_run import (
    BATCH_ROWS,
    BATCH_TOKENS,
    environment,
    largest_difference,
    launch,
    losses,
    make_parent,
    make_run,
    rows_of_steps,
)
from codetune.artifacts import newest_valid_checkpoint, open_rows, row_order
from codetune.recipe import load_recipe

MINUTES = 6
LAYOUTS = ("ddp", "fsdp2", "zero2", "zero3")
STEPS, SAVE_EVERY, KILLS, TARGET = 30, 5, (12, 22), 1e-4


def sessions(layout: str, path: Path, rows: Path) -> None:
    """World 2, killed; world 1, killed; world 2 to the end."""
    settings = [["training.micro_batch_rows=2"], ["training.micro_batch_rows=1"], ["training.micro_batch_rows=1"]]
    recipe = load_recipe(path)
    for ranks, kill, changes in zip((2, 1, 2), (*KILLS, None), settings, strict=True):
        checkpoint, _ = newest_valid_checkpoint(recipe.checkpoints_dir)
        if checkpoint is not None and layout.startswith("zero"):
            command = [sys.executable, "-m", "codetune.sharding", str(checkpoint)]
            subprocess.run(command, env=environment(), check=True, capture_output=True)
        config = "cpu" if layout == "ddp" and ranks == 1 else layout
        launch(config, ranks, path, rows=rows, kill_at=kill, changes=changes)


def main() -> None:
    """Print both comparisons for each layout."""
    figures: dict[str, Any] = {}
    training = {"save_tokens": SAVE_EVERY * BATCH_TOKENS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parent = make_parent(folder / "parent", vocabulary=2048)
        alone = make_run(folder / "alone", parent, STEPS, **training)
        launch("cpu", 1, alone)
        recipe = load_recipe(alone)
        order = row_order(recipe.seed, open_rows(recipe.rows_dir).block_rows, 0, STEPS * BATCH_ROWS).tolist()
        wanted = {step: set(order[(step - 1) * BATCH_ROWS :][:BATCH_ROWS]) for step in range(1, STEPS + 1)}
        for layout in LAYOUTS:
            path = make_run(folder / layout, parent, STEPS, **training)
            sessions(layout, path, folder / f"{layout}.rows")
            same = rows_of_steps(folder / f"{layout}.rows") == wanted
            pairs = list(zip(losses(path), losses(alone), strict=True))
            relative = abs(pairs[-1][0] - pairs[-1][1]) / pairs[-1][1]
            worst = max(abs(a - b) / b for a, b in pairs)
            weights = largest_difference(path, alone)
            figures[layout] = {"same_rows": same, "final_loss_relative": relative, "worst_loss_relative": worst}
            figures[layout]["weights"] = weights
            print(
                f"{layout:6} ranks 2, 1, 2, killed past steps {KILLS[0]} and {KILLS[1]} of {STEPS}: same rows {same}; final "
                f"loss {relative:.1e} relative, any loss {worst:.1e}, weights {weights:.1e}"
            )
    reached = all(each["same_rows"] and each["worst_loss_relative"] <= TARGET for each in figures.values())
    print(f"same rows in the same steps, losses as left alone: {reached} (to reach: under all four, within {TARGET:g})")
    print("RESULT " + json.dumps({**figures, "reached": reached}))


if __name__ == "__main__":
    main()
