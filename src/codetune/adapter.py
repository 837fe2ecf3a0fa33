"""Every call whose spelling or meaning changes with the version of a library, in one place, each with a canary test.

What comes in: recipes and models. What goes out: the objects of transformers and trl that training stands on. When an
upgrade breaks something, it breaks here and `tests/codetune/test_adapter.py` says what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from codetune.recipe import Recipe
from codetune.steps import Steps

if TYPE_CHECKING:
    from transformers import TrainingArguments

EXPORT_SHARD_SIZE = "5GB"  # the library's default of 50 GB makes files that few readers like


def training_arguments(recipe: Recipe, steps: Steps, bf16: bool) -> TrainingArguments:
    """TrainingArguments for a run. What a default of the library would decide is written out."""
    from transformers import TrainingArguments

    training, optimizer = recipe.need_training(), recipe.need_optimizer()
    return TrainingArguments(
        output_dir=str(recipe.checkpoints_dir),
        max_steps=steps.total,
        per_device_train_batch_size=steps.micro_batch_rows,
        gradient_accumulation_steps=steps.accumulation,
        train_sampling_strategy="sequential",  # the dataset is in order already, so resuming skips without reading
        dataloader_num_workers=training.loader_workers,
        dataloader_drop_last=True,
        remove_unused_columns=False,  # row numbers and ledger counts travel in the batch
        average_tokens_across_devices=True,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="cosine" if optimizer.schedule == "cosine" else "constant",  # for the record; see rate_fraction
        optim="adamw_torch_fused",
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_gradient_norm,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=recipe.model.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if recipe.model.activation_checkpointing else None,
        use_cache=False,  # with a cache, documents in a row attend to each other and nothing says so
        logging_strategy="steps",
        logging_steps=steps.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # the filter shows a loss of 0.0 for a poisoned model
        eval_strategy="no",  # held-out losses are ours, see probes.py
        save_strategy="steps",
        save_steps=steps.save_every,
        save_total_limit=None,  # rotation is ours: the library deletes before the new checkpoint is sealed
        report_to=list(training.report_to) or "none",
        run_name=f"{recipe.size}/{recipe.name}",
        disable_tqdm=True,  # the bar is ours, in tokens
        seed=recipe.seed,
        data_seed=recipe.seed,
        full_determinism=training.full_determinism,
        ddp_find_unused_parameters=False,
        push_to_hub=False,
    )


def add_fused_head(model: Any) -> None:
    """Teach the model `model(..., labels=labels, fused_lm_head=True)`, which never holds all logits (trl's chunked head)."""
    from trl.trainer.utils import add_fused_lm_head

    if not getattr(model, "has_fused_head", False):
        add_fused_lm_head(model)
        model.has_fused_head = True


def fused_token_losses(model: Any, input_ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Loss of each token in nats, (B, T) float32, 0 at the first position and where the label is -100.

    Index t is the loss of token t, foretold from the tokens before it. Rows may be padded at the end: a causal model's
    earlier tokens do not see it. The model needs `add_fused_head`.
    """
    out = model(input_ids=input_ids_BT, labels=labels_BT, fused_lm_head=True, use_cache=False)
    return torch.nn.functional.pad(-out.log_probs.float(), (1, 0))


def selected_logits(
    model: Any, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Logits at the positions `keep` only, (B, len(keep), V), as the model is run in training: no mask, no cache."""
    out = model(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False, logits_to_keep=keep)
    return out.logits


def drop_default_printers(trainer: Any) -> None:
    """Take away the library's printing of log dicts; ours prints a line."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def drop_gradients(model: nn.Module) -> None:
    """Make the optimizer step that follows do nothing: AdamW passes over parameters without a gradient, state included."""
    model.zero_grad(set_to_none=True)


def peak_flops_of_gpu(name: str, dtype: str) -> float | None:
    """Dense peak of a GPU by its name, from trl's table; None where the table does not have it."""
    from trl.trainer.utils import get_peak_flops

    return get_peak_flops(name, dtype)
