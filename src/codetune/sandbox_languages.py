"""How programs of each language are compiled and run in the sandbox: one row of a table per language.

In: a name. Out: file names, the compile and the run step, and where the mark goes that says "the tests ran to their
end". The trade: tests of these languages run in the program's own process (that is how MultiPL-E's are written), so a
determined program can forge a pass; the mark, new for every run, is what exit codes and ordinary printing cannot fake.
What it does not do: install toolchains. Which version ran is in every result.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Language:
    """One row: the steps, and how tests and mark join the program."""

    name: str
    file: str
    run: tuple[str, ...]
    version: tuple[str, ...]
    mark: Callable[
        [str, str], str
    ]  # (source with its tests, mark) -> source that prints the mark when the tests are through
    compile: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def tools(self) -> tuple[str, ...]:
        """The programs that must be there."""
        return tuple(dict.fromkeys(step[0] for step in (self.compile, self.run) if step and not step[0].startswith("./")))


def _at_the_end(statement: str) -> Callable[[str, str], str]:
    return lambda source, mark: f"{source}\n{statement.format(mark=mark)}\n"


def _inside_the_last(statement: str, braces: int) -> Callable[[str, str], str]:
    """Put a statement before the closing braces that end the source: the end of `main`, where its tests are."""

    def insert(source: str, mark: str) -> str:
        end = len(source)
        for _ in range(braces):
            end = source.rfind("}", 0, end)
            if end < 0:
                return source  # it will not compile, or ends without the mark: a failure either way
        return f"{source[:end]}\n{statement.format(mark=mark)}\n{source[end:]}"

    return insert


LANGUAGES = {
    row.name: row
    for row in (
        Language(
            "cpp",
            "program.cpp",
            ("./program",),
            ("g++", "--version"),
            _inside_the_last('__builtin_puts("\\n{mark}");', 1),
            compile=("g++", "-std=c++17", "-O1", "-o", "program", "program.cpp"),
        ),
        Language(
            "javascript",
            "program.js",
            ("node", "--max-old-space-size=256", "program.js"),
            ("node", "--version"),
            _at_the_end('process.stdout.write("\\n{mark}\\n");'),
        ),
        Language(
            "java",
            "Problem.java",
            ("java", "-ea", "-Xmx256m", "-Xss64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", ".", "Problem"),
            ("javac", "-version"),
            _inside_the_last('System.out.println("\\n{mark}");', 2),
            compile=("javac", "-J-Xmx256m", "-J-XX:+UseSerialGC", "-encoding", "UTF8", "Problem.java"),
        ),
        Language(
            "bash",
            "program.sh",
            ("bash", "program.sh"),
            ("bash", "--version"),
            _at_the_end("printf '\\n%s\\n' {mark}"),
        ),
    )
}


JARS = "CODETUNE_JAVA_JARS"  # environment variable: jars that Java programs may import, as a path list


def jars() -> list[str]:
    """The jars that are named, and are there."""
    return [path for path in os.environ.get(JARS, "").split(os.pathsep) if path and os.path.isfile(path)]


def with_jars(language: Language) -> Language:
    """Java's row with the jars on the paths of compiler and machine."""
    path = os.pathsep.join([".", *jars()])
    run = tuple(path if part == "." else part for part in language.run)
    return dataclasses.replace(language, compile=(*language.compile[:-1], "-cp", path, language.compile[-1]), run=run)


def find_language(name: str) -> Language:
    """The row of a language.

    Raises:
        ValueError: there is no such row, or one of its tools is not installed.
    """
    if name not in LANGUAGES:
        raise ValueError(f"no runner for the language `{name}`; there are python, {', '.join(LANGUAGES)}")
    language = LANGUAGES[name]
    for tool in language.tools:
        if shutil.which(tool) is None:
            raise ValueError(f"programs in {name} need `{tool}`, which is not installed here; install it, or leave them out")
    return with_jars(language) if name == "java" and jars() else language


@functools.cache
def toolchain(name: str) -> str:
    """What the compiler or interpreter says of its version."""
    command = find_language(name).version
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, stdin=subprocess.DEVNULL)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else f"{command[0]}: no version"
