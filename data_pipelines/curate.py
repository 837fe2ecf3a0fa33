"""From raw sources to a clean, deduplicated, decontaminated data set: the main path of `make curate`.

What comes in: a recipe with a section `curate`. What goes out: `runs/<size>/<name>/dataset/`, parquet shards in the Hub's
layout with a card, read by `documents.py` and by `datasets.load_dataset`; and beside it `curation/`: statistics, pairs of
near copies, and every document that was dropped, with its reason.

    clean        every source, in `tasks` tasks: checked, filtered, redacted, without benchmarks; dealt to shards by group
    order        a shard's documents in one order; hashes of their ids and contents
    ids          ids that a source gives more than once, in whichever shards: all but the first get a number
    exact        documents with the same text: one is kept
    signatures   MinHash of what is left; buckets; near: near copies of a document that is kept are dropped
    write        the shards, and their counts

    python -m data_pipelines.curate --recipe recipes/curate/tiny.yaml [--set section.key=value ...] [--workers N]
    python -m data_pipelines.curate --recipe recipes/curate/tiny.yaml --show near_copy [--count 5]

Each phase is tasks of a datatrove executor; a finished task is not run again. The files are the same bytes whatever the
number of tasks, machines and interruptions: which shard a document is in follows from its group, its place there from its
id, and who stays of several copies from hashes. Memory: one shard's text in `order`, a document elsewhere, and in `near`
the places of documents that have a near copy.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from codetune import artifacts
from codetune.artifacts import FULL_DISK, fail, hash_json, read_json, replace_folder, write_json
from codetune.recipe import RawSourceSettings, Recipe, load_recipe
from codetune.slurm import CLUSTER
from data_pipelines import clean, curated
from data_pipelines.benchmark_overlap import Index, build_index, load_index
from data_pipelines.documents import SourcePlan, plan_source, read_records, text_or_reason
from data_pipelines.executors import run_tasks, worker_count
from data_pipelines.installed import STDLIB
from data_pipelines.ledger import DroppedWriter, Ledger, load_ledgers
from data_pipelines.readers import Record, text_of
from data_pipelines.redact import redact
from data_pipelines.shingles import code_tokens

FORMAT = 1  # of the data set; raise it when a rule changes
PLAN = "plan.pickle"
PHASES = ("clean", "order", "ids", "exact", "signatures", "buckets", "near", "write")
DECIDE_NOTHING = ("tasks", "executor", "examples", "allow_unpinned")  # keys of `curate` that change no byte of the data set
BUFFER_BYTES = 64 << 20  # of documents waiting for their shards, per task
IDS_AT_ONCE = 1 << 22  # hashes of ids compared in memory
COLUMNS = ("text", "id", "group", "language", "license", "content_hash", "source")


@dataclass(frozen=True)
class CuratePlan:
    """All that decides the data set."""

    recipe: Recipe
    sources: tuple[SourcePlan, ...]
    fingerprint: str


def curate(recipe: Recipe, workers: int = 1, cluster: Path = CLUSTER) -> Path:
    """Make the data set of a recipe, or return at once when it is there.

    Raises:
        ValueError: something about the recipe, the sources or the output folder that the user can mend.
    """
    settings, target = recipe.need_curate(), recipe.curated_dir
    with artifacts.exclusive(recipe.run_dir, f"curation of {recipe.size}/{recipe.name}"):
        if _is_finished(recipe):
            print(f"curate: {target} is finished")
            return target
        partial = target.with_name("curate.partial").resolve()
        partial.mkdir(parents=True, exist_ok=True)
        plan = _plan(recipe, partial)
        _open_partial(partial, plan)
        if settings.decontamination.enabled and not (partial / "benchmarks.json").is_file():
            build_index(settings.decontamination).save(partial)
        (partial / PLAN).write_bytes(pickle.dumps(plan))
        for phase in PHASES:
            count = _tasks_of(phase, plan)
            if count:
                run_tasks(
                    settings.executor, phase_task(str(partial), phase), count, workers, partial / "logs" / phase, cluster
                )
        _finish(partial, plan)
        replace_folder(partial / "curation", target.with_name("curation"))
        replace_folder(partial / "dataset", target)
        shutil.rmtree(partial)
    print((target.with_name("curation") / curated.SUMMARY).read_text(encoding="utf-8"))
    print(f"curate: {target}; statistics: {target.with_name('curation') / curated.PAGE}")
    return target


def _tasks_of(phase: str, plan: CuratePlan) -> int:
    """How many tasks a phase has; 0 leaves it out."""
    settings = plan.recipe.need_curate()
    near, exact = settings.near_copies.enabled, settings.exact_copies == "drop"
    counts = {"clean": settings.tasks, "order": settings.shards, "ids": 1, "exact": int(exact), "write": settings.shards}
    counts |= {"signatures": near * settings.shards, "buckets": near * settings.near_copies.buckets, "near": int(near)}
    return counts[phase]


def _plan(recipe: Recipe, partial: Path) -> CuratePlan:
    settings = recipe.need_curate()
    sources = tuple(
        plan_source(name, source, settings.tasks, partial / "sources", settings.allow_unpinned, every_lane=False)
        for name, source in settings.sources.items()
    )
    facts = {source.name: {key: value for key, value in source.facts.items() if key != "units"} for source in sources}
    return CuratePlan(recipe, sources, hash_json([_settings_fingerprint(recipe), settings.tasks, facts]))


def _settings_fingerprint(recipe: Recipe) -> str:
    tree = dataclasses.asdict(recipe.need_curate())
    return hash_json(
        [FORMAT, json.loads(json.dumps({key: value for key, value in tree.items() if key not in DECIDE_NOTHING}))]
    )


def _is_finished(recipe: Recipe) -> bool:
    """Whether the data set of these settings is there; anything else in its place is refused."""
    target, known = recipe.curated_dir, recipe.curated_dir / curated.MANIFEST
    if not target.exists():
        return False
    if known.is_file() and read_json(known)["settings_fingerprint"] == _settings_fingerprint(recipe):
        return True
    raise ValueError(
        f"{target}: exists and was not made by these settings; move it away, or write elsewhere with --set runs=FOLDER"
    )


def _open_partial(partial: Path, plan: CuratePlan) -> None:
    """Clear what other settings, or other contents of the sources, have left; texts made ready for reading stay."""
    state = partial / "state.json"
    if state.is_file() and read_json(state)["fingerprint"] != plan.fingerprint:
        print(f"curate: {partial} belongs to another curation and is cleared", file=sys.stderr)
        for path in partial.iterdir():
            if path.name != "sources":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(state, {"fingerprint": plan.fingerprint})


# ---------------------------------------------------------------------------------------------------------------------
# Phases, as tasks


@dataclass(frozen=True)
class PhaseTask:
    """One phase, in the form in which datatrove runs it; it carries its folder only, and reads the plan there."""

    folder: str
    phase: str

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        partial = Path(self.folder)
        # our own file, written a moment ago by the process that started this one
        plan = pickle.loads((partial / PLAN).read_bytes())
        assert world_size == _tasks_of(self.phase, plan)
        with _frugal_arrow():
            _RUN[self.phase](partial, plan, rank)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return phase_task, (self.folder, self.phase)


@contextlib.contextmanager
def _frugal_arrow() -> Iterator[None]:
    """Arrow's memory from the system while a task runs, and what is free given back at its end.

    Arrow's own allocator keeps what is freed, more with every task; the system's keeps pieces between what is still used.
    """
    import pyarrow as pa

    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)
        with contextlib.suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)


def phase_task(folder: str, phase: str) -> PhaseTask:
    """A phase's task, in this process or one that the executor starts: errors reach the user through ours."""
    from loguru import logger

    logger.disable("datatrove")
    return PhaseTask(folder, phase)


def clean_sources(partial: Path, plan: CuratePlan, rank: int) -> None:
    """Read one task's part of every source; what passes goes to the shard of its group."""
    settings = plan.recipe.need_curate()
    ledger, dropped = Ledger(), DroppedWriter(partial / "dropped" / f"clean-{rank:05d}.parquet")
    index = load_index(partial) if settings.decontamination.enabled else None
    writer = _ShardWriters(partial / "cleaned", rank, settings.shards)
    for source in plan.sources:
        licenses = _licenses_of(source)
        paths = {file.id: file.path for unit in source.units for file in unit.files}
        for found in read_records(source, rank, settings.tasks):
            record = _with_left_out(found, paths, source.settings.max_document_bytes)
            text, reason, detail = _cleaned(record, source, licenses(record), plan, index, ledger)
            language = record.language or "unknown"
            if reason is not None:
                shown = record.text if text is None else text
                key = (source.name, reason, language)
                ledger.dropped[key] += 1
                ledger.dropped_bytes[key] += _bytes(shown)
                ledger.dropped_tokens[key] += len(code_tokens(shown)) if isinstance(shown, str) else 0
                dropped.add(shown, source.name, record.id, reason, language, detail)
                continue
            assert text is not None
            writer.add(_document(record, text, source.name, language, licenses(record)))
    writer.close()
    dropped.close()
    ledger.save(partial / "ledgers" / f"clean-{rank:05d}.json")


def _with_left_out(record: Record, paths: dict[str, str], max_bytes: int) -> Record:
    """A file that its reader left out by what stands in it, together with that: it is counted, and can be looked at."""
    if record.text is not None or record.reason not in ("generated_file", "binary") or record.id not in paths:
        return record
    data = Path(paths[record.id]).read_bytes()
    return record._replace(text=text_of(data, max_bytes)[0] or data)


def _cleaned(
    record: Record, source: SourcePlan, licenses: tuple[str, ...], plan: CuratePlan, index: Index | None, ledger: Ledger
) -> tuple[str | None, str | None, str]:
    """The text that goes on and no reason; or what there is of a text, the reason why it does not, and a word on it."""
    settings, own = plan.recipe.need_curate(), source.settings
    assert isinstance(own, RawSourceSettings)
    ledger.read[(source.name,)] += 1
    ledger.read_bytes[(source.name,)] += _bytes(record.text)
    text, reason = text_or_reason(record, own)
    if text is None:
        return None, reason, ""
    ledger.add_length(source.name, "read", len(text))
    reason = clean.why_license(licenses, settings.licenses)
    if reason is not None:
        return text, reason, ", ".join(licenses)
    reason = clean.why_dropped(text, record.language, own, settings)
    if reason is not None:
        return text, reason, clean.measured(text, reason)[0]
    hits = index.hits(text, settings.decontamination.overlap) if index is not None else []
    if hits:
        ledger.contaminated[(hits[0].benchmark,)] += 1
        return text, "contaminated", json.dumps([dataclasses.asdict(hit) for hit in hits[:5]])
    text, counts = redact(text, settings.redact)
    for kind, count in counts.items():
        ledger.redacted[source.name, kind] += count
    ledger.redacted_documents[(source.name,)] += bool(counts)
    return text, None, ""


def _bytes(text: Any) -> int:
    return (
        len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else len(text) if isinstance(text, bytes) else 0
    )


def _document(record: Record, text: str, source: str, language: str, licenses: tuple[str, ...]) -> Any:
    """The one place where a document of ours becomes datatrove's."""
    from datatrove.data import Document

    content = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    facts = {
        "group": record.group,
        "language": language,
        "license": list(licenses),
        "content_hash": content,
        "source": source,
    }
    return Document(text=text, id=record.id, metadata=facts)


def _licenses_of(source: SourcePlan) -> Callable[[Record], tuple[str, ...]]:
    """What a record's licences are: its own, else its distribution's, else what the recipe says of the source."""
    own = source.settings
    assert isinstance(own, RawSourceSettings)
    fallback = (own.license,) if own.license else ()
    if own.kind != "installed":
        return lambda record: (
            tuple(item for item in record.licenses if item.strip().lower() not in clean.NO_LICENSE) or fallback
        )
    known = {name: distribution_licenses(name) for name in own.distributions}
    return lambda record: fallback or known.get(record.id.partition("/")[0], ())


_CLASSIFIERS = {"mit license": "MIT", "apache software license": "Apache-2.0", "bsd license": "BSD-3-Clause"}
_CLASSIFIERS |= {"apache 2.0 license": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache license 2.0": "Apache-2.0"}
_CLASSIFIERS |= {"isc license (iscl)": "ISC", "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0"}
_CLASSIFIERS |= {"python software foundation license": "PSF-2.0", "the unlicense (unlicense)": "Unlicense"}


def distribution_licenses(distribution: str) -> tuple[str, ...]:
    """SPDX identifiers of an installed distribution, by its metadata; none where it gives none that can be read.

    Every part of an expression counts, OR as well as AND: what is taken must be allowed whichever applies to a file.
    """
    if distribution == STDLIB:
        return ("PSF-2.0",)
    found: Any = metadata.metadata(distribution)
    expression = found.get("License-Expression") or found.get("License") or ""
    if expression and len(expression) <= 100 and "\n" not in expression:
        parts = re.split(r"\s+(?:AND|OR)\s+|[()]", expression)
        return tuple(_CLASSIFIERS.get(part.strip().lower(), part.strip()) for part in parts if part.strip())
    classifiers = [item.rpartition(" :: ")[2] for item in found.get_all("Classifier") or () if item.startswith("License ::")]
    return tuple(_CLASSIFIERS.get(str(item).lower(), str(item)) for item in classifiers if item != "OSI Approved")


def shard_of(group: str, shards: int) -> int:
    """The shard of a group, by its hash: files of one repository stay together."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") % shards


class _ShardWriters:
    """A file for each shard that a task has documents for: whole or not there."""

    def __init__(self, folder: Path, rank: int, shards: int) -> None:
        self._folder, self._rank, self._shards = folder, rank, shards
        self._rows: dict[int, list[Any]] = {}
        self._writers: dict[int, Any] = {}
        self._bytes = 0

    def add(self, document: Any) -> None:
        shard = shard_of(document.metadata["group"], self._shards)
        self._rows.setdefault(shard, []).append(document)
        self._bytes += len(document.text)
        if self._bytes > BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        for shard, documents in self._rows.items():
            if shard not in self._writers:
                self._writers[shard] = _Parquet(self._folder / f"{shard:05d}" / f"{self._rank:05d}.parquet", COLUMNS)
            self._writers[shard].write(documents)
        self._rows, self._bytes = {}, 0

    def close(self) -> None:
        self._flush()
        for writer in self._writers.values():
            writer.close()


class _Parquet:
    """Documents as a parquet file that appears when it is complete."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._path, self._columns = path, columns
        self._writer: Any = None

    def write(self, documents: list[Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"license": pa.list_(pa.string())}
        schema = pa.schema([(name, kinds.get(name, pa.string())) for name in self._columns])
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path.with_suffix(".unfinished"), schema, compression="zstd")
        rows = [{"text": document.text, "id": document.id, **document.metadata} for document in documents]
        self._writer.write_table(pa.Table.from_pylist(rows, schema))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._path.with_suffix(".unfinished").replace(self._path)


def read_parquet(path: Path) -> Iterator[Any]:
    """Documents of one of our files, in their order."""
    import pyarrow.parquet as pq
    from datatrove.data import Document

    if not path.is_file():
        return
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(64, use_threads=False):
            for row in batch.to_pylist():
                yield Document(text=row.pop("text"), id=row.pop("id"), metadata=row)


def order_shard(partial: Path, plan: CuratePlan, shard: int) -> None:
    """A shard's documents by source, group and id; hashes of their ids and contents."""
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupSignature

    documents = [
        item for path in sorted((partial / "cleaned" / f"{shard:05d}").glob("*.parquet")) for item in read_parquet(path)
    ]
    documents.sort(key=_place)
    writer = _Parquet(partial / "ordered" / f"{shard:05d}.parquet", COLUMNS)
    for start in range(0, len(documents), 1000):
        writer.write(documents[start : start + 1000])
    writer.close()
    names = (f"{document.metadata['source']}\0{_without_number(document.id)[0]}" for document in documents)
    hashes = np.fromiter((xxhash.xxh64_intdigest(name.encode()) for name in names), np.uint64, len(documents))
    (partial / "ids").mkdir(exist_ok=True)
    np.save(partial / "ids" / f"{shard:05d}.npy", hashes)
    if plan.recipe.need_curate().exact_copies == "drop":
        ExactDedupSignature(str(partial / "exact" / "signatures"), _exact_config()).run(iter(documents), shard, 1)


def _without_number(identity: str) -> tuple[str, str]:
    """An id without the number of a repeated one, and that number. Example: `a.py~2` gives `a.py` and `2`"""
    base, mark, number = identity.rpartition("~")
    return (base, number) if mark and number.isdecimal() and number.isascii() else (identity, "")


def number_ids(partial: Path, plan: CuratePlan, _rank: int) -> None:
    """How often each id stood before, for those that stand more than once: by shard, place -> number of its time.

    Ids are compared by hashes of what is left without a number of ours, a part of all hashes at a time.
    """
    hashes = [
        np.load(partial / "ids" / f"{shard:05d}.npy", mmap_mode="r") for shard in range(plan.recipe.need_curate().shards)
    ]
    again: list[dict[str, int]] = [{} for _ in hashes]
    parts = 1 + sum(map(len, hashes)) // IDS_AT_ONCE
    for part in range(parts):
        found = [np.flatnonzero(own % np.uint64(parts) == part) for own in hashes]
        values = np.concatenate([own[places] for own, places in zip(hashes, found, strict=True)])
        shards = np.repeat(np.arange(len(hashes)), [len(places) for places in found])
        places = np.concatenate(found)
        order = np.argsort(values, kind="stable")  # equal ones stay in the order of shards and places
        starts = np.flatnonzero(np.diff(values[order], prepend=~values[order][:1]))
        ends = np.append(starts, len(order))[1:]
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            for time, index in enumerate(order[start:end], 1):
                again[shards[index]][str(places[index])] = time
    for shard, times in enumerate(again):
        write_json(partial / "ids" / f"again-{shard:05d}.json", times)


def ordered(partial: Path, shard: int) -> Iterator[Any]:
    """Documents of a shard in their order; an id that stands a second time, here or in another shard, has a number."""
    again = _again(partial, shard)
    for place, document in enumerate(read_parquet(partial / "ordered" / f"{shard:05d}.parquet")):
        if str(place) in again:
            (base, number), time = _without_number(document.id), again[str(place)]
            document.id = base if time == 1 and not number else f"{base}~{time}"
        yield document


def _again(partial: Path, shard: int) -> dict[str, int]:
    return read_json(partial / "ids" / f"again-{shard:05d}.json")


def _place(document: Any) -> tuple[str, ...]:
    facts = document.metadata
    return facts["source"], facts["group"], document.id, facts["content_hash"]


def _exact_config() -> Any:
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
    from datatrove.utils.hashing import HashConfig

    def content(document: Any) -> bytes:
        return bytes.fromhex(document.metadata["content_hash"])

    def priority(document: Any) -> int:
        key = f"{document.metadata['source']}\0{document.id}"
        return 1 + int.from_bytes(hashlib.blake2b(key.encode(), digest_size=2).digest(), "big") % 65535

    content.__annotations__["return"] = bytes  # datatrove reads it, and would find a text under postponed annotations
    return ExactDedupConfig(content, priority, HashConfig(precision=64, hash_fc="xxhash"))


def find_exact(partial: Path, _plan: CuratePlan, _rank: int) -> None:
    """Of documents with the same text all but one, by datatrove: the one whose id has the greatest hash is kept."""
    from datatrove.pipeline.dedup.exact_dedup import ExactFindDedups

    shutil.rmtree(partial / "exact" / "found", ignore_errors=True)
    ExactFindDedups(str(partial / "exact" / "signatures"), str(partial / "exact" / "found"), config=_exact_config()).run(
        None, 0, 1
    )


def _exact_copies(partial: Path, shard: int) -> set[int]:
    found: set[int] = set()
    for path in sorted((partial / "exact" / "found").rglob(f"{shard:05d}.c4_dup")):
        found.update(np.fromfile(path, "<u4").tolist())
    return found


def distinct(partial: Path, shard: int) -> Iterator[tuple[int, Any]]:
    """Documents of a shard that are no exact copies, numbered."""
    copies = _exact_copies(partial, shard)
    documents = (item for place, item in enumerate(ordered(partial, shard)) if place not in copies)
    return enumerate(documents)


def sign_shard(partial: Path, plan: CuratePlan, shard: int) -> None:
    """MinHash signatures of a shard."""
    from data_pipelines.near_copies import CodeSignature, minhash_config

    step = CodeSignature(str(partial / "near" / "signatures"), minhash_config(plan.recipe.need_curate().near_copies))
    step.run((document for _, document in distinct(partial, shard)), shard, 1)


def fill_bucket(partial: Path, plan: CuratePlan, bucket: int) -> None:
    """Documents with equal signatures in one bucket."""
    from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets

    from data_pipelines.near_copies import minhash_config

    config = minhash_config(plan.recipe.need_curate().near_copies)
    step = MinhashDedupBuckets(str(partial / "near" / "signatures"), str(partial / "near" / "buckets"), config=config)
    step.run(None, bucket, config.num_buckets)


def decide_near(partial: Path, plan: CuratePlan, _rank: int) -> None:
    """Which near copies are dropped, and for whom."""
    from data_pipelines.near_copies import decide

    settings = plan.recipe.need_curate()
    counts = decide(
        partial / "near" / "buckets",
        partial / "near",
        lambda shard: distinct(partial, shard),
        settings.shards,
        settings.near_copies,
    )
    write_json(partial / "near" / "counts.json", counts)


def write_shard(partial: Path, plan: CuratePlan, shard: int) -> None:
    """What is left of a shard, a file for each source, and what was taken out as a copy."""
    settings = plan.recipe.need_curate()
    ledger, dropped = Ledger(), DroppedWriter(partial / "dropped" / f"write-{shard:05d}.parquet")
    copies, near = _exact_copies(partial, shard), partial / "near" / f"copies-{shard:05d}.json"
    near_copies = read_json(near) if settings.near_copies.enabled else {}
    again = _again(partial, shard)
    columns = tuple(name for name in COLUMNS if name != "source")
    writers = {
        source.name: _Parquet(partial / "written" / source.name / f"{shard:05d}.parquet", columns) for source in plan.sources
    }
    waiting: dict[str, list[Any]] = {}
    groups: set[tuple[str, str]] = set()
    place = -1
    for number, document in enumerate(ordered(partial, shard)):
        facts, size = document.metadata, len(document.text.encode())
        source, language = facts["source"], facts["language"]
        ledger.repeated_ids[(source,)] += again.get(str(number), 1) > 1
        reason, detail = ("exact_copy", facts["content_hash"]) if number in copies else (None, "")
        if reason is None:
            place += 1
            if str(place) in near_copies:
                reason, detail = "near_copy", json.dumps(near_copies[str(place)])
        if reason is not None:
            ledger.dropped[source, reason, language] += 1
            ledger.dropped_bytes[source, reason, language] += size
            ledger.dropped_tokens[source, reason, language] += len(code_tokens(document.text))
            dropped.add(document.text, source, document.id, reason, language, detail)
            continue
        key = (source, language, " + ".join(sorted(facts["license"])) or "unknown")
        ledger.kept[key] += 1
        ledger.kept_bytes[key] += size
        ledger.kept_tokens[key] += len(code_tokens(document.text))
        ledger.add_length(source, "kept", len(document.text))
        groups.add((source, facts["group"]))
        waiting.setdefault(source, []).append(document)
        if len(waiting[source]) == 1000:
            writers[source].write(waiting.pop(source))
    for source, documents in waiting.items():
        writers[source].write(documents)
    for writer in writers.values():
        writer.close()
    for source, _ in groups:
        ledger.kept_groups[(source,)] += 1
    dropped.close()
    ledger.save(partial / "ledgers" / f"write-{shard:05d}.json")


_RUN: dict[str, Callable[[Path, CuratePlan, int], None]] = {
    "clean": clean_sources,
    "order": order_shard,
    "ids": number_ids,
    "exact": find_exact,
    "signatures": sign_shard,
    "buckets": fill_bucket,
    "near": decide_near,
    "write": write_shard,
}


# ---------------------------------------------------------------------------------------------------------------------
# The end


def _finish(partial: Path, plan: CuratePlan) -> None:
    """Name the shards, add everything up, check that nothing was lost, and write card, manifest and statistics."""
    dataset, curation = partial / "dataset", partial / "curation"
    for folder in (dataset, curation):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    ledger = load_ledgers(partial / "ledgers")
    files: dict[str, list[str]] = {}
    for source in plan.sources:
        found = sorted((partial / "written" / source.name).glob("*.parquet"))
        files[source.name] = [
            f"{source.name}/train-{number:05d}-of-{len(found):05d}.parquet" for number in range(len(found))
        ]
        for path, name in zip(found, files[source.name], strict=True):
            (dataset / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, dataset / name)
    index = load_index(partial).facts if plan.recipe.need_curate().decontamination.enabled else None
    near = read_json(partial / "near" / "counts.json") if plan.recipe.need_curate().near_copies.enabled else None
    manifest = curated.manifest_of(plan.recipe, plan.sources, ledger, files, index, near)
    manifest |= {"format": FORMAT, "settings_fingerprint": _settings_fingerprint(plan.recipe)}
    write_json(dataset / curated.MANIFEST, manifest)
    (dataset / "README.md").write_text(curated.card(manifest), encoding="utf-8")
    shutil.copytree(partial / "dropped", curation / "dropped")
    if near is not None:
        shutil.copyfile(partial / "near" / "pairs.jsonl", curation / curated.PAIRS)
    curated.write_page(curation, manifest, plan.recipe.need_curate())


def main() -> None:
    """Curate the sources of a recipe, or look at what was dropped."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.curate", description=main.__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="section.key=value", dest="overrides")
    parser.add_argument("--workers", type=worker_count, default=os.cpu_count() or 1, help="tasks at once")
    parser.add_argument("--cluster", type=Path, default=CLUSTER, help="what is particular to a Slurm cluster")
    parser.add_argument("--show", metavar="REASON", help="print documents dropped for it: near_copy, contaminated")
    parser.add_argument("--count", type=int, default=5, help="how many of them")
    parser.add_argument("--push", metavar="OWNER/NAME", help="put the finished data set on the Hub, private")
    parser.add_argument("--public", action="store_true", help="with --push: a new repository is public")
    parser.add_argument("--replace", action="store_true", help="with --push: write over whatever is there")
    parser.add_argument("--dry-run", action="store_true", help="with --push: list what would go and send nothing")
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        if arguments.show is not None:
            print(curated.show(recipe, arguments.show, arguments.count))
            return
        folder = curate(recipe, arguments.workers, arguments.cluster)
        if arguments.push is not None:
            print(curated.push(folder, arguments.push, arguments.public, arguments.replace, arguments.dry_run))
    except KeyboardInterrupt:
        print("\ninterrupted; finished tasks are kept, run the same command again", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        full = error.errno in FULL_DISK
        advice = "free some space and run the same command again" if full else "mend that and run the same command again"
        fail(f"{error.filename or arguments.recipe}: {error.strerror or error}; {advice}")
    except ValueError as error:
        fail(str(error))


if __name__ == "__main__":
    # subtle: tasks go to other processes by the name of their module, and `__main__` is another one there
    from data_pipelines import curate as module

    module.main()
