"""Peak memory of the row build at ten times the input, against the input itself.

Each build runs in a process of its own over a jsonl file of real documents, in one lane; the figure is the peak resident set
of the process (getrusage), the same recipe otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.corpus import real_code, recipe_for, train_tokenizer, write_jsonl

MINUTES = 4
TIMES = (5, 50)  # of 3 million characters: several groups of rows, and ten times as many
CHILD = (
    "import resource, sys\nfrom codetune.recipe import load_recipe\nfrom data_pipelines.build import build\n"
    "build(load_recipe(sys.argv[1]))\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
)


def peak_mib(recipe_path: Path) -> float:
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(recipe_path)], check=True, capture_output=True, text=True, env=environment
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    documents = real_code(3_000_000)
    with tempfile.TemporaryDirectory() as name:
        parent = train_tokenizer(Path(name) / "tokenizer", documents[::4])
        peaks = {}
        for times in TIMES:
            folder = Path(name) / str(times)
            folder.mkdir()
            many = [replace(document, id=f"{document.id} copy {copy}") for copy in range(times) for document in documents]
            write_jsonl(folder / "code.jsonl", many)
            source = {"code": {"kind": "jsonl", "share": 1.0, "path": str(folder / "code.jsonl"), "id_column": "id"}}
            source["code"]["repeat"] = False
            recipe_for(folder, parent, source, rows=128 * times, held_out={"fraction": 0.0, "documents_per_source": 0})
            peaks[times] = peak_mib(folder / "recipe.yaml")
            print(
                f"input of {(folder / 'code.jsonl').stat().st_size / 2**20:.0f} MiB: peak {peaks[times]:.0f} MiB", flush=True
            )
    ratio = peaks[TIMES[1]] / peaks[TIMES[0]]
    print(f"\npeak at ten times the input: {ratio:.3f} of the peak at one time (to reach: flat; within 10 %)")
    print("RESULT " + json.dumps({"peak_mib": peaks, "ratio": ratio}))


if __name__ == "__main__":
    main()
