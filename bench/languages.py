"""Forty answers in each language, half of them wrong in five ways, by real compilers in the sandbox.

Reference: the kind of each answer, by construction. The wrong ones give a wrong value, do not compile, end with exit code 0,
crash, or never end. A language without its tools is left out, and named.
"""

from __future__ import annotations

import json

from codetune.problems import MULTIPL_E_LANGUAGES, FunctionProblem, Loaded
from codetune.sandbox import Sandbox
from codetune.sandbox_languages import find_language
from eval.languages import PROBES, MultiplE
from eval.tasks import TaskSettings

MINUTES = 8
EACH = 20
# Ways that the probes of eval.languages do not have: a crash, and no end.
MORE = {
    "cpp": ("{h}    __builtin_trap();", "{h}    volatile bool on = true; while (on) {{}} return 0;"),
    "java": ("{h}        throw new RuntimeException();\n", "{h}        while (x == x) {{}} return 0;\n"),
    "javascript": ("{h}  throw new Error('no');\n}}", "{h}  while (true) {{}}\n}}"),
    "bash": ("{h}    kill -SEGV $$", "{h}    while true; do :; done"),
    "php": ("{h}    throw new Exception('no');\n}}", "{h}    while (true) {{}}\n}}"),
    "typescript": ("{h}  throw new Error('no');\n}}", "{h}  while (true) {{}}\n}}"),
    "csharp": ('{h}        throw new Exception("no");\n', "{h}        while (x == x) {{}} return 0;\n"),
    "go": ('{h}    panic("no")\n}}', "{h}    for {{}}\n}}"),
    "rust": ('{h}    panic!("no")', "{h}    loop {{}}"),
}
HEADS = {
    "cpp": "#include<assert.h>\nlong f(long x) {\n",
    "java": "class Problem {\n    public static long f(long x) {\n",
    "javascript": "function f(x){\n",
    "bash": "f() {\n",
    "php": "<?php\nfunction f($x) {\n",
    "typescript": "function f(x: number): number {\n",
    "csharp": "using System;\nusing System.Diagnostics;\nclass Problem {\n    public static long F(long x) {\n",
    "go": 'package f_test\n\nimport (\n    "testing"\n    "fmt"\n)\n\nfunc f(x int) int {\n',
    "rust": "fn f(x: isize) -> isize {\n",
}
SHORT = {name: short for short, name in MULTIPL_E_LANGUAGES.items()}


def numbered(program: str, remark: str, language: str) -> str:
    """The program with a remark of its own, so that none is another's text; PHP's first line must stay the first."""
    mark = "#" if language == "bash" else "//"
    first, _, rest = program.partition("\n")
    return f"{first}\n{mark} {remark}\n{rest}" if language == "php" else f"{mark} {remark}\n{program}"


def main() -> None:
    figures = {}
    with Sandbox(workers=2) as sandbox:
        for language, (right, wrong, tests) in PROBES.items():
            try:
                find_language(language)
            except ValueError as error:
                print(f"{language}: left out, {error}")
                continue
            name = f"multipl-e-{SHORT[language]}"
            problem = FunctionProblem(name, "f", HEADS[language], tests, language=language)
            task = MultiplE(name, TaskSettings(name, timeout_seconds=2.0), Loaded(name, (problem,), "here", None))
            task.language = language
            ways = [*wrong, *(text.format(h=HEADS[language]) for text in MORE[language])]
            programs = [numbered(right, f"answer {number}", language) for number in range(EACH)]
            programs += [numbered(ways[number % len(ways)], f"mistake {number}", language) for number in range(EACH)]
            results = list(sandbox.run_many(task.job(program, tests) for program in programs))
            agree = sum(result.passed == (place < EACH) for place, result in enumerate(results))
            print(f"{language}: {agree} of {2 * EACH} verdicts are right ({results[0].toolchain})")
            for place, result in enumerate(results):
                if result.passed != (place < EACH):
                    print(f"  answer {place}: {result.verdict} {result.reason} {result.detail[:100]}")
            figures[language] = agree
    print("RESULT " + json.dumps({"right_of_40": figures}))
    assert all(agree == 2 * EACH for agree in figures.values())


if __name__ == "__main__":
    main()
