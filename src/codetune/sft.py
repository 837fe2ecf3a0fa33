"""Instruction tuning: MAIN PATH of instruct and unnatural (paper Sec. 2.5), on trl's SFTTrainer.

What comes in: a recipe, its rows (`make data`: conversations whose answers alone are learnt, beside plain documents of
rehearsal, in the same packed rows) and its parent. What goes out: `runs/<size>/<name>/model`, with the chat template in its
training form beside the tokenizer, and in the manifest how held-out prompts were answered. Everything else is as in
`train.py`, whose path it takes: the same callbacks, guards, sealed checkpoints, ranks, LoRA, exit codes.

    python -m codetune.sft --recipe recipes/instruct/tiny.yaml

Before the model is loaded, rows are looked at: each conversation's stop token is learnt, begin tokens stand alone, something
is learnt and something is not; and one row is printed with its mask. SFTTrainer prepares data from text otherwise; here it
is handed the numbers of rows, which the shared collator reads, and its loss is the shared one (`trainer.py` says why).
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import DistributedType
from transformers import Trainer
from trl.trainer.sft_trainer import SFTTrainer

from codetune import adapter, train
from codetune.artifacts import KINDS, MANIFEST, HeldOutSample, Rows, expand_runs, read_json, write_json
from codetune.chat import CODE_TAGS, JINJA, Turn, need_stop, prompt_ids
from codetune.collate import RowCollator, RowDataset
from codetune.model import Parent
from codetune.probes import generate_greedy
from codetune.recipe import ChatSettings, Recipe
from codetune.tokens import STEP, Codec, open_codec
from codetune.trainer import SafeTraining

CHECKED_ROWS = 256  # looked at before training begins
SHOWN_CHARACTERS = 1200  # of the row that is printed
SHOWN_ANSWERS = 3
TALKING = ("instruct", "self_instruct")


def tune(recipe: Recipe, minutes: float | None = None, grace_seconds: float | None = None) -> Path:
    """Train on conversations as the recipe says, and return the folder of the finished model.

    Raises:
        ValueError: see `train.train`; and rows whose conversations are not learnt as they should be.
        Interrupted: asked to stop; what the run can go on from is whole.
    """
    if recipe.need_data().chat is None:
        raise ValueError(f"recipe {recipe.size}/{recipe.name} has no `data.chat`; train it with python -m codetune.train")
    finished = train.train(recipe, minutes, grace_seconds, STAGE)
    answers = read_json(finished / MANIFEST).get("chat") or {}
    train.say(answers_table(answers))
    return finished


# ---------------------------------------------------------------------------------------------------------------------
# The trainer


class _SharedLoss(SFTTrainer):
    """SFTTrainer without what the mixin does: its loss through a head of its own, and a model card at every checkpoint."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stock trainer's loss path, which the mixin builds on."""
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)


class ChatTrainer(SafeTraining, _SharedLoss):
    """The trainer of instruct and unnatural."""


class RowsByNumber:
    """The collator as SFTTrainer calls it: examples are places in the run, whose rows are read here."""

    def __init__(self, dataset: RowDataset, collator: RowCollator) -> None:
        self.dataset, self.collator = dataset, collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return self.collator([self.dataset[int(example["position"])] for example in examples])


def make_trainer(model: Any, args: Any, train_dataset: RowDataset, data_collator: RowCollator, session: Any) -> SafeTraining:
    """A ChatTrainer over rows on disk; SFTTrainer takes nothing but a `datasets.Dataset`, here of places in the run."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    positions = Dataset.from_dict({"position": np.arange(len(train_dataset))})
    with adapter.own_forward(model):
        trainer = ChatTrainer(
            model=model,
            args=args,
            train_dataset=positions,
            data_collator=RowsByNumber(train_dataset, data_collator),
            processing_class=AutoTokenizer.from_pretrained(session.manifest["parent"]["path"]),
            session=session,
        )
    # subtle: with a tokenizer the library writes its own copy of it into checkpoints, and changes the model's end tokens
    trainer.processing_class = None
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# What must be true of rows


def check_rows(recipe: Recipe, rows: Rows, parent: Parent) -> None:
    """Look at conversations as they will be learnt, and print one row with its mask.

    Raises:
        ValueError: a stop token that is not learnt, a begin token twice, a conversation of which all or nothing is learnt.
    """
    codec, chat = parent.codec, need_chat(recipe)
    stop = need_stop(codec, chat.template)
    talking = {KINDS.index(kind) for kind in TALKING}
    seen, shown = 0, None
    for number in range(min(len(rows), CHECKED_ROWS)):
        row = rows.row(number)
        learnt_T = expand_runs(row["loss_runs"], len(row["input_ids"]))
        start = 0
        for length, kind in zip(row["document_lengths"].tolist(), row["kinds"].tolist(), strict=True):
            if kind in talking:
                where = f"row {number} of {rows.path}, the conversation at token {start}"
                check_conversation(
                    row["input_ids"][start : start + length], learnt_T[start : start + length], stop, codec, where
                )
                seen += 1
                shown = number if shown is None else shown
            start += length
    if shown is None:
        raise ValueError(f"{rows.path}: no conversation in its first {CHECKED_ROWS} rows; see its manifest's shares")
    train.say(f"{seen} conversations looked at; row {shown}, with what is learnt of it between >> and <<:")
    train.say(shown_row(rows, shown, codec))


def check_conversation(ids: np.ndarray, learnt: np.ndarray, stop: int, codec: Codec, where: str) -> None:
    """Whether one conversation is learnt as it should be.

    Raises:
        ValueError: it is not; `where` says of which conversation.
    """
    if learnt.all() or not learnt.any():
        raise ValueError(f"{where}: {'all' if learnt.all() else 'nothing'} of it is learnt; build the rows again")
    if ids[-1] != stop or not learnt[-1]:
        raise ValueError(
            f"{where}: it does not end with a learnt stop token ({codec.name(stop)}), so that the model would not learn to "
            "stop; build the rows again with this recipe's `data.chat.template`"
        )
    begins = np.flatnonzero(ids == codec.bos_id) if codec.bos_id is not None else np.zeros(0, int)
    if (np.diff(begins) == 1).any() or (codec.bos_id is not None and learnt[begins].any()):
        raise ValueError(f"{where}: a begin token stands twice, or is learnt; build the rows again")


def shown_row(rows: Rows, number: int, codec: Codec) -> str:
    """A row for people: its documents, and between >> and << what is learnt."""
    row = rows.row(number)
    learnt_T = expand_runs(row["loss_runs"], len(row["input_ids"]))
    parts, start = [], 0
    for place, length in enumerate(row["document_lengths"].tolist()):
        kind = rows.manifest["kind_names"][row["kinds"][place]]
        source = rows.manifest["source_names"][row["sources"][place]]
        ids, learnt = row["input_ids"][start : start + length].tolist(), learnt_T[start : start + length].tolist()
        parts.append(f"\n--- {source}, {kind}: {sum(learnt)} of {length} tokens are learnt\n{marked(ids, learnt, codec)}")
        start += length
    text = "".join(parts).strip()
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ... ({len(text):,} characters in all)"


def marked(ids: Sequence[int], learnt: Sequence[bool], codec: Codec) -> str:
    """Example: ids of `[INST] hi [/INST] yes </s>`, learnt from `yes` on -> `[INST] hi [/INST]>> yes </s><<`"""
    borders = [0, *(place for place in range(1, len(ids)) if learnt[place] != learnt[place - 1]), len(ids)]
    runs = [(codec.decode(ids[low:high]), learnt[low]) for low, high in zip(borders, borders[1:], strict=False)]
    return "".join(f">>{text}<<" if is_learnt else text for text, is_learnt in runs)


# ---------------------------------------------------------------------------------------------------------------------
# Held-out prompts, answered


def measure_answers(recipe: Recipe, trainer: SafeTraining, parent: Parent, samples: list[HeldOutSample]) -> dict[str, Any]:
    """Greedy answers to held-out questions: how many stop by themselves, and are code between its tags that parses."""
    settings, chat = recipe.probes, need_chat(recipe)
    if settings.chat_prompts == 0:
        return {}
    if trainer.accelerator.distributed_type != DistributedType.NO:
        train.say("held-out prompts are not answered by a run of several ranks")
        return {}
    model: Any = trainer.model
    longest = model.config.get_text_config().max_position_embeddings - settings.chat_new_tokens
    asked, prompts = [], []
    for sample in samples:
        if sample.layout == "chat" and len(asked) < settings.chat_prompts:
            turns = [Turn(**turn) for turn in json.loads(sample.prefix)]
            ids = prompt_ids(parent.codec, turns, chat.template)
            if len(ids) <= longest:
                asked.append((turns[-1].content, sample.middle))
                prompts.append(ids)
    if not prompts:
        train.say("no held-out question leaves room for an answer in the context; none was answered")
        return {}
    stop = need_stop(parent.codec, chat.template)
    stops = [token for token in (stop, parent.codec.eos_id) if token is not None]
    written = generate_greedy(
        model, prompts, stops, parent.codec.pad_id, settings.chat_new_tokens, tokens_per_batch=8192, poll=trainer.poll
    )
    answers = [parent.codec.decode_bare(ids).strip() for ids in written]
    stopped = [ids[-1] in stops for ids in written]
    examples = [
        {"question": question, "answer": answer, "stopped": is_stopped}
        for (question, _), answer, is_stopped in zip(asked, answers, stopped, strict=True)
    ]
    figures = {
        "prompts": len(prompts),
        "stop_rate": round(sum(stopped) / len(stopped), 4),
        "tagged_rate": round(sum(code_of(answer) is not None for answer in answers) / len(answers), 4),
        "parses_rate": round(sum(parses(code_of(answer)) for answer in answers) / len(answers), 4),
    }
    return {"chat": {**figures, "examples": examples[:SHOWN_ANSWERS]}}


def code_of(answer: str) -> str | None:
    """The code between the tags of an answer that is nothing but that; None for any other answer."""
    begin, end = CODE_TAGS
    if not answer.startswith(begin) or not answer.endswith(end) or answer.count(begin) > 1:
        return None
    return answer[len(begin) : -len(end)].strip("\n")


def parses(code: str | None) -> bool:
    """Whether it is Python that parses, and more than nothing."""
    if code is None or not code.strip():
        return False
    try:
        return bool(ast.parse(code).body)
    except (SyntaxError, ValueError):
        return False


def answers_table(figures: dict[str, Any]) -> str:
    """Answers to held-out prompts, for people."""
    if not figures:
        return ""
    lines = []
    for example in figures["examples"]:
        end = "stopped by itself" if example["stopped"] else "ran into the limit"
        lines += [f"--- asked: {example['question']}", f"{example['answer']}", f"    ({end})"]
    lines.append(
        f"{figures['prompts']} held-out prompts answered: stop rate {figures['stop_rate']:.1%}, code between its tags "
        f"{figures['tagged_rate']:.1%}, of all answers {figures['parses_rate']:.1%} parse as Python"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The finished folder


def complete(recipe: Recipe, folder: Path) -> None:
    """Put the chat template beside the tokenizer, and the token that ends answers where readers look for it."""
    template = need_chat(recipe).template
    (folder / "chat_template.jinja").write_text(JINJA[template], encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.is_file():
        known = read_json(config)
        if known.pop("chat_template", None) is not None:  # an older place, which would win over the file
            write_json(config, known)
    if template == "source":
        codec = open_codec(folder)
        stop = need_stop(codec, template)
        tree = read_json(folder / "tokenizer.json")
        if all(token["content"] != STEP for token in tree["added_tokens"]):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            tree["added_tokens"].append({"id": stop, "content": STEP, **flags})
            tree["model"]["vocab"][STEP] = stop  # as the infilling tokens: the one way to keep an id behind a gap
            (folder / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
        generation = folder / "generation_config.json"
        settings = read_json(generation) if generation.is_file() else {}
        ends = settings.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [codec.eos_id if ends is None else ends]
        settings["eos_token_id"] = list(dict.fromkeys([*(token for token in ends if token is not None), stop]))
        write_json(generation, settings)


def need_chat(recipe: Recipe) -> ChatSettings:
    """The recipe's chat settings, which `tune` has looked for."""
    chat = recipe.need_data().chat
    assert chat is not None
    return chat


STAGE = train.StageKind(
    arguments=adapter.sft_arguments,
    make=make_trainer,
    check=check_rows,
    measure=measure_answers,
    complete=complete,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    train.command("python -m codetune.sft", __doc__ or "", tune, arguments)


if __name__ == "__main__":
    main()
