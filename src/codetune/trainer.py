"""What callbacks cannot do, in one mixin over a stock trainer: fused loss, finite guard, sealed checkpoints, the ledger.

`SafeTraining` goes before `transformers.Trainer` (or trl's SFTTrainer, whose loop is the same) in the list of bases:

    class RowTrainer(SafeTraining, Trainer): ...

* Fused loss: the model computes the loss without holding all logits. The library sums label counts over micro-batches and
  ranks and divides by them, so 4 micro-batches of 1 row equal 1 of 4, however unequal their labels.
* Finite guard: before the update, all ranks agree (one small all-reduce, which also carries requests to stop) whether a
  loss or the gradient norm is not finite on any of them. Such a step is left out on all: no gradients, so the optimizer's
  state stays as it was; learning rate and step count go on. It is written down with its row numbers.
* Sealed checkpoints: written under another name, manifest last, renamed, and only then are older ones deleted.

What it does not do: guard DeepSpeed, whose engine updates inside `backward`; there a step that is not
finite is written down and ends the run unsaved.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from codetune import adapter
from codetune.artifacts import replace_folder, seal_folder
from codetune.model import utilisation
from codetune.steps import Steps, rate_fraction


@dataclass
class Ledger:
    """Tokens of documents that training has read, per source and layout; steps that were left out are in it, and counted."""

    sources: list[str]
    layouts: list[str]
    counts: torch.Tensor  # (K,) int64, source-major
    rows: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0  # of training, without evaluation and saving, over all sessions

    def to_dict(self, sequence_tokens: int) -> dict[str, Any]:
        """Plain values, for the log, checkpoints and the manifest."""
        table = self.counts.reshape(len(self.sources), len(self.layouts)).tolist()
        tokens = {
            source: {layout: count for layout, count in zip(self.layouts, line, strict=True) if count}
            for source, line in zip(self.sources, table, strict=True)
        }
        total = int(self.counts.sum())
        padding = self.rows * sequence_tokens - total
        return {"tokens": tokens, "document_tokens": total, "padding": padding, "rows": self.rows} | {
            "skipped_steps": self.skipped_steps,
            "seconds": round(self.seconds, 3),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        table = [[saved["tokens"].get(source, {}).get(layout, 0) for layout in self.layouts] for source in self.sources]
        self.counts = torch.tensor(table, dtype=torch.int64).flatten()
        self.rows, self.skipped_steps, self.seconds = saved["rows"], saved["skipped_steps"], saved["seconds"]


@dataclass
class Session:
    """What the mixin needs of a run; one object, so that the trainer's own arguments stay the library's."""

    steps: Steps
    ledger: Ledger
    sequence_tokens: int
    checkpoints_dir: Path
    skipped_path: Path  # skipped_steps.jsonl
    keep_checkpoints: int
    max_skipped_in_a_row: int
    schedule: str
    final_rate_fraction: float
    fused_loss: bool
    manifest: dict[str, Any]  # what every sealed checkpoint records
    flops_per_token: int
    peak_flops: float | None  # of one device
    evaluate: Callable[[Any], dict[str, float]] | None = None  # model -> flat figures
    complete: Callable[[Path], None] | None = None  # puts beside a checkpoint's weights what the library leaves out
    stop_requested: bool = False  # set by a signal on this rank
    stop_agreed: bool = False  # the same on all ranks
    held_out: dict[str, float] = field(default_factory=dict)  # the newest figures


class SafeTraining(Trainer):
    """Mixin over a stock trainer; see the module's text. `session` is set before `train()`."""

    session: Session

    def __init__(self, *args: Any, session: Session, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.session = session
        self._bad = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self._step_loss = torch.zeros((), device=self.args.device)
        self._step_rows: list[torch.Tensor] = []
        self._step_losses: list[torch.Tensor] = []  # of micro-batches, nats per learnt token
        self._unread_counts = torch.zeros_like(session.ledger.counts, device=self.args.device)
        self._skipped_in_a_row = 0
        self._window_steps = self._window_skipped = 0
        self._staging: Path | None = None
        self._clock: float | None = None
        self._last_throughput: tuple[int, float] | None = None

    # -- loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The library's own loss path, through the fused head."""
        inputs = {name: value for name, value in inputs.items() if name not in ("row_numbers", "document_tokens")}
        if self.session.fused_loss:
            inputs["fused_lm_head"] = True
        if num_items_in_batch is not None:  # a batch whose rows are all skipped teaches nothing; it is no division by zero
            num_items_in_batch = torch.clamp(torch.as_tensor(num_items_in_batch), min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch. A loss that is not finite is noted, and 0 stands for it in the running mean."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        finite = torch.isfinite(loss)
        counted = torch.where(finite, loss, torch.zeros_like(loss))
        self._bad |= ~finite
        self._step_loss = self._step_loss + counted
        self._step_rows.append(inputs["row_numbers"])
        self._step_losses.append(self._mean_loss(loss, inputs["labels"], num_items_in_batch))
        self._unread_counts += inputs["document_tokens"].sum(0).to(self._unread_counts.device)
        return counted

    def _mean_loss(self, loss: torch.Tensor, labels_BT: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """A micro-batch's loss per learnt token, from its share of the batch's; nan where nothing is learnt."""
        if num_items_in_batch is None:
            return loss
        learnt = labels_BT.ne(-100).sum()
        return loss * num_items_in_batch / (learnt * self.accelerator.num_processes)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate as a pure function of the step (`rate_fraction`)."""
        if self.lr_scheduler is None:
            steps, session = self.session.steps, self.session

            def fraction(step: int) -> float:
                return rate_fraction(
                    step,
                    total=steps.total,
                    warmup=steps.warmup,
                    schedule=session.schedule,
                    final_fraction=session.final_rate_fraction,
                )

            used: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(used, fraction)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- finite guard -------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last thing the library calls before the update, on every rank: here the step is let through or left out."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self._agree_to_skip(norm):
            self._record_skipped(norm)
            if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
                raise ValueError(
                    f"step {self.state.global_step + 1}: a loss or gradient is not finite, and DeepSpeed has already "
                    f"updated with it; its rows are in {self.session.skipped_path}, and the run ends without saving. Name "
                    "rows in `training.skip_rows`, and start it again: it goes on from its newest checkpoint"
                )
            self._stop_after_too_many()
            adapter.drop_gradients(model)
        else:
            self._skipped_in_a_row = 0
        self._finish_step()
        return norm

    def _agree_to_skip(self, norm: Any) -> bool:
        """Whether any rank has seen something that is not finite; carries requests to stop along."""
        device = self._bad.device
        bad = self._bad | ~torch.isfinite(torch.as_tensor(norm, device=device)).all()
        flags = torch.stack([bad.float(), torch.tensor(float(self.session.stop_requested), device=device)])
        skip, stop = self._sum_over_ranks(flags).tolist()
        self.session.stop_agreed = stop > 0
        return skip > 0

    def _record_skipped(self, norm: Any) -> None:
        """Write the step down with the rows of every rank."""
        self._skipped_in_a_row += 1
        self._window_skipped += 1
        self.session.ledger.skipped_steps += 1
        self._tr_loss -= self._step_loss  # its finite micro-batches count no more than the others
        here = [
            {
                "rank": self.accelerator.process_index,
                "micro_batch": place,
                "rows": rows.tolist(),
                "loss": _finite_or_none(loss),
            }
            for place, (rows, loss) in enumerate(zip(self._step_rows, self._step_losses, strict=True))
        ]
        batches = gather_object(here)
        step = self.state.global_step + 1
        if self.accelerator.is_main_process:
            record = {"step": step, "gradient_norm": _finite_or_none(norm), "micro_batches": batches}
            with self.session.skipped_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _stop_after_too_many(self) -> None:
        if self._skipped_in_a_row >= self.session.max_skipped_in_a_row:
            raise ValueError(
                f"the last {self._skipped_in_a_row} steps, up to step {self.state.global_step + 1}, had a loss or gradient "
                "that is not finite, and were left out; that is `training.max_skipped_in_a_row`. Their rows are in "
                f"{self.session.skipped_path}; nothing was saved since. Lower `optimizer.learning_rate`, or name rows in "
                "`training.skip_rows`, and start again"
            )

    def _finish_step(self) -> None:
        self._window_steps += 1
        self.session.ledger.rows += self.session.steps.batch_rows
        self._bad.zero_()
        self._step_loss = torch.zeros_like(self._step_loss)
        self._step_rows, self._step_losses = [], []

    # -- log, evaluation ----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The library's log, with the mean over the steps that were made, not those left out."""
        if "loss" in logs:
            made = self._window_steps - self._window_skipped
            logs = {name: value for name, value in logs.items() if name != "loss" or made > 0}
            if made > 0:
                logs["loss"] *= self._window_steps / made
            self._window_steps = self._window_skipped = 0
            logs |= self._throughput()
        logs = {name: value for name, value in logs.items() if not isinstance(value, float) or abs(value) < float("inf")}
        super().log(logs, start_time)

    def _throughput(self) -> dict[str, float]:
        """Speed since the last log; padding, evaluation and saving are not in it."""
        ledger = self.settle_ledger()
        tokens, seconds = int(ledger.counts.sum()), ledger.seconds
        last_tokens, last_seconds = self._last_throughput or (tokens, seconds)
        self._last_throughput = tokens, seconds
        if tokens == last_tokens or seconds == last_seconds:
            return {}
        rate = (tokens - last_tokens) / (seconds - last_seconds)
        figures = {"tokens_per_second": round(rate, 1)}
        mfu = utilisation(rate, self.session.flops_per_token, self.session.peak_flops, self.accelerator.num_processes)
        return figures | ({} if mfu is None else {"mfu_percent": mfu})

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Held-out losses, when `control.should_evaluate` says so."""
        self.control.should_evaluate = False  # else the library asks again at the end of its epoch
        if self.session.evaluate is None:
            return {}
        self.stop_clock()
        self.session.held_out = self.session.evaluate(self.model)
        self.log(dict(self.session.held_out))
        self.start_clock()
        return self.session.held_out

    def settle_ledger(self) -> Ledger:
        """The ledger with everything counted up to now, on all ranks; all of them must call it."""
        total_K = self._sum_over_ranks(self._unread_counts)
        self.session.ledger.counts = self.session.ledger.counts + total_K.cpu()
        self._unread_counts = torch.zeros_like(self._unread_counts)
        if self._clock is not None:
            self.stop_clock()
            self.start_clock()
        return self.session.ledger

    def _sum_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        total: Any = self.accelerator.reduce(value, "sum")
        return total

    def start_clock(self) -> None:
        self._clock = time.perf_counter()
        if self._last_throughput is None:
            self._last_throughput = int(self.session.ledger.counts.sum()), self.session.ledger.seconds

    def stop_clock(self) -> None:
        """Add the time since `start_clock` to the ledger."""
        if self._clock is not None:
            self.session.ledger.seconds += time.perf_counter() - self._clock
        self._clock = None

    # -- sealed checkpoints -------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """Where the library puts `checkpoint-N`: while saving, a folder that nobody takes for a checkpoint."""
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The library's checkpoint, written apart, sealed, and only then given its name; older ones go last."""
        ledger = self.settle_ledger().to_dict(self.session.sequence_tokens)
        self.stop_clock()
        folder = self.session.checkpoints_dir
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / f".incomplete-{name}"
        if self.accelerator.is_main_process:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        try:
            unwrapped.config.use_cache = True  # off while training; whoever loads the checkpoint wants it
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                if self.session.complete is not None:
                    self.session.complete(self._staging / name)
                seal_folder(
                    self._staging / name, {**self.session.manifest, "step": self.state.global_step, "ledger": ledger}
                )
                replace_folder(self._staging / name, folder / name)
                rotate_checkpoints(folder, keep=self.session.keep_checkpoints, newest=self.state.global_step)
        except Exception as error:
            free = shutil.disk_usage(folder).free
            kept = ", ".join(path.name for path in numbered_checkpoints(folder)) or "none"
            raise ValueError(
                f"{folder / name} could not be written ({type(error).__name__}: {error}); {free / 2**20:,.0f} MB are "
                "free there. "
                f"Nothing half-written was kept; whole checkpoints: {kept}. Free some space (or lower "
                "`training.keep_checkpoints`) and start again: the run goes on from the newest"
            ) from error
        finally:
            unwrapped.config.use_cache = False
            if self.accelerator.is_main_process:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        self.accelerator.wait_for_everyone()
        self.start_clock()


class RowTrainer(SafeTraining):
    """The trainer of stage1, python and lcft."""


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Folders called `checkpoint-<step>`, oldest first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def rotate_checkpoints(folder: Path, keep: int, newest: int) -> None:
    """Delete all but the newest `keep` checkpoints up to step `newest`; a folder loses its name before its files."""
    names = [path for path in numbered_checkpoints(folder) if int(path.name.removeprefix("checkpoint-")) <= newest]
    for path in names[:-keep]:
        doomed = path.with_name(f".deleted-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """What a killed session left of folders called `name-...`: half-written and half-deleted ones, under other names."""
    for state in ("incomplete", "deleted", "replaced"):
        for path in folder.glob(f".{state}-{name}-*"):
            shutil.rmtree(path, ignore_errors=True)


def _finite_or_none(value: Any) -> float | None:
    number = float(torch.as_tensor(value))
    return number if abs(number) < float("inf") else None
