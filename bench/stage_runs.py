"""What scripts that train whole stages share: build and train a recipe on one core, or find it done."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.run import Benchmark, code_hash
from codetune.artifacts import fail, read_json
from codetune.recipe import load_recipe

BASE = Path("runs/tiny/base/model")


def runs_of(script: str) -> Path:
    """Where a script's stages stay: another folder for other code, so that no figure is of models that older code made."""
    path = Path(script)
    return Path("runs") / f"bench-{path.stem.replace('_', '-')}" / code_hash(Benchmark(path.stem, path, "", 0))


def need_base() -> None:
    if not (BASE / "manifest.json").is_file():
        fail(f"{BASE}: not there; run `make base` first")


def build_and_train(recipe: str, settings: Sequence[str]) -> dict[str, Any]:
    """Both commands with these settings, one thread each; the manifest of the finished model.

    Finished rows and models are not made again, so two of these at once, and a script that was ended, cost nothing twice.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    trainer = "codetune.sft" if load_recipe(recipe).need_data().chat is not None else "codetune.train"
    for module, more in (("data_pipelines.build", ["--workers", "1"]), (trainer, [])):
        command = [sys.executable, "-m", module, "--recipe", recipe, "--set", *settings, *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            fail(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return read_json(load_recipe(recipe, list(settings)).model_dir / "manifest.json")
