"""Lines behind a long context: chosen evenly over lengths, cut and compared; real copies of the data are read."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from codetune.problems import LineProblem, Loaded
from codetune.sandbox import Sandbox
from eval.infilling import Lines, balanced, length_bin
from eval.run import Options, run_suite
from eval.tasks import Asker, Suite, TaskSettings, load_suite

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
