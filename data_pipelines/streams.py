"""One source, in one lane, as an endless stream of samples: read, infilled, encoded, cut to rows, and counted.

What comes in: a source plan and the stage's settings. What goes out: `take(room)`, the next sample. The stream reads pass
after pass, each with new infilling cuts, and knows what it has read, encoded, given out and dropped, so that tokens in =
tokens in rows + counted rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from codetune.artifacts import LAYOUTS
from codetune.recipe import ChatSettings, FimSettings
from codetune.tokens import Codec
from data_pipelines.conversations import ConversationEncoder, kind_of
from data_pipelines.documents import Document, Drops, SourcePlan, read_documents
from data_pipelines.fim import PLAIN, Sample, encode_documents, encode_layouts
from data_pipelines.held_out import HeldOut
from data_pipelines.long_documents import REASON, LongPreference

BATCH_CHARACTERS = 400_000  # documents encoded at once; bounds memory, and results do not depend on it
BATCH_DOCUMENTS = 256


@dataclass
class StreamCounts:
    """What happened to one source in one lane. Tokens are those of samples, control tokens included."""

    documents_read: int = 0
    characters_read: int = 0
    documents_encoded: int = 0
    tokens_encoded: int = 0
    tokens_taken: int = 0
    tokens_left_out: int = 0  # behind `long_documents.first_tokens` of their document; not in `tokens_encoded`
    documents_cut: int = 0  # longer than a row, or (concatenation) than what was left of it
    documents_fitting: int = 0  # those that could be infilled
    turns_left_out: int = 0  # of conversations longer than a row; whole questions with their answers
    layouts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LAYOUTS, 0))  # documents
    passes_completed: int = 0
    documents_in_pass: int = 0  # of the current pass
    documents_per_pass: int | None = None  # known once a pass is complete

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "layouts": dict(self.layouts), "epochs": self.epochs()}

    def epochs(self) -> float | None:
        """How often the lane's share of the source was read; None while the first pass is not complete."""
        if self.documents_per_pass is None:
            return None
        return self.passes_completed + self.documents_in_pass / self.documents_per_pass


class SourceStream:
    """The samples of one source in one lane."""

    def __init__(
        self,
        plan: SourcePlan,
        codec: Codec,
        fim: FimSettings,
        *,
        seed: int,
        row_tokens: int,
        lane: int,
        lanes: int,
        drops: Drops,
        held_out: HeldOut | None,
        cuts_at_room: bool = False,
        prefers: LongPreference | None = None,
        chat: ChatSettings | None = None,
    ) -> None:
        self.plan = plan
        self.codec = codec
        self.fim = fim
        self.rate = fim.rate_of(plan.settings)
        self.seed = seed
        self.row_tokens = row_tokens
        self.lane, self.lanes = lane, lanes
        self.drops = drops
        self.held_out = held_out
        self.cuts_at_room = cuts_at_room  # concatenation: documents are cut where the row ends
        self.prefers = prefers
        self.kind = kind_of(plan.settings)
        self.counts = StreamCounts()
        self._talks = None
        if plan.settings.conversation is not None:
            assert chat is not None, "the loader refuses conversations without `data.chat`"
            self._talks = ConversationEncoder(plan, chat, codec, row_tokens, drops)
        self._why_dry = ""
        self._documents = self._passes()
        self._ready: deque[tuple[Sample, Document]] = deque()
        self._rest: Sample | None = None  # what is left of a document longer than a row

    def take(self, room: int) -> Sample:
        """The next sample, at most `room` tokens long.

        Raises:
            ValueError: the source ran dry and may not be read again.
        """
        if self._rest is None:
            while not self._ready:
                self._encode_more()
            self._rest, document = self._ready.popleft()
            if self.cuts_at_room and self._rest.layout != PLAIN and len(self._rest) > room:
                self._rest = self._plain_instead(self._rest, document)
            self._count_document(self._rest, room)
        sample, self._rest = _cut(self._rest, room)
        sample.kind = self.kind
        self.counts.tokens_taken += len(sample)
        return sample

    def tokens_not_taken(self) -> int:
        """Tokens that were encoded and never asked for."""
        rest = 0 if self._rest is None else len(self._rest)
        return rest + sum(len(sample) for sample, _ in self._ready)

    def _count_document(self, sample: Sample, room: int) -> None:
        self.counts.layouts[LAYOUTS[sample.layout]] += 1
        self.counts.documents_fitting += len(sample) <= room and self._talks is None
        self.counts.documents_cut += len(sample) > room

    def _plain_instead(self, sample: Sample, document: Document) -> Sample:
        """Only documents that are not cut are infilled; this one will be."""
        (ids,) = encode_layouts([document], [None], self.codec)
        self.counts.tokens_encoded += len(ids) - len(sample)
        return Sample(ids, PLAIN, sample.document_id, sample.pass_index)

    def _encode_more(self) -> None:
        batch: list[Document] = []
        characters = 0
        most = BATCH_DOCUMENTS if self._talks is None else 1  # of few triplets a batch would be many passes
        while characters < BATCH_CHARACTERS and len(batch) < most:
            document = next(self._documents, None)
            if document is None and not batch:
                raise ValueError(self._why_dry)
            if document is None:
                break
            batch.append(document)
            characters += len(document.text)
        if self._talks is not None:
            self._encode_conversations(batch, self._talks)
            return
        samples = encode_documents(batch, self.codec, self.fim, self.rate, self.seed, self.row_tokens)
        for document, sample in zip(batch, samples, strict=True):
            if sample is None:
                self.drops.add(self.plan.name, "not_representable")
                continue
            if self.prefers is not None and not self.prefers.takes(len(sample)):
                self.drops.add(self.plan.name, REASON)
                continue
            if self.prefers is not None:
                self.counts.tokens_left_out += self.prefers.cut_to_first_tokens(sample)
            self.counts.documents_encoded += 1
            self.counts.tokens_encoded += len(sample)
            self._ready.append((sample, document))
        if self.prefers is not None and self.prefers.finds_nothing() and self.counts.passes_completed:
            raise ValueError(
                f"source `{self.plan.name}` has no document of {self.prefers.minimum_tokens} tokens in lane {self.lane} of "
                f"{self.lanes}, and `data.long_documents` asks for some; write `data.sources.{self.plan.name}.long_share: "
                "0`, or lower `data.long_documents.minimum_tokens`"
            )

    def _encode_conversations(self, batch: list[Document], talks: ConversationEncoder) -> None:
        for document in batch:
            sample = talks.encode(document)
            if sample is not None:
                self.counts.documents_encoded += 1
                self.counts.tokens_encoded += len(sample)
                self._ready.append((sample, document))
        self.counts.turns_left_out = talks.turns_left_out
        if self.counts.passes_completed and not self.counts.documents_encoded:
            raise ValueError(
                f"source `{self.plan.name}` has no conversation that can be used in lane {self.lane} of {self.lanes} "
                f"(refused: {self.drops.as_dict().get(self.plan.name, {})}); see "
                f"`data.sources.{self.plan.name}.conversation`"
            )

    def _passes(self) -> Iterator[Document]:
        settings, counts = self.plan.settings, self.counts
        pass_index = 0
        while True:
            counts.documents_in_pass = 0
            for document in read_documents(self.plan, self.lane, self.lanes, pass_index, self.drops, self.held_out):
                counts.documents_read += 1
                counts.documents_in_pass += 1
                counts.characters_read += len(document.text)
                yield document
            if not counts.documents_in_pass:
                advice = "lower `data.lanes`, or loosen its filters" if self.lanes > 1 else "loosen its filters"
                raise ValueError(
                    f"source `{self.plan.name}` gave no document to lane {self.lane} of {self.lanes} "
                    f"(dropped: {self.drops.as_dict().get(self.plan.name, {})}); {advice}"
                )
            counts.documents_per_pass = counts.documents_in_pass
            counts.passes_completed += 1
            counts.documents_in_pass = 0
            pass_index += 1
            limit = 1 if not settings.repeat else settings.max_passes
            if limit is not None and pass_index >= limit:
                setting = "`repeat` is off" if not settings.repeat else f"`max_passes` is {limit:g}"
                self._why_dry = (
                    f"source `{self.plan.name}` ran dry in lane {self.lane} of {self.lanes} after {counts.documents_read} "
                    f"documents and {counts.tokens_encoded} tokens, and {setting}; lower its share, shorten the stage, or "
                    "let it be read again"
                )
                return


def _cut(sample: Sample, room: int) -> tuple[Sample, Sample | None]:
    """The first `room` tokens, and what is left as the next piece of the document."""
    if len(sample) <= room:
        return sample, None
    assert sample.learnt is None, "conversations are never cut"
    head = Sample(sample.input_ids[:room], PLAIN, sample.document_id, sample.pass_index, piece=sample.piece)
    tail = Sample(sample.input_ids[room:], PLAIN, sample.document_id, sample.pass_index, piece=sample.piece + 1)
    return head, tail
