"""One canary per behaviour of a library that training leans on: when an upgrade changes it, it shows here."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Trainer

from codetune import adapter, cpu_ranks
from codetune.recipe import load_recipe
from codetune.steps import derive_steps


@pytest.fixture
def model(tiny_parent: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_parent, dtype=torch.float32)
    adapter.add_fused_head(model)
    return model


def random_batch(seed: int = 0, rows: int = 2, tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 300, (rows, tokens), generator=generator)
    labels = torch.where(torch.rand(rows, tokens, generator=generator) < 0.3, -100, input_ids)
    return input_ids, labels


def test_the_arguments_are_those_of_the_recipe(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(rows=False))
    arguments = adapter.training_arguments(recipe, derive_steps(recipe, 1), bf16=False)
    assert arguments.train_sampling_strategy == "sequential"
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.9, 0.95, 1e-5)
    assert arguments.max_grad_norm == 1.0
    assert arguments.average_tokens_across_devices
    assert not arguments.logging_nan_inf_filter
    assert arguments.save_total_limit is None
    assert arguments.use_cache is False
    assert arguments.report_to == []


def test_the_recipe_and_not_the_launcher_decides_the_precision(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(make_run(rows=False))
    steps = derive_steps(recipe, 1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as our files say
    for bf16 in (True, False):
        arguments = adapter.training_arguments(recipe, steps, bf16)
        assert arguments.mixed_precision == ("bf16" if bf16 else "no")
        adapter.check_arguments(arguments, 1, bf16)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="launcher says mixed_precision 'bf16', but .* computes in fp32; write .*'no'"):
        adapter.check_arguments(adapter.training_arguments(recipe, steps, bf16=False), 1, bf16=False)


def test_no_launcher_file_decides_the_precision() -> None:
    files = sorted((Path(__file__).parents[2] / "recipes" / "accelerate").glob("*.yaml"))
    assert len(files) == 8
    assert {yaml.safe_load(file.read_text())["mixed_precision"] for file in files} == {"no"}


def test_several_gpus_without_a_launcher_are_refused() -> None:
    arguments: Any = SimpleNamespace(n_gpu=2, world_size=1, mixed_precision="no")
    with pytest.raises(
        ValueError, match=r"2 GPUs .* ACCELERATE=recipes/accelerate/ddp\.yaml, or set CUDA_VISIBLE_DEVICES=0"
    ):
        adapter.check_arguments(arguments, 1, bf16=False)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is here")
def test_deepspeed_is_told_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    cpu_ranks.settle_deepspeed()
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    cpu_ranks.settle_deepspeed()
    assert os.environ["DS_ACCELERATOR"] == "xpu"


def test_the_sequential_strategy_reads_in_order(make_run: Callable[..., Path], model: Any) -> None:
    recipe = load_recipe(make_run(rows=False))
    trainer = Trainer(
        model, adapter.training_arguments(recipe, derive_steps(recipe, 1), bf16=False), train_dataset=list(range(9))
    )
    sampler = trainer._get_train_sampler()
    assert sampler is not None
    assert list(sampler) == list(range(9))


def test_the_fused_loss_is_the_cross_entropy_and_so_are_its_gradients(model: Any) -> None:
    input_ids, labels = random_batch()
    loss = model(input_ids=input_ids, labels=labels, fused_lm_head=True, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    fused = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=input_ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / 7
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fused[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_token_losses_stand_at_the_token_they_foretell(model: Any) -> None:
    input_ids, labels = random_batch()
    model.eval()
    losses = adapter.fused_token_losses(model, input_ids, labels)
    logits = model(input_ids=input_ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0, 6], input_ids[0, 7])
    assert losses.shape == input_ids.shape
    if labels[0, 7] != -100:
        torch.testing.assert_close(losses[0, 7], expected)
    assert losses[labels == -100].eq(0).all()
    assert losses[:, 0].eq(0).all()


def test_selected_logits_are_the_rows_of_all_logits(model: Any) -> None:
    input_ids, _ = random_batch()
    positions = torch.arange(20).expand(2, -1)
    some = adapter.selected_logits(model, input_ids, positions, torch.tensor([3, 7]))
    torch.testing.assert_close(some, model(input_ids=input_ids, use_cache=False).logits[:, [3, 7]])


def test_a_step_without_gradients_leaves_weights_and_optimizer_alone(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    input_ids, labels = random_batch()
    model(input_ids=input_ids, labels=labels, fused_lm_head=True).loss.backward()
    optimizer.step()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    states = [{name: value.clone() for name, value in state.items()} for state in optimizer.state.values()]
    (model(input_ids=input_ids, labels=labels, fused_lm_head=True).loss * float("nan")).backward()
    adapter.leave_out_step(model)
    optimizer.step()
    for before, parameter in zip(weights, model.parameters(), strict=True):
        assert torch.equal(before, parameter)
    for before, state in zip(states, optimizer.state.values(), strict=True):
        assert all(torch.equal(value, state[name]) for name, value in before.items())


def test_weight_decay_is_on_matrices_and_not_on_norms(make_run: Callable[..., Path], model: Any) -> None:
    recipe = load_recipe(make_run(rows=False))
    trainer = Trainer(model, adapter.training_arguments(recipe, derive_steps(recipe, 1), bf16=False))
    names = set(trainer.get_decay_parameter_names(model))
    assert {name for name, parameter in model.named_parameters() if parameter.dim() == 2} == names
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]


def test_the_peak_of_a_known_gpu_is_found() -> None:
    assert adapter.peak_flops_of_gpu("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert adapter.peak_flops_of_gpu("a device of no known name", "bfloat16") is None


def test_a_copy_in_memory_is_left_alone_by_training_and_keeps_what_is_tied() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = {
        "embed": weight,
        "head": weight,
        "state": {0: {"step": torch.tensor(3.0), "moment": weight.T}},
        "groups": [{"lr": 0.1}],
    }
    copied = adapter.copy_in_memory(state)
    weight.add_(10.0)
    assert copied["embed"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert copied["head"].data_ptr() == copied["embed"].data_ptr() != weight.data_ptr()
    assert copied["state"][0]["moment"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert copied["state"][0]["step"].item() == 3.0
    assert copied["groups"] == [{"lr": 0.1}]


def test_the_bytes_of_a_checkpoint_are_weights_and_two_moments() -> None:
    """4 bytes a weight, and 8 of AdamW where it is trained: 6 x 12 + 2 x 4."""
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert adapter.checkpoint_bytes(model) == 80


def test_a_batch_that_teaches_nothing_has_gradients_of_zero(model: Any) -> None:
    input_ids, _ = random_batch()
    loss = model(input_ids=input_ids, labels=torch.full_like(input_ids, -100), fused_lm_head=True).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_the_head_with_losses_is_the_output_layer_itself(model: Any, tiny_parent: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_parent, dtype=torch.float32)
    assert list(model.state_dict()) == list(plain.state_dict())
    hidden = torch.randn(2, 3, plain.config.hidden_size)
    assert torch.equal(model.lm_head(hidden), plain.lm_head(hidden))
    assert adapter.HeadWithLosses.__mro__[1] is torch.nn.Linear


@pytest.mark.parametrize(("name", "value"), [("logit_scale", 0.5), ("output_router_logits", True)])
def test_a_model_whose_loss_is_another_one_is_refused(tiny_parent: Path, name: str, value: Any) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_parent, dtype=torch.float32)
    setattr(plain.config, name, value)
    with pytest.raises(ValueError, match=f"this model has {name} in its configuration, which the fused head does not know"):
        adapter.add_fused_head(plain)
