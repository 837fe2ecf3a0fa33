"""A folder that would mislead whoever downloads it is not published, and what each reader makes of it is said."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from codetune.artifacts import read_json
from codetune.elsewhere import (
    added_behind_pieces,
    check_folder,
    check_parts,
    gguf_vocabulary,
    older_tokenizer_config,
)
from codetune.rope import write_older_dialect
from codetune.tokens import INFILL_CONTENTS, open_codec


@pytest.fixture
def folder(tiny_parent: Path, tmp_path: Path) -> Path:
    target = Path(shutil.copytree(tiny_parent, tmp_path / "model"))
    write_older_dialect(target)
    codec = open_codec(target)
    change(target / "generation_config.json", eos_token_id=[codec.eos_id, codec.need_infill().end])
    return target


def change(path: Path, **changes: Any) -> None:
    tree = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in {**tree, **changes}.items() if value is not None}))


def test_every_reader_is_told(folder: Path) -> None:
    said = {reading.reader: reading.words for reading in check_folder(folder)}
    assert said["vLLM"].startswith("LlamaForCausalLM") and "rope_theta 10000" in said["transformers 4"]
    assert said["GGUF"].startswith("BPE with byte fallback: converts, to ids that differ from training's")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"rope_theta": None}, "rope_theta says None; older readers need both"),
        ("config.json", {"rope_theta": 1e6}, "rope_parameters say base 10000.0, rope_theta says 1000000.0"),
        ("config.json", {"architectures": None}, "no architectures; readers do not know which model it is"),
        ("config.json", {"vocab_size": 100}, "tokenizer.json: ids up to 3[0-9][0-9], and config.json: 100 rows"),
        ("generation_config.json", {"eos_token_id": 2}, "generation would not stop at the end of a middle"),
        ("generation_config.json", {"eos_token_id": None}, "generation would not stop at the end of a text"),
        (
            "model.safetensors.index.json",
            {"weight_map": {"lost.weight": "model.safetensors"}},
            "it does not name the weights",
        ),
    ],
)
def test_what_would_mislead_is_refused(folder: Path, file: str, changes: dict[str, Any], message: str) -> None:
    change(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        check_folder(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", r"no weights \(model\*\.safetensors\): make the model again"),
        ("tokenizer.json", "no tokenizer.json: without the tokenizer nobody can ask the model anything"),
        ("tokenizer_config.json", "no tokenizer_config.json: readers would guess"),
        ("config.json", "no config.json: no reader knows the model's shape"),
    ],
)
def test_a_folder_without_weights_or_tokenizer_is_refused(folder: Path, file: str, message: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"not fit to be published: {message}"):
        check_folder(folder)
    with pytest.raises(
        ValueError, match="no weights .*adapter_model.safetensors.*; no adapter_config.json: no reader knows"
    ):
        check_parts(folder, adapter=True)


def test_weights_that_were_cut_off_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: [\d,]+ bytes instead of the [\d,]+ of its header"):
        check_folder(folder)
    path.write_bytes(b"not one")
    with pytest.raises(ValueError, match="model.safetensors: not readable as safetensors"):
        check_folder(folder)


def test_what_a_converter_to_gguf_makes_of_a_vocabulary(folder: Path, tmp_path: Path) -> None:
    """Each answer is how llama.cpp's own converter and server ended on such a vocabulary (docs/publishing.md)."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    tree, names = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    assert added_behind_pieces(folder) == {}
    gap = copy.deepcopy(tree)
    last = max(token["id"] for token in gap["added_tokens"])
    for token in gap["added_tokens"]:
        token["id"] += 7 * (token["id"] == last)
    gap["model"]["vocab"] = {piece: number for piece, number in gap["model"]["vocab"].items() if number < last}
    assert f"does not convert, as id {last} is no token" in gguf_vocabulary(folder, gap, names)
    byte_level = {"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": []}
    assert gguf_vocabulary(folder, byte_level, names).startswith("byte-level BPE: converts only where")

    (tmp_path / "text").write_text("def f(x):\n    return x + 1\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=274,
        byte_fallback=True,
        minloglevel=2,
    )
    added = added_behind_pieces(folder)
    assert [token["content"] for token in added.values()] == list(INFILL_CONTENTS)
    assert {number: token["special"] for number, token in added.items()} == {
        str(token["id"]): True for token in tree["added_tokens"] if token["content"] in INFILL_CONTENTS
    }
    assert "converts, and loses ▁<PRE>, ▁<SUF>" in gguf_vocabulary(folder, tree, names)
    text, before = "def f(x):\n    return ▁<PRE>x</s>", AutoTokenizer.from_pretrained(folder)
    change(folder / "tokenizer_config.json", **{**older_tokenizer_config(names), "added_tokens_decoder": added})
    after, names = AutoTokenizer.from_pretrained(folder), read_json(folder / "tokenizer_config.json")
    assert (
        gguf_vocabulary(folder, tree, names) == "vocabulary of SentencePiece (tokenizer.model) and 4 added tokens: converts"
    )
    assert after.encode(text) == before.encode(text) and after.all_special_ids == before.all_special_ids


def test_the_older_words_for_a_tokenizer_mean_the_same_ids(folder: Path) -> None:
    """Read by transformers 5 here; version 4.57.6 gave the same ids for both (`make bench ONLY=elsewhere`)."""
    text = "def f(x):\n    return ▁<PRE>x</s>"
    before = AutoTokenizer.from_pretrained(folder)
    tree = json.loads((folder / "tokenizer_config.json").read_text())
    changed = older_tokenizer_config(tree)
    assert changed["tokenizer_class"] == "PreTrainedTokenizerFast" and isinstance(changed["additional_special_tokens"], list)
    assert changed["model_input_names"] == ["input_ids", "attention_mask"]  # `generate` of a Llama refuses token_type_ids
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    after = AutoTokenizer.from_pretrained(folder)
    assert after.encode(text) == before.encode(text) and after.all_special_ids == before.all_special_ids
    assert (after.bos_token_id, after.eos_token_id) == (before.bos_token_id, before.eos_token_id)
    assert older_tokenizer_config({"tokenizer_class": "LlamaTokenizerFast"}) == {"tokenizer_class": "LlamaTokenizerFast"}
