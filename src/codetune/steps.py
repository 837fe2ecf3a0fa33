"""From tokens to steps: how many, how they are shared out over the ranks, and the learning rate of each.

What comes in: a recipe, whose durations are tokens (slots of rows, padding included), and the number of ranks. What goes
out: `Steps`. A global batch is the same rows whatever the world, so that a run may go on with other ranks, another
micro-batch or another accumulation; a world that cannot share a batch evenly is refused, never rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from codetune.recipe import Recipe


@dataclass(frozen=True)
class Steps:
    """The run in optimizer steps."""

    total: int
    warmup: int
    batch_rows: int  # rows of one step, over all ranks
    micro_batch_rows: int  # rows of one forward and backward, on one rank
    accumulation: int
    world_size: int
    log_every: int
    evaluate_every: int
    save_every: int
    batch_tokens: int
    keep_every: int | None = None  # checkpoints that are never deleted

    @property
    def rows(self) -> int:
        """Rows that the whole run reads."""
        return self.total * self.batch_rows


def derive_steps(recipe: Recipe, world_size: int) -> Steps:
    """Steps and accumulation for the world at hand; a last part of a batch is left out.

    Example: train_tokens 8192, batch_tokens 2048, rows of 256, micro-batch 2, 2 ranks: 4 steps of 8 rows, accumulation 2

    Raises:
        ValueError: the global batch does not divide by ranks times micro-batch, or the warm-up takes the whole run.
    """
    training, data = recipe.need_training(), recipe.need_data()
    batch_rows = training.batch_tokens // data.sequence_tokens
    micro = training.micro_batch_rows
    if batch_rows % world_size:
        fitting = ", ".join(str(n) for n in _divisors(batch_rows))
        raise ValueError(
            f"`training.batch_tokens` {training.batch_tokens} is {batch_rows} rows of {data.sequence_tokens} tokens, which "
            f"{world_size} ranks cannot share evenly; start a number of ranks out of {fitting}"
        )
    if (batch_rows // world_size) % micro:
        fitting = ", ".join(str(n) for n in _divisors(batch_rows // world_size))
        raise ValueError(
            f"`training.micro_batch_rows` is {micro}, but each of {world_size} rank(s) has {batch_rows // world_size} "
            "rows of a "
            f"batch; write one of {fitting}"
        )
    total = training.train_tokens // training.batch_tokens
    warmup_tokens = recipe.need_optimizer().warmup_tokens
    warmup = math.ceil(warmup_tokens / training.batch_tokens)
    if warmup >= total:
        raise ValueError(
            f"`optimizer.warmup_tokens` {warmup_tokens} is {warmup} step(s) of {training.batch_tokens} tokens, and "
            f"`training.train_tokens` {training.train_tokens} is {total}: nothing is left after the warm-up; write at most "
            f"{max(total - 1, 0) * training.batch_tokens} for the warm-up"
        )
    return Steps(
        total=total,
        warmup=warmup,
        batch_rows=batch_rows,
        micro_batch_rows=micro,
        accumulation=batch_rows // world_size // micro,
        world_size=world_size,
        log_every=_interval(training.log_tokens, training.batch_tokens, total, times=100),
        evaluate_every=_interval(training.evaluate_tokens, training.batch_tokens, total, times=5),
        save_every=_interval(training.save_tokens, training.batch_tokens, total, times=10),
        batch_tokens=training.batch_tokens,
        keep_every=None if training.keep_tokens is None else max(1, round(training.keep_tokens / training.batch_tokens)),
    )


def rate_fraction(step: int, *, total: int, warmup: int, schedule: str, final_fraction: float) -> float:
    """Learning rate of one step (the first is 0) over the peak: linear to the peak, then down to `final_fraction`.

    The last warm-up step has the peak and the last step of the run has exactly `final_fraction` (paper Sec. 2.6).

    Example: total 10, warmup 2, cosine, final 0: 0.5, 1.0, then 0.5 * (1 + cos(pi / 8)) = 0.962, ..., 0.0
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup + 1) / max(total - warmup, 1), 1.0)
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _interval(tokens: int | None, batch_tokens: int, total: int, times: int) -> int:
    """Steps between two events: every so many tokens, or so many times in the run."""
    return max(1, round(tokens / batch_tokens) if tokens is not None else math.ceil(total / times))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
