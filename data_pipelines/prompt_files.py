"""Prompts as files that a user can edit, and how they become what a model is asked.

A file is a dialogue: lines `=== system`, `=== user`, `=== assistant` begin a turn, what stands before the first of them is a
note for readers. `%%%name%%%` is a place to fill. If the last turn is the assistant's, the model goes on with it; the space
around a turn does not count.

Three formats. `template`: the model's own chat template; only its own control tokens become control tokens, whatever a
question contains. `llama2`: Llama 2's `[INST]` dialogue as plain text, as in the paper's figures. `plain`: the turns' text
alone, a blank line between two, for base models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codetune.artifacts import hash_json
from codetune.generate import Prompt
from codetune.tokens import Codec

TURN = re.compile(r"^=== (system|user|assistant)[ \t]*$", re.MULTILINE)
PLACE = re.compile(r"%%%(\w+)%%%")
# What contents may not hold: it would be read as a tag of a dialogue or as the border of an answer.
TAGS = re.compile(r"<\|[^|<>]*\|>|</?s>|<</?SYS>>|\[/?(?:INST|TESTS|PYTHON)\]|%%%")
MARK = 0xF0000  # contents stand as characters from here on (a private plane of Unicode) while a template is rendered


@dataclass(frozen=True)
class Turn:
    """One part of a dialogue, with places to fill."""

    role: str
    text: str


@dataclass(frozen=True)
class PromptFile:
    """A dialogue read from a file."""

    path: Path
    turns: tuple[Turn, ...]

    @property
    def places(self) -> set[str]:
        return {name for turn in self.turns for name in PLACE.findall(turn.text)}

    @property
    def open_text(self) -> str:
        """The assistant's turn that the model goes on with; empty where it begins its own."""
        return self.turns[-1].text if self.turns[-1].role == "assistant" else ""

    @property
    def fingerprint(self) -> str:
        return hash_json([[turn.role, turn.text] for turn in self.turns])


def read_prompt_file(path: Path, needed: set[str], optional: frozenset[str] = frozenset()) -> PromptFile:
    """A prompt file that has every place in `needed`, and none that is not known.

    Raises:
        ValueError: no such file, no turn, turns in an order that no model was trained on, or other places.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no prompt file that can be read here ({error})") from error
    pieces = TURN.split(text)
    turns = tuple(Turn(role, body.strip()) for role, body in zip(pieces[1::2], pieces[2::2], strict=True))
    if not turns:
        raise ValueError(f"{path}: no turn in it; begin one with a line `=== user`")
    found = PromptFile(path, turns)
    roles = [turn.role for turn in turns if turn.role != "system"]
    if (
        "system" in [turn.role for turn in turns[1:]]
        or roles != (["user", "assistant"] * len(roles))[: len(roles)]
        or not roles
    ):
        raise ValueError(
            f"{path}: its turns are {', '.join(turn.role for turn in turns)}; write user and assistant in turns"
        )
    empty = [turn.role for turn in turns if not turn.text]
    if empty:
        raise ValueError(f"{path}: a turn of the {empty[0]} is empty; write something, or take its line away")
    known = needed | optional
    for what, names in (("lacks", needed - found.places), ("has the unknown place", found.places - known)):
        if names:
            every = ", ".join(f"%%%{name}%%%" for name in sorted(known))
            raise ValueError(f"{path}: {what} %%%{min(names)}%%%; its places are {every}")
    return found


def filled(text: str, values: Mapping[str, str]) -> str:
    """A text with its places filled, in one pass: what a value holds is not looked at again.

    Example: "%%%a%%% and %%%b%%%" with a = "%%%b%%%", b = "x" -> "%%%b%%% and x"
    """
    return PLACE.sub(lambda match: values[match[1]], text)


class Renderer:
    """Turns of a prompt file into what one model is asked."""

    def __init__(self, format_name: str, codec: Codec | None, tokenizer: Any = None) -> None:
        self.format, self.codec, self.tokenizer = format_name, codec, tokenizer
        if format_name == "template":
            if codec is None or tokenizer is None:
                raise ValueError("the format `template` needs the model's tokenizer; write `tokenizer` in `engine`")
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError("this tokenizer has no chat template; write `format: llama2`, or `plain` for a base model")
            self._ids = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
            names = sorted((name for name in self._ids if not name.isspace()), key=len, reverse=True)
            self._control = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def prompt(self, file: PromptFile, prompt_id: str, values: Mapping[str, str]) -> Prompt:
        """The filled dialogue, ready to be asked."""
        turns = [Turn(turn.role, filled(turn.text, values)) for turn in file.turns]
        if self.format == "llama2":
            return Prompt(prompt_id, llama2_text(turns))
        if self.format == "plain":
            return Prompt(prompt_id, "\n\n".join(turn.text for turn in turns))
        text, ids = self._rendered(turns)
        return Prompt(prompt_id, text, tuple(ids))

    def _rendered(self, turns: list[Turn]) -> tuple[str, list[int]]:
        """Text and ids by the chat template; contents are put in after its control tokens were found."""
        assert self.codec is not None
        contents = [turn.text for turn in turns]
        marks = [chr(MARK + place) for place in range(len(turns))]
        continued = turns[-1].role == "assistant"
        closed = turns[:-1] if continued else turns
        messages = [{"role": turn.role, "content": mark} for turn, mark in zip(closed, marks, strict=False)]
        shape = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        shape += marks[-1] if continued else ""
        missing = [turn.role for turn, mark in zip(turns, marks, strict=True) if shape.count(mark) != 1]
        if missing:
            raise ValueError(
                f"the chat template does not show the {missing[0]}'s turn once; write `format: llama2` or `plain`"
            )
        ids: list[int] = []
        shown, end = "", 0
        for match in [*self._control.finditer(shape), None]:
            text = _with_contents(shape[end : match.start() if match else len(shape)], contents)
            starts = not ids or ids == [self.codec.bos_id]
            ids += (self.codec.encode(text) if starts else self.codec.encode_bare(text)) if text else []
            shown += text
            if match:
                ids.append(self._ids[match[0]])
                shown, end = shown + match[0], match.end()
        return shown, ids


def _with_contents(text: str, contents: list[str]) -> str:
    return "".join(contents[ord(c) - MARK] if 0 <= ord(c) - MARK < len(contents) else c for c in text)


def llama2_text(turns: list[Turn]) -> str:
    """Llama 2's dialogue as text; the engine puts `<s>` before it.

    Example: user "hi", assistant "ho", user "and?" -> "[INST] hi [/INST] ho [INST] and? [/INST]"
    """
    system, parts = "", []
    for turn in turns:
        if turn.role == "system":
            system = f"<<SYS>>\n{turn.text}\n<</SYS>>\n\n"
        elif turn.role == "user":
            parts.append(f"[INST] {system}{turn.text} [/INST]")
            system = ""
        else:
            parts.append(turn.text)
    return " ".join(parts)
