"""Infilling: which documents are cut, where, and in which layout (paper Sec. 2.3).

What comes in: documents. What goes out: samples, each with its ids and its layout. Cuts are characters (code points), the
two of them independent and uniform over the document; 90 % of the documents that fit whole in a row are infilled, half of
those PSM and half SPM. Everything is a pure function of (seed, document id, pass), so the number of workers, the order and
a restart cannot change it, and every pass over a source draws anew.

The cut is made before the only tokenization, so an infilled document costs little more than a plain one (`make bench
ONLY=build_speed`). A document that does not fit in a row after all is encoded a second time, as plain text.

    python -m data_pipelines.fim FILE --tokenizer runs/tiny/base/model     # one file as plain, PSM and SPM
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codetune.artifacts import LAYOUTS, fail
from codetune.recipe import FimSettings
from codetune.tokens import Codec, open_codec
from data_pipelines.documents import Document

PLAIN, PSM, SPM = range(len(LAYOUTS))
TOKENIZER = "runs/tiny/base/model"  # that a file is shown with where no other is named
LIKELY_CHARACTERS_PER_TOKEN = 4  # longer than a row by this measure: the plain form is tried first; the result is the same


@dataclass(frozen=True)
class Split:
    """Where a document is cut: prefix = text[:first], middle = text[first:second], suffix = text[second:]."""

    layout: int  # PSM or SPM
    first: int
    second: int

    def parts(self, text: str) -> tuple[str, str, str]:
        """Prefix, middle and suffix. Example: `Split(PSM, 1, 3).parts("abcd")` -> ("a", "bc", "d")"""
        return text[: self.first], text[self.first : self.second], text[self.second :]


@dataclass
class Sample:
    """Ids of one document, or of one piece of a document that is longer than a row."""

    input_ids: np.ndarray  # int32, shape (tokens,)
    layout: int
    document_id: str
    pass_index: int
    source: int = 0  # place of the source in the recipe
    kind: int = 0  # place in artifacts.KINDS
    piece: int = 0
    learnt: np.ndarray | None = None  # bool, shape (tokens,); None: all of it

    def __len__(self) -> int:
        return len(self.input_ids)


def split_for_infill(text: str, document_id: str, pass_index: int, seed: int, rate: float, spm_rate: float) -> Split | None:
    """Draw whether, where and how a document is infilled; None leaves it plain.

    The four draws are 64-bit words of one hash of (seed, document id, pass). Cuts lie anywhere from before the first to
    after the last character; when they coincide the middle is empty, which the paper's independent cuts allow.
    """
    key = f"{seed}\0{document_id}\0{pass_index}".encode()
    words = np.frombuffer(hashlib.blake2b(key, digest_size=32).digest(), "<u8").tolist()
    if rate <= 0.0 or words[0] >= rate * 2**64:
        return None
    first, second = sorted(word * (len(text) + 1) >> 64 for word in words[2:])
    return Split(SPM if words[1] < spm_rate * 2**64 else PSM, first, second)


def encode_documents(
    documents: Sequence[Document], codec: Codec, fim: FimSettings, rate: float, seed: int, row_tokens: int
) -> list[Sample | None]:
    """One sample per document, plain or infilled; None where the text holds what this tokenizer cannot take as text.

    A sample is infilled only if it fits in `row_tokens`; a plain one may be longer and is cut by the caller.
    """
    splits = [
        split_for_infill(document.text, document.id, document.pass_index, seed, rate, fim.spm_rate) for document in documents
    ]
    limit = row_tokens * LIKELY_CHARACTERS_PER_TOKEN
    early = [split if len(document.text) <= limit else None for document, split in zip(documents, splits, strict=True)]
    encoded = encode_layouts(documents, early, codec)
    again = []  # infilled and too long, or plain first and short enough for infilling after all
    for place, (ids, split, tried) in enumerate(zip(encoded, splits, early, strict=True)):
        if split is not None and (len(ids) <= row_tokens) != (tried is not None):
            again.append(place)
    retries = [None if early[place] is not None else splits[place] for place in again]
    redone = encode_layouts([documents[place] for place in again], retries, codec)
    layouts = [PLAIN if split is None else split.layout for split in early]
    for place, ids, split in zip(again, redone, retries, strict=True):
        if split is None or len(ids) <= row_tokens:
            encoded[place], layouts[place] = ids, PLAIN if split is None else split.layout
    return [
        None if ids is REFUSED else Sample(ids, layout, document.id, document.pass_index)
        for document, ids, layout in zip(documents, encoded, layouts, strict=True)
    ]


REFUSED: Any = np.zeros(0, np.int32)


def encode_layouts(documents: Sequence[Document], splits: Sequence[Split | None], codec: Codec) -> list[np.ndarray]:
    """Ids of every document in its layout, in one call of the tokenizer; `REFUSED` where the text would not come back."""
    texts: list[str] = []
    for document, split in zip(documents, splits, strict=True):
        if split is None:
            texts.append(codec.start_text(document.text))
            continue
        prefix, middle, suffix = split.parts(document.text)
        if split.layout == SPM:
            texts += [codec.start_text(prefix + middle), suffix]
        else:
            texts += [codec.start_text(prefix), suffix, middle]
    pieces = iter(codec.encode_batch_bare(texts))
    results = []
    for document, split in zip(documents, splits, strict=True):
        if split is None:
            parts = [next(pieces)]
            ids = codec.plain(parts[0])
        elif split.layout == SPM:
            parts = [next(pieces), next(pieces)]
            ids = codec.spm(parts[1], parts[0])
        else:
            parts = [next(pieces), next(pieces), next(pieces)]
            ids = codec.psm(*parts)
        refused = any(codec.has_control_ids(part) for part in parts) or not codec.represents(document.text)
        results.append(REFUSED if refused else np.array(ids, np.int32))
    return results


def main() -> None:
    """Show a file as plain, PSM and SPM, with the control tokens visible."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.fim", description=main.__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", default=TOKENIZER, help="checkpoint folder or Hub id with infilling tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ids", action="store_true", help="print the ids as well")
    arguments = parser.parse_args()
    try:
        text = arguments.file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"{arguments.file}: not UTF-8 ({error}); convert it first, or show another file")
    except OSError as error:
        fail(f"{arguments.file}: {error.strerror}; write the path of a text file")
    if arguments.tokenizer == TOKENIZER and not Path(TOKENIZER).is_dir():
        fail(f"{TOKENIZER} is not there yet; make it with `make base`, or name a folder or a Hub id with --tokenizer")
    try:
        codec = open_codec(arguments.tokenizer)
        codec.need_infill()
    except ValueError as error:
        fail(str(error))
    document = Document(text=text, id=str(arguments.file), source="file", group="file", language="", pass_index=0)
    split = split_for_infill(text, document.id, 0, arguments.seed, 1.0, 0.5)
    assert split is not None
    for layout in (None, Split(PSM, split.first, split.second), Split(SPM, split.first, split.second)):
        (ids,) = encode_layouts([document], [layout], codec)
        if ids is REFUSED:
            fail(
                f"{arguments.file}: this tokenizer cannot take it as text and give it back as it was (a literal U+2581 "
                "where that stands for a space, or a character that it composes or does not know); a build drops such a "
                "document and counts it as not_representable"
            )
        print(f"--- {LAYOUTS[PLAIN if layout is None else layout.layout]}: {len(ids)} tokens")
        print(codec.decode(ids.tolist()))
        if arguments.ids:
            print(ids.tolist())
    print(
        f"--- cut at characters {split.first} and {split.second} of {len(text)}, as drawn for seed {arguments.seed}, pass 0"
    )


if __name__ == "__main__":
    main()
