"""How files become records: parquet by row groups, lines of JSON by byte ranges, compressed lines by one sharding pass.

What comes in: files at any fsspec URL. What goes out: read units, and from a unit the records in it, one at a time. Bytes
are asked for exactly: no read-ahead, a byte range ends where the next one starts, so all lanes together read a file once
(`bench/bytes_read.py` counts). A record that cannot be used carries the reason; whoever takes it counts it.

Ids: `<file>:<row>` in parquet and compressed lines, `<file>:<byte>` (where the line starts) in uncompressed ones, or what
the recipe's `id_column` says; none of them knows how the file was split.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import io
import itertools
import json
import re
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from codetune.artifacts import FULL_DISK, hash_json, whole_folder
from codetune.recipe import SourceSettings

READ_BYTES = 4 * 2**20  # per request, in files that are read from one end to the other
PREFETCHED_BYTES = 64 * 2**20  # row groups up to this size are fetched whole
PROBE_BYTES = 16 * 2**10  # per request, when a line end is looked for
FEATURES_LOOKED_AT = 20  # lines of JSON that say which columns there are
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Record(NamedTuple):
    """What stood in one place of a source, before any check; `reason` says why it is none."""

    text: Any
    id: str
    group: str
    language: str = ""
    licenses: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file of a source: where it is, its name within the source, and what tells one version of it from another."""

    url: str
    name: str
    bytes: int
    version: str


@dataclass(frozen=True)
class SourceFile:
    """A file of source code or text that is one document (before it is cut into segments)."""

    path: str
    id: str
    group: str
    language: str
    bytes: int


@dataclass(frozen=True)
class ReadUnit:
    """What one lane reads in one go; small, picklable."""

    format: str  # parquet, jsonl, numbered (lines with their ids in front), files, stream (any format of `datasets`)
    url: str
    name: str = ""  # of the file, within the source
    bytes: int = 0  # about how much; lanes are balanced by it
    row_groups: tuple[int, ...] = ()
    start: int = 0  # byte range, or 0 and -1 for the whole file
    stop: int = -1
    files: tuple[SourceFile, ...] = ()
    footer: str = ""  # parquet: where the plan has put the file's footer, so that no lane reads it again
    builtin_columns: bool = False  # the columns are ours (text, id, group, language), not the recipe's


# ---------------------------------------------------------------------------------------------------------------------
# Files


def list_urls(name: str, settings: SourceSettings) -> list[RemoteFile]:
    """The files behind `path` and `paths`, each a URL or a glob.

    Raises:
        ValueError: nothing there, or no access.
    """
    import fsspec

    found: dict[str, tuple[Any, str, dict[str, Any]]] = {}  # by URL: filesystem, folder of the pattern, facts
    for pattern in (settings.path, *settings.paths):
        if pattern is None:
            continue
        try:
            fs, path = fsspec.core.url_to_fs(pattern)
            matches = sorted(fs.glob(path)) if set(path) & set("*?[") else [path]
            infos = [fs.info(match) for match in matches]
        except (OSError, ImportError, ValueError) as error:
            raise ValueError(f"data.sources.{name}: {pattern}: not readable ({type(error).__name__}: {error})") from error
        if infos and infos[0]["type"] == "directory":
            endings = "*.parquet" if settings.kind == "parquet" else "*.jsonl*"
            raise ValueError(
                f"data.sources.{name}: {pattern} is a folder; write a glob such as {pattern.rstrip('/')}/{endings}"
            )
        if not infos:
            raise ValueError(f"data.sources.{name}: {pattern}: no file matches")
        base = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        for info in infos:
            url = fs.unstrip_protocol(info["name"])
            found[url] = fs, base, info
    # names are relative to the folder that all patterns share, or `a/x.jsonl` and `b/x.jsonl` would both be `x.jsonl`
    one_filesystem = len({type(fs) for fs, _, _ in found.values()}) == 1
    shared = _shared_folder([base for _, base, _ in found.values()]) if one_filesystem else ""
    files = []
    for url, (_, _, info) in sorted(found.items()):
        name = info["name"].removeprefix(shared).lstrip("/") if one_filesystem else url
        files.append(RemoteFile(url, escaped(name), info["size"] or 0, _version(info)))
    return files


def _shared_folder(folders: list[str]) -> str:
    """The folder that all of them are in. Example: /a/b/c and /a/b/d/e give /a/b"""
    parts = [folder.split("/") for folder in folders]
    equal = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return "/".join(level[0] for level in equal)


def escaped(text: str) -> str:
    r"""A name or id in which half surrogates (a file name that is not UTF-8, a "\ud800" in JSON) are written out.

    Example: "caf\udce9.py" gives a text of ASCII characters, a backslash and "udce9" in it
    """
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _version(info: dict[str, Any]) -> str:
    for key in ("blob_id", "ETag", "etag", "mtime", "LastModified", "created"):
        if info.get(key):
            return str(info[key])
    return ""


@contextlib.contextmanager
def open_url(url: str) -> Iterator[Any]:
    """A binary file that reads what is asked for and nothing ahead of it."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    with fs.open(path, "rb", cache_type="none") as file:
        yield file


def plan_files(
    name: str, settings: SourceSettings, files: list[RemoteFile], kind: str, lanes: int, work_dir: Path
) -> tuple[list[ReadUnit], dict[str, Any]]:
    """Units of parquet files, lines of JSON, or files in any other format that `datasets` streams."""
    facts: dict[str, Any] = {
        "files": len(files),
        "bytes": sum(file.bytes for file in files),
        "fingerprint": hash_json([[file.name, file.bytes, file.version] for file in files]),
    }
    if empty := sum(file.bytes == 0 for file in files):
        facts["empty_files"] = empty
    files = [file for file in files if file.bytes > 0]
    if not files:
        raise ValueError(f"data.sources.{name}: the source is empty ({facts['files']} files, 0 bytes)")
    if kind == "parquet":
        units = _plan_parquet(name, settings, files, lanes, work_dir / f"{name}-{facts['fingerprint']}-footers")
        facts["unit"] = "row group" if len(files) < lanes else "file"
    elif kind == "jsonl":
        units = _plan_lines(name, settings, files, lanes, work_dir, facts["fingerprint"])
        facts["unit"] = "line" if len(files) < lanes else "file"
    else:
        units = [ReadUnit("stream", file.url, file.name, file.bytes) for file in files]
        _check_columns(name, settings, _first_keys(units[0], settings), files[0].name)
        facts["unit"] = "file"
    return units, facts


def deal_files(files: list[SourceFile], lanes: int) -> list[ReadUnit]:
    """Small files dealt round in the order of a hash of their ids, so that every lane gets some of everything."""
    ordered = sorted(files, key=lambda file: (hash_json(file.id), file.id))
    hands = [tuple(ordered[lane::lanes]) for lane in range(min(lanes, len(ordered)))]
    return [ReadUnit("files", "", bytes=sum(file.bytes for file in hand), files=hand) for hand in hands]


PART = "part:"  # before the columns that a conversation is put together from


def conversation_columns(settings: SourceSettings) -> tuple[str, ...]:
    """The columns that a conversation is put together from; none for plain text.

    A document of such a source is their values as JSON, which `conversations.py` reads again.
    """
    if settings.conversation == "messages":
        return (settings.text_column,)
    if settings.conversation == "question_answer":
        return (*settings.question_columns, str(settings.answer_column))
    return ("question", "tests", "solution") if settings.conversation == "triplet" else ()


def text_from(found: dict[str, Any]) -> Any:
    """The text of a record: that of its column, or the values of several as JSON."""
    parts = {name.removeprefix(PART): value for name, value in found.items() if name.startswith(PART)}
    return json.dumps(parts, ensure_ascii=False, default=str) if parts else found.get("text")


def columns_of(settings: SourceSettings, builtin: bool = False) -> dict[str, str]:
    """Which column plays which part. Example: {"text": "content", "group": "repo_name"}"""
    if builtin:
        return {part: part for part in ("text", "id", "group", "language")}
    parts = conversation_columns(settings)
    named = ({f"{PART}{column}": column for column in parts} if parts else {"text": settings.text_column}) | {
        "id": settings.id_column,
        "group": settings.group_column,
        "language": settings.language_column,
        "licenses": settings.license_column,
    }
    return {part: column for part, column in named.items() if column}


def _check_columns(name: str, settings: SourceSettings, present: list[str], where: str) -> None:
    for part, column in columns_of(settings).items():
        if column not in present:
            key = "license_column" if part == "licenses" else f"{part}_column"
            if part.startswith(PART):
                key = {"messages": "text_column", "question_answer": "question_columns"}.get(
                    str(settings.conversation), "conversation"
                )
            near = difflib.get_close_matches(column, present, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ValueError(
                f"data.sources.{name}.{key} is `{column}`, but {where} has the columns {', '.join(present)}{hint}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Parquet


def _plan_parquet(name: str, settings: SourceSettings, files: list[RemoteFile], lanes: int, footers: Path) -> list[ReadUnit]:
    """Files as they are when there are enough for the lanes, row groups otherwise.

    Footers hold statistics of every row group, half a megabyte in a file of 25: they are read once and kept in `footers`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    units = []
    for number, file in enumerate(files):
        with open_url(file.url) as handle:
            try:
                footer = pq.ParquetFile(handle)
            except pa.ArrowInvalid as error:
                raise ValueError(f"data.sources.{name}: {file.url}: not readable as parquet ({error})") from error
            _check_schema(name, settings, footer.schema_arrow, file.name)
            if len(files) >= lanes:
                return [ReadUnit("parquet", file.url, file.name, file.bytes) for file in files]
            kept = _keep_footer(footer.metadata, footers / f"{number:05}.footer")
            for index in range(footer.metadata.num_row_groups):
                group = footer.metadata.row_group(index)
                if group.num_rows:
                    units.append(ReadUnit("parquet", file.url, file.name, group.total_byte_size, (index,), footer=kept))
    if not units:
        raise ValueError(f"data.sources.{name}: the source is empty ({len(files)} parquet files without a row)")
    return units


def _check_schema(name: str, settings: SourceSettings, schema: Any, where: str) -> None:
    _check_columns(name, settings, schema.names, where)
    if settings.conversation is not None:
        return  # lists of messages, and whatever else; what is none is refused where it is rendered
    kind = schema.field(settings.text_column).type
    if not _is_text(kind):
        raise ValueError(
            f"data.sources.{name}.text_column: `{settings.text_column}` of {where} holds {kind}, not text; "
            f"write one of {', '.join(field.name for field in schema if _is_text(field.type)) or '(none here)'}"
        )


def _keep_footer(footer: Any, path: Path) -> str:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        footer.write_metadata_file(str(temporary))
        temporary.replace(path)
    return str(path)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _read_parquet(unit: ReadUnit, settings: SourceSettings, source: str) -> Iterator[Record]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns = columns_of(settings)
    with open_url(unit.url) as handle:
        footer = pq.read_metadata(unit.footer) if unit.footer else pq.ParquetFile(handle).metadata
        _check_schema(source, settings, footer.schema.to_arrow_schema(), unit.name)  # the plan has seen one file of many
        groups = unit.row_groups or tuple(range(footer.num_row_groups))
        starts = [0]
        for index in range(footer.num_row_groups):
            starts.append(starts[-1] + footer.row_group(index).num_rows)
        for group in groups:
            # subtle: the columns of a small group come in one request; a group of gigabytes is read a stretch at a time.
            # A reader for each group, so that pyarrow lets go of what it fetched for the last one
            small = footer.row_group(group).total_byte_size <= PREFETCHED_BYTES
            file = pq.ParquetFile(handle, metadata=footer, buffer_size=READ_BYTES, pre_buffer=small)
            row = starts[group]
            batches = file.iter_batches(64, row_groups=[group], columns=list(columns.values()), use_threads=False)
            for batch in batches:
                if "text" not in columns:
                    for place, values in enumerate(batch.to_pylist()):
                        found = {part: values[column] for part, column in columns.items()}
                        yield _record(found, f"{unit.name}:{row + place}")._replace(text=text_from(found))
                    row += batch.num_rows
                    continue
                texts = _as_bytes(batch.column(columns["text"]))
                lengths = pc.call_function("binary_length", [texts]).to_pylist()
                others = {part: batch.column(column).to_pylist() for part, column in columns.items() if part != "text"}
                for place, length in enumerate(lengths):
                    found = {part: values[place] for part, values in others.items()}
                    record = _record(found, f"{unit.name}:{row}")
                    row += 1
                    if length is not None and length > settings.max_document_bytes:
                        yield record._replace(reason="longer_than_max_document_bytes")
                    else:
                        yield record._replace(text=texts[place].as_py())


def _as_bytes(column: Any) -> Any:
    """Text as bytes, since pyarrow does not check that it is UTF-8 and raises on the first that is not."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())


def _record(found: dict[str, Any], place: str) -> Record:
    """A record without its text; `place` is the id where the source has none."""
    identity = found.get("id")
    own = place if identity is None or identity == "" else escaped(str(identity))
    group = found.get("group")
    licenses = found.get("licenses")
    if isinstance(licenses, str):
        licenses = [licenses]
    listed = tuple(str(item) for item in licenses) if isinstance(licenses, list | tuple) else ()
    return Record(None, own, own if group in (None, "") else escaped(str(group)), str(found.get("language") or ""), listed)


# ---------------------------------------------------------------------------------------------------------------------
# Lines of JSON


def compression_of(url: str) -> str | None:
    return COMPRESSIONS.get(Path(url).suffix.lower())


def _plan_lines(
    name: str, settings: SourceSettings, files: list[RemoteFile], lanes: int, work_dir: Path, fingerprint: str
) -> list[ReadUnit]:
    first_keys = _first_keys(ReadUnit("jsonl", files[0].url, files[0].name), settings)
    _check_columns(name, settings, first_keys, files[0].name)
    if len(files) >= lanes:
        # an end, where it is known: a body that breaks off is then an error and not a shorter file
        ends = [-1 if compression_of(file.url) else file.bytes for file in files]
        return [ReadUnit("jsonl", file.url, file.name, file.bytes, stop=end) for file, end in zip(files, ends, strict=True)]
    plain = [file for file in files if compression_of(file.url) is None]
    packed = [file for file in files if compression_of(file.url) is not None]
    units = [unit for file in plain for unit in byte_ranges(file, -(-lanes * file.bytes // sum(f.bytes for f in files)))]
    if packed:
        units += _shard(packed, lanes, work_dir / f"{name}-{fingerprint}-{lanes}", settings)
    return units


def byte_ranges(file: RemoteFile, count: int, builtin_columns: bool = False) -> list[ReadUnit]:
    """About `count` ranges of nearly equal size that start and end at line ends."""
    cuts = [0]
    with open_url(file.url) as handle:
        for part in range(1, count):
            cut = _line_end(handle, max(file.bytes * part // count, cuts[-1]), file.bytes)
            if cuts[-1] < cut < file.bytes:
                cuts.append(cut)
    ends = [*cuts[1:], file.bytes]
    return [
        ReadUnit("jsonl", file.url, file.name, end - start, start=start, stop=end, builtin_columns=builtin_columns)
        for start, end in zip(cuts, ends, strict=True)
    ]


def _line_end(handle: Any, position: int, size: int) -> int:
    """Where the line that holds `position` ends, one past its newline."""
    while position < size:
        handle.seek(position)
        block = handle.read(min(PROBE_BYTES, size - position))
        if not block:
            break
        newline = block.find(b"\n")
        if newline >= 0:
            return position + newline + 1
        position += len(block)
    return size


def line_limit(settings: SourceSettings) -> int:
    """A line longer than this holds no document that may be kept: escapes double a text at most, as a rule."""
    return 2 * settings.max_document_bytes + 2**20


def iterate_lines(read: Callable[[int], bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    r"""Lines with the byte they start at, without their newline; None for one longer than `limit`, which is not held.

    Example: b"ab\ncdefgh\n" with limit 4 -> (0, b"ab"), (3, None)
    """
    start, rest, skipped = 0, bytearray(), 0  # where the unfinished line starts, and what of it is held or passed over
    while block := read(READ_BYTES):
        first, *others = block.split(b"\n")
        if others:
            if skipped or len(rest) + len(first) > limit:
                yield start, None
            else:
                yield start, bytes(rest) + first
            start += (skipped or len(rest)) + len(first) + 1
            for line in others[:-1]:
                yield start, line if len(line) <= limit else None
                start += len(line) + 1
            rest, skipped = bytearray(others[-1]), 0
        elif skipped:
            skipped += len(block)
        else:
            rest += block
        if len(rest) > limit:
            rest, skipped = bytearray(), len(rest)
    if skipped or rest:
        yield start, None if skipped else bytes(rest)


@contextlib.contextmanager
def _reader_of(unit: ReadUnit) -> Iterator[Callable[[int], bytes]]:
    """A function that reads the next bytes of a unit, uncompressed."""
    with open_url(unit.url) as handle:
        kind = compression_of(unit.url)
        if kind is None:
            yield _range_reader(handle, unit)
        elif kind == "gzip":
            yield _gzip_reader(_range_reader(handle, unit), unit.url)
        else:
            import pyarrow as pa

            # subtle: zstandard's own reader takes a file that is cut off for one that ends there; Arrow's does not
            whole: Any = pa.PythonFile(_Whole(handle, unit), "r")
            with pa.CompressedInputStream(whole, "zstd") as stream:
                yield _guarded(stream, unit.url)


class _Whole(io.RawIOBase):
    """A file object, as Arrow wants it, over the exact requests of `_range_reader`."""

    def __init__(self, handle: Any, unit: ReadUnit) -> None:
        super().__init__()
        self._read = _range_reader(handle, unit)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        return self._read(size)


def _range_reader(handle: Any, unit: ReadUnit) -> Callable[[int], bytes]:
    position, stop = unit.start, unit.stop
    handle.seek(position)

    def read(size: int) -> bytes:
        nonlocal position
        wanted = size if stop < 0 else min(size, stop - position)
        block = handle.read(wanted) if wanted else b""
        position += len(block)
        if stop >= 0 and wanted and not block:
            raise ValueError(
                f"{unit.url}: ended at byte {position}, before {stop}; it changed while it was read, plan again"
            )
        return block

    return read


def _gzip_reader(read: Callable[[int], bytes], url: str) -> Callable[[int], bytes]:
    """Inflate, member after member, asking for as much as is asked of it (gzip.GzipFile asks for 8 kB)."""
    inflate = zlib.decompressobj(wbits=31)
    waiting = b""

    def more(size: int) -> bytes:
        nonlocal inflate, waiting
        while True:
            if inflate.eof:
                waiting = inflate.unused_data.lstrip(b"\0") or read(size).lstrip(b"\0")
                if not waiting:
                    return b""
                inflate = zlib.decompressobj(wbits=31)
            elif not waiting:
                waiting = read(size)
                if not waiting:
                    raise ValueError(f"{url}: the gzip file is cut off; copy or download it again")
            try:
                out = inflate.decompress(waiting, size)
            except zlib.error as error:
                raise ValueError(f"{url}: not readable as gzip ({error}); copy or download it again") from error
            waiting = inflate.unconsumed_tail
            if out:
                return out

    return more


def _guarded(stream: Any, url: str) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        try:
            return stream.read(size)
        except OSError as error:  # also what a connection breaks with: told apart by Arrow's words
            if "Truncated" in str(error):
                raise ValueError(f"{url}: the zstd file is cut off; copy or download it again") from error
            if "ZSTD" in str(error):
                raise ValueError(f"{url}: not readable as zstd ({error}); copy or download it again") from error
            raise

    return read


def _read_lines(unit: ReadUnit, settings: SourceSettings) -> Iterator[Record]:
    columns = columns_of(settings, unit.builtin_columns)
    packed = compression_of(unit.url) is not None
    with _reader_of(unit) as read:
        for number, (offset, line) in enumerate(iterate_lines(read, line_limit(settings))):
            if line is not None and not line.strip():
                continue
            yield _record_of_line(line, f"{unit.name}:{number if packed else unit.start + offset}", columns)


def _read_numbered(unit: ReadUnit, settings: SourceSettings) -> Iterator[Record]:
    """Lines of a shard: the id, a tab, and the line as it was (nothing for one that was too long)."""
    columns = columns_of(settings)
    with _reader_of(unit) as read:
        for _, stored in iterate_lines(read, line_limit(settings) + 2**16):
            assert stored is not None, f"{unit.url}: a shard with a line that is too long"
            place, _, line = stored.partition(b"\t")
            yield _record_of_line(line or None, place.decode(), columns)


def _record_of_line(line: bytes | None, place: str, columns: dict[str, str]) -> Record:
    if line is None:
        return Record(None, place, place, reason="longer_than_max_document_bytes")
    try:
        tree = json.loads(line)
    except UnicodeDecodeError:
        return Record(None, place, place, reason="undecodable")
    except (ValueError, RecursionError):
        return Record(None, place, place, reason="not_json")
    if not isinstance(tree, dict):
        return Record(None, place, place, reason="not_json")
    found = {part: tree.get(column) for part, column in columns.items()}
    return _record(found, place)._replace(text=text_from(found))


def _first_keys(unit: ReadUnit, settings: SourceSettings) -> list[str]:
    """Column names, from the first objects of a file."""
    keys: dict[str, None] = {}
    if unit.format == "stream":
        for example in _stream(unit):
            return list(example)
        return []
    with _reader_of(unit) as read:
        lines = iterate_lines(lambda size: read(min(size, PROBE_BYTES)), line_limit(settings))
        for (_, line), _ in zip(lines, range(FEATURES_LOOKED_AT), strict=False):
            try:
                tree = json.loads(line or b"null")
            except (ValueError, RecursionError):
                continue
            keys |= dict.fromkeys(tree if isinstance(tree, dict) else ())
    if not keys:
        raise ValueError(
            f"{unit.url}: none of its first {FEATURES_LOOKED_AT} lines is a JSON object; kind jsonl has one per line"
        )
    return list(keys)


def _shard(files: list[RemoteFile], lanes: int, folder: Path, settings: SourceSettings) -> list[ReadUnit]:
    """Compressed lines cannot be entered in the middle: read them once and deal the lines round into a shard per lane."""
    if not folder.is_dir():
        with whole_folder(folder) as temporary:
            _write_shards(files, lanes, temporary, settings)
    units = []
    for path in sorted(folder.glob("shard-*.jsonl.zst")):
        if path.stat().st_size > _EMPTY_SHARD_BYTES:
            units.append(ReadUnit("numbered", str(path), path.name, path.stat().st_size))
    return units


_EMPTY_SHARD_BYTES = 13  # zstandard's frame around nothing is shorter than that


def _write_shards(files: list[RemoteFile], lanes: int, folder: Path, settings: SourceSettings) -> None:
    import zstandard

    with contextlib.ExitStack() as stack:
        shards: list[IO[bytes]] = []
        for lane in range(lanes):
            raw = stack.enter_context((folder / f"shard-{lane:05}.jsonl.zst").open("wb"))
            shards.append(stack.enter_context(zstandard.ZstdCompressor(level=1).stream_writer(raw, closefd=False)))
        dealt = 0
        for file in files:
            with _reader_of(ReadUnit("jsonl", file.url, file.name)) as read:
                for number, (_, line) in enumerate(iterate_lines(read, line_limit(settings))):
                    if line is not None and not line.strip():
                        continue
                    shards[dealt % lanes].write(b"%s:%d\t%s\n" % (file.name.encode(), number, line or b""))
                    dealt += 1


# ---------------------------------------------------------------------------------------------------------------------
# Small files, and any format that `datasets` streams


def _read_files(unit: ReadUnit, settings: SourceSettings, wanted: Callable[[str], bool] | None) -> Iterator[Record]:
    from data_pipelines.source_files import read_source_file

    for file in unit.files:
        record = Record(None, file.id, file.group, file.language)
        if wanted is not None and not wanted(file.group):
            yield record
        else:
            text, reason = read_source_file(file.path, settings.max_document_bytes)
            yield record._replace(text=text, reason=reason)


def _stream(unit: ReadUnit) -> Any:
    import datasets

    # hf://datasets/<owner>/<name>@<commit>/<path in the repository>
    repository, _, path = unit.url.removeprefix("hf://datasets/").partition("@")
    commit, _, path = path.partition("/")
    return datasets.load_dataset(repository, data_files={"part": [path]}, split="part", revision=commit, streaming=True)


def _read_stream(unit: ReadUnit, settings: SourceSettings) -> Iterator[Record]:
    columns = columns_of(settings)
    for row, example in enumerate(_stream(unit)):
        found = {part: example.get(column) for part, column in columns.items()}
        yield _record(found, f"{unit.name}:{row}")._replace(text=text_from(found))


def read_unit(
    unit: ReadUnit, settings: SourceSettings, source: str, wanted: Callable[[str], bool] | None = None
) -> Iterator[Record]:
    """The records of a unit, in order. `wanted` spares opening small files of other groups; they come without a text.

    Raises:
        ValueError: the file is not what the plan saw, or cannot be read; it names the source and the file.
        OSError: this machine's own trouble (no space, no permission), as it is.
    """
    import pyarrow as pa

    readers: dict[str, Callable[[], Iterator[Record]]] = {
        "parquet": lambda: _read_parquet(unit, settings, source),
        "jsonl": lambda: _read_lines(unit, settings),
        "numbered": lambda: _read_numbered(unit, settings),
        "files": lambda: _read_files(unit, settings, wanted),
        "stream": lambda: _read_stream(unit, settings),
    }
    try:
        yield from readers[unit.format]()
    except Exception as error:
        ours = isinstance(error, PermissionError) or getattr(error, "errno", None) in FULL_DISK
        if ours or not (isinstance(error, pa.ArrowException) or is_input_error(error)):
            raise
        raise ValueError(
            f"data.sources.{source}: {unit.url or 'a file'}: could not be read ({type(error).__name__}: {error}); see that "
            "it is there, whole and within reach, and run the same command again"
        ) from error


def is_input_error(error: Exception) -> bool:
    """Errors of httpx, requests and aiohttp share no class with OSError in every version: they are known by package."""
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(packages & {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "aiohttp"})


# ---------------------------------------------------------------------------------------------------------------------
# Text


_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ENCODINGS = ("utf-8-sig", "utf-32", "utf-32", "utf-16", "utf-16")
_DECLARED = re.compile(rb"^[^\n]*coding[:=][ \t]*([-\w.]{1,40})|^[^\n]*\n[^\n]*coding[:=][ \t]*([-\w.]{1,40})")
_SAFE_DECLARED = ("latin-1", "iso-8859-1", "iso-8859-15", "cp1252", "euc-jp", "shift_jis", "koi8-r", "gbk", "big5", "euc-kr")


def text_of(value: Any, max_bytes: int) -> tuple[str | None, str | None]:
    r"""The text of a value and no reason, or no text and the reason why it is none that may be used.

    Example: b"\xff\xfea\0" -> ("a", None), by its byte order mark; b"a\0" -> (None, "nul_bytes"); 7 -> (None,
    "missing_text_value")
    """
    if isinstance(value, bytes):
        if len(value) > max_bytes:
            return None, "longer_than_max_document_bytes"
        value, reason = _decoded(value)
        if reason is not None:
            return None, reason
    elif not isinstance(value, str):
        return None, "missing_text_value"
    else:
        try:
            size = len(value) if value.isascii() else len(value.encode())
        except UnicodeEncodeError:  # half of a surrogate pair, from a \ud800 in JSON
            return None, "undecodable"
        if size > max_bytes:
            return None, "longer_than_max_document_bytes"
    assert isinstance(value, str)
    if not value or value.isspace():
        return None, "empty"
    if "\0" in value:
        return None, "nul_bytes"
    return value, None


def _decoded(data: bytes) -> tuple[str | None, str | None]:
    """UTF-8, else by byte order mark, else as the first two lines declare (PEP 263)."""
    for mark, encoding in zip(_MARKS, _ENCODINGS, strict=True):
        if data.startswith(mark):
            try:
                return data.decode(encoding), None
            except UnicodeDecodeError:
                return None, "undecodable"
    try:
        return data.decode(), None
    except UnicodeDecodeError:
        declared = _DECLARED.match(data)
        name = (declared.group(1) or declared.group(2)).decode("ascii", "replace").lower() if declared else ""
        if name.replace("_", "-") not in {item.replace("_", "-") for item in _SAFE_DECLARED}:
            return None, "undecodable"
        try:
            return data.decode(name), None
        except (UnicodeDecodeError, LookupError):
            return None, "undecodable"
