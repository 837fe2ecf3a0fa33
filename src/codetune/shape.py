"""The shape of a Llama model as numbers: parameters, and arithmetic per token. No torch, no weights, no network.

What comes in: a configuration (of transformers, or a `config.json` read as a dict), or the size of one of the paper's
models. What goes out: `ModelShape`. Counts are closed forms and equal what the library builds, to the parameter; biases and
mixtures of experts are not in them, and a configuration with either is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A Llama: RMSNorm before each half of a layer, SwiGLU, grouped attention, no biases."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    context: int  # positions
    head_size: int
    tied: bool = False  # one matrix is both embedding and head

    @property
    def queries(self) -> int:
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's seven matrices. Example: hidden 4, one head of 4, intermediate 8: 4*4*4 + 3*4*8 = 160"""
        return self.hidden * (2 * self.queries + 2 * self.keys) + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        return self.layer_matrices + 2 * self.hidden

    @property
    def table_parameters(self) -> int:
        """Of the embedding, and of the head: a row for each piece."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.hidden + (1 if self.tied else 2) * self.table_parameters

    def training_flops_per_token(self, sequence_tokens: int) -> int:
        """Floating-point operations of forward and backward: 6 per weight in a matrix product, and causal attention.

        Attention counts half of `sequence_tokens` keys per query on average (causal), as if a row were one document: where
        documents are isolated the true number is smaller. The embedding is a look-up and counts nothing; recomputation under
        activation checkpointing is not counted (it is not useful work).

        Example: hidden 4, 1 layer, 1 head, intermediate 8, vocabulary 10, 6 tokens: weights 4*4*4 + 3*4*8 + 10*4 = 200,
        attention 2 * 2 * 4 * (6 / 2) = 48 forward; 6 * 200 + 3 * 48 = 1344
        """
        weights = self.layers * self.layer_matrices + self.table_parameters
        attention = self.layers * 2 * 2 * self.queries * sequence_tokens // 2
        return 6 * weights + 3 * attention


def shape_of(config: Any) -> ModelShape:
    """From a configuration object of transformers.

    Raises:
        ValueError: not a shape that the counts here hold for.
    """
    text = config.get_text_config()
    return shape_from_dict({name: getattr(text, name, None) for name in _KEYS}, where=f"a model of type {text.model_type}")


_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "head_dim",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "num_local_experts",
)
_OPTIONAL = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias", "num_local_experts")


def shape_from_dict(config: Mapping[str, Any], where: str) -> ModelShape:
    """From the keys of a `config.json`; `where` names it in errors.

    Raises:
        ValueError: a key is missing, or the model has biases or experts.
    """
    missing = [name for name in _KEYS if name not in _OPTIONAL and not config.get(name)]
    if missing:
        raise ValueError(f"{where}: `{missing[0]}` is missing; only models of Llama's shape can be counted")
    odd = [name for name in ("attention_bias", "mlp_bias", "num_local_experts") if config.get(name)]
    if odd:
        raise ValueError(f"{where}: `{odd[0]}` is set; only models of Llama's shape, without it, can be counted")
    heads = config["num_attention_heads"]
    return ModelShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        tied=bool(config.get("tie_word_embeddings")),
    )


def known_shape(size: str, infill_tokens: bool) -> ModelShape | None:
    """The shape of a size whose base is a pretrained model (Llama 2's, paper Sec. 2.1; SmolLM2-135M), or None.

    With the four infill tokens a vocabulary of 32,000 pieces has 32,016 rows, and SmolLM2's 49,152 pieces have 49,160.
    """
    shape = _SIZES.get(size)
    if shape is None or not infill_tokens:
        return shape
    return dataclasses.replace(shape, vocabulary=shape.vocabulary + (16 if shape.vocabulary == 32000 else 8))


def _llama2(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int) -> ModelShape:
    return ModelShape(hidden, layers, heads, kv_heads, intermediate, vocabulary=32000, context=4096, head_size=128)


_SIZES = {
    "7b": _llama2(4096, 32, 32, 32, 11008),
    "13b": _llama2(5120, 40, 40, 40, 13824),
    "34b": _llama2(8192, 48, 64, 8, 22016),
    "70b": _llama2(8192, 80, 64, 8, 28672),
    "smollm2-135m": ModelShape(576, 30, 9, 3, 1536, vocabulary=49152, context=8192, head_size=64, tied=True),
}
