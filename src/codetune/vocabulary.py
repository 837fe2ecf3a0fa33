"""The vocabulary of a starting checkpoint: trained, checked against its source, and grown once by the infilling tokens.

What comes in: texts to train on, or the tokenizer and the model of a base. What goes out: a tokenizer whose
`tokenizer.json` is the truth from then on, and embeddings with rows for the four tokens (paper Sec. 2.3).

Which ids the four tokens get:
    * a vocabulary of 32,000 pieces on 32,000 rows (Llama 2): Code Llama's ids 32007 to 32010, and 32,016 rows;
    * any other: the first four ids behind all tokens. Where the embedding has free rows behind them (Qwen), these are used
      and it keeps its size; otherwise it grows to the next multiple of 8.
New rows are the mean of the old ones. A logit of a mean row is the mean of the logits, never the largest: greedy text of
the grown model is that of the model before.

The trade: the model is held in memory once, in its own type. Growing happens here and never inside a distributed job.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from codetune.tokens import CODE_LLAMA_IDS, CODE_LLAMA_ROWS, INFILL_CONTENTS, LLAMA2_PIECES, open_codec

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

COMPARED_FILES = 150  # of the standard library, to compare two tokenizers on
COMPARED_CHARACTERS = 20_000  # of each of them
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
UNKNOWN, BEGIN, END_OF_TEXT = "<unk>", "<s>", "</s>"

# A run of spaces but for its last, a word with the space before it, underscores, one digit, one line end, other signs.
# A line end never joins what follows it: otherwise every line would begin inside a token.
SPLIT = r" +(?= )| ?[A-Za-z]+| ?_+|\d|\n| ?[^\sA-Za-z0-9_]+|\s"


# ---------------------------------------------------------------------------------------------------------------------
# Training one


def train_tokenizer(texts: Iterable[str], pieces: int) -> Tokenizer:
    """A BPE tokenizer over bytes with Llama's manners: implicit first space, digits and line ends single, `<s>`, `</s>`.

    All 256 bytes are pieces, so any text comes back as it was. Equal texts in equal order give an equal tokenizer.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=[UNKNOWN, BEGIN, END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = _begin_first(BEGIN, 1)
    return tokenizer


def _begin_first(content: str, token: int) -> processors.TemplateProcessing:
    """What a tokenizer does that is called by itself, outside our layouts: the begin token before a text."""
    return processors.TemplateProcessing(
        single=f"{content} $A", pair=f"{content} $A {content}:1 $B:1", special_tokens=[(content, token)]
    )


def wrapped(tokenizer: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers holds it, in the class that takes tokenizer.json as it stands.

    Family classes (`LlamaTokenizer`) rebuild the pipeline from the pieces when they load a tokenizer.json, and get it wrong.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Checking one against its source


def checked_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer of a checkpoint folder, and how it was come by.

    Where the folder has a `tokenizer.model`, sentencepiece is the judge: on real code the two must give the same ids. A
    `tokenizer.json` that does not (transformers 5.23 writes such ones) is rebuilt from the pieces and their scores, and the
    tokens that were added behind the pieces are taken over: their rows of the embedding are trained.

    Raises:
        ValueError: no tokenizer, one that does not agree with its tokenizer.model and cannot be rebuilt, or a model with
            more rows than pieces of which no file says what they are.
    """
    source = folder / "tokenizer.model"
    has_json = (folder / "tokenizer.json").is_file()
    if not source.is_file():
        return _loaded_tokenizer(folder), "tokenizer.json" if has_json else "converted by transformers"
    processor = _sentencepiece(source)
    if has_json:
        tokenizer = _loaded_tokenizer(folder)
        if difference(tokenizer, processor) is None:
            return tokenizer, "tokenizer.json, equal to sentencepiece on real code"
    pipeline = _with_added_tokens(tokenizer_from_sentencepiece(processor), _added_tokens(folder, processor), source)
    rebuilt = _like(folder, wrapped(pipeline), processor)
    found = difference(rebuilt, processor)
    if found is not None:
        raise ValueError(
            f"{source}: the tokenizer does not give sentencepiece's ids and could not be rebuilt from it ({found}); put the "
            "tokenizer.json of the model's authors beside it, and take tokenizer.model away if that one is right"
        )
    reason = "tokenizer.json gave other ids" if has_json else "there was no tokenizer.json"
    return rebuilt, f"rebuilt from tokenizer.model, equal to sentencepiece on real code ({reason})"


def _loaded_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{folder}: no tokenizer could be loaded from this folder; add its tokenizer.json ({error})"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"{folder}: this tokenizer has no tokenizer.json form; convert it first")
    return tokenizer


def _sentencepiece(path: Path) -> SentencePieceProcessor:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ValueError(
            f"{path}: checking this tokenizer needs sentencepiece; install it (pip install sentencepiece)"
        ) from None
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a sentencepiece model; take it away, or put the right file there") from error


def _like(folder: Path, rebuilt: PreTrainedTokenizerFast, processor: SentencePieceProcessor) -> PreTrainedTokenizerFast:
    """The rebuilt tokenizer with the names of its control pieces, and the chat template of the folder if there is one."""
    named = {"unk_token": processor.unk_id(), "bos_token": processor.bos_id(), "eos_token": processor.eos_id()}
    rebuilt.add_special_tokens({name: processor.IdToPiece(i) for name, i in named.items() if i >= 0})
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        rebuilt.chat_template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        rebuilt.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return rebuilt


def _added_tokens(folder: Path, processor: SentencePieceProcessor) -> dict[int, dict[str, Any]]:
    """Tokens behind the pieces, by id, as the folder's files list them.

    Raises:
        ValueError: the model has rows behind the pieces, and no file lists added tokens at all.
    """
    config, contents, settings, pipeline = (
        _json_of(folder / name) for name in ("config.json", "added_tokens.json", "tokenizer_config.json", "tokenizer.json")
    )
    lists: list[dict[int, dict[str, Any]]] = [
        {token: {"content": content} for content, token in contents.items()},
        {entry["id"]: entry for entry in pipeline.get("added_tokens", ())},
        {int(token): entry for token, entry in settings.get("added_tokens_decoder", {}).items()},
    ]
    pieces = processor.GetPieceSize()
    rows = config.get("vocab_size") or pieces
    if rows > pieces and not any(lists):
        raise ValueError(
            f"{folder / 'tokenizer.model'}: it has {pieces} pieces, the model {rows} rows, and no file says which tokens "
            "the others are; put the authors' added_tokens.json, tokenizer_config.json or tokenizer.json beside it"
        )
    added: dict[int, dict[str, Any]] = {}
    for entries in lists:
        for token, entry in entries.items():
            added[token] = added.get(token, {}) | entry
    return {token: entry for token, entry in sorted(added.items()) if token >= pieces}


def _json_of(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); download it again") from error


def _with_added_tokens(tokenizer: Tokenizer, added: dict[int, dict[str, Any]], source: Path) -> Tokenizer:
    """The tokenizer with more tokens, at the ids they have; one of which no more is said than that is a control token."""
    if not added:
        return tokenizer
    tree = json.loads(tokenizer.to_str())
    for token, entry in added.items():
        content = entry["content"]
        if tree["model"]["vocab"].setdefault(content, token) != token:
            raise ValueError(
                f"{source}: `{content}` is a piece and the added token {token}; correct the list of added tokens"
            )
        flags = {name: bool(entry.get(name, name == "special")) for name in ADDED_TOKEN_FLAGS}
        tree["added_tokens"].append({"id": token, "content": content, **flags})
    return Tokenizer.from_str(json.dumps(tree))


def real_code() -> Iterator[str]:
    """Source files of the standard library: what tokenizers are compared on."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.glob("*.py"))[:COMPARED_FILES]:
        yield path.read_text(encoding="utf-8", errors="replace")[:COMPARED_CHARACTERS]


def difference(tokenizer: PreTrainedTokenizerFast, processor: SentencePieceProcessor) -> str | None:
    """None where both give the same ids for every file of real code, else one sentence."""
    codec = open_codec(tokenizer)
    texts = list(real_code())
    other = [processor.encode(text) != ids for text, ids in zip(texts, codec.encode_batch(texts), strict=True)]
    return f"other ids for {sum(other)} of {len(other)} files of the standard library" if any(other) else None


def tokenizer_from_sentencepiece(processor: SentencePieceProcessor) -> Tokenizer:
    """The same BPE as a `tokenizers` pipeline, with Llama's normalizer."""
    pieces = [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
    unknown = processor.unk_id()
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=_merges_by_score(processor, pieces),
        unk_token=pieces[unknown] if unknown >= 0 else None,
        fuse_unk=True,
        byte_fallback=any(processor.IsByte(i) for i in range(len(pieces))),
    )
    tokenizer = Tokenizer(model)
    first_space = processor.encode("a", out_type=str)[0].startswith("▁")
    steps: list[Any] = [normalizers.Prepend("▁")] if first_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if first_space else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    if processor.bos_id() >= 0:
        tokenizer.post_processor = _begin_first(pieces[processor.bos_id()], processor.bos_id())
    return tokenizer


def _merges_by_score(processor: SentencePieceProcessor, pieces: list[str]) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, best score first: sentencepiece merges the pair whose result scores best.

    Control, unknown and byte pieces are never made of others, nor parts of others.

    Example: pieces a 0.0, b 0.0, ab -1.0, abb -2.0 -> (a, b), (ab, b)
    """
    text_ids = [
        i for i in range(len(pieces)) if not (processor.IsControl(i) or processor.IsUnknown(i) or processor.IsByte(i))
    ]
    known = {pieces[i] for i in text_ids}
    merges = []
    for i in sorted(text_ids, key=lambda i: (-processor.GetScore(i), i)):
        piece = pieces[i]
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(left, right) for left, right in halves if left in known and right in known]
    return merges


# ---------------------------------------------------------------------------------------------------------------------
# Growing it


@dataclass(frozen=True)
class Growth:
    """Where the four tokens go, and what the embedding's rows are."""

    pieces: int  # ids that the tokenizer used before
    rows_before: int
    rows: int
    infill_ids: tuple[int, ...]  # of PRE, SUF, MID, EOT; empty where the vocabulary is left alone
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """For the manifest; `padding_rows` are the ranges [first, last) of rows that belong to no token."""
        real = [*range(self.pieces), *self.infill_ids]
        edges = [-1, *sorted(real), self.rows]
        gaps = [[low + 1, high] for low, high in zip(edges, edges[1:], strict=False) if high - low > 1]
        facts = {"pieces": self.pieces, "rows_before": self.rows_before, "rows": self.rows, "rule": self.rule}
        return facts | {"infill_ids": dict(zip(INFILL_CONTENTS, self.infill_ids, strict=False)), "padding_rows": gaps}


def plan_growth(tokenizer: PreTrainedTokenizerFast, rows: int, where: str) -> Growth:
    """Ids and rows by the rules at the top of this module.

    Example: 49,152 pieces on 49,152 rows -> ids 49152 to 49155, 49,160 rows

    Raises:
        ValueError: the tokens are there already, or the tokenizer has ids beyond the embedding.
    """
    vocabulary = tokenizer.get_vocab()
    pieces = max(vocabulary.values()) + 1
    present = [content for content in INFILL_CONTENTS if content in vocabulary]
    if present:
        raise ValueError(
            f"{where}: the vocabulary has infilling tokens already ({', '.join(present)}); name this checkpoint as `parent` "
            "of a stage instead, or set base.infill_tokens to false"
        )
    if pieces > rows:
        raise ValueError(
            f"{where}: the tokenizer has ids up to {pieces - 1}, the embedding only {rows} rows; they do not belong together"
        )
    if pieces == rows == LLAMA2_PIECES:
        return Growth(pieces, rows, CODE_LLAMA_ROWS, CODE_LLAMA_IDS, "32,000 pieces: Code Llama's ids and rows")
    ids = tuple(range(pieces, pieces + len(INFILL_CONTENTS)))
    if ids[-1] < rows:
        return Growth(pieces, rows, rows, ids, "the embedding had free rows behind the last token")
    return Growth(pieces, rows, -(-(ids[-1] + 1) // 8) * 8, ids, "appended, rows up to a multiple of 8")


def grown_tokenizer(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> PreTrainedTokenizerFast:
    """The tokenizer with the four tokens at these ids; everything else as it was.

    The tokens are pieces of the model too, without merges that lead to them: it is the one way in which a tokenizer.json
    keeps ids that leave a gap (32000 to 32006).
    """
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    if tree["model"]["type"] != "BPE":
        raise ValueError(f"the tokenizer is a {tree['model']['type']} model; only BPE vocabularies can be grown")
    for content, token in zip(INFILL_CONTENTS, ids, strict=True):
        tree["model"]["vocab"][content] = token
        added = {"id": token, "content": content, "special": True, "normalized": False}
        tree["added_tokens"].append(added | {"single_word": False, "lstrip": False, "rstrip": False})
    grown = copied(tokenizer, Tokenizer.from_str(json.dumps(tree)), INFILL_CONTENTS)
    assert grown.convert_tokens_to_ids(list(INFILL_CONTENTS)) == list(ids)
    return grown


def copied(
    tokenizer: PreTrainedTokenizerFast, pipeline: Tokenizer | None = None, more_special_tokens: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """The tokenizer in the plain class, whatever its own was, with another pipeline if one is given."""
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    copy = wrapped(
        tokenizer.backend_tokenizer if pipeline is None else pipeline,
        **{name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None},
        extra_special_tokens=[*getattr(tokenizer, "extra_special_tokens", ()), *more_special_tokens],
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
    )
    copy.chat_template = tokenizer.chat_template
    return copy


def grow_embeddings(model: PreTrainedModel, growth: Growth) -> None:
    """Rows for the new tokens in the input embedding, and in the output head where it is not the same tensor."""
    model.config.get_text_config().vocab_size = growth.rows
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    before = embedding.weight
    _grow_rows(embedding, growth)
    if head is not None and head.weight is before:
        head.weight = embedding.weight
        head.out_features = growth.rows
    elif head is not None:
        _grow_rows(head, growth)


def _grow_rows(module: Any, growth: Growth) -> None:
    """A module's weight (V, d), and bias (V,) if it has one, at `growth.rows` rows; new tokens and padding are the mean."""
    import torch

    for name in ("weight", "bias"):
        old = getattr(module, name, None)
        if old is None:
            continue
        mean = old.data[: growth.pieces].mean(0, dtype=torch.float32).to(old.dtype)
        new = torch.empty((growth.rows, *old.shape[1:]), dtype=old.dtype)
        new[: growth.rows_before] = old.data
        new[growth.rows_before :] = mean
        new[list(growth.infill_ids)] = mean
        setattr(module, name, torch.nn.Parameter(new, requires_grad=old.requires_grad))
    for size in ("num_embeddings", "out_features"):
        if hasattr(module, size):
            setattr(module, size, growth.rows)
