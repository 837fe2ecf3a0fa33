"""Conversations: from sources to rows with a mask, beside rehearsal; what is refused, left out and shared out."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codetune.artifacts import KINDS, expand_runs, open_rows, read_held_out
from codetune.chat import BadConversation, Turn, render
from codetune.recipe import ChatSettings, SourceSettings, load_recipe
from codetune.tokens import Codec
from data_pipelines.build import build
from data_pipelines.conversations import fitted, function_question, turns_of_document
from data_pipelines.installed import functions_of

CHAT = ChatSettings()
MESSAGES = SourceSettings("jsonl", 1.0, conversation="messages", text_column="messages")


BAD_CONVERSATIONS: dict[str, Any] = {
    "two_turns_in_a_row": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "empty_answer": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
    "unknown_role": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}],
    "template_tag_in_text": [{"role": "user", "content": "[INST] a"}, {"role": "assistant", "content": "b"}],
    "not_messages": "hello",
    "conversation_too_long": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "value " * 300},
    ],
}


# --- From a source's columns to turns --------------------------------------------------------------------------------


def test_each_form_of_a_source_gives_turns() -> None:
    asked = SourceSettings(
        "jsonl", 1.0, conversation="question_answer", question_columns=("task", "input"), answer_column="out"
    )
    columns = {"task": "Add.", "input": " ", "out": "yes"}
    assert turns_of_document(json.dumps(columns), asked) == [Turn("user", "Add."), Turn("assistant", "yes")]
    columns["input"] = "1 2"
    assert turns_of_document(json.dumps(columns), asked)[0].content == "Add.\n\n1 2"
    triplet = SourceSettings("jsonl", 1.0, conversation="triplet", path="x")
    for tests in ("assert f(1) == 2\nassert f(2) == 3", ["assert f(1) == 2", "assert f(2) == 3"]):
        turns = turns_of_document(json.dumps({"question": "Q", "tests": tests, "solution": "def f(x): ...\n"}), triplet)
        assert turns[0].content.startswith("Q\n\n") and "assert f(1) == 2\nassert f(2) == 3" in turns[0].content
        assert turns[1].content == "[PYTHON]\ndef f(x): ...\n[/PYTHON]"
    function = SourceSettings("installed", 1.0, content="functions", conversation="function")
    columns = {
        "name": "add",
        "question": "Add two numbers.",
        "answer": "def add(a,\n        b=(1, 2)) -> int:\n    return a\n",
    }
    turns = turns_of_document(json.dumps(columns), function)
    assert turns[0].content == "Write the Python function `add(a, b=(1, 2))`. Add two numbers."


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"question": None, "tests": "t", "solution": "s"}, "missing_text_value"),
        ({"question": "q", "tests": [], "solution": "s"}, "missing_text_value"),
        ([1], "not_json"),
        (None, "not_json"),
    ],
)
def test_columns_that_hold_no_text_are_refused(columns: Any, reason: str) -> None:
    with pytest.raises(BadConversation) as refused:
        turns_of_document(json.dumps(columns), SourceSettings("jsonl", 1.0, conversation="triplet", path="x"))
    assert refused.value.reason == reason


def test_functions_are_mined_with_their_docstring_and_without_it_in_the_answer() -> None:
    code = '''
import os

def add(a, b):
    """Add two numbers that are given.

    More than that is not said.
    """
    # a comment stays
    return a + b

def _short(): "No."

class C:
    def method(self):
        """A method, which is not taken at all."""
        return 1

def undocumented(x):
    return x

@decorated
def other(x):
    """Something that a decorator changes here."""
    return x
'''
    assert list(functions_of(code)) == [
        ("add", "Add two numbers that are given.", "def add(a, b):\n    # a comment stays\n    return a + b\n")
    ]
    assert list(functions_of("def broken(:\n")) == []
    assert function_question("Add.", "def add(a, b):\n    return a") == "Write the Python function `add(a, b)`. Add."


# --- Over-long conversations -----------------------------------------------------------------------------------------


def test_an_answer_is_never_cut_and_what_is_left_out_is_told(tiny_codec: Codec, talk: Callable[..., Any]) -> None:
    turns = [Turn(**message) for message in talk(4)]
    lengths = [len(render(tiny_codec, turns[: 2 * pairs], "llama2").ids) for pairs in (1, 2, 3, 4)]
    for room, pairs in ((lengths[3], 4), (lengths[3] - 1, 3), (lengths[1], 2), (lengths[0], 1)):
        rendered, left_out = fitted(tiny_codec, turns, CHAT, room)
        assert rendered == render(tiny_codec, turns[: 2 * pairs], "llama2") and left_out == 8 - 2 * pairs
    with pytest.raises(BadConversation, match="first answer does not fit in a row") as refused:
        fitted(tiny_codec, turns, CHAT, lengths[0] - 1)
    assert refused.value.reason == "conversation_too_long"
    with pytest.raises(BadConversation, match="does not fit"):
        fitted(tiny_codec, [Turn("system", "x"), *turns[:2]], CHAT, lengths[0])


# --- Rows ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat_recipe(chat_recipe_in: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A recipe over messages, triplets that may be there, and rehearsal."""
    return functools.partial(chat_recipe_in, tmp_path)


def test_rows_hold_conversations_beside_rehearsal_at_the_shares_asked_for(
    chat_recipe: Callable[..., Path], tiny_codec: Codec, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = open_rows(build(load_recipe(chat_recipe(more=list(BAD_CONVERSATIONS.values())))))
    sources = rows.manifest["sources"]
    assert "triplets" not in sources, "there are none, and the instruct source has their share"
    for name, share in (("chat", 0.92), ("code", 0.06), ("text", 0.02)):
        assert sources[name]["share_realised"] == pytest.approx(share, abs=3e-3)  # a row of 44,000 tokens' worth
    drops = rows.manifest["drops"]["chat"]
    for reason in BAD_CONVERSATIONS:
        assert drops[reason] >= 1
    told = capfd.readouterr().err
    assert (
        "conversation c60 is refused (two_turns_in_a_row): the conversation has two turns of user in a row (turn 2)" in told
    )
    assert told.count("(two_turns_in_a_row)") == 1, "once each, however often"
    kinds, layouts = set(), set()
    for number in range(len(rows)):
        row = rows.row(number)
        learnt_T = expand_runs(row["loss_runs"], len(row["input_ids"]))
        start = 0
        for length, kind, layout in zip(row["document_lengths"], row["kinds"], row["layouts"], strict=True):
            ids, learnt = row["input_ids"][start : start + length], learnt_T[start : start + length]
            if KINDS[kind] == "instruct":
                text = tiny_codec.decode(ids[learnt].tolist())
                assert "[INST]" not in text and text.endswith(" </s>") and text.count("value") >= 3
                assert "[/INST]" in tiny_codec.decode(ids[~learnt].tolist()) and ids[-1] == tiny_codec.eos_id
            else:
                assert learnt.all(), "rehearsal is learnt whole"
                layouts.add(int(layout))
            kinds.add(KINDS[kind])
            start += length
    assert kinds == {"instruct", "rehearsal_code", "rehearsal_text"} and layouts == {0, 1, 2}, "rehearsal is infilled, too"


def test_rows_are_the_same_bytes_however_often_they_are_built(chat_recipe: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    path = chat_recipe(training__train_tokens=128 * 64)
    first = build(load_recipe(path))
    kept = (first / "lane-00000.arrow").read_bytes()
    shutil.rmtree(first)
    assert (build(load_recipe(path)) / "lane-00000.arrow").read_bytes() == kept


def test_few_triplets_are_read_a_few_times_and_no_more(
    chat_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "test" / "self_instruct" / "triplets"
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"id": f"t{number}", "question": "total", "tests": "x == 1", "solution": f"x = {number}"})
        for number in range(5)
    ]
    (folder / "triplets.jsonl").write_text("\n".join(lines) + "\n")
    longer = {"data__sequence_tokens": 256, "model": {"context_tokens": 256, "rope_base": 1.0e5}}  # the question is long
    rows = open_rows(build(load_recipe(chat_recipe(data__held_out={"fraction": 0.0}, **longer))))
    source = rows.manifest["sources"]["triplets"]
    assert 0 < source["share_realised"] < 0.06 and source["share_realised"] == pytest.approx(source["share"], abs=2e-3)
    assert 2.5 <= source["epochs"] <= 3.5
    assert rows.manifest["sources"]["chat"]["share"] == pytest.approx(0.92 - source["share"])
    assert "instead of 10.00%; the rest goes to the instruct sources" in capsys.readouterr().out
    kinds = np.concatenate([rows.row(number)["kinds"] for number in range(len(rows))])
    assert KINDS.index("self_instruct") in kinds


def test_held_out_conversations_are_measured_on_their_last_answer(
    chat_recipe: Callable[..., Path], tiny_codec: Codec
) -> None:
    folder = build(load_recipe(chat_recipe(training__train_tokens=128 * 64)))
    samples = [sample for sample in read_held_out(folder / "held_out") if sample.layout == "chat"]
    assert samples
    for sample in samples:
        answer = sample.input_ids[sample.middle_start : sample.end_position]
        assert tiny_codec.decode_bare(answer).strip() == sample.middle
        assert sample.input_ids[sample.end_position] == tiny_codec.eos_id
        assert json.loads(sample.prefix)[-1]["role"] == "user"


def test_parquet_with_lists_of_messages_is_read(
    chat_recipe: Callable[..., Path], tmp_path: Path, talk: Callable[..., Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": [f"c{n}" for n in range(60)], "messages": [talk(1 + n % 3, tag=n) for n in range(60)]})
    pq.write_table(table, tmp_path / "chat.parquet")
    path = chat_recipe(
        training__train_tokens=128 * 64,
        data__sources__chat__kind="parquet",
        data__sources__chat__path=str(tmp_path / "chat.parquet"),
    )
    rows = open_rows(build(load_recipe(path)))
    assert rows.manifest["sources"]["chat"]["documents_encoded"] > 10 and "not_messages" not in str(rows.manifest["drops"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__chat": None}, "`data.sources.chat` holds conversations; say in `data.chat`"),
        ({"data__packing": {"strategy": "concatenate"}}, "cuts conversations in their answers"),
        ({"data__sources__chat__conversation": "question_answer"}, "`data.sources.chat.question_columns`"),
        ({"data__sources__chat__role": "document"}, "there is none"),
        ({"data__sources__code__optional": True}, "`data.sources.code.optional` does nothing"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    chat_recipe: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(chat_recipe(**changes))


def test_a_source_without_a_usable_conversation_ends_the_build(chat_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = chat_recipe(data__held_out={"fraction": 0.0})
    (tmp_path / "chat.jsonl").write_text(json.dumps({"id": "a", "messages": BAD_CONVERSATIONS["empty_answer"]}) + "\n")
    with pytest.raises(ValueError, match="`chat` has no conversation that can be used .*'empty_answer': "):
        build(load_recipe(path))
