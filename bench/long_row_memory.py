"""Peak memory of a 16,384-token row: the fused loss head against plain logits, everything else the same.

A model of 9M parameters with a vocabulary of 32,016; one row of eight packed documents, kept apart by sdpa; activation
checkpointing; one training step, its peak above what rests between steps (weights, optimizer's state), as torch's own
allocator counts it. Both steps are made in this run, each in a process of its own, and their losses are compared.

    python -m bench.long_row_memory
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch

from bench.step_speed import MemoryMeter
from bench.tracked import make_batch, make_model, make_optimizer, step
from codetune.memory import Job
from codetune.model import bf16_is_fast
from codetune.shape import ModelShape

MINUTES = 8
TARGET = 0.25
SHAPE = ModelShape(128, 4, 4, 4, 352, 32016, 16384, 32)
DOCUMENTS = 8


def measure(fused: bool, sequence_tokens: int) -> dict[str, float]:
    """Peak, seconds and loss of one step."""
    job = Job(SHAPE, sequence_tokens, fused_head=fused, checkpointing=True, bf16=bf16_is_fast(), gpu=False)
    torch.manual_seed(0)
    model = make_model(job)
    optimizer = make_optimizer(model)
    batch = make_batch(job, DOCUMENTS)
    short = Job(SHAPE, 64, fused_head=fused, checkpointing=True, bf16=job.bf16, gpu=False)
    step(short, model, optimizer, [make_batch(short, 2)])  # makes the optimizer's state
    losses: list[float] = []
    forward = model.forward

    def noted(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        losses.append(float(out.loss.detach()))
        return out

    model.forward = noted
    meter, start = MemoryMeter(), time.perf_counter()
    step(job, model, optimizer, [batch])
    seconds = time.perf_counter() - start
    return {"peak_bytes": meter.stop(), "seconds": round(seconds, 1), "loss": losses[0]}


def main() -> None:
    """Print both peaks and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m bench.long_row_memory")
    parser.add_argument("--only", choices=("fused", "logits"), help="measure one side and print it as JSON")
    parser.add_argument("--sequence-tokens", type=int, default=16384)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only == "fused", options.sequence_tokens)))
        return
    sides = {}
    for side in ("fused", "logits"):
        command = [sys.executable, "-m", "bench.long_row_memory", "--only", side]
        command += ["--sequence-tokens", str(options.sequence_tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        sides[side] = json.loads(done.stdout.splitlines()[-1])
        facts = sides[side]
        peak = f"{facts['peak_bytes'] / 2**20:>8,.0f} MiB"
        print(f"{side:<7} peak above resting {peak}, {facts['seconds']} s, loss {facts['loss']:.5f}")
    ratio = sides["fused"]["peak_bytes"] / sides["logits"]["peak_bytes"]
    difference = abs(sides["fused"]["loss"] - sides["logits"]["loss"])
    setting = (
        f"{SHAPE.parameters / 1e6:.1f}M parameters, {SHAPE.vocabulary:,} pieces, {'bf16' if bf16_is_fast() else 'fp32'}"
    )
    print(
        f"{setting}, one row of {options.sequence_tokens:,} tokens: fused over logits {ratio:.3f} (to reach: under {TARGET})"
    )
    print(f"losses {difference:.1e} apart")
    print("RESULT " + json.dumps({**sides, "ratio": round(ratio, 4), "reached": ratio < TARGET and difference < 1e-2}))


if __name__ == "__main__":
    main()
