"""Held-out documents in every layout, so that training can measure each of them without a tokenizer.

What comes in: the held-out documents of a build. What goes out: `HeldOutSample`s. Every document that fits in a row is
written plain, and for two cuts infilled, PSM and SPM, each beside plain text with the same border:

    span   the cut of training: two characters drawn at random (the middle not empty)
    line   the middle is one whole line, as an editor's completion is; prompts are made of these
    psm, plain_border   prefix and middle encoded apart
    spm, plain_joint    prefix and middle encoded as one text

A document longer than a row gives its first row as plain text, and no cut. A long document, for the loss under growing
context, gives its first `held_out.long_tokens` tokens, however long a row is (layout `long`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from codetune.artifacts import HeldOutSample
from codetune.tokens import Codec
from data_pipelines.conversations import held_out_conversations
from data_pipelines.documents import Document
from data_pipelines.held_out import HeldOut

if TYPE_CHECKING:
    from data_pipelines.build import BuildPlan

SALT = "codetune held-out cuts, version 1"  # no recipe's seed: every stage measures the same cuts


def held_out_samples(held_out: HeldOut, plan: BuildPlan, codec: Codec) -> Iterator[HeldOutSample]:
    """All samples of all held-out documents, in the order of the sources."""
    data = plan.recipe.need_data()
    row_tokens, long_tokens = data.sequence_tokens, data.held_out.long_tokens
    for source in plan.sources:
        if source.settings.conversation is not None and data.chat is not None:
            found = held_out.documents.get(source.name, ())
            yield from held_out_conversations(found, source.settings, data.chat, codec, row_tokens)
            continue
        for document in held_out.documents.get(source.name, ()):
            if codec.represents(document.text):
                yield from _of_document(document, codec, row_tokens)
        for document in held_out.long.get(source.name, ()):
            if codec.represents(document.text):
                ids = codec.plain(codec.encode(document.text), last=False)[:long_tokens]
                yield HeldOutSample(ids, "long", document.source, document.id)


def _of_document(document: Document, codec: Codec, row_tokens: int) -> Iterator[HeldOutSample]:
    plain = codec.plain(codec.encode(document.text))
    yield HeldOutSample(plain[:row_tokens], "plain", document.source, document.id)
    if codec.infill is None or len(plain) > row_tokens:
        return
    for cut, place in (("span", span_cut(document)), ("line", line_cut(document))):
        if place is not None:
            samples = list(_of_cut(document, codec, cut, *place))
            if all(len(sample.input_ids) <= row_tokens for sample in samples):
                yield from samples


def _of_cut(document: Document, codec: Codec, cut: str, first: int, second: int) -> Iterator[HeldOutSample]:
    text = document.text
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    parts = HeldOutSample([], "", document.source, document.id, cut=cut, prefix=prefix, middle=middle, suffix=suffix)
    prefix_ids, suffix_ids, middle_ids = codec.encode(prefix), codec.encode_bare(suffix), codec.encode_bare(middle)
    apart = replace(parts, middle_tokens=len(middle_ids), middle_characters=len(middle))
    psm = codec.psm(prefix_ids, suffix_ids, middle_ids)
    yield replace(apart, layout="psm", input_ids=psm, middle_start=len(psm) - 1 - len(middle_ids), end_position=len(psm) - 1)
    border = codec.plain([*prefix_ids, *middle_ids, *suffix_ids])
    yield replace(apart, layout="plain_border", input_ids=border, middle_start=len(codec.plain(prefix_ids, last=False)))
    joint_ids, start, characters = codec.encode_joint(prefix, middle)
    joint = replace(parts, middle_tokens=len(joint_ids) - start, middle_characters=characters)
    spm = codec.spm(suffix_ids, joint_ids)
    begin = len(spm) - 1 - len(joint_ids) + start
    yield replace(joint, layout="spm", input_ids=spm, middle_start=begin, end_position=len(spm) - 1)
    together = codec.plain([*joint_ids, *suffix_ids])
    yield replace(joint, layout="plain_joint", input_ids=together, middle_start=len(codec.plain([], last=False)) + start)


def span_cut(document: Document) -> tuple[int, int] | None:
    """Two characters at random, drawn as in training, again until they differ; None for a text of one character."""
    length = len(document.text)
    if length < 2:
        return None
    attempt = 0
    while True:
        first, second = sorted(word % (length + 1) for word in _words(f"span {attempt}", document))
        if first < second:
            return first, second
        attempt += 1


def line_cut(document: Document) -> tuple[int, int] | None:
    """One line with text in it, drawn at random, with its indentation, without its newline; never the first or last one.

    The prefix ends with a newline, as in HumanEval's single-line infilling. Cut behind the indentation it would end inside a
    token of most vocabularies (a word's own space), which SPM never meets in training (paper, App. E).
    """
    lines = document.text.split("\n")
    candidates = [number for number in range(1, len(lines) - 1) if lines[number].strip()]
    if not candidates:
        return None
    number = candidates[_words("line", document)[0] % len(candidates)]
    start = sum(len(line) + 1 for line in lines[:number])
    return start, start + len(lines[number])


def _words(purpose: str, document: Document) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{SALT}\0{purpose}\0{document.id}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
