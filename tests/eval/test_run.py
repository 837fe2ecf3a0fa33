"""A suite on a tiny model, from prompts to scores: gone on with after a kill, and honest about whatever cannot be done."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codetune.artifacts import read_results
from codetune.generate import EngineSettings
from codetune.problems import FunctionProblem, load_problems
from codetune.sandbox import ExecutionResult, Sandbox, SandboxError, Verdict
from eval.run import Options, main, run_suite
from eval.stored import read_answers
from eval.target import Target, infill_trained
from eval.tasks import Reason, Suite, TaskSettings, load_suite, reason_of

ROOT = Path(__file__).parents[2]
HUMAN_EVAL = [problem for problem in load_problems("humaneval", hub=False).problems if isinstance(problem, FunctionProblem)]


@pytest.fixture(scope="session")
def roomy_model(tiny_tokenizer: Any, save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and enough context for HumanEval's prompts in a vocabulary of little more than bytes."""
    return save_llama(tmp_path_factory.mktemp("roomy") / "model", tiny_tokenizer, max_position_embeddings=4096)


def target_of(model: Path) -> Target:
    return Target(EngineSettings(model=str(model), batch_rows=4))


def suite_of(limit: int = 3, **settings: Any) -> Suite:
    return Suite("one", {"humaneval": TaskSettings("humaneval", limit=limit, **settings)})


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def right_answers(path: Path, count: int) -> Path:
    return write_lines(path, [{"task_id": one.id, "completion": one.reference} for one in HUMAN_EVAL[:count]])


def test_the_smoke_suite_runs_to_its_end_and_nothing_is_made_twice(roomy_model: Path, tmp_path: Path) -> None:
    suite = load_suite(ROOT / "recipes" / "eval" / "smoke.yaml")
    target = target_of(roomy_model)
    results = run_suite(suite, target, Options(tmp_path, hub=False))
    target.close()
    assert {name: facts["state"] for name, facts in results["tasks"].items()} == dict.fromkeys(suite.tasks, "done")
    first = results["tasks"]["humaneval"]
    assert first["references"]["references"] == first["samples"] == 3 and first["data"]["source"].startswith("wheel")
    assert sum(first["reasons"].values()) == 3 and set(first["reasons"]) <= {str(reason) for reason in Reason}
    assert first["prompt_of_sample_0"]["text"] == HUMAN_EVAL[0].prompt
    assert first["data"]["asked"] == 3 and first["data"]["published"] == 164
    sampled = results["tasks"]["humaneval-sampled"]["scores"]
    assert set(sampled) == {"pass@1", "pass@2"} and sampled["pass@1"]["decoding"] == "sampled"
    assert results["tasks"]["infilling-psm"]["references"]["floor"] == {
        "name": "with nothing in the hole",
        "passed": 0,
        "of": 2,
    }
    assert results["engine"]["dtype"] == "float32" and results["model"]["hash"] and results["versions"]["transformers"]
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert len(before) == 2 * len(suite.tasks)
    again = target_of(roomy_model)
    second = run_suite(suite, again, Options(tmp_path, hub=False, step="grade"))
    again.close()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before
    assert all(second["tasks"][name]["scores"] == facts["scores"] for name, facts in results["tasks"].items())
    assert second["tasks"]["humaneval"]["references"]["cached"]
    assert read_results(tmp_path)["tasks"].keys() == suite.tasks.keys()


def test_whoever_wrote_the_completions_the_verdicts_are_the_same(tmp_path: Path) -> None:
    wrong = "    return None\n"
    codes = [HUMAN_EVAL[0].reference, wrong, HUMAN_EVAL[2].reference]
    whole = [one.prompt + code for one, code in zip(HUMAN_EVAL, codes, strict=False)]
    forms = {
        "human-eval": [{"task_id": HUMAN_EVAL[i].id, "completion": codes[i]} for i in (2, 0, 1)],
        "evalplus": [{"task_id": HUMAN_EVAL[i].id, "solution": whole[i]} for i in range(3)],
        "multipl-e": [{"name": HUMAN_EVAL[i].id, "completions": [codes[i]]} for i in range(3)],
    }
    files = {name: write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in forms.items()}
    files["bigcode"] = tmp_path / "generations.json"
    files["bigcode"].write_text(json.dumps([[code] for code in whole]))
    for name, file in files.items():
        options = Options(tmp_path / f"out-{name}", hub=False, completions={"humaneval": file})
        facts = run_suite(suite_of(), None, options)["tasks"]["humaneval"]
        assert facts["per_problem"] == {"HumanEval/0": 1.0, "HumanEval/1": 0.0, "HumanEval/2": 1.0}, name
        assert facts["scores"]["pass@1"]["value"] == pytest.approx(2 / 3, abs=1e-6)
        assert facts["reasons"] == {"passed": 2, "wrong-answer": 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task_id": "HumanEval/0", "completion": "x"}], "no answer to 2 of 3 problems, HumanEval/1, HumanEval/2"),
        ([{"task_id": "HumanEval/9", "completion": "x"}], "'HumanEval/9' is none of the 3 problems"),
        ([{"task_id": "HumanEval/0", "sample": 1, "completion": "x"}] * 2, "has sample 1 twice"),
        ([{"task_id": "HumanEval/0"}], "line 1: no text in `completion`"),
        ([{"completion": "x"}], "line 1: no `task_id`"),
    ],
)
def test_stored_completions_that_are_not_those_of_the_problems_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    options = Options(tmp_path / "out", hub=False, completions={"humaneval": write_lines(tmp_path / "c.jsonl", rows)})
    with pytest.raises(ValueError, match=message):
        run_suite(suite_of(), None, options)


def test_given_samples_are_called_sampled_and_an_uneven_number_of_them_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four answers to the first problem, three to the second: a file that was cut between two lines looks like this."""
    rows = [{"task_id": HUMAN_EVAL[i].id, "completion": HUMAN_EVAL[i].reference} for i in (0, 0, 0, 0, 1, 1)]
    rows.append({"task_id": HUMAN_EVAL[1].id, "completion": "    return None\n"})
    options = Options(tmp_path / "out", hub=False, completions={"humaneval": write_lines(tmp_path / "c.jsonl", rows)})
    settings = {"k": (1, 3, 4), "samples": 4, "temperature": 0.8}
    facts = run_suite(suite_of(2, **settings), None, options)["tasks"]["humaneval"]
    assert facts["samples_of_a_problem"] == {"fewest": 3, "most": 4}
    assert "not as many samples of each problem: 3 to 4" in capsys.readouterr().out
    assert facts["scores"]["pass@4"] is None  # undefined, and not 1
    assert facts["scores"]["pass@1"]["value"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert facts["scores"]["pass@1"]["decoding"] == "sampled"
    assert not {"temperature", "top_p", "samples", "max_new_tokens"} & set(facts["settings"])  # the file's are not known


def test_a_prompt_beyond_the_trained_context_is_asked_where_the_suite_says_so(tiny_parent: Path, tmp_path: Path) -> None:
    """Lines behind 60 and behind 300 tokens, to a model of 128 positions."""
    rows = [{"context": "x = 1\n" * count, "gt": "x = 1"} for count in (10, 75)]
    write_lines(tmp_path / "lcc_python.jsonl", rows)
    found = {}
    for beyond in (False, True):
        tasks = {"lines": TaskSettings("lcc-python", max_new_tokens=2, beyond_context=beyond)}
        target = target_of(tiny_parent)
        options = Options(tmp_path / f"out-{beyond}", data=tmp_path, hub=False)
        found[beyond] = run_suite(Suite("lines", tasks), target, options)["tasks"]["lines"]
        target.close()
    assert found[False]["prompts_too_long"] == ["2"] and found[False]["reasons"] == {"compared": 1, "prompt-too-long": 1}
    assert found[False]["scores"]["exact_match"]["problems"] == 2 and "pass@1" not in found[False]["scores"]
    assert found[True]["prompts_too_long"] == [] and found[True]["samples"] == 2
    assert found[True]["prompt_tokens"] > 300


def test_answers_that_the_context_cut_short_are_counted(tiny_parent: Path, tmp_path: Path) -> None:
    """Room for some tokens of the sixteen that were asked for, in a context of 128."""
    write_lines(tmp_path / "lcc_python.jsonl", [{"context": "x = 1\n" * 28, "gt": "x = 1"}])
    target = target_of(tiny_parent)
    tasks = {"lines": TaskSettings("lcc-python", max_new_tokens=100)}
    facts = run_suite(Suite("lines", tasks), target, Options(tmp_path / "out", data=tmp_path, hub=False))["tasks"]["lines"]
    target.close()
    assert facts["completion_tokens"] < 100 and facts["cut_by_the_context"] == facts["ended"].get("length", 0) == 1


def test_a_cut_file_of_completions_is_refused_with_its_line(tmp_path: Path) -> None:
    path = right_answers(tmp_path / "c.jsonl", 3)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="line 3: not a JSON object"):
        run_suite(suite_of(), None, Options(tmp_path / "out", hub=False, completions={"humaneval": path}))
    whole = right_answers(tmp_path / "whole.jsonl", 3).read_bytes()
    for name, data, message in (
        ("c.jsonl.gz", gzip.compress(whole)[:-20], "cannot be read to its end"),
        ("latin.jsonl", whole + b'{"task_id": "\xe9"}\n', "cannot be read to its end"),
        ("list.json", b"[1, 2, 3]", "a list of texts for each problem"),
        ("empty.jsonl", b"", "no answer to 3 of 3 problems"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            read_answers(tmp_path / name, [one.id for one in HUMAN_EVAL[:3]])
    (tmp_path / "whole.jsonl.gz").write_bytes(gzip.compress(whole))
    ids = [one.id for one in HUMAN_EVAL[:3]]
    assert read_answers(tmp_path / "whole.jsonl.gz", ids) == read_answers(tmp_path / "whole.jsonl", ids)
    (tmp_path / "lists.json").write_text("[[]]")
    with pytest.raises(ValueError, match="1 lists of completions for 3 problems"):
        run_suite(suite_of(), None, Options(tmp_path / "o", hub=False, completions={"humaneval": tmp_path / "lists.json"}))


def test_what_a_killed_grading_has_graded_is_kept(tmp_path: Path) -> None:
    """SIGKILL in the middle; the file's cut last line is redone, and nothing else."""
    out, path = tmp_path / "out", right_answers(tmp_path / "c.jsonl", 60)
    suite = tmp_path / "one.yaml"
    suite.write_text("name: one\ntasks: {humaneval: {benchmark: humaneval, limit: 60}}\n")
    command = [sys.executable, "-m", "eval.run", "--suite", str(suite), "--out", str(out), "--offline"]
    command += ["--completions", f"humaneval={path}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    grades = out / "humaneval.grades.jsonl"
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not (grades.is_file() and grades.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None and time.monotonic() < end, process.stderr and process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = grades.read_bytes()
    assert 5 <= kept.count(b"\n") < 60
    with grades.open("ab") as file:
        file.write(b'{"prompt_id": "HumanEval/5')  # what a killed write leaves
    whole = kept[: kept.rfind(b"\n") + 1]
    facts = run_suite(load_suite(suite), None, Options(out, hub=False, completions={"humaneval": path}))["tasks"][
        "humaneval"
    ]
    assert grades.read_bytes().startswith(whole) and grades.read_bytes().count(b"\n") == 60
    assert facts["scores"]["pass@1"]["value"] == 1.0 and facts["reasons"] == {"passed": 60}


def test_a_fault_of_the_sandbox_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = right_answers(tmp_path / "c.jsonl", 3)
    options = Options(tmp_path / "out", hub=False, completions={"humaneval": path})
    run = Sandbox.run
    faults = {"left": 1}

    def faulty(self: Sandbox, job: Any) -> ExecutionResult:
        if job.entry_point == HUMAN_EVAL[1].entry_point and "references" in faults and faults["left"]:
            faults["left"] -= 1
            raise SandboxError("the sandbox failed twice on one program")
        return run(self, job)

    run_suite(suite_of(), None, Options(tmp_path / "first", hub=False, completions={"humaneval": path}))
    monkeypatch.setattr(Sandbox, "run", faulty)
    shutil.copytree(tmp_path / "first", options.out)
    (options.out / "humaneval.grades.jsonl").unlink()
    faults["references"] = True
    facts = run_suite(suite_of(), None, options)["tasks"]["humaneval"]
    assert facts["state"] == "faults" and "scores" not in facts and "1 samples" in facts["why"]
    facts = run_suite(suite_of(), None, options)["tasks"]["humaneval"]  # tried again, and only that one
    assert facts["state"] == "done" and facts["scores"]["pass@1"]["value"] == 1.0


def test_nothing_is_graded_where_a_reference_fails(tmp_path: Path) -> None:
    broken = {
        "task_id": "own/0",
        "prompt": 'def f():\n    """Two."""\n',
        "entry_point": "f",
        "canonical_solution": "    return 1\n",
    }
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "HumanEval.jsonl", [{**broken, "test": "def check(f):\n    assert f() == 2\n"}])
    path = write_lines(tmp_path / "c.jsonl", [{"task_id": "own/0", "completion": "    return 2\n"}])
    options = Options(tmp_path / "out", data=data, hub=False, completions={"humaneval": path})
    facts = run_suite(suite_of(None), None, options)["tasks"]["humaneval"]
    assert facts["state"] == "refused" and "1 of 1 reference solutions do not pass here" in facts["why"]
    assert "own/0: wrong-answer" in facts["why"] and not facts.get("scores")


def test_results_of_something_else_are_not_mixed_in(roomy_model: Path, tmp_path: Path) -> None:
    path = right_answers(tmp_path / "c.jsonl", 3)
    options = Options(tmp_path / "out", hub=False, completions={"humaneval": path})
    run_suite(suite_of(), None, options)
    with pytest.raises(ValueError, match="holds the evaluation of stored completions with the suite one"):
        run_suite(Suite("two", suite_of().tasks), None, options)
    with pytest.raises(ValueError, match="holds the evaluation of stored completions"):
        run_suite(suite_of(), target_of(roomy_model), Options(tmp_path / "out", hub=False))


def test_what_a_model_cannot_do_is_refused_by_name_and_is_no_zero(
    roomy_model: Path, tiny_parent: Path, tmp_path: Path
) -> None:
    tasks = {
        "chat": TaskSettings("humaneval", form="chat", limit=1, max_new_tokens=4),
        "losses": TaskSettings("held-out"),
        "spans": TaskSettings("humaneval-infilling-random-span", limit=1),
    }
    target = target_of(roomy_model)
    facts = run_suite(Suite("refused", tasks), target, Options(tmp_path / "out", hub=False))["tasks"]
    target.close()
    assert [facts[name]["state"] for name in tasks] == ["refused"] * 3
    assert "no chat template" in facts["chat"]["why"] and "--rows" in facts["losses"]["why"]
    assert "HumanEval-RandomSpanInfilling.jsonl.gz" in facts["spans"]["why"]
    narrow = target_of(tiny_parent)  # 128 positions
    found = run_suite(suite_of(1, max_new_tokens=4), narrow, Options(tmp_path / "narrow", hub=False))["tasks"]["humaneval"]
    narrow.close()
    assert found["state"] == "refused" and "no prompt fits into the model's context of 128 tokens" in found["why"]


def test_infilling_is_refused_where_its_tokens_were_only_added(roomy_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from codetune.tokens import open_codec

    grown = tmp_path / "grown"
    shutil.copytree(roomy_model, grown)
    codec = open_codec(grown)
    infill = codec.need_infill()
    weights = load_file(grown / "model.safetensors")
    rows = [infill.prefix, infill.suffix, infill.middle, infill.end]
    assert infill_trained(grown, codec) is None  # nothing tells
    weights["model.embed_tokens.weight"][rows] = weights["model.embed_tokens.weight"].mean(0)
    save_file(weights, grown / "model.safetensors", metadata={"format": "pt"})
    assert infill_trained(grown, codec) is False
    target = target_of(grown)
    tasks = {"infilling": TaskSettings("humaneval-infilling-single-line", limit=1, max_new_tokens=4)}
    facts = run_suite(Suite("infilling", tasks), target, Options(tmp_path / "out", hub=False))["tasks"]["infilling"]
    target.close()
    assert facts["state"] == "refused" and "never trained" in facts["why"]


@pytest.mark.parametrize("trained", [True, False])
def test_manifests_say_whether_infilling_was_trained_here_or_before(
    roomy_model: Path, tmp_path: Path, trained: bool
) -> None:
    from codetune.tokens import open_codec

    parent, child = tmp_path / "parent", tmp_path / "child"
    shutil.copytree(roomy_model, child)
    parent.mkdir()
    tokens = {"python": {"plain": 5, **({"psm": 3} if trained else {})}}
    (parent / "manifest.json").write_text(json.dumps({"ledger": {"tokens": tokens}, "parent": None}))
    (child / "manifest.json").write_text(json.dumps({"ledger": {"tokens": {}}, "parent": {"path": str(parent)}}))
    assert infill_trained(child, open_codec(child)) is trained


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{benchmark: humaneval, k: [1, 100], samples: 20, temperature: 0.8}", "pass@100 is undefined for 20 samples"),
        ("{benchmark: humaneval, samples: 2}", "2 greedy samples are one sample"),
        ("{benchmark: humaneval, tempreature: 1}", "tempreature"),
        ("{benchmark: humaneval, limit: 0}", "`limit` is 0"),
    ],
)
def test_a_suite_that_cannot_be_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(f"name: s\ntasks:\n  one: {line}\n")
    with pytest.raises(ValueError, match=message):
        load_suite(path)


def test_unknown_names_are_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no benchmark `humanevl` for a suite.*did you mean humaneval"):
        run_suite(Suite("s", {"one": TaskSettings("humanevl")}), None, Options(tmp_path / "a", hub=False))
    with pytest.raises(ValueError, match="has no task mbpp"):
        run_suite(suite_of(), None, Options(tmp_path / "b", hub=False, tasks=("mbpp",)))
    with pytest.raises(ValueError, match="HumanEval/999 not in humaneval"):
        run_suite(suite_of(ids=("HumanEval/999",)), None, Options(tmp_path / "c", hub=False))
    with pytest.raises(SystemExit) as end:
        main(["--suite", str(tmp_path / "none.yaml"), "--out", str(tmp_path)])
    assert end.value.code == 2 and "no such recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verdict", "reason", "expected"),
    [
        (Verdict.PASS, "tests-completed", Reason.PASSED),
        (Verdict.FAIL, "assertion", Reason.WRONG),
        (Verdict.FAIL, "signal-SIGSEGV", Reason.CRASHED),
        (Verdict.FAIL, "tests-signal-SIGKILL", Reason.CRASHED),
        (Verdict.TIMEOUT, "wall", Reason.TIMEOUT),
        (Verdict.FAIL, "memory", Reason.RESOURCE),
        (Verdict.UNSUPPORTED, "argument", Reason.UNSUPPORTED),
        (Verdict.FAIL, "something new", Reason.OTHER),
    ],
)
def test_reasons_are_a_closed_set(verdict: Verdict, reason: str, expected: Reason) -> None:
    assert reason_of(ExecutionResult(verdict, reason)) is expected
