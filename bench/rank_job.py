"""What benchmarks launch on each rank: `codetune.train`, with something done to it.

The first argument is JSON: {"poison": number of a row whose micro-batch gets a NaN loss, "rows": path to which each rank
writes what it reads, a line [step, row numbers] a micro-batch, "kill_at": step in which every rank kills itself}. The rest
is the command's own arguments.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from codetune import train
from codetune.trainer import RowTrainer, SafeTraining


def run(job: dict[str, Any], arguments: list[str]) -> None:
    rank = os.environ.get("RANK", "0")

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        numbers = inputs["row_numbers"].tolist()
        step = self.state.global_step + 1
        if job["kill_at"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if job["rows"] is not None:
            with Path(f"{job['rows']}.{rank}").open("a", encoding="utf-8") as file:
                file.write(json.dumps([step, numbers]) + "\n")
        loss = SafeTraining.compute_loss(self, model, inputs, *rest, **named)
        return loss * float("nan") if job["poison"] in numbers else loss

    RowTrainer.compute_loss = compute_loss  # pyright: ignore[reportAttributeAccessIssue]
    train.main(arguments)


if Path(sys.argv[0]) == Path(__file__):  # as a command; it is no benchmark, which would name itself otherwise
    run(json.loads(sys.argv[1]), sys.argv[2:])
