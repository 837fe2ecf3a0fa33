"""Every call whose spelling or meaning changes with the version of a library, in one place, each with a canary test.

What comes in: recipes and models. What goes out: the objects of transformers and trl that training stands on. When an
upgrade breaks something, it breaks here and `tests/codetune/test_adapter.py` says what.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from codetune import cpu_ranks
from codetune.memory import CPU_HEAD_TOKENS, HEAD_PIECES
from codetune.recipe import Recipe
from codetune.steps import Steps

if TYPE_CHECKING:
    from transformers import TrainingArguments

EXTRAS = ("tensorboard", "wandb")  # reporters that setup.cfg has an extra for
SCALED_LOGITS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")  # what other families have
EXPORT_SHARD_SIZE = "5GB"  # the library's default of 50 GB makes files that few readers like


def training_arguments(recipe: Recipe, steps: Steps, bf16: bool) -> TrainingArguments:
    """TrainingArguments for a run. What a default of the library would decide is written out."""
    from transformers import TrainingArguments

    return _arguments(TrainingArguments, recipe, steps, bf16)


def sft_arguments(recipe: Recipe, steps: Steps, bf16: bool) -> TrainingArguments:
    """The same for trl's SFTTrainer, which is given rows that are rendered, masked and packed already."""
    from trl.trainer.sft_config import SFTConfig

    ready: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, "packing": False}
    return _arguments(SFTConfig, recipe, steps, bf16, **ready, padding_free=False, completion_only_loss=False)


def _arguments(kind: Any, recipe: Recipe, steps: Steps, bf16: bool, **more: Any) -> Any:
    training, optimizer = recipe.need_training(), recipe.need_optimizer()
    return kind(
        **more,
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
        **cpu_ranks.device_arguments(),
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


@dataclass
class FusedOutput(ModelOutput):
    """What a model with a fused head gives: the loss, and the log probability of each token's label (B, T)."""

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None


class HeadWithLosses(nn.Linear):
    """The output layer, which also gives losses without holding all logits; the weights and their name stay as they are.

    They are used inside this module's own `forward`, where ZeRO-3 and FSDP2 have gathered them and take their gradients.
    trl's own head reads them from outside, and after a step that ZeRO-3 leaves out, its record of what is used when breaks.
    """

    softcap: float | None = None

    def forward(self, hidden_BTH: torch.Tensor, labels_BT: torch.Tensor | None = None) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits; with labels, the log probability of each, (B, T) float32, 0 where the label is -100."""
        if labels_BT is None:
            return super().forward(hidden_BTH)
        return head_log_probs(hidden_BTH, self.weight, self.bias, labels_BT, self.softcap)


def head_log_probs(
    hidden_BTH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_BT: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    """Log probability of each label, (B, T) float32, 0 where it is -100, by trl's kernel, which never holds all logits."""
    from trl.kernels import ChunkedLogProbFunction

    learnt_BT = labels_BT != -100
    temperature, scale = 1.0, 1.0
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden_BTH[learnt_BT],
        weight_VH,
        bias_V,
        labels_BT[learnt_BT],
        temperature,
        HEAD_PIECES,
        softcap,
        scale,
        (),
    )
    # scattered, so that a batch without labels has gradients too, all 0: other ranks wait for them
    return log_probs.new_zeros(labels_BT.shape).masked_scatter(learnt_BT, log_probs)


def settle_head_tiles() -> None:
    """Where there is no Triton, let the fused head work on fewer tokens at once: it holds fp32 copies of its tile there.

    With trl's 4,096 tokens and 32,016 pieces they are 3.8 GB: two thirds of a step with all logits of 16,384 tokens.
    """
    from trl.kernels import chunked_logprob

    if not torch.cuda.is_available():
        chunked_logprob.TOKEN_CHUNK_SIZE = CPU_HEAD_TOKENS


def add_fused_head(model: Any) -> None:
    """Teach the model `model(..., labels=labels, fused_lm_head=True)`, which never holds all logits (trl's chunked kernel).

    Raises:
        ValueError: a model that scales its logits, has a loss of its experts, or an output layer that is not plain linear.
    """
    settle_head_tiles()
    if getattr(model, "has_fused_head", False):
        return
    text = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    scaled = [name for name in SCALED_LOGITS if getattr(text, name, None) not in (None, 1)]
    scaled += ["output_router_logits"] if getattr(text, "output_router_logits", False) else []  # a loss of their own
    if type(head) is not nn.Linear or scaled:
        found = f"{scaled[0]} in its configuration" if scaled else f"an output layer of the kind {type(head).__name__}"
        raise ValueError(f"this model has {found}, which the fused head does not know; train a model of Llama's family")
    head.__class__ = HeadWithLosses  # not a new module: the parameter may be tied, or shared out already
    softcap: Any = getattr(text, "final_logit_softcapping", None)
    head.softcap = softcap
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at the names of the arguments
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return original(*args, **{name: value for name, value in given.items() if value is not None}, **kwargs)
        hidden_BTH = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        if shift_labels is None:
            assert labels is not None, "a fused head gives losses, which need labels"
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        head: Any = self.get_output_embeddings()
        if isinstance(head, HeadWithLosses):
            log_probs_BT = head(hidden_BTH, shift_labels)
        else:  # peft's wrapper of a head with a few trained rows; it is whole on every rank, and has no bias
            log_probs_BT = head_log_probs(hidden_BTH, head.weight, None, shift_labels, softcap)
        learnt = shift_labels.ne(-100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedOutput(loss=-log_probs_BT.sum() / learnt, log_probs=log_probs_BT)

    model.forward = types.MethodType(forward, model)
    model.has_fused_head = True


def fused_token_losses(model: Any, input_ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Loss of each token in nats, (B, T) float32, 0 at the first position and where the label is -100.

    Index t is the loss of token t, foretold from the tokens before it. Rows may be padded at the end: a causal model's
    earlier tokens do not see it. The model needs `add_fused_head`.
    """
    out = model(input_ids=input_ids_BT, labels=labels_BT, fused_lm_head=True, use_cache=False)
    return nn.functional.pad(-out.log_probs[:, :-1].float(), (1, 0))


def selected_logits(
    model: Any, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """Logits at the positions `keep` only, (B, len(keep), V), as the model is run in training: no mask, no cache."""
    out = model(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False, logits_to_keep=keep)
    return out.logits


# Caches of generation: each layer holds keys and values of shape (B, heads, T, head size), the newest column last.


def read_prompts(model: Any, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """The cache of prompts that are padded on the left, and the logits behind them, (B, V)."""
    from transformers import DynamicCache

    cache = DynamicCache()  # without the configuration: every layer keeps all columns, also where attention reads a window
    position_ids_BT = (attention_mask_BT.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "position_ids": position_ids_BT}
    out = model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, out.logits[:, -1]


def next_logits(
    model: Any, last_B1: torch.Tensor, attention_mask_BT: torch.Tensor, position_ids_B1: torch.Tensor, cache: Any
) -> torch.Tensor:
    """Logits behind one more token of each row, (B, V), which the cache has a column of afterwards."""
    given = {"input_ids": last_B1, "attention_mask": attention_mask_BT, "position_ids": position_ids_B1}
    return model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def read_chunk(
    model: Any, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor, cache: Any = None
) -> tuple[torch.Tensor, Any]:
    """Last hidden states of the next chunk of a text, (B, T, D), and the cache, which holds the chunk afterwards.

    No mask is given: the library makes the causal one from the cache's length. `cache` None begins a text.
    """
    from transformers import DynamicCache

    cache = DynamicCache() if cache is None else cache
    out = model.get_decoder()(input_ids=input_ids_BT, position_ids=position_ids_BT, past_key_values=cache, use_cache=True)
    return out.last_hidden_state, cache


def keep_cache_rows(cache: Any, rows: Sequence[int], columns: int) -> None:
    """Leave these rows, in this order, and the last so many columns."""
    for layer in cache.layers:
        index = torch.as_tensor(rows, device=layer.keys.device)
        layer.keys = layer.keys[..., -columns:, :].index_select(0, index)
        layer.values = layer.values[..., -columns:, :].index_select(0, index)


def join_caches(first: Any, second: Any) -> Any:
    """Both caches' rows, the shorter ones padded on the left; `first` is changed and given back."""
    for one, other in zip(first.layers, second.layers, strict=True):
        longest = max(one.keys.shape[-2], other.keys.shape[-2])
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in (one, other)]
            padded = [nn.functional.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts]
            setattr(one, name, torch.cat(padded))
    return first


@contextlib.contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Leave the model's `forward` and the types of its weights as they are, whatever a trainer makes of them in the block.

    trl's SFTTrainer puts a fused head of its own over ours, which ZeRO-3 cannot follow, and rounds QLoRA's adapters to bf16.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    forward = core.__dict__.get("forward")
    weights = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    if forward is None:
        core.__dict__.pop("forward", None)
    else:
        core.forward = forward
    for name, weight in model.named_parameters():
        if name in weights and weight.data.dtype != weights[name].dtype:
            weight.data = weights[name]


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


def shard_groups() -> list[Any]:
    """Process groups for what is written in the background: one for weights and one for the optimizer, which may overlap."""
    return [torch.distributed.new_group(backend="gloo") for _ in range(2)]


@contextlib.contextmanager
def shards_in_background(groups: Sequence[Any]) -> Iterator[list[Any]]:
    """What Accelerate writes of sharded state in this block is copied now and written by torch's `async_save`.

    Yields the futures, one to each group at most; all ranks must wait for theirs before they begin anew.
    """
    import torch.distributed.checkpoint as distributed_checkpoint

    library: Any = distributed_checkpoint  # what Accelerate calls the functions of
    written: list[Any] = []
    original = library.save

    def save(state_dict: dict[str, Any], **settings: Any) -> None:
        written.append(library.async_save(state_dict, process_group=groups[len(written)], **settings))

    library.save = save
    try:
        yield written
    finally:
        library.save = original


def checkpoint_bytes(model: nn.Module) -> int:
    """Of weights and AdamW's two states, all ranks together; DeepSpeed keeps a weight's true size beside an empty tensor."""
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight) for weight in model.parameters()]
    return sum(count * (weight.element_size() + (8 if weight.requires_grad else 0)) for count, weight in sizes)


def save_optimizer_files(folder: Path, optimizer: dict[str, Any], schedule: dict[str, Any]) -> None:
    """Write both states as the library's trainer does, and loads them."""
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

    torch.save(optimizer, folder / OPTIMIZER_NAME)
    torch.save(schedule, folder / SCHEDULER_NAME)


def hush_libraries() -> None:
    """Warnings of one library about another, once a step under DeepSpeed: they are nothing that a user could mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def settle_engine(model: Any, decay_of_groups: Sequence[float]) -> None:
    """What DeepSpeed's engine gets wrong, or leaves to a setting, once it is made; nothing for another model.

    Its optimizer is to look at every gradient before it updates: stage 3 always does, stages 1 and 2 where fp16 or a setting
    says so. And reading a converted checkpoint, stage 3 gives every group of parameters the weight decay of the first, and
    all of them one tensor to count steps in, which then advances once a group.
    """
    if not is_engine(model):
        return
    if hasattr(model.optimizer, "check_grad_overflow"):
        model.optimizer.check_grad_overflow = True
    optimizer = model.optimizer.optimizer
    for group, decay in zip(optimizer.param_groups, decay_of_groups, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@contextlib.contextmanager
def whole_on_this_rank() -> Iterator[None]:
    """Models that are made or loaded while the block runs are whole, by this rank alone.

    Under ZeRO-3 the library would share them out, which all ranks must take part in.
    """
    from transformers.integrations import deepspeed

    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known


def leave_out_step(model: Any) -> None:
    """Make the update of a step that is not finite do nothing, state of the optimizer included.

    AdamW passes over parameters without a gradient. DeepSpeed's engine has left the step out already, and has dropped its
    gradients; its flag is taken back, which would keep the learning rate where it is.
    """
    if is_engine(model):
        assert not model.was_step_applied(), "DeepSpeed has updated with gradients that are not finite"
        model.optimizer.overflow = False
    else:
        model.zero_grad(set_to_none=True)


def skip_shared_batches(loader: Any, count: int) -> None:
    """Pass over micro-batches without reading them, in the loader that deals each row to several ranks.

    The library cannot go on with such a loader. It holds one that reads a batch per rank, and gives them one by one.
    """
    from accelerate import skip_first_batches

    whole, rest = divmod(count, loader.sp_world_size)
    loader.dl = skip_first_batches(loader.dl, whole)
    loader.iter = iter(loader.dl)
    for _ in range(rest):
        next(loader)


def is_engine(model: Any) -> bool:
    """Whether DeepSpeed wraps the model."""
    return type(model).__name__ == "DeepSpeedEngine"


def peak_flops_of_gpu(name: str, dtype: str) -> float | None:
    """Dense peak of a GPU by its name, from trl's table; None where the table does not have it."""
    from trl.trainer.utils import get_peak_flops

    return get_peak_flops(name, dtype)
