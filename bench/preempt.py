"""Two ranks asked to stop at twenty random moments, also while saving and measuring, against the same run left alone.

A tiny Llama and toy rows, made here; `codetune.train` on two CPU processes (torchrun, gloo). SIGTERM goes to one rank alone,
or to torchrun, which passes it on to both. After each try: is there a sealed checkpoint of the step at which it stopped, is
anything half-written left, are all checkpoints whole? The next try goes on from there, the last one to the end, and the
final weights are compared with those of a run that nobody stopped, bit for bit. Seconds are from the signal to the manifest,
which is written last, as the file system has them; they are of these toys' disk and steps, not a cluster's.

    python -m bench.preempt
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bench.toy_run import BATCH_TOKENS, make_parent, make_run
from codetune import artifacts
from codetune.checkpoints import numbered_checkpoints
from codetune.recipe import Recipe, load_recipe
from codetune.stopping import ENDED

MINUTES = 10
STEPS, SAVE_EVERY, EVALUATE_EVERY, HELD_OUT_SAMPLES = 2000, 7, 10, 256
MOMENTS = ("a step", "a save", "a step", "an evaluation")  # in turns


def start(path: Path) -> subprocess.Popen[bytes]:
    source = str(Path(__file__).parents[1] / "src")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "codetune.train", "--recipe", str(path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Watch:
    """What the run has written so far."""

    def __init__(self, recipe: Recipe, process: subprocess.Popen[bytes]) -> None:
        self.recipe, self.process = recipe, process

    def lines(self) -> list[dict[str, Any]]:
        path = self.recipe.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def until(self, condition: Any) -> None:
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended by itself with code {self.process.returncode}")
            time.sleep(0.0005)

    def saving(self) -> bool:
        return any(self.recipe.checkpoints_dir.glob(".incomplete-checkpoint-*/checkpoint-*"))

    def measuring(self) -> bool:
        """The newest line is the training line of a step that is measured: its held-out losses come next."""
        last = self.lines()[-1]
        return "loss" in last and last["step"] % EVALUATE_EVERY == 0


def one_try(path: Path, moment: str, to_launcher: bool, draw: random.Random) -> dict[str, Any]:
    """Start the run, ask it to stop at such a moment, and look at what it leaves.

    Raises:
        RuntimeError: it did not stop as asked, or left anything that is not whole.
    """
    recipe = load_recipe(path)
    process = start(path)
    watch = Watch(recipe, process)
    (recipe.run_dir / ENDED).unlink(missing_ok=True)
    newest, _ = artifacts.newest_valid_checkpoint(recipe.checkpoints_dir)
    first = 1 if newest is None else int(newest.name.removeprefix("checkpoint-")) + 1
    watch.until(lambda: (lines := watch.lines()) and lines[-1]["step"] >= first)
    time.sleep(draw.uniform(0.0, 0.5))
    watch.until({"a step": lambda: True, "a save": watch.saving, "an evaluation": watch.measuring}[moment])
    ranks = psutil.Process(process.pid).children()
    asked = time.time()
    os.kill(process.pid if to_launcher else draw.choice(ranks).pid, signal.SIGTERM)
    process.wait(timeout=120)
    ended = artifacts.read_json(recipe.run_dir / ENDED)
    found = numbered_checkpoints(recipe.checkpoints_dir)
    problems = [f"{folder.name}: {why}" for folder in found if (why := artifacts.why_invalid(folder)) is not None]
    problems += [f"{folder.name} is left" for folder in recipe.checkpoints_dir.glob(".*checkpoint*")]
    if (ended["state"], ended["reason"], ended["checkpoint"]) != ("stopped", "SIGTERM", found[-1].name):
        problems.append(f"it ended as {ended}, and the newest checkpoint is {found[-1].name}")
    if problems:
        raise RuntimeError("; ".join(problems))
    sealed = (found[-1] / artifacts.MANIFEST).stat().st_mtime
    return {"moment": moment, "step": found[-1].name, "seconds": max(sealed - asked, 0.0)}


def main() -> None:
    """Print each try, and the comparison."""
    parser = argparse.ArgumentParser(prog="python -m bench.preempt")
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    settings = {"save_tokens": SAVE_EVERY * BATCH_TOKENS, "evaluate_tokens": EVALUATE_EVERY * BATCH_TOKENS}
    with tempfile.TemporaryDirectory() as name:
        parent = make_parent(Path(name) / "parent")
        alone, stopped = (
            make_run(Path(name) / run, parent, STEPS, HELD_OUT_SAMPLES, **settings) for run in ("alone", "stopped")
        )
        if start(alone).wait() != 0:
            raise RuntimeError("the run that was left alone failed")
        tries = []
        for number in range(options.tries):
            to_launcher = number % 3 == 2
            tries.append(one_try(stopped, MOMENTS[number % len(MOMENTS)], to_launcher, draw))
            asked = "torchrun" if to_launcher else "one rank"
            print(
                "try {}: SIGTERM to {} in {moment}, {step} sealed after {seconds:.3f} s".format(
                    number + 1, asked, **tries[-1]
                )
            )
        if start(stopped).wait() != 0:
            raise RuntimeError("the run that was stopped did not end")
        weights = [(load_recipe(path).model_dir / "model.safetensors").read_bytes() for path in (alone, stopped)]
    seconds = [found["seconds"] for found in tries]
    equal = weights[0] == weights[1]
    print(
        f"{len(tries)} of {options.tries} tries: a sealed checkpoint of the last step, nothing half-written (to reach: all)"
    )
    print(f"signal to seal: median {statistics.median(seconds):.3f} s, longest {max(seconds):.3f} s")
    print(f"final weights: {'bit-identical' if equal else 'different'} (to reach: bit-identical)")
    figures = {"tries": options.tries, "sealed": len(tries), "identical": equal}
    figures |= {"median_seconds": round(statistics.median(seconds), 3), "longest_seconds": round(max(seconds), 3)}
    print("RESULT " + json.dumps(figures | {"reached": equal and len(tries) == options.tries}))


if __name__ == "__main__":
    main()
