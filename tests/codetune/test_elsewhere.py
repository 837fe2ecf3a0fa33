"""A folder that would mislead whoever downloads it is not published, and what each reader makes of it is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from codetune.elsewhere import check_folder, check_parts, older_tokenizer_config
from codetune.rope import write_older_dialect
from codetune.tokens import open_codec


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
    assert said["GGUF"] == "BPE with byte fallback (tokenizer.json): converts as a Llama vocabulary"


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


def test_the_older_words_for_a_tokenizer_mean_the_same_ids(folder: Path) -> None:
    """Read by transformers 5 here; version 4.57.6 gave the same ids for both (`make bench ONLY=elsewhere`)."""
    from transformers import AutoTokenizer

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
