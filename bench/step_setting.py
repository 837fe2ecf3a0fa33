"""What benchmarks of a training step share: a 9M-parameter Llama, random rows, and the trainer with its ledger and guards.

What comes in: a folder and how many steps. What goes out: a trainer that is ready to train and saves nothing.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codetune import adapter
from codetune.callbacks import MetricsFile, RunControl
from codetune.collate import RowCollator
from codetune.guard import SpikeWatch
from codetune.recipe import DataSettings, ModelSettings, OptimizerSettings, Recipe, SourceSettings, TrainingSettings
from codetune.steps import derive_steps
from codetune.trainer import Ledger, RowTrainer, Session

SHAPE = {"hidden_size": 256, "intermediate_size": 784, "num_hidden_layers": 8, "num_attention_heads": 8}
VOCABULARY = 4096  # 9.0M parameters in all
SEQUENCE_TOKENS, BATCH_ROWS, MICRO_ROWS = 256, 8, 4


class Batches(torch.utils.data.Dataset):
    """Rows of random tokens, two documents each; the same for both sides."""

    def __init__(self, rows: int) -> None:
        draw = np.random.default_rng(0)
        self.ids = draw.integers(3, VOCABULARY, (rows, SEQUENCE_TOKENS), dtype=np.uint16)
        self.first = draw.integers(40, SEQUENCE_TOKENS - 40, rows)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> dict[str, Any]:
        first = int(self.first[place])
        lengths = np.array([first, SEQUENCE_TOKENS - first], np.int32)
        zeros = np.zeros(2, np.uint8)
        ids = self.ids[place]
        empty = np.zeros(0, np.int32)
        return {
            "row_number": place,
            "input_ids": ids,
            "document_lengths": lengths,
            "loss_runs": empty,
            "sources": zeros,
            "layouts": zeros,
        }


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=VOCABULARY, max_position_embeddings=SEQUENCE_TOKENS))
    adapter.add_fused_head(model)
    return model


def make_recipe(folder: Path, steps: int) -> Recipe:
    source = SourceSettings(kind="generated", share=1.0)
    batch_tokens = BATCH_ROWS * SEQUENCE_TOKENS
    return Recipe(
        name="bench",
        size="bench",
        runs=str(folder),
        data=DataSettings(sequence_tokens=SEQUENCE_TOKENS, sources={"random": source}),
        model=ModelSettings(precision="auto"),
        optimizer=OptimizerSettings(learning_rate=1e-3, warmup_tokens=2 * batch_tokens),
        training=TrainingSettings(
            train_tokens=steps * batch_tokens,
            batch_tokens=batch_tokens,
            micro_batch_rows=MICRO_ROWS,
            log_tokens=5 * batch_tokens,
            save_tokens=10**12,
        ),
    )


def make_collator() -> RowCollator:
    return RowCollator(SEQUENCE_TOKENS, pad_id=0, isolate_documents=True, sources=1, layouts=3)


class Quiet(RowTrainer):
    """The trainer without its last checkpoint: the bare loop saves nothing either."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.control.should_save = False


def make_trainer(folder: Path, steps: int, bf16: bool) -> RowTrainer:
    """The trainer of `codetune.train`, with its session and the callbacks that log and watch."""
    recipe = make_recipe(folder, steps)
    plan, optimizer = derive_steps(recipe, 1), recipe.need_optimizer()
    session = Session(
        steps=plan,
        ledger=Ledger(["random"], ["plain", "psm", "spm"], torch.zeros(3, dtype=torch.int64)),
        sequence_tokens=SEQUENCE_TOKENS,
        checkpoints_dir=recipe.checkpoints_dir,
        skipped_path=recipe.run_dir / "skipped_steps.jsonl",
        keep_checkpoints=1,
        max_skipped_in_a_row=5,
        schedule=optimizer.schedule,
        final_rate_fraction=optimizer.final_rate_fraction,
        fused_loss=True,
        manifest={},
        flops_per_token=1,
        peak_flops=None,
        spikes=SpikeWatch(recipe.need_training().spike_deviations),
    )
    trainer = Quiet(
        model=make_model(),
        args=adapter.training_arguments(recipe, plan, bf16),
        train_dataset=Batches(plan.rows),
        data_collator=make_collator(),
        session=session,
    )
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    adapter.drop_default_printers(trainer)

    for callback in (RunControl(trainer), MetricsFile(recipe.run_dir / "metrics.jsonl", session)):
        trainer.add_callback(callback)
    return trainer


def now() -> np.ndarray:
    """Seconds by the wall and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])
