"""`make plan`'s memory model against measured peaks, and against torch's tracker under fake tensors at 7B and 34B.

Measured: six small models on the CPU that the closed forms were not written from, one through the trainer itself; the most
bytes torch's allocator had in use in a step, above what rests between steps (weights, optimizer's state). Tracked: the
model code of transformers at the real sizes, forward, backward and update of two micro-batches, without its memory. What is
compared is the part above resting as well as the whole: at 7B the weights and their optimizer alone would make any whole
look right.

    python -m bench.plan_memory
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from bench import step_setting, step_speed
from bench.tracked import make_batch, make_model, make_optimizer, step, tracked_peak
from codetune.memory import Job, peak_memory
from codetune.model import bf16_is_fast
from codetune.shape import ModelShape, known_shape

MINUTES = 6
BAND = 0.15


def small_jobs() -> dict[str, Job]:
    """Held out: shapes, rows and settings that no closed form was fitted to."""
    narrow = ModelShape(192, 6, 6, 6, 512, 2048, 2048, 32)
    grouped = ModelShape(320, 3, 10, 2, 896, 6000, 2048, 32)
    wide = ModelShape(256, 4, 4, 4, 704, 32016, 2048, 64)
    tied = ModelShape(384, 5, 6, 3, 1024, 12000, 2048, 64, tied=True)
    return {
        "fp32, logits, 4 rows of 256": Job(narrow, 256, rows=4, bf16=False, fused_head=False, gpu=False),
        "bf16, fused, checkpointing, 1 row of 1,536": Job(grouped, 1536, checkpointing=True, gpu=False),
        "bf16, fused, 32,016 pieces, 2 accumulated": Job(wide, 768, accumulation=2, gpu=False),
        "fp32, fused, tied, checkpointing, 2 accumulated": Job(
            tied, 512, rows=2, bf16=False, checkpointing=True, accumulation=2, gpu=False
        ),
        "bf16 weights, logits, grouped, 2 rows of 640": Job(
            grouped, 640, rows=2, weights_bf16=True, fused_head=False, gpu=False
        ),
    }


def measured_peak(job: Job) -> int:
    """Most bytes above resting in the third step."""
    torch.manual_seed(0)
    model = make_model(job)
    optimizer = make_optimizer(model)
    batches = [make_batch(job) for _ in range(job.accumulation)]
    for _ in range(2):
        step(job, model, optimizer, batches)
    meter = step_speed.MemoryMeter()
    step(job, model, optimizer, batches)
    return meter.stop()


def trainer_job(bf16: bool) -> Job:
    """The model and the step of `bench/step_speed.py`, which goes through the trainer."""
    shape = step_setting.SHAPE
    heads, hidden = shape["num_attention_heads"], shape["hidden_size"]
    layers, intermediate, tokens = shape["num_hidden_layers"], shape["intermediate_size"], step_setting.SEQUENCE_TOKENS
    model = ModelShape(hidden, layers, heads, heads, intermediate, step_setting.VOCABULARY, tokens, hidden // heads)
    accumulation = step_setting.BATCH_ROWS // step_setting.MICRO_ROWS
    return Job(model, tokens, rows=step_setting.MICRO_ROWS, accumulation=accumulation, bf16=bf16, gpu=False)


def large_jobs() -> dict[str, Job]:
    seven, thirty_four = known_shape("7b", infill_tokens=True), known_shape("34b", infill_tokens=False)
    assert seven is not None and thirty_four is not None
    return {
        "7b, 2 rows of 4,096, checkpointing, fused": Job(seven, 4096, rows=2, checkpointing=True, accumulation=2, gpu=False),
        "7b, 1 row of 4,096, fused": Job(seven, 4096, gpu=False),
        "7b, 1 row of 16,384, checkpointing, bf16 weights": Job(
            seven, 16384, checkpointing=True, weights_bf16=True, gpu=False
        ),
        "7b, 1 row of 4,096, checkpointing, logits": Job(seven, 4096, checkpointing=True, fused_head=False, gpu=False),
        "34b, 1 row of 4,096, checkpointing, fused": Job(thirty_four, 4096, checkpointing=True, accumulation=2, gpu=False),
        "34b, 1 row of 4,096, bf16 weights, logits": Job(thirty_four, 4096, weights_bf16=True, fused_head=False, gpu=False),
    }


def compare(name: str, job: Job, above_resting: int) -> dict[str, float]:
    """Print one line, and return both deviations."""
    memory = peak_memory(job)
    planned = memory.total - memory.resting
    deviation = planned / above_resting - 1
    whole = memory.total / (above_resting + memory.resting) - 1
    sizes = f"{planned / 2**20:>11,.1f}{above_resting / 2**20:>11,.1f} MiB"
    print(f"{name:<52}{sizes}{deviation:>+8.1%}{whole:>+8.1%}  {memory.moment}", flush=True)
    return {"planned": planned, "reference": above_resting, "deviation": round(deviation, 4), "whole": round(whole, 4)}


def main() -> None:
    """Print every comparison and the widest of each kind."""
    argparse.ArgumentParser(prog="python -m bench.plan_memory").parse_args()
    measured, tracked = {}, {}
    print(
        f"{'above resting: planned, then the reference':<52}{'plan':>11}{'reference':>15}{'above':>8}{'whole':>8}  peak at"
    )
    print("measured on this CPU:")
    for name, job in small_jobs().items():
        measured[name] = compare(name, job, measured_peak(job))
    bf16 = bf16_is_fast()
    with tempfile.TemporaryDirectory() as folder:
        peak = step_speed.peak_of_trainer(Path(folder), bf16)
    measured["trainer"] = compare("the trainer, 4 rows of 256, 2 accumulated", trainer_job(bf16), peak)
    print("tracked under fake tensors:")
    for name, job in large_jobs().items():
        parameters, peak = tracked_peak(job)
        assert parameters == job.parameters
        tracked[name] = compare(name, job, peak - peak_memory(job).resting)
    widest = {
        kind: max(abs(line["deviation"]) for line in lines.values())
        for kind, lines in (("measured", measured), ("tracked", tracked))
    }
    reached = max(widest.values()) <= BAND
    both = f"measured {widest['measured']:.1%}, tracked {widest['tracked']:.1%}"
    print(f"widest deviation above resting: {both} (to reach: at most {BAND:.0%})")
    print("RESULT " + json.dumps({"widest": widest, "measured": measured, "tracked": tracked, "reached": reached}))


if __name__ == "__main__":
    main()
