"""Tokens to steps, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from codetune.recipe import load_recipe
from codetune.steps import derive_steps, rate_fraction


def test_steps_and_accumulation_follow_from_tokens_and_world(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(rows=False))  # 2048 tokens, batches of 256, rows of 64, micro-batch 2, warm-up 512
    steps = derive_steps(recipe, world_size=1)
    assert (steps.total, steps.batch_rows, steps.accumulation, steps.warmup, steps.rows) == (8, 4, 2, 2, 32)
    assert derive_steps(recipe, world_size=2).accumulation == 1
    assert (steps.log_every, steps.save_every, steps.evaluate_every) == (1, 2, 4)


def test_a_world_that_cannot_share_the_batch_is_refused(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(rows=False))
    with pytest.raises(ValueError, match=r"3 ranks cannot share evenly; start a number of ranks out of 1, 2, 4"):
        derive_steps(recipe, world_size=3)


def test_a_micro_batch_that_does_not_divide_is_refused(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(rows=False, **{"training.micro_batch_rows": 3}))
    with pytest.raises(
        ValueError, match=r"micro_batch_rows` is 3, but each of 1 rank\(s\) has 4 rows.*write one of 1, 2, 4"
    ):
        derive_steps(recipe, world_size=1)


def test_a_warm_up_that_takes_every_step_is_refused(make_run: Callable[..., Path]) -> None:
    settings = {"training.train_tokens": 700, "optimizer.warmup_tokens": 512}  # 2 steps of 256, and 2 of warm-up
    with pytest.raises(ValueError, match=r"512 is 2 step\(s\) of 256 tokens, and .* 700 is 2: .* write at most 256"):
        derive_steps(load_recipe(make_run(rows=False, **settings)), world_size=1)
    settings["optimizer.warmup_tokens"] = 256
    assert derive_steps(load_recipe(make_run(rows=False, **settings)), world_size=1).warmup == 1


def test_events_left_open_happen_so_often_in_the_run(make_run: Callable[..., Path]) -> None:
    settings = {"training.log_tokens": None, "training.save_tokens": None, "training.evaluate_tokens": None}
    settings |= {"training.train_tokens": 1000 * 256}
    steps = derive_steps(load_recipe(make_run(rows=False, **settings)), world_size=1)
    assert (steps.log_every, steps.save_every, steps.evaluate_every) == (10, 100, 200)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 4),
        (1, 2 / 4),
        (3, 1.0),  # the last step of the warm-up has the peak
        (4, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 1 / 16))),
        (11, 0.1 + 0.9 * 0.5),  # half of the way down
        (19, 0.1),  # the last step of the run
        (20, 0.1),
    ],
)
def test_the_learning_rate_is_linear_up_then_cosine_down(step: int, expected: float) -> None:
    fraction = rate_fraction(step, total=20, warmup=4, schedule="cosine", final_fraction=0.1)
    assert fraction == pytest.approx(expected, abs=1e-12)


def test_a_constant_schedule_stays_at_the_peak() -> None:
    fractions = [rate_fraction(step, total=9, warmup=2, schedule="constant", final_fraction=0.1) for step in range(9)]
    assert fractions == [0.5] + [1.0] * 8
