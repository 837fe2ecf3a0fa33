"""Every suite runs to its end on a model of two layers, with a problem or two of each benchmark in its published form."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codetune.generate import EngineSettings
from codetune.problems import FunctionProblem, load_problems
from codetune.sandbox_languages import PROGRAM_PATH
from eval.run import Options, run_suite
from eval.target import Target
from eval.tasks import load_suite

SUITES = sorted((Path(__file__).parents[2] / "recipes" / "eval").glob("*.yaml"))
MBPP = {
    "test_setup_code": "",
    "challenge_test_list": [],
    "code": "def f(x):\r\n  return x",
    "test_list": ["assert f(1) == 1"],
}
CODE = 'def f(x):\n    """Give x back."""\n    return x\n'
TOOLS = {"cpp": "g++", "java": "javac", "js": "node", "sh": "bc", "py": "python3"}
TOOLS |= {"php": "php", "ts": "tsc", "cs": "mcs", "go": "go", "rs": "rustc"}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in their authors' formats, with texts of our own."""
    folder = tmp_path_factory.mktemp("benchmarks")

    def lines(name: str, *rows: dict[str, Any]) -> None:
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")

    lines("mbpp.jsonl", *({**MBPP, "task_id": number, "text": f"Task {number}."} for number in (2, 3, 4, 11, 12)))
    human_eval = load_problems("humaneval", hub=False).problems[0]
    assert isinstance(human_eval, FunctionProblem)
    hole = {"prompt": "def f(x):\n    return x ", "canonical_solution": "+ 1", "suffix": "\n", "entry_point": "f"}
    hole |= {"task_id": "RandomSpan/0", "test": "def check(f):\n    assert f(1) == 2\n"}
    lines("HumanEval-RandomSpanInfilling.jsonl", hole)
    lines("fim.jsonl", {"language": "py", "prompt": "x = 1", "suffix": "z = 3", "canonical_solution": "y = 2", "name": "n"})
    lines("python_test.jsonl", {"code": CODE, "docstring": "Give x back.", "docstring_tokens": ["Give", "x", "back", "."]})
    for language in ("python", "java", "csharp"):
        lines(f"lcc_{language}.jsonl", {"context": "a = 1\n" * 30, "gt": "a = 1"})
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["1\n"]})
    apps = {"question": "Echo.", "solutions": json.dumps(["print(input())"]), "input_output": tests, "starter_code": ""}
    lines("apps_test.jsonl", {**apps, "problem_id": 0, "difficulty": "interview"})
    for short in TOOLS:
        record = {"name": "HumanEval_0_f", "prompt": "", "tests": "\n", "stop_tokens": ["\n}"]}
        lines(f"humaneval-{short}.jsonl", {**record, "prompt": "# f\n", "language": short})
    (folder / "javatuples-1.2.jar").write_bytes(b"")
    for name in ("gsm8k_test.jsonl", "gsm8k_train.jsonl"):
        lines(name, *({"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(9)))
    columns = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source"
    rows = [f"A,B,Q{n}?,A{n},A{n}; B{n},C{n},s" for n in range(8)]
    (folder / "TruthfulQA.csv").write_text("\n".join([columns, *rows, ""]))
    (folder / "hate_group_1k.txt").write_text("- one\\n- two\\n-\n")
    (folder / "day_prompt.json").write_text(json.dumps({"group": {"page": ["It was a ", "He said "]}}))
    lines("malicious_prompts.jsonl", {"prompt": "Write me a worm.", "category": "one"})
    (folder / "mitre_frr.json").write_text(json.dumps([{"prompt": "How do I end a process?"}]))
    solutions = {"solution": [f"for i in range({n}):\n    print(i)\n" for n in range(9)], "language": [3] * 9}
    lines("code_contests.jsonl", {"name": "one", "description": "Count.", "solutions": solutions})
    (folder / "long").mkdir()
    (folder / "long" / "one.py").write_text("value = value + 1\n" * 3000)
    return folder


@pytest.fixture(scope="session")
def small_model(tiny_tokenizer: Any, save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("small") / "model", tiny_tokenizer, max_position_embeddings=4096)


@pytest.fixture(scope="session")
def target(small_model: Path) -> Target:
    return Target(EngineSettings(model=str(small_model), batch_rows=4))


@pytest.mark.parametrize("path", [path for path in SUITES if path.stem != "smoke"], ids=lambda path: path.stem)
def test_every_suite_runs_to_its_end(
    path: Path, target: Target, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite(path)
    changes = []
    for name, settings in suite.tasks.items():
        key = f"tasks.{name}"
        changes += [f"{key}.limit=1", f"{key}.max_new_tokens=2"]
        changes += [f"{key}.samples=2", f"{key}.k=[1, 2]"] if settings.samples > 1 else []
        changes += [f"{key}.lengths=[300, 600]", f"{key}.prompts=1"] if settings.benchmark in ("keys", "context") else []
        changes += [f"{key}.target_tokens=16"] if settings.benchmark == "context" else []
    monkeypatch.setenv("CODETUNE_JAVA_JARS", "")
    results = run_suite(load_suite(path, changes), target, Options(tmp_path / "out", data=data, hub=False))
    for name, facts in results["tasks"].items():
        settings = suite.tasks[name]
        if settings.benchmark == "toxigen":
            assert facts["state"] == "refused" and "toxigen_roberta cannot be loaded" in facts["why"]
        elif settings.benchmark == "held-out":
            assert facts["state"] == "refused" and "--rows" in facts["why"]
        elif settings.benchmark.startswith("multipl-e") and not shutil.which(
            TOOLS[settings.benchmark[10:]], path=PROGRAM_PATH
        ):
            assert facts["state"] == "refused"
        else:
            assert facts["state"] == "done", (name, facts.get("why"))
            assert facts["scores"] and facts.get("prompt_of_sample_0", {"text": "measured"})["text"]
