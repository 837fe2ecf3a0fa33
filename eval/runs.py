"""Runs as their folders tell of them: what the report draws, read from the doors only.

What comes in: the folder of all runs of a size, finished or in progress, whole or damaged. What goes out: one `RunFacts` per
run: its state, its curves thinned out to what a screen can show, its mix, what was measured, its samples, its results.
Nothing is computed again that a manifest says.

The trade: a curve of any length becomes at most `POINTS` points, by keeping the first, the lowest, the highest and the last
value of each stretch (so that no spike is thinned away), in one pass over `metrics.jsonl` (100,000 lines of it in about two
seconds). Nothing that is damaged ends the report, and nothing of it goes without a word: what is not as `shapes` has it, a
number that is not finite, a line or a file that cannot be read is left out, and the run's `notes` say so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
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
)
from codetune.lineage import why_unusable
from eval import shapes
from eval.shapes import fitting, number

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
DAMAGE = (  # what reading a file of any content may end in
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    OSError,
    RecursionError,
    yaml.YAMLError,
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
        if number(value) is None:
            self.not_finite += 1
        else:
            self.tokens.append(tokens)
            self.values.append(float(value))

    def points(self, most: int = POINTS) -> list[tuple[float, float]]:
        return thin_out(self.tokens, self.values, most)


@dataclass(frozen=True)
class DataFacts:
    """Data that another command makes: `make curate`, `make self-instruct`."""

    name: str
    state: str
    words: str  # what came out
    feeds: tuple[str, ...]  # runs that read it
    notes: tuple[str, ...] = ()  # what was found damaged


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
    not_numbers: dict[str, int] = field(default_factory=dict)  # file -> values where a finite number was expected
    not_read: dict[str, int] = field(default_factory=dict)  # file -> lines that are no record
    notes: list[str] = field(default_factory=list)  # what was found damaged

    @property
    def progress(self) -> float | None:
        """Share of the tokens that the recipe asks for."""
        asked = (self.recipe.get("training") or {}).get("train_tokens")
        return max(0.0, min(1.0, self.tokens / asked)) if asked else None

    def no_number(self, file: str, count: int = 1) -> None:
        if count:
            self.not_numbers[file] = self.not_numbers.get(file, 0) + count


@contextlib.contextmanager
def told(notes: list[str], what: str) -> Iterator[None]:
    """Whatever is wrong with the files that the block reads becomes a note; what it had done by then stays."""
    try:
        yield
    except DAMAGE as error:
        said = " ".join(str(error).split())
        notes.append(f"{what} ({type(error).__name__}: {cut(said, 200)})")


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
    found = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir() and is_run(path)]
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
        if (place / made / manifest).is_file():
            shape = shapes.CURATED if name == "curate" else shapes.TRIPLETS
            state, words = "finished", _what_came_out(_readable(place / made / manifest, shape, notes))
        elif (place / work).is_dir():
            state, words = ("running", STATES["running"]) if is_locked(place, notes) else ("stopped", STATES["stopped"])
        elif usual is None and not readers:
            continue
        else:
            state, words = "missing", STATES["missing"]
        feeds = tuple(readers or ([usual] if usual else []))
        found.append(DataFacts(name, state, words, feeds, tuple(f"{name}: {note}" for note in notes)))
    return found


def _what_came_out(manifest: Mapping[str, Any]) -> str:
    """Example: `2 of 30 kept`, of questions, or of documents."""
    funnel, sources = manifest.get("funnel"), (manifest.get("sources") or {}).values()
    counts = [(funnel.get("kept"), funnel.get("asked"))] if funnel else []
    counts += [(source.get("documents"), source.get("documents_read")) for source in sources]
    known = [(kept, asked) for kept, asked in counts if kept is not None and asked is not None]
    if not known or len(known) < len(counts):
        return "finished, not known how much"
    return f"{sum(kept for kept, _ in known):,.0f} of {sum(asked for _, asked in known):,.0f} kept"


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
    with told(run.notes, "the state of the run cannot be told"):
        run.state = state_of(folder, run.notes)
    if run.state == "finished":
        run.manifest = _readable(folder / "model" / MANIFEST, shapes.MODEL, run.notes)
    if (folder / "rows" / MANIFEST).is_file():
        run.rows = _readable(folder / "rows" / MANIFEST, shapes.ROWS, run.notes)
    run.recipe = run.manifest.get("recipe") or _recipe(folder, run.notes) or run.rows.get("recipe") or {}
    parent = (run.manifest.get("parent") or {}).get("path") or run.recipe.get("parent")
    run.parent = None if run.manifest.get("stage") == "base" else _parent_name(parent)  # what `make base` made has none
    with told(run.notes, "metrics.jsonl cannot be read to its end"):
        read_metrics(folder / "metrics.jsonl", run)
    finished = {**(run.manifest.get("held_out") or {}), **(run.manifest.get("long_context") or {})}
    _take_long_context(finished, run, "manifest.json")
    run.ledger = run.manifest.get("ledger") or fitting(
        run.ledger, shapes.LEDGER, "ledger", _said(run.notes, "metrics.jsonl")
    )
    if run.manifest.get("tokens"):
        run.tokens, run.steps = int(run.manifest["tokens"]), int(run.manifest.get("steps") or run.steps)
    with told(run.notes, f"{SKIPPED_STEPS} cannot be read to its end"):
        read_skipped(folder / SKIPPED_STEPS, run)
    run.samples = read_samples(folder, run)
    with told(run.notes, "eval: what was measured cannot be read"):
        read_evaluations(folder / "eval", run)
    for curve in (*run.curves.values(), *run.held_out.values()):
        run.no_number("metrics.jsonl", curve.not_finite)
    run.notes += [*_left_out(run.not_numbers, "value", "no finite number", "no finite numbers")]
    run.notes += [*_left_out(run.not_read, "line", "no record", "no records", run.state == "running")]
    run.notes = [note.replace(f"{folder}/", "") for note in run.notes]
    return run


def _left_out(counts: Mapping[str, int], what: str, one: str, many: str, at_work: bool = False) -> Iterator[str]:
    """Example: `metrics.jsonl: 2 values left out that are no finite numbers`"""
    for file, count in counts.items():
        why = f"s left out that are {many}" if count > 1 else f" left out that is {one}"
        yield f"{file}: {count:,} {what}{why}" + (" (the last one may be half-written: the run is at work)" * at_work)


def state_of(folder: Path, notes: list[str]) -> str:
    """One of `STATES`."""
    if (folder / "model" / MANIFEST).is_file():
        reason = why_unusable(folder / "model", check_hashes=False)
        if reason is None:
            return "finished"
        notes.append(f"model: {reason}")
    if is_locked(folder, notes):
        return "running"
    if (folder / "ended.json").is_file():
        state = _readable(folder / "ended.json", shapes.ENDED, notes).get("state")
        return state if state in STATES and state != "finished" else "failed"
    if (folder / "metrics.jsonl").exists():
        return "killed"
    return "rows" if (folder / "rows" / MANIFEST).is_file() else "missing"


def is_locked(folder: Path, notes: list[str]) -> bool:
    """Whether a process works in the folder now."""
    if not (folder / ".lock").is_file():
        return False
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY)
    except OSError as error:
        notes.append(f".lock: whether a session is at work cannot be told ({error.strerror})")
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _recipe(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The recipe of a run that is not finished: its own, or that of the newest checkpoint whose recipe can be read."""
    path = folder / "checkpoints" / "recipe.json"
    if path.is_file() and (found := _readable(path, shapes.RECIPE, notes)):
        return found
    yamls = (folder / "checkpoints").glob("checkpoint-*/recipe.yaml") if (folder / "checkpoints").is_dir() else []
    for path in sorted(yamls, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        name = f"{path.parent.name}/{path.name}"
        with told(notes, f"{name}: not readable"):
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
            if found := fitting(value, shapes.RECIPE, "", _said(notes, name)):
                return found
    return {}


def _readable(path: Path, shape: Any, notes: list[str]) -> dict[str, Any]:
    """What a JSON file has, as far as it has that shape; what it has not is noted."""
    name = f"{path.parent.name}/{path.name}"
    try:
        value = read_json(path)
    except ValueError as error:
        notes.append(str(error).replace(str(path), name))
        return {}
    except (OSError, RecursionError) as error:
        notes.append(f"{name}: not readable ({error})")
        return {}
    return fitting(value, shape, "", _said(notes, name)) or {}


def _said(notes: list[str], file: str) -> Any:
    return lambda words: notes.append(f"{file}: {words}; left out")


def _parent_name(parent: str | None) -> str | None:
    """Example: `runs/tiny/stage1/model` -> stage1; `owner/name` stays"""
    if parent is None:
        return None
    path = Path(parent)
    return path.parent.name if path.name in ("model", "adapter") else parent


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def _lines(path: Path, run: RunFacts) -> Iterable[dict[str, Any]]:
    """Records of a file that may be in the middle of being written, or not be there."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield record
            else:
                run.not_read[path.name] = run.not_read.get(path.name, 0) + 1


def read_metrics(path: Path, run: RunFacts) -> None:
    """Curves of the run, from one pass over its log."""
    before: dict[str, int] | None = None
    for record in _lines(path, run):
        tokens, step = number(record.get("tokens")), number(record.get("step", 0))
        if tokens is None:
            run.not_read[path.name] = run.not_read.get(path.name, 0) + 1
            continue
        run.no_number(path.name, step is None)
        run.tokens, run.steps = max(run.tokens, int(tokens)), max(run.steps, int(step or 0))
        for name in CURVES:
            if name in record:
                run.curves.setdefault(name, Curve()).add(tokens, record[name])
        ledger = record.get("ledger")
        if ledger is not None:
            now = layout_tokens(ledger)
            if now is None:
                run.no_number(path.name)
                continue
            run.ledger = ledger
            _add_infilled(run, tokens, now, before)
            before = now
        elif any(name.startswith(("held_out/", "context/", "key/")) for name in record):
            for name, value in record.items():
                parts = name.split("/")
                if parts[0] == "held_out" and len(parts) == 3:
                    run.held_out.setdefault((parts[1], parts[2]), Curve()).add(tokens, value)
            _take_long_context(record, run, path.name)


def layout_tokens(ledger: Any) -> dict[str, int] | None:
    """Tokens by layout, all sources together; None for what is no ledger."""
    found = dict.fromkeys(map(str, LAYOUTS), 0)
    try:
        for layouts in ledger["tokens"].values():
            for layout, count in layouts.items():
                found[layout] = found.get(layout, 0) + count
        return found if number(sum(found.values())) is not None else None
    except (TypeError, KeyError, AttributeError, OverflowError):
        return None


def _add_infilled(run: RunFacts, tokens: float, now: dict[str, int], before: dict[str, int] | None) -> None:
    """Shares of the layouts since the last log."""
    since = {layout: count - (before or {}).get(layout, 0) for layout, count in now.items()}
    total = sum(since.values())
    if total > 0:
        for layout in ("psm", "spm"):
            run.infilled.setdefault(layout, Curve()).add(tokens, since.get(layout, 0) / total)


def _take_long_context(measured: Mapping[str, Any], run: RunFacts, file: str) -> None:
    for name, value in measured.items():
        parts = name.split("/")
        if parts[0] not in ("context", "key") or (parts[0] == "key" and parts[-1] != "found"):
            continue
        try:
            length, depth = int(parts[1]), number(float(parts[2])) if parts[0] == "key" else 0
        except (ValueError, IndexError):
            length, depth = 0, None
        if depth is None or number(value) is None:
            run.no_number(file)
        elif parts[0] == "context":
            run.context[length] = value
        else:
            run.keys[length, depth] = value


def read_skipped(path: Path, run: RunFacts) -> None:
    """Steps that leapt or were left out: the records' own words, with None where a number is missing or none."""
    for record in _lines(path, run):
        step = number(record.get("step"))
        run.no_number(path.name, step is None)
        run.skipped.append(
            {
                "step": None if step is None else int(step),
                "reason": cut(str(record.get("reason", "not known")), 100),
                "skipped": record.get("skipped") is True,
                # a loss that is not finite is what such a step is left out for, and no damage
                "loss": number(record.get("loss")),
                "gradient_norm": number(record.get("gradient_norm")),
            }
        )


# ---------------------------------------------------------------------------------------------------------------------
# What can be read: rows, completions


def read_samples(folder: Path, run: RunFacts) -> list[dict[str, Any]]:
    """The first documents of the first rows, with their layouts, as text with the control tokens visible."""
    if not (folder / "rows" / MANIFEST).is_file() or not (folder / "rows" / "tokenizer").is_dir():
        return []
    from codetune.tokens import open_codec

    found: list[dict[str, Any]] = []
    with told(run.notes, "rows: not readable"):
        rows, codec = open_rows(folder / "rows"), open_codec(folder / "rows" / "tokenizer")
        names, layouts = run.rows.get("source_names") or [], run.rows.get("layout_names") or []
        for place_in_order in range(min(SAMPLES, len(rows))):
            row, start = rows.row(place_in_order), 0
            for place, length in enumerate(row["document_lengths"][:DOCUMENTS]):
                text = codec.decode(row["input_ids"][start : start + int(length)])
                start += int(length)
                found.append(
                    {
                        "row": place_in_order,
                        "source": names[int(row["sources"][place])],
                        "layout": layouts[int(row["layouts"][place])],
                        "tokens": int(length),
                        "text": cut(text),
                    }
                )
    return found


def read_evaluations(folder: Path, run: RunFacts) -> None:
    """Results and graded samples of every suite of a run."""
    for path in sorted(folder.glob(f"*/{RESULTS}")):
        suite = f"eval/{path.parent.name}"
        with told(run.notes, f"{suite}: not readable"):
            results = fitting(read_results(path), shapes.RESULTS, "", _said(run.notes, f"{suite}/{path.name}"))
            measured = (results.get("model") or {}).get("hash")
            if run.manifest and measured is not None and measured != model_hash_of(run):
                run.notes.append(f"{suite}: results of another checkpoint (hash {measured}), not shown")
                continue
            run.results[path.parent.name] = results
            for task in results["tasks"]:
                grades = path.parent / f"{task}.grades.jsonl"
                if grades.exists():
                    run.completions[f"{path.parent.name}/{task}"] = read_grades(grades, run)


def model_hash_of(run: RunFacts) -> str:
    from codetune.artifacts import model_hash

    return model_hash(run.folder / "model")


def read_grades(path: Path, run: RunFacts) -> dict[str, Any]:
    """Some samples of each verdict, and how many there are of each."""
    reasons: dict[str, int] = {}
    shown: list[dict[str, Any]] = []
    kept: dict[str, int] = {}
    for row in _lines(path, run):
        reason = cut(str(row.get("reason", "not known")), 100)
        reasons[reason] = reasons.get(reason, 0) + 1
        if kept.get(reason, 0) < COMPLETIONS // 4 and len(shown) < COMPLETIONS:
            kept[reason] = kept.get(reason, 0) + 1
            text = next((row[key] for key in ("cut", "cut_text", "text", "raw") if isinstance(row.get(key), str)), "")
            shown.append(
                {
                    "id": str(row.get("prompt_id", "")),
                    "sample": cut(str(row.get("sample", 0)), 20),
                    "reason": reason,
                    "passed": row.get("passed") if isinstance(row.get("passed"), bool) else None,
                    "detail": cut(str(row.get("detail") or ""), 300),
                    "text": cut(text),
                }
            )
    return {"reasons": reasons, "total": sum(reasons.values()), "samples": shown}


def cut(text: str, most: int = TEXT_CHARACTERS) -> str:
    """The beginning of a text, with a mark where the rest was left away."""
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} more characters]"
