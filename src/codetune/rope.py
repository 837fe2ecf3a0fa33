"""Rotary positions: how far a model can count, changed once, checked wherever it could be lost (paper Sec. 2.4).

What comes in: a configuration and the recipe's `model` section. What goes out: the configuration with other positions,
before a model is built of it; checks that the built model turns as its configuration says, and that a saved one will; and
`config.json` in both dialects. Frequency i of d/2 is base^(-2i/d), divided by the factor under linear scaling.

Why the checks: the library takes a base that is set in any other way, stores it and turns by the old one; and versions of it
before 5 read `rope_theta` and `rope_scaling` at the top of `config.json`, find nothing there, and turn by 10,000.

What it does not do: other kinds of scaling (llama3, yarn, longrope). A parent that has one is taken as it is, unchecked, and
a recipe that would change it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codetune.artifacts import read_json, write_json
from codetune.recipe import ModelSettings, Recipe

CHECKED_TYPES = ("default", "linear")
AFTER_LCFT = ("instruct", "unnatural")  # stages that train a model that was lengthened already, on rows of any length
OLD_DEFAULT_BASE = 10_000.0  # what a configuration means that says nothing


def inverse_frequencies(base: float, size: int, factor: float = 1.0) -> list[float]:
    """Radians a position turns each pair of a head's dimensions by: base^(-2i/size) / factor, i = 0 to size/2 - 1.

    Example: base 10,000, size 4, factor 4 -> [0.25, 0.0025]
    """
    return [base ** (-2 * pair / size) / factor for pair in range(size // 2)]


def is_changed_by(model: ModelSettings) -> bool:
    """Whether a recipe changes how the model counts positions, or how far."""
    return model.rope_base is not None or model.rope_linear_factor is not None or model.context_tokens is not None


def change_positions(config: Any, model: ModelSettings) -> None:
    """Put the recipe's positions into a configuration that no model has been built of yet.

    The whole `rope_parameters` is replaced: anything less is stored and not used, without a word.

    Raises:
        ValueError: the configuration has a kind of scaling that we do not change.
    """
    text = config.get_text_config()
    if model.rope_base is not None or model.rope_linear_factor is not None:
        known = rope_of(text)
        if known["rope_type"] not in CHECKED_TYPES:
            raise ValueError(
                f"`model.rope_base` and `model.rope_linear_factor` change default or linear positions; this parent "
                f"({text.model_type}) has {known['rope_type']}"
            )
        rope = {"rope_type": "default", "rope_theta": model.rope_base or known["rope_theta"]}
        if "partial_rotary_factor" in known:
            rope["partial_rotary_factor"] = known["partial_rotary_factor"]
        if model.rope_linear_factor is not None:
            rope |= {"rope_type": "linear", "factor": model.rope_linear_factor}
        text.rope_parameters = rope
    if model.context_tokens is not None:
        text.max_position_embeddings = model.context_tokens


def rope_of(config: Any) -> dict[str, Any]:
    """The positions that a configuration, or a `config.json` read as a dict, describes, in the newer dialect.

    Example: {"rope_theta": 1e6} -> {"rope_type": "default", "rope_theta": 1e6}
    """
    get = config.get if isinstance(config, Mapping) else lambda key: getattr(config, key, None)
    rope = dict(get("rope_parameters") or get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        return {"rope_type": "different in each kind of layer", "rope_theta": None}
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", get("rope_theta") or OLD_DEFAULT_BASE)
    return rope


def describe(config: Any, recipe: Recipe, parent_manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says about a model's positions, and which run lengthened it."""
    text = config.get_text_config()
    rope = rope_of(text)
    return {
        "base": rope["rope_theta"],
        "type": rope["rope_type"],
        "linear_factor": rope.get("factor", 1.0),
        "context_tokens": text.max_position_embeddings,
        "lengthened_by": recipe.name if is_changed_by(recipe.model) else lengthened_by(parent_manifest),
    }


def lengthened_by(manifest: Mapping[str, Any]) -> str | None:
    """The run that changed a checkpoint's positions, by its manifest."""
    return (manifest.get("rope") or {}).get("lengthened_by")


# ---------------------------------------------------------------------------------------------------------------------
# What must fit before rows are built or a model is loaded


def check_positions(recipe: Recipe, config: Any, manifest: Mapping[str, Any]) -> None:
    """Whether rows of this length can be trained on this parent, by its configuration (or `config.json`) and manifest.

    Raises:
        ValueError: the parent was lengthened already, or its context is shorter than a row and the recipe leaves it so.
    """
    get = config.get if isinstance(config, Mapping) else lambda key: getattr(config.get_text_config(), key, None)
    _refuse_second_change(recipe, rope_of(config if isinstance(config, Mapping) else config.get_text_config()), manifest)
    context, row = get("max_position_embeddings"), recipe.need_data().sequence_tokens
    if recipe.model.context_tokens is None and context is not None and row > context:
        raise ValueError(
            f"`data.sequence_tokens` is {row}, but {recipe.parent_path} has a context of {context} positions; write at most "
            f"{context}, or lengthen it as the lcft recipes do: `model.context_tokens: {row}` and a larger `model.rope_base`"
        )
    by = lengthened_by(manifest)
    after = recipe.name.split("-")[0] in AFTER_LCFT
    if by is not None and not after and context is not None and row < context:
        raise ValueError(
            f"{recipe.parent_path} was lengthened to {context} positions by the run `{by}`, and `data.sequence_tokens` "
            f"{row} would train it on short rows again; long context comes last: start `{recipe.name}` from a stage before "
            f"(`parent: stage1`), and lengthen its output (`make lcft FROM=python`, or a recipe with its `parent`)"
        )


def _refuse_second_change(recipe: Recipe, rope: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    model, path = recipe.model, recipe.parent_path
    if not is_changed_by(model):
        return
    by, base = lengthened_by(manifest), rope["rope_theta"]
    told = f"RoPE base {base:g}" if rope["rope_type"] == "default" else f"RoPE {rope['rope_type']}, base {base}"
    reason = None
    if by is not None:
        reason = f"{path} was lengthened by the run `{by}` already ({told})"
    elif rope["rope_type"] != "default" or (model.rope_base is not None and base >= model.rope_base):
        reason = f"{path} has other positions already ({told})"
    if reason is not None:
        raise ValueError(
            f"{reason}, and this recipe would change them once more; long-context fine-tuning starts from a stage "
            "before it: run `make lcft` (from stage1) or `make lcft FROM=python`, or write `parent: stage1`"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The model as built, and as it will be built from its files


def check_frequencies(model: Any, config: Any, changed: bool) -> None:
    """Whether the built model turns as `config` says.

    Raises:
        ValueError: the positions were changed, and this kind of model has no frequencies that we can look at.
        AssertionError: other frequencies than the configuration's: the library has not used it.
    """
    text = config.get_text_config()
    rope, module = rope_of(text), _rotary_module(model)
    if module is not None and rope["rope_type"] in CHECKED_TYPES:
        _assert_frequencies(module.inv_freq, rope, text)
    elif module is None and changed:
        raise ValueError(
            f"the recipe changes RoPE, and this kind of model ({text.model_type}) has no frequencies that we can check"
        )


def check_saved(model: Any, folder: Path) -> None:
    """Whether a model built from the files in `folder` will turn as this one does; its rotary part is built for that.

    Raises:
        AssertionError: other frequencies, or another context.
    """
    from transformers import AutoConfig

    reread = AutoConfig.from_pretrained(str(folder)).get_text_config()
    meant = model.config.get_text_config()
    assert reread.max_position_embeddings == meant.max_position_embeddings, f"{folder}: config.json lost the context"
    rope, module = rope_of(meant), _rotary_module(model)
    if module is not None and rope["rope_type"] in CHECKED_TYPES:
        _assert_frequencies(module.inv_freq, rope, meant)
        _assert_frequencies(type(module)(reread).inv_freq, rope, meant)


def _rotary_module(model: Any) -> Any:
    found = (module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    return next((module for module in found if hasattr(module, "inv_freq")), None)


def _assert_frequencies(found: Any, rope: Mapping[str, Any], config: Any) -> None:
    import torch

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = int(size * rope.get("partial_rotary_factor", 1.0))
    expected = inverse_frequencies(rope["rope_theta"], size, rope.get("factor", 1.0))
    torch.testing.assert_close(
        found.double().cpu(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-5,
        atol=0.0,
        msg=lambda text: f"the model does not turn by RoPE base {rope['rope_theta']:g}: {text}",
    )


def write_older_dialect(folder: Path) -> None:
    """Say the positions in `config.json` in the older dialect too, beside `rope_parameters`.

    Versions 4 of transformers, and most other readers, know `rope_theta` and `rope_scaling` only. A folder that holds an
    adapter alone has no `config.json`.
    """
    if not (folder / "config.json").is_file():
        return
    config = read_json(folder / "config.json")
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": None if scaling["rope_type"] == "default" else scaling}
    write_json(folder / "config.json", {**config, **older})
