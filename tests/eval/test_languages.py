"""Answers in other languages get the right verdict from the real compilers: forty for each, half of them wrong."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from codetune.problems import FunctionProblem, Loaded
from codetune.sandbox import Limits, Sandbox, Verdict
from codetune.sandbox_languages import LANGUAGES, find_language
from eval.grading import check_probes, check_probes_again, grade_answers
from eval.languages import PROBES, MultiplE
from eval.stored import Answer
from eval.tasks import MIB, Asker, Cut, Question, Reason, TaskRefused, TaskSettings

ROOT = Path(__file__).parents[2]
SHORT = {"javascript": "js", "cpp": "cpp", "java": "java", "bash": "sh"}
SHORT |= {"php": "php", "typescript": "ts", "csharp": "cs", "go": "go", "rust": "rs"}
SLOW = {"typescript": 1.5, "go": 2.5}  # seconds of a compilation: of these only some kinds of answers are tried here
GO_TESTS = """func TestF(t *testing.T) {
  candidate := f
\ttype test struct {
\t\tactual   interface{}
\t\texpected interface{}
\t}
   tests := []test{
     { actual: candidate(1), expected: 3 },
     { actual: candidate(5), expected: 11 },
   }

\tfor i, tc := range tests {
\t\tt.Run(fmt.Sprintf("test num % d", i), func(t *testing.T) {
\t\t\tif fmt.Sprintf("%v", tc.actual) != fmt.Sprintf("%v", tc.expected) {
\t\t\t\tt.Errorf("expected '%s', got '%s'", tc.expected, tc.actual)
\t\t\t}
\t\t})
\t}
}
"""
# One small function, its tests, and answers: bodies that compute 2 * x + 1 in their own way, and bodies that do not.
FORMS = {
    "javascript": (
        "function f(x){\n",
        "const assert = require('node:assert');\nfunction test() {\n  let candidate = f;\n"
        "  assert.deepEqual(candidate(1),3);\n  assert.deepEqual(candidate(5),11);\n}\n\ntest();",
        "\n",
        (
            "  return 2 * x + 1;\n}",
            "  let y = x; y += x;\n  return y + 1;\n}",
            "  return x + x + 1;\n}",
        ),
        {
            "value": "  return 2 * x;\n}",
            "syntax": "  return 2 * ;\n}",
            "crash": "  throw new Error('no');\n}",
            "exit": "  process.exit(0);\n}",
            "endless": "  while (true) {}\n}",
        },
    ),
    "cpp": (
        "#include<assert.h>\n#include<cstdlib>\nlong f(long x) {\n",
        "}\nint main() {\n    auto candidate = f;\n    assert(candidate((1)) == (3));\n"
        "    assert(candidate((5)) == (11));\n}\n",
        "",
        ("    return 2 * x + 1;", "    long y = x; y += x;\n    return y + 1;", "    return x + x + 1;"),
        {
            "value": "    return 2 * x;",
            "syntax": "    return 2 * ;",
            "crash": "    std::abort();",
            "exit": "    exit(0);",
            "endless": "    volatile bool on = true; while (on) {} return 0;",
        },
    ),
    "java": (
        "import java.util.*;\nclass Problem {\n    public static long f(long x) {\n",
        "    }\n    public static void main(String[] args) {\n    assert(f((1l)) == (3l));\n    assert(f((5l)) == (11l));\n"
        "    }\n\n}\n",
        "",
        (
            "        return 2 * x + 1;\n",
            "        long y = x; y += x;\n        return y + 1;\n",
            "        return x + x + 1;\n",
        ),
        {
            "value": "        return 2 * x;\n",
            "syntax": "        return 2 * ;\n",
            "crash": "        throw new RuntimeException();\n",
            "exit": "        System.exit(0); return 0;\n",
            "endless": "        while (x == x) {} return 0;\n",
        },
    ),
    "bash": (
        "f() {\n",
        '}\n\ncandidate() {\n    f "$@"\n}\n\nset -e\nrun_test() {\n    [[ $(candidate "1") = "3" ]]\n'
        '    [[ $(candidate "5") = "11" ]]\n}\n\nrun_test',
        "",
        ("    echo $((2 * $1 + 1))", '    local y=$(($1 + $1))\n    echo "$((y + 1))"', '    echo "2 * $1 + 1" | bc'),
        {
            "value": "    echo $((2 * $1))",
            "syntax": "    echo $((2 * ",
            "crash": "    kill -SEGV $$",
            "exit": "    kill $$; exit 0",
            "endless": "    while true; do :; done",
        },
    ),
    "php": (
        "<?php\nfunction f($x) {\n",
        "function candidate(...$args) {\n    return f(...$args);\n}\n\nfunction test(): void {\n"
        '    if (candidate(1) !== 3) { throw new Exception("Test failed!"); }\n'
        '    if (candidate(5) !== 11) { throw new Exception("Test failed!"); }\n}\n\ntest();',
        "",
        ("    return 2 * $x + 1;\n}", "    $y = $x; $y += $x;\n    return $y + 1;\n}", "    return $x + $x + 1;\n}"),
        {
            "value": "    return 2 * $x;\n}",
            "syntax": "    return 2 * ;\n}",
            "crash": "    throw new Exception('no');\n}",
            "exit": "    exit(0);\n}",
            "endless": "    while (true) {}\n}",
        },
    ),
    "typescript": (
        "function f(x: number): number {\n",
        "declare var require: any;\nconst assert = require('node:assert');\n\nfunction test() {\n  let candidate = f;\n"
        "  assert.deepEqual(candidate(1),3);\n  assert.deepEqual(candidate(5),11);\n}\n\ntest();",
        "\n",
        ("  return 2 * x + 1;\n}", "  let y = x; y += x;\n  return y + 1;\n}", "  return x + x + 1;\n}"),
        {
            "value": "  return 2 * x;\n}",
            "syntax": '  return "2";\n}',
            "crash": "  throw new Error('no');\n}",
            "exit": "  require('node:process').exit(0);\n}",
            "endless": "  while (true) {}\n}",
        },
    ),
    "csharp": (
        "using System;\nusing System.Diagnostics;\nclass Problem {\n    public static long F(long x) {\n",
        "    }\n    public static void Main(string[] args) {\n    Debug.Assert(F((1L)) == (3L));\n"
        "    Debug.Assert(F((5L)) == (11L));\n    }\n\n}\n",
        "",
        (
            "        return 2 * x + 1;\n",
            "        long y = x; y += x;\n        return y + 1;\n",
            "        return x + x + 1;\n",
        ),
        {
            "value": "        return 2 * x;\n",
            "syntax": "        return 2 * ;\n",
            "crash": '        throw new Exception("no");\n',
            "exit": "        Environment.Exit(0); return 0;\n",
            "endless": "        while (x == x) {} return 0;\n",
        },
    ),
    "go": (
        'package f_test\n\nimport (\n    "testing"\n    "fmt"\n    "os"\n)\n\nfunc f(x int) int {\n'
        "    if x < 0 { os.Exit(3) }\n",
        GO_TESTS,
        "\n",
        ("    return 2 * x + 1\n}", "    y := x\n    y += x\n    return y + 1\n}", "    return x + x + 1\n}"),
        {
            "value": "    return 2 * x\n}",
            "syntax": "    return 2 * \n}",
            "crash": '    panic("no")\n}',
            "exit": "    os.Exit(0)\n    return 0\n}",
            "endless": "    for {}\n}",
        },
    ),
    "rust": (
        "fn f(x: isize) -> isize {\n",
        "}\n\nfn main() {\n    let candidate = f;\n    assert_eq!(candidate(1), 3);\n    assert_eq!(candidate(5), 11);\n}\n",
        "",
        ("    2 * x + 1", "    let mut y = x; y += x;\n    y + 1", "    return x + x + 1;"),
        {
            "value": "    2 * x",
            "syntax": "    2 * ",
            "crash": '    panic!("no")',
            "exit": "    std::process::exit(0)",
            "endless": "    loop {}",
        },
    ),
}


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(workers=2) as sandbox:
        if sandbox.tier == "landlock":
            pytest.skip("the isolation `landlock` runs no compilers")
        yield sandbox


def task_of(language: str, **settings: float) -> MultiplE:
    try:
        find_language(language)
    except ValueError as error:
        pytest.skip(str(error))
    prompt, tests, _, _, _ = FORMS[language]
    problem = FunctionProblem(
        f"multipl-e-{SHORT[language]}", "twice", prompt, tests, language=language, stop_strings=("\n}",)
    )
    task = MultiplE("t", TaskSettings(problem.benchmark, **settings), Loaded(problem.benchmark, (problem,), "here", None))
    task.language = language
    return task


def answers(language: str) -> list[tuple[str, str]]:
    """Forty answers: (kind, text); variants differ by names and remarks, so that none is another's text."""
    _, _, _, right, wrong = FORMS[language]
    remark = "#" if language == "bash" else "//"
    made = [("right", f"{remark} way {number}\n{right[number % len(right)]}") for number in range(20)]
    kinds = list(wrong)
    return made + [(kinds[n % 5], f"{remark} mistake {n}\n{wrong[kinds[n % 5]]}") for n in range(20)]


@pytest.mark.parametrize("language", FORMS)
def test_each_kind_of_answer_gets_its_verdict(language: str, box: Sandbox) -> None:
    """One answer of each kind here; `make bench ONLY=languages` runs forty for each language."""
    task = task_of(language, timeout_seconds=1.0)
    (question,) = task.questions(Asker(stored=True))
    for kind, text in dict(answers(language)).items():  # the last one of each kind
        if language in SLOW and kind not in ("right", "exit"):  # the suite of Table 4 has the others
            continue
        grade = task.grade(question, Cut(text), box.run)
        assert grade.passed is (kind == "right"), (kind, grade)
        assert (grade.reason is Reason.TIMEOUT) == (kind == "endless"), grade
        assert grade.toolchain
    assert question.stop_strings == ("\n}",)


@pytest.mark.parametrize("language", ["javascript", "bash", "php", "csharp", "rust"])
def test_a_toolchain_proves_itself_before_anything_is_graded(language: str, box: Sandbox) -> None:
    task = task_of(language)
    check_probes(task, lambda: box)


def test_a_toolchain_that_calls_wrong_programs_right_is_refused(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("bash")
    right, _, tests = PROBES["bash"]
    monkeypatch.setitem(PROBES, "bash", (right, (right,), tests))
    with pytest.raises(TaskRefused, match="calls a wrong program"):
        check_probes(task, lambda: box)


def test_a_toolchain_that_goes_in_mid_run_leaves_no_grade(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is there when grading begins, and calls right programs wrong at its end: this run's grades are taken back."""
    task = task_of("bash")
    (question,) = task.questions(Asker(stored=True))
    path = tmp_path / "grades.jsonl"
    answers = [Answer(question.id, number, f"# way {number}\n{FORMS['bash'][3][0]}", "given") for number in range(3)]
    before = grade_answers(task, [question], answers[:1], [], lambda: box, path)
    check_probes_again(task, lambda: box, path, before)
    kept = path.read_bytes()
    assert kept.count(b"\n") == 1 and before.grades[question.id][0].passed
    graded = grade_answers(task, [question], answers, [], lambda: box, path)
    assert graded.graded_now == 2 and path.read_bytes().count(b"\n") == 3
    _, wrong, tests = PROBES["bash"]
    monkeypatch.setitem(PROBES, "bash", ("f() {\n    no_such_tool", wrong, tests))  # what its right program calls has gone
    with pytest.raises(TaskRefused, match="the 2 grades of this run are taken back.*calls a right program"):
        check_probes_again(task, lambda: box, path, graded)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_every_row_says_how_it_is_installed_and_has_programs_to_prove_it(language: str) -> None:
    row = LANGUAGES[language]
    assert row.install in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    right, wrong, tests = PROBES[language]
    marked = row.mark(f"{right}\n{tests}", "the-mark")
    assert "the-mark" in marked and len(wrong) >= 3
    assert row.version[0] in (*row.tools, "g++", "javac")


def test_a_compiler_that_programs_cannot_reach_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rustc").write_text("#!/bin/sh\necho rustc 99\n")
    (tmp_path / "rustc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))  # as in somebody's home
    monkeypatch.setattr("codetune.sandbox_languages.PROGRAM_PATH", str(tmp_path / "empty"))
    assert shutil.which("rustc") == str(tmp_path / "rustc")
    with pytest.raises(ValueError, match=r"need `rustc`, which is not installed here, in .*apt install rustc"):
        find_language("rust")


def test_a_language_without_its_compiler_is_refused_and_gets_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("cpp")
    monkeypatch.setattr(shutil, "which", lambda tool, path: None)
    with pytest.raises(TaskRefused, match=r"need `g\+\+`, which is not installed"):
        task.prepare(None, lambda name: pytest.fail("nothing to load"))
    with pytest.raises(TaskRefused, match=r"need `g\+\+`, which is not installed"):  # in the middle of a run
        task.job("int x;", "}")


def test_java_without_the_jar_says_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CODETUNE_JAVA_JARS", raising=False)
    task = task_of("java")
    with pytest.raises(TaskRefused, match=r"org.javatuples:javatuples:1.2"):
        task.prepare(tmp_path, lambda name: pytest.fail("nothing to load"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere" / "javatuples-1.2.jar").write_bytes(b"")
    (tmp_path / "data" / "multipl_e").symlink_to(tmp_path / "elsewhere")  # a link, as problems are found behind one too
    monkeypatch.setenv("CODETUNE_JAVA_JARS", "")
    task.prepare(tmp_path / "data", lambda name: pytest.fail("nothing to load"))
    assert os.environ["CODETUNE_JAVA_JARS"] == str((tmp_path / "elsewhere" / "javatuples-1.2.jar").resolve())


def test_limits_follow_the_settings() -> None:
    task = task_of("bash", timeout_seconds=7.0, memory_mib=300)
    assert task.limits() == Limits(wall_seconds=7.0, memory_bytes=300 * MIB)
    assert task.cut(Question("q", "", task.problems[0]), "  ", "eos").problem is Reason.EMPTY
    assert Verdict.TIMEOUT
