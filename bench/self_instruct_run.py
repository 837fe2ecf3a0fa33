"""What the scripts about self-instruct share: runs of the recipe `tiny` in a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from codetune.artifacts import fail

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "runs" / "smollm2-135m" / "base" / "model"


def command(runs: Path, *more: str, settings: tuple[str, ...] = ()) -> list[str]:
    """The command of `make self-instruct`, writing below `runs`, with the model that was made before."""
    if not (MODEL / "manifest.json").is_file():
        fail("runs/smollm2-135m/base/model is not there; make it first: make base SIZE=smollm2-135m")
    models = [f"self_instruct.{name}.engine.model={MODEL}" for name in ("questions", "tests", "solutions")]
    recipe = ["--recipe", "recipes/self_instruct/tiny.yaml", "--set", f"runs={runs}", *models, *settings]
    return [sys.executable, "-m", "data_pipelines.self_instruct", *recipe, *more]


def run(words: list[str]) -> str:
    """Run it to its end, in this folder; what it printed."""
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        fail(f"{' '.join(words[1:5])} ended with exit code {done.returncode}: {done.stdout[-500:]} {done.stderr[-2000:]}")
    return done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}


def triplets(runs: Path) -> Path:
    return runs / "tiny" / "self_instruct" / "triplets"
