"""Answers in other languages get the right verdict from the real compilers: forty for each, half of them wrong."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from codetune.problems import FunctionProblem, Loaded
from codetune.sandbox import Limits, Sandbox, Verdict
from codetune.sandbox_languages import find_language
from eval.grading import check_probes
from eval.languages import PROBES, MultiplE
from eval.tasks import MIB, Asker, Cut, Question, Reason, TaskRefused, TaskSettings

SHORT = {"javascript": "js", "cpp": "cpp", "java": "java", "bash": "sh"}
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
        grade = task.grade(question, Cut(text), box.run)
        assert grade.passed is (kind == "right"), (kind, grade)
        assert (grade.reason is Reason.TIMEOUT) == (kind == "endless"), grade
        assert grade.toolchain
    assert question.stop_strings == ("\n}",)


@pytest.mark.parametrize("language", ["javascript", "bash"])
def test_a_toolchain_proves_itself_before_anything_is_graded(language: str, box: Sandbox) -> None:
    task = task_of(language)
    check_probes(task, lambda: box)


def test_a_toolchain_that_calls_wrong_programs_right_is_refused(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("bash")
    right, _, tests = PROBES["bash"]
    monkeypatch.setitem(PROBES, "bash", (right, (right,), tests))
    with pytest.raises(TaskRefused, match="calls a wrong program"):
        check_probes(task, lambda: box)


def test_a_language_without_its_compiler_is_refused_and_gets_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of("cpp")
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(TaskRefused, match=r"need `g\+\+`, which is not installed"):
        task.prepare(None, lambda name: pytest.fail("nothing to load"))
    with pytest.raises(ValueError, match=r"need `g\+\+`, which is not installed"):  # in the middle of a run
        task.job("int x;", "}")


def test_java_without_the_jar_says_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CODETUNE_JAVA_JARS", raising=False)
    task = task_of("java")
    with pytest.raises(TaskRefused, match=r"org.javatuples:javatuples:1.2"):
        task.prepare(tmp_path, lambda name: pytest.fail("nothing to load"))


def test_limits_follow_the_settings() -> None:
    task = task_of("bash", timeout_seconds=7.0, memory_mib=300)
    assert task.limits() == Limits(wall_seconds=7.0, memory_bytes=300 * MIB)
    assert task.cut(Question("q", "", task.problems[0]), "  ", "eos").problem is Reason.EMPTY
    assert Verdict.TIMEOUT
