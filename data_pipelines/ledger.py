"""What curation counts: documents in, documents out, drops by source, reason and language; and what it keeps of drops.

What comes in: one call for every document that is read, dropped or kept. What goes out: a file per task, added up at the
end, and the dropped documents themselves (`dropped/`), since a filter is judged by what it throws away. Nothing depends
on which task counted what: sums, and examples chosen by a hash of their ids.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from codetune.artifacts import read_json, write_json

KEPT_CHARACTERS = 20_000  # of a dropped document, to look at
FLUSH_BYTES = 32 << 20


class Ledger:
    """Counts of one task. Keys of the counters are tuples of texts."""

    def __init__(self) -> None:
        self.read: Counter[tuple[str, ...]] = Counter()  # source -> documents
        self.read_bytes: Counter[tuple[str, ...]] = Counter()
        self.dropped: Counter[tuple[str, ...]] = Counter()  # source, reason, language -> documents
        self.dropped_bytes: Counter[tuple[str, ...]] = Counter()
        self.dropped_tokens: Counter[tuple[str, ...]] = Counter()  # of what is text
        self.kept: Counter[tuple[str, ...]] = Counter()  # source, language, licence -> documents
        self.kept_bytes: Counter[tuple[str, ...]] = Counter()
        self.kept_tokens: Counter[tuple[str, ...]] = Counter()
        self.kept_groups: Counter[tuple[str, ...]] = Counter()  # source -> groups (a group is whole in one shard)
        self.redacted: Counter[tuple[str, ...]] = Counter()  # source, kind -> marks put in
        self.redacted_documents: Counter[tuple[str, ...]] = Counter()
        self.lengths: Counter[tuple[str, ...]] = Counter()  # source, read or kept, bits of the length in characters
        self.contaminated: Counter[tuple[str, ...]] = Counter()  # benchmark -> documents dropped for it
        self.repeated_ids: Counter[tuple[str, ...]] = Counter()  # source

    def add_length(self, source: str, when: str, characters: int) -> None:
        self.lengths[source, when, f"{characters.bit_length():02d}"] += 1

    def merge(self, other: Ledger) -> None:
        for name, counter in vars(other).items():
            getattr(self, name).update(counter)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            path, {name: [[*key, count] for key, count in sorted(counter.items())] for name, counter in vars(self).items()}
        )


def load_ledgers(folder: Path) -> Ledger:
    """All files of a folder, added up."""
    total = Ledger()
    for path in sorted(folder.glob("*.json")):
        for name, rows in read_json(path).items():
            getattr(total, name).update({tuple(row[:-1]): row[-1] for row in rows})
    return total


def by(counter: Counter[tuple[str, ...]], *places: int) -> dict[tuple[str, ...], int]:
    """Sums over all but these places of the keys. Example: {(a, x): 1, (a, y): 2} by 0 -> {(a,): 3}"""
    sums: Counter[tuple[str, ...]] = Counter()
    for key, count in counter.items():
        sums[tuple(key[place] for place in places)] += count
    return dict(sorted(sums.items()))


class DroppedWriter:
    """Dropped documents of one task, as parquet: whole or not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._writer: Any = None

    def add(self, text: Any, source: str, identity: str, reason: str, language: str, detail: str = "") -> None:
        shown = text if isinstance(text, str) else text.decode("utf-8", "replace") if isinstance(text, bytes) else ""
        shown = shown[:KEPT_CHARACTERS].encode("utf-8", "replace").decode()
        self._rows.append(
            {"text": shown, "id": identity, "source": source, "reason": reason, "language": language, "detail": detail}
        )
        self._bytes += len(shown)
        if self._bytes > FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = ("text", "id", "source", "reason", "language", "detail")
        schema = pa.schema([(name, pa.string()) for name in names])
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path.with_suffix(".unfinished"), schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema))
        self._rows, self._bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._path.with_suffix(".unfinished").replace(self._path)


def dropped_documents(folder: Path, reasons: Iterable[str] | None = None) -> Iterable[dict[str, Any]]:
    """What was dropped, of these reasons or of all, file by file."""
    import pyarrow.parquet as pq

    wanted = None if reasons is None else set(reasons)
    for path in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(256):
            yield from (row for row in batch.to_pylist() if wanted is None or row["reason"] in wanted)


def examples(folder: Path, count: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """`count` dropped documents for each source and reason: those whose ids have the smallest hashes."""
    chosen: dict[tuple[str, str], list[tuple[bytes, dict[str, Any]]]] = {}
    for row in dropped_documents(folder):
        rank = hashlib.blake2b(f"{row['source']}\0{row['id']}\0{row['text']}".encode(), digest_size=8).digest()
        best = chosen.setdefault((row["source"], row["reason"]), [])
        best.append((rank, row))
        best.sort(key=lambda item: item[0])
        del best[count:]
    return {key: [row for _, row in rows] for key, rows in sorted(chosen.items())}
