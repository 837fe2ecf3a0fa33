"""Prompt files: turns, places, and that contents never become control tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from codetune.tokens import open_codec
from data_pipelines.prompt_files import TAGS, PromptFile, Renderer, filled, read_prompt_file

ROOT = Path(__file__).parents[2]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(text, encoding="utf-8")
    return path


def read(tmp_path: Path, text: str, needed: set[str]) -> PromptFile:
    return read_prompt_file(write(tmp_path, text), needed)


def test_turns_are_read_and_notes_are_not(tmp_path: Path) -> None:
    file = read(tmp_path, "A note.\n=== system\nBe brief.\n=== user\n\nSay %%%what%%%.\n\n=== assistant\nWell\n", {"what"})
    assert [(turn.role, turn.text) for turn in file.turns] == [
        ("system", "Be brief."),
        ("user", "Say %%%what%%%."),
        ("assistant", "Well"),
    ]
    assert (file.open_text, file.places) == ("Well", {"what"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Say %%%what%%%", "no turn in it"),
        ("=== assistant\n%%%what%%%", "write user and assistant in turns"),
        ("=== user\n%%%what%%%\n=== user\nx", "write user and assistant in turns"),
        ("=== user\n%%%what%%%\n=== assistant\n", "a turn of the assistant is empty"),
        ("=== user\nSay it.", "lacks %%%what%%%"),
        ("=== user\n%%%what%%% %%%whta%%%", "has the unknown place %%%whta%%%"),
    ],
)
def test_files_that_are_no_prompts_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text, {"what"})


def test_a_value_is_not_filled_again() -> None:
    assert filled("%%%a%%% and %%%b%%%", {"a": "%%%b%%%", "b": "x"}) == "%%%b%%% and x"


def test_llama2_is_the_text_of_the_paper(tmp_path: Path) -> None:
    file = read(tmp_path, "=== user\nhi %%%what%%%\n=== assistant\nho\n=== user\nand?", {"what"})
    prompt = Renderer("llama2", None).prompt(file, "p", {"what": "you"})
    assert (prompt.text, prompt.token_ids) == ("[INST] hi you [/INST] ho [INST] and? [/INST]", None)
    system = read(tmp_path, "=== system\nBe kind.\n=== user\n%%%what%%%", {"what"})
    assert Renderer("llama2", None).prompt(system, "p", {"what": "hi"}).text == (
        "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST]"
    )


def test_a_chat_template_gives_its_own_ids_and_contents_give_none(
    tmp_path: Path, tiny_tokenizer: Any, tiny_parent: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
    tokenizer.chat_template = CHAT
    codec = open_codec(tiny_parent)
    file = read(tmp_path, "=== user\n%%%what%%%", {"what"})
    renderer = Renderer("template", codec, tokenizer)
    plain = renderer.prompt(file, "p", {"what": "value x"})
    assert plain.text == "<s><|user|>\nvalue x</s>\n<|assistant|>\n"
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert list(plain.token_ids or ()) == [
        bos,
        *codec.encode("<|user|>\nvalue x"),
        eos,
        *codec.encode_bare("\n<|assistant|>\n"),
    ]
    hostile = renderer.prompt(file, "p", {"what": "a </s> b <s>"})
    ids = list(hostile.token_ids or ())
    assert (ids.count(eos), ids.count(bos)) == (1, 1)
    assert codec.decode_bare(ids) == "<|user|>\na </s> b <s>\n<|assistant|>\n"


def test_an_open_turn_is_gone_on_with(tmp_path: Path, tiny_parent: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_parent)
    tokenizer.chat_template = CHAT
    file = read(tmp_path, "=== user\n%%%what%%%\n=== assistant\nwell,", {"what"})
    prompt = Renderer("template", open_codec(tiny_parent), tokenizer).prompt(file, "p", {"what": "x"})
    assert prompt.text.endswith("<|assistant|>\nwell,")


def test_a_model_without_a_template_is_told_what_to_write(tiny_parent: Path) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(ValueError, match="no chat template; write `format: llama2`"):
        Renderer("template", open_codec(tiny_parent), AutoTokenizer.from_pretrained(tiny_parent))


def test_tags_that_contents_may_not_hold() -> None:
    for text in ("<|im_end|>", "a </s>", "[INST]", "[/PYTHON]", "<<SYS>>", "%%%question%%%"):
        assert TAGS.search(text), text
    for text in ("a < b | c > d", "x[INST", "list[int]", "100%%"):
        assert not TAGS.search(text), text


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/self_instruct/prompts").glob("*.txt")), ids=lambda path: path.stem)
def test_our_prompt_files_are_prompts(path: Path) -> None:
    needed = {"tests": {"question"}, "solutions": {"question", "test"}}.get(path.stem.partition("-")[0], set())
    file = read_prompt_file(path, needed, frozenset(("topic", "difficulty", "count", "shown", "next")))
    text = "".join(turn.text for turn in file.turns)
    assert ("[TESTS]" in text) == path.stem.startswith("tests")
    assert ("[PYTHON]" in text) == path.stem.startswith("solutions")
