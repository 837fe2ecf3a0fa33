"""Loading the parent, and what must be true of it before anything is trained.

What comes in: a recipe and the rows it will read. What goes out: a model ready to be trained, or one `ValueError` that says
what does not fit (tokenizer, row length, missing infilling tokens) and what to run instead. The model keeps fp32 weights by
default; bf16 is the arithmetic, by autocast, where the machine has instructions for it. Emulated bf16 is slower than fp32.
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from codetune import adapter, lora, rope
from codetune.artifacts import MANIFEST, Rows, model_hash, read_json
from codetune.recipe import Recipe
from codetune.shape import shape_of
from codetune.tokens import Codec, open_codec

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
ISOLATION_DOCUMENTS = 8  # documents per row that the check at start looks at
ISOLATION_POSITIONS = 8  # positions per document; the first ones are where a leak shows most


@dataclass(frozen=True)
class Parent:
    """The checkpoint a run starts from."""

    path: str  # folder, or Hub id
    hash: str | None  # of weights, configuration and tokenizer; None for a Hub id
    config: Any
    codec: Codec
    manifest: dict[str, Any]  # empty where the parent is not ours

    def describe(self) -> dict[str, Any]:
        return {"path": self.path, "hash": self.hash, "commit": getattr(self.config, "_commit_hash", None)}


def open_parent(recipe: Recipe) -> Parent:
    """Find the parent and read its configuration and tokenizer, not yet its weights.

    Raises:
        ValueError: there is no checkpoint.
    """
    from transformers import AutoConfig

    path = recipe.parent_path
    folder = Path(path)
    recipe.require_parent()
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`parent` {path}: no readable checkpoint in a folder or on the Hub of that name ({error})"
        ) from error
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    return Parent(path, model_hash(folder) if folder.is_dir() else None, config, open_codec(path), manifest)


def check_parent(recipe: Recipe, parent: Parent, rows: Rows) -> None:
    """Whether the parent can be trained on these rows.

    Raises:
        ValueError: other tokenizer or vocabulary, rows longer than the model's context, a context that was lengthened
            already, missing infilling tokens.
    """
    data = recipe.need_data()
    rope.check_positions(recipe, parent.config, parent.manifest)
    if rows.manifest["tokenizer"] != parent.codec.fingerprint:
        raise ValueError(
            f"{rows.path} was built with another tokenizer ({rows.manifest['tokenizer']}) than the parent's "
            f"{parent.path} ({parent.codec.fingerprint}); build the rows again with `make data`"
        )
    if data.infills and parent.codec.infill is None:
        raise ValueError(
            f"`data.fim.rate` is above 0, but {parent.path} has no infilling tokens; make a base that has them (make base, "
            "`base.infill_tokens: true`), or set the rate to 0"
        )


def bf16_is_fast() -> bool:
    """Whether this machine has instructions for bf16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def use_bf16(recipe: Recipe) -> bool:
    """Whether training computes in bf16 (autocast); `model.precision: auto` asks the machine."""
    return recipe.model.precision == "bf16" or recipe.model.precision == "auto" and bf16_is_fast()


def load_model(recipe: Recipe, parent: Parent) -> Any:
    """The parent as a causal language model with a fused loss head; with other positions and with adapters where the recipe
    says so.

    Raises:
        ValueError: an attention implementation that is not installed, a checkpoint with weights missing, or adapters that
            this model cannot have.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(parent.config)
    rope.change_positions(config, recipe.model)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            parent.path,
            config=config,
            dtype=getattr(torch, recipe.model.weights_dtype),  # always said: the default follows the file
            attn_implementation=recipe.model.attention,
            output_loading_info=True,
            quantization_config=lora.quantization_config(recipe, use_bf16(recipe)),
        )
    except ImportError as error:
        raise ValueError(
            f"`model.attention` {recipe.model.attention} is not installed here ({error}); write sdpa"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"{parent.path}: weights are missing: {', '.join(sorted(report['missing_keys'])[:5])}")
    if model.config.get_text_config().vocab_size < parent.codec.vocabulary_size:
        raise ValueError(
            f"{parent.path}: the tokenizer has more ids ({parent.codec.vocabulary_size}) than the model has rows"
        )
    rope.check_frequencies(model, config, changed=rope.is_changed_by(recipe.model))
    model.config.use_cache = False
    adapter.add_fused_head(model)
    if recipe.model.lora is not None:
        model = lora.add_lora(model, recipe.model.lora, parent.codec, recipe.seed)
    return model


def copy_tokenizer(source: str, target: Path) -> None:
    """Copy a checkpoint's tokenizer files as they are: loading and saving may change them."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns=list(TOKENIZER_FILES)))
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


# ---------------------------------------------------------------------------------------------------------------------
# Isolation of packed documents


@torch.no_grad()
def check_isolation(
    model: Any,
    batch: dict[str, torch.Tensor],
    bf16: bool,
    share: tuple[int, int] = (0, 1),
    largest_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
) -> float:
    """Largest difference between logits of packed documents and of each document alone, over a micro-batch of rows.

    The model may be wrapped (DDP, FSDP, ZeRO): every rank gives the same batch, so all make the same forward passes, under
    the autocast that is in the prepared model. The batch keeps its number of rows: flash attention isolates a single row
    only, and says nothing about more. Where ranks share rows, `share` is this one's part (its place, and of how many): it
    gives its part of the packed rows, in training mode, since outside it the ranks do not share, and all of each document.

    Raises:
        ValueError: documents see each other under the attention in use.
    """
    device = next(model.parameters()).device
    input_ids_BT, position_ids_BT = batch["input_ids"].to(device), batch["position_ids"].to(device)
    documents = [
        (row, start, end)
        for row, position_ids_T in enumerate(position_ids_BT)
        for start, end in _document_spans(position_ids_T)[:ISOLATION_DOCUMENTS]
    ]
    place, parts = share
    part_tokens = input_ids_BT.shape[1] // parts
    low, high = place * part_tokens, (place + 1) * part_tokens
    looked_at = {spot for _, start, end in documents for spot in range(start, min(end, start + ISOLATION_POSITIONS))}
    kept = sorted(spot for spot in looked_at if low <= spot < high) or [low]
    was_training = model.training
    model.train(parts > 1)
    packed_BKV = adapter.selected_logits(
        model, input_ids_BT[:, low:high], position_ids_BT[:, low:high], torch.tensor(kept, device=device) - low
    ).float()
    model.eval()
    differences, scale = [torch.zeros((), device=device)], 1.0
    for row, start, end in documents:
        alone_KV = adapter.selected_logits(
            model,
            input_ids_BT[row : row + 1, start:end],
            position_ids_BT[row : row + 1, start:end],
            torch.arange(min(end - start, ISOLATION_POSITIONS), device=device),
        )[0].float()
        scale = max(scale, alone_KV.abs().max().item())
        here = [spot for spot in range(start, start + len(alone_KV)) if low <= spot < high]
        if here:
            packed_KV = packed_BKV[row, [kept.index(spot) for spot in here]]
            differences.append((packed_KV - alone_KV[[spot - start for spot in here]]).abs().max())
    model.train(was_training)
    largest = largest_over_ranks(torch.stack(differences).max()).item()  # nan if any is
    exact = next(model.parameters()).dtype == torch.float32 and not bf16
    bound = scale * (1e-4 if exact else 5e-2)
    if not largest <= bound:
        attention = getattr(model, "module", model).config._attn_implementation
        remedy = "`model.attention: sdpa`, or `training.micro_batch_rows: 1` for flash attention"
        if parts > 1:
            remedy = "`training.micro_batch_rows: 1` and `model.attention: flash_attention_2`, or let no ranks share rows"
        raise ValueError(
            f"packed documents see each other: their logits differ by {largest:.2g} from each document alone (bound "
            f"{bound:.2g}) with `model.attention` {attention} and {input_ids_BT.shape[0]} row(s) at once; write "
            f"{remedy}"
        )
    return largest


def _document_spans(position_ids_T: torch.Tensor) -> list[tuple[int, int]]:
    """Where documents start and end. Example: positions 0 1 2 0 1 -> [(0, 3), (3, 5)]"""
    starts = torch.nonzero(position_ids_T == 0).flatten().tolist()
    return list(zip(starts, [*starts[1:], len(position_ids_T)], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def training_flops_per_token(config: Any, sequence_tokens: int, adapter_weights: int | None = None) -> int:
    """Floating-point operations of forward and backward per token, by `ModelShape.training_flops_per_token`.

    Where only adapters are trained, the model's own weights need no gradient: 4 each instead of 6, and 6 per weight of
    the adapters.
    """
    shape = shape_of(config)
    flops = shape.training_flops_per_token(sequence_tokens)
    if adapter_weights is None:
        return flops
    return flops - 2 * (shape.layers * shape.layer_matrices + shape.table_parameters) + 6 * adapter_weights


@dataclass(frozen=True)
class PeakFlops:
    """What one device could do at best, and how we know."""

    flops: float | None
    origin: str


def peak_flops(bf16: bool) -> PeakFlops:
    """Of this device in the training precision: the maker's figure for a known GPU, a short measured matmul on a CPU."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return PeakFlops(adapter.peak_flops_of_gpu(name, "bfloat16" if bf16 else "float32"), f"maker's figure for {name}")
    return PeakFlops(_measured_matmul(dtype), "measured matmul of 1024 x 1024 on this CPU")


def utilisation(tokens_per_second: float, flops_per_token: int, peak: float | None, devices: int) -> float | None:
    """Model FLOPs utilisation in percent, or None where it cannot be known; never above 100.

    Example: 1000 tokens/s at 6e9 operations on 2 devices of 10e12: 30.0
    """
    if peak is None:
        return None
    percent = 100.0 * tokens_per_second * flops_per_token / (peak * devices)
    if percent > 100.0:
        logger.warning(
            "MFU would be %.0f %%, so the peak we assume for this device is wrong; it is reported as unknown", percent
        )
        return None
    return round(percent, 2)


def _measured_matmul(dtype: torch.dtype, size: int = 1024, tries: int = 12) -> float:
    """The best of a few multiplications, in operations per second."""
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
