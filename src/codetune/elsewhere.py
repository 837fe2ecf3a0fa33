"""Who can read a folder that is published, by what its files say: transformers 5 and 4, vLLM, converters to GGUF.

What comes in: the folder that goes. What goes out: one line per reader, and problems that nobody should meet after
downloading: generation that would not stop, a RoPE base that older readers would not see, weights that their index does not
name, more token ids than rows. Problems refuse the publication; what a reader cannot do is said.

What each reader needs is written down here as its sources have it: vLLM takes the architecture by `architectures` and the
RoPE base from `rope_parameters` or, in versions on transformers 4, `rope_theta`; llama.cpp's converter takes vocabularies
of SentencePiece by their tokenizer.model, and byte-level ones only where it knows their pre-tokenizer; of BPE with byte
fallback in a tokenizer.json it makes a vocabulary without scores, which splits text otherwise, or nothing where an id is
missing. What it does not do: load weights, or run any of these readers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codetune.artifacts import read_json
from codetune.lineage import safetensors_header
from codetune.tokens import END

INDEX = "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
WHAT_FOR = {
    "config.json": "no reader knows the model's shape",
    "adapter_config.json": "no reader knows where the adapter goes",
    "tokenizer.json": "without the tokenizer nobody can ask the model anything",
    "tokenizer_config.json": "readers would guess the tokenizer's class and its control tokens",
}


@dataclass(frozen=True)
class Reading:
    """What one reader makes of the folder."""

    reader: str
    words: str


def older_tokenizer_config(tree: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's configuration in words that transformers 4 knows too; version 5 reads it to the same ids.

    Version 5 writes a class that 4 does not have, and a list where 4 expects a mapping.
    """
    if tree.get("tokenizer_class") != "TokenizersBackend":
        return tree
    changed = {key: value for key, value in tree.items() if key not in ("backend", "extra_special_tokens")}
    changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    # version 4 would give `token_type_ids` as well, which a Llama's `generate` refuses
    changed.setdefault("model_input_names", ["input_ids", "attention_mask"])
    extra = tree.get("extra_special_tokens")
    if isinstance(extra, list):
        changed["additional_special_tokens"] = extra
    elif extra is not None:
        changed["extra_special_tokens"] = extra
    return changed


def added_behind_pieces(folder: Path) -> dict[str, dict[str, Any]]:
    """Tokens that `tokenizer.json` has behind the pieces of `tokenizer.model`, in version 4's words; none without one.

    llama.cpp's converter takes the pieces from tokenizer.model and these from `added_tokens_decoder`; by tokenizer.json
    alone it ends with an error where their ids leave a gap, as Code Llama's do (32000 to 32006).
    """
    if not (folder / "tokenizer.model").is_file():
        return {}
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).GetPieceSize()
    added = _json(folder / "tokenizer.json").get("added_tokens", [])
    return {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in added
        if token["id"] >= pieces
    }


def check_folder(folder: Path) -> list[Reading]:
    """One line per reader.

    Raises:
        ValueError: whoever downloads this would be misled; the message says by which file.
    """
    check_parts(folder)
    config, tokenizer = _json(folder / "config.json"), _json(folder / "tokenizer.json")
    names = _json(folder / "tokenizer_config.json")
    problems = [
        *([] if config.get("architectures") else ["config.json: no architectures; readers do not know which model it is"]),
        *_positions(config),
        *_stops(_json(folder / "generation_config.json"), tokenizer, names),
        *_rows(config, tokenizer),
        *_index(folder),
    ]
    if problems:
        raise ValueError(f"{folder}: not fit to be published: {'; '.join(problems)}")
    architectures = config.get("architectures") or []
    base = (config.get("rope_parameters") or {}).get("rope_theta")
    return [
        Reading("transformers 5", ", ".join(architectures)),
        Reading(
            "transformers 4",
            f"tokenizer class {names.get('tokenizer_class', 'by default')}, rope_theta {config.get('rope_theta', base):g}",
        ),
        Reading("vLLM", f"{architectures[0] if architectures else 'no architecture named'}, tokenizer.json, safetensors"),
        Reading("GGUF", gguf_vocabulary(folder, tokenizer, names)),
    ]


def check_parts(folder: Path, adapter: bool = False) -> None:
    """Whether weights, configuration and tokenizer of a model, or of an adapter, are there and whole.

    Raises:
        ValueError: one of them is not there, or a file of weights was cut off.
    """
    names = ("adapter_config.json" if adapter else "config.json", *TOKENIZER)
    missing = [
        *_weights(folder, "adapter_model.safetensors" if adapter else "model*.safetensors"),
        *(f"no {name}: {WHAT_FOR[name]}" for name in names if not (folder / name).is_file()),
    ]
    if missing:
        raise ValueError(f"{folder}: not fit to be published: {'; '.join(missing)}")


def _weights(folder: Path, pattern: str) -> list[str]:
    """Weights are there, and each file is as long as its header says."""
    shards = sorted(folder.glob(pattern))
    if not shards:
        return [f"no weights ({pattern}): make the model again"]
    return [problem for path in shards if (problem := _damage(path)) is not None]


def _damage(path: Path) -> str | None:
    try:
        end = max((tensor["data_offsets"][1] for tensor in safetensors_header(path).values()), default=0)
    except (ValueError, KeyError, TypeError) as error:
        return f"{path.name}: not readable as safetensors ({error})"
    with path.open("rb") as file:
        expected = 8 + int.from_bytes(file.read(8), "little") + end
    size = path.stat().st_size
    return None if size == expected else f"{path.name}: {size:,} bytes instead of the {expected:,} of its header"


def _json(path: Path) -> dict[str, Any]:
    """What a file has; nothing where there is none.

    Raises:
        ValueError: it is damaged.
    """
    return read_json(path) if path.is_file() else {}


def _positions(config: dict[str, Any]) -> list[str]:
    """Both spellings of the RoPE base say the same."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_theta")
    found = []
    if new.get("rope_theta") is None or old is None or float(new["rope_theta"]) != float(old):
        found.append(
            f"config.json: rope_parameters say base {new.get('rope_theta')}, rope_theta says {old}; older readers need both"
        )
    factor, scaling = new.get("factor"), config.get("rope_scaling") or {}
    if new.get("rope_type", "default") != "default" and factor != scaling.get("factor"):
        found.append(f"config.json: rope_parameters divide positions by {factor}, rope_scaling by {scaling.get('factor')}")
    if not config.get("max_position_embeddings"):
        found.append("config.json: no max_position_embeddings")
    return found


def _stops(generation: dict[str, Any], tokenizer: dict[str, Any], names: dict[str, Any]) -> list[str]:
    """Generation stops at the end of a text, and of a middle where the vocabulary has that token."""
    value = generation.get("eos_token_id")
    stops = set(value if isinstance(value, list) else [] if value is None else [value])
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    eos = names.get("eos_token")
    wanted = {eos.get("content") if isinstance(eos, dict) else eos: "the end of a text", END: "the end of a middle"}
    return [
        f"generation_config.json: generation would not stop at {what} ({name})"
        for name, what in wanted.items()
        if name in added and added[name] not in stops
    ]


def _rows(config: dict[str, Any], tokenizer: dict[str, Any]) -> list[str]:
    pieces = tokenizer.get("model", {}).get("vocab", {})
    ids = [
        *(pieces.values() if isinstance(pieces, dict) else range(len(pieces))),
        *(token["id"] for token in tokenizer.get("added_tokens", [])),
    ]
    highest, rows = max(ids, default=-1), config.get("vocab_size", 0)
    return [f"tokenizer.json: ids up to {highest}, and config.json: {rows} rows"] if highest >= rows else []


def _index(folder: Path) -> list[str]:
    """Every weight that the index names is in its file, and no other."""
    index = _json(folder / INDEX).get("weight_map")
    shards = sorted(folder.glob("model*.safetensors"))
    if index is None:
        return [f"{len(shards)} files of weights and no {INDEX}"] if len(shards) > 1 else []
    there = {name: path.name for path in shards for name in safetensors_header(path)}
    return [] if there == index else [f"{INDEX}: it does not name the weights that the files hold"]


def gguf_vocabulary(folder: Path, tokenizer: dict[str, Any], names: dict[str, Any]) -> str:
    """What llama.cpp's converter makes of the vocabulary; as its real runs ended (docs/publishing.md)."""
    model = tokenizer.get("model", {})
    if (folder / "tokenizer.model").is_file():
        named, added = names.get("added_tokens_decoder") or {}, added_behind_pieces(folder)
        lost = [token["content"] for number, token in added.items() if number not in named]
        if lost:
            return f"vocabulary of SentencePiece (tokenizer.model): converts, and loses {', '.join(lost)}"
        return f"vocabulary of SentencePiece (tokenizer.model) and {len(added)} added tokens: converts"
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        ids = sorted({*model.get("vocab", {}).values(), *(token["id"] for token in tokenizer.get("added_tokens", []))})
        gap = next((place for place, number in enumerate(ids) if place != number), None)
        if gap is not None:
            return f"BPE with byte fallback: does not convert, as id {gap:,} is no token and no tokenizer.model is beside it"
        return (
            "BPE with byte fallback: converts, to ids that differ from training's, as only a tokenizer.model has the scores"
        )
    if model.get("type") == "BPE":
        return (
            "byte-level BPE: converts only where the converter knows this pre-tokenizer, which a vocabulary made here is not"
        )
    return f"vocabulary of type {model.get('type')}: does not convert"
