"""The tokenizer of a published folder as the previous major of transformers reads it, beside the one that training wrote.

Reference: this version's ids of the same texts. The older one is installed into the virtual environment of `bench/rope.py`.
What is read is what `make publish DRY_RUN=1` gathers, and the model itself, of the first finished run of tiny or smoke.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.rope import old_python
from codetune.publish import Options, publish

MINUTES = 2
TEXTS = ("def f(x):\n    return x\n", "  a\tb <s> ▁<PRE>x", "naïve 漢字 \n\n\n")
READ = """
import json, sys, transformers
from transformers import AutoTokenizer
texts, found = json.loads(sys.argv[1]), {}
for name in sys.argv[2:]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        found[name] = [tokenizer.encode(text) for text in texts]
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps({"version": transformers.__version__, "found": found}))
"""


def read_with(python: Path, folders: list[Path]) -> dict[str, Any]:
    command = [str(python), "-c", READ, json.dumps(TEXTS), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    models = [Path("runs") / size / stage / "model" for size in ("tiny", "smoke") for stage in ("lcft", "stage1")]
    model = next((path for path in models if (path / "manifest.json").is_file()), None)
    if model is None:
        print("no finished run here: `make demo` makes those of tiny", file=sys.stderr)
        raise SystemExit(1)
    prepared = publish(Options(model), dry_run=True, say=lambda text: None)
    new = read_with(Path(sys.executable), [model, prepared.folder])
    old = read_with(old_python(), [model, prepared.folder])
    figures = {}
    for name, folder in (("as training wrote it", model), ("as published", prepared.folder)):
        ids, reference = old["found"][str(folder)], new["found"][str(model)]
        verdict = "the same ids" if ids == reference else ids if isinstance(ids, str) else "other ids"
        figures[name] = {
            f"transformers {new['version']}": new["found"][str(folder)] == reference,
            f"transformers {old['version']}": verdict,
        }
        print(f"{name:<24} transformers {old['version']}: {verdict}")
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
