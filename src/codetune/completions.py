"""What is asked of a model and what comes back, the same whichever engine writes it; and the file in which it is kept.

What comes in: prompts and how to sample. What goes out: a plan (requests in groups, sorted by length), completions cut at
their stop by one rule for all engines, and a JSONL file that a later run goes on with. A group is kept whole or redone, as
what shares a batch changes the numbers. The file's first line says what the plan was; another plan is refused.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from codetune.artifacts import hash_json
from codetune.tokens import Codec

StopReason = Literal["eos", "stop_id", "stop_string", "length"]
SEED_BITS = 31  # what every engine takes as a seed


@dataclass(frozen=True)
class Prompt:
    """One prompt: as text, which the engine encodes as the beginning of a document, or as the ids that stand for it."""

    id: str
    text: str
    token_ids: tuple[int, ...] | None = None  # where given, they are what is completed; the text is for servers and people


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn and where they end."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0
    samples: int = 1  # completions of each prompt, each with a seed of its own
    stop_strings: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()  # beside the model's own end tokens
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, what in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("samples", self.samples >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("stop_strings", all(self.stop_strings), "texts that are not empty"),
        ):
            if not fits:
                raise ValueError(f"sampling: `{name}` is {getattr(self, name)!r}; write {what}")


@dataclass(frozen=True)
class Completion:
    """What a model wrote, with all that is needed to ask for it again."""

    prompt_id: str
    sample: int
    seed: int
    text: str  # up to the stop
    raw_text: str  # with a stop string, and what its last token holds behind it; control tokens are no text
    token_ids: tuple[int, ...]  # with the token that stopped it; empty where a server does not tell
    stop_reason: StopReason
    prompt_tokens: int
    completion_tokens: int
    prompt_hash: str
    # given: the engine was handed these ids. equal, differ, length: a server encoded the text, and its ids, or where it does
    # not tell them their number, were compared. unknown: it does not even tell their number, or there was nothing to compare
    prompt_check: Literal["given", "equal", "length", "differ", "unknown"] = "given"
    group: int = 0
    seconds: float = field(default=0.0, compare=False)  # of the clock, this completion's share of its group's

    @property
    def stopped(self) -> bool:
        return self.stop_reason != "length"


@dataclass(frozen=True)
class Request:
    """One completion that is to be written."""

    prompt: Prompt
    sample: int
    seed: int
    token_ids: tuple[int, ...] | None  # of the prompt; None where only a server could tell
    prompt_hash: str
    max_new_tokens: int

    @property
    def length(self) -> int:
        """What requests are sorted by: tokens, or characters where no tokenizer is at hand."""
        return len(self.prompt.text) if self.token_ids is None else len(self.token_ids)


@dataclass(frozen=True)
class Plan:
    """All requests, in the groups in which they are made."""

    groups: tuple[tuple[Request, ...], ...]
    header: dict[str, Any]  # the engine, the sampling and the fingerprint of all prompts in order

    @property
    def fingerprint(self) -> str:
        return self.header["plan"]


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """The seed of one completion: a hash of the run's seed, the prompt's id and the sample's number, and of nothing else."""
    digest = hashlib.sha256(json.dumps([seed, prompt_id, sample]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def hash_prompt(prompt: Prompt, token_ids: Sequence[int] | None) -> str:
    """A name for what is completed: the ids, or the text where there are none."""
    return hash_json(prompt.text if token_ids is None else list(token_ids))


def encode_prompt(prompt: Prompt, codec: Codec) -> tuple[int, ...]:
    """The ids that stand for a prompt: its own, or `<s> text` with no end.

    Raises:
        ValueError: ids outside of the vocabulary, no tokens at all, or a text that the tokenizer cannot represent.
    """
    if prompt.token_ids is not None:
        wrong = [token for token in prompt.token_ids if not 0 <= token < codec.vocabulary_size]
        if wrong:
            raise ValueError(
                f"prompt {prompt.id!r}: id {wrong[0]} is outside of the vocabulary (0 to {codec.vocabulary_size - 1})"
            )
        ids = prompt.token_ids
    else:
        text_ids = codec.encode(prompt.text)
        if codec.has_control_ids(text_ids) or not codec.represents(prompt.text):
            raise ValueError(
                f"prompt {prompt.id!r}: the tokenizer cannot represent this text (a literal U+2581, or an unknown "
                "character); take it out, or use another model"
            )
        ids = tuple(codec.plain(text_ids, last=False))
    if not ids:
        raise ValueError(f"prompt {prompt.id!r} has no tokens; this tokenizer has no begin token, so write some text")
    return ids


def make_plan(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    codec: Codec | None,
    context_tokens: int | None,
    group_requests: int,
    engine: dict[str, Any],
) -> Plan:
    """Requests sorted by length, the longest first, in groups; the same for the same prompts, whatever was done already.

    Where prompt and completion would leave the model's context, the completion is given what room there is.

    Raises:
        ValueError: two prompts with one id, or a prompt that fills the context by itself.
    """
    requests, seen = [], set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"two prompts have the id {prompt.id!r}; ids name completions, so make them different")
        seen.add(prompt.id)
        token_ids = prompt.token_ids if codec is None else encode_prompt(prompt, codec)
        room = sampling.max_new_tokens
        if context_tokens is not None and token_ids is not None:
            room = min(room, context_tokens - len(token_ids))
            if room < 1:
                raise ValueError(
                    f"prompt {prompt.id!r} has {len(token_ids)} tokens, and the model's context is {context_tokens}; "
                    "shorten it, or use a model with a longer context"
                )
        name = hash_prompt(prompt, token_ids)
        requests += [
            Request(prompt, sample, sample_seed(sampling.seed, prompt.id, sample), token_ids, name, room)
            for sample in range(sampling.samples)
        ]
    settings = json.loads(json.dumps(dataclasses.asdict(sampling)))  # as it comes back from a file
    header = {"engine": engine, "sampling": settings, "requests": len(requests)}
    asked = [[request.prompt.id, request.prompt_hash, request.sample] for request in requests]
    fixed = {key: value for key, value in engine.items() if key not in ("versions", "hardware")}
    header["plan"] = hash_json([fixed, header["sampling"], asked, group_requests])
    requests.sort(key=lambda request: -request.length)  # stable: samples of one prompt stay together
    groups = [tuple(requests[start : start + group_requests]) for start in range(0, len(requests), group_requests)]
    return Plan(tuple(groups), header | {"groups": len(groups)})


# ---------------------------------------------------------------------------------------------------------------------
# Where a completion ends


def find_stop_string(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins, or None."""
    return min((place for place in map(text.find, stop_strings) if place >= 0), default=None)


def cut_at_stop(
    codec: Codec, ids: Sequence[int], sampling: Sampling, eos_ids: Sequence[int]
) -> tuple[tuple[int, ...], str, str, StopReason]:
    """Ids, raw text, text and reason of what was generated: one rule for every engine, however far past the stop it went.

    The first of these ends it: one of the model's end tokens, one of `stop_ids`, the token that completes a stop string.

    Example: pieces `a`, `b`, `</s>`, `c` and stop string "b" -> ids [a, b], "ab", "a", "stop_string"
    """
    ends = {*sampling.stop_ids, *eos_ids}
    place = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = tuple(int(token) for token in (ids if place is None else ids[:place]))
    raw = codec.decode_bare(kept)
    found = find_stop_string(raw, sampling.stop_strings)
    if found is not None:
        counts = range(1, len(kept) + 1)
        holds = bisect.bisect_left(
            counts,
            True,
            key=lambda count: find_stop_string(codec.decode_bare(kept[:count]), sampling.stop_strings) is not None,
        )
        kept = kept[: holds + 1]
        raw = codec.decode_bare(kept)
        return kept, raw, raw[: find_stop_string(raw, sampling.stop_strings)], "stop_string"
    if place is None:
        return kept, raw, raw, "length"
    last = int(ids[place])
    return (*kept, last), raw, raw, "eos" if last in eos_ids else "stop_id"


def completed(
    request: Request,
    codec: Codec,
    ids: Sequence[int],
    sampling: Sampling,
    eos_ids: Sequence[int],
    **more: Any,
) -> Completion:
    """The completion that these generated ids are."""
    kept, raw, text, reason = cut_at_stop(codec, ids, sampling, eos_ids)
    assert request.token_ids is not None
    return Completion(
        prompt_id=request.prompt.id,
        sample=request.sample,
        seed=request.seed,
        text=text,
        raw_text=raw,
        token_ids=kept,
        stop_reason=reason,
        prompt_tokens=len(request.token_ids),
        completion_tokens=len(kept),
        prompt_hash=request.prompt_hash,
        **more,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The file


class CompletionFile:
    """Completions on disk, group by group; what is there of the same plan is not made again.

    Each group is one write that is on the disk before the next begins. A group of which only a part was written, as by a
    process that was killed, is cut off and redone.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self.done: dict[int, list[Completion]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path}: another process is writing completions there; wait for it, or stop it") from None
        try:
            self._go_on()
        except BaseException:
            self._file.close()
            raise

    def _go_on(self) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        lines = io.BytesIO(data[:whole])
        header_line = lines.readline()
        if not header_line:
            own = json.dumps(self.plan.header, ensure_ascii=False, sort_keys=True)
            if not own.encode().startswith(data):  # what is left of a killed write begins as ours does
                raise ValueError(f"{self.path} is not a file of completions; write to another one")
            self._file.truncate(0)
            self._append([own])
            return
        header = _parse(self.path, 1, header_line)
        if header.get("plan") != self.plan.fingerprint:
            raise ValueError(
                f"{self.path} holds completions of another plan ({_difference(header, self.plan.header)}); move it away, or "
                "ask for the same again"
            )
        kept = lines.tell()
        block: list[Completion] = []
        for number, line in enumerate(lines, start=2):
            completion = completion_of(_parse(self.path, number, line))
            if block and completion.group != block[0].group:
                break  # a part of a group, with another one behind it: written by two at once, or by hand
            block.append(completion)
            wanted = self.plan.groups[completion.group] if completion.group < len(self.plan.groups) else ()
            if [(c.prompt_id, c.sample) for c in block] == [(r.prompt.id, r.sample) for r in wanted]:
                self.done[completion.group] = block
                block, kept = [], lines.tell()
        rest = data[kept:]
        if rest.count(b"\n") >= max(map(len, self.plan.groups), default=0) + 1:
            raise ValueError(f"{self.path}: damaged behind byte {kept}; cut the file off there, or move it away")
        self._file.truncate(kept)

    def write(self, group: int, completions: Sequence[Completion]) -> None:
        """Add one whole group."""
        self._append([json.dumps(dataclasses.asdict(completion), ensure_ascii=False) for completion in completions])
        self.done[group] = list(completions)

    def _append(self, lines: Sequence[str]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict):
            return value
    raise ValueError(f"{path}: line {number} is not a JSON object; the file was damaged, move it away")


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting in which two plans differ, for a message."""
    for section in ("sampling", "engine"):
        before, now = old.get(section) or {}, new[section]
        for key in now:
            if before.get(key) != now[key] and key not in ("versions", "hardware"):
                return f"{section}.{key} was {before.get(key)!r}, now {now[key]!r}"
    return "other prompts"


def completion_of(record: dict[str, Any]) -> Completion:
    """A completion from its line of a file."""
    known = {item.name for item in dataclasses.fields(Completion)}
    values: dict[str, Any] = {key: value for key, value in record.items() if key in known}
    values["token_ids"] = tuple(values["token_ids"])
    return Completion(**values)


def read_completions(path: Path) -> Iterator[Completion]:
    """The completions in a file, in the order in which they were written.

    Raises:
        ValueError: no such file, or a damaged line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = _parse(path, number, line)
            if number > 1:
                yield completion_of(record)
