"""Runs as their folders tell of them: what the report draws, read from the doors only.

What comes in: the folder of all runs of a size, finished or in progress, whole or damaged. What goes out: one `RunFacts` per
run: its state, its curves thinned out to what a screen can show, its mix, what was measured, its samples, its results.
Nothing is computed again that a manifest says.

The trade: a curve of any length becomes at most `POINTS` points, by keeping the first, the lowest, the highest and the last
value of each stretch (so that no spike is thinned away), in one pass over `metrics.jsonl` (100,000 lines of it in about two
seconds). A number that is not finite is left out and counted, and so is a line that cannot be read: the last one of a run
in progress may be half-written.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from codetune.artifacts import (
    LAYOUTS,
    MANIFEST,
    RESULTS,
    SKIPPED_STEPS,
    open_rows,
    read_json,
    read_results,
    why_invalid,
)

POINTS = 800  # of a curve, at most
SAMPLES = 3  # rows that are shown of a run
DOCUMENTS = 12  # of a row
COMPLETIONS = 60  # of a task
TEXT_CHARACTERS = 3000  # of one text
TREE = (  # stages and what they start from, as they are drawn where nothing says otherwise
    ("init", None),
    ("base", "init"),
    ("stage1", "base"),
    ("python", "stage1"),
    ("lcft", "stage1"),
    ("python-lcft", "python"),
    ("instruct", "lcft"),
    ("unnatural", "python-lcft"),
)
DATA = (  # what other commands make for the runs: name, folder when finished, its manifest, folder of work, whom it feeds
    ("curate", "dataset", "curate.json", "curate.partial", None),
    ("self_instruct", "triplets", MANIFEST, "work", "instruct"),
)
CURVES = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu_percent", "memory_gib")
STATES = {
    "finished": "finished",
    "running": "at work",
    "stopped": "stopped, goes on",
    "interrupted": "interrupted",
    "failed": "failed",
    "killed": "ended without a word",
    "rows": "rows are built",
    "missing": "not made",
}


@dataclass
class Curve:
    """One quantity over tokens."""

    tokens: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    not_finite: int = 0

    def add(self, tokens: float, value: Any) -> None:
        if isinstance(value, int | float) and math.isfinite(value):
            self.tokens.append(tokens)
            self.values.append(float(value))
        else:
            self.not_finite += 1

    def points(self, most: int = POINTS) -> list[tuple[float, float]]:
        return thin_out(self.tokens, self.values, most)


@dataclass(frozen=True)
class DataFacts:
    """Data that another command makes: `make curate`, `make self-instruct`."""

    name: str
    state: str
    words: str  # what came out
    feeds: tuple[str, ...]  # runs that read it


@dataclass
class RunFacts:
    """One run."""

    name: str
    size: str
    folder: Path
    state: str
    parent: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)  # of the finished model
    rows: Mapping[str, Any] = field(default_factory=dict)  # manifest of the rows
    curves: dict[str, Curve] = field(default_factory=dict)
    held_out: dict[tuple[str, str], Curve] = field(default_factory=dict)  # (source, column)
    context: dict[int, float] = field(default_factory=dict)  # tokens of context -> nats
    keys: dict[tuple[int, float], float] = field(default_factory=dict)  # (length, depth) -> share found
    infilled: dict[str, Curve] = field(default_factory=dict)  # layout -> share of the tokens since the last log
    ledger: Mapping[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # suite -> results
    completions: dict[str, dict[str, Any]] = field(default_factory=dict)  # suite/task -> shown, total, list
    steps: int = 0
    tokens: int = 0
    lines_not_read: int = 0
    notes: list[str] = field(default_factory=list)  # what was found damaged

    @property
    def not_finite(self) -> int:
        return sum(curve.not_finite for curve in (*self.curves.values(), *self.held_out.values()))

    @property
    def progress(self) -> float | None:
        """Share of the tokens that the recipe asks for."""
        asked = (self.recipe.get("training") or {}).get("train_tokens")
        return min(1.0, self.tokens / asked) if asked else None


def thin_out(tokens: list[float], values: list[float], most: int) -> list[tuple[float, float]]:
    """At most `most` points of a curve: first, lowest, highest and last of each stretch of equally many, in order.

    Example: 8 values in 2 stretches (most 8) stay; of 1,000,000 values with one spike, the spike stays.
    """
    count = len(values)
    if count <= most:
        return list(zip(tokens, values, strict=True))
    array, stretches = np.asarray(values), max(1, most // 4)
    borders = np.linspace(0, count, stretches + 1).astype(int)
    kept: list[int] = []
    for start, stop in zip(borders[:-1], borders[1:], strict=True):
        part = array[start:stop]
        kept += sorted({start, start + int(part.argmin()), start + int(part.argmax()), stop - 1})
    return [(tokens[place], values[place]) for place in kept]


def find_runs(folder: Path, names: Iterable[str] = ()) -> list[RunFacts]:
    """Every run in a folder (`runs/tiny`), in the order of the tree; only those named, where some are.

    Raises:
        ValueError: no such folder, no run in it, or none of a name that was asked for.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a report needs runs, made for example by `make stage1`")
    order = [name for name, _ in TREE]
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".") and is_run(path)]
    found.sort(key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))
    wanted = list(names)
    missing = [name for name in wanted if name not in {path.name for path in found}]
    if missing:
        raise ValueError(f"{folder}: no run {', '.join(missing)} there; there are {', '.join(path.name for path in found)}")
    found = [path for path in found if not wanted or path.name in wanted]
    if not found:
        raise ValueError(f"{folder}: no run in it; make one first, for example with `make stage1`")
    return [read_run(path) for path in found]


def find_data(folder: Path, runs: Iterable[RunFacts]) -> list[DataFacts]:
    """What was curated and what self-instruct made beside the runs, and which of them read it, by their recipes.

    Self-instruct is part of the paper's figure, and named where nothing of it is there; curation is not.
    """
    found = []
    for name, made, manifest, work, usual in DATA:
        place, notes = folder / name, list[str]()
        readers = [run.name for run in runs if _mentions(run.recipe.get("data"), f"{name}/{made}", name)]
        facts = _readable(place / made / manifest, notes) if (place / made / manifest).is_file() else {}
        if facts:
            state, words = "finished", _what_came_out(facts)
        elif (place / work).is_dir():
            state, words = ("running", STATES["running"]) if is_locked(place) else ("stopped", STATES["stopped"])
        elif usual is None and not readers:
            continue
        else:
            state, words = "missing", STATES["missing"]
        found.append(DataFacts(name, state, words, tuple(readers or ([usual] if usual else []))))
    return found


def _what_came_out(manifest: Mapping[str, Any]) -> str:
    """Example: `2 of 30 kept`, of questions, or of documents."""
    if "funnel" in manifest:
        return f"{manifest['funnel']['kept']:,} of {manifest['funnel']['asked']:,} kept"
    sources = manifest["sources"].values()
    return (
        f"{sum(source['documents'] for source in sources):,} of {sum(source['documents_read'] for source in sources):,} kept"
    )


def _mentions(value: Any, path: str, name: str) -> bool:
    """Whether a setting names this folder, by its path or, as a run of the same size, by its name."""
    if isinstance(value, Mapping):
        return any(_mentions(item, path, name) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_mentions(item, path, name) for item in value)
    return isinstance(value, str) and (value == name or f"/{path}" in f"/{value}")


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("model", "rows", "metrics.jsonl", "checkpoints"))


def read_run(folder: Path) -> RunFacts:
    """Everything that is there of one run; what is missing or damaged is left empty, and said in `notes`."""
    run = RunFacts(folder.name, folder.parent.name, folder, "missing")
    run.state = state_of(folder, run.notes)
    if run.state == "finished":
        run.manifest = read_json(folder / "model" / MANIFEST)
    if (folder / "rows" / MANIFEST).is_file():
        run.rows = _readable(folder / "rows" / MANIFEST, run.notes)
    run.recipe = run.manifest.get("recipe") or _recipe(folder, run.notes) or run.rows.get("recipe") or {}
    parent = (run.manifest.get("parent") or {}).get("path") or run.recipe.get("parent")
    run.parent = None if run.manifest.get("stage") == "base" else _parent_name(parent)  # what `make base` made has none
    if (folder / "metrics.jsonl").is_file():
        read_metrics(folder / "metrics.jsonl", run)
    finished = {**(run.manifest.get("held_out") or {}), **(run.manifest.get("long_context") or {})}
    _take_long_context(finished, run)
    run.ledger = run.manifest.get("ledger") or run.ledger
    if run.manifest.get("tokens"):
        run.tokens, run.steps = run.manifest["tokens"], run.manifest["steps"]
    run.skipped = list(_lines(folder / SKIPPED_STEPS, run))
    run.samples = read_samples(folder, run.notes)
    read_evaluations(folder / "eval", run)
    return run


def state_of(folder: Path, notes: list[str]) -> str:
    """One of `STATES`."""
    if (folder / "model" / MANIFEST).is_file():
        reason = why_invalid(folder / "model", check_hashes=False)
        if reason is None:
            return "finished"
        notes.append(f"model: {reason}")
    if is_locked(folder):
        return "running"
    if (folder / "ended.json").is_file():
        state = _readable(folder / "ended.json", notes).get("state")
        return state if state in STATES and state != "finished" else "failed"
    if (folder / "metrics.jsonl").is_file():
        return "killed"
    return "rows" if (folder / "rows" / MANIFEST).is_file() else "missing"


def is_locked(folder: Path) -> bool:
    """Whether a process works in the folder now."""
    if not (folder / ".lock").is_file():
        return False
    descriptor = os.open(folder / ".lock", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _recipe(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The recipe of a run that is not finished."""
    path = folder / "checkpoints" / "recipe.json"
    if path.is_file():
        return _readable(path, notes)
    yamls = sorted((folder / "checkpoints").glob("checkpoint-*/recipe.yaml")) if (folder / "checkpoints").is_dir() else []
    return yaml.safe_load(yamls[-1].read_text(encoding="utf-8")) if yamls else {}


def _readable(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = read_json(path)
    except ValueError as error:
        notes.append(str(error).replace(str(path), path.name))
        return {}
    return value if isinstance(value, dict) else {}


def _parent_name(parent: str | None) -> str | None:
    """Example: `runs/tiny/stage1/model` -> stage1; `owner/name` stays"""
    if parent is None:
        return None
    path = Path(parent)
    return path.parent.name if path.name in ("model", "adapter") else parent


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def _lines(path: Path, run: RunFacts) -> Iterable[dict[str, Any]]:
    """Records of a file that may be in the middle of being written."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                run.lines_not_read += 1
                continue
            if isinstance(record, dict):
                yield record
            else:
                run.lines_not_read += 1


def read_metrics(path: Path, run: RunFacts) -> None:
    """Curves of the run, from one pass over its log."""
    before: dict[str, int] | None = None
    for record in _lines(path, run):
        tokens = record.get("tokens")
        if not isinstance(tokens, int | float) or not math.isfinite(tokens):
            run.lines_not_read += 1
            continue
        run.tokens, run.steps = max(run.tokens, int(tokens)), max(run.steps, int(record.get("step") or 0))
        for name in CURVES:
            if name in record:
                run.curves.setdefault(name, Curve()).add(tokens, record[name])
        ledger = record.get("ledger")
        if isinstance(ledger, dict) and "tokens" in ledger:
            run.ledger = ledger
            now = layout_tokens(ledger["tokens"])
            _add_infilled(run, tokens, now, before)
            before = now
        elif any(name.startswith(("held_out/", "context/", "key/")) for name in record):
            for name, value in record.items():
                parts = name.split("/")
                if parts[0] == "held_out" and len(parts) == 3:
                    run.held_out.setdefault((parts[1], parts[2]), Curve()).add(tokens, value)
            _take_long_context(record, run)


def layout_tokens(tokens: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Tokens by layout, all sources together."""
    found = dict.fromkeys(map(str, LAYOUTS), 0)
    for layouts in tokens.values():
        for layout, count in layouts.items():
            found[layout] = found.get(layout, 0) + count
    return found


def _add_infilled(run: RunFacts, tokens: float, now: dict[str, int], before: dict[str, int] | None) -> None:
    """Shares of the layouts since the last log."""
    since = {layout: count - (before or {}).get(layout, 0) for layout, count in now.items()}
    total = sum(since.values())
    if total > 0:
        for layout in ("psm", "spm"):
            run.infilled.setdefault(layout, Curve()).add(tokens, since.get(layout, 0) / total)


def _take_long_context(measured: Mapping[str, Any], run: RunFacts) -> None:
    for name, value in measured.items():
        parts = name.split("/")
        if not isinstance(value, int | float) or not math.isfinite(value):
            continue
        if parts[0] == "context" and len(parts) == 2:
            run.context[int(parts[1])] = value
        elif parts[0] == "key" and parts[-1] == "found":
            run.keys[int(parts[1]), float(parts[2])] = value


# ---------------------------------------------------------------------------------------------------------------------
# What can be read: rows, completions


def read_samples(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The first documents of the first rows, with their layouts, as text with the control tokens visible."""
    if not (folder / "rows" / MANIFEST).is_file() or not (folder / "rows" / "tokenizer").is_dir():
        return []
    from codetune.tokens import open_codec

    try:
        rows, codec = open_rows(folder / "rows"), open_codec(folder / "rows" / "tokenizer")
        names, layouts = rows.manifest["source_names"], rows.manifest["layout_names"]
        found = []
        for number in range(min(SAMPLES, len(rows))):
            row, start = rows.row(number), 0
            for place, length in enumerate(row["document_lengths"][:DOCUMENTS]):
                text = codec.decode(row["input_ids"][start : start + int(length)])
                start += int(length)
                found.append(
                    {
                        "row": number,
                        "source": names[int(row["sources"][place])],
                        "layout": layouts[int(row["layouts"][place])],
                        "tokens": int(length),
                        "text": cut(text),
                    }
                )
    except (ValueError, OSError, KeyError, IndexError) as error:  # damaged rows do not take the report with them
        notes.append(f"rows: not readable ({error})")
        return []
    return found


def read_evaluations(folder: Path, run: RunFacts) -> None:
    """Results and graded samples of every suite of a run."""
    for path in sorted(folder.glob(f"*/{RESULTS}")):
        suite = path.parent.name
        try:
            results = read_results(path)
        except ValueError as error:
            run.notes.append(f"eval/{suite}: {str(error).replace(str(path), path.name)}")
            continue
        measured = (results.get("model") or {}).get("hash")
        if run.manifest and measured is not None and measured != model_hash_of(run):
            run.notes.append(f"eval/{suite}: results of another checkpoint (hash {measured}), not shown")
            continue
        run.results[suite] = results
        for task in results["tasks"]:
            grades = path.parent / f"{task}.grades.jsonl"
            if grades.is_file():
                run.completions[f"{suite}/{task}"] = read_grades(grades, run)


def model_hash_of(run: RunFacts) -> str:
    from codetune.artifacts import model_hash

    return model_hash(run.folder / "model")


def read_grades(path: Path, run: RunFacts) -> dict[str, Any]:
    """Some samples of each verdict, and how many there are of each."""
    reasons: dict[str, int] = {}
    shown: list[dict[str, Any]] = []
    kept: dict[str, int] = {}
    for row in _lines(path, run):
        reason = str(row.get("reason", "not known"))
        reasons[reason] = reasons.get(reason, 0) + 1
        if kept.get(reason, 0) < COMPLETIONS // 4 and len(shown) < COMPLETIONS:
            kept[reason] = kept.get(reason, 0) + 1
            text = next((row[key] for key in ("cut", "cut_text", "text", "raw") if isinstance(row.get(key), str)), "")
            shown.append(
                {
                    "id": str(row.get("prompt_id", "")),
                    "sample": row.get("sample", 0),
                    "reason": reason,
                    "passed": row.get("passed"),
                    "detail": cut(str(row.get("detail") or ""), 300),
                    "text": cut(text),
                }
            )
    return {"reasons": reasons, "total": sum(reasons.values()), "samples": shown}


def cut(text: str, most: int = TEXT_CHARACTERS) -> str:
    """The beginning of a text, with a mark where the rest was left away."""
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} more characters]"
