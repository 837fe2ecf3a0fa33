"""Chat rows against the published ids, and against transformers' own rendering of the template: ids and mask, one by one.

Reference: the ids that Meta's code gives (7B's question, 70B's dialogue), which need Llama 2's `tokenizer.model` in the
folder that `CODETUNE_TEST_DATA` names; without it they are not compared, and a line says so. And for conversations mined
from installed code, with the tokenizer of the tiny base: `apply_chat_template` with the template that is saved beside the
model, ids and `assistant_masks`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bench.stage_runs import BASE, need_base
from codetune.chat import JINJA, Turn, meta_history_ids, prompt_ids, render
from codetune.recipe import SourceSettings
from codetune.tokens import CODE_LLAMA_ROWS, Codec, open_codec
from data_pipelines.conversations import turns_of_document
from data_pipelines.documents import Drops, plan_source, read_documents

MINUTES = 1
CONVERSATIONS = 500
PACKAGES = ("python-stdlib", "networkx", "pandas", "datasets")
QUESTION = [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]
DIALOGUE = (
    "1,7562,29901,1788,13,13,2184,9508,32015,7562,29901,1404,13,13,3824,1404,2346,32015,7562,29901,20255,13,13,8125,2933,304,"
    "937,2346,32015,7562,29901,1404,13,13,6440,1404,2346,32015,7562,29901,20255,13,14994,3381,29901,1404,13,13,29871"
)
TURNS = [
    Turn("system", "System prompt"),
    Turn("user", "First user query"),
    Turn("assistant", "Model response to first query"),
    Turn("user", "Second user query"),
]


def code_llamas_codec(folder: Path) -> Codec | None:
    """Code Llama's tokenizer, where Llama 2's is at hand."""
    from codetune.vocabulary import checked_tokenizer, grown_tokenizer, plan_growth

    source = Path(os.environ.get("CODETUNE_TEST_DATA", "")) / "tokenizers" / "llama2_tokenizer.model"
    if not source.is_file():
        return None
    shutil.copyfile(source, folder / "tokenizer.model")
    tokenizer, _ = checked_tokenizer(folder)
    grown = grown_tokenizer(tokenizer, plan_growth(tokenizer, 32_000, "Llama 2").infill_ids)
    grown.save_pretrained(folder / "grown")
    (folder / "grown" / "config.json").write_text(json.dumps({"vocab_size": CODE_LLAMA_ROWS}))
    return open_codec(folder / "grown")


def conversations(folder: Path) -> list[list[Turn]]:
    """Conversations of one and of two questions, mined from installed code."""
    settings = SourceSettings(
        "installed",
        1.0,
        distributions=PACKAGES,
        content="functions",
        conversation="function",
        max_files_per_distribution=150,
    )
    plan = plan_source("functions", settings, 1, folder, False)
    found: list[list[Turn]] = []
    for document in read_documents(plan, 0, 1, 0, Drops(), None):
        turns = turns_of_document(document.text, settings)
        found.append([*found[-1][:2], *turns] if len(found) % 2 else turns)
        if len(found) == CONVERSATIONS:
            break
    return found


def main() -> None:
    from transformers import AutoTokenizer

    need_base()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        codec = code_llamas_codec(Path(name))
        if codec is None:
            print("CODETUNE_TEST_DATA names no folder with tokenizers/llama2_tokenizer.model: published ids not compared")
        else:
            figures["question_ids_equal"] = prompt_ids(codec, [Turn("user", "hi")], "llama2") == QUESTION
            figures["dialogue_ids_equal"] = meta_history_ids(codec, TURNS) == [int(token) for token in DIALOGUE.split(",")]
            print(f"7B question: the published ids: {figures['question_ids_equal']}")
            print(f"70B dialogue of four turns: the published ids: {figures['dialogue_ids_equal']}")
        codec = open_codec(BASE)
        tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
        tokenizer.chat_template = JINJA["llama2"]
        talks = conversations(Path(name) / "work")
    same_ids = same_masks = learnt = tokens = 0
    for turns in talks:
        messages = [vars(turn) for turn in turns]
        theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ours = render(codec, turns, "llama2")
        same_ids += theirs["input_ids"] == ours.ids
        same_masks += theirs["assistant_masks"] == [int(value) for value in ours.learnt]
        learnt, tokens = learnt + sum(ours.learnt), tokens + len(ours.ids)
    print(f"{len(talks)} conversations, {tokens:,} tokens, {learnt:,} of them learnt, against transformers' rendering:")
    print(f"ids equal: {same_ids} of {len(talks)}; masks equal: {same_masks} of {len(talks)} (to reach: all)")
    figures |= {"conversations": len(talks), "ids_equal": same_ids, "masks_equal": same_masks, "tokens": tokens}
    print("RESULT " + json.dumps(figures | {"learnt": learnt}))


if __name__ == "__main__":
    main()
