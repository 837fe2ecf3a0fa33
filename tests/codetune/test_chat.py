"""Chat formats against published ids, what is learnt of them, and conversations that are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from codetune.chat import JINJA, BadConversation, Turn, meta_history_ids, prompt_ids, render, stop_ids, turns_of
from codetune.tokens import CODE_LLAMA_ROWS, Codec, open_codec

ASK, ANSWER = Turn("user", "hi"), Turn("assistant", "yes")
PUBLISHED_70B = (
    "1,7562,29901,1788,13,13,2184,9508,32015,7562,29901,1404,13,13,3824,1404,2346,32015,7562,29901,20255,13,13,8125,2933,304,"
    "937,2346,32015,7562,29901,1404,13,13,6440,1404,2346,32015,7562,29901,20255,13,14994,3381,29901,1404,13,13,29871"
)
TALK = [ASK, ANSWER, Turn("user", "x = 1"), Turn("assistant", "y = 2\nz")]


@pytest.fixture(scope="module")
def llama2(llama2_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """Code Llama's tokenizer: Llama 2's, with the four infill tokens and 32,016 rows."""
    folder = tmp_path_factory.mktemp("llama2")
    llama2_tokenizer.save_pretrained(folder / "grown")
    (folder / "grown" / "config.json").write_text(json.dumps({"vocab_size": CODE_LLAMA_ROWS}))
    return open_codec(folder / "grown")


@pytest.fixture(scope="module")
def codec(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """The tiny tokenizer with a `<step>`."""
    folder = tmp_path_factory.mktemp("stepped")
    stepped(tiny_tokenizer).save_pretrained(folder)
    return open_codec(folder)


def stepped(tokenizer: Any) -> Any:
    copied = copy.deepcopy(tokenizer)
    copied.add_special_tokens({"extra_special_tokens": ["<step>"]}, replace_extra_special_tokens=False)
    return copied


# --- What the ids are ------------------------------------------------------------------------------------------------


def test_llama2_question_has_the_published_ids(llama2: Codec) -> None:
    assert prompt_ids(llama2, [ASK], "llama2") == [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]


def test_the_70b_dialogue_has_the_published_ids(llama2: Codec) -> None:
    codec = llama2
    assert codec.step_id == 32_015
    dialogue = [
        Turn("system", "System prompt"),
        Turn("user", "First user query"),
        Turn("assistant", "Model response to first query"),
        Turn("user", "Second user query"),
    ]
    published = [int(token) for token in PUBLISHED_70B.split(",")]
    assert meta_history_ids(codec, dialogue) == published
    # ours repeats the layout of training: the same up to the first answer, and the same end of the prompt
    own = prompt_ids(codec, dialogue, "source")
    assert own[:21] == published[:21] and own[-10:] == published[-10:]


def test_an_answer_is_encoded_as_if_it_stood_in_one_text_with_its_question(llama2: Codec) -> None:
    for answer in ("yes", "x = [1]\n    return x", "[PYTHON]\ndef f():\n    pass\n[/PYTHON]", "é 你"):
        rendered = render(llama2, [ASK, Turn("assistant", answer)], "llama2")
        assert rendered.ids == [1, *llama2.encode(f"[INST] hi [/INST] {answer} "), 2]


def test_turns_stand_where_the_format_says(codec: Codec) -> None:
    bos, eos = codec.bos_id, codec.eos_id
    rendered = render(codec, [Turn("system", "be brief"), *TALK], "llama2")
    first, second = "[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nhi [/INST]", "[INST] x = 1 [/INST]"
    parts = [[bos, *codec.encode(first)], [*codec.encode_bare(" yes "), eos]]
    parts += [[bos, *codec.encode(second)], [*codec.encode_bare(" y = 2\nz "), eos]]
    assert rendered.ids == [token for part in parts for token in part]
    assert rendered.learnt == [place % 2 == 1 for place, part in enumerate(parts) for _ in part]


@pytest.mark.parametrize("template", ["llama2", "source"])
def test_only_answers_and_their_stop_are_learnt_and_no_begin_token_stands_twice(codec: Codec, template: Any) -> None:
    rendered = render(codec, TALK, template)
    pairs = list(zip(rendered.ids, rendered.learnt, strict=True))
    (stop,) = stop_ids(codec, template)
    learnt = [token for token, is_learnt in pairs if is_learnt]
    text = codec.decode_bare(learnt)
    assert text == (" yes  y = 2\nz " if template == "llama2" else "yesy = 2\nz")
    assert learnt.count(stop) == 2 and learnt[-1] == stop and codec.bos_id not in learnt
    assert all(not (a == b == codec.bos_id) for a, b in zip(rendered.ids, rendered.ids[1:], strict=False))
    if template == "source":
        assert rendered.ids.count(codec.bos_id or 0) == 1 and stop != codec.eos_id


@pytest.mark.parametrize("template", ["llama2", "source"])
def test_a_prompt_is_the_layout_of_training_up_to_the_answer(codec: Codec, template: Any) -> None:
    whole = render(codec, TALK, template)
    prompt = prompt_ids(codec, TALK[:3], template)
    assert whole.ids[: len(prompt)] == prompt
    assert all(whole.learnt[len(prompt) :])


@pytest.mark.parametrize("template", ["llama2", "source"])
def test_text_never_becomes_a_control_token(codec: Codec, template: Any) -> None:
    hostile = "a </s><s> b <step> ▁".replace("▁", "") + " <unk> <0x41> [PYTHON]"
    rendered = render(codec, [Turn("user", hostile), Turn("assistant", hostile)], template)
    controls = [token for token in rendered.ids if codec.has_control_ids([token])]
    bos, (stop,) = codec.bos_id, stop_ids(codec, template)
    assert controls == ([bos, stop] if template == "llama2" else [bos, stop, stop, stop])


# --- What other readers see ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["llama2", "source"])
@pytest.mark.parametrize("system", [None, "be brief"])
def test_the_jinja_template_gives_the_same_ids_and_the_same_mask(
    tiny_tokenizer: Any, tmp_path: Path, template: Any, system: str | None
) -> None:
    """transformers' own rendering, with the token `<step>` where the format needs it."""
    tokenizer = stepped(tiny_tokenizer)
    tokenizer.chat_template = JINJA[template]
    tokenizer.save_pretrained(tmp_path)
    codec = open_codec(tmp_path)
    turns = ([Turn("system", system)] if system else []) + TALK
    messages = [vars(turn) for turn in turns]
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ours = render(codec, turns, template)
    if template == "llama2":
        assert theirs["input_ids"] == ours.ids
        assert theirs["assistant_masks"] == [int(learnt) for learnt in ours.learnt]
    else:  # encoded as one text, an answer's first word takes the space that a prompt ends with; the characters are the same
        assert codec.decode(theirs["input_ids"]) == codec.decode(ours.ids)
        marked = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
        assert codec.decode([token for token, learnt in marked if learnt]).replace(" ", "") == "yes<step>y=2\nz<step>"
    asked = tokenizer.apply_chat_template(messages[:-3], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert asked["input_ids"] == prompt_ids(codec, turns[:-3], template)


def test_trl_finds_the_stop_token_trained_in_the_template(tiny_tokenizer: Any) -> None:
    from trl.chat_template_utils import is_chat_template_stop_token_trained

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = JINJA["llama2"]
    assert is_chat_template_stop_token_trained(tokenizer)


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "reason", "message"),
    [
        ([], "no_turns", "without turns"),
        ([ASK, ASK, ANSWER], "two_turns_in_a_row", "two turns of user in a row \\(turn 2\\)"),
        ([ASK, ANSWER, ANSWER], "two_turns_in_a_row", "two turns of assistant in a row \\(turn 3\\)"),
        ([ANSWER, ASK, ANSWER], "begins_with_answer", "begins with an answer"),
        ([ASK, Turn("assistant", " \n")], "empty_answer", "turn 2 is an empty answer"),
        ([Turn("user", ""), ANSWER], "empty_question", "turn 1 is an empty question"),
        (
            [ASK, Turn("tool", "x"), ANSWER],
            "unknown_role",
            "turn 2 has the role 'tool'; write one of system, user, assistant",
        ),
        ([ASK, Turn("system", "x"), ANSWER], "system_not_first", "turn 2 is a system text"),
        ([ASK], "ends_without_answer", "ends with a turn of user, not of assistant"),
        ([ASK, Turn("assistant", "a [/INST] b")], "template_tag_in_text", "turn 2 holds \\[/INST\\]"),
        ([Turn("user", "<<SYS>>"), ANSWER], "template_tag_in_text", "turn 1 holds <<SYS>>"),
        ([ASK, Turn("assistant", "a▁b")], "not_representable", "cannot take this text"),
        ([Turn("user", "a\ud800"), ANSWER], "not_representable", "half a character"),
    ],
)
def test_bad_conversations_are_refused_with_a_reason_and_the_turn(
    codec: Codec, turns: list[Turn], reason: str, message: str
) -> None:
    with pytest.raises(BadConversation, match=message) as refused:
        render(codec, turns, "llama2")
    assert refused.value.reason == reason


def test_a_prompt_ends_with_a_question(codec: Codec) -> None:
    with pytest.raises(BadConversation, match="ends with a turn of assistant, not of user"):
        prompt_ids(codec, [ASK, ANSWER], "llama2")


def test_messages_come_in_the_forms_that_data_sets_have() -> None:
    assert turns_of([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]) == [ASK, ANSWER]
    assert turns_of([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]) == [ASK, ANSWER]
    for messages, message in (("hi", "a list of messages"), ([{"role": "user"}], "message 1 has no"), ([3], "message 1")):
        with pytest.raises(BadConversation, match=message):
            turns_of(messages)


def test_a_tokenizer_without_the_stop_token_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`data.chat.template` source ends answers with a token"):
        render(open_codec(tmp_path), [ASK, ANSWER], "source")
