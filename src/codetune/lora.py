"""LoRA and QLoRA: a few new weights are trained, the parent's stay as they are, and the export is an ordinary model.

What comes in: the parent as a model, and `model.lora` of the recipe. What goes out: the same model with pairs of low-rank
matrices beside its linear layers (peft), and at the end one plain state dict, in which each pair is added to its layer. Only
the pairs, and the rows of embedding and head that belong to the four infilling tokens, are trained, saved in checkpoints and
known to the optimizer.

The trade for those rows: peft's `trainable_token_indices` trains 4 rows of each, and makes a copy of the whole matrix with
them laid in at every forward pass. Saving whole modules instead would train all 32,016 rows: at 7b 262 million weights, or
4.2 GB with gradients and AdamW's state against 0.5 GB for a moment, and every token's row would drift.

With `quantization: nf4` (QLoRA, Dettmers et al. 2023) the linear layers of the parent are held in 4 bits. The export adds
the pairs to the *dequantized* weights, because that is the model that was trained and measured; added to the parent's own
weights they would give another one.

What it does not do: adapters on embedding or head; 4-bit weights, or new tokens' rows, where weights are shared out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codetune import adapter
from codetune.recipe import LoraSettings, Recipe, did_you_mean_hint
from codetune.tokens import Codec

PREFIX = "base_model.model."  # peft puts it before every name of the model
NAME = "default"  # peft's name of the one adapter
CHECK_TOKENS = 256  # of a row, whose logits the merged model must give again


# ---------------------------------------------------------------------------------------------------------------------
# Before training


def quantization_config(recipe: Recipe, bf16: bool) -> Any:
    """What `from_pretrained` needs to load the linear layers in 4 bits, or None where the recipe does not ask for it.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    lora = recipe.model.lora
    if lora is None or lora.quantization == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "`model.lora.quantization` is nf4, which needs bitsandbytes, and that is not installed; install it (pip install "
            "-e '.[qlora]'), or write `quantization: none`"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=lora.double_quantization,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def add_lora(model: Any, settings: LoraSettings, codec: Codec, seed: int) -> Any:
    """The model with an adapter of freshly drawn weights (the same for a seed), everything else frozen.

    The model must have its fused head already.

    Raises:
        ValueError: a target that is no linear layer of this model, or a head with a bias.
    """
    from peft import LoraConfig, get_peft_model

    check_targets(model, settings)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # subtle: on a CPU with these instructions bitsandbytes packs 4-bit weights anew when it first evaluates, and
            # rounds their scales: the frozen weights would change in the middle of the run
            module.support_avx512bf16_for_cpu = False
    rows = new_token_rows(settings, codec)
    head = model.get_output_embeddings()
    tied = model.config.get_text_config().tie_word_embeddings
    if rows and getattr(head, "bias", None) is not None:
        raise ValueError("`model.lora.train_new_tokens` is on, but this model's head has a bias, which peft would leave out")
    names = [_name_of(model, model.get_input_embeddings())] + ([] if tied else [_name_of(model, head)])
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  (a float does)
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        trainable_token_indices=dict.fromkeys(names, rows) if rows else None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped: Any = get_peft_model(model, config)
    return wrapped


def new_token_rows(settings: LoraSettings, codec: Codec) -> list[int]:
    """Rows of embedding and head that are trained: those of the four infilling tokens, where the vocabulary has them."""
    if not settings.train_new_tokens or codec.infill is None:
        return []
    infill = codec.infill
    return sorted((infill.prefix, infill.suffix, infill.middle, infill.end))


def check_targets(model: nn.Module, settings: LoraSettings) -> None:
    """Whether each name in `target_modules` is that of linear layers of the model.

    Raises:
        ValueError: one of them is not; the message names those that are.
    """
    modules = dict(model.named_modules())
    for target in settings.target_modules:
        found = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not found or not all(isinstance(module, nn.Linear) for module in found):
            linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
            hint = did_you_mean_hint(target, linear - {"lm_head"})
            raise ValueError(f"`model.lora.target_modules` names {target!r}, which is no linear layer of this model{hint}")


def check_layout(settings: LoraSettings, codec: Codec, layout: str) -> None:
    """Whether this adapter can be trained where weights are shared out as `layout` says (`sharding.Layout.kind`).

    Raises:
        ValueError: it cannot; the message says what to write instead.
    """
    sharded = layout in ("zero3", "fsdp2")
    if settings.quantization != "none" and (sharded or layout.startswith("zero")):
        raise ValueError(
            f"`model.lora.quantization: nf4` with {layout}: 4-bit weights are neither shared out nor handed to DeepSpeed; "
            "use one GPU or recipes/accelerate/ddp.yaml, or write `quantization: none`"
        )
    if sharded and new_token_rows(settings, codec):
        raise ValueError(
            f"`model.lora.train_new_tokens` with {layout}: the rows of single tokens cannot be trained where embedding and "
            "head are shared out over ranks; write `train_new_tokens: false`, or use one GPU, "
            "recipes/accelerate/ddp.yaml or zero2.yaml"
        )


@dataclass(frozen=True)
class Trained:
    """Weights that are trained, and all of them."""

    adapter: int  # in the pairs of matrices
    rows: int  # in rows of embedding and head
    total: int

    def __str__(self) -> str:
        rows = f", and {self.rows:,} in rows of new tokens" if self.rows else ""
        return (
            f"LoRA: {self.adapter:,} weights in adapters{rows}, {100 * (self.adapter + self.rows) / self.total:.2g} % of all"
        )


def trained_weights(model: Any) -> Trained:
    """Counts of a model that `add_lora` made; 4-bit weights count as what they stand for."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rows = sum(_size(parameter) for name, parameter in named if ".trainable_tokens_delta." in name)
    total = sum(_size(parameter) for parameter in model.parameters())
    return Trained(sum(_size(parameter) for _, parameter in named) - rows, rows, total)


def _size(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes holds two weights in a byte
    if state is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", None) or parameter.numel()  # under ZeRO-3 a rank sees an empty tensor


# ---------------------------------------------------------------------------------------------------------------------
# The finished model


def merged_state(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the plain model, from the whole state dict of the model with its adapter.

    Each pair B, A of a layer W gives W + (alpha / rank) B A, computed in fp32 and kept in W's type; the trained rows take
    their places; 4-bit weights are dequantized. `state` may come from another process's gathering; of the model only its
    shape is used, and its 4-bit weights.

    Example: W = [[1.]], B = [[2.]], A = [[3.]], alpha 4, rank 1: [[25.]]
    """
    merged = {}
    modules = dict(model.named_modules())
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        if ".lora_" in name or ".trainable_tokens_" in name:
            continue  # taken with the layer they belong to
        if owner not in modules:
            continue  # scales of a 4-bit weight, which are in the state dict alone
        weight = _dequantized(getattr(modules[owner], leaf), tensor)
        if owner.endswith(".token_adapter.base_layer"):
            place = owner.removesuffix(".base_layer")
            owner = owner.removesuffix(".token_adapter.base_layer")
            weight = _with_rows(weight, modules[place].token_indices[NAME], state[f"{place}.trainable_tokens_delta.{NAME}"])
        elif owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            if leaf == "weight":
                a, b = (state[f"{owner}.lora_{letter}.{NAME}.weight"].float() for letter in "AB")
                weight = (weight.float() + modules[owner].scaling[NAME] * (b @ a)).to(weight.dtype)
        merged[f"{owner}.{leaf}".removeprefix(PREFIX)] = weight
    if model.config.get_text_config().tie_word_embeddings:
        merged.pop("lm_head.weight", None)  # the embedding itself
    return merged


def _dequantized(parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return tensor
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, state)


def _with_rows(weight: torch.Tensor, indices: list[int], rows: torch.Tensor) -> torch.Tensor:
    place = torch.tensor(indices, device=weight.device)
    return weight.index_copy(0, place, rows.to(weight))


def save_merged(
    model: Any,
    state: Mapping[str, torch.Tensor],
    folder: Path,
    ids_BT: torch.Tensor,
    logits: tuple[torch.Tensor, torch.Tensor],
    exact: bool,
) -> MergeCheck:
    """Write the plain model as `from_pretrained` expects it, nothing of peft or of 4 bits in its files, and load it again.

    `logits` are those of `adapter_logits` for `ids_BT`; `exact` says that they were computed in fp32.

    Raises:
        ValueError: what was written gives other logits.
    """
    from transformers import AutoModelForCausalLM

    base = model.get_base_model()
    merged = merged_state(model, state)
    dtype = next(iter(merged.values())).dtype
    merged = {name: tensor.to(dtype).contiguous() for name, tensor in merged.items()}
    config = type(base.config).from_dict(base.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with adapter.whole_on_this_rank(), torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.generation_config = base.generation_config
    plain.save_pretrained(folder, state_dict=merged, max_shard_size=adapter.EXPORT_SHARD_SIZE)
    del merged
    return check_merged(folder, ids_BT, *logits, exact=exact and dtype == torch.float32)


def save_adapter(model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter alone, as `peft.PeftModel.from_pretrained(parent, folder)` expects it."""
    model.save_pretrained(folder, state_dict=dict(state), save_embedding_layers=False)


@dataclass(frozen=True)
class MergeCheck:
    """Largest differences between logits of one row's first tokens, with their scale."""

    merged: float  # of the merged model from the one with its adapter
    adapter: float  # of the one with its adapter from the parent: what was learnt
    scale: float

    def __str__(self) -> str:
        return (
            f"merged: logits differ by {self.merged:.2g} from the model with its adapter, which differs by "
            f"{self.adapter:.2g} from its parent (largest logit {self.scale:.2g})"
        )

    def to_dict(self) -> dict[str, float]:
        return {"merged_against_adapter": self.merged, "adapter_against_parent": self.adapter, "largest_logit": self.scale}


@torch.no_grad()
def adapter_logits(model: Any, unwrapped: Any, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, T, V) on the CPU with the adapter and without it; all ranks call it."""
    was_training = model.training
    model.eval()
    ids_BT = ids_BT.to(next(model.parameters()).device)
    position_ids_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None].expand_as(ids_BT)
    keep = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    with_adapter = adapter.selected_logits(model, ids_BT, position_ids_BT, keep).float().cpu()
    with unwrapped.disable_adapter():
        without = adapter.selected_logits(model, ids_BT, position_ids_BT, keep).float().cpu()
    model.train(was_training)
    return with_adapter, without


@torch.no_grad()
def check_merged(
    folder: Path, ids_BT: torch.Tensor, with_adapter_BTV: torch.Tensor, without_BTV: torch.Tensor, exact: bool
) -> MergeCheck:
    """Whether the model in the folder gives the logits that the model with its adapter gave; loads it, on the CPU.

    `exact` says that both compute in fp32.

    Raises:
        ValueError: it gives others.
    """
    from transformers import AutoModelForCausalLM

    with adapter.whole_on_this_rank():
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    logits_BTV = merged(input_ids=ids_BT, use_cache=False).logits.float()
    scale = max(1.0, with_adapter_BTV.abs().max().item())
    check = MergeCheck(
        merged=(logits_BTV - with_adapter_BTV).abs().max().item(),
        adapter=(without_BTV - with_adapter_BTV).abs().max().item(),
        scale=scale,
    )
    bound = scale * (1e-4 if exact else 5e-2)
    if not check.merged <= bound:
        raise ValueError(
            f"the merged model's logits differ by {check.merged:.2g} from those of the model with its adapter (bound "
            f"{bound:.2g}); it was not kept. The adapter is in the newest checkpoint"
        )
    return check


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    """Example: the embedding of a Llama -> model.embed_tokens"""
    return next(name for name, module in model.named_modules() if module is wanted)
