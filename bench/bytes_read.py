"""Bytes read from a one-file source by 64 lanes together, over the size of the file; and how fast documents are read.

Every byte that is asked of the file is counted by a file system that wraps memory: planning, the search for held-out
documents and the lanes. The search ends once it has its documents out of 8 groups, so it reads about (groups to find) /
(fraction held out) groups whatever the size of the file: here 8 at 2 %, each document a group of its own, as articles are.
To reach: at most 1.1 times the file. What splitting by document numbers would cost, each lane reading the whole file and
keeping its share, is 64 times the file by arithmetic. For speed there is no target, only something to hold it against:
tokenizing takes in about 4 million characters a second a core.

    python -m bench.bytes_read        (about a minute)
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.memory import MemoryFileSystem

from codetune.recipe import HeldOutSettings, SourceSettings
from data_pipelines.documents import Drops, SourcePlan, plan_source, read_documents
from data_pipelines.held_out import HeldOut, collect_held_out

MINUTES = 1
LANES = 64
TARGET = 1.1
FILE_BYTES = 48 * 2**20


class CountingFileSystem(MemoryFileSystem):
    """Memory, with a count of the bytes that were read."""

    protocol = "counted"
    store: dict[str, Any] = {}  # noqa: RUF012  (fsspec's own way to share it between instances)
    pseudo_dirs = [""]  # noqa: RUF012
    bytes_read = 0

    def _open(self, path: str, mode: str = "rb", *arguments: Any, **options: Any) -> Any:
        opened = super()._open(path, mode, *arguments, **options)
        return _CountedFile(opened.getvalue()) if mode == "rb" else opened


class _CountedFile(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        CountingFileSystem.bytes_read += len(data)
        return data


def make_documents() -> list[dict[str, str]]:
    """Lines of the standard library in changed order, about FILE_BYTES of them: they compress as real text does."""
    root = Path(random.__file__).parent
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(root.glob("*.py"))]
    draw = random.Random(0)
    documents, total = [], 0
    while total < FILE_BYTES:
        lines = draw.choice(texts).splitlines()
        text = "\n".join(draw.sample(lines, min(len(lines), 150)))
        documents.append({"text": text, "group": f"article-{len(documents)}"})
        total += len(text)
    return documents


def write_file(kind: str, documents: list[dict[str, str]]) -> str:
    """Write one file of this kind into the counted file system; its URL."""
    url = f"counted:///one.{kind}"
    fs = fsspec.filesystem("counted")
    if kind == "parquet":
        buffer = io.BytesIO()
        rows_in_group = -(-len(documents) // (2 * LANES))
        pq.write_table(pa.Table.from_pylist(documents), buffer, row_group_size=rows_in_group)
        data = buffer.getvalue()
    else:
        data = "".join(json.dumps(document) + "\n" for document in documents).encode()
        data = gzip.compress(data, 6) if kind.endswith("gz") else data
    fs.pipe_file(url, data)
    return url


def texts_by_lane(plan: SourcePlan, held_out: HeldOut | None = None) -> list[str]:
    return [document.text for lane in range(LANES) for document in read_documents(plan, lane, LANES, 0, Drops(), held_out)]


def measure(kind: str, documents: list[dict[str, str]], work_dir: Path) -> dict[str, Any]:
    """Read all 64 lanes of one file of this kind once, and check that every document came out once."""
    url = write_file(kind, documents)
    size = fsspec.filesystem("counted").info(url)["size"]
    settings = SourceSettings(
        kind="parquet" if kind == "parquet" else "jsonl", share=1.0, path=url, group_column="group", max_document_bytes=2**20
    )
    CountingFileSystem.bytes_read = 0
    start = time.process_time()
    plan = plan_source("one", settings, LANES, work_dir, allow_unpinned=False)
    planned = CountingFileSystem.bytes_read
    texts = texts_by_lane(plan)
    seconds = time.process_time() - start
    before_search = CountingFileSystem.bytes_read
    held_out = collect_held_out([plan], HeldOutSettings(fraction=0.02, documents_per_source=8))
    searched = CountingFileSystem.bytes_read - before_search
    ratio = CountingFileSystem.bytes_read / size
    wanted = sorted(hashlib.sha256(document["text"].encode()).digest() for document in documents)
    assert sorted(hashlib.sha256(text.encode()).digest() for text in texts) == wanted, "a document was lost or read twice"

    start = time.process_time()
    kept = sum(map(len, texts_by_lane(plan, held_out)))
    filtered_seconds = time.process_time() - start
    characters = sum(map(len, texts))
    return {
        "bytes_over_file": round(ratio, 4),
        "planning_over_file": round(planned / size, 4),
        "search_over_file": round(searched / size, 4),
        "file_mb": round(size / 1e6, 1),
        "characters_per_second": round(characters / seconds),
        "characters_per_second_filtered": round(kept / filtered_seconds),
        "documents": len(texts),
    }


def main() -> None:
    fsspec.register_implementation("counted", CountingFileSystem, clobber=True)
    documents = make_documents()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("parquet", "jsonl", "jsonl.gz"):
            figures[kind] = found = measure(kind, documents, Path(folder))
            print(
                f"{kind:<9} {LANES} lanes, one file of {found['file_mb']} MB, {found['documents']} documents: "
                f"read {found['bytes_over_file']:.3f} x the file (planning {found['planning_over_file']:.3f}, held-out "
                f"search {found['search_over_file']:.3f}); {found['characters_per_second'] / 1e6:.0f} million "
                f"characters a second of one core, {found['characters_per_second_filtered'] / 1e6:.0f} with held-out groups "
                f"and near copies left out"
            )
    worst = max(found["bytes_over_file"] for found in figures.values())
    print(f"worst {worst:.3f} x, to reach at most {TARGET} x; reference (every lane reads the whole file) {LANES} x")
    print(
        "RESULT "
        + json.dumps({"name": "bytes_read", "value": worst, "target": TARGET, "reached": worst <= TARGET, **figures})
    )


if __name__ == "__main__":
    main()
