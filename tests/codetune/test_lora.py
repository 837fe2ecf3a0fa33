"""Adapters: what is trained and what is not, the merged model, checkpoints, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from codetune import lora
from codetune.artifacts import open_rows, read_json, row_order, why_invalid
from codetune.model import load_model, open_parent, training_flops_per_token
from codetune.recipe import LoraSettings, Recipe, load_recipe
from codetune.tokens import Codec
from codetune.train import main, train

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0}
TARGETS = LoraSettings().target_modules
SHORT = {"model.lora": LORA, "probes.infill_prompts": 0}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def infill_rows(codec: Codec) -> list[int]:
    infill = codec.need_infill()
    return sorted((infill.prefix, infill.suffix, infill.middle, infill.end))


@pytest.fixture(scope="module")
def trained(make_run_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run with adapters; tests must not write into it."""
    recipe = load_recipe(make_run_in(tmp_path_factory.mktemp("lora"), **{"model.lora": LORA}))
    train(recipe)
    return recipe


@pytest.fixture(scope="module")
def tied_parent(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent with one matrix for embedding and head, as SmolLM2 has."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    shutil.copytree(tiny_parent, folder)
    config = LlamaConfig.from_pretrained(tiny_parent, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


def test_the_merged_model_is_the_parent_but_for_targets_and_new_rows(
    trained: Recipe, tiny_parent: Path, tiny_codec: Codec
) -> None:
    parent, merged = weights_of(tiny_parent), weights_of(trained.model_dir)
    assert set(merged) == set(parent)
    rows = infill_rows(tiny_codec)
    others = [row for row in range(tiny_codec.vocabulary_size) if row not in rows]
    for name, before in parent.items():
        after = merged[name]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(after[others], before[others])
            assert (after[rows] != before[rows]).any(1).all()
        elif name.split(".")[-2] in TARGETS:
            difference = (after - before).double()
            assert not torch.equal(after, before)
            assert torch.linalg.matrix_rank(difference, atol=1e-6) <= LORA["rank"]
        else:
            assert torch.equal(after, before)


def test_the_finished_model_is_plain_and_the_adapter_beside_it_gives_the_same(trained: Recipe, tiny_parent: Path) -> None:
    for folder in (trained.model_dir, trained.adapter_dir):
        assert why_invalid(folder) is None
        assert {"tokenizer.json", "recipe.yaml", "manifest.json"} <= {path.name for path in folder.iterdir()}
    assert "adapter_config.json" not in {path.name for path in trained.model_dir.iterdir()}
    assert "quantization_config" not in read_json(trained.model_dir / "config.json")
    merged = AutoModelForCausalLM.from_pretrained(trained.model_dir)
    assert isinstance(merged, LlamaForCausalLM)
    assert merged.config.use_cache is True
    parent = AutoModelForCausalLM.from_pretrained(tiny_parent)
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        before = parent(input_ids=ids, use_cache=False).logits
        after = merged(input_ids=ids, use_cache=False).logits
        adapted = PeftModel.from_pretrained(parent, str(trained.adapter_dir))
        with_adapter = adapted(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(after, with_adapter, atol=2e-5, rtol=0)
    assert (before - with_adapter).abs().max() > 0.05
    library = adapted.merge_and_unload().state_dict()
    for name, tensor in weights_of(trained.model_dir).items():
        torch.testing.assert_close(tensor, library[name], atol=1e-6, rtol=0)


def test_the_manifest_says_how_well_the_merged_model_agrees(trained: Recipe) -> None:
    merged = read_json(trained.model_dir / "manifest.json")["merged"]
    assert merged["merged_against_adapter"] < 1e-4
    assert merged["adapter_against_parent"] > 0.05


def test_checkpoints_hold_adapter_and_optimizer_alone(trained: Recipe) -> None:
    checkpoint = trained.checkpoints_dir / "checkpoint-8"
    assert why_invalid(checkpoint) is None
    assert not (checkpoint / "model.safetensors").exists()
    saved = load_file(checkpoint / "adapter_model.safetensors")
    layers, hidden, inner, keys = 2, 32, 64, 16
    pairs = LORA["rank"] * (4 * hidden + 2 * (hidden + keys) + 3 * (hidden + inner)) * layers
    assert sum(tensor.numel() for tensor in saved.values()) == pairs + 2 * 4 * hidden
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert sum(state["exp_avg"].numel() for state in optimizer["state"].values()) == pairs + 2 * 4 * hidden


def test_an_untrained_adapter_changes_nothing(make_run: Callable[..., Path], tiny_parent: Path) -> None:
    recipe = load_recipe(make_run(rows=False, **{"model.lora": LORA}))
    model = load_model(recipe, open_parent(recipe))
    merged = lora.merged_state(model, model.state_dict())
    for name, tensor in weights_of(tiny_parent).items():
        assert torch.equal(merged[name], tensor)


def test_gradients_of_new_rows_through_the_fused_head_are_those_of_plain_logits(
    make_run: Callable[..., Path], tiny_parent: Path, tiny_codec: Codec
) -> None:
    """Against autograd on the parent itself, whose whole matrices get a gradient."""
    recipe = load_recipe(make_run(**{"model.lora": LORA}))
    number = next(
        n for n in range(32) if set(infill_rows(tiny_codec)) <= set(open_rows(recipe.rows_dir).row(n)["input_ids"])
    )
    ids = torch.as_tensor(open_rows(recipe.rows_dir).row(number)["input_ids"].astype("int64"))[None]
    model = load_model(recipe, open_parent(recipe))
    model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).loss.backward()
    plain = AutoModelForCausalLM.from_pretrained(tiny_parent)
    logits = plain(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    rows = infill_rows(tiny_codec)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if ".trainable_tokens_delta." in name}
    assert len(found) == 2
    for name, gradient in found.items():
        whole: Any = (plain.model.embed_tokens if "embed_tokens" in name else plain.lm_head).weight.grad
        assert whole[rows].abs().sum(1).min() > 1e-4
        torch.testing.assert_close(gradient, whole[rows], atol=1e-6, rtol=1e-4)


def test_tied_embedding_and_head_are_one_matrix_in_training_and_in_the_export(
    make_run: Callable[..., Path], tied_parent: Path, tiny_codec: Codec
) -> None:
    recipe = load_recipe(make_run(**{**SHORT, "parent": str(tied_parent)}))
    merged, parent = weights_of(train(recipe)), weights_of(tied_parent)
    assert set(merged) == set(parent)
    assert "lm_head.weight" not in merged
    rows = infill_rows(tiny_codec)
    changed = (merged["model.embed_tokens.weight"] != parent["model.embed_tokens.weight"]).any(1).nonzero().flatten()
    assert changed.tolist() == rows


def test_both_heads_and_another_rope_base_train_alike(make_run: Callable[..., Path]) -> None:
    weights = []
    for head in ("fused", "logits"):
        recipe = load_recipe(make_run(head, **{**SHORT, "model.loss_head": head, "model.rope_base": 1e6}))
        weights.append(weights_of(train(recipe)))
        config = read_json(recipe.model_dir / "config.json")
        assert config["rope_parameters"]["rope_theta"] == 1e6
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=2e-5, rtol=1e-3)


def test_bf16_weights_dropout_and_activation_checkpointing_train(make_run: Callable[..., Path]) -> None:
    settings = {
        **SHORT,
        "model.lora": {**LORA, "dropout": 0.1},
        "model.weights_dtype": "bfloat16",
        "model.precision": "bf16",
        "model.activation_checkpointing": True,
    }
    recipe = load_recipe(make_run(**settings))
    merged = weights_of(train(recipe))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    trained = load_file(recipe.adapter_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}  # what is learnt has its full precision
    losses = [line["loss"] for line in map(json.loads, (recipe.run_dir / "metrics.jsonl").open()) if "loss" in line]
    assert losses[-1] < losses[0]


def test_without_new_tokens_rows_stay(make_run: Callable[..., Path], tiny_parent: Path) -> None:
    recipe = load_recipe(
        make_run(**{**SHORT, "model.lora": {**LORA, "train_new_tokens": False, "target_modules": ["q_proj"]}})
    )
    merged = weights_of(train(recipe))
    changed = {name for name, tensor in weights_of(tiny_parent).items() if not torch.equal(tensor, merged[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}


def test_operations_without_gradients_of_frozen_weights() -> None:
    """The shape of `training_flops_per_token`'s example: 200 weights, attention 48; 10 weights in adapters."""
    config = LlamaConfig(
        vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    assert training_flops_per_token(config, 6) == 6 * 200 + 3 * 48
    assert training_flops_per_token(config, 6, adapter_weights=10) == 4 * 200 + 6 * 10 + 3 * 48


# ---------------------------------------------------------------------------------------------------------------------
# Faults, ranks


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(make_run: Callable[..., Path]) -> None:
    settings = {**SHORT, "model.lora": {**LORA, "dropout": 0.1}, "training.train_tokens": 24 * 256}
    straight = load_recipe(make_run("straight", **settings))
    train(straight)
    path = make_run("killed", **settings)
    recipe = load_recipe(path)
    process = multiprocessing.get_context("spawn").Process(target=main, args=(["--recipe", str(path)],))
    process.start()
    end = time.monotonic() + 90
    while not (recipe.checkpoints_dir / "checkpoint-6").exists():
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    train(recipe)
    assert read_json(recipe.model_dir / "manifest.json")["session"]["resumed_from"] is not None
    for folder, file in ((recipe.model_dir, "model.safetensors"), (recipe.adapter_dir, "adapter_model.safetensors")):
        assert (folder / file).read_bytes() == (straight.run_dir / folder.name / file).read_bytes()


def test_a_poisoned_step_is_left_out(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from codetune.trainer import RowTrainer, SafeTraining

    recipe = load_recipe(make_run(**SHORT))
    number = row_order(recipe.seed, 2, 0, 32).tolist()[9]

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        loss = SafeTraining.compute_loss(self, model, inputs, *rest, **named)
        return loss * float("nan") if number in inputs["row_numbers"].tolist() else loss

    monkeypatch.setattr(RowTrainer, "compute_loss", compute_loss)
    merged = weights_of(train(recipe))
    (record,) = [json.loads(line) for line in (recipe.run_dir / "skipped_steps.jsonl").read_text().splitlines()]
    assert record["step"] == 3
    assert all(tensor.isfinite().all() for tensor in merged.values())


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(make_run: Callable[..., Path], trained: Recipe, tmp_path: Path) -> None:
    recipe = load_recipe(make_run("together", **{"model.lora": LORA}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "codetune.train", "--recipe", str(tmp_path / "together.yaml")]
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "bitsandbytes" not in done.stderr
    weights, expected = weights_of(recipe.model_dir), weights_of(trained.model_dir)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# QLoRA


QLORA: dict[str, Any] = {**SHORT, "model.lora": {**LORA, "quantization": "nf4"}}


def test_qlora_trains_on_four_bits_and_exports_what_it_trained(
    make_run: Callable[..., Path], tiny_parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    recipe = load_recipe(make_run(**QLORA))
    folder = train(recipe)
    assert "quantization_config" not in read_json(folder / "config.json")
    lines = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    parent, merged = weights_of(tiny_parent), weights_of(folder)
    pairs = load_file(recipe.adapter_dir / "adapter_model.safetensors")
    for name, tensor in merged.items():
        layer = name.removesuffix(".weight")
        a, b = (pairs.get(f"base_model.model.{layer}.lora_{letter}.weight") for letter in "AB")
        if a is None or b is None:
            continue
        four_bits = functional.quantize_4bit(parent[name], quant_type="nf4", compress_statistics=True)
        expected = functional.dequantize_4bit(*four_bits) + 2.0 * b @ a
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=0)
        assert (tensor - parent[name] - 2.0 * b @ a).abs().max() > 1e-3  # the four bits are seen
    check = read_json(folder / "manifest.json")["merged"]
    assert check["merged_against_adapter"] < 1e-4 < check["adapter_against_parent"]
    with torch.no_grad():  # held-out losses that were measured on four bits hold for the export
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.dtype == torch.float32
    assert "LoRA: " in capsys.readouterr().out


def test_qlora_needs_bitsandbytes(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(make_run(rows=False, **QLORA))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs bitsandbytes, .* not installed; install it \(pip install -e '\.\[qlora\]'\)"
    ):
        lora.quantization_config(recipe, bf16=False)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_target_that_the_model_does_not_have_is_refused(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(rows=False, **{"model.lora": {**LORA, "target_modules": ["q_proj", "k_porj"]}}))
    with pytest.raises(ValueError, match="names 'k_porj', which is no linear layer of this model; did you mean `k_proj`"):
        load_model(recipe, open_parent(recipe))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"`model.lora.rank` is 0; write a number at least 1"),
        ({"alpha": 0.0}, r"`model.lora.alpha` is 0.0; write a number above 0"),
        ({"dropout": 1.0}, r"`model.lora.dropout` is 1.0; write a number at least 0 and below 1"),
        ({"target_modules": []}, r"`model.lora.target_modules` is empty"),
        ({"target_modules": ["lm_head"]}, r"names lm_head: the fused loss head .* would pass over an adapter"),
        ({"quantization": "nf8"}, r"`model.lora.quantization` is 'nf8'; write one of none, nf4; did you mean `nf4`"),
        ({"double_quantization": False}, r"but nothing is quantized; write `quantization: nf4`"),
        ({"ranks": 4}, r"unknown key `model.lora.ranks`; did you mean `rank`"),
    ],
)
def test_settings_that_cannot_be_are_refused(make_run: Callable[..., Path], settings: dict[str, Any], message: str) -> None:
    path = make_run(rows=False, **{"model.lora": settings})
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


@pytest.mark.parametrize(
    ("settings", "layout", "message"),
    [
        (LoraSettings(), "zero3", "rows of single tokens cannot be trained .*; write `train_new_tokens: false`"),
        (LoraSettings(), "fsdp2", "rows of single tokens cannot be trained"),
        (LoraSettings(quantization="nf4"), "zero2", "4-bit weights are neither shared out nor handed to DeepSpeed"),
        (LoraSettings(quantization="nf4", train_new_tokens=False), "fsdp2", "4-bit weights are neither shared out"),
    ],
)
def test_layouts_that_cannot_be_are_refused(tiny_codec: Codec, settings: LoraSettings, layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.check_layout(settings, tiny_codec, layout)


def test_layouts_that_can_be_are_let_through(tiny_codec: Codec) -> None:
    for layout in ("none", "ddp", "zero1", "zero2"):
        lora.check_layout(LoraSettings(), tiny_codec, layout)
    for layout in ("zero3", "fsdp2"):
        lora.check_layout(LoraSettings(train_new_tokens=False), tiny_codec, layout)
    for layout in ("none", "ddp"):
        lora.check_layout(LoraSettings(quantization="nf4"), tiny_codec, layout)


def test_a_merged_model_that_gives_other_logits_is_not_kept(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = lora.merged_state

    def wrong(model: Any, state: Any) -> dict[str, torch.Tensor]:
        return {name: tensor * 1.1 if "down_proj" in name else tensor for name, tensor in original(model, state).items()}

    monkeypatch.setattr(lora, "merged_state", wrong)
    recipe = load_recipe(make_run(**SHORT))
    with pytest.raises(ValueError, match=r"the merged model's logits differ by .*; it was not kept"):
        train(recipe)
    assert not recipe.model_dir.exists()
