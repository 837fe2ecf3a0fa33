"""Rows and self-instruct through a real Ray on this machine, and what Slurm is asked for: the same files as made here."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from codetune.artifacts import read_json
from codetune.recipe import EngineSettings, load_recipe
from codetune.sandbox import STRONGEST_FIRST, probe
from codetune.slurm import ClusterSettings
from data_pipelines import executors
from data_pipelines.asking import gpus_of
from data_pipelines.build import build
from data_pipelines.self_instruct import self_instruct, usual_workers

needs_isolation = pytest.mark.skipif(
    sys.platform != "linux" or all(probe(tier) for tier in STRONGEST_FIRST), reason="no isolation works here"
)
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray of this machine's two processors; what our code asks of it first is what it is asked in a fresh process."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install -e '.[ray]'")
    import ray

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 starves its workers beside other tests
    yield
    ray.shutdown()
    patch.undo()


def contents(folder: Path, names: Callable[[str], bool]) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and names(path.name))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_rows_built_by_ray_are_those_built_here(
    ray_here: None, tiny_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("code", 300), ("text", 100)):
        lines = [
            json.dumps({"text": f"{name} number {n}\n" * (1 + n % 7), "group": f"{name}-{n // 3}"}) for n in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = {
        name: {"kind": "jsonl", "share": share, "path": f"../{name}.jsonl", "group_column": "group"}
        for name, share in (("code", 0.75), ("text", 0.25))
    }
    data = {"sequence_tokens": 128, "lanes": 2, "sources": sources, "packing": {"group_rows": 8}}
    shutil.copytree(tiny_parent, tmp_path / "parent")
    tree = {"name": "stage1", "size": "test", "parent": "../parent", "data": data}
    tree |= {"training": {"train_tokens": 128 * 40, "batch_tokens": 512}, "optimizer": {"learning_rate": 1.0e-3}}
    made = []
    for executor in ("local", "ray"):  # every path is relative, and Ray's workers begin in a folder of their own
        (tmp_path / executor).mkdir()
        monkeypatch.chdir(tmp_path / executor)
        Path("recipe.yaml").write_text(yaml.safe_dump(tree))
        rows = build(load_recipe("recipe.yaml", [f"data.executor={executor}"]), 2).resolve()
        made.append(contents(rows, lambda name: name.endswith(".arrow")))
    assert made[0] == made[1] and len(made[0]) >= 2


# ---------------------------------------------------------------------------------------------------------------------
# Self-instruct: a server writes what it is told to, so that tasks in other processes can ask it

TASKS = {"double": "2 * n", "square": "n * n", "negate": "-n"}


def written(prompt: str, seed: int) -> str:
    """What the server writes: questions, their tests, and a solution that is wrong for every third seed."""
    task = next((task for task in TASKS if f"function {task}(n)" in prompt), None)
    if "Ask about" in prompt:
        return (
            "".join(f"{n}. Write a function {task}(n) for the number n.\n" for n, task in enumerate(TASKS, start=2))[2:]
            + "5."
        )
    assert task is not None
    if "Test:" not in prompt:
        lines = [f"assert {task}({n}) == {eval(TASKS[task], {'n': n})}" for n in (2, 5, -3)]
        return "[TESTS]\n" + "\n".join(lines) + "\n[/TESTS]"
    body = "n" if seed % 3 == 0 else TASKS[task]
    return f"[PYTHON]\ndef {task}(n):\n    return {body}\n[/PYTHON]"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/v1/models" else 404, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"text": written(body["prompt"], body["seed"]), "finish_reason": "stop"}
        self._answer(200, {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})

    def _answer(self, code: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as here:
        here.daemon_threads = True
        threading.Thread(target=here.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{here.server_address[1]}"
        here.shutdown()


def self_instruct_recipe(folder: Path, url: str, executor: str) -> Path:
    """Paths in it are relative to the folder, as they are in the repository's own."""
    folder.mkdir()
    files = {"topics.txt": "numbers\n", "seeds.txt": "Write a function f(x) that does it.\n"}
    files["questions.txt"] = "=== user\nAsk about %%%topic%%%.\n=== assistant\n1. An example of a question.\n2."
    files["tests.txt"] = "=== user\nProblem: %%%question%%%"
    files["solutions.txt"] = "=== user\nProblem: %%%question%%%\nTest: %%%test%%%"
    for name, text in files.items():
        (folder / name).write_text(text)
    engine = {"kind": "server", "url": url, "model": "m"}
    passes = {
        name: {"prompt": f"{name}.txt", "max_new_tokens": 50, "format": "llama2", "engine": engine}
        for name in ("questions", "tests", "solutions")
    }
    passes["solutions"]["samples"] = 4
    settings = {"topics": "topics.txt", "seed_questions": "seeds.txt", "question_prompts": 2, "shown_questions": 1}
    settings |= {"lanes": 2, "benchmarks": ["humaneval"], "executor": executor}
    tree = {"name": "self_instruct", "size": "test", "runs": "runs", "self_instruct": settings | passes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return folder / "recipe.yaml"


@needs_isolation
@pytest.mark.slow
def test_triplets_made_by_ray_are_those_made_here(
    ray_here: None, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}
    for executor in ("local", "ray"):
        path = self_instruct_recipe(tmp_path / executor, server, executor)
        monkeypatch.chdir(path.parent)
        folder = self_instruct(load_recipe(path), 2)
        made[executor] = contents(folder.resolve(), lambda name: name == "triplets.jsonl")
        manifest = read_json(folder / "manifest.json")
        assert (manifest["funnel"]["unique"], manifest["funnel"]["kept"]) == (3, 3)
        assert set(manifest["seconds"]) >= {"questions", "tests", "suites", "solutions", "verdicts"}
    assert made["local"] == made["ray"]


def test_where_lanes_run_is_no_part_of_what_they_make(tmp_path: Path) -> None:
    from data_pipelines.self_instruct_run import open_run

    path = self_instruct_recipe(tmp_path / "here", "http://localhost:1", "local")
    prints = set()
    for executor in ("local", "slurm", "ray"):
        settings = [f"self_instruct.executor={executor}"]
        for name in ("topics", "seed_questions"):
            file = "seeds.txt" if name == "seed_questions" else "topics.txt"
            settings.append(f"self_instruct.{name}={path.parent / file}")
        settings += [f"self_instruct.{name}.prompt={path.parent / name}.txt" for name in ("questions", "tests", "solutions")]
        prints.add(open_run(load_recipe(path, settings)).fingerprint)
    assert len(prints) == 1


def test_a_cluster_is_given_every_lane_and_this_machine_as_many_as_it_has_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = self_instruct_recipe(tmp_path / "here", "http://localhost:1", "slurm")
    many = ["self_instruct.lanes=64"]
    assert usual_workers(load_recipe(path, many)) == 64
    assert usual_workers(load_recipe(path, [*many, "self_instruct.executor=ray"])) == 1
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert usual_workers(load_recipe(path, [*many, "self_instruct.executor=ray"])) == 64


def test_a_lane_with_gpus_is_given_them_and_their_part_of_a_node() -> None:
    paper = EngineSettings(kind="vllm", model="m", tensor_parallel=1, data_parallel=8)
    assert [gpus_of(paper), gpus_of(EngineSettings(model="m")), gpus_of(EngineSettings(model="m", device="cuda"))] == [
        8,
        0,
        1,
    ]
    cluster = ClusterSettings(
        options=("--partition=gpu", "--gres=gpu:8", "--nodes=4", "--exclusive"), gpus_per_node=8, cpus_per_node=96
    )
    assert executors._sbatch_options(cluster, 0) == {"partition": "gpu", "exclusive": ""}
    whole, half = executors._sbatch_options(cluster, 8), executors._sbatch_options(cluster, 4)
    assert (whole["gpus-per-node"], whole["cpus-per-task"], whole["mem"]) == ("8", "96", "0")
    assert (half["gpus-per-node"], half["cpus-per-task"], half["mem"]) == ("4", "48", "256G")
    with pytest.raises(ValueError, match="a task needs 16 GPUs, and a node has 8"):
        executors._sbatch_options(cluster, 16)


def test_a_job_script_has_options_without_a_value_and_none_that_was_not_given(tmp_path: Path) -> None:
    cluster = ClusterSettings(options=("--exclusive", "--account=mine"), gpus_per_node=2)
    args = executors._slurm(print, 3, 2, tmp_path, cluster, 2).get_sbatch_args(3)
    assert args["exclusive"] == "" and args["account"] == "mine" and args["gpus-per-node"] == "2" and args["mem"] == "0"
    assert not {"partition", "qos", "mem-per-cpu"} & set(args)
    script = executors._slurm(print, 3, 2, tmp_path, cluster, 0).get_launch_file_contents(
        args, "srun launch_pickled_pipeline x"
    )
    assert "#SBATCH --exclusive\n" in script and "#SBATCH --account=mine\n" in script
