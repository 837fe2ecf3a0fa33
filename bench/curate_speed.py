"""Curation: throughput per core and memory against plain datatrove with the same steps, and memory at 10 and at 40 times.

Reference: what a script would do with datatrove's own blocks: its parquet reader, its filter with our rules (it has none for
code), its exact and MinHash duplicate removal over the same tokens, with its shingles and its clusters, its writer. Beside
that, ours keeps what it drops, counts, orders every shard and compares near copies exactly. Each run is a process of its own
with one worker; seconds are those of the processor, from the first document to the last file, benchmarks' index included.

Memory over corpus size: copies with every longer word changed, 17 and 72 MB of text, one task, every phase of it in the
same process, where what one task leaves behind adds to the next. The smaller of the two is ten times the corpus above: below
that the table of known tokens (65,536) is not full yet, and a peak at 1.6 MB says what a process needs at all. Documents
that wait for their shard's file, and dropped ones, take 1 MiB each here instead of 64 and 32, so that both sizes fill them.
A shard is sorted in memory: there are as many as keep the largest below 2.5 MB of text, at every size.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import yaml

MINUTES = 5
SIZES = (10, 40)  # times the corpus
SHARD_CHARACTERS = 2_500_000  # at most, in the largest shard
CORPUS_BYTES = 1_500_000
TURNS = 2
BENCHMARKS = {"benchmarks": ["humaneval"]}
ROW_GROUP_DOCUMENTS = 100


def documents() -> list[tuple[str, str]]:
    """Files of the standard library by name, up to `CORPUS_BYTES`; every twentieth a second time, as a copy."""
    root, found, total = Path(sysconfig.get_paths()["stdlib"]), [], 0
    for place, path in enumerate(sorted(root.rglob("*.py"))):
        if "site-packages" in path.parts or "test" in str(path.relative_to(root)) or total > CORPUS_BYTES:
            continue
        text = path.read_bytes().decode(errors="replace")
        name = path.relative_to(root).as_posix()
        found.append((name, text))
        total += len(text)
        if place % 20 == 0:
            found.append((f"copy/{name}", text.replace("self", "this")))
    return found


def write_corpus(folder: Path, texts: list[tuple[str, str]], times: int) -> int:
    """Parquet files, one for each time; its size in bytes of text."""
    folder.mkdir()
    size = 0
    for copy in range(times):
        change = functools.partial(re.compile(r"\b[a-z]{3,}\b").sub, lambda match, copy=copy: f"{match[0]}{copy}")
        rows = [
            {"text": change(text) if copy else text, "id": f"{copy}/{name}", "group": f"{copy}/{name.partition('/')[0]}"}
            for name, text in texts
        ]
        size += sum(len(row["text"].encode(errors="replace")) for row in rows)
        columns = {key: [row[key] for row in rows] for key in ("text", "id", "group")}
        table = pa.table({**columns, "license": ["PSF-2.0"] * len(rows)})
        pq.write_table(table, folder / f"{copy:03d}.parquet", row_group_size=ROW_GROUP_DOCUMENTS)
    return size


def shards_for(texts: list[tuple[str, str]], times: int) -> int:
    """The smallest number of shards whose largest is small enough; all files of one group are in one."""
    from data_pipelines.curate import shard_of

    groups = Counter[str]()
    for copy in range(times):
        for name, text in texts:
            groups[f"{copy}/{name.partition('/')[0]}"] += len(text)
    shards = 1
    while True:
        sizes = Counter[int]()
        for group, size in groups.items():
            sizes[shard_of(group, shards)] += size
        if max(sizes.values()) <= SHARD_CHARACTERS:
            return shards
        shards += 1


def recipe_tree(folder: Path, shards: int) -> dict[str, Any]:
    columns = {"id_column": "id", "group_column": "group", "license_column": "license"}
    source = {"kind": "parquet", "path": str(folder / "raw" / "*.parquet"), **columns}
    return {
        "name": "curate",
        "size": "bench",
        "runs": str(folder / "runs"),
        "curate": {"sources": {"code": source}, "shards": shards, "decontamination": BENCHMARKS},
    }


# ---------------------------------------------------------------------------------------------------------------------
# In a process of its own


def ours(folder: Path) -> int:
    """Documents that are kept."""
    from codetune.recipe import load_recipe
    from data_pipelines import curate, ledger

    curate.BUFFER_BYTES = ledger.FLUSH_BYTES = 1 << 20
    dataset = curate.curate(load_recipe(folder / "recipe.yaml"))
    return json.loads((dataset / "curate.json").read_text())["sources"]["code"]["documents"]


def plain(folder: Path) -> int:
    """The same with datatrove's blocks alone; documents that are kept."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupFilter, ExactDedupSignature, ExactFindDedups
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.text import TextNormConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

    from codetune.recipe import load_recipe
    from data_pipelines.benchmark_overlap import build_index
    from data_pipelines.clean import why_license, why_no_code
    from data_pipelines.curate import _exact_config
    from data_pipelines.redact import redact

    settings = load_recipe(folder / "recipe.yaml").need_curate()
    index = build_index(settings.decontamination)

    class Tokens(WordTokenizer):
        """Words, numbers and single marks: those of `data_pipelines.shingles`."""

        def word_tokenize(self, text: str) -> list[str]:
            return re.findall(r"\w+|[^\w\s]", text)

        sent_tokenize = span_tokenize = word_tokenize  # pyright: ignore[reportAssignmentType]

    class Redact(PipelineStep):
        name = "redact"

        def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
            import hashlib

            for document in data:
                document.text = redact(document.text, settings.redact)[0]
                digest = hashlib.blake2b(document.text.encode(), digest_size=16).hexdigest()
                document.metadata |= {"content_hash": digest, "source": "code"}
                yield document

    as_is = TextNormConfig(False, False, False, False, False, False)
    near = settings.near_copies
    config = MinhashConfig(
        near.shingle_tokens, num_buckets=near.buckets, hashes_per_bucket=near.hashes, seed=1, norm_config=as_is
    )
    tokens: Any = Tokens()
    place = {name: str(folder / "plain" / name) for name in ("cleaned", "signatures", "found", "near", "buckets", "remove")}

    def read(name: str) -> list[Any]:
        return [ParquetReader(place[name]), ExactDedupFilter(place["found"], _exact_config())]

    def run(number: int, steps: list[Any], tasks: int = 1) -> None:
        logs = str(folder / "plain" / "logs" / str(number))
        LocalPipelineExecutor(pipeline=steps, tasks=tasks, workers=1, logging_dir=logs).run()

    rules = [
        LambdaFilter(lambda document: why_license((document.metadata["license"],), settings.licenses) is None),
        LambdaFilter(lambda document: why_no_code(document.text, settings.code) is None),
        LambdaFilter(lambda document: not index.hits(document.text, settings.decontamination.overlap)),
    ]
    out = str(folder / "plain" / "out")
    run(0, [ParquetReader(str(folder / "raw")), *rules, Redact(), ParquetWriter(place["cleaned"])])
    run(1, [ParquetReader(place["cleaned"]), ExactDedupSignature(place["signatures"], _exact_config())])
    run(2, [ExactFindDedups(place["signatures"], place["found"], config=_exact_config())])
    signature = MinhashDedupSignature(place["near"], config, language=tokens)
    signature._hash_func = lambda text: xxhash.xxh64_intdigest(
        text.encode()
    )  # its own hands a text to xxhash, which refuses it
    run(3, [*read("cleaned"), signature])
    run(4, [MinhashDedupBuckets(place["near"], place["buckets"], config=config)], near.buckets)
    run(5, [MinhashDedupCluster(place["buckets"], place["remove"], config)])
    run(6, [*read("cleaned"), MinhashDedupFilter(place["remove"]), ParquetWriter(out)])
    return sum(pq.read_metadata(path).num_rows for path in Path(out).glob("*.parquet"))


def child(which: str, folder: Path) -> None:
    from loguru import logger

    logger.disable("datatrove")
    # imports are no work of either
    import datatrove.executor
    import datatrove.pipeline.dedup.minhash
    import datatrove.pipeline.readers  # noqa: F401

    import data_pipelines.curate  # noqa: F401

    way: Callable[[Path], int] = ours if which == "ours" else plain
    before = time.process_time()
    kept = way(folder)
    seconds = time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps({"seconds": seconds, "peak_mib": peak, "kept": kept}))


# ---------------------------------------------------------------------------------------------------------------------


def measure(which: str, corpus: Path, shards: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "raw").symlink_to(corpus)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_tree(folder, shards)))
        command = [sys.executable, "-m", "bench.curate_speed", which, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{which} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 3:
        child(sys.argv[1], Path(sys.argv[2]))
        return
    texts = documents()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        size = write_corpus(Path(name) / "once", texts, 1)
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
        for turn in range(TURNS):
            for which in ("ours", "plain") if turn % 2 == 0 else ("plain", "ours"):
                found[which].append(measure(which, Path(name) / "once", shards_for(texts, 1)))
        for which, runs in found.items():
            best = min(run["seconds"] for run in runs)
            figures[which] = {
                "seconds": [round(run["seconds"], 2) for run in runs],
                "mb_per_second": size / 1e6 / best,
                "peak_mib": max(run["peak_mib"] for run in runs),
                "kept": runs[0]["kept"],
            }
            print(
                f"{which:<6} {size / 1e6:.1f} MB: {best:.1f} s of the processor, {size / 1e6 / best:.2f} MB/s, "
                f"peak {figures[which]['peak_mib']:.0f} MiB; {runs[0]['kept']} of {len(texts)} documents kept"
            )
        sizes = []
        for times in SIZES:
            shards = shards_for(texts, times)
            many = write_corpus(Path(name) / f"{times}", texts, times) / 1e6
            large = measure("ours", Path(name) / f"{times}", shards)
            per_second = many / large["seconds"]
            sizes.append({"mb": many, "shards": shards, "mb_per_second": per_second, "peak_mib": large["peak_mib"]})
            print(
                f"{times} times, {many:.0f} MB in {shards} shards: {per_second:.2f} MB/s, peak {large['peak_mib']:.0f} MiB"
            )
    figures |= {
        "ratio": figures["ours"]["mb_per_second"] / figures["plain"]["mb_per_second"],
        "sizes": sizes,
        "memory_over_plain": figures["ours"]["peak_mib"] / figures["plain"]["peak_mib"],
        "memory_at_four_times": sizes[1]["peak_mib"] / sizes[0]["peak_mib"],
        "memory_at_ten_times_the_smallest": sizes[0]["peak_mib"] / figures["ours"]["peak_mib"],
    }
    print(
        f"\nours over plain: {figures['ratio']:.2f} of its throughput (to reach: 0.9), "
        f"{figures['memory_over_plain']:.2f} of its peak memory\n"
        f"peak memory at {sizes[1]['mb']:.0f} MB over {sizes[0]['mb']:.0f} MB: {figures['memory_at_four_times']:.3f} "
        f"(to reach: flat, within 10 %); at {sizes[0]['mb']:.0f} MB over {size / 1e6:.1f} MB: "
        f"{figures['memory_at_ten_times_the_smallest']:.2f}"
    )
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
