"""Losses instead of text: held-out documents in every layout, a context that grows, keys that are found again.

What comes in: a model opened by the transformers engine, and documents: the held-out ones of packed rows (`--rows`), or for
the last two the files that `--data` has. What goes out: flat figures, in nats; shares of keys are scores, with an interval
over prompts. The last two write a line for each document and each prompt as it is measured, and a killed run goes on there.

    held-out   per source: plain text, and the middle in PSM and SPM beside plain text with the same border, and the end
    token context    `position/<to>`: mean loss of the tokens at positions up to there; `last/<length>`: of the last
               `target_tokens`, when the model is given so many tokens, these included. Both are called "perplexity at a
               length".
    keys       share of prompts in which a two-digit number is found again, by length and depth (paper, App. G.2)

A long text is read in chunks with a cache, and the head makes logits for one chunk at a time, so that memory grows with the
length by the cache alone (and one row of a chunk's mask). Sums are kept in double precision. What it does not do: several
devices.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from codetune import adapter
from codetune.artifacts import HELD_OUT, HELD_OUT_CUTS, MANIFEST, HeldOutSample, hash_json, read_held_out, read_json
from codetune.long_probes import Row, key_prompt, target_results
from codetune.probes import held_out_losses, source_groups
from codetune.problems import ContestProblem, DataMissing, load_problems
from codetune.tokens import Codec
from eval import scores
from eval.grading import LineFile
from eval.tasks import TaskRefused, TaskSettings

TOKENS_PER_BATCH = 8192
CHUNK_TOKENS = 512
LONG_FILE_BYTES = 50_000  # the paper's files for perplexity are at least this long
NEAREST = 3  # a bucket of positions is a power of two, from 2 to the 3rd upwards


def loaded_model(target: Any) -> tuple[Any, Codec]:
    """The model itself, which only the transformers engine has.

    Raises:
        TaskRefused: a server or vLLM, which give no losses here.
    """
    engine = target.engine()
    if getattr(engine, "model", None) is None:
        raise TaskRefused("losses need the model itself: use the transformers engine")
    return engine.model, engine.codec


def held_out_samples(rows: Path | None, codec: Codec) -> tuple[list[HeldOutSample], dict[str, Any]]:
    """The held-out documents of packed rows, and the rows' manifest.

    Raises:
        TaskRefused: no rows were named, they have none, or were encoded by another tokenizer.
    """
    if rows is None:
        raise TaskRefused("it is measured on the held-out documents of packed rows: name them with --rows")
    if not (rows / MANIFEST).is_file():
        raise TaskRefused(f"{rows}: no packed rows there; build them with `make data`")
    manifest = read_json(rows / MANIFEST)
    if manifest["tokenizer"] != codec.fingerprint:
        raise TaskRefused(f"{rows} was built with another tokenizer than the model's; name rows of the same family")
    samples = read_held_out(rows / HELD_OUT)
    if not samples:
        raise TaskRefused(f"{rows}: no held-out documents there; write `data.held_out` into the recipe and build again")
    return samples, manifest


def kept_lines(
    path: Path | None,
    fingerprint: str,
    names: Sequence[str],
    measure: Callable[[Sequence[int]], Iterator[tuple[int, dict[str, Any]]]],
    unit: str,
) -> list[dict[str, Any]]:
    """What was measured of each name, in their order: lines of the file first, the others as they are measured and written.

    `measure` gets the places of those that are left. Lines of another model or other settings have another fingerprint.
    """
    file = None if path is None else LineFile(path)
    try:
        found = {row["name"]: row for row in ([] if file is None else file.rows) if row["task"] == fingerprint}
        left = [place for place, name in enumerate(names) if name not in found]
        with tqdm(total=len(names), initial=len(names) - len(left), desc="measure", unit=f" {unit}") as progress:
            for place, figures in measure(left):
                row = {"name": names[place], "task": fingerprint, **figures}
                if file is not None:
                    file.add(row)
                found[names[place]] = row
                progress.update()
    finally:
        if file is not None:
            file.close()
    return [found[name] for name in names]


def fingerprint_of(target: Any, *settings: Any) -> str:
    """A name for the model, its arithmetic and what decides the figures."""
    engine = {key: value for key, value in target.engine().describe().items() if key not in ("versions", "hardware")}
    return hash_json([engine, *settings])


def held_out(
    settings: TaskSettings, target: Any, rows: Path | None, data: Path | None, path: Path | None = None
) -> dict[str, Any]:
    """Held-out losses, as training measures them, of spans (random cuts) and of whole lines."""
    del settings, data, path
    model, codec = loaded_model(target)
    samples, manifest = held_out_samples(rows, codec)
    adapter.add_fused_head(model)
    figures = {}
    for cut in HELD_OUT_CUTS:
        found = held_out_losses(model, samples, source_groups(manifest), TOKENS_PER_BATCH, cut=cut)
        figures |= {f"{cut}/{name.removeprefix('held_out/')}": value for name, value in found.items()}
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# One long text, in chunks


@torch.no_grad()
def chunked_losses(model: Any, ids: Sequence[int], chunk_tokens: int = CHUNK_TOKENS, first: int = 1) -> torch.Tensor:
    """Loss of each token from `first` on, given all before it, in nats, shape (len(ids) - first,), float32 on the CPU.

    Positions beyond the trained length are allowed: they are what is measured.
    """
    assert 1 <= first < len(ids)
    device = next(model.parameters()).device
    head = model.get_output_embeddings()
    parts: list[torch.Tensor] = []
    cache: Any = None
    # Token t is foretold by the state at t - 1, so the last token is never read.
    for start in range(0, len(ids) - 1, chunk_tokens):
        end = min(start + chunk_tokens, len(ids) - 1)
        input_ids_1T = torch.tensor([list(ids[start:end])], device=device)
        states_1TD, cache = adapter.read_chunk(model, input_ids_1T, torch.arange(start, end, device=device)[None], cache)
        skip = max(0, first - 1 - start)
        if skip >= end - start:
            continue
        logits_TV = head(states_1TD[0, skip:]).float()
        wanted_T = torch.tensor(list(ids[start + skip + 1 : end + 1]), device=device)
        parts.append(torch.nn.functional.cross_entropy(logits_TV, wanted_T, reduction="none").cpu())
    return torch.cat(parts)


def context(
    settings: TaskSettings, target: Any, rows: Path | None, data: Path | None, path: Path | None = None
) -> dict[str, Any]:
    """Loss by position, and of the last tokens under a growing prefix, to the longest of `lengths`."""
    model, codec = loaded_model(target)
    if not settings.lengths or min(settings.lengths) < 2:
        raise ValueError("context: `lengths` are the numbers of tokens that the model is given, 2 or more")
    longest, targets = max(settings.lengths), settings.target_tokens
    texts = long_texts(codec, rows, data, longest)[: settings.limit]
    if not texts:
        raise TaskRefused(
            f"no document of {longest} tokens: --data needs a folder `long` with files of {LONG_FILE_BYTES // 1000} kB and "
            "more, or --rows held-out documents that long"
        )

    def measure(places: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for place in places:
            own: dict[str, list[float]] = {}
            add_buckets(own, chunked_losses(model, texts[place][:longest]))
            for length in settings.lengths:
                kept = min(targets, length - 1)
                # The same last tokens of the document's first `longest`, behind more and more of what stands before them.
                losses_T = chunked_losses(model, texts[place][longest - length : longest], first=length - kept)
                _add(own, f"last/{length}", losses_T.double().sum().item(), kept)
            yield place, {"sums": own}

    names = [f"{place} {hash_json(ids[:longest])}" for place, ids in enumerate(texts)]
    key = fingerprint_of(target, "context", settings.lengths, targets)
    sums: dict[str, list[float]] = {}
    for row in kept_lines(path, key, names, measure, "documents"):
        for name, (total, count) in row["sums"].items():
            _add(sums, name, total, count)
    return {name: round(total / count, 6) for name, (total, count) in sums.items()} | {"documents": float(len(texts))}


def add_buckets(sums: dict[str, list[float]], losses_T: torch.Tensor) -> None:
    """Add losses to the bucket of their position: up to 8, 16, 32 and so on."""
    start = 0
    bucket = 2**NEAREST
    while start < len(losses_T):
        part = losses_T[start : bucket - 1]  # losses_T[0] is the token at position 1
        if len(part):
            _add(sums, f"position/{bucket}", part.double().sum().item(), len(part))
        start, bucket = bucket - 1, 2 * bucket


def _add(sums: dict[str, list[float]], name: str, total: float, count: float) -> None:
    found = sums.setdefault(name, [0.0, 0.0])
    found[0] += total
    found[1] += count


def long_texts(codec: Codec, rows: Path | None, data: Path | None, tokens: int) -> list[list[int]]:
    """Documents of at least so many tokens: files in the data's folder `long`, else held-out ones of the rows."""
    found = []
    folder = None if data is None else data / "long"
    if folder is not None and folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.stat().st_size >= LONG_FILE_BYTES:
                text = path.read_text(encoding="utf-8", errors="replace")
                found.append(codec.plain(codec.encode(text), last=False))
    elif rows is not None:
        samples, _ = held_out_samples(rows, codec)
        found = [sample.input_ids for sample in samples if sample.layout == "long"]
    return [ids for ids in found if len(ids) >= tokens]


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def keys(
    settings: TaskSettings, target: Any, rows: Path | None, data: Path | None, path: Path | None = None
) -> dict[str, Any]:
    """Share of keys that are found again, by length and depth; every token of the number must be the likeliest."""
    model, codec = loaded_model(target)
    if not settings.lengths:
        raise ValueError("keys: `lengths` are the lengths of the prompts, in tokens")
    texts = fillers(codec, rows, data)
    asked = [
        (tokens, depth, number)
        for tokens in settings.lengths
        for depth in settings.depths
        for number in range(settings.prompts)
    ]
    prompts = [
        key_prompt(codec, texts, tokens, depth, random.Random(f"{settings.seed} {tokens} {depth:g} {number}"))
        for tokens, depth, number in asked
    ]

    def measure(places: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        given = [prompts[place] for place in places]
        row_list = [Row(one.input_ids, range(one.answer_start, len(one.input_ids))) for one in given]
        for number, losses_T, right_T in target_results(model, row_list, TOKENS_PER_BATCH):
            tail = codec.decode(given[number].input_ids[given[number].answer_start :])
            figures = {"prompt_tokens": given[number].answer_start, "answer": tail, "found": bool(right_T.all())}
            yield places[number], figures | {"nats": round(losses_T.double().sum().item(), 6)}

    names = [
        f"{tokens}/{depth:g}/{number} {hash_json(one.input_ids)}"
        for (tokens, depth, number), one in zip(asked, prompts, strict=True)
    ]
    cells: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for (tokens, depth, _), row in zip(
        asked, kept_lines(path, fingerprint_of(target, "keys"), names, measure, "prompts"), strict=True
    ):
        cells.setdefault((tokens, depth), []).append(row)
    figures: dict[str, Any] = {}
    for (tokens, depth), found in cells.items():
        share = scores.mean_score([float(row["found"]) for row in found], 1, "greedy", settings.seed)
        figures[f"key/{tokens}/{depth:g}/found"] = share.to_dict()
        figures[f"key/{tokens}/{depth:g}/nats"] = round(sum(row["nats"] for row in found) / len(found), 6)
    return figures


def fillers(codec: Codec, rows: Path | None, data: Path | None) -> list[str]:
    """What stands around the key: Python solutions of CodeContests, as in the paper, else held-out documents of the rows."""
    if data is not None:
        try:
            loaded = load_problems("code-contests", data, hub=False)
        except DataMissing:
            pass
        else:
            found = [text for one in loaded.problems if isinstance(one, ContestProblem) for text in one.solutions]
            usable = [text for text in found if "my_function" not in text and codec.represents(text)]
            if usable:
                return usable
            if rows is None:
                raise TaskRefused(
                    f"{loaded.source} has no solutions in Python to stand around the key; name rows, or get others"
                )
    samples, _ = held_out_samples(rows, codec)
    plain = [sample for sample in samples if sample.layout == "plain"]
    sources = [sample.source for sample in plain]
    wanted = "python" if "python" in sources else sources[0]
    return [codec.decode_start(sample.input_ids) for sample in plain if sample.source == wanted]


Measure = Callable[[TaskSettings, Any, Path | None, Path | None, Path | None], dict[str, Any]]
MEASURES: dict[str, Measure] = {"held-out": held_out, "context": context, "keys": keys}
