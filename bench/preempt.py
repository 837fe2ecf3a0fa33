"""Two ranks asked to stop at twenty random moments, also while saving and measuring, against the same run left alone.

A tiny Llama and toy rows, made here; `codetune.train` on two CPU processes that talk by gloo, started as a launcher starts
them (its environment, but from a process that has the libraries loaded, which saves minutes). SIGTERM goes to one rank
alone or, as torchrun passes it on, to both. After each try: do both end with code 75, is there a sealed checkpoint of the
step at which they stopped, is anything half-written left, are all checkpoints whole? The next try goes on from there, the
last one to the end, and the final weights are compared with those of a run that nobody stopped, bit for bit. Seconds are
from the signal to the manifest, which is written last, as the file system has them: of these toys' disk and steps.

    python -m bench.preempt
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.toy_run import BATCH_TOKENS, make_parent, make_run
from codetune import artifacts
from codetune.checkpoints import numbered_checkpoints
from codetune.recipe import load_recipe
from codetune.stopping import ENDED, EXIT_CODES

MINUTES = 4
RANKS = 2
STEPS, SAVE_EVERY, EVALUATE_EVERY, HELD_OUT_SAMPLES = 900, 7, 10, 256
MOMENTS = ("a step", "a save", "a step", "an evaluation")  # in turns


def rank_main(path: str, rank: int, port: int) -> None:
    """What a launcher would have started."""
    import torch

    from codetune.train import main as command

    with open(os.devnull, "w", encoding="utf-8") as sys.stdout, open(os.devnull, "w", encoding="utf-8") as sys.stderr:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        command(["--recipe", path])


class Run:
    """Two ranks at work on a recipe, and what they have written so far."""

    def __init__(self, path: Path, context: Any) -> None:
        self.recipe = load_recipe(path)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = [context.Process(target=rank_main, args=(str(path), rank, port)) for rank in range(RANKS)]
        for process in self.ranks:
            process.start()

    def wait(self) -> list[int]:
        """Exit codes of the ranks."""
        for process in self.ranks:
            process.join(300)
        return [process.exitcode for process in self.ranks]

    def lines(self) -> list[dict[str, Any]]:
        path = self.recipe.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def until(self, condition: Any) -> None:
        while not condition():
            if not all(process.is_alive() for process in self.ranks):
                raise RuntimeError(f"the run ended by itself with codes {self.wait()}")
            time.sleep(0.0005)

    def saving(self) -> bool:
        return any(self.recipe.checkpoints_dir.glob(".incomplete-checkpoint-*/checkpoint-*"))

    def measuring(self) -> bool:
        """The newest line is the training line of a step that is measured: its held-out losses come next."""
        last = self.lines()[-1]
        return "loss" in last and last["step"] % EVALUATE_EVERY == 0


def one_try(path: Path, context: Any, moment: str, both: bool, draw: random.Random) -> dict[str, Any]:
    """Start the run, ask it to stop at such a moment, and look at what it leaves.

    Raises:
        RuntimeError: it did not stop as asked, or left anything that is not whole.
    """
    recipe = load_recipe(path)
    newest, _ = artifacts.newest_valid_checkpoint(recipe.checkpoints_dir)
    first = 1 if newest is None else int(newest.name.removeprefix("checkpoint-")) + 1
    run = Run(path, context)
    run.until(lambda: (lines := run.lines()) and lines[-1]["step"] >= first)
    time.sleep(draw.uniform(0.0, 0.3))
    run.until({"a step": lambda: True, "a save": run.saving, "an evaluation": run.measuring}[moment])
    asked = time.time()
    for process in run.ranks if both else [draw.choice(run.ranks)]:
        os.kill(process.pid, signal.SIGTERM)
    codes = run.wait()
    ended = artifacts.read_json(recipe.run_dir / ENDED)
    found = numbered_checkpoints(recipe.checkpoints_dir)
    problems = [f"{folder.name}: {why}" for folder in found if (why := artifacts.why_invalid(folder)) is not None]
    problems += [f"{folder.name} is left" for folder in recipe.checkpoints_dir.glob(".*checkpoint*")]
    problems += [f"the ranks ended with {codes}"] if codes != [EXIT_CODES["stopped"]] * RANKS else []
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
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the whole run ({STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    settings = {"save_tokens": SAVE_EVERY * BATCH_TOKENS, "evaluate_tokens": EVALUATE_EVERY * BATCH_TOKENS}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["codetune.train"])
    with tempfile.TemporaryDirectory() as name:
        parent = make_parent(Path(name) / "parent")
        alone, stopped = (
            make_run(Path(name) / run, parent, options.steps, HELD_OUT_SAMPLES, **settings) for run in ("alone", "stopped")
        )
        if Run(alone, context).wait() != [0] * RANKS:
            raise RuntimeError("the run that was left alone failed")
        tries = []
        for number in range(options.tries):
            both = number % 3 == 2
            tries.append(one_try(stopped, context, MOMENTS[number % len(MOMENTS)], both, draw))
            asked = "both ranks" if both else "one rank"
            print(
                "try {}: SIGTERM to {} in {moment}, {step} sealed after {seconds:.3f} s".format(
                    number + 1, asked, **tries[-1]
                )
            )
        if Run(stopped, context).wait() != [0] * RANKS:
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
