r"""Conversations as ids: the two chat formats of Code Llama Instruct, what of them is learnt, and what is refused.

What comes in: turns. What goes out: ids and, for training, which of them are learnt. Beside `tokens.py` this is the only
place where layouts are made; every id comes from its `Codec`, so that text never becomes a control token. Contents are
stripped, as in Meta's code. What is learnt stands between bars:

    llama2 (7B, 13B, 34B)   <s> enc("[INST] {user} [/INST]") | bare(" {answer} ") </s> | <s> enc("[INST] ...
    source (70B)            <s> bare(" Source: system\n\n {system}") <step> bare(" Source: user\n\n {user}") <step>
                            bare(" Source: assistant\nDestination: user\n\n ") | bare({answer}) <step> | ...

A system text of `llama2` goes into the first question as `<<SYS>>`; `source` writes an empty one where there is none. In
`source` an answer is encoded behind the very ids that a prompt ends with: encoded together with them, its first word would
take their last space, and the model would be taught what it is never asked.

`[INST]`, `<<SYS>>` and their ends are ordinary text in `llama2`, so that nothing could tell those in a content from the
template's: such conversations are refused, as Meta's code refuses them. `<step>` is a token of its own; no text becomes it.

    conversation refused    no turns, an unknown role, a system text that is not first, two turns of one role in a row, an
                            answer before the first question, a question or an answer that is empty, a question at the end,
                            a tag of the template in a content, text that the tokenizer cannot represent
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from codetune.tokens import Codec

Template = Literal["llama2", "source"]
ROLES = ("system", "user", "assistant")
OTHER_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
SOURCE_ANSWER = " Source: assistant\nDestination: user\n\n "
CODE_TAGS = ("[PYTHON]", "[/PYTHON]")


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids, and which of them are learnt."""

    ids: list[int]
    learnt: list[bool]


class BadConversation(ValueError):
    """A conversation that is refused; `reason` is counted under this name."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def turns_of(messages: Any) -> list[Turn]:
    """Turns from the forms that data sets have: `role` and `content`, or `from` and `value`, under their usual names.

    Example: [{"from": "human", "value": "hi"}] -> [Turn("user", "hi")]

    Raises:
        BadConversation: not a list of messages with a role and a text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise BadConversation("not_messages", f"a conversation is a list of messages, found {type(messages).__name__}")
    turns = []
    for number, message in enumerate(messages, start=1):
        role, content = None, None
        if isinstance(message, Mapping):
            role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadConversation("not_messages", f"message {number} has no `role` and `content` that are texts")
        turns.append(Turn(OTHER_NAMES.get(role, role), content))
    return turns


def check_turns(turns: Sequence[Turn], template: Template, ends_with: Literal["user", "assistant"]) -> list[Turn]:
    """The turns with their contents stripped.

    Raises:
        BadConversation: anything that the module's text names; the message says which turn.
    """
    if not turns:
        raise BadConversation("no_turns", "a conversation without turns")
    stripped = [Turn(turn.role, turn.content.strip()) for turn in turns]
    expected = "user"
    for number, turn in enumerate(stripped, start=1):
        if turn.role not in ROLES:
            raise BadConversation(
                "unknown_role", f"turn {number} has the role {turn.role!r}; write one of {', '.join(ROLES)}"
            )
        tag = next((tag for tag in LLAMA2_TAGS if tag in turn.content), None)
        if tag is not None and template == "llama2":
            raise BadConversation(
                "template_tag_in_text", f"turn {number} holds {tag}, which the template would not be told from"
            )
        if turn.role == "system":
            if number > 1:
                raise BadConversation("system_not_first", f"turn {number} is a system text; it stands first, or not at all")
            continue
        if turn.role != expected:
            what = (
                "begins with an answer" if expected == "user" and number <= 2 else f"has two turns of {turn.role} in a row"
            )
            reason = "begins_with_answer" if "begins" in what else "two_turns_in_a_row"
            raise BadConversation(reason, f"the conversation {what} (turn {number})")
        if not turn.content:
            kind = "answer" if turn.role == "assistant" else "question"
            raise BadConversation(f"empty_{kind}", f"turn {number} is an empty {kind}")
        expected = "assistant" if expected == "user" else "user"
    last = stripped[-1].role
    if last != ends_with:
        reason = "ends_without_answer" if ends_with == "assistant" else "ends_without_question"
        raise BadConversation(reason, f"the conversation ends with a turn of {last}, not of {ends_with}")
    return stripped


def render(codec: Codec, turns: Sequence[Turn], template: Template) -> Rendered:
    """A whole conversation for training: every answer and the token that ends it is learnt, nothing else.

    Raises:
        BadConversation: see the module's text.
    """
    return _render(codec, check_turns(turns, template, "assistant"), template)


def prompt_ids(codec: Codec, turns: Sequence[Turn], template: Template) -> list[int]:
    """What a model completes with the next answer: the layout of training up to there.

    Raises:
        BadConversation: see the module's text.
    """
    checked = check_turns(turns, template, "user")
    ids = _render(codec, checked, template).ids
    return [*ids, *codec.encode_bare(SOURCE_ANSWER)] if template == "source" else ids


def stop_ids(codec: Codec, template: Template) -> tuple[int, ...]:
    """The tokens that end an answer.

    Raises:
        ValueError: the tokenizer has none for this template.
    """
    return (need_stop(codec, template),)


def need_stop(codec: Codec, template: Template) -> int:
    """The token that ends an answer, which training learns.

    Raises:
        ValueError: the tokenizer has none.
    """
    stop = codec.eos_id if template == "llama2" else codec.step_id
    if stop is None:
        what = "end token" if template == "llama2" else "`<step>`, and its model no unused last row for it"
        raise ValueError(f"`data.chat.template` {template} ends answers with a token that this tokenizer has not: no {what}")
    return stop


def meta_history_ids(codec: Codec, turns: Sequence[Turn]) -> list[int]:
    """A prompt of the 70B format as Meta's code writes one whose earlier answers have no destination: one text per turn.

    Here for comparison with the published ids; `prompt_ids` repeats the layout of training instead.
    """
    checked = check_turns(turns, "source", "user")
    step = need_stop(codec, "source")
    ids = codec.plain([], last=False)
    for turn in _with_system(checked):
        ids += [*codec.encode_bare(f" Source: {turn.role}\n\n {turn.content}"), step]
    return [*ids, *codec.encode_bare(SOURCE_ANSWER)]


def _render(codec: Codec, turns: Sequence[Turn], template: Template) -> Rendered:
    stop = need_stop(codec, template)
    parts: list[tuple[list[int], bool]] = []
    if template == "source":
        parts.append((codec.plain([], last=False), False))
        for turn in _with_system(turns):
            if turn.role == "assistant":
                parts += [(codec.encode_bare(SOURCE_ANSWER), False), ([*_text(codec, turn.content), stop], True)]
            else:
                parts.append(([*_text(codec, f" Source: {turn.role}\n\n {turn.content}"), stop], False))
    else:
        system = turns[0].content if turns[0].role == "system" else None
        for turn in turns[system is not None :]:
            if turn.role == "user":
                question = turn.content if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n{turn.content}"
                system = None
                parts.append((codec.plain(_text(codec, f"[INST] {question} [/INST]", start=True), last=False), False))
            else:
                parts.append(([*_text(codec, f" {turn.content} "), stop], True))
    ids = [token for part, _ in parts for token in part]
    return Rendered(ids, [learnt for part, learnt in parts for _ in part])


def _with_system(turns: Sequence[Turn]) -> list[Turn]:
    """The 70B format has a system turn always, if an empty one."""
    return list(turns) if turns[0].role == "system" else [Turn("system", ""), *turns]


def _is_whole(text: str) -> bool:
    """Whether every character is one; JSON can carry halves."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(codec: Codec, text: str, start: bool = False) -> list[int]:
    if not _is_whole(text):
        raise BadConversation("not_representable", "half a character (a lone surrogate), which no tokenizer takes")
    ids = codec.encode(text) if start else codec.encode_bare(text)
    if codec.has_control_ids(ids) or not codec.represents(text):
        raise BadConversation("not_representable", "the tokenizer cannot take this text and give it back as it was")
    return ids


# ---------------------------------------------------------------------------------------------------------------------
# For other readers of the checkpoint: the same layouts as Jinja, with the marks that trl and transformers mask by

_CHECKS = (
    "{%- set start = 1 if messages[0]['role'] == 'system' else 0 %}"
    "{%- for message in messages[start:] %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('After an optional system text, turns of user and assistant alternate') }}"
    "{%- endif %}{%- endfor %}"
)
JINJA: dict[str, str] = {
    "llama2": _CHECKS
    + (
        "{%- for message in messages[start:] %}"
        "{%- if message['role'] == 'user' %}"
        "{{- bos_token + '[INST] ' }}"
        "{%- if loop.index0 == 0 and start == 1 %}"
        "{{- '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' }}"
        "{%- endif %}"
        "{{- message['content'].strip() + ' [/INST]' }}"
        "{%- else %}"
        "{%- generation %}{{- ' ' + message['content'].strip() + ' ' + eos_token }}{%- endgeneration %}"
        "{%- endif %}{%- endfor %}\n"
    ),
    "source": _CHECKS
    + (
        "{{- bos_token + ' Source: system\\n\\n ' + (messages[0]['content'].strip() if start == 1 else '') + '<step>' }}"
        "{%- for message in messages[start:] %}"
        "{%- if message['role'] == 'user' %}"
        "{{- ' Source: user\\n\\n ' + message['content'].strip() + '<step>' }}"
        "{%- else %}"
        "{{- ' Source: assistant\\nDestination: user\\n\\n ' }}"
        "{%- generation %}{{- message['content'].strip() + '<step>' }}{%- endgeneration %}"
        "{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- ' Source: assistant\\nDestination: user\\n\\n ' }}{%- endif %}\n"
    ),
}
