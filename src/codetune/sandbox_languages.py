"""How programs of each language are compiled and run in the sandbox: one row of a table per language.

In: a name. Out: file names, the compile and the run step, and where the mark goes that says "the tests ran to their
end". The trade: tests of these languages run in the program's own process (that is how MultiPL-E's are written), so a
determined program can forge a pass; the mark, new for every run, is what exit codes and ordinary printing cannot fake.
What it does not do: install toolchains. Which version ran is in every result. A tool counts as installed where programs in
the sandbox find it, which is not everywhere that your shell does: a compiler in somebody's home is not seen there.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field

PROGRAM_PATH = "/usr/local/bin:/usr/bin:/bin"  # where programs in the sandbox look for others


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
    install: str = ""  # what to install, as docs/evaluation.md has it

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


# Mono's Debug.Assert writes a line and goes on, and the exit code stays 0: the listener below ends the program instead.
CSHARP_LISTENER = """
class CodetuneListener : System.Diagnostics.DefaultTraceListener {
    public override void Fail(string message) { Fail(message, ""); }
    public override void Fail(string message, string detail) {
        System.Console.Error.WriteLine("assertion failed: " + message);
        System.Environment.Exit(1);
    }
}
"""
CSHARP_LISTEN = """
System.Diagnostics.Debug.Listeners.Clear();
System.Diagnostics.Debug.Listeners.Add(new CodetuneListener());
"""


def _csharp(source: str, mark: str) -> str:
    """Asserts that end the program, and the mark behind the last of them, at the end of `Main`."""
    start = source.rfind("static void Main(")
    brace = source.find("{", start)
    if start < 0 or brace < 0:
        return source  # without its tests it ends without the mark
    listening = source[: brace + 1] + CSHARP_LISTEN + source[brace + 1 :]
    return _inside_the_last('System.Console.WriteLine("\\n{mark}");', 2)(listening, mark) + CSHARP_LISTENER


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
            install="Debian: apt install g++",
        ),
        Language(
            "javascript",
            "program.js",
            ("node", "--max-old-space-size=256", "program.js"),
            ("node", "--version"),
            _at_the_end('process.stdout.write("\\n{mark}\\n");'),
            install="Debian: apt install nodejs",
        ),
        Language(
            "java",
            "Problem.java",
            ("java", "-ea", "-Xmx256m", "-Xss64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", ".", "Problem"),
            ("javac", "-version"),
            _inside_the_last('System.out.println("\\n{mark}");', 2),
            compile=("javac", "-J-Xmx256m", "-J-XX:+UseSerialGC", "-encoding", "UTF8", "Problem.java"),
            install="Debian: apt install default-jdk-headless",
        ),
        Language(
            "bash",
            "program.sh",
            ("bash", "program.sh"),
            ("bash", "--version"),
            _at_the_end("printf '\\n%s\\n' {mark}"),
            install="Debian: apt install bash bc gawk bsdmainutils",
        ),
        Language(
            "php",
            "program.php",
            ("php", "-n", "-d", "memory_limit=256M", "program.php"),  # -n: no settings of the machine
            ("php", "--version"),
            _at_the_end('fwrite(STDOUT, "\\n{mark}\\n");'),
            install="Debian: apt install php-cli",
        ),
        Language(
            "typescript",
            "program.ts",
            ("node", "--max-old-space-size=256", "program.js"),
            ("tsc", "--version"),
            # `process` has no type here, since no package of Node's types is read.
            _at_the_end('(globalThis as any).process.stdout.write("\\n{mark}\\n");'),
            compile=("tsc", "--target", "esnext", "--newLine", "lf", "program.ts"),  # errors of types are errors
            install="npm install -g typescript, with Node",
        ),
        Language(
            "csharp",
            "program.cs",
            ("mono", "program.exe"),
            ("mcs", "--version"),
            _csharp,
            compile=("mcs", "-d:DEBUG", "-r:System.Numerics.dll", "-out:program.exe", "program.cs"),
            install="Debian: apt install mono-mcs mono-runtime libmono-system-numerics4.0-cil",
        ),
        Language(
            "go",
            "program_test.go",  # a file by another name has no tests for Go, and passes
            ("./program",),
            ("go", "version"),
            _inside_the_last('fmt.Println("\\n{mark}")', 1),  # the tests print by fmt, so it is imported
            compile=("go", "test", "-c", "-p", "1", "-o", "program", "program_test.go"),
            environment={"GO111MODULE": "off", "GOFLAGS": "", "GOMAXPROCS": "2", "GOTOOLCHAIN": "local"},
            install="Debian: apt install golang-go",
        ),
        Language(
            "rust",
            "program.rs",
            ("./program",),
            ("rustc", "--version"),
            _inside_the_last('println!("\\n{mark}");', 1),
            compile=("rustc", "-o", "program", "program.rs"),
            install="Debian: apt install rustc",
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
        if shutil.which(tool, path=PROGRAM_PATH) is None:
            raise ValueError(
                f"programs in {name} need `{tool}`, which is not installed here, in {PROGRAM_PATH}; install it "
                f"({language.install}), or leave them out"
            )
    return with_jars(language) if name == "java" and jars() else language


@functools.cache
def toolchain(name: str) -> str:
    """What the compiler or interpreter says of its version."""
    command = find_language(name).version
    environment = {**os.environ, "PATH": PROGRAM_PATH}  # the one that programs meet, not the shell's
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", timeout=60, stdin=subprocess.DEVNULL
    )
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else f"{command[0]}: no version"
