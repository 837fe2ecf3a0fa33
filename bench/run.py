"""The runner behind `make bench`: one script per figure that we claim, each against a reference in the same run.

    python -m bench.run                   the list: name, minutes, what it measures, and the last result
    python -m bench.run build_speed       measure it, unless this code has a result on this machine (--force: again)
    python -m bench.run all               every one of them, in the order of the list

What a script is: a module `bench/NAME.py` that runs as `python -m bench.NAME`, whose docstring's first line says what it
measures, with `MINUTES = 3` (what it takes on two CPU cores) at its top. It prints whatever a reader wants to see, and may
end with one line of JSON, the figures. A script that exits with an error has no result.

What goes out: `bench/results/NAME.json`: figures and printed text, date, seconds, machine, versions, commit, and `code`, a
hash of everything the figure depends on: the script and each module of ours that it leads to, recipes of the stages it
names, pinned packages. A commit that touches none of these leaves a result valid; a change not committed yet makes it void.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codetune.artifacts import fail, read_json, software_versions, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
FIGURES_MARK = "RESULT "
NO_SCRIPTS = ("run", "__init__")
MAIN = '__name__ == "__main__"'


@dataclass(frozen=True)
class Benchmark:
    """A script, as its source describes it."""

    name: str
    path: Path
    title: str
    minutes: float | None

    @property
    def result_path(self) -> Path:
        return RESULTS / f"{self.name}.json"


def benchmarks(folder: Path = ROOT / "bench") -> list[Benchmark]:
    """Every script that can be run, by name; helpers that scripts share have no `__main__`. Nothing is imported."""
    found = []
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.stem not in NO_SCRIPTS and MAIN in source:
            tree = ast.parse(source, str(path))
            title = (ast.get_docstring(tree) or path.stem).splitlines()[0]
            found.append(Benchmark(path.stem, path, title, _constant(tree, "MINUTES")))
    return found


def _constant(tree: ast.Module, name: str) -> float | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            return float(value.value) if isinstance(value, ast.Constant) and isinstance(value.value, int | float) else None
    return None


# ---------------------------------------------------------------------------------------------------------------------
# What a result depends on


def code_hash(benchmark: Benchmark, root: Path = ROOT) -> str:
    """A hash of what the figure depends on, as it lies on disk."""
    digest = hashlib.sha256()
    for path in dependencies(benchmark, root):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def dependencies(benchmark: Benchmark, root: Path = ROOT) -> list[Path]:
    """The script, every module of ours that it leads to, recipes of the stages that it names, and the pinned packages.

    A module leads to what it imports; the script and helpers beside it also to what is a word in their strings: a module
    that they start (`codetune.train`, `bench/rank_job.py`), and a folder of `recipes/` with what its recipes extend. A word
    too many makes a result void too often, never too seldom.
    """
    found, waiting, words = set[Path](), [benchmark.path], set[str]()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        names, said = _named(ast.parse(path.read_text(encoding="utf-8")))
        if path.parent == benchmark.path.parent:
            words |= said
            names |= said
        for name in names:
            waiting.extend(_modules(name, root))
    folders = {path.name for path in (root / "recipes").glob("*") if path.name in words}
    while True:
        recipes = [path for folder in folders for path in (root / "recipes" / folder).rglob("*.yaml")]
        more = {name for path in recipes for name in re.findall(r"\.\./([\w-]+)/", path.read_text(encoding="utf-8"))}
        if more <= folders:
            return sorted(found | set(recipes) | {root / "constraints.txt"})
        folders |= more


def _named(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Modules that are imported, by every prefix that may be one; and words in strings."""
    names, words = set[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words |= set(re.findall(r"[\w-]+(?:\.[\w-]+)*", node.value))
    return names, words


def _modules(name: str, root: Path) -> Iterator[Path]:
    """Files of ours behind a dotted name, its packages among them, or a script of `bench/` by its file's name."""
    if name.endswith(".py"):
        name = f"bench.{name.removesuffix('.py')}"
    parts = name.split(".")
    for base in (root / "src", root):
        for count in range(1, len(parts) + 1):
            path = base.joinpath(*parts[:count])
            yield from (found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file())


def commit(root: Path = ROOT) -> str | None:
    """The commit that is checked out, with `+` behind it where files differ from it; None where there is no git."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        command = ["git", "status", "--porcelain", "--", ".", ":!bench/results", ":!docs"]
        changed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def machine() -> dict[str, Any]:
    """What a reader needs to know about the hardware to read a figure."""
    facts: dict[str, Any] = {"system": platform.platform(), "cores": os.cpu_count(), "processor": _processor()}
    facts["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    facts["load_before"] = round(os.getloadavg()[0], 2)
    import torch

    facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


# ---------------------------------------------------------------------------------------------------------------------
# Running


def measure(benchmark: Benchmark) -> dict[str, Any]:
    """Run one script, show what it prints, and keep its result.

    Raises:
        ValueError: it ended with an error; no result is written.
    """
    facts = machine()
    before, start = code_hash(benchmark), time.monotonic()
    printed: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", f"bench.{benchmark.name}"], cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(_without_places(line.rstrip("\n")))
    if process.returncode != 0:
        raise ValueError(f"bench/{benchmark.name}.py ended with exit code {process.returncode}; no result was written")
    if code_hash(benchmark) != before:
        raise ValueError(f"files changed while bench/{benchmark.name}.py ran; its result was not kept, measure again")
    figures, text = _figures(printed)
    result = {
        "name": benchmark.name,
        "title": benchmark.title,
        "command": f"make bench ONLY={benchmark.name}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "commit": commit(),
        "code": before,
        "machine": facts,
        "versions": software_versions(),
        "figures": figures,
        "printed": text,
    }
    write_json(benchmark.result_path, result)
    print(f"bench: {benchmark.result_path.relative_to(ROOT)}, {result['seconds']:g} s")
    return result


def _without_places(line: str) -> str:
    """A line that tells nothing of where this machine keeps its files."""
    return line.replace(f"{ROOT}{os.sep}", "").replace(tempfile.gettempdir(), "TMP")


def _figures(printed: list[str]) -> tuple[Any, list[str]]:
    """The JSON behind `RESULT` in the last line, and the lines before it."""
    lines = [line for line in printed if line.strip()]
    if lines and lines[-1].startswith(FIGURES_MARK):
        try:
            return json.loads(lines[-1].removeprefix(FIGURES_MARK)), lines[:-1]
        except json.JSONDecodeError:
            pass
    return None, lines


def valid_result(benchmark: Benchmark) -> dict[str, Any] | None:
    """The result of this very code on a machine with these cores and this processor, or None."""
    if not benchmark.result_path.is_file():
        return None
    result = read_json(benchmark.result_path)
    same_machine = (result["machine"]["processor"], result["machine"]["cores"]) == (_processor(), os.cpu_count())
    return result if same_machine and result["code"] == code_hash(benchmark) else None


def listing(found: list[Benchmark]) -> str:
    """One line per script: name, minutes, state of its result, title."""
    lines = ["make bench ONLY=name", ""]
    for benchmark in found:
        state = "measured" if valid_result(benchmark) else "old result" if benchmark.result_path.is_file() else "no result"
        lines.append(f"  {benchmark.name:<22} {_minutes(benchmark):>8}  {state:<11} {benchmark.title}")
    return "\n".join(lines)


def _minutes(benchmark: Benchmark) -> str:
    return "? min" if benchmark.minutes is None else f"{benchmark.minutes:g} min"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", help="which one, or `all`; none prints the list")
    parser.add_argument("--force", action="store_true", help="measure again what has a result")
    options = parser.parse_args()
    found = benchmarks()
    if options.name is None:
        print(listing(found))
        return
    chosen = [benchmark for benchmark in found if options.name in (benchmark.name, "all")]
    try:
        if not chosen:
            raise ValueError(
                f"no benchmark `{options.name}`; there are {', '.join(item.name for item in found) or 'none yet'}"
            )
        for benchmark in chosen:
            result = None if options.force else valid_result(benchmark)
            if result is None:
                print(f"bench: {benchmark.name}, about {_minutes(benchmark)}: {benchmark.title}")
                measure(benchmark)
            else:
                print(
                    f"bench: {benchmark.name} was measured with this very code on {result['date']} (FORCE=1 measures again)"
                )
                print("\n".join(result["printed"]))
    except ValueError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
