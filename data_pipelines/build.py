"""From a recipe to packed rows on disk: the main path of `make data`.

What comes in: a recipe and the tokenizer of its parent. What goes out: door 1, `runs/<size>/<name>/rows/`: one Arrow file
per lane, held-out samples, the tokenizer they were made with, and `manifest.json` with every count. Everything streams:
memory does not grow with the corpus. Lanes are tasks of a datatrove executor; a finished lane is not built again, an
unfinished one is built from its start, and the bytes are the same whatever the number of workers and interruptions.

    python -m data_pipelines.build --recipe recipes/stage1/tiny.yaml [--set section.key=value ...] [--workers N]
    python -m data_pipelines.build --recipe recipes/stage1/tiny.yaml --explain 17     # a row, back to its documents
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from codetune import artifacts
from codetune.artifacts import (
    FULL_DISK,
    KINDS,
    LAYOUTS,
    MANIFEST,
    LaneWriter,
    PackedRow,
    Rows,
    as_bytes,
    fail,
    hash_json,
    open_rows,
    read_json,
    replace_folder,
    run_length,
    write_json,
)
from codetune.lengths import LengthCounts, length_table
from codetune.recipe import DECIDE_NO_ROW, DataSettings, Recipe, SourceSettings, load_recipe, recipe_from_dict
from codetune.rope import check_positions
from codetune.slurm import CLUSTER
from codetune.tokens import Codec, open_codec
from data_pipelines.conversations import fit_optional_shares, is_absent, located
from data_pipelines.documents import Document, Drops, SourcePlan, plan_source
from data_pipelines.executors import run_tasks, worker_count
from data_pipelines.fim import Sample
from data_pipelines.held_out import HeldOut, collect_held_out, is_held_out_group
from data_pipelines.held_out_samples import held_out_samples
from data_pipelines.long_documents import LongPreference, search_long_documents
from data_pipelines.mixture import mixed_stream
from data_pipelines.packing import Concatenator, GroupPacker
from data_pipelines.streams import SourceStream

PLAN = "plan.pickle"
SOURCES = "sources"  # texts, shards and footers made ready for reading
FORMAT = 2  # of the rows; a change makes older rows another build
CHAT_FORMAT = "2, samples exchanged"  # of those of a stage of conversations


def build(recipe: Recipe, workers: int = 1, cluster: Path = CLUSTER) -> Path:
    """Build the rows of a stage, or return at once when they are there.

    Raises:
        ValueError: something about the recipe, the sources or the output folder that the user can mend.
    """
    target = recipe.rows_dir
    recipe.require_parent()
    codec = open_codec(recipe.parent_path)
    check_parent(recipe, codec)
    if _is_finished(recipe, codec):
        print(f"rows: {target} is finished")
        return target
    with artifacts.exclusive(recipe.run_dir, f"rows of {recipe.size}/{recipe.name}"):
        started = time.monotonic()
        plan = plan_build(recipe, codec, target.with_name("rows.partial"))
        partial = _open_partial(target.with_name("rows.partial"), plan, codec)
        held_out = _collect_held_out_once(partial, plan, codec)
        with _progress(partial, plan):
            _run_lanes(partial, plan, held_out, workers, cluster)
        samples = held_out_samples(held_out, plan, codec)
        artifacts.write_held_out(partial / artifacts.HELD_OUT, samples, codec.vocabulary_size)
        _save_tokenizer(recipe, partial / "tokenizer")
        manifest = _write_manifest(partial, plan, codec)
        seconds = time.monotonic() - started
        write_json(partial / "timing.json", {"seconds": round(seconds, 1), "workers": workers})
        shutil.rmtree(partial / "work")
        for leftover in partial.glob(".lane-*"):  # of a lane that was killed
            leftover.unlink()
        replace_folder(partial, target)
    print(mix_table(manifest))
    print(length_table(manifest["lengths"]))
    print(f"rows: {target}, {manifest['rows']} rows in {seconds:.0f} s")
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Planning


@dataclass(frozen=True)
class BuildPlan:
    """All that decides the bytes of the rows."""

    recipe: Recipe
    sources: tuple[SourcePlan, ...]
    tokenizer: str  # fingerprint
    lane_groups: int  # packing groups in each lane
    settings_fingerprint: str  # of recipe and tokenizer
    fingerprint: str  # of these and of what the sources hold

    @property
    def lanes(self) -> int:
        return self.recipe.need_data().lanes

    @property
    def group_rows(self) -> int:
        return self.recipe.need_data().packing.group_rows

    @property
    def rows(self) -> int:
        return self.lanes * self.group_rows * self.lane_groups


def plan_build(recipe: Recipe, codec: Codec, work: Path) -> BuildPlan:
    """Look every source up and decide how many rows each lane builds: whole groups, at least what training reads."""
    data = recipe.need_data()
    sources = tuple(
        plan_source(name, settings, data.lanes, work / "work" / SOURCES, data.allow_unpinned)
        for name, settings in ((name, located(recipe, settings)) for name, settings in data.sources.items())
        if not is_absent(settings)
    )
    sources = _fit_shares(recipe, sources, codec)
    facts = {source.name: source.facts for source in sources}
    settings = _settings_fingerprint(recipe, codec)
    return BuildPlan(recipe, sources, codec.fingerprint, _lane_groups(recipe), settings, hash_json([settings, facts]))


def _fit_shares(recipe: Recipe, sources: tuple[SourcePlan, ...], codec: Codec) -> tuple[SourcePlan, ...]:
    """Optional sources with the share that they can fill; says what came of the recipe's."""
    data = recipe.need_data()
    if not any(source.optional for source in data.sources.values()):
        return sources
    rows = _lane_groups(recipe) * data.lanes * data.packing.group_rows
    fitted, sizes = fit_optional_shares(sources, data, codec, rows * data.sequence_tokens)
    shares = {source.name: source.settings.share for source in fitted}
    for name, source in data.sources.items():
        if source.optional and shares.get(name, 0.0) < source.share:
            held = f"{sizes[name]:,.0f} tokens" if name in sizes else f"no conversation ({located(recipe, source).path})"
            print(
                f"data.sources.{name} holds {held}: {shares.get(name, 0.0):.2%} of the rows instead of {source.share:.2%}; "
                "the rest goes to the instruct sources"
            )
        if name in sizes:
            next(plan for plan in sources if plan.name == name).facts["share_planned"] = shares.get(name, 0.0)
    return fitted


def _lane_groups(recipe: Recipe) -> int:
    """Packing groups of each lane: the rows that training reads, rounded up to whole groups in every lane."""
    data, training = recipe.need_data(), recipe.need_training()
    rows_read = training.train_tokens // training.batch_tokens * (training.batch_tokens // data.sequence_tokens)
    return -(-rows_read // (data.lanes * data.packing.group_rows))


def _settings_fingerprint(recipe: Recipe, codec: Codec) -> str:
    """What the recipe and the tokenizer decide about the bytes of the rows."""
    form = FORMAT if recipe.need_data().chat is None else CHAT_FORMAT
    decides = [form, _deciding(recipe.to_dict()), recipe.seed, codec.fingerprint, _lane_groups(recipe)]
    return hash_json(decides)


def _deciding(recipe: dict[str, Any]) -> dict[str, Any]:
    """The data section without what changes no byte: notes, names of groups, where lanes run."""
    data = {key: value for key, value in recipe["data"].items() if key not in DECIDE_NO_ROW}
    sources = {
        name: {key: value for key, value in source.items() if key not in DECIDE_NO_ROW}
        for name, source in data["sources"].items()
    }
    return {**data, "sources": sources}


def check_parent(recipe: Recipe, codec: Codec) -> None:
    """Whether rows can be built for this parent.

    Raises:
        ValueError: infilling tokens are missing, rows are longer than the model's context, or that was lengthened already,
            or the parent was trained on documents that this stage would measure on.
    """
    data = recipe.need_data()
    if data.infills:
        codec.need_infill()
    config, known = (Path(recipe.parent_path) / name for name in ("config.json", MANIFEST))
    manifest = read_json(known) if known.is_file() else {}
    if config.is_file():
        check_positions(recipe, read_json(config), manifest)
    before = (manifest.get("recipe") or {}).get("data")
    ours = data.held_out.fraction
    # a smaller fraction holds out some of the groups that a larger one does, so holding out less than the parent is fine
    if before is not None and before["held_out"]["fraction"] < ours:
        raise ValueError(
            f"`data.held_out.fraction` is {ours:g}, but {recipe.parent_path} was trained with "
            f"{before['held_out']['fraction']:g}: it has seen documents that this stage would measure on; write the "
            "parent's fraction, or less"
        )


def _is_finished(recipe: Recipe, codec: Codec) -> bool:
    """Whether rows of this recipe and tokenizer are there; anything else in their place is refused.

    The sources are not looked at again: rows are rows of what the sources held when they were built.
    """
    target = recipe.rows_dir
    if not target.exists():
        return False
    if not (target / MANIFEST).is_file():
        raise ValueError(f"{target}: exists and holds no rows; move it away, or write elsewhere with --set runs=FOLDER")
    manifest = read_json(target / MANIFEST)
    if manifest["settings_fingerprint"] == _settings_fingerprint(recipe, codec):
        open_rows(target)
        return True
    raise ValueError(
        f"{target}: holds the rows of another build ({_difference(manifest, recipe, codec)}); delete the folder to build it "
        "anew, or write to another one with --set runs=FOLDER"
    )


def _difference(manifest: dict[str, Any], recipe: Recipe, codec: Codec) -> str:
    """In words, what about an older build is not as planned now."""
    if manifest["tokenizer"] != codec.fingerprint:
        return "made with another tokenizer"
    old, new = ({**tree, "data": _deciding(tree)} for tree in (manifest["recipe"], recipe.to_dict()))
    changed = [f"{key} was {_short(a)}, is {_short(b)}" for key, a, b in _differences(old, new, "") if _decides(key)]
    return "; ".join(changed[:3]) or "the program has changed since"


def _decides(key: str) -> bool:
    return key.startswith("data.") or key in ("seed", "training.train_tokens", "training.batch_tokens")


def _differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _open_partial(partial: Path, plan: BuildPlan, codec: Codec) -> Path:
    """The folder of the unfinished build. What a changed recipe left there is cleared, but for texts made ready for reading.

    Those lie under names of their own, by what they were made from, and the plan may have just put them there.
    """
    state = partial / "build.json"
    if state.is_file() and read_json(state).get("fingerprint") != plan.fingerprint:
        print(f"rows: {partial} belongs to another build and is cleared", file=sys.stderr)
        for path in [*partial.iterdir(), *(partial / "work").glob("*")]:
            if path.name not in ("work", SOURCES):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    partial.mkdir(parents=True, exist_ok=True)
    write_json(state, {"fingerprint": plan.fingerprint})
    finished = len(list((partial / "work").glob("lane-*.json"))) * plan.group_rows * plan.lane_groups
    slot_bytes = 1.2 * (2 if codec.vocabulary_size <= 2**16 else 4)  # a fifth for lengths, ids and names of documents
    needed = (plan.rows - finished) * plan.recipe.need_data().sequence_tokens * slot_bytes
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise ValueError(
            f"{partial}: {as_bytes(free)} free, about {as_bytes(needed)} needed; free some, or --set runs=FOLDER"
        )
    return partial


def _collect_held_out_once(partial: Path, plan: BuildPlan, codec: Codec) -> HeldOut:
    """Held-out documents and the lines that tell their near copies; collected once, then read by every lane."""
    saved = partial / "work" / "held_out.json"
    if not saved.is_file():
        settings = plan.recipe.need_data().held_out
        collect_held_out(plan.sources, settings, _long_held_out(plan, codec)).save(saved)
    return HeldOut.load(saved)


def _long_held_out(plan: BuildPlan, codec: Codec) -> dict[str, tuple[Document, ...]]:
    """Long documents to measure on, from the sources that the recipe names; none where it asks for none."""
    settings = plan.recipe.need_data().held_out
    if settings.long_documents is None:
        return {}
    every = [source.name for source in plan.sources if source.settings.kind != "generated"]
    wanted = settings.long_sources or every
    return {
        source.name: search_long_documents(
            source,
            settings,
            lambda group: is_held_out_group(group, settings.fraction),
            lambda text: len(codec.plain(codec.encode(text), last=False)),
        )
        for source in plan.sources
        if source.name in wanted
    }


# ---------------------------------------------------------------------------------------------------------------------
# Lanes


def _run_lanes(partial: Path, plan: BuildPlan, held_out: HeldOut, workers: int, cluster: Path) -> None:
    """Build every unfinished lane, as tasks of the executor."""
    (partial / "work" / PLAN).write_bytes(pickle.dumps((plan, held_out)))
    workers = max(1, min(workers, plan.lanes))
    with _threads_per_worker(workers):
        run_tasks(
            plan.recipe.need_data().executor,
            lane_task(str(partial.resolve())),
            plan.lanes,
            workers,
            partial / "work" / "logs",
            cluster,
        )


@contextlib.contextmanager
def _threads_per_worker(workers: int) -> Iterator[None]:
    """The tokenizer uses every core by itself; beside other workers it keeps to its share."""
    if workers == 1 or "RAYON_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["RAYON_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    try:
        yield
    finally:
        del os.environ["RAYON_NUM_THREADS"]


@dataclass(frozen=True)
class LaneTask:
    """One lane, in the form in which datatrove runs it: called with (documents, rank, world size).

    It carries the folder only; plan and held-out set are read there, by whichever process or machine runs the lane.
    """

    folder: str

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        # our own file, written a moment ago by the process that started this one
        plan, held_out = pickle.loads((Path(self.folder) / "work" / PLAN).read_bytes())
        assert world_size == plan.lanes
        build_lane(Path(self.folder), plan, held_out, rank)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return lane_task, (self.folder,)


def lane_task(folder: str) -> LaneTask:
    """A lane's task, in this process or one that the executor starts: there too, errors reach the user through ours."""
    from loguru import logger

    logger.disable("datatrove")
    return LaneTask(folder)


def build_lane(partial: Path, plan: BuildPlan, held_out: HeldOut, lane: int) -> None:
    """Write the rows of one lane and, beside them, its counts."""
    data = plan.recipe.need_data()
    codec = open_codec(plan.recipe.parent_path)
    drops = Drops()
    concatenate = data.packing.strategy == "concatenate"
    streams = [
        SourceStream(
            source,
            codec,
            data.fim,
            seed=plan.recipe.seed,
            row_tokens=data.sequence_tokens,
            lane=lane,
            lanes=plan.lanes,
            drops=drops,
            held_out=held_out,
            cuts_at_room=concatenate,
            prefers=_preference(data, source.settings),
            chat=data.chat,
        )
        for source in plan.sources
    ]
    shares = [source.settings.share for source in plan.sources]
    if concatenate:
        packer = Concatenator(data.sequence_tokens, plan.group_rows)
    else:
        lane_seed = plan.recipe.seed * plan.lanes + lane
        packer = GroupPacker(data.sequence_tokens, plan.group_rows, shares, lane_seed, exchanges=data.chat is not None)
    samples = mixed_stream(streams, shares, data.sequence_tokens, packer.room)
    writer = LaneWriter(partial / lane_file(lane), codec.vocabulary_size)
    counts = RowCounts(len(streams), data.sequence_tokens)
    try:
        for group in range(plan.lane_groups):
            rows = [_packed_row(row) for row in packer.next_group(samples)]
            writer.write(rows)
            counts.add(rows)
            _report(partial, lane, (group + 1) * plan.group_rows, counts.tokens)
        writer.close()
    except BaseException as error:
        writer.abandon()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ValueError(f"{partial}: no space left on the disk; free some and run the same command again") from error
        raise
    write_json(partial / "work" / f"lane-{lane:05d}.json", _lane_facts(streams, packer.waiting, counts, drops))


def _preference(data: DataSettings, source: SourceSettings) -> LongPreference | None:
    return None if data.long_documents is None else LongPreference(data.long_documents, source.long_share)


def lane_file(lane: int) -> str:
    return f"lane-{lane:05d}.arrow"


def _packed_row(samples: list[Sample]) -> PackedRow:
    return PackedRow(
        input_ids=np.concatenate([sample.input_ids for sample in samples]),
        document_lengths=[len(sample) for sample in samples],
        ids=[sample.document_id for sample in samples],
        sources=[sample.source for sample in samples],
        layouts=[sample.layout for sample in samples],
        kinds=[sample.kind for sample in samples],
        passes=[sample.pass_index for sample in samples],
        pieces=[sample.piece for sample in samples],
        loss_runs=_loss_runs(samples),
    )


def _loss_runs(samples: list[Sample]) -> list[int]:
    """The row's mask as run lengths; none where all of it is learnt from."""
    if all(sample.learnt is None for sample in samples):
        return []
    parts = [np.ones(len(sample), bool) if sample.learnt is None else sample.learnt for sample in samples]
    return run_length(np.concatenate(parts).tolist())


class RowCounts:
    """Tokens in finished rows, by source and layout (of the sample they belong to), and how long documents are there."""

    def __init__(self, sources: int, row_tokens: int) -> None:
        self.rows = 0
        self.lengths = LengthCounts(sources, row_tokens)
        self.by_source_and_layout = np.zeros((sources, len(LAYOUTS)), np.int64)

    @property
    def tokens(self) -> int:
        return int(self.by_source_and_layout.sum())

    def add(self, rows: list[PackedRow]) -> None:
        self.rows += len(rows)
        for row in rows:
            np.add.at(self.by_source_and_layout, (row.sources, row.layouts), row.document_lengths)
            self.lengths.add(row.sources, row.document_lengths)


def _lane_facts(streams: list[SourceStream], waiting: list[Sample], counts: RowCounts, drops: Drops) -> dict[str, Any]:
    left = [0] * len(streams)
    for sample in waiting:
        left[sample.source] += len(sample)
    sources = {}
    for place, stream in enumerate(streams):
        facts = stream.counts.as_dict()
        facts["tokens_in_rows"] = {
            layout: int(tokens) for layout, tokens in zip(LAYOUTS, counts.by_source_and_layout[place], strict=True)
        }
        facts["tokens_not_packed"] = left[place]
        facts["tokens_not_taken"] = stream.tokens_not_taken()
        in_rows = sum(facts["tokens_in_rows"].values())
        rest = facts["tokens_not_packed"] + facts["tokens_not_taken"]
        assert in_rows + rest == facts["tokens_encoded"], f"tokens of {stream.plan.name} were lost: {facts}"
        sources[stream.plan.name] = facts
    lengths = {stream.plan.name: counts.lengths.sparse(place) for place, stream in enumerate(streams)}
    return {"rows": counts.rows, "sources": sources, "drops": drops.as_dict(), "lengths": lengths}


# ---------------------------------------------------------------------------------------------------------------------
# Progress


def _report(partial: Path, lane: int, rows: int, tokens: int) -> None:
    """Leave a lane's progress where the parent process can read it; losing it costs nothing."""
    path = partial / "work" / f"progress-{lane:05d}"
    temporary = path.with_suffix(".new")
    temporary.write_text(f"{rows} {tokens}", encoding="ascii")
    temporary.replace(path)


@contextlib.contextmanager
def _progress(partial: Path, plan: BuildPlan) -> Iterator[None]:
    """A bar of tokens over all lanes, wherever they run, while the block runs."""
    stop = threading.Event()
    row_tokens = plan.recipe.need_data().sequence_tokens
    bar = tqdm(total=plan.rows * row_tokens, unit=" tokens", unit_scale=True, desc="rows", disable=None, mininterval=1.0)

    def look() -> int:
        rows = 0
        for path in (partial / "work").glob("progress-*"):
            if path.suffix != ".new":
                rows += int((path.read_text(encoding="ascii").split() or ["0"])[0])
        return rows * row_tokens

    def watch() -> None:
        while not stop.wait(0.5):
            bar.update(look() - bar.n)

    bar.n = bar.initial = look()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
        stop.set()
        watcher.join()
        bar.update(look() - bar.n)
    finally:
        stop.set()
        bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# The manifest, and looking at rows


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def _save_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Rows are read back to text with the tokenizer that made them."""
    parent = Path(recipe.parent_path)
    if parent.is_dir():
        folder.mkdir(exist_ok=True)
        for name in TOKENIZER_FILES:
            if (parent / name).is_file():
                shutil.copyfile(parent / name, folder / name)
        return
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(recipe.parent_path).save_pretrained(str(folder))


def _write_manifest(partial: Path, plan: BuildPlan, codec: Codec) -> dict[str, Any]:
    """Add the lanes up and finish the folder. Nothing in the manifest depends on time, machine or number of workers."""
    lanes = [read_json(partial / "work" / f"lane-{lane:05d}.json") for lane in range(plan.lanes)]
    data = plan.recipe.need_data()
    sources = {}
    for source in plan.sources:
        parts = [lane["sources"][source.name] for lane in lanes]
        sources[source.name] = _added_up(parts) | {
            "share": source.settings.share,
            "group": source.settings.group or source.name,
        }
        if sources[source.name]["epochs"] is None:
            sources[source.name]["epochs_estimated"] = _estimated_epochs(source, sources[source.name]["characters_read"])
    total = sum(sum(source["tokens_in_rows"].values()) for source in sources.values())
    for source in sources.values():
        source["share_realised"] = sum(source["tokens_in_rows"].values()) / total
    drops = Drops()
    for lane in lanes:
        for name, reasons in lane["drops"].items():
            for reason, count in reasons.items():
                drops.add(name, reason, count)
    names = [source.name for source in plan.sources]
    lengths = LengthCounts(len(names), data.sequence_tokens)
    for lane in lanes:
        for place, name in enumerate(names):
            lengths.add_sparse(place, lane["lengths"][name])
    rows = sum(lane["rows"] for lane in lanes)
    manifest = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "settings_fingerprint": plan.settings_fingerprint,
        "recipe": plan.recipe.to_dict(),
        "tokenizer": plan.tokenizer,
        "vocabulary_size": codec.vocabulary_size,
        "sequence_tokens": data.sequence_tokens,
        "isolate_documents": data.packing.isolate_documents,
        "lanes": plan.lanes,
        "group_rows": plan.group_rows,
        "rows": rows,
        "tokens": total,
        "fill": total / (rows * data.sequence_tokens),
        "source_names": names,
        "layout_names": list(LAYOUTS),
        "kind_names": list(KINDS),
        "sources": sources,
        "source_facts": {source.name: source.facts for source in plan.sources},
        "drops": drops.as_dict(),
        "lengths": lengths.describe(names),
        "versions": artifacts.software_versions(),
    }
    artifacts.finish_rows(partial, [lane_file(lane) for lane in range(plan.lanes)], codec.vocabulary_size, manifest)
    return manifest


def _estimated_epochs(source: SourcePlan, characters: int) -> float | None:
    """Share of a source read in its first, unfinished pass: characters over bytes, where these are bytes of plain text."""
    total = source.facts.get("bytes") or 0
    packed = source.settings.kind in ("hub", "parquet") or (source.settings.path or "").endswith((".gz", ".zst"))
    return None if packed or not total else min(1.0, characters / total)


def _added_up(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of several lanes as one; epochs are known once every lane has completed a pass."""
    result: dict[str, Any] = {}
    for key, value in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(value, dict):
            result[key] = _added_up(values)
        elif key == "documents_per_pass":
            result[key] = None if None in values else sum(values)
        elif key == "epochs":  # of all lanes together: documents read over documents there are
            passes = [part["documents_per_pass"] for part in parts]
            result[key] = None if None in passes else sum(part["documents_read"] for part in parts) / sum(passes)
        else:
            result[key] = sum(values)
    return result


def mix_table(manifest: dict[str, Any]) -> str:
    """The realised mix, as text: tokens, shares, passes and layouts by source, then what was dropped."""
    lines = [
        f"{'source':<16}{'tokens':>14}{'share':>9}{'recipe':>9}{'epochs':>8}{'documents':>11}{'plain':>9}{'psm':>9}{'spm':>9}"
    ]
    for name, source in manifest["sources"].items():
        tokens = sum(source["tokens_in_rows"].values())
        estimate = source.get("epochs_estimated")
        epochs = (
            f"{source['epochs']:.2f}" if source["epochs"] is not None else "< 1" if estimate is None else f"~{estimate:.2f}"
        )
        layouts = "".join(f"{source['layouts'][layout]:>9,}" for layout in LAYOUTS)
        lines.append(
            f"{name:<16}{tokens:>14,}{source['share_realised']:>9.2%}{source['share']:>9.2%}{epochs:>8}"
            f"{sum(source['layouts'].values()):>11,}{layouts}"
        )
    groups: dict[str, float] = {}
    for source in manifest["sources"].values():
        groups[source["group"]] = groups.get(source["group"], 0.0) + source["share_realised"]
    lines.append("groups: " + ", ".join(f"{name} {share:.2%}" for name, share in groups.items()))
    fits = sum(source["documents_fitting"] for source in manifest["sources"].values())
    data = recipe_from_dict(manifest["recipe"], "manifest.json").need_data()
    infilled = sum(source["layouts"]["psm"] + source["layouts"]["spm"] for source in manifest["sources"].values())
    for name, source in manifest["sources"].items():
        if not source["documents_fitting"] and data.fim_rate(name) > 0.0:
            lines.append(
                f"no document of {name} fits in a row, so none was infilled; set data.sources.{name}.segment_characters, or "
                "write longer rows"
            )
    lines.append(f"infilled: {infilled:,} of {fits:,} documents that fit in a row ({infilled / max(fits, 1):.1%})")
    lines.append(f"row fill: {manifest['fill']:.2%} of {manifest['rows']:,} rows of {manifest['sequence_tokens']:,} tokens")
    left_out = sum(source["tokens_left_out"] for source in manifest["sources"].values())
    if left_out:
        lines.append(f"left out: {left_out:,} tokens behind the first ones of long documents")
    for name, reasons in manifest["drops"].items():
        lines.append(
            f"dropped from {name}: " + ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
        )
    return "\n".join(lines)


def explain_row(rows: Rows, number: int) -> str:
    """A row, back to its documents: source, id, pass, piece, layout, tokens, and the text with its control tokens."""
    codec = open_codec(rows.path / "tokenizer")
    row = rows.row(number)
    names = rows.manifest
    shown = [f"row {number} of {rows.path}: {len(row['input_ids'])} of {rows.sequence_tokens} tokens"]
    start = 0
    for place, length in enumerate(row["document_lengths"].tolist()):
        source = names["source_names"][row["sources"][place]]
        layout = names["layout_names"][row["layouts"][place]]
        kind = names["kind_names"][row["kinds"][place]]
        ids = row["input_ids"][start : start + length].tolist()
        shown.append(
            f"--- {place}: {source} {row['ids'][place]} (pass {row['passes'][place]}, piece {row['pieces'][place]}), "
            f"{kind}, {layout}, {length} tokens"
        )
        shown.append(codec.decode(ids))
        start += length
    return "\n".join(shown)


def main() -> None:
    """Build the rows of a stage, or explain one of them."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.build", description=main.__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="section.key=value", dest="overrides")
    parser.add_argument(
        "--workers", type=worker_count, default=os.cpu_count() or 1, help="lanes built at once on this machine"
    )
    parser.add_argument("--cluster", type=Path, default=CLUSTER, help="what is particular to a Slurm cluster")
    parser.add_argument("--explain", type=int, metavar="ROW", help="print the documents of a row and stop")
    arguments = parser.parse_args()
    from datasets import disable_progress_bars

    disable_progress_bars()  # of `datasets`; the build has its own
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.explain is not None:
            print(explain_row(open_rows(recipe.rows_dir), arguments.explain))
        else:
            build(recipe, arguments.workers, arguments.cluster)
    except KeyboardInterrupt:
        print("\ninterrupted; finished lanes are kept, run the same command again", file=sys.stderr)
        raise SystemExit(130) from None
    except PermissionError as error:
        fail(f"{error.filename}: no permission to write here; choose another folder with --set runs=FOLDER")
    except OSError as error:
        full = error.errno in FULL_DISK
        advice = "free some space and run the same command again" if full else "mend that and run the same command again"
        written = error.filename2 if full else None  # of a copy, the source comes first
        fail(f"{written or error.filename or recipe_folder(arguments)}: {error.strerror or error}; {advice}")
    except ValueError as error:
        fail(str(error))


def recipe_folder(arguments: argparse.Namespace) -> str:
    """Where a build writes, for a message about a file that has no name."""
    return f"the runs folder of {arguments.recipe}"


if __name__ == "__main__":
    # subtle: tasks go to other processes by the name of their module, and `__main__` is another one there
    from data_pipelines import build as module

    module.main()
