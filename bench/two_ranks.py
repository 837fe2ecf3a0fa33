"""One rank against two, under DDP, ZeRO-2, ZeRO-3 and FSDP2, with the same global batch: losses, and the exported weights.

A tiny Llama whose embedding ZeRO-3 shares out, and toy rows, made here; fp32 and the default fused head. Each run is
`codetune.train` through `accelerate launch` with the file of recipes/accelerate, on CPU ranks (gloo): only the device is
another one. What is compared: the training loss of each of 50 steps, and every exported weight, with those of one rank.

    python -m bench.two_ranks
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from bench.toy_run import largest_difference, launch, losses, make_parent, make_run

MINUTES = 4
LAYOUTS = ("ddp", "zero2", "zero3", "fsdp2")
TARGET = 1e-4


def compare(folder: Path, steps: int) -> dict[str, Any]:
    """Largest relative difference of a loss, and largest difference of a weight, per layout."""
    parent = make_parent(folder / "parent", vocabulary=2048)
    alone = make_run(folder / "alone", parent, steps)
    launch("cpu", 1, alone)
    reference = losses(alone)
    figures: dict[str, Any] = {}
    for layout in LAYOUTS:
        path = make_run(folder / layout, parent, steps)
        launch(layout, 2, path)
        ours = losses(path)
        assert len(ours) == len(reference) == steps
        relative = max(abs(a - b) / b for a, b in zip(ours, reference, strict=True))
        weights = largest_difference(path, alone)
        figures[layout] = {"loss_relative": relative, "weights": weights}
        print(
            f"{layout:6} largest relative difference of a loss {relative:.1e}; largest difference of a weight {weights:.1e}"
        )
    print(f"one rank: loss {reference[0]:.4f} at step 1, {reference[-1]:.4f} at step {steps}")
    return figures


def main() -> None:
    """Print the differences."""
    parser = argparse.ArgumentParser(prog="python -m bench.two_ranks")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = compare(Path(name), options.steps)
    worst = max(each["loss_relative"] for each in figures.values())
    print(f"worst: {worst:.1e} relative (to reach: {TARGET:g})")
    print("RESULT " + json.dumps({**figures, "steps": options.steps, "reached": worst <= TARGET}))


if __name__ == "__main__":
    main()
