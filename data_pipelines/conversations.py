"""Conversations: from what a source holds to samples with a loss mask, beside the plain documents of rehearsal.

What comes in: documents of sources with `conversation`, each the JSON of its columns. What goes out: samples whose answers
alone are learnt, which the build packs into the same rows as everything else (`data.sources.NAME.role` says what each is;
shares are of tokens, as everywhere).

    messages          a column of messages, under the usual names of roles
    question_answer   columns of a question, and of its answer
    triplet           self-instruct's: question, tests, solution
    function          small functions of installed packages: their docstring is asked, their code answered

Where the code is the answer it stands between `[PYTHON]` and `[/PYTHON]`, which the paper's prompts ask for (Fig. 13).

An answer is never cut. A conversation longer than a row loses whole questions with their answers, from its end, and they are
counted (`turns_left_out`); if its first answer does not fit, it is dropped (`conversation_too_long`). Conversations that are
refused are counted by their reason, and the first of each reason is told of with what is wrong in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codetune.artifacts import KINDS, HeldOutSample
from codetune.chat import CODE_TAGS, BadConversation, Rendered, Turn, render, turns_of
from codetune.recipe import ChatSettings, DataSettings, Recipe, SourceSettings
from codetune.tokens import Codec
from data_pipelines.documents import Document, Drops, SourcePlan, read_documents
from data_pipelines.fim import PLAIN, Sample

TOO_LONG = "conversation_too_long"
FITTED_BYTES = 256 * 2**20  # a larger file of triplets is taken to be enough for its share, and not counted
TRIPLET_PASSES = 4  # passes over kept triplets at most, where a recipe says nothing


# ---------------------------------------------------------------------------------------------------------------------
# From a document to turns


def turns_of_document(text: str, settings: SourceSettings) -> list[Turn]:
    """The turns of a conversation as its source holds it.

    Raises:
        BadConversation: columns that are empty, or hold something else than the recipe says.
    """
    try:
        columns = json.loads(text)
    except ValueError as error:
        raise BadConversation("not_json", f"not readable as JSON ({error})") from error
    if not isinstance(columns, dict):
        raise BadConversation("not_json", f"holds {type(columns).__name__}, not an object with columns")
    if settings.conversation == "messages":
        return turns_of(columns.get(settings.text_column))
    if settings.conversation == "question_answer":
        parts = [columns.get(column) for column in settings.question_columns]
        question = "\n\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
        return [Turn("user", question), Turn("assistant", _text(columns, str(settings.answer_column)))]
    if settings.conversation == "triplet":
        return triplet_turns(_text(columns, "question"), _tests(columns.get("tests")), _text(columns, "solution"))
    return function_turns(_text(columns, "question"), _text(columns, "answer"))


def triplet_turns(question: str, tests: str, solution: str) -> list[Turn]:
    """A kept triplet: the question with its tests, answered by the solution that passes them."""
    asked = f"{question.strip()}\n\nThe code should pass these tests:\n\n{tests.strip()}\n\n{_TAGS_ASKED}"
    return [Turn("user", asked), Turn("assistant", tagged(solution))]


def function_turns(docstring: str, code: str) -> list[Turn]:
    """A function of installed code: what its docstring says is asked, by the signature; its code is the answer."""
    return [Turn("user", function_question(docstring, code)), Turn("assistant", tagged(code))]


def function_question(docstring: str, code: str) -> str:
    """What is asked for.

    Example: "Add.", "def add(a, b):..." -> "Write the Python function `add(a, b)`. Add."
    """
    return f"Write the Python function `{_signature(code)}`. {docstring.strip()}"


def tagged(code: str) -> str:
    """Code as an answer."""
    return f"{CODE_TAGS[0]}\n{code.strip()}\n{CODE_TAGS[1]}"


_TAGS_ASKED = f"Write Python code that starts with {CODE_TAGS[0]} and ends with {CODE_TAGS[1]}."


def _signature(code: str) -> str:
    r"""Name and arguments on one line.

    Example: "def f(a,\n    b):\n    return a" -> "f(a, b)"
    """
    depth, start = 0, code.index("def ") + len("def ")
    for place in range(start, len(code)):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(code[place], 0)
        if depth == 0 and code[place] in ":-":
            return " ".join(code[start:place].split()).replace("( ", "(").replace(", )", ")")
    return code[start:].split("\n", 1)[0]


def _text(columns: dict[str, Any], name: str) -> str:
    value = columns.get(name)
    if not isinstance(value, str):
        raise BadConversation("missing_text_value", f"`{name}` holds {type(value).__name__}, not text")
    return value


def _tests(value: Any) -> str:
    """Tests as one text, whether they are kept as one or as a list."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    raise BadConversation("missing_text_value", f"`tests` holds {type(value).__name__}, not text or a list of texts")


# ---------------------------------------------------------------------------------------------------------------------
# From turns to samples


def encode_conversation(
    document: Document, settings: SourceSettings, chat: ChatSettings, codec: Codec, row_tokens: int
) -> tuple[Sample, int]:
    """The sample of a conversation, and how many turns were left out at its end so that it fits in a row.

    Raises:
        BadConversation: it is refused; the reason is counted.
    """
    turns = _with_system(turns_of_document(document.text, settings), chat)
    rendered, left_out = fitted(codec, turns, chat, row_tokens)
    sample = Sample(np.array(rendered.ids, np.int32), PLAIN, document.id, document.pass_index)
    sample.learnt = np.array(rendered.learnt, bool)
    return sample, left_out


def fitted(codec: Codec, turns: list[Turn], chat: ChatSettings, row_tokens: int) -> tuple[Rendered, int]:
    """The conversation, or its beginning in whole pairs of question and answer, in no more than a row; turns left out.

    Raises:
        BadConversation: its first answer does not fit, or it is refused.
    """
    rendered = render(codec, turns, chat.template)
    kept = len(turns)
    while len(rendered.ids) > row_tokens:
        kept -= 2
        if kept < 2:
            raise BadConversation(TOO_LONG, f"its first answer does not fit in a row of {row_tokens} tokens")
        rendered = render(codec, turns[:kept], chat.template)
    return rendered, len(turns) - kept


def _with_system(turns: list[Turn], chat: ChatSettings) -> list[Turn]:
    if chat.system is None or (turns and turns[0].role == "system"):
        return turns
    return [Turn("system", chat.system), *turns]


class ConversationEncoder:
    """Encodes one source's conversations, counts what is refused, and tells of the first of each reason."""

    def __init__(
        self, plan: SourcePlan, chat: ChatSettings, codec: Codec, row_tokens: int, drops: Drops, tells: bool = True
    ) -> None:
        self.plan, self.chat, self.codec, self.row_tokens, self.drops = plan, chat, codec, row_tokens, drops
        self.tells = tells
        self.turns_left_out = 0
        self._told: set[str] = set()

    def encode(self, document: Document) -> Sample | None:
        """The sample, or None for a conversation that is refused."""
        try:
            sample, left_out = encode_conversation(document, self.plan.settings, self.chat, self.codec, self.row_tokens)
        except BadConversation as error:
            self.drops.add(self.plan.name, error.reason)
            if self.tells and error.reason not in self._told:
                self._told.add(error.reason)
                where = f"data.sources.{self.plan.name}: conversation {document.id}"
                print(f"{where} is refused ({error.reason}): {error}", file=sys.stderr, flush=True)
            return None
        self.turns_left_out += left_out
        return sample


def kind_of(settings: SourceSettings) -> int:
    """The place in `artifacts.KINDS` of what the source's samples are."""
    return KINDS.index(settings.role)


def held_out_conversations(
    documents: Sequence[Document], settings: SourceSettings, chat: ChatSettings, codec: Codec, row_tokens: int
) -> Iterator[HeldOutSample]:
    """Held-out conversations, to be measured on: their last answer, its end apart; refused ones are left out.

    `prefix` holds the turns before that answer as JSON, `middle` the answer: prompts for generation are made of them.
    """
    for document in documents:
        try:
            turns = _with_system(turns_of_document(document.text, settings), chat)
            rendered, left_out = fitted(codec, turns, chat, row_tokens)
        except BadConversation:
            continue
        turns = turns[: len(turns) - left_out]
        end = len(rendered.ids) - 1
        start = max(place for place, learnt in enumerate(rendered.learnt) if not learnt) + 1
        yield HeldOutSample(
            rendered.ids,
            "chat",
            document.source,
            document.id,
            middle_start=start,
            middle_tokens=end - start,
            middle_characters=len(turns[-1].content),
            end_position=end,
            prefix=json.dumps([vars(turn) for turn in turns[:-1]], ensure_ascii=False),
            middle=turns[-1].content,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Kept triplets, however few


def fit_optional_shares(
    plans: Sequence[SourcePlan], data: DataSettings, codec: Codec, tokens: int
) -> tuple[tuple[SourcePlan, ...], dict[str, float]]:
    """Give each optional source no more tokens than its passes hold; what it leaves goes to the `instruct` sources.

    Three triplets repeated until they are a tenth of the rows would be learnt by heart. Returns the plans with the shares
    that were planned, and the tokens of one pass of each optional source.
    """
    sizes: dict[str, float] = {}
    shares = {plan.name: plan.settings.share for plan in plans}
    freed = 0.0
    for plan in plans:
        if not plan.settings.optional:
            continue
        size = _tokens_of(plan, data, codec)
        if size is None:
            continue
        sizes[plan.name] = size
        passes = plan.settings.max_passes or TRIPLET_PASSES
        fair = min(shares[plan.name], passes * size / tokens)
        freed += shares[plan.name] - fair
        shares[plan.name] = fair
    absent = {name: source.share for name, source in data.sources.items() if name not in shares}
    freed += sum(absent.values())
    takers = [plan.name for plan in plans if plan.settings.role == "instruct"]
    total = sum(shares[name] for name in takers)
    for name in takers:
        shares[name] += freed * shares[name] / total
    fitted_plans = tuple(
        # the share bounds the passes now; a limit that the last row overshoots by a document would end the build
        replace(plan, settings=replace(plan.settings, share=shares[plan.name], max_passes=None))
        if plan.settings.optional
        else replace(plan, settings=replace(plan.settings, share=shares[plan.name]))
        for plan in plans
        if shares[plan.name] > 0.0
    )
    return fitted_plans, sizes


def _tokens_of(plan: SourcePlan, data: DataSettings, codec: Codec) -> int | None:
    """Tokens of one pass over a source of conversations; None where it is too large to be counted for this."""
    assert data.chat is not None
    if plan.facts["bytes"] > FITTED_BYTES:
        return None
    encoder = ConversationEncoder(plan, data.chat, codec, data.sequence_tokens, Drops(), tells=False)
    found = (encoder.encode(document) for document in read_documents(plan, 0, 1, 0, Drops(), None))
    return sum(len(sample) for sample in found if sample is not None)


def located(recipe: Recipe, settings: SourceSettings) -> SourceSettings:
    """A source of triplets with the file that its run has written, where the recipe names the run.

    Example: `path: self_instruct` -> `runs/tiny/self_instruct/triplets/triplets.jsonl`
    """
    if settings.conversation != "triplet" or settings.path is None or "/" in settings.path:
        return settings
    return replace(settings, path=str(Path(recipe.runs) / recipe.size / settings.path / "triplets" / "triplets.jsonl"))


def is_absent(settings: SourceSettings) -> bool:
    """Whether an optional source has no file at all, or one without a line."""
    if not settings.optional:
        return False
    paths = [Path(path) for path in (settings.path, *settings.paths) if path is not None]
    return not any(path.is_file() and path.stat().st_size > 0 for path in paths)
