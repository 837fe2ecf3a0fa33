"""Killed with SIGKILL in mid-training and started again, against the same run left alone.

A tiny Llama and toy rows, made here; `codetune.train` as a command, killed at several moments (at random steps, and while a
checkpoint is being written). What is compared: the final weights, bit for bit, and the rows that the last session read
against the rows that were left to read.

    python -m bench.resume
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.toy_run import BATCH_ROWS, BATCH_TOKENS, make_parent, make_run
from codetune import artifacts
from codetune.recipe import load_recipe

MINUTES = 2
STEPS, SAVE_EVERY = 150, 10


def start(path: Path) -> subprocess.Popen[bytes]:
    source = str(Path(__file__).parents[1] / "src")
    command = [sys.executable, "-m", "codetune.train", "--recipe", str(path)]
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill_at(path: Path, step: int, while_saving: bool) -> None:
    """Start the run and kill it at a step, or while the checkpoint of a step is being written."""
    recipe = load_recipe(path)
    process = start(path)
    staging = recipe.checkpoints_dir / f".incomplete-checkpoint-{step}"
    metrics = recipe.run_dir / "metrics.jsonl"
    while process.poll() is None:
        if staging.exists() if while_saving else metrics.exists() and f'"step": {step},' in metrics.read_text():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the run ended by itself with code {process.returncode} before step {step}")


def digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(prog="python -m bench.resume")
    parser.add_argument("--kills", type=int, default=4)
    options = parser.parse_args()
    draw = random.Random(0)
    steps = sorted(draw.sample(range(15, STEPS - 15), options.kills))
    with tempfile.TemporaryDirectory() as name:
        parent = make_parent(Path(name) / "parent")
        settings = {"steps": STEPS, "save_tokens": SAVE_EVERY * BATCH_TOKENS}
        alone, killed = (make_run(Path(name) / run, parent, **settings) for run in ("alone", "killed"))
        if start(alone).wait() != 0:
            raise RuntimeError("the run that was left alone failed")
        for count, step in enumerate(steps):
            saving = count % 2 == 1
            kill_at(killed, -(-step // SAVE_EVERY) * SAVE_EVERY if saving else step, while_saving=saving)
        if start(killed).wait() != 0:
            raise RuntimeError("the run that was killed did not end")
        models = [load_recipe(path).model_dir for path in (alone, killed)]
        equal = digest(models[0]) == digest(models[1])
        session = artifacts.read_json(models[1] / artifacts.MANIFEST)["session"]
    resumed = int(session["resumed_from"].removeprefix("checkpoint-"))
    needed, read = (STEPS - resumed) * BATCH_ROWS, session["rows_read_by_main_rank"]
    verdict = "bit-identical" if equal else "different"
    print(f"killed {options.kills} times near steps {steps} of {STEPS}: final weights {verdict} (to reach: bit-identical)")
    print(f"last session, from step {resumed}: {read} rows read, {needed} needed (to reach: equal)")
    figures = {"identical": equal, "kills": options.kills, "rows_read": read, "rows_needed": needed}
    print("RESULT " + json.dumps(figures | {"reached": equal and read == needed}))


if __name__ == "__main__":
    main()
