"""Callbacks that every stage shares: the metrics file, the progress bar, when to measure, to save and to stop.

What comes in: the trainer's events. What goes out: `metrics.jsonl` (always; TensorBoard and others get the same figures by
`report_to`), a bar in tokens with the time left, and a run that ends at a step with a sealed checkpoint when it is asked to
end. Lines of steps that a resumed run makes again are taken out of the files first, so that each step stands there once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from codetune.model import check_isolation
from codetune.trainer import SafeTraining, Session


class IsolationCheck(TrainerCallback):
    """Refuses at the start a model whose packed documents see each other: the prepared one, where and how it is trained."""

    def __init__(self, trainer: SafeTraining, batch: dict[str, torch.Tensor], bf16: bool) -> None:
        self.trainer, self.batch, self.bf16 = trainer, batch, bf16

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        accelerator, layout = self.trainer.accelerator, self.trainer.session.layout
        share = (accelerator.process_index % layout.sequence_ranks, layout.sequence_ranks)
        check_isolation(
            self.trainer.model_wrapped,
            self.batch,
            self.bf16,
            share,
            lambda value: accelerator.gather(value[None]).max(),  # pyright: ignore[reportAttributeAccessIssue]
        )


class RunControl(TrainerCallback):
    """Measure at intervals and at both ends, log whatever is saved, and end the run when all ranks have agreed to."""

    def __init__(self, trainer: SafeTraining) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        session = self.trainer.session
        last = state.global_step >= state.max_steps
        if state.global_step % session.steps.evaluate_every == 0 or last:
            control.should_evaluate = True
        every = session.steps.keep_every
        if session.requests.save or (every is not None and state.global_step % every == 0):
            control.should_save = True
        if session.requests.stop is not None and not last:
            control.should_save = control.should_training_stop = True
        self.trainer.report_save()
        if control.should_save or control.should_evaluate:  # a stop while measuring makes a save of it
            control.should_log = True  # so that a resumed run averages over the same steps


class MetricsFile(TrainerCallback):
    """One JSON line per log: step, tokens (slots of rows), the figures, and the ledger with every training line."""

    def __init__(self, path: Path, session: Session) -> None:
        self.path, self.session = path, session

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return  # the library's own summary knows one session only; ours is the manifest
        figures = {name: value for name, value in logs.items() if name not in ("epoch", "total_flos")}
        line = {"step": state.global_step, "tokens": state.global_step * self.session.steps.batch_tokens, **figures}
        if "loss" in logs:
            line["ledger"] = self.session.ledger.to_dict(self.session.sequence_tokens)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class ProgressBar(TrainerCallback):
    """A bar in tokens with speed and time left on a terminal; one line per log everywhere."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            tokens = self.session.steps.batch_tokens
            self.bar = tqdm(
                total=state.max_steps * tokens,
                initial=state.global_step * tokens,
                unit="token",
                unit_scale=True,
                disable=None,  # not a terminal: lines only
                dynamic_ncols=True,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.session.steps.batch_tokens)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs:
            return
        if "loss" in logs:
            tqdm.write(progress_line(state.global_step, state.max_steps, self.session.steps.batch_tokens, logs))
        elif any(name.startswith("held_out/") for name in logs):
            tqdm.write(held_out_line(state.global_step, logs))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def progress_line(step: int, total: int, batch_tokens: int, logs: dict[str, Any]) -> str:
    """One log as a line for people."""
    parts = [f"step {step}/{total}", f"{step * batch_tokens:,} tokens", f"loss {logs['loss']:.4f}"]
    parts += [f"rate {logs['learning_rate']:.2e}"] if "learning_rate" in logs else []
    if "tokens_per_second" in logs:
        speed = logs["tokens_per_second"]
        left = (total - step) * batch_tokens / max(speed, 1e-9)
        mfu = f"{logs['mfu_percent']:.1f} %" if "mfu_percent" in logs else "unknown"
        parts += [f"{speed:,.0f} tokens/s", f"MFU {mfu}", f"{int(left // 60)} min {int(left % 60)} s left"]
    return "  ".join(parts)


def held_out_line(step: int, logs: dict[str, Any]) -> str:
    """Plain held-out losses of all sources."""
    plain = {
        name.split("/")[1]: value for name, value in logs.items() if name.startswith("held_out/") and name.endswith("/plain")
    }
    return f"step {step}  held-out nats/token  " + "  ".join(f"{source} {value:.4f}" for source, value in plain.items())


def keep_lines_up_to(path: Path, step: int) -> None:
    """Take out lines of later steps, which are about to be made again, and a last line cut short by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if step > 0 and value["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.shortened")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
