"""Token layouts: how text becomes ids, and where the control tokens stand. Nothing else in the project builds ids.

What comes in: text, or its cut into prefix, middle and suffix. What goes out: lists of ids. The layouts are the paper's
(Sec. 2.3; Bavarian et al. 2022, App. D, for SPM), `enc` with the SentencePiece family's implicit leading space and `bare`
without it:

    plain       <s> enc(text) </s>
    PSM train   <s> <PRE> enc(prefix) <SUF> bare(suffix) <MID> bare(middle) <EOT>
    SPM train   <s> <PRE> <SUF> bare(suffix) <MID> enc(prefix + middle) <EOT>

Text never becomes a control token: a file that contains `</s>` or `<|endoftext|>` is encoded as the characters it has. The
added tokens are taken out of the pipeline that encodes, `special` or not, and every result is checked for control ids.
`transformers`' own infilling path (`<FILL_ME>`) is not used: in 5.23 it puts a space before the suffix and leaves the
tokenizer changed behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from codetune.artifacts import hash_json

# The pieces start with U+2581, so that their visible form in text has a leading space, as in Code Llama's tokenizer.
PREFIX, SUFFIX, MIDDLE, END = "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"
INFILL_CONTENTS = (PREFIX, SUFFIX, MIDDLE, END)
SPACE_MARK = "▁"
STEP = "<step>"  # ends every turn of the 70B chat format
LLAMA2_PIECES = 32_000
CODE_LLAMA_IDS = (32_007, 32_008, 32_009, 32_010)  # PRE, SUF, MID, EOT
CODE_LLAMA_ROWS = 32_016  # rows of the released embeddings; 32,000-32,006 and 32,011-32,015 are padding


@dataclass(frozen=True)
class InfillIds:
    """Ids of the four infilling tokens."""

    prefix: int
    suffix: int
    middle: int
    end: int


class Codec:
    """One tokenizer, taken apart so that text and control tokens cannot meet.

    Attributes:
        bos_id, eos_id: ids around documents, or None where the family has none.
        pad_id: id that fills rows; it is masked by position, so it may be equal to another id.
        infill: ids of the four tokens, or None where the vocabulary was not grown.
        step_id: id of `<step>`, or the row kept for it (the last one, where it is unused, as in Code Llama 70B), or None.
        vocabulary_size: rows of the embedding, padding rows included.
        leading_space: whether `encode_batch` puts the family's implicit space before a text.
        fingerprint: hash of the tokenizer, recorded in manifests.
    """

    def __init__(
        self,
        tree: dict[str, Any],
        *,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int | None,
        vocabulary_size: int | None = None,
    ) -> None:
        self._bare = _bare_tokenizer(tree)
        self.leading_space = _adds_leading_space(tree)
        self._rewrites = self._bare.normalizer if _rewrites_text(tree.get("normalizer")) else None
        self._marks_spaces = SPACE_MARK in json.dumps(
            [tree.get("normalizer"), tree.get("pre_tokenizer")], ensure_ascii=False
        )
        self.bos_id, self.eos_id = bos_id, eos_id
        added = {token["content"]: token["id"] for token in tree["added_tokens"]}
        vocabulary = self._bare.get_vocab(with_added_tokens=False)
        if all(content in added or content in vocabulary for content in INFILL_CONTENTS):
            self.infill = InfillIds(*(added.get(content, vocabulary.get(content, -1)) for content in INFILL_CONTENTS))
        else:
            self.infill = None
        highest = max([*vocabulary.values(), *added.values()]) + 1
        if vocabulary_size is not None and vocabulary_size < highest:
            raise ValueError(
                f"the tokenizer has ids up to {highest - 1} but the model only {vocabulary_size} embedding rows; "
                "use the tokenizer that belongs to the checkpoint, or grow it with `make base`"
            )
        self.vocabulary_size = vocabulary_size or highest
        self._names = {token["id"]: token["content"] for token in tree["added_tokens"] if not _is_text(token["content"])}
        self.step_id = added.get(STEP, self.vocabulary_size - 1 if self.vocabulary_size > highest else None)
        if self.step_id is not None:
            self._names[self.step_id] = STEP
        unknown = tree["model"].get("unk_token")
        self.pad_id = next((i for i in (pad_id, vocabulary.get(unknown or ""), eos_id) if i is not None), 0)
        self._is_control = np.zeros(self.vocabulary_size, bool)
        unwanted = [*self._names, vocabulary.get(unknown or "")]
        unwanted += (
            [] if self.infill is None else [self.infill.prefix, self.infill.suffix, self.infill.middle, self.infill.end]
        )
        self._is_control[[i for i in (*unwanted, bos_id, eos_id, self.step_id) if i is not None]] = True
        self.fingerprint = hash_json(tree)

    # -- text to ids ----------------------------------------------------------------------------------------------------

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it stands at the start of a document: with the implicit leading space of the family.

        Example (Llama 2): ["enu"] -> [[427, 29884]], which is `▁en`, `u`
        """
        return self.encode_batch_bare([self.start_text(text) for text in texts])

    def start_text(self, text: str) -> str:
        """A text that begins a document, made ready for `encode_batch_bare`: the implicit space, unless there is no text."""
        return f" {text}" if self.leading_space and text else text

    def encode_batch_bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without an implicit leading space: what follows inside a document."""
        return [encoding.ids for encoding in self._bare.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_bare(self, text: str) -> list[int]:
        return self.encode_batch_bare([text])[0]

    def encode_joint(self, prefix: str, middle: str) -> tuple[list[int], int, int]:
        """Ids of `prefix + middle` as one text, where the middle begins in them, and how many characters follow from there.

        The token at the border may hold the end of the prefix too; its characters are counted with the middle's.

        Example (pieces `ab`, `c`): ("a", "bc") -> ([ab, c], 0, 3)
        """
        text = self.start_text(prefix + middle)
        before = len(text) - len(middle)
        encoding = self._bare.encode(text, add_special_tokens=False)
        first = next((place for place, (_, end) in enumerate(encoding.offsets) if end > before), len(encoding.ids))
        start = encoding.offsets[first][0] if first < len(encoding.ids) else len(text)
        return encoding.ids, first, len(text) - start

    def has_control_ids(self, ids: Sequence[int] | np.ndarray) -> bool:
        """Whether encoded text holds an id that only we may insert, or the unknown token; such text is refused."""
        return bool(self._is_control[np.asarray(ids, dtype=np.int64)].any())

    def represents(self, text: str) -> bool:
        """Whether the text comes back as it was.

        SentencePiece families write a space as U+2581 and mix the two up; others (Qwen) compose accents first.
        """
        if self._marks_spaces and SPACE_MARK in text:
            return False
        if self._rewrites is None or text.isascii():
            return True
        return self._rewrites.normalize_str(text) in (text, text.replace(" ", SPACE_MARK))

    # -- layouts --------------------------------------------------------------------------------------------------------

    def plain(self, ids: Sequence[int], first: bool = True, last: bool = True) -> list[int]:
        """`<s> text </s>`; a piece of a longer document has `<s>` only if it is the first, `</s>` only if the last."""
        before = [self.bos_id] if first and self.bos_id is not None else []
        after = [self.eos_id] if last and self.eos_id is not None else []
        return [*before, *ids, *after]

    def psm(self, prefix_ids: Sequence[int], suffix_ids: Sequence[int], middle_ids: Sequence[int]) -> list[int]:
        """`<s> <PRE> enc(prefix) <SUF> bare(suffix) <MID> bare(middle) <EOT>`"""
        infill = self.need_infill()
        return [
            *self._begin(),
            infill.prefix,
            *prefix_ids,
            infill.suffix,
            *suffix_ids,
            infill.middle,
            *middle_ids,
            infill.end,
        ]

    def spm(self, suffix_ids: Sequence[int], prefix_middle_ids: Sequence[int]) -> list[int]:
        """`<s> <PRE> <SUF> bare(suffix) <MID> enc(prefix + middle) <EOT>`; prefix and middle are encoded as one text."""
        infill = self.need_infill()
        return [*self._begin(), infill.prefix, infill.suffix, *suffix_ids, infill.middle, *prefix_middle_ids, infill.end]

    def psm_prompt(self, prefix: str, suffix: str) -> list[int]:
        """What a PSM-trained model completes with the middle: the training layout up to `<MID>`."""
        return self.psm(self.encode(prefix), self.encode_bare(suffix), [])[:-1]

    def spm_prompt(self, prefix: str, suffix: str) -> list[int]:
        """What an SPM-trained model completes with the middle: the training layout up to the end of the prefix."""
        return self.spm(self.encode_bare(suffix), self.encode(prefix))[:-1]

    def need_infill(self) -> InfillIds:
        """The four ids.

        Raises:
            ValueError: the vocabulary was not grown.
        """
        if self.infill is None:
            raise ValueError(
                "this tokenizer has no infilling tokens; make a base that has them (`make base`), or set data.fim.rate to 0"
            )
        return self.infill

    def _begin(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]

    # -- ids to text ----------------------------------------------------------------------------------------------------

    def decode_bare(self, ids: Sequence[int]) -> str:
        """Exactly the text that `encode_batch_bare` was given; control ids are left out."""
        kept = [int(i) for i in ids if not self._is_control[int(i)]]
        return self._bare.decode(kept, skip_special_tokens=False)

    def decode_start(self, ids: Sequence[int]) -> str:
        """Exactly the text that `encode_batch` was given."""
        text = self.decode_bare(ids)
        return text[1:] if self.leading_space and text.startswith(" ") else text

    def decode(self, ids: Sequence[int]) -> str:
        """Text for people: control tokens are shown by their names."""
        shown, start = [], 0
        for place, token in enumerate(ids):
            if self._is_control[int(token)]:
                shown += [self.decode_bare(ids[start:place]), self.name(int(token))]
                start = place + 1
        return "".join([*shown, self.decode_bare(ids[start:])])

    def name(self, token: int) -> str:
        """The name of one control token."""
        return self._names.get(token) or self._bare.id_to_token(token) or f"<{token}>"

    def unfim(self, ids: Sequence[int], layout: str) -> str:
        """The document behind a training layout: the inverse of `plain`, `psm` and `spm`.

        Example: `<s> <PRE> a <SUF> c <MID> b <EOT>`, "psm" -> "abc"
        """
        values = [int(i) for i in ids]
        if layout == "plain":
            return self.decode_start(values)
        infill = self.need_infill()
        prefix_at, suffix_at, middle_at = (values.index(i) for i in (infill.prefix, infill.suffix, infill.middle))
        prefix, suffix, middle = (
            values[prefix_at + 1 : suffix_at],
            values[suffix_at + 1 : middle_at],
            values[middle_at + 1 : -1],
        )
        if layout == "spm":
            return self.decode_start(middle) + self.decode_bare(suffix)
        return self.decode_start(prefix) + self.decode_bare(middle) + self.decode_bare(suffix)


def open_codec(source: str | Path | Any, revision: str | None = None) -> Codec:
    """The codec of a checkpoint folder, a Hub id or a loaded tokenizer.

    Raises:
        ValueError: no tokenizer there, or one that has no `tokenizer.json` form.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        return _codec_of_folder(Path(source))
    tokenizer = _load_from_hub(str(source), revision) if isinstance(source, str | Path) else source
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{source}: this tokenizer has no tokenizer.json form, which codetune needs; convert it first")
    ids = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    return Codec(json.loads(backend.to_str()), **ids)


def _codec_of_folder(folder: Path) -> Codec:
    """A folder's own tokenizer.json is the truth: some tokenizer classes rebuild their pipeline and ignore it.

    Read without transformers, which spares every lane of a build the seconds of its import.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: no tokenizer.json in this folder; make the checkpoint with `make base`")
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tree["model"]["vocab"] if isinstance(tree["model"]["vocab"], dict) else {}
    ids = ids | {token["content"]: token["id"] for token in tree["added_tokens"]}
    names: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            names |= json.loads((folder / file).read_text(encoding="utf-8"))

    def id_of(key: str) -> int | None:
        name = names.get(key)
        content = name.get("content") if isinstance(name, dict) else name
        return None if content is None else ids.get(content)

    around = {"bos_id": id_of("bos_token"), "eos_id": id_of("eos_token"), "pad_id": id_of("pad_token")}
    return Codec(tree, **around, vocabulary_size=_embedding_rows(folder))


def _load_from_hub(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no tokenizer found there, neither as a folder nor on the Hub ({error})") from error


def _embedding_rows(source: str | Path) -> int | None:
    config = Path(source) / "config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("vocab_size") if config.is_file() else None


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline without control tokens and without the implicit space


def _bare_tokenizer(tree: dict[str, Any]) -> Tokenizer:
    """The same model and splitting, with no added tokens, no template and no implicit leading space.

    Added tokens of white space alone are text (GPT-NeoX keeps its runs of spaces there) and stay. Byte pieces are text too,
    but need not be added tokens: the model falls back to them by itself.
    """
    kept = [token for token in tree["added_tokens"] if token["content"].isspace()]
    tree = {**tree, "added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}
    tree |= {part: _without_leading_space(tree.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder")}
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    for token in kept:
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise ValueError(f"the tokenizer's white-space token {token['content']!r} cannot keep its id {token['id']}")
    return tokenizer


def _is_text(content: str) -> bool:
    return content.isspace() or re.fullmatch(r"<0x[0-9A-F]{2}>", content) is not None


def _without_leading_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A stage of the pipeline with whatever adds (or, decoding, takes away) a first space switched off."""
    if part is None:
        return None
    if part["type"] == "Sequence":
        key = next(name for name in ("normalizers", "pretokenizers", "decoders") if name in part)
        steps = [step for step in map(_without_leading_space, part[key]) if step is not None]
        return {**part, key: steps} if steps else None
    if part["type"] == "Prepend" or (part["type"] == "Strip" and part.get("content") == " "):
        return None
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return part


def _rewrites_text(normalizer: dict[str, Any] | None) -> bool:
    """Whether the normalizer does more than write spaces in its own way."""
    if normalizer is None:
        return False
    steps = normalizer.get("normalizers", [normalizer])
    return any(step["type"] not in ("Prepend", "Replace") for step in steps)


def _adds_leading_space(tree: dict[str, Any]) -> bool:
    """Whether the pipeline puts a space before the first word, in any of the ways that are in use."""
    found = []

    def look(part: dict[str, Any] | None) -> None:
        if part is None:
            return
        for step in part.get("normalizers", []) + part.get("pretokenizers", []):
            look(step)
        found.append(part["type"] == "Prepend")
        found.append(part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        found.append(part["type"] == "ByteLevel" and part.get("add_prefix_space", False))

    look(tree.get("normalizer"))
    look(tree.get("pre_tokenizer"))
    return any(found)
