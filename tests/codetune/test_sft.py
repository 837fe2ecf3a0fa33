"""Instruction tuning on trl's trainer: what is checked before, what is learnt, and what comes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codetune.artifacts import model_hash, open_rows, read_json
from codetune.chat import Turn, prompt_ids, render
from codetune.collate import RowCollator, RowDataset
from codetune.recipe import load_recipe
from codetune.sft import answers_table, check_conversation, code_of, complete, marked, parses, tune
from codetune.tokens import Codec, open_codec
from data_pipelines.build import build

STEPS, BATCH = 6, 512


@pytest.fixture(scope="module")
def tuned(chat_recipe_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that was run: six steps on conversations and rehearsal."""
    folder = tmp_path_factory.mktemp("tuned")
    path = chat_recipe_in(
        folder,
        training__train_tokens=STEPS * BATCH,
        training__micro_batch_rows=2,
        training__save_tokens=3 * BATCH,
        training__keep_checkpoints=9,
        training__log_tokens=BATCH,
        data__packing={"group_rows": 24},
        model={"precision": "fp32"},
        probes={"infill_prompts": 2, "infill_new_tokens": 4, "chat_prompts": 3, "chat_new_tokens": 5},
    )
    recipe = load_recipe(path)
    build(recipe)
    tune(recipe)
    return path


def test_the_loss_is_that_of_answers_and_rehearsal_alone(tuned: Path, tiny_parent: Path) -> None:
    """The first logged loss against the parent's own, by the model's plain logits and the mask in the rows."""
    from transformers import AutoModelForCausalLM

    recipe = load_recipe(tuned)
    rows = open_rows(recipe.rows_dir)
    codec = open_codec(tiny_parent)
    collator = RowCollator(128, codec.pad_id, True, 3, 3)
    dataset = RowDataset(rows, recipe.seed, BATCH // 128)
    batch = collator([dataset[place] for place in range(BATCH // 128)])
    assert 0 < (batch["labels"] != -100).sum() < 0.9 * BATCH
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_parent, dtype=torch.float32)
    with torch.no_grad():
        logits_BTV = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    wanted = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    lines = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line.get("step") == 1 and "loss" in line)
    assert first["loss"] == pytest.approx(wanted.item(), abs=2e-4)


def test_a_stopped_run_goes_on_to_the_same_weights(tuned: Path) -> None:
    recipe = load_recipe(tuned)
    finished = model_hash(recipe.model_dir)
    kept = recipe.run_dir / "kept"
    recipe.model_dir.rename(kept)
    shutil.rmtree(recipe.checkpoints_dir / f"checkpoint-{STEPS}")
    try:
        assert model_hash(tune(recipe)) == finished
        assert read_json(recipe.model_dir / "manifest.json")["session"]["resumed_from"] == "checkpoint-3"
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def test_the_finished_folder_has_the_template_and_answers(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    recipe = load_recipe(tuned)
    folder = tune(recipe)  # there already
    printed = capsys.readouterr().out
    assert "is there already" in printed and "held-out prompts answered: stop rate" in printed
    facts = read_json(folder / "manifest.json")
    assert facts["chat"]["prompts"] == 3 and len(facts["chat"]["examples"]) == 3
    assert 0 <= facts["chat"]["stop_rate"] <= 1
    assert {"held_out/chat/answer", "held_out/chat/answer_end"} <= set(facts["held_out"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "total 1 ?"}]
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert theirs["input_ids"] == prompt_ids(open_codec(folder), [Turn("user", "total 1 ?")], "llama2")


def test_one_row_is_printed_with_its_mask(
    chat_recipe_in: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(chat_recipe_in(tmp_path, training__train_tokens=BATCH, model={"precision": "fp32"}))
    build(recipe)
    capsys.readouterr()
    tune(recipe)
    printed = capsys.readouterr().out
    assert "conversations looked at; row 0, with what is learnt of it between >> and <<:" in printed
    assert "[/INST]>> value value value" in printed and "</s><<" in printed
    assert printed.index("conversations looked at") < printed.index("step 1/1"), "before training begins"


def test_a_mask_for_people_shows_what_is_learnt(tiny_codec: Codec) -> None:
    rendered = render(tiny_codec, [Turn("user", "x"), Turn("assistant", "y")], "llama2")
    assert marked(rendered.ids, rendered.learnt, tiny_codec) == "<s>[INST] x [/INST]>> y </s><<"


def test_conversations_that_would_teach_the_wrong_thing_are_refused(tiny_codec: Codec) -> None:
    rendered = render(tiny_codec, [Turn("user", "x"), Turn("assistant", "y")], "llama2")
    ids, learnt = np.array(rendered.ids), np.array(rendered.learnt)
    stop = tiny_codec.eos_id or 0
    check_conversation(ids, learnt, stop, tiny_codec, "here")
    for changed_ids, changed, message in (
        (ids, np.zeros_like(learnt), "here: nothing of it is learnt"),
        (ids, np.ones_like(learnt), "here: all of it is learnt"),
        (ids, learnt & (np.arange(len(ids)) < len(ids) - 1), "does not end with a learnt stop token"),
        (ids[:-1], learnt[:-1], "does not end with a learnt stop token"),
        (np.array([ids[0], *ids]), np.array([False, *learnt]), "a begin token stands twice"),
    ):
        with pytest.raises(ValueError, match=message):
            check_conversation(changed_ids, changed, stop, tiny_codec, "here")


def test_a_recipe_without_conversations_is_sent_to_the_other_command(make_run: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="has no `data.chat`; train it with python -m codetune.train"):
        tune(load_recipe(make_run(rows=False)))


def test_the_70b_format_puts_its_token_where_readers_look_for_it(
    tiny_tokenizer: Any, save_llama: Callable[..., Path], chat_recipe_in: Callable[..., Path], tmp_path: Path
) -> None:
    """A vocabulary with an unused last row: training uses it, the finished folder names it."""
    from transformers import AutoTokenizer

    folder = save_llama(tmp_path / "model", tiny_tokenizer, vocab_size=len(tiny_tokenizer) + 8)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 327]}))
    before = open_codec(folder)
    assert before.step_id == len(tiny_tokenizer) + 7
    path = chat_recipe_in(tmp_path, data__chat={"template": "source"})
    complete(load_recipe(path), folder)
    after = open_codec(folder)
    assert after.step_id == before.step_id and after.name(before.step_id) == "<step>"
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [2, 327, before.step_id]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<step>") == before.step_id
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert asked["input_ids"] == prompt_ids(after, [Turn("user", "x")], "source")


def test_answers_are_code_only_between_their_tags() -> None:
    assert code_of("[PYTHON]\nx = 1\n[/PYTHON]") == "x = 1"
    for answer in ("x = 1", "[PYTHON]\nx = 1", "Sure: [PYTHON]\nx\n[/PYTHON]", "[PYTHON]\nx\n[PYTHON]\n[/PYTHON]"):
        assert code_of(answer) is None
    assert parses("x = 1") and not parses("x =") and not parses("") and not parses(None)
    assert answers_table({}) == ""
