"""Benchmarks from the Hub, by a small Hub on loopback: at the commit that is written down, or refused in a sentence."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from codetune.problems import BENCHMARKS, UNPINNED

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "data_pipelines"))
from hub_server import HubServer, Repository  # noqa: E402

LOAD = """
import sys
from codetune.problems import load_problems
for name in sys.argv[1:]:
    try:
        loaded = load_problems(name)
        print(name, len(loaded.problems), loaded.source, loaded.problems[0].id)
    except ValueError as error:
        print(name, type(error).__name__, error)
"""
SCRIPT = b"import datasets\nclass Apps(datasets.GeneratorBasedBuilder):\n    pass\n"


def lines(*rows: dict[str, object]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def test_a_benchmark_is_read_at_its_commit_and_one_that_only_a_script_can_load_is_named(tmp_path: Path) -> None:
    """APPS keeps its files beside a script that `datasets` no longer runs: the file itself is read."""
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["1\n"]})
    row = {"id": 7, "question": "Echo.", "solutions": "[]", "input_output": tests, "difficulty": "interview"}
    apps, gsm8k, bold, multipl_e = (BENCHMARKS[name].hub for name in ("apps", "gsm8k", "bold", "multipl-e-py"))
    assert (
        multipl_e is not None and apps is not None and gsm8k is not None and bold is not None and bold.revision == UNPINNED
    )
    repositories = {
        apps.path: Repository({"apps.py": SCRIPT, "test.jsonl": lines(row)}, commit=apps.revision),
        bold.path: Repository({"bold.py": SCRIPT}),
        multipl_e.path: Repository({"humaneval-cpp.jsonl": lines({"name": "f"})}, commit=multipl_e.revision),
        gsm8k.path: Repository({"main/test.jsonl": lines({"question": "1?", "answer": "#### 1"})}, commit="f" * 40),
    }
    with HubServer(repositories) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        environment |= {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", LOAD, "apps", "bold", "gsm8k", "multipl-e-py"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert found[0] == f"apps 1 codeparrot/apps@{apps.revision} 0007"
    assert found[1].startswith("bold DataMissing bold: AmazonScience/bold cannot be read from the Hub (Dataset scripts")
    assert found[2].startswith("gsm8k DataMissing gsm8k: openai/gsm8k cannot be read")  # another commit is not its own
    assert found[3].startswith("multipl-e-py DataMissing multipl-e-py: nuprl/MultiPL-E has no humaneval-py, test")


def test_commits_are_whole_hashes_and_the_page_has_each_of_them() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for one in BENCHMARKS.values():
        if one.hub is not None:
            assert one.hub.path in page, one.name
            assert one.hub.revision == UNPINNED or re.fullmatch("[0-9a-f]{40}", one.hub.revision)
            assert one.hub.revision == UNPINNED or one.hub.revision[:8] in page
