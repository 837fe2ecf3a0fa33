"""Tables say which differences mean something; pictures are drawn from files, or say what is missing."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codetune.artifacts import write_results
from codetune.paper import Figure, cut_suite, paper_value, read_paper
from codetune.problems import Loaded, TaskProblem
from eval.functions import Mbpp
from eval.pictures import attention_by_distance, density, draw_all, graded_rows, runs_from_scratch
from eval.run import data_facts
from eval.scores import language_correlation
from eval.table import PAPER, against_paper, compare, each_problem, find_figure, main, paper_columns
from eval.tasks import TaskSettings

PAPER_MBPP = Figure("T2", "mbpp", "three-shot", "pass@1", "Code Llama", "7B", 41.4)


def results_of(values: dict[str, float], name: str = "ours", benchmark: str = "humaneval", **model: Any) -> dict[str, Any]:
    mean = sum(values.values()) / len(values)
    score = {
        "value": mean,
        "low": mean - 0.07,
        "high": mean + 0.07,
        "problems": len(values),
        "samples": 1,
        "decoding": "greedy",
    }
    data = {"source": "here", "read": 164, "published": 164, "asked": len(values), "fingerprint": "f"}
    task = {"state": "done", "settings": {"benchmark": benchmark, "temperature": 0.0}, "form": "unstripped", "data": data}
    task |= {"scores": {"pass@1": score}, "per_problem": values}
    refused = {"state": "refused", "why": "no data", "settings": {"benchmark": "mbpp"}}
    return {
        "suite": {"name": "s"},
        "model": {"name": name, **model},
        "tasks": {"one": task, "other": refused},
        "versions": {},
    }


ALL = {f"HumanEval/{number}": float(number < 55) for number in range(164)}  # 33.5 %, as the paper has for 7B


def test_the_papers_figures_are_those_of_its_tables() -> None:
    figures = read_paper(PAPER)
    task = {"settings": {"benchmark": "humaneval", "temperature": 0.0}, "form": "unstripped"}
    wanted = {("Code Llama", "7B"): 33.5, ("Code Llama - Python", "34B"): 53.7, ("Unnatural Code Llama", "34B"): 62.2}
    for (model, size), value in wanted.items():
        found = find_figure(figures, task, "pass@1", (model,), size)
        assert found is not None and found.value == value and found.table == "T2"
    spm = {"settings": {"benchmark": "humaneval-infilling-single-line"}, "form": "spm"}
    found = find_figure(figures, spm, "pass@1", ("Code Llama [LCFT=no]",), "13B")
    assert found is not None and (found.value, found.table) == (85.9, "T14")
    assert find_figure(figures, task, "pass@1", ("Code Llama",), "3B") is None


def test_a_difference_within_the_interval_means_nothing() -> None:
    ours = results_of(ALL, size="7b", stage="lcft")
    lines = compare([ours], *paper_columns(ours["model"], None, None))
    line = next(line for line in lines if line.startswith("one"))
    assert line.split()[-7:-5] == ["[26.5,", "40.5]"] or "33.5" in line
    assert "within our interval: means nothing" in line
    low = copy.deepcopy(ours)
    low["tasks"]["one"]["scores"]["pass@1"].update(value=0.1, low=0.05, high=0.15)
    assert "outside our interval: -23.5" in "\n".join(compare([low], ("Code Llama",), "7B", True))
    assert "another size" in "\n".join(compare([low], ("Code Llama",), "7B", False))
    few = results_of({"HumanEval/0": 1.0}, size="7b", stage="lcft")
    assert "1 of 164 problems: not comparable" in "\n".join(compare([few], ("Code Llama",), "7B", True))
    assert "refused: no data" in "\n".join(lines)


def test_results_of_the_same_problems_are_compared_in_pairs() -> None:
    better = {name: 1.0 if number < 75 else value for number, (name, value) in enumerate(ALL.items())}
    text = "\n".join(compare([results_of(better), results_of(ALL, "theirs")], ("Code Llama",), "7B", False))
    assert "(1) +12.2" in text and "differs" in text
    text = "\n".join(compare([results_of(ALL), results_of(ALL, "theirs")], ("Code Llama",), "7B", False))
    assert "+0.0 [+0.0, +0.0] means nothing" in text
    other = results_of(ALL, "theirs")
    other["tasks"]["one"]["form"] = "chat"
    assert "other form or decoding: not comparable" in "\n".join(
        compare([results_of(ALL), other], ("Code Llama",), "7B", False)
    )


def test_a_difference_is_that_of_its_own_score() -> None:
    """Of the file's scores, in the alphabet's order, the one that the problems' figures make up; pass@k of counts."""
    ours, theirs = (results_of({"a": value, "b": 0.5}) for value in (1.0, 0.0))
    for one in (ours, theirs):
        score = {**one["tasks"]["one"]["scores"]["pass@1"], "samples": 4}
        one["tasks"]["one"] |= {"scores": {"bleu": score, "exact_match": score}, "per_problem_of": "exact_match"}
    bleu, exact = compare([ours, theirs], ("Code Llama",), "7B", False)[4:6]
    assert "not paired" in bleu and "(1) +50.0" in exact
    for one in (ours, theirs):
        score = one["tasks"]["one"]["scores"]["bleu"]
        one["tasks"]["one"] |= {"scores": {"introductory/pass@2": score, "pass@2": score}, "per_problem_of": "pass@1"}
    level, pair = compare([ours, theirs], ("Code Llama",), "7B", False)[4:6]
    assert "not paired" in level and "(1) +50.0" in pair
    assert each_problem(ours["tasks"]["one"], "pass@2") == pytest.approx({"a": 1.0, "b": 5 / 6})


def test_scores_at_other_temperatures_have_their_own_rows_in_the_paper() -> None:
    task = {"settings": {"benchmark": "humaneval", "temperature": 0.1}, "form": "unstripped"}
    found = find_figure(read_paper(PAPER), task, "pass@100", ("Code Llama [FIM=yes,LCFT=no]",), "7B")
    assert found is not None and (found.value, found.table) == (48.8, "T5")


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = results_of(ALL)
    half = {"value": 0.5, "low": 0.4, "high": 0.6, "problems": 64, "samples": 1, "decoding": "greedy"}
    ours["tasks"]["keys"] = {
        "state": "done",
        "settings": {"benchmark": "keys"},
        "scores": {f"key/{tokens}/{depth:g}/found": half for tokens in (64, 128) for depth in (0.0, 0.4)},
    }
    ours["tasks"]["context"] = {
        "state": "done",
        "settings": {"benchmark": "context"},
        "scores": {"last/64": 3.0, "last/128": 2.5, "position/64": 3.1, "documents": 2.0},
    }
    for temperature in (0.1, 0.8):
        task = copy.deepcopy(ours["tasks"]["one"])
        task["settings"]["temperature"] = temperature
        task["scores"]["pass@1"]["decoding"] = "sampled"
        ours["tasks"][f"t{temperature}"] = task
    facts = {"state": "done", "scores": {}, "data": {"fingerprint": "f"}}
    ours["tasks"]["lines"] = {**facts, "settings": {"benchmark": "lcc-python"}}
    row = {"task": "f", "sample": 0, "prompt_tokens": 100, "figures": {"exact_match": 1.0}}
    (tmp_path / "lines.grades.jsonl").write_text("".join(f"{json.dumps({**row, 'prompt_id': n})}\n" for n in range(6)))
    ours["tasks"]["bad"] = {**facts, "settings": {"benchmark": "malicious-prompts"}, "notes": {"judge": "refusals"}}
    rows = [{"task": "f", "prompt_id": n, "sample": 0, "figures": {"reward": float(n)}} for n in range(2)]
    (tmp_path / "bad.grades.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    runs = [tmp_path / "stage1", tmp_path / "stage1-scratch"]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"tokens": 10, "loss": 5.0}\n{"tokens": 20, "loss": 4.0}\n')
    write_results(tmp_path, ours)
    main([str(tmp_path), "--pictures", str(tmp_path / "pictures"), "--runs", *map(str, runs)])
    text = capsys.readouterr().out
    drawn = {path.stem for path in (tmp_path / "pictures").glob("*.png")}
    assert drawn == {f"figure{name}" for name in ("4a", "4b", "5a", "5b", "6", "7", "9a", "9b")}
    assert runs_from_scratch(runs[:1]) == [] and runs_from_scratch([*runs, tmp_path / "lcft"]) == runs
    assert "figure3: not drawn: a correlation takes MultiPL-E results of two languages or more from three" in text


def test_a_picture_is_drawn_of_the_grades_that_the_results_are_of(tmp_path: Path) -> None:
    """A file of grades keeps what was graded before: under other limits, and the same answer graded again."""
    lines = [("old", 0, 5.0), ("now", 0, 1.0), ("now", 1, 2.0), ("now", 1, 3.0)]
    rows = [{"task": key, "prompt_id": "p", "sample": sample, "figures": value} for key, sample, value in lines]
    (tmp_path / "one.grades.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = {"state": "done", "data": {"fingerprint": "now"}}
    assert [row["figures"] for row in graded_rows(tmp_path, "one", task)] == [1.0, 3.0]
    assert graded_rows(tmp_path, "one", {**task, "state": "refused"}) == []


@pytest.mark.parametrize(
    ("benchmark", "form", "temperature", "metric", "model", "value"),
    [
        ("mbpp", "zero-shot", 0.0, "pass@1", {"size": "7b", "stage": "instruct"}, 37.4),  # Table 8, with self-instruct
        ("mbpp", "zero-shot", 0.0, "pass@1", {"size": "13b", "stage": "instruct-no-self-instruct"}, 20.4),  # and without
        ("humaneval", "unstripped", 0.0, "pass@1", {"size": "7b", "stage": "instruct-no-self-instruct"}, 30.5),
        ("toxigen", "", 0.1, "toxic", {"size": "7b", "stage": "lcft"}, 22.64),  # Table 9
        ("toxigen", "", 0.1, "toxic/middle_east", {"size": "7b", "stage": "lcft"}, None),  # Table 20, from the file below
        ("bold", "", 0.1, "sentiment", {"size": "34b", "stage": "lcft"}, 25.5),  # 0.255
        ("truthfulqa", "", 0.1, "true_and_informative", {"size": "13b", "stage": "instruct"}, 36.84),
        ("humaneval", "unstripped", 0.1, "pass@100", {"size": "7b", "stage": "stage1-plain"}, 49.9),  # Table 5, FIM 0
        ("lcc-python", "last 4000", 0.0, "exact_match", {"size": "7b", "stage": "stage1"}, 36.86),  # Table 7
        ("lcc-python", "", 0.0, "exact_match", {"size": "7b", "stage": "lcft"}, 39.23),
        ("keys", "", 0.0, "key/16000/0/found", {"size": "7b", "stage": "lcft"}, 54.7),  # Table 17
        ("keys", "", 0.0, "key/4000/0/found", {"size": "7b", "stage": "lcft-same-base"}, 33.6),  # Table 18
        ("keys", "", 0.0, "key/16000/0/found", {"size": "7b", "stage": "lcft-linear"}, 2.34),
        ("keys", "", 0.0, "key/4000/0/found", {"size": "7b", "stage": "stage1"}, 95.3),
        ("keys", "", 0.0, "key/8000/0.2/found", {"size": "7b", "stage": "stage1", "rope_base": 1e6}, 0.0),
    ],
)
def test_each_table_of_the_paper_stands_beside_its_own_runs(
    benchmark: str, form: str, temperature: float, metric: str, model: dict[str, Any], value: float | None
) -> None:
    task = {"settings": {"benchmark": benchmark, "temperature": temperature}, "form": form}
    models, size, own = paper_columns(model, None, None)
    found = find_figure(read_paper(PAPER), task, metric, models, size)
    assert own and found is not None
    assert value is None or found.in_hundredths == pytest.approx(value)


@pytest.mark.parametrize("stage", ["lcft-no-infill", "stage1-scratch", "instruct-no-rehearsal"])
def test_arms_that_the_paper_has_not_stand_beside_nothing(stage: str) -> None:
    models, _, _ = paper_columns({"size": "7b", "stage": stage}, None, None)
    assert models == () and "no row of its tables" in "\n".join(compare([results_of(ALL)], models, "7B", True))


def test_a_whole_test_split_is_no_cut_suite() -> None:
    """MBPP's file has 974 tasks, and the benchmark is 500 of them."""
    rows = tuple(TaskProblem("mbpp", str(n), n, "Do.", ("assert f(1)",), "def f(x): return x") for n in range(1, 975))
    for limit, cut in ((None, None), (20, (20, 500))):
        loaded = Loaded("mbpp", rows, "here", 974)
        task = Mbpp("mbpp", TaskSettings("mbpp", limit=limit), loaded)
        facts = {
            "settings": {"benchmark": "mbpp", "temperature": 0.0},
            "form": "three-shot",
            "data": data_facts(loaded, task),
        }
        assert cut_suite(facts) == cut
        shown = paper_value(read_paper(PAPER), facts, "pass@1", "lcft", "7b")
        assert shown == (41.4 if cut is None else None)
        remark = against_paper({"value": 0.4, "low": 0.38, "high": 0.45}, PAPER_MBPP, True, facts)
        assert remark == ("within our interval: means nothing" if cut is None else "20 of 500 problems: not comparable")


def test_correlations_are_drawn_from_three_checkpoints(tmp_path: Path) -> None:
    rows = [{"cpp": 0.1, "java": 0.2}, {"cpp": 0.2, "java": 0.4}, {"cpp": 0.3, "java": 0.5, "sh": 0.1}, {"cpp": 0.9}]
    several = []
    for row in rows:
        one = results_of(ALL)
        one["tasks"] = {k: results_of({"p": v}, benchmark=f"multipl-e-{k}")["tasks"]["one"] for k, v in row.items()}
        several.append(one)
    lines = draw_all(several, [tmp_path] * 4, [], tmp_path / "pictures")
    assert lines[0].startswith("figure3") and (tmp_path / "pictures" / "figure3.png").is_file()


def test_the_papers_seven_7b_models_correlate_as_in_worked_figures() -> None:
    """Pearson over Table 11's seven rows of 7B models, worked out with pandas."""
    wanted = {("cpp", "py"): 0.928, ("java", "cpp"): 0.963, ("cs", "java"): 0.975, ("sh", "php"): 0.931, ("ts", "py"): 0.477}
    rows: dict[str, dict[str, float]] = {}
    for one in read_paper(PAPER):
        if one.table == "T11" and one.size == "7B" and one.benchmark.startswith("multipl-e-"):
            rows.setdefault(one.model, {})[one.benchmark.removeprefix("multipl-e-")] = one.value
    assert len(rows) == 7
    found = language_correlation(
        [{name: row[name] for name in ("py", "cpp", "java", "php", "ts", "cs", "sh")} for row in rows.values()]
    )
    for pair, value in wanted.items():
        assert found[pair] == pytest.approx(value, abs=6e-4)


def test_attention_falls_more_slowly_with_the_larger_base() -> None:
    distances = np.array([0, 1, 10_000])
    small, large = (attention_by_distance(distances, base) for base in (1e4, 1e6))
    assert small[0] == large[0] == 1.0
    # one frequency of 1 (dimension 2): cos(distance)
    assert attention_by_distance(np.array([1]), 1e4, 2)[0] == pytest.approx(math.cos(1))
    assert large[2] > small[2]


def test_rewards_are_spread_as_scipy_has_it() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = np.array([-1.0, 0.5, 0.7, 2.0, 2.1])
    places = np.linspace(-3, 4, 29)
    assert density(values, places) == pytest.approx(stats.gaussian_kde(values)(places), rel=1e-9)
