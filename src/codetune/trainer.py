"""What callbacks cannot do, in one mixin over a stock trainer: fused loss, finite guard, sealed checkpoints, the ledger.

`SafeTraining` goes before `transformers.Trainer` (or trl's SFTTrainer, whose loop is the same) in the list of bases:

    class RowTrainer(SafeTraining, Trainer): ...

* Fused loss: the model computes the loss without holding all logits. The library sums label counts over micro-batches and
  ranks and divides by them, so 4 micro-batches of 1 row equal 1 of 4, however unequal their labels.
* Guard: before the update, all ranks agree (one small all-reduce, which also carries requests to stop and to save) whether a
  loss or the gradient norm is not finite on any of them. Such a step is left out on all: no gradients, so the optimizer's
  state stays as it was; learning rate and step count go on. It is written down with its row numbers, and so is a step whose
  loss or gradient leaps far above the usual (guard.py), which is left out only where the recipe says so. DeepSpeed's engine
  updates inside `backward`, and leaves a step that is not finite out by itself (such a loss makes every gradient so).
* Sealed checkpoints (checkpoints.py): written under another name, manifest last, renamed, and only then are older ones
  deleted. On one device, under DDP and under FSDP2 the state is copied and written while training goes on.
"""

from __future__ import annotations

import copy
import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer

from codetune import adapter, sharding
from codetune.checkpoints import CheckpointWriter, SaveJob, numbered_checkpoints, remove_leftovers
from codetune.guard import SpikeWatch
from codetune.model import utilisation
from codetune.steps import Steps, rate_fraction
from codetune.stopping import FLAGS, SAFETY, Interrupted, Requests, StopAgreed, leave_signals_to_parent


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
    layout: sharding.Layout = field(default_factory=lambda: sharding.Layout("single", 1))  # as the launcher asked
    evaluate: Callable[..., dict[str, float]] | None = None  # (model, poll=) -> flat figures; polls between batches
    complete: Callable[[Path], None] | None = None  # puts beside a checkpoint's weights what the library leaves out
    requests: Requests = field(default_factory=Requests)  # to stop and to save
    spikes: SpikeWatch = field(default_factory=lambda: SpikeWatch(None))
    spike_action: Literal["record", "skip"] = "record"
    background_saves: bool = False
    held_out: dict[str, float] = field(default_factory=dict)  # the newest figures
    evaluation_due: bool = False  # a stop has kept it from being made at this step


class SafeTraining(Trainer):
    """Mixin over a stock trainer; see the module's text. `session` is set before `train()`."""

    session: Session

    def __init__(self, *args: Any, session: Session, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.session = session
        if session.layout.sequence_ranks > 1:
            self.loss_is_scaled_for_ga = True  # by `_loss_of_shared_rows`; the library's own is not
        self._bad = torch.zeros((), dtype=torch.bool, device=self.args.device)
        self._step_loss = torch.zeros((), device=self.args.device)
        self._step_rows: list[torch.Tensor] = []
        self._step_losses: list[torch.Tensor] = []  # of micro-batches, nats per learnt token
        self._unread_counts = torch.zeros_like(session.ledger.counts, device=self.args.device)
        self.writer = CheckpointWriter(session.checkpoints_dir, session.requests.sealing)
        self._parts: list[Callable[[], Any]] | None = None  # of a checkpoint, to be written in the background
        self._shard_groups: list[Any] | None = None
        self._save_begun = False
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
        if self.session.layout.sequence_ranks > 1:
            loss, outputs = self._loss_of_shared_rows(model, inputs, num_items_in_batch)
        else:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # a loss that is not finite must show in the gradients, which all ranks and DeepSpeed's engine look at
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        return (loss, outputs) if return_outputs else loss

    def _loss_of_shared_rows(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Any, Any]:
        """This rank's share of the batch's loss, where ranks share each row; the gradients add up to those of the whole.

        The library's own gives each micro-batch the same weight, however many of its tokens are learnt.
        """
        labels = {} if self.session.fused_loss else {"labels": inputs["shift_labels"]}
        outputs = model(**inputs, **labels, num_items_in_batch=num_items_in_batch)
        return outputs.loss * self.accelerator.num_processes, outputs

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Tokens that the whole batch learns from. Where ranks share rows, each counts the tokens that it has."""
        if self.session.layout.sequence_ranks == 1:
            return super()._get_num_items_in_batch(batch_samples, device)
        counts = [batch["shift_labels"].ne(-100).sum() for batch in batch_samples]
        return self._sum_over_ranks(torch.stack(counts).sum().to(device))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch. A loss that is not finite is noted, and 0 stands for it in the running mean."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        finite = torch.isfinite(loss)
        counted = torch.where(finite, loss, torch.zeros_like(loss))
        self._bad |= ~finite
        self._step_loss = self._step_loss + counted
        self._step_rows.append(torch.as_tensor(inputs["row_numbers"]))
        labels_BT = inputs["labels"] if "labels" in inputs else inputs["shift_labels"]
        self._step_losses.append(self._mean_loss(loss, labels_BT, num_items_in_batch))
        self._unread_counts += torch.as_tensor(inputs["document_tokens"]).sum(0).to(self._unread_counts.device)
        return counted

    def _mean_loss(self, loss: torch.Tensor, labels_BT: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """A micro-batch's loss per learnt token, from its share of the batch's; nan where nothing is learnt."""
        if num_items_in_batch is None:
            return loss
        learnt = labels_BT.ne(-100).sum()
        return loss * num_items_in_batch / (learnt * self.accelerator.num_processes)

    def create_optimizer(self, model: Any = None) -> Any:
        """The library's, without groups that hold nothing; the others are noted, weight decay being on matrices only.

        Adapters are matrices alone. DeepSpeed drops the group that is empty then, and the scheduler, which has counted it,
        would end the run.
        """
        optimizer: Any = super().create_optimizer(model)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self._decay_of_groups = [group["weight_decay"] for group in optimizer.param_groups]
        return optimizer

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

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The library's preparation, and a look at what came of it."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        sharding.check_shared_out(self.session.layout, self.accelerator, self.model_wrapped)
        adapter.settle_engine(self.model_wrapped, self._decay_of_groups)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The library's loop; it cannot pass over batches that several ranks share, so this is done before."""
        done = kwargs["steps_trained_in_current_epoch"]
        if done and self.session.layout.sequence_ranks > 1:
            adapter.skip_shared_batches(kwargs["train_dataloader"], done)
            self.args.ignore_data_skip = True
        super()._run_epoch(*args, **kwargs)

    # -- guard --------------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last thing the library calls before the update, on every rank: here the step is let through or left out."""
        norm = _whole(super()._get_grad_norm(model, grad_norm))
        finite, figures = self._agree_on_step(norm)
        leaps = self.session.spikes.judge(**figures) if finite else {}
        if not finite or (leaps and self.session.spike_action == "skip"):
            self._record_step("spike" if finite else "not finite", skipped=True, figures=figures, leaps=leaps)
            self._count_skipped()
            self._stop_after_too_many()
            adapter.leave_out_step(model)
        else:
            if leaps:
                self._record_step("spike", skipped=False, figures=figures, leaps=leaps)
            self.session.spikes.remember(**figures)
            self._skipped_in_a_row = 0
        self._finish_step()
        return norm

    def _agree_on_step(self, norm: Any) -> tuple[bool, dict[str, float]]:
        """Whether loss and gradient are finite on every rank, and the step's own loss and norm; carries requests along."""
        device = self._bad.device
        norm = torch.as_tensor(norm, device=device).float().reshape(())
        bad = self._bad | ~torch.isfinite(norm)
        skip, loss, norm = self._agree(torch.stack([bad.float(), self._step_loss.float(), torch.nan_to_num(norm)]))
        world = self.accelerator.num_processes
        # each rank's losses are its share of the batch's mean times the number of ranks
        return skip == 0, {"loss": loss / world, "gradient_norm": norm / world}

    def _agree(self, own: torch.Tensor | None = None) -> list[float]:
        """Sums over the ranks of `own`; what ranks were asked for, and whether a save has failed, goes with it."""
        device = self._bad.device
        self.session.requests.save_seconds = self.writer.seconds or self.session.requests.save_seconds
        flags = torch.tensor([*self.session.requests.flags(), float(self.writer.failure is not None)], device=device)
        totals = self._sum_over_ranks(flags if own is None else torch.cat([own, flags])).tolist()
        rest = len(totals) - FLAGS - 1
        self.session.requests.agree(totals[rest : rest + FLAGS])
        if totals[-1] > 0:
            raise self._save_failed()
        return totals[:rest]

    def poll(self) -> None:
        """Between batches of an evaluation, on all ranks: ends it where all have agreed to stop.

        Raises:
            StopAgreed: they have.
        """
        self._agree()
        if self.session.requests.stop is not None:
            raise StopAgreed

    def _record_step(self, reason: str, skipped: bool, figures: dict[str, float], leaps: dict[str, float]) -> None:
        """Write the step down with the rows of every rank."""
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
        if self.accelerator.is_main_process:
            known = {} if reason == "not finite" else figures
            record = {"step": self.state.global_step + 1, "reason": reason, "skipped": skipped}
            record |= {"loss": known.get("loss"), "gradient_norm": known.get("gradient_norm"), **leaps}
            with self.session.skipped_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "micro_batches": batches}) + "\n")

    def _count_skipped(self) -> None:
        self._skipped_in_a_row += 1
        self._window_skipped += 1
        self.session.ledger.skipped_steps += 1
        self._tr_loss -= self._step_loss  # its finite micro-batches count no more than the others

    def _stop_after_too_many(self) -> None:
        if self._skipped_in_a_row >= self.session.max_skipped_in_a_row:
            leapt = ", or far above the usual" if self.session.spike_action == "skip" else ""
            raise ValueError(
                f"the last {self._skipped_in_a_row} steps, up to step {self.state.global_step + 1}, had a loss or gradient "
                f"that is not finite{leapt}, and were left out; that is `training.max_skipped_in_a_row`. Their rows are in "
                f"{self.session.skipped_path} (`make spikes` prints them); nothing was saved since. Lower "
                "`optimizer.learning_rate`, or name rows in `training.skip_rows`, and start again"
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
        figures = {"tokens_per_second": round(rate, 1), "memory_gib": round(most_memory_bytes() / 2**30, 3)}
        mfu = utilisation(rate, self.session.flops_per_token, self.session.peak_flops, self.accelerator.num_processes)
        return figures | ({} if mfu is None else {"mfu_percent": mfu})

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Held-out losses, when `control.should_evaluate` says so; a stop ends it, and the next session makes it anew."""
        self.control.should_evaluate = False  # else the library asks again at the end of its epoch
        if self.session.evaluate is None:
            return {}
        self.stop_clock()
        self.session.evaluation_due = True
        try:
            self.session.held_out = self.session.evaluate(self.model, poll=self.poll)
            self.session.evaluation_due = False
            self.log(dict(self.session.held_out))
            self.poll()
        except StopAgreed:
            self.control.should_save = self.control.should_training_stop = True  # the library saves after measuring
        self.start_clock()
        return self.session.held_out

    def settle_ledger(self) -> Ledger:
        """The ledger with everything counted up to now, on all ranks; all of them must call it."""
        total_K = self._sum_over_ranks(self._unread_counts) // self.session.layout.sequence_ranks
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
        self.session.requests.after_pause()
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
        self.finish_save()
        started, step = time.monotonic(), self.state.global_step
        last = self.control.should_training_stop or step >= self.state.max_steps
        folder = self.session.checkpoints_dir / f".incomplete-checkpoint-{step}" / f"checkpoint-{step}"
        self._staging = folder.parent
        if self.accelerator.is_main_process:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        # the last one is waited for in any case, so that a copy would only take longer
        self._parts = [] if self.session.background_saves and not last and self._may_copy() else None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # noqa: BLE001  (all ranks raise it below; none may wait for one that has ended)
            self.writer.failed(step, error)
        parts, self._parts, self._staging = self._parts, None, None
        kept = self._is_kept(step)
        self.session.requests.after_pause()
        self._agree()
        manifest = {**self.session.manifest, "step": step, "kept": kept, "ledger": ledger}
        manifest |= {"evaluation_due": self.session.evaluation_due, "spikes": self.session.spikes.to_dict()}
        answered = self.session.requests.answer()
        main = self.accelerator.is_main_process
        rest = [*(parts or []), *([partial(self._complete, folder)] if main else [])]
        job = SaveJob(step, folder.parent, rest, manifest, self.session.keep_checkpoints, started, answered, seals=main)
        self.writer.start(job)
        self._save_begun = True
        if parts is None or last:
            self.finish_save()
        if self.session.requests.stop is not None:  # asked while saving: no further step, and no further save
            self.control.should_training_stop = True
            self.finish_save()
        self.start_clock()

    def _is_kept(self, step: int) -> bool:
        """Whether this checkpoint is never deleted: at the recipe's interval, or because somebody asked for it."""
        every = self.session.steps.keep_every
        return self.session.requests.save or (every is not None and step % every == 0)

    def _may_copy(self) -> bool:
        """Whether it is known how to write a copy: not of ZeRO's parts, nor of what peft wraps."""
        plain = isinstance(self.accelerator.unwrap_model(self.model), PreTrainedModel)
        return plain and self.accelerator.distributed_type.value in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The library's weights and configuration; in the background: of a copy, later."""
        if self._parts is None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        weights = adapter.copy_in_memory(unwrapped.state_dict() if state_dict is None else state_dict)
        self._parts.append(partial(super()._save, output_dir, weights))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The library's; in the background: of a copy, later."""
        if self._parts is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.accelerator.distributed_type.value == "FSDP":  # each rank copies and writes its own part
            if self._shard_groups is None:
                self._shard_groups = adapter.shard_groups()
            with adapter.shards_in_background(self._shard_groups) as futures:
                super()._save_optimizer_and_scheduler(output_dir)
            self._parts += [future.result for future in futures]
        elif self.args.should_save:
            optimizer: Any = self.optimizer
            scheduler: Any = self.lr_scheduler
            state, schedule = adapter.copy_in_memory(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())
            self._parts.append(partial(adapter.save_optimizer_files, Path(output_dir), state, schedule))

    def _complete(self, folder: Path) -> None:
        """What makes the library's files a checkpoint that stands alone."""
        if (folder / "config.json").is_file():
            unwrapped: Any = self.accelerator.unwrap_model(self.model)
            config = copy.deepcopy(unwrapped.config)
            config.use_cache = True  # off while training; whoever loads the checkpoint wants it
            config.save_pretrained(folder)
        if self.session.complete is not None:
            self.session.complete(folder)

    def finish_save(self) -> None:
        """Wait for what is being written, and hear on all ranks whether it was; all of them must call it."""
        if self._save_begun:
            self.writer.wait()
            self._save_begun = False
            self.session.requests.after_pause()
            self._agree()
            self.report_save()

    def report_save(self) -> None:
        """Log what the last save took, once it is sealed."""
        if (figures := self.writer.take_figures()) is not None:
            wanted = self.control.should_log
            self.log(figures)
            self.control.should_log = wanted  # the library takes any log for the one that was due

    def _save_failed(self) -> ValueError:
        """One message on each rank; those that did not fail name the one that did."""
        folder = self.session.checkpoints_dir
        step, error, free = self.writer.failure or (None, None, 0)
        self.writer.failure = None
        if self.accelerator.is_main_process:
            self.writer.wait()
            remove_leftovers(folder, "checkpoint")
        if error is None:
            return ValueError("a checkpoint could not be written; the rank that could not says why")
        kept = ", ".join(path.name for path in numbered_checkpoints(folder)) or "none"
        reason = f"{type(error).__name__}: {error}"
        failure = ValueError(
            f"{folder / f'checkpoint-{step}'} could not be written ({reason}); {free / 2**20:,.0f} MB were free there. "
            f"Nothing half-written was kept; whole checkpoints: {kept}. Free some space (or lower "
            "`training.keep_checkpoints`) and start again: the run goes on from the newest"
        )
        failure.__cause__ = error
        return failure

    # -- stopping -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before the first step, on all ranks: is there time for one save, and was a stop asked for already?

        Raises:
            ValueError: the time budget is shorter than one save.
            Interrupted: asked to stop while loading, or while measuring what the parent can do.
        """
        self._agree()
        requests = self.session.requests
        if self._sum_over_ranks(torch.tensor(float(requests.lacks_time()), device=self._bad.device)) > 0:
            raise ValueError(
                f"the time budget (--minutes) leaves {requests.left_seconds():.0f} s for training, and one save is "
                f"expected to take up to {requests.save_seconds * SAFETY:.1f} s; give it more. Nothing was trained, and "
                "nothing changed"
            )
        if requests.stop is None and (self.state.global_step == 0 or self.session.evaluation_due):
            self._evaluate(None, None)
        if requests.stop is not None:
            self.session.requests.answer()()
            step = self.state.global_step
            raise Interrupted(requests.stop, self.session.checkpoints_dir / f"checkpoint-{step}" if step else None)
        self.start_clock()

    def get_train_dataloader(self) -> Any:
        """The library's, with workers that leave signals to the process that reads from them."""
        loader: Any = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # Accelerate wraps it, and hands attributes on one way only
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
        return loader


class RowTrainer(SafeTraining):
    """The trainer of stage1, python and lcft."""


def _start_worker(library: Callable[[int], None] | None, worker: int) -> None:
    leave_signals_to_parent()
    if library is not None:
        library(worker)


def most_memory_bytes() -> int:
    """The most that this process has held so far: on its GPU, or where it has none in the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _whole(value: Any) -> Any:
    """A value that FSDP2 shares out over the ranks, such as the norm of all gradients, put together; others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _finite_or_none(value: Any) -> float | None:
    number = float(torch.as_tensor(value))
    return number if abs(number) < float("inf") else None
