"""What `accelerate launch` starts in tests: trainings one after another, each by the command's own `main`, in one launch.

Started as a script with a JSON file of jobs. {"recipe", "set", "poison", "die_after", "rows"} is a training: `poison` is the
number of a row whose micro-batch has a NaN loss, on the rank that has it; `die_after` a saved step after which every rank
ends at once; `rows` a path to which each rank writes what it reads, one JSON line [step, rank, row numbers] a micro-batch;
`unchecked` leaves out the check of the recipe, so that the check of the model is met; `believes` is what Accelerate is made
to do: "alone" that each rank trains by itself, "whole" that nothing is shared out; `sft` takes the trainer of conversations.
{"convert": path} is `python -m codetune.sharding`, on the main rank. A job that is refused prints its message and how it
ended, and the next one follows.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from codetune import adapter, cpu_ranks, sft, sharding
from codetune.cpu_ranks import ACCELERATE_INIT
from codetune.train import StageKind, command, main, train
from codetune.trainer import RowTrainer, SafeTraining

CHECK_RECIPE, DEVICE_ARGUMENTS = sharding.check_recipe, cpu_ranks.device_arguments


def run(job: dict[str, Any]) -> None:
    poison, die_after, rows = job.get("poison"), job.get("die_after"), job.get("rows")
    rank = int(os.environ.get("RANK", "0"))

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        numbers = torch.as_tensor(inputs["row_numbers"]).flatten().tolist()
        if rows is not None:
            with Path(f"{rows}.{rank}").open("a", encoding="utf-8") as file:
                file.write(json.dumps([self.state.global_step + 1, rank, numbers]) + "\n")
        loss = SafeTraining.compute_loss(self, model, inputs, *rest, **named)
        return loss * float("nan") if poison in numbers else loss

    def save_checkpoint(self: Any, *arguments: Any) -> None:
        SafeTraining._save_checkpoint(self, *arguments)
        if die_after is not None and self.state.global_step >= die_after:
            self.finish_save()
            raise KeyboardInterrupt

    RowTrainer.compute_loss = compute_loss  # pyright: ignore[reportAttributeAccessIssue]
    RowTrainer._save_checkpoint = save_checkpoint  # pyright: ignore[reportAttributeAccessIssue]
    sharding.check_recipe = (lambda *_: None) if job.get("unchecked") else CHECK_RECIPE
    believes = job.get("believes")
    cpu_ranks.device_arguments = (lambda: {"use_cpu": False}) if believes == "alone" else DEVICE_ARGUMENTS
    if believes == "whole":
        AcceleratorState.__init__ = ACCELERATE_INIT
        cpu_ranks.settle = lambda: None
    arguments = ["--recipe", job["recipe"], *(["--set", *job["set"]] if job.get("set") else [])]
    if job.get("sft"):
        kind = StageKind(arguments=adapter.sft_arguments, make=sft.make_trainer)
        command("on_ranks", "trl's trainer", functools.partial(train, kind=kind), arguments)
    else:
        main(arguments)


def convert(path: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        sharding.main([path])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            convert(each["convert"]) if "convert" in each else run(each)
        except SystemExit as end:
            print(f"{each} ended with {end.code}", flush=True)
