"""Positions: changed whole or not at all, the same after every save, read by older readers too, refused a second time."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from codetune import model, rope
from codetune.artifacts import open_rows, read_json
from codetune.recipe import ModelSettings, load_recipe, make_command
from codetune.train import train

LONGER = {"model.context_tokens": 256}


def test_frequencies_by_hand() -> None:
    assert rope.inverse_frequencies(10_000.0, 4) == pytest.approx([1.0, 0.01])
    assert rope.inverse_frequencies(10_000.0, 4, factor=4.0) == pytest.approx([0.25, 0.0025])
    slow = rope.inverse_frequencies(1e6, 128)
    assert len(slow) == 64
    assert slow[63] == pytest.approx(math.exp(-(126 / 128) * math.log(1e6)))


@pytest.mark.parametrize(
    ("settings", "base", "factor", "scaling"),
    [
        ({"model.rope_base": 1.0e6}, 1e6, 1.0, None),
        ({"model.rope_linear_factor": 4.0}, 1e4, 4.0, {"rope_type": "linear", "factor": 4.0}),
        ({}, 1e4, 1.0, None),
    ],
    ids=["new base", "linear", "same base"],
)
def test_a_stage_exports_the_positions_it_was_trained_with(
    make_run: Callable[..., Path], settings: dict[str, Any], base: float, factor: float, scaling: Any
) -> None:
    recipe = load_recipe(make_run(**settings, **LONGER, **{"training.train_tokens": 768, "probes.infill_prompts": 0}))
    expected = torch.tensor([base ** (-2 * i / 8) / factor for i in range(4)])  # heads of 8
    loaded = model.load_model(recipe, model.open_parent(recipe))
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, expected)
    folder = train(recipe)
    for place in (folder, recipe.checkpoints_dir / "checkpoint-2"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # neither dialect makes the library complain
            again = AutoModelForCausalLM.from_pretrained(place)
        torch.testing.assert_close(again.model.rotary_emb.inv_freq, expected)
        written = json.loads((place / "config.json").read_text())
        assert written["rope_parameters"]["rope_theta"] == written["rope_theta"] == base
        assert written["rope_scaling"] == scaling
        assert written["max_position_embeddings"] == 256
    facts = read_json(folder / "manifest.json")["rope"]
    assert facts == {
        "base": base,
        "type": "default" if factor == 1.0 else "linear",
        "linear_factor": factor,
        "context_tokens": 256,
        "lengthened_by": "stage1",
    }


def test_a_model_that_does_not_turn_as_configured_is_noticed(make_run: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(make_run(rows=False, **{"model.rope_base": 1.0e6}))
    loaded = model.load_model(recipe, model.open_parent(recipe))
    loaded.save_pretrained(tmp_path / "saved")
    rope.check_saved(loaded, tmp_path / "saved")
    loaded.config.rope_parameters = {"rope_type": "default", "rope_theta": 1.0e4}  # what is written, not what turns
    with pytest.raises(AssertionError, match="does not turn by RoPE base 10000"):
        rope.check_frequencies(loaded, loaded.config, changed=True)
    loaded.config.rope_parameters = {"rope_type": "default", "rope_theta": 1.0e6}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1.0e4
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="does not turn by RoPE base 1e\\+06"):
        rope.check_saved(loaded, tmp_path / "saved")


def test_both_dialects_are_understood() -> None:
    assert rope.rope_of({"rope_theta": 5e5}) == {"rope_type": "default", "rope_theta": 5e5}
    assert rope.rope_of({}) == {"rope_type": "default", "rope_theta": 10_000.0}
    older = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert rope.rope_of(older) == {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    newer = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    assert rope.rope_of(newer) == rope.rope_of(older)


def test_a_part_of_the_head_that_turns_stays_that_part(make_run: Callable[..., Path]) -> None:
    config = AutoConfig.from_pretrained(load_recipe(make_run(rows=False)).parent_path)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    rope.change_positions(config, ModelSettings(rope_base=1e6))
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def lengthened_run(make_run: Callable[..., Path]) -> Path:
    settings = {"model.rope_base": 1.0e6, **LONGER, "training.train_tokens": 768, "probes.infill_prompts": 0}
    return train(load_recipe(make_run("lcft", **settings)))


def test_a_parent_that_was_lengthened_is_not_lengthened_again(make_run: Callable[..., Path]) -> None:
    parent = str(lengthened_run(make_run))
    for change in ({"model.rope_base": 1.0e8}, {"model.rope_linear_factor": 2.0}, {"model.context_tokens": 512}):
        recipe = load_recipe(make_run("again", **{"parent": parent, **change}))
        with pytest.raises(ValueError, match=r"lengthened by the run `lcft` already .* run `make lcft` \(from stage1\) or"):
            train(recipe)


def test_short_rows_are_not_trained_on_a_lengthened_parent_but_for_instructions(make_run: Callable[..., Path]) -> None:
    parent = str(lengthened_run(make_run))
    recipe = load_recipe(make_run("python", parent=parent))
    with pytest.raises(
        ValueError, match=r"lengthened to 256 positions by the run `lcft`, .* 64 would .*`make lcft FROM=python`"
    ):
        train(recipe)
    instruct = load_recipe(make_run("instruct", parent=parent))
    opened = model.open_parent(instruct)
    model.check_parent(instruct, opened, open_rows(instruct.rows_dir))
    assert rope.describe(opened.config, instruct, opened.manifest)["lengthened_by"] == "lcft"


def test_a_parent_of_others_with_another_base_is_refused(
    make_run: Callable[..., Path], tiny_parent: Path, tmp_path: Path
) -> None:
    def parent_with(name: str, **given: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_parent, folder)
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "default", **given}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    ropes: dict[str, dict[str, Any]] = {"large": {"rope_theta": 1e6}, "linear": {"rope_type": "linear", "factor": 4.0}}
    for name, given in ropes.items():
        recipe = load_recipe(
            make_run(name, parent=str(parent_with(f"{name}-parent", **given)), **{"model.rope_base": 1.0e6})
        )
        with pytest.raises(ValueError, match="has other positions already"):
            train(recipe)
    smaller = parent_with("small-parent", rope_theta=1e5)
    recipe = load_recipe(make_run("small", rows=False, parent=str(smaller), **{"model.rope_base": 1.0e7}))
    loaded = model.load_model(recipe, model.open_parent(recipe))  # SmolLM2's case
    assert loaded.model.rotary_emb.inv_freq[1].item() == pytest.approx(1e7 ** (-2 / 8))


def test_rows_longer_than_the_context_need_a_recipe_that_lengthens_it(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(rows=False, **{"data.sequence_tokens": 192, "training.batch_tokens": 768}))
    config = model.open_parent(recipe).config
    with pytest.raises(
        ValueError, match=r"is 192, but .* 128 positions; write at most 128, or .*`model.context_tokens: 192`"
    ):
        rope.check_positions(recipe, config, {})
    longer = load_recipe(
        make_run(rows=False, **{"data.sequence_tokens": 192, "training.batch_tokens": 768, "model.context_tokens": 192})
    )
    rope.check_positions(longer, config, {})


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("base", "make base SIZE=tiny"),
        ("init", "make base SIZE=tiny"),
        ("stage1-plain", "make stage1 SIZE=tiny ARM=plain"),
        ("python", "make python SIZE=tiny"),
        ("python-lcft", "make lcft SIZE=tiny FROM=python"),
        ("python-lcft-plain", "make lcft SIZE=tiny FROM=python ARM=plain"),
    ],
)
def test_a_missing_stage_names_its_command(name: str, command: str, make_run: Callable[..., Path]) -> None:
    assert make_command(name, "tiny") == command
    recipe = load_recipe(make_run(rows=False, parent=name, size="tiny"))
    with pytest.raises(ValueError, match=rf"no checkpoint there, and `parent` is '{name}'; make it first \({command}\)"):
        model.open_parent(recipe)
