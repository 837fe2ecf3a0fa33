"""Speed of the row build with infilling, against plain tokenizing of the same documents; and two processes against one.

Build: from a parquet file to rows on disk (reading, held-out check, infilling at 0.9, packing, writing), one lane, one
process, one thread. Reference: `tokenizers`' own `encode_batch_fast` of the same documents, plain, already in memory, one
thread. Taken in turn, seven times; the figure is the median of the ratios of characters per second.

Two processes: the whole command's own seconds for twelve passes over the file in two lanes, one after the other and both at
once. Beside it what this machine can give at all: two processes that only tokenize, against one.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer

from bench.corpus import real_code, recipe_for, train_tokenizer, write_parquet
from codetune.artifacts import read_json
from codetune.recipe import Recipe, load_recipe
from codetune.tokens import open_codec
from data_pipelines.build import build_lane, plan_build
from data_pipelines.held_out import collect_held_out

MINUTES = 8
ROUNDS = 7
CHARACTERS = 15_000_000
PASSES = 12  # of the two lanes together: starting processes takes two or three seconds, a build of hours does not notice


def reference_rate(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Characters per second of the library's fastest call."""
    started = time.perf_counter()
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False):
            encoding.ids  # noqa: B018 the ids are what is wanted of the call
    return sum(map(len, texts)) / (time.perf_counter() - started)


def build_rate(recipe: Recipe, folder: Path) -> float:
    """Characters encoded per second, from looking the source up to finished rows of its one lane."""
    started = time.perf_counter()
    codec = open_codec(recipe.parent_path)
    plan = plan_build(recipe, codec, folder)
    held_out = collect_held_out(plan.sources, recipe.need_data().held_out)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    build_lane(folder, plan, held_out, 0)
    seconds = time.perf_counter() - started
    counts = read_json(folder / "work" / "lane-00000.json")["sources"]["code"]
    assert counts["documents_read"] == counts["documents_encoded"], "some documents were not encoded"
    return counts["characters_read"] / seconds


def wall_seconds(recipe_path: Path, folder: Path, workers: int) -> float:
    """Seconds that the build reports for itself, lanes on so many processes."""
    command = [sys.executable, "-m", "data_pipelines.build", "--recipe", str(recipe_path), "--workers", str(workers)]
    subprocess.run([*command, "--set", f"runs={folder}"], check=True, capture_output=True)
    recipe = load_recipe(recipe_path, [f"runs={folder}"])
    return read_json(recipe.rows_dir / "timing.json")["seconds"]


def tokenize_at_barrier(parent: str, path: str, barrier: Any) -> None:
    """Tokenize the file once, between two barriers."""
    import pyarrow.parquet as pq

    tokenizer = Tokenizer.from_file(f"{parent}/tokenizer.json")
    texts = pq.read_table(path).column("text").to_pylist()
    barrier.wait()
    reference_rate(tokenizer, texts)
    barrier.wait()


def machine_speedup(parent: Path, path: Path) -> float:
    """How much more two processes tokenize in a second than one does, on this machine, now."""
    seconds = {}
    context = multiprocessing.get_context("spawn")
    for count in (1, 2):
        barrier = context.Barrier(count + 1)
        workers = [context.Process(target=tokenize_at_barrier, args=(str(parent), str(path), barrier)) for _ in range(count)]
        for worker in workers:
            worker.start()
        barrier.wait()
        started = time.perf_counter()
        barrier.wait()
        seconds[count] = time.perf_counter() - started
        for worker in workers:
            worker.join()
    return 2 * seconds[1] / seconds[2]


def main() -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    documents = real_code(CHARACTERS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parquet(folder / "code.parquet", documents)
        parent = train_tokenizer(folder / "tokenizer", documents[::10])
        source = {"code": {"kind": "parquet", "share": 1.0, "path": str(folder / "code.parquet"), "id_column": "id"}}
        tokens = sum(map(len, open_codec(parent).encode_batch([document.text for document in documents[::20]]))) * 20
        rows = int(tokens * 0.8) // 4096
        recipe = recipe_for(folder, parent, source, rows=rows, held_out={"fraction": 0.01})
        tokenizer = Tokenizer.from_file(str(parent / "tokenizer.json"))
        texts = [document.text for document in documents]
        ratios = []
        for turn in range(ROUNDS):
            plain = reference_rate(tokenizer, texts)
            built = build_rate(recipe, folder / f"turn{turn}")
            ratios.append(built / plain)
            rates = f"plain tokenizing {plain / 1e6:.2f} M characters/s, build {built / 1e6:.2f}"
            print(f"turn {turn}: {rates}, ratio {ratios[-1]:.3f}", flush=True)
        one_thread = statistics.median(ratios)
        speedups, machine = [], []
        recipe_for(folder, parent, source, rows=rows * PASSES, held_out={"fraction": 0.01}, lanes=2)
        for turn in range(3):
            machine.append(machine_speedup(parent, folder / "code.parquet"))
            one = wall_seconds(folder / "recipe.yaml", folder / f"one{turn}", 1)
            two = wall_seconds(folder / "recipe.yaml", folder / f"two{turn}", 2)
            speedups.append(one / two)
            print(
                f"turn {turn}: one process {one:.1f} s, two {two:.1f} s, {speedups[-1]:.2f} times as fast; two that only "
                f"tokenize do {machine[-1]:.2f} times the work of one",
                flush=True,
            )
    two_processes, possible = statistics.median(speedups), statistics.median(machine)
    print(f"\nbuild against plain tokenizing, one thread: {one_thread:.3f} (to reach: 0.80)")
    print(f"two processes against one, two cores: {two_processes:.2f} (to reach: 1.8)")
    print(f"two processes that only tokenize against one, in the same run: {possible:.2f}")
    figures = {"against_tokenizing": one_thread, "two_processes": two_processes, "machine_two_processes": possible}
    print("RESULT " + json.dumps(figures | {"ratios": ratios, "speedups": speedups}))


if __name__ == "__main__":
    main()
