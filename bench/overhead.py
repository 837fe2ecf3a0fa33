"""What ledger and guards cost: a training step with them against one of the library's trainer without, in turns.

Same 9M-parameter Llama, batches, fused head and arguments, both trained by `transformers.Trainer` in one process. Each makes
a step while the other waits, so that what else the machine does meets both alike. With: the mixin (ledger, finite check,
spikes, requests to stop, metrics file), no probes. Without: the library's trainer alone. Whichever of the two comes first in
a turn may have it easier, so each is first in one half of the steps; and two trainers without measure each other in the same
way, which says how far from nothing such a figure is by itself.

    python -m bench.overhead
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from bench.step_setting import (
    BATCH_ROWS,
    SEQUENCE_TOKENS,
    Batches,
    make_collator,
    make_model,
    make_recipe,
    make_trainer,
    now,
)
from codetune import adapter
from codetune.model import bf16_is_fast
from codetune.steps import derive_steps

MINUTES = 5
TARGET_PERCENT = 2.0
WARM_UP = 3  # steps that are not counted


class Turns:
    """Lets one of two threads run at a time, each for one step."""

    def __init__(self) -> None:
        self.turn, self.done = 0, False
        self.changed = threading.Condition()

    def take(self, side: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == side or self.done)

    def give(self, side: int) -> None:
        with self.changed:
            self.turn = 1 - side
            self.changed.notify_all()

    def finish(self, side: int) -> None:
        self.give(side)
        with self.changed:
            self.done = True
            self.changed.notify_all()


class Meter(TrainerCallback):
    """Seconds of each step, by the wall and of the processor; between steps the other side has its turn."""

    def __init__(self, turns: Turns, side: int) -> None:
        self.turns, self.side = turns, side
        self.seconds: list[np.ndarray] = []
        self.start = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.start)
        self.turns.give(self.side)
        self.turns.take(self.side)
        self.start = now()


class BareTrainer(Trainer):
    """The library's trainer with the fused head, and nothing else."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {name: value for name, value in inputs.items() if name not in ("row_numbers", "document_tokens")}
        return super().compute_loss(model, {**inputs, "fused_lm_head": True}, return_outputs, num_items_in_batch)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.control.should_save = False


def make_bare_trainer(folder: Path, steps: int, bf16: bool) -> BareTrainer:
    recipe = make_recipe(folder, steps)
    plan = derive_steps(recipe, 1)
    trainer = BareTrainer(
        model=make_model(),
        args=adapter.training_arguments(recipe, plan, bf16),
        train_dataset=Batches(plan.rows),
        data_collator=make_collator(),
    )
    adapter.drop_default_printers(trainer)
    return trainer


def steps_in_turns(trainers: list[Any]) -> list[np.ndarray]:
    """Seconds of each step of both, (steps, 2) each; the first ones are left out."""
    turns = Turns()
    meters = [Meter(turns, side) for side in range(2)]
    failures: list[BaseException] = []

    def side(number: int) -> Callable[[], None]:
        def run() -> None:
            turns.take(number)
            meters[number].start = now()
            try:
                trainers[number].add_callback(meters[number])
                trainers[number].train()
            except BaseException as error:  # noqa: BLE001  (raised again by the main thread)
                failures.append(error)
            finally:
                turns.finish(number)

        return run

    threads = [threading.Thread(target=side(number)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [np.array(meter.seconds[WARM_UP:]) for meter in meters]


def percent_slower(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How much longer a step of `ours` takes, (steps, 2) each, in four ways of saying it."""
    return {
        "median": 100 * float(np.median(ours[:, 0]) / np.median(theirs[:, 0]) - 1),
        "median_of_pairs": 100 * float(np.median(ours[:, 0] / theirs[:, 0]) - 1),
        "all_steps": 100 * float(ours[:, 0].sum() / theirs[:, 0].sum() - 1),
        "processor": 100 * float(ours[:, 1].sum() / theirs[:, 1].sum() - 1),
    }


def main() -> None:
    """Print the cost in percent of a step."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead")
    parser.add_argument("--steps", type=int, default=150, help="of each side (150)")
    options = parser.parse_args()
    bf16 = bf16_is_fast()
    half = options.steps // 2
    sides = {"with": make_trainer, "without": make_bare_trainer}
    orders = (("with", "without"), ("without", "with"), ("without", "without"))
    seconds: list[list[np.ndarray]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, order in enumerate(orders):
            places = [Path(folder) / f"{number}-{place}" for place in range(2)]
            trainers = [sides[side](place, half + WARM_UP, bf16) for side, place in zip(order, places, strict=True)]
            seconds.append(steps_in_turns(trainers))
    ours = np.concatenate([seconds[0][0], seconds[1][1]])
    theirs = np.concatenate([seconds[0][1], seconds[1][0]])
    cost, control = percent_slower(ours, theirs), percent_slower(*seconds[2])
    setting = f"{'bf16' if bf16 else 'fp32'}, {torch.get_num_threads()} thread(s), {len(ours)} steps of each"
    print(f"{BATCH_ROWS * SEQUENCE_TOKENS} tokens a step, {setting}")
    print(f"median step: {np.median(ours[:, 0]) * 1e3:.1f} ms with, {np.median(theirs[:, 0]) * 1e3:.1f} ms without")
    print(f"cost by the median step: {cost['median']:+.2f} % (to reach: under {TARGET_PERCENT:g} %)")
    print(f"by the median of pairs of steps: {cost['median_of_pairs']:+.2f} %")
    print(f"by all seconds: {cost['all_steps']:+.2f} %, by seconds of the processor: {cost['processor']:+.2f} %")
    halves = [percent_slower(*seconds[0])["median"], percent_slower(*reversed(seconds[1]))["median"]]
    print(f"the median where it comes first and where it comes second: {halves[0]:+.2f} %, {halves[1]:+.2f} %")
    print(f"two without, the first against the second: {control['median']:+.2f} %, {len(seconds[2][0])} steps of each")
    figures = {f"{name}_percent": round(value, 3) for name, value in cost.items()}
    figures |= {f"control_{name}_percent": round(value, 3) for name, value in control.items()}
    print("RESULT " + json.dumps(figures | {"steps": len(ours), "reached": cost["median"] < TARGET_PERCENT}))


if __name__ == "__main__":
    main()
