"""Every call whose spelling or meaning changes with the version of a library, in one place, each with a canary test.

What comes in: recipes and models. What goes out: the objects of transformers and trl that training stands on. When an
upgrade breaks something, it breaks here and `tests/codetune/test_adapter.py` says what.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from codetune.recipe import Recipe
from codetune.steps import Steps

if TYPE_CHECKING:
    from transformers import TrainingArguments

# subtle: transformers' Trainer imports peft and this one where they are installed, and on a CPU it warns of a kernel that it
# would fetch from the Hub; the level must be set before that import
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

EXTRAS = ("tensorboard", "wandb")  # reporters that setup.cfg has an extra for
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


def layout_of(arguments: TrainingArguments) -> str:
    """How the launcher has the model shared out over ranks: none, ddp, zero1, zero2, zero3 or fsdp."""
    plugin = arguments.deepspeed_plugin
    if plugin is not None:
        return f"zero{plugin.zero_stage}"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp"
    return "ddp" if arguments.world_size > 1 else "none"


def check_reporters(names: Sequence[str]) -> None:
    """Whether what `training.report_to` names is installed; the library looks only after the model is loaded.

    Raises:
        ValueError: unknown, or not installed.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"`training.report_to` names {name!r}, which is no reporter; write some of {known}, or []")
        if name not in installed:
            command = f"pip install -e '.[{name}]'" if name in EXTRAS else f"pip install {name}"
            raise ValueError(
                f"`training.report_to` names {name}, which is not installed; install it ({command}) or take it out"
            )


def check_arguments(arguments: TrainingArguments, world_size: int, bf16: bool) -> None:
    """Whether the launcher's settings, which the library reads from the environment, leave the run what the recipe says.

    Raises:
        ValueError: other ranks, other arithmetic, or several GPUs without a launcher.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are seen and no launcher shares the work out; start with "
            "ACCELERATE=recipes/accelerate/ddp.yaml, or set CUDA_VISIBLE_DEVICES=0 to use one"
        )
    if arguments.world_size != world_size:
        raise ValueError(
            f"{world_size} ranks were started, but Accelerate sees {arguments.world_size}: each would train "
            "alone. Launch with a configuration out of recipes/accelerate"
        )
    wanted = "bf16" if bf16 else "no"
    if arguments.mixed_precision != wanted:
        raise ValueError(
            f"the launcher says mixed_precision {arguments.mixed_precision!r}, but by `model.precision` the run computes in "
            f"{'bf16' if bf16 else 'fp32'}; write mixed_precision: 'no' into the launcher's file and let the recipe decide"
        )


def settle_deepspeed() -> None:
    """Tell DeepSpeed that there is no GPU, where there is none: on import it would look for one and warn on stderr.

    Every command calls it first; libraries import DeepSpeed where it is installed, whether or not it is used.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


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


def copy_in_memory(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in the memory of the processor, which training does not change; tensors that share memory still do.

    The stager is that of torch's own asynchronous checkpoints.
    """
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    copied: Any = DefaultStager(options).stage(state)
    return copied


def checkpoint_bytes(model: nn.Module) -> int:
    """Of weights and AdamW's two states, all ranks together; DeepSpeed keeps a weight's true size beside an empty tensor."""
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight) for weight in model.parameters()]
    return sum(count * (weight.element_size() + (8 if weight.requires_grad else 0)) for count, weight in sizes)


def save_optimizer_files(folder: Path, optimizer: dict[str, Any], schedule: dict[str, Any]) -> None:
    """Write both states as the library's trainer does, and loads them."""
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    torch.save(optimizer, folder / OPTIMIZER_NAME)
    torch.save(schedule, folder / SCHEDULER_NAME)


def drop_gradients(model: nn.Module) -> None:
    """Make the optimizer step that follows do nothing: AdamW passes over parameters without a gradient, state included."""
    model.zero_grad(set_to_none=True)


def peak_flops_of_gpu(name: str, dtype: str) -> float | None:
    """Dense peak of a GPU by its name, from trl's table; None where the table does not have it."""
    from trl.trainer.utils import get_peak_flops

    return get_peak_flops(name, dtype)
