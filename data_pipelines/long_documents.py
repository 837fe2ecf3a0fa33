"""Long documents for long rows: which documents a stage takes, and those its context is measured on.

What comes in: for training, the lengths of one source's documents in one lane, as they are read. What goes out: whether each
is taken. A document of at least `minimum_tokens` always is; a shorter one only while the short ones have no more than
their part of the tokens, so that at every moment at least `share` of a source's tokens are from long documents (up to
the first document), and exactly that where the source has more short ones than asked for. What is not taken is counted
(`shorter_than_asked`). The rule is a running sum over one lane: rows stay the same bytes whatever the number of workers.

`first_tokens` takes only the beginning of each longer document, the rest being counted, so that a short stage meets many of
them: 80,000 tokens are 8 whole files of the embedded corpus, or 80 beginnings.

The trade: a source is read faster than its tokens are used; the manifest's epochs count what was read.

For measuring, `search_long_documents` finds held-out documents of many tokens; where single ones are too short, documents of
one held-out group (repository, package) are joined, which is as near as they come to each other. They are held out by
group, so that no stage has trained on them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from codetune.recipe import HeldOutSettings, LongDocumentSettings
from data_pipelines.documents import Document, Drops, SourcePlan, documents_of_groups
from data_pipelines.fim import Sample
from data_pipelines.held_out import in_turns

REASON = "shorter_than_asked"


class LongPreference:
    """Decides document by document; its whole state is two sums."""

    def __init__(self, settings: LongDocumentSettings, share: float | None) -> None:
        """`share`: the source's own; none: the stage's."""
        self.minimum_tokens, self.first_tokens = settings.minimum_tokens, settings.first_tokens
        self.share = settings.share if share is None else share
        self.long_tokens = self.short_tokens = 0

    def takes(self, tokens: int) -> bool:
        """Whether the next document, of so many tokens, is taken; it is counted as taken if so.

        Example: minimum 4, share 0.5: lengths 2, 4, 2, 2, 1 -> no (nothing long yet), yes, yes, yes, no
        """
        if tokens >= self.minimum_tokens:
            self.long_tokens += min(tokens, self.first_tokens or tokens)
            return True
        short = self.short_tokens + tokens
        if short > (1.0 - self.share) * (self.long_tokens + short):
            return False
        self.short_tokens = short
        return True

    def cut_to_first_tokens(self, sample: Sample) -> int:
        """Shorten a document to the tokens that are used of it; how many were left out. It is longer than a row: plain."""
        left_out = 0 if self.first_tokens is None else max(len(sample) - self.first_tokens, 0)
        if left_out:
            sample.input_ids = sample.input_ids[: self.first_tokens]
        return left_out

    def finds_nothing(self) -> bool:
        """Whether no long document was met, though they are asked for: then nothing is ever taken."""
        return self.share > 0.0 and self.long_tokens == 0


def search_long_documents(
    plan: SourcePlan, settings: HeldOutSettings, is_held_out: Callable[[str], bool], count_tokens: Callable[[str], int]
) -> tuple[Document, ...]:
    """Up to `long_documents` held-out documents of one source with at least `long_tokens` tokens each, from many groups.

    Where fewer are found, a line on stderr says so, and what was found is measured on.
    """
    count, wanted = settings.long_documents, settings.long_tokens
    assert count is not None and wanted is not None
    found: dict[str, list[Document]] = {}
    parts: dict[str, list[Document]] = {}  # of each group, what is joined where nothing in it is long enough
    looked_at = 0
    for document in documents_of_groups(plan, is_held_out, Drops()):
        looked_at += 1
        if document is not None:
            if len(document.text) >= wanted and count_tokens(document.text) >= wanted:
                found.setdefault(document.group, []).append(document)
            elif document.group not in found:
                parts.setdefault(document.group, []).append(document)
        if looked_at >= settings.search_documents or len(found) >= count:
            break
    chosen = in_turns(found.values(), count)
    for group, documents in parts.items():
        if len(chosen) >= count:
            break
        joined = "\n\n".join(document.text for document in documents)
        if group not in found and len(joined) >= wanted and count_tokens(joined) >= wanted:
            first = documents[0]
            chosen.append(Document(joined, f"{first.id} and more of its group", plan.name, group, first.language, 0))
    if len(chosen) < count:
        print(
            f"held out: {len(chosen)} of {count} documents of {wanted} tokens found in data.sources.{plan.name} among "
            f"{looked_at} documents; lower data.held_out.long_tokens, or raise data.held_out.fraction or search_documents",
            file=sys.stderr,
        )
    return tuple(chosen)
