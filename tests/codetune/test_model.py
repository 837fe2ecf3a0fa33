"""The parent, its fit to the rows, isolation of documents, and arithmetic counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from codetune import adapter, model
from codetune.artifacts import open_rows
from codetune.collate import RowCollator, RowDataset
from codetune.recipe import Recipe, load_recipe


def packed_batch(recipe: Recipe, rows_at_once: int = 2, isolate: bool = True) -> dict[str, torch.Tensor]:
    rows = open_rows(recipe.rows_dir)
    dataset = RowDataset(rows, recipe.seed, 8)
    collator = RowCollator(64, pad_id=0, isolate_documents=isolate, sources=2, layouts=3)
    return collator([dataset[place] for place in range(rows_at_once)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(make_run: Callable[..., Path], attention: str) -> None:
    recipe = load_recipe(make_run(**{"model.attention": attention}))
    loaded = model.load_model(recipe, model.open_parent(recipe))
    assert model.check_isolation(loaded, packed_batch(recipe), bf16=False) < 1e-5


def test_the_packed_batch_is_run_once_and_each_document_once(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(make_run())
    loaded = model.load_model(recipe, model.open_parent(recipe))
    shapes: list[tuple[int, ...]] = []
    original = adapter.selected_logits

    def noted(model: Any, input_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(input_ids.shape))
        return original(model, input_ids, *rest)

    monkeypatch.setattr(adapter, "selected_logits", noted)
    batch = packed_batch(recipe)
    model.check_isolation(loaded, batch, bf16=False)
    documents = [min(int(row.eq(0).sum()), model.ISOLATION_DOCUMENTS) for row in batch["position_ids"]]
    assert shapes[0] == (2, 64)
    assert len(shapes) == 1 + sum(documents)
    assert {shape[0] for shape in shapes[1:]} == {1}


def test_a_leak_in_a_wrapped_model_is_refused_too(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run())

    class Wrapped(torch.nn.Module):
        """As DDP and DeepSpeed's engine: the model is `.module`, and there is no `.config`."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.module = inner

        def forward(self, **named: Any) -> Any:
            return self.module(**named)

    wrapped = Wrapped(model.load_model(recipe, model.open_parent(recipe)))
    assert model.check_isolation(wrapped, packed_batch(recipe), bf16=False) < 1e-5
    original = wrapped.module.forward
    wrapped.module.forward = lambda **named: original(**{**named, "use_cache": True})
    with pytest.raises(ValueError, match="with `model.attention` sdpa and 2 row"):
        model.check_isolation(wrapped, packed_batch(recipe), bf16=False)


def test_a_leak_between_documents_is_refused(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(make_run())
    loaded = model.load_model(recipe, model.open_parent(recipe))

    def with_cache(model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=True, logits_to_keep=keep).logits

    monkeypatch.setattr(adapter, "selected_logits", with_cache)  # the library's default, which leaks and says nothing
    with pytest.raises(
        ValueError, match="packed documents see each other: their logits differ by .* with `model.attention` sdpa"
    ):
        model.check_isolation(loaded, packed_batch(recipe), bf16=False)


def test_a_model_is_loaded_in_the_dtype_that_the_recipe_says(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(rows=False, **{"model.weights_dtype": "bfloat16"}))
    loaded = model.load_model(recipe, model.open_parent(recipe))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config.use_cache is False


def test_a_missing_attention_implementation_is_refused(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(rows=False, **{"model.attention": "flash_attention_2"}))
    with pytest.raises(ValueError, match="`model.attention` flash_attention_2 is not installed here .* write sdpa"):
        model.load_model(recipe, model.open_parent(recipe))


def test_a_missing_parent_says_what_to_make(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run(rows=False, parent="base"))
    with pytest.raises(
        ValueError, match=r"no checkpoint there, and `parent` is 'base'; make it first \(make base SIZE=test\)"
    ):
        model.open_parent(recipe)


def test_a_folder_that_is_no_checkpoint_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(make_run(rows=False, parent=str(tmp_path)))
    with pytest.raises(ValueError, match="no readable checkpoint"):
        model.open_parent(recipe)


def test_rows_longer_than_the_context_are_refused(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run())
    parent, rows = model.open_parent(recipe), open_rows(recipe.rows_dir)
    parent.config.max_position_embeddings = 32
    with pytest.raises(
        ValueError, match="`data.sequence_tokens` is 64, but .* has a context of 32 positions; write at most 32"
    ):
        model.check_parent(recipe, parent, rows)


def test_rows_of_another_tokenizer_are_refused(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run())
    rows = open_rows(recipe.rows_dir)
    rows.manifest["tokenizer"] = "other"
    with pytest.raises(ValueError, match="built with another tokenizer"):
        model.check_parent(recipe, model.open_parent(recipe), rows)


def test_infilling_without_its_tokens_is_refused(make_run: Callable[..., Path]) -> None:
    recipe = load_recipe(make_run())
    parent, rows = model.open_parent(recipe), open_rows(recipe.rows_dir)
    parent.codec.infill = None
    with pytest.raises(ValueError, match=r"`data.fim.rate` is above 0, but .* has no infilling tokens"):
        model.check_parent(recipe, parent, rows)
    plain = dataclasses.replace(recipe.need_data(), fim=dataclasses.replace(recipe.need_data().fim, rate=0.0))
    model.check_parent(dataclasses.replace(recipe, data=plain), parent, rows)


def test_operations_per_token_by_hand() -> None:
    shape = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 10}
    # weights: q, k, v, o 4 x 16, three matrices of 4 x 8, head 40: 200; attention 2 (scores, mix) x 2 x 4 x 3 keys = 48
    assert model.training_flops_per_token(LlamaConfig(**shape), 6) == 6 * 200 + 3 * 48


def test_operations_per_token_agree_with_trl() -> None:
    from trl.trainer.utils import adjusted_mfu, compute_flops_per_token

    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**shape, intermediate_size=11008, vocab_size=32016)
    causal = compute_flops_per_token(config, 4096) * adjusted_mfu(1.0, config, 4096)
    assert model.training_flops_per_token(config, 4096) == pytest.approx(causal, rel=1e-12)


def test_utilisation_by_hand_and_never_above_100(caplog: pytest.LogCaptureFixture) -> None:
    assert model.utilisation(1000.0, 6_000_000_000, 10e12, devices=2) == 30.0
    assert model.utilisation(1000.0, 6_000_000_000, None, devices=2) is None
    assert model.utilisation(1000.0, 6_000_000_000, 1e12, devices=2) is None
    assert "reported as unknown" in caplog.text
