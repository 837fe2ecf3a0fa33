"""The doors between rooms: packed rows, checkpoints, results, each a folder with a manifest, whole or not there at all.

What comes in and out: folders on disk. A folder is written under a temporary name beside its place, its manifest last,
and renamed; whoever finds the name finds the whole thing. Reading checks the manifest first and says what is wrong.

Rows (door 1) are an Arrow `datasets` folder with one file per lane. Row *numbers* deal the lanes round: row `i` is row
`i // lanes` of lane `i % lanes`, so that building more rows later leaves every earlier number alone. A lane's rows are built
in the order in which they are to be read, in which every source stays at its share; `row_order` draws which lane comes first
in each round of them, from the seed and nothing else: no library's random stream can change it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

MANIFEST = "manifest.json"
SKIPPED_STEPS = "skipped_steps.jsonl"  # in a run's folder: steps that leapt or were left out, with their rows
HASHED_BYTES = 256 * 2**20  # files up to this size are compared with their manifest by hash, larger ones by size
LAYOUTS = ("plain", "psm", "spm")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # numbers of an error that says so
KINDS = ("document", "instruct", "self_instruct", "rehearsal_code", "rehearsal_text")
VERSIONED = (
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "accelerate",
    "trl",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "datatrove",
    "pyarrow",
    "numpy",
)


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the value, atomically; keys sorted, so that equal values give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The value in a file that one of us wrote.

    Raises:
        ValueError: missing, or not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); the folder was damaged, make it again") from error


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an error, and is removed otherwise.

    An existing `target` is replaced; it stays in place until the new one is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".incomplete-{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`, moving an existing `target` out of the way first and deleting it last."""
    sync_folder(source)
    old = None
    if target.exists():
        old = target.parent / f".replaced-{target.name}-{uuid.uuid4().hex[:8]}"
        target.rename(old)
    source.rename(target)
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Ask the disk to hold every file of the folder before its name is given out."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """A short name for a value; equal values have equal names."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def software_versions() -> dict[str, str]:
    """Python and the libraries that results depend on, as installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


_locks: set[int] = set()  # descriptors of the folders that this process keeps to itself


def _let_go_in_child() -> None:
    """A forked child has its parent's lock too, and datatrove's lives on when the parent is killed."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def cannot_write(folder: Path, error: OSError) -> str:
    """The message about a folder of a run that cannot be written to, and what to do about it."""
    advice = "mend that"
    if error.errno in FULL_DISK:
        advice = "free some space there"
    elif error.errno in (errno.EACCES, errno.EPERM):
        advice = "change its permissions"
    return f"{folder}: cannot be written to ({error}); {advice}, or write elsewhere with --set runs=FOLDER"


@contextlib.contextmanager
def exclusive(folder: Path, what: str) -> Iterator[None]:
    """Keep `folder` to this process while the block runs; the system lets go of it however the process ends.

    Raises:
        ValueError: another process has it, or it cannot be written to; `what` is what we wanted to do there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(cannot_write(folder, error)) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode().strip() or "unknown"
            raise ValueError(
                f"{what}: another session (process {holder}) is working in {folder}; wait for it, or stop it"
            ) from None
        except OSError as error:
            raise ValueError(
                f"{folder}: files there cannot be locked ({error}), so that two sessions could work in it at once; choose a "
                "file system with flock for `runs` (on Lustre: mount it with `flock`)"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        _locks.add(descriptor)
        yield
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)  # subtle: the file stays; who deleted it could take it from under a third process


# ---------------------------------------------------------------------------------------------------------------------
# Door 1: rows


@dataclass(frozen=True)
class Rows:
    """Packed rows on disk, memory-mapped.

    `dataset` holds, per row (T tokens, D documents): `input_ids` (T), `document_lengths` (D, adding up to T), `loss_runs`
    (run lengths, alternately not learnt from and learnt from, adding up to T; empty where all is learnt from), and per
    document `ids`, `sources`, `layouts`, `kinds`, `passes`, `pieces` (place of a piece in a document that was cut).
    `sources`, `layouts` and `kinds` are numbers into the manifest's lists.
    """

    path: Path
    dataset: Any  # datasets.Dataset
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def lanes(self) -> int:
        return self.manifest["lanes"]

    @property
    def sequence_tokens(self) -> int:
        return self.manifest["sequence_tokens"]

    @property
    def block_rows(self) -> int:
        """Rows that are put in a new order together: one of every lane, since a lane's own order is that of its shares."""
        return self.manifest["lanes"]

    def index_of(self, number: int) -> int:
        """Where in `dataset` the row with this number is."""
        if not 0 <= number < len(self):
            raise ValueError(f"{self.path}: row {number} does not exist; rows are numbered 0 to {len(self) - 1}")
        lane, place = number % self.lanes, number // self.lanes
        return lane * (len(self) // self.lanes) + place

    def row(self, number: int) -> dict[str, Any]:
        return self.dataset[self.index_of(number)]


@dataclass(frozen=True)
class PackedRow:
    """One row before it is written; the fields are those of `Rows`."""

    input_ids: np.ndarray
    document_lengths: list[int]
    ids: list[str]
    sources: list[int]
    layouts: list[int]
    kinds: list[int]
    passes: list[int]
    pieces: list[int]
    loss_runs: list[int]


def row_features(vocabulary_size: int) -> Any:
    """The columns of rows; token ids in the smallest integer type that holds the vocabulary."""
    from datasets import Features, List, Value

    token = "uint16" if vocabulary_size <= 2**16 else "int32"
    types = {"input_ids": token, "document_lengths": "int32", "ids": "string", "sources": "uint8", "layouts": "uint8"}
    types |= {"kinds": "uint8", "passes": "int32", "pieces": "int32", "loss_runs": "int32"}
    return Features({name: List(Value(kind)) for name, kind in types.items()})


class LaneWriter:
    """Writes the rows of one lane to an Arrow file, group by group; the file has its name only once it is complete."""

    def __init__(self, path: Path, vocabulary_size: int) -> None:
        import pyarrow as pa

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows = 0
        self._schema = row_features(vocabulary_size).arrow_schema
        self._temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        self._file = self._temporary.open("wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def write(self, rows: list[PackedRow]) -> None:
        import pyarrow as pa

        columns = [_list_column([getattr(row, item.name) for row in rows], item.type) for item in self._schema]
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))
        self.rows += len(rows)

    def close(self) -> None:
        self._stream.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)

    def abandon(self) -> None:
        """Leave nothing behind, also where the disk is full and the last bytes cannot be written."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def _list_column(values: list[Any], kind: Any) -> Any:
    """An Arrow list column from one sequence per row."""
    import pyarrow as pa

    offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
    if values and isinstance(values[0], np.ndarray):
        flat = pa.array(np.concatenate(values).astype(kind.value_type.to_pandas_dtype()), kind.value_type)
    else:
        flat = pa.array([item for value in values for item in value], kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)


def finish_rows(folder: Path, files: list[str], vocabulary_size: int, manifest: dict[str, Any]) -> None:
    """Make a `datasets` folder of lane files that lie in `folder` already; the manifest comes last."""
    from datasets import DatasetInfo

    DatasetInfo(features=row_features(vocabulary_size)).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": manifest.get("fingerprint") or hash_json(manifest),
    }
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    write_json(folder / "state.json", state | {"_split": None})
    write_json(folder / MANIFEST, manifest)


def open_rows(path: Path) -> Rows:
    """Open the rows that a build wrote.

    Raises:
        ValueError: no rows there, an unfinished build, or damaged files.
    """
    if not (path / MANIFEST).is_file():
        state = "a build that has not finished" if path.is_dir() else "no rows"
        raise ValueError(f"{path}: {state}; build them with `make data`, or python -m data_pipelines.build --recipe ...")
    manifest = read_json(path / MANIFEST)
    dataset = _load_dataset(path).with_format("numpy")
    if len(dataset) != manifest["rows"]:
        raise ValueError(
            f"{path}: the manifest promises {manifest['rows']} rows, there are {len(dataset)}; build them again"
        )
    return Rows(path, dataset, manifest)


def _load_dataset(folder: Path) -> Any:
    import datasets  # not at import: a recipe can be checked without it

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder}: not readable ({error}); remove the folder and build the rows again with `make data`"
        ) from error


def row_order(seed: int, block_rows: int, start: int, count: int) -> np.ndarray:
    """Row numbers at positions `start` to `start + count`, shape (count,), int64.

    Within each block of `block_rows` the numbers are put in a new order; blocks follow one another. More rows later
    change nothing before them.
    """
    if count <= 0:
        return np.zeros(0, np.int64)
    first, last = start // block_rows, (start + count - 1) // block_rows
    blocks = [block * block_rows + permutation(seed, block, block_rows) for block in range(first, last + 1)]
    return np.concatenate(blocks)[start - first * block_rows :][:count]


def permutation(seed: int, block: int, size: int) -> np.ndarray:
    """Numbers 0 to size - 1 in an order drawn by a hash of (seed, block, number), shape (size,), int64."""
    numbers = np.arange(size, dtype=np.uint64)
    with np.errstate(over="ignore"):
        keys = splitmix64(numbers + splitmix64(np.uint64(block) + splitmix64(np.uint64(seed))))
    return np.argsort(keys, kind="stable").astype(np.int64)


def splitmix64(x: Any) -> Any:
    """The 64-bit mixing function of Steele, Lea and Flood (2014), on numpy uint64."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------------------------------------------------------------
# Held-out samples, in the folder of the rows


HELD_OUT = "held_out"
HELD_OUT_LAYOUTS = ("plain", "plain_border", "plain_joint", "psm", "spm", "long", "chat")
HELD_OUT_CUTS = ("span", "line")


@dataclass(frozen=True)
class HeldOutSample:
    """One layout of one held-out document; a document has all but `long`, or `plain` alone where it cannot be infilled.

    `plain_border` is plain text whose prefix and middle were encoded apart at the cut of `psm`: its fair reference.
    `plain_joint` is plain text whose prefix and middle were encoded as one, as in `spm`: the reference of that. There are
    two cuts of each document: `span` as in training, `line` for prompts. `long` is the beginning of a long document, plain,
    at whose end losses are measured under more and more context. `chat` is a conversation: its last answer is the middle,
    the token that stops it `end_position`, the turns before it (JSON) the prefix.
    """

    input_ids: list[int]
    layout: str  # one of HELD_OUT_LAYOUTS
    source: str
    document_id: str
    middle_start: int = 0  # index of the middle's first token
    middle_tokens: int = 0
    middle_characters: int = 0  # of the text that those tokens stand for
    end_position: int = -1  # index of the end-of-infill token, or -1
    cut: str = "span"  # one of HELD_OUT_CUTS
    prefix: str = ""  # text of the cut; prompts are made of it
    middle: str = ""
    suffix: str = ""


def held_out_features(vocabulary_size: int) -> Any:
    """The columns of held-out samples."""
    from datasets import Features, List, Value

    tokens = List(Value("uint16" if vocabulary_size <= 2**16 else "int32"))
    texts = {name: Value("string") for name in ("layout", "cut", "source", "document_id", "prefix", "middle", "suffix")}
    numbers = {name: Value("int32") for name in ("middle_start", "middle_tokens", "middle_characters", "end_position")}
    return Features({"input_ids": tokens, **texts, **numbers})


def write_held_out(folder: Path, samples: Iterable[HeldOutSample], vocabulary_size: int) -> None:
    """Write the samples into `folder`, which is `held_out` in the folder of the rows; those get their manifest later."""
    from datasets import Dataset

    columns: dict[str, list[Any]] = {item.name: [] for item in dataclasses.fields(HeldOutSample)}
    for sample in samples:
        for name, values in columns.items():
            values.append(getattr(sample, name))
    features = held_out_features(vocabulary_size)
    dataset = Dataset.from_dict({name: columns[name] for name in features}, features=features)
    shutil.rmtree(folder, ignore_errors=True)
    if len(dataset):
        dataset.save_to_disk(str(folder), max_shard_size="1GB")
    else:
        dataset.save_to_disk(str(folder), num_shards=1)  # by size it would have no file at all, which cannot be read again


def read_held_out(folder: Path) -> list[HeldOutSample]:
    """The samples that `write_held_out` wrote into `folder`, as every build does, if there are none of them too.

    Raises:
        ValueError: the folder is not there, or damaged.
    """
    dataset = _load_dataset(folder)
    return [HeldOutSample(**row) for row in dataset]  # pyright: ignore[reportCallIssue]


# ---------------------------------------------------------------------------------------------------------------------
# Door 2: checkpoints


def seal_folder(folder: Path, manifest: dict[str, Any], hash_all: bool = False) -> None:
    """Write `manifest.json` last, with the size of every file, and its hash where it is small enough to be read again.

    `hash_all` is for finished models: whoever starts from one takes the hashes from here, instead of reading all weights.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            size = path.stat().st_size
            files[str(path.relative_to(folder))] = {"bytes": size} | (
                {"sha256": hash_file(path)} if hash_all or size <= HASHED_BYTES else {}
            )
    write_json(folder / MANIFEST, {**manifest, "files": files})


def why_invalid(folder: Path, check_hashes: bool = True) -> str | None:
    """None for a folder that is as it was sealed, else one sentence that says what is wrong with it."""
    if not (folder / MANIFEST).is_file():
        return "it has no manifest.json: it was never finished"
    try:
        files = read_json(folder / MANIFEST)["files"]
    except (ValueError, KeyError, TypeError):
        return "its manifest.json is damaged"
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
        if check_hashes and "sha256" in facts and facts["bytes"] <= HASHED_BYTES and hash_file(path) != facts["sha256"]:
            return f"{name} has changed since it was written"
    return None


def newest_valid_checkpoint(folder: Path, check_hashes: bool = True) -> tuple[Path | None, list[str]]:
    """The newest `checkpoint-<step>` that is as it was sealed, and a sentence for each newer one that is not."""
    skipped = []
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        reason = why_invalid(path, check_hashes)
        if reason is None:
            return path, skipped
        skipped.append(f"{path}: skipped, {reason}")
    return None, skipped


def model_hash(folder: Path) -> str:
    """One hash for a checkpoint's weights, configuration and tokenizer: what a child records of its parent."""
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix == ".safetensors" or path.name in ("config.json", "tokenizer.json")
    )
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{folder}: no *.safetensors here; this is not a finished checkpoint")
    manifest = folder / MANIFEST
    known = read_json(manifest).get("files", {}) if manifest.is_file() else {}
    return hash_json([[name, known.get(name, {}).get("sha256") or hash_file(folder / name)] for name in names])


# ---------------------------------------------------------------------------------------------------------------------
# Door 3: results


RESULTS = "results.json"
RESULTS_FORMAT = 1
TASK_STATES = ("done", "refused", "faults", "generated")


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Replace the results of a suite, atomically.

    `model` (name, hash, what trained it), `suite` (name, title, settings), `engine`, `versions`, `hardware`, and `tasks`:
    for each its `state` (done; refused, with `why`; faults: the harness failed on some samples; generated: not graded
    yet), `settings`, `data`, `prompt_of_sample_0`, `scores`, `reasons`, counts, seconds. Only what is done has scores.
    """
    for name, task in results["tasks"].items():
        assert task["state"] in TASK_STATES, f"{name}: {task['state']}"
        assert task["state"] == "done" or not task.get("scores"), f"{name}: {task['state']}, with scores"
    write_json(folder / RESULTS, {**results, "format": RESULTS_FORMAT})


def read_results(path: Path) -> dict[str, Any]:
    """Results as `write_results` wrote them; `path` is the file or its folder.

    Raises:
        ValueError: missing, damaged, or of another format.
    """
    path = path / RESULTS if path.is_dir() else path
    results = read_json(path)
    if (
        not isinstance(results, dict)
        or results.get("format") != RESULTS_FORMAT
        or not isinstance(results.get("tasks"), dict)
    ):
        found = results.get("format") if isinstance(results, dict) else None
        raise ValueError(
            f"{path}: no results of this version (format {found!r}, here {RESULTS_FORMAT}); run the suite again"
        )
    return results


def run_length(mask: Iterable[bool]) -> list[int]:
    """Lengths of alternating runs, the first one of False.

    Example: [True, True, False, True] -> [0, 2, 1, 1]
    """
    runs, current = [0], False
    for value in mask:
        if bool(value) != current:
            runs.append(0)
            current = not current
        runs[-1] += 1
    return runs


def expand_runs(runs: Iterable[int], length: int) -> np.ndarray:
    """The mask behind `run_length`, shape (length,), bool; no runs at all mean all True.

    Example: [0, 2, 1, 1], 4 -> [True, True, False, True]
    """
    lengths = np.asarray(list(runs), dtype=np.int64)
    if lengths.size == 0:
        return np.ones(length, bool)
    mask = np.repeat(np.arange(lengths.size) % 2 == 1, lengths)
    assert mask.size == length, f"a loss mask of {mask.size} tokens on a row of {length}"
    return mask


def as_bytes(count: float) -> str:
    """Bytes for people.

    Example: 3 * 2**20 -> "3.0 MiB"
    """
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def fail(message: str) -> NoReturn:
    """End a command with one clear message and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
