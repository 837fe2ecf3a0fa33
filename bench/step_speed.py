"""What the trainer costs: a training step through `codetune.train`'s trainer against a bare PyTorch loop.

Same 9M-parameter Llama, same batches, same fused head, same precision and threads, in one process, in turns: after each step
of the trainer the bare loop makes one of its own, so that what else the machine does meets both alike. What is compared:
tokens per second (all tokens over all seconds of the counted steps, and beside it the ratio of the medians), and the most
memory in use above resting during a step, as torch's own allocator counts it: every allocation and release that the profiler
reports on a CPU, CUDA's statistics on a GPU.

    python -m bench.step_speed
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.step_setting import (
    BATCH_ROWS,
    MICRO_ROWS,
    SEQUENCE_TOKENS,
    Batches,
    make_collator,
    make_model,
    make_recipe,
    make_trainer,
    now,
)
from codetune.model import bf16_is_fast
from codetune.steps import derive_steps, rate_fraction

MINUTES = 3
TARGET_RATIO, TARGET_MEMORY = 0.95, 1.05


def run_trainer(folder: Path, steps: int, bf16: bool, on_step_end: Callable[[int], None]) -> None:
    """Train with the trainer; `on_step_end` hears of each step."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            on_step_end(state.global_step)

    trainer = make_trainer(folder, steps, bf16)
    trainer.add_callback(Ends())
    trainer.train()


def bare_steps(steps: int, bf16: bool) -> Iterator[None]:
    """The same steps in a loop that one would write by hand; each `next` makes one."""
    plan = derive_steps(make_recipe(Path("unused"), steps), 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model().to(device)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-5, fused=True)
    loader = iter(torch.utils.data.DataLoader(Batches(plan.rows), batch_size=MICRO_ROWS, collate_fn=make_collator()))
    for step in range(steps):
        rate = 1e-3 * rate_fraction(step, total=steps, warmup=plan.warmup, schedule="cosine", final_fraction=1 / 30)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = [next(loader) for _ in range(plan.accumulation)]
        count = sum(batch["labels"][:, 1:].ne(-100).sum() for batch in batches)
        for batch in batches:
            inputs = {name: batch[name].to(device) for name in ("input_ids", "labels", "position_ids")}
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
                loss = model(**inputs, fused_lm_head=True, num_items_in_batch=count).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


def time_in_turns(folder: Path, steps: int, bf16: bool) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each step of the trainer and of the bare loop, by the wall and of the processor, each (steps - 2, 2)."""
    bare, ours, theirs = bare_steps(steps, bf16), [], []
    last = [now()]

    def turn(_: int) -> None:
        start = now()
        ours.append(start - last[0])
        next(bare)
        last[0] = now()
        theirs.append(last[0] - start)

    run_trainer(folder, steps, bf16, turn)
    return np.array(ours[2:]), np.array(theirs[2:])  # the first two warm up


def peak_of_trainer(folder: Path, bf16: bool) -> int:
    """Most bytes above resting in the fourth step."""
    meters: list[MemoryMeter] = []
    peaks: list[int] = []

    def watch(step: int) -> None:
        if step == 3:
            meters.append(MemoryMeter())
        elif step == 4:
            peaks.append(meters[0].stop())

    run_trainer(folder, 5, bf16, watch)
    return peaks[0]


def peak_of_bare_loop(bf16: bool) -> int:
    bare = bare_steps(5, bf16)
    for _ in range(3):
        next(bare)
    meter = MemoryMeter()
    next(bare)
    return meter.stop()


class MemoryMeter:
    """The most bytes that torch had allocated above where it started."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.resting = torch.cuda.memory_allocated()
        else:
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()

    def stop(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.resting
        self.profiler.__exit__(None, None, None)
        results = self.profiler.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
        events = [event for event in results.events() if event.name() == "[memory]"]
        current = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            current += event.nbytes()
            peak = max(peak, current)
        return peak


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_speed")
    parser.add_argument("--steps", type=int, default=40, help="of each side (40)")
    options = parser.parse_args()
    bf16, tokens = bf16_is_fast(), BATCH_ROWS * SEQUENCE_TOKENS
    parameters = sum(parameter.numel() for parameter in make_model().parameters())
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = time_in_turns(Path(folder), options.steps, bf16)
        our_peak, bare_peak = peak_of_trainer(Path(folder), bf16), peak_of_bare_loop(bf16)
    (wall, processor), (bare_wall, bare_processor) = ours.sum(axis=0), bare.sum(axis=0)
    speed, reference = len(ours) * tokens / wall, len(bare) * tokens / bare_wall
    ratio, processor_ratio, memory_ratio = speed / reference, bare_processor / processor, our_peak / bare_peak
    median_ratio = np.median(bare[:, 0]) / np.median(ours[:, 0])
    setting = f"{'bf16' if bf16 else 'fp32'}, {torch.get_num_threads()} thread(s), {len(ours)} steps of each"
    print(f"{parameters / 1e6:.1f}M parameters, {tokens} tokens a step, {setting}")
    print(f"tokens/s: trainer {speed:,.0f}, bare loop {reference:,.0f}: ratio {ratio:.3f} (to reach: {TARGET_RATIO})")
    print(f"the same by the median step, which one disturbed step does not move: ratio {median_ratio:.3f}")
    print(f"the same by seconds of the processor, which a busy machine disturbs less: ratio {processor_ratio:.3f}")
    peaks = f"trainer {our_peak / 2**20:.1f} MB, bare loop {bare_peak / 2**20:.1f} MB: ratio {memory_ratio:.3f}"
    print(f"peak above resting: {peaks} (to reach: at most {TARGET_MEMORY})")
    figures = {
        "speed_ratio": round(float(ratio), 4),
        "tokens_per_second": round(float(speed)),
        "bare_tokens_per_second": round(float(reference)),
    }
    figures |= {
        "median_ratio": round(float(median_ratio), 4),
        "processor_ratio": round(float(processor_ratio), 4),
        "memory_ratio": round(memory_ratio, 4),
        "peak_bytes": our_peak,
        "bare_peak_bytes": bare_peak,
    }
    reached = ratio >= TARGET_RATIO and memory_ratio <= TARGET_MEMORY
    print("RESULT " + json.dumps(figures | {"steps": len(ours), "reached": bool(reached)}))


if __name__ == "__main__":
    main()
