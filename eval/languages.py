"""MultiPL-E: HumanEval in other languages, with their real compilers.

What comes in: MultiPL-E's records, with stop strings and tests of their own. What goes out: tasks whose answers are
compiled and run with their tests in the sandbox, in the program's own process (so are the tests written); a mark behind
the last test, new for each run, is what exit codes cannot fake.

Before anything is graded the toolchain proves itself: a right program must pass and three wrong ones must fail. A
toolchain that is not here refuses the task. Java's problems import javatuples: the jar is looked for in the data folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codetune.problems import FunctionProblem
from codetune.sandbox import Job
from codetune.sandbox_languages import JARS, LANGUAGES, find_language
from eval.tasks import Asker, Cut, Grade, Question, Reason, Run, Task, TaskRefused

CSHARP = "using System;\nusing System.Diagnostics;\nclass Problem {\n    public static long F(long x) {\n"
# A function, its test and ways to get it wrong, in the form of MultiPL-E's records: the tests bring the last brace.
PROBES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "cpp": (
        "#include<assert.h>\nlong f(long x) {\n    return x + 1;",
        (
            "#include<assert.h>\nlong f(long x) {\n    return x;",
            "#include<assert.h>\nlong f(long x) {\n    return y;",
            "#include<assert.h>\n#include<stdlib.h>\nlong f(long x) {\n    exit(0);",
        ),
        "}\nint main() {\n    auto candidate = f;\n    assert(candidate((1)) == (2));\n}\n",
    ),
    "java": (
        "class Problem {\n    public static long f(long x) {\n        return x + 1;\n",
        (
            "class Problem {\n    public static long f(long x) {\n        return x;\n",
            "class Problem {\n    public static long f(long x) {\n        return y;\n",
            "class Problem {\n    public static long f(long x) {\n        System.exit(0); return x;\n",
        ),
        "    }\n    public static void main(String[] args) {\n    assert(f((1l)) == (2l));\n    }\n\n}\n",
    ),
    "javascript": (
        "function f(x){\n  return x + 1;\n}",
        ("function f(x){\n  return x;\n}", "function f(x){\n  return (;\n}", "function f(x){\n  process.exit(0);\n}"),
        "const assert = require('node:assert');\nfunction test() {\n  let candidate = f;\n  "
        "assert.deepEqual(candidate(1),2);\n}\n\ntest();",
    ),
    "bash": (
        "f() {\n    echo $(($1 + 1))",
        ("f() {\n    echo $1", "f() {\n    echo $((", 'f() {\n    kill -9 $$; echo "$1"'),
        '}\n\ncandidate() {\n    f "$@"\n}\n\nset -e\nrun_test() {\n    [[ $(candidate "1") = "2" ]]\n}\n\nrun_test',
    ),
    "php": (
        "<?php\nfunction f($x) {\n    return $x + 1;\n}",
        (
            "<?php\nfunction f($x) {\n    return $x;\n}",
            "<?php\nfunction f($x) {\n    return (;\n}",
            "<?php\nfunction f($x) {\n    exit(0);\n}",
            "<?php\nfunction f($x) {\n    return $x;\n}\n?>",  # what follows is text then, and is printed
        ),
        "function candidate(...$args) {\n    return f(...$args);\n}\n\nfunction test(): void {\n"
        '    if (candidate(1) !== 2) { throw new Exception("Test failed!"); }\n}\n\ntest();',
    ),
    "typescript": (
        "function f(x: number): number {\n  return x + 1;\n}",
        (
            "function f(x: number): number {\n  return x;\n}",
            "function f(x: number): number {\n  return 'x';\n}",  # an error of types
            "function f(x: number): number {\n  require('node:process').exit(0);\n}",
        ),
        "declare var require: any;\nconst assert = require('node:assert');\n\nfunction test() {\n  let candidate = f;\n"
        "  assert.deepEqual(candidate(1),2);\n}\n\ntest();",
    ),
    "csharp": (
        f"{CSHARP}        return x + 1;\n",
        (
            f"{CSHARP}        return x;\n",
            f"{CSHARP}        return y;\n",
            f"{CSHARP}        Environment.Exit(0); return x;\n",
        ),
        "    }\n    public static void Main(string[] args) {\n    Debug.Assert(F((1L)) == (2L));\n    }\n\n}\n",
    ),
    "go": (
        'package f_test\n\nimport (\n    "testing"\n    "fmt"\n    "os"\n)\n\nfunc f(x int) int {\n'
        "    if x < 0 { os.Exit(3) }\n    return x + 1\n}\n",
        (
            'package f_test\n\nimport (\n    "testing"\n    "fmt"\n)\n\nfunc f(x int) int {\n    return x\n}\n',
            'package f_test\n\nimport (\n    "testing"\n    "fmt"\n)\n\nfunc f(x int) int {\n    return y\n}\n',
            'package f_test\n\nimport (\n    "testing"\n    "fmt"\n    "os"\n)\n\nfunc f(x int) int {\n    os.Exit(0)\n'
            "    return x\n}\n",
        ),
        "func TestF(t *testing.T) {\n  candidate := f\n\ttype test struct {\n\t\tactual   interface{}\n"
        "\t\texpected interface{}\n\t}\n   tests := []test{\n     { actual: candidate(1), expected: 2 },\n   }\n\n"
        '\tfor i, tc := range tests {\n\t\tt.Run(fmt.Sprintf("test num % d", i), func(t *testing.T) {\n'
        '\t\t\tif fmt.Sprintf("%v", tc.actual) != fmt.Sprintf("%v", tc.expected) {\n'
        "\t\t\t\tt.Errorf(\"expected '%s', got '%s'\", tc.expected, tc.actual)\n\t\t\t}\n\t\t})\n\t}\n}\n",
    ),
    "rust": (
        "fn f(x: isize) -> isize {\n    x + 1",
        (
            "fn f(x: isize) -> isize {\n    x",
            "fn f(x: isize) -> isize {\n    y",
            "fn f(x: isize) -> isize {\n    std::process::exit(0)",
        ),
        "}\n\nfn main() {\n    let candidate = f;\n    assert_eq!(candidate(1), 2);\n}\n",
    ),
}
BASH_TOOLS = ("bc", "awk", "rev", "sed", "tr")  # right answers call them; four of 158 recorded ones were lost without bc


class MultiplE(Task):
    """The beginning of a function in one language."""

    forms = ("unstripped", "stripped")

    def prepare(self, data: Path | None, load: Callable[[str], Any]) -> None:
        self.language = self.problems[0].language
        if self.language == "python":
            return
        if self.language not in LANGUAGES:
            raise TaskRefused(f"no runner for {self.language} in the sandbox; there are {', '.join(LANGUAGES)}")
        if self.language == "java":
            # Where problems are looked for: in the folder and one below, which may be a link.
            patterns = ("javatuples-*.jar", "*/javatuples-*.jar")
            jars = sorted(str(path.resolve()) for pattern in patterns for path in data.glob(pattern)) if data else []
            if not jars and not os.environ.get(JARS):
                raise TaskRefused(
                    "Java's problems import org.javatuples: put javatuples-1.2.jar (Maven: org.javatuples:javatuples:1.2) "
                    f"into the data folder, or name it in {JARS}"
                )
            if jars:
                os.environ[JARS] = os.pathsep.join(jars)
        try:
            find_language(self.language)
        except ValueError as error:
            raise TaskRefused(str(error)) from error
        if self.language == "bash":
            import shutil

            missing = [tool for tool in BASH_TOOLS if shutil.which(tool) is None]
            if missing:
                raise TaskRefused(
                    f"right answers in Bash call {', '.join(missing)}, which are not installed here; install them"
                )

    def question(self, problem: FunctionProblem, asker: Asker) -> Question:
        text = problem.prompt.strip() if self.form == "stripped" else problem.prompt
        return Question(problem.id, text, problem, stop_strings=problem.stop_strings)

    def cut(self, question: Question, text: str, ended: str) -> Cut:
        return Cut(text, problem=None if text.strip() else Reason.EMPTY)

    def grade(self, question: Question, cut: Cut, run: Run) -> Grade:
        problem = question.problem
        assert isinstance(problem, FunctionProblem)
        program = cut.text if cut.whole_program else question.text + cut.text
        return Grade.of_result(run(self.job(program, problem.tests)))

    def job(self, program: str, tests: str) -> Job:
        if self.language == "python":
            return Job(program, tests, judge=self.settings.judge, limits=self.limits())
        try:
            return Job(program, tests, language=self.language, judge="same-process", limits=self.limits())
        except ValueError as error:  # the toolchain was there when the task was prepared, and is not any more
            raise TaskRefused(str(error)) from error

    def probes(self) -> list[tuple[Job, bool]]:
        if self.language not in PROBES:
            return []
        right, wrong, tests = PROBES[self.language]
        return [(self.job(right, tests), True), *((self.job(program, tests), False) for program in wrong)]
