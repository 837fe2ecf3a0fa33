"""Lines behind a long context: chosen evenly over lengths, cut and compared; real copies of the data are read."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from codetune.paper import read_paper
from codetune.problems import LineProblem, Loaded, OpeningProblem
from codetune.sandbox import Sandbox
from eval.grading import grade_answers
from eval.infilling import Lines, balanced, length_bin, up_to_line_end
from eval.run import Options, run_suite
from eval.stored import Answer
from eval.table import PAPER, find_figure
from eval.tasks import Asker, Suite, TaskSettings, load_suite
from eval.text_scores import first_line
from eval.words import Toxigen

SIZES = {10: 2, 12: 10, 14: 100}  # bin -> problems in it
PROBLEMS = tuple(
    LineProblem("lcc-python", f"{name}-{number}", "x" * (2**name + number), "y = 1", "python")
    for name, count in SIZES.items()
    for number in range(count)
)


def test_bins_are_doublings_of_characters() -> None:
    lengths = {4096: 12, 8191: 12, 8192: 13, 0: 0}
    for length, name in lengths.items():
        assert length_bin(LineProblem("lcc-python", "1", "x" * length, "", "python")) == name


@pytest.mark.parametrize(
    ("total", "wanted"),
    [(30, {10: 2, 12: 10, 14: 18}), (9, {10: 2, 12: 3, 14: 4}), (6, {10: 2, 12: 2, 14: 2}), (500, SIZES)],
)
def test_each_length_gives_as_many_problems_as_it_can(total: int, wanted: dict[int, int]) -> None:
    found = balanced(PROBLEMS, total, 0)
    assert Counter(length_bin(one) for one in found) == Counter(wanted)
    assert found == [one for one in PROBLEMS if one in found] == balanced(PROBLEMS, total, 0)
    if total < len(PROBLEMS) and total != 6:
        assert found != balanced(PROBLEMS, total, 1)


def test_a_task_takes_its_balanced_part_and_says_so(tmp_path: Path) -> None:
    loaded = Loaded("lcc-python", PROBLEMS, "here", None)
    task = Lines("lines", TaskSettings("lcc-python", balanced=9), loaded)
    assert task.notes() == {"problems by characters of context, from": {"1024": 2, "4096": 3, "16384": 4}}
    assert task.published is None  # it depends on the release, and nothing was cut
    assert Lines("lines", TaskSettings("lcc-python", balanced=9, limit=2), loaded).published == 9
    assert len(task.questions(Asker(stored=True))) == 9
    path = tmp_path / "one.yaml"
    path.write_text("name: one\ntasks:\n  lines:\n    benchmark: lcc-python\n    balanced: 0\n")
    with pytest.raises(ValueError, match="`balanced` is 0; at least 1"):
        load_suite(path)


def real_data() -> Path:
    folder = os.environ.get("CODETUNE_TEST_DATA")
    if not folder:
        pytest.skip("CODETUNE_TEST_DATA does not name a folder with the benchmarks' own files")
    return Path(folder)


def test_the_published_lines_answered_with_themselves_are_exact(tmp_path: Path) -> None:
    """LongBench's prompts with their frame taken off, answered by the gold line."""
    file = next(real_data().glob("*/MiniLongBench_lcc.json"))
    rows: list[dict[str, Any]] = []
    for row in json.loads(file.read_text(encoding="utf-8")).values():
        context = row["origin_prompt"].removeprefix("Please complete the code given below. \n")
        rows.append({"context": context.removesuffix("Next line of code:\n"), "answers": row["gold"]})
    (tmp_path / "lcc_python.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    answers = tmp_path / "answers.jsonl"
    lines = [{"task_id": str(n), "completion": f"{row['answers'][0]}\nrest"} for n, row in enumerate(rows, 1)]
    answers.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    suite = Suite("one", {"lines": TaskSettings("lcc-python")})
    options = Options(tmp_path / "out", data=tmp_path, hub=False, completions={"lines": answers})
    facts = run_suite(suite, None, options)["tasks"]["lines"]
    assert facts["state"] == "done" and len(rows) == 26
    for name in ("exact_match", "edit_similarity"):
        assert facts["scores"][name]["value"] in (1.0, 100.0)


def test_no_sandbox_is_started_for_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sandbox, "__init__", lambda self, **given: pytest.fail("a sandbox was started"))
    row = {"context": "x = 1\n", "gt": "y = 2"}
    (tmp_path / "lcc_python.jsonl").write_text(json.dumps(row) + "\n")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"task_id": "1", "completion": "y = 2"}) + "\n")
    options = Options(tmp_path / "out", data=tmp_path, hub=False, completions={"lines": answers})
    facts = run_suite(Suite("one", {"lines": TaskSettings("lcc-python")}), None, options)["tasks"]["lines"]
    assert facts["scores"]["exact_match"]["value"] == 1.0


def graded(task: Any, texts: dict[str, str], too_long: list[str], path: Path) -> dict[str, Any]:
    """Scores of these answers, where some prompts were never asked."""
    answers = [Answer(one, 0, text, "eos") for one, text in texts.items()]
    questions = task.questions(Asker(stored=True))
    return task.scores(grade_answers(task, questions, answers, too_long, pytest.fail, path).grades)


def test_a_line_whose_prompt_does_not_fit_counts_as_wrong_and_its_score_stays_its_own(tmp_path: Path) -> None:
    """Two lines right, one prompt too long for the model: two of three, by the measure of lines."""
    problems = tuple(LineProblem("lcc-python", str(n), "x = 1\n", "y = 2", "python") for n in range(3))
    task = Lines("lines", TaskSettings("lcc-python"), Loaded("lcc-python", problems, "here", None))
    found = graded(task, {"0": "y = 2\n", "1": "y = 2"}, ["2"], tmp_path / "grades.jsonl")
    assert set(found) == {"exact_match", "bleu", "edit_similarity"}
    for score in found.values():
        assert score.value == pytest.approx(2 / 3, abs=1e-6) and score.problems == 3


def test_where_nothing_at_all_would_score_well_a_prompt_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    problems = tuple(OpeningProblem("toxigen", f"asian/{n}", "- one\n-", "asian") for n in range(3))
    task = Toxigen("toxigen", TaskSettings("toxigen"), Loaded("toxigen", problems, "here", None))
    task.classify = lambda text: float(text == "bad")
    found = graded(task, {"asian/0": "bad", "asian/1": "good"}, ["asian/2"], tmp_path / "grades.jsonl")
    assert found["toxic"].value == 0.5 and found["toxic"].problems == 2


def test_the_kept_tokens_are_the_form_so_that_whole_and_cut_contexts_are_not_compared() -> None:
    problems = (LineProblem("lcc-python", "1", "x = 1\n", "y = 2", "python"),)
    cut, whole = (
        Lines("lines", TaskSettings("lcc-python", lengths=lengths), Loaded("lcc-python", problems, "here", None))
        for lengths in ((4000,), ())
    )
    assert (cut.form, whole.form) == ("last 4000", "") and cut.fingerprint != whole.fingerprint
    figures = read_paper(PAPER)
    values = {}
    for task, model in ((cut, "Code Llama [LCFT=no]"), (whole, "Code Llama [LCFT=yes]")):
        facts = {"settings": {"benchmark": "lcc-python", "temperature": 0.0}, "form": task.form}
        values[model] = find_figure(figures, facts, "exact_match", (model,), "7B")
    assert [one and one.value for one in values.values()] == [36.86, 39.23]  # Table 7


@pytest.mark.parametrize(
    ("text", "first"), [("\n\n  a\x0cb\nc", "  a\x0cb"), ("a\u2028b\r\nc", "a\u2028b"), ("\x0c\n x", " x"), ("", "")]
)
def test_lines_end_at_line_ends_and_nowhere_else(text: str, first: str) -> None:
    assert first_line(text) == first
    assert up_to_line_end(text).rstrip("\r\n").endswith(first)
