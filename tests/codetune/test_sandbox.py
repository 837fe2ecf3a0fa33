"""The sandbox: right programs pass, wrong and hostile ones do not, nothing outside is touched."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.hostile_programs import (
    FORGERIES,
    RIGHT,
    TESTS,
    Case,
    Watch,
    cases,
    numpy_case,
    sandbox_processes,
)
from codetune import sandbox as sandbox_module
from codetune.sandbox import (
    MIB,
    STRONGEST_FIRST,
    Cgroup,
    ExecutionResult,
    Job,
    Limits,
    Sandbox,
    SandboxError,
    SandboxUnavailable,
    Verdict,
    choose_isolation,
    probe,
    readable_by_others,
    run_program,
    run_programs,
    suspected,
)
from codetune.sandbox_languages import LANGUAGES, PROGRAM_PATH

WORKS = [tier for tier in STRONGEST_FIRST if sys.platform == "linux" and probe(tier) is None]
needs_isolation = pytest.mark.skipif(not WORKS, reason="no isolation works here: python -m codetune.sandbox check says why")
needs_processes = pytest.mark.skipif(
    not {"namespaces", "bubblewrap"} & set(WORKS), reason="programs may not start others in the isolation that works here"
)


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox(workers=2) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    with Watch() as watching:
        yield watching


def wrong_ones(sandbox: Sandbox, watch: Watch, chosen: list[Case]) -> list[str]:
    """Cases whose verdict or side effects are not as they must be."""
    wrong = []
    for case, result in zip(chosen, sandbox.run_many(case.job(watch.places) for case in chosen), strict=True):
        expected = ("fail",) if case.starts_processes and sandbox.tier != "namespaces" else case.expected
        touched = watch.touched(result.stdout + result.stderr)
        if str(result.verdict) not in expected or touched:
            wrong.append(f"{case.family}: {case.name}: {result.verdict} ({result.reason}: {result.detail}) {touched}")
    return wrong


@needs_isolation
@pytest.mark.parametrize("family", sorted({case.family for case in cases()} - {"floods"}))
def test_every_program_gets_its_verdict_and_touches_nothing(family: str, box: Sandbox, watch: Watch) -> None:
    chosen = [case for case in cases() if case.family == family]
    assert wrong_ones(box, watch, chosen) == []


@needs_isolation
def test_floods_are_stopped(box: Sandbox, watch: Watch) -> None:
    slow = {"a loop that catches everything", "raises its own limits", "a regular expression", "an archive that grows"}
    chosen = [case for case in cases() if case.family == "floods" and case.name not in slow]
    quick = [dataclasses.replace(case, limits=dataclasses.replace(case.limits, wall_seconds=0.4)) for case in chosen]
    assert wrong_ones(box, watch, quick) == []


@needs_isolation
@pytest.mark.skipif(
    Path(sys.prefix).is_relative_to(tempfile.gettempdir()),
    reason="packages are installed in the folder for temporary files, which programs have one of their own of",
)
def test_numpy_can_be_imported(box: Sandbox, watch: Watch) -> None:
    assert wrong_ones(box, watch, [numpy_case()]) == []


def test_the_suite_is_as_large_as_it_says() -> None:
    assert len(cases()) >= 80
    assert len({(case.family, case.name) for case in cases()}) == len(cases())


@pytest.mark.skipif("landlock" not in WORKS, reason="no Landlock here")
def test_landlock_alone_contains_them_too(watch: Watch) -> None:
    families = ("endings", "files", "other processes", "checks handed over", "network", "kernel", "foreign system calls")
    chosen = [case for case in cases() if case.family in families and case.expected != ("timeout",)]
    chosen += [
        case for case in cases() if case.name in ("a fork tree", "threads", "many small files", "a disk in many files")
    ]
    before = sandbox_processes()
    with Sandbox("landlock", workers=2) as sandbox:
        assert wrong_ones(sandbox, watch, chosen) == []
    assert watch.left_behind(before) == []


def usable(interpreter: str) -> bool:
    """Whether an ordinary user can start this interpreter, and it is new enough; the sandbox needs nothing else."""
    if not os.access(interpreter, os.X_OK) or not readable_by_others([interpreter]):
        return False
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([interpreter, "-S", "-c", code], check=False).returncode == 0


@needs_isolation
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("isolation", [tier for tier in WORKS if tier != "bubblewrap"])
def test_an_ordinary_user_is_isolated_too(isolation: str) -> None:
    """The path of users without rights: their own numbers in the namespace, no memory groups."""
    source = Path(sandbox_module.__file__).parents[1]
    interpreter = next((path for path in map(os.path.realpath, (sys.executable, "/usr/bin/python3")) if usable(path)), None)
    if interpreter is None or not readable_by_others([str(source / "codetune")]):
        pytest.skip("sources, or every interpreter, lie where only root can read")
    shared = (
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_void_p\n"
        "place = libc.shmat(NUMBER, None, 0)\n"
        "if place not in (None, 2 ** 64 - 1): ctypes.memset(place, 66, 1)\nlibc.shmctl(NUMBER, 0, None)\n"
    )
    programs = [RIGHT, "import sys\nsys.exit(0)\n", f"import os\nos.listdir({str(Path.home())!r})\n", shared + RIGHT]
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_void_p\n"
        "number = libc.shmget(0, 4096, 0o1600)\nplace = libc.shmat(number, None, 0)\n"  # this user's, which nobody may touch
        "import os\nfrom codetune.sandbox import Job, Limits, Sandbox\nassert os.geteuid() == 65534\n"
        f"with Sandbox({isolation!r}, workers=1) as box:\n"
        f"    for program in {programs!r}:\n"
        "        program = program.replace('NUMBER', str(number))\n"
        f"        result = box.run(Job(program, {TESTS!r}, 'add', limits=Limits(wall_seconds=20)))\n"
        "        print(result.verdict, result.reason, result.isolation)\n"
        "print(ctypes.string_at(place, 1), libc.shmctl(number, 0, None))\n"
    )
    done = subprocess.run(
        [interpreter, "-s", "-S", "-c", code],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        f"pass tests-completed {isolation}",
        f"fail early-exit {isolation}",
        f"fail exception {isolation}",
        f"pass tests-completed {isolation}",
        "b'\\x00' 0",
    ], done.stderr


@pytest.mark.skipif("bubblewrap" not in WORKS, reason="bubblewrap is not installed, or may not make namespaces here")
def test_bubblewrap_contains_them_too(watch: Watch) -> None:
    chosen = [case for case in cases() if case.family in ("files", "network", "kernel", "right programs")]
    with Sandbox("bubblewrap", workers=2) as sandbox:
        assert wrong_ones(sandbox, watch, chosen) == []


# ---------------------------------------------------------------------------------------------------------------------
# The verdict


@needs_isolation
def test_tests_in_the_same_process_are_said_to_be_and_can_be_forged(box: Sandbox) -> None:
    """The control of the forgeries: they are real, and only the process border stops them."""
    forged = FORGERIES["object equal to everything"]
    together = box.run(Job(forged, TESTS, "add", judge="same-process"))
    assert (together.verdict, together.judge) == (Verdict.PASS, "same-process")
    apart = box.run(Job(forged, TESTS, "add"))
    assert (apart.verdict, apart.judge) == (Verdict.FAIL, "separate")


@needs_isolation
def test_a_search_for_the_tests_finds_them_only_where_they_are(box: Sandbox) -> None:
    job = Job(FORGERIES["looks for the tests in its own memory map"], TESTS, "add", limits=Limits(wall_seconds=20))
    assert box.run(dataclasses.replace(job, judge="same-process")).passed
    assert not box.run(job).passed


@needs_isolation
def test_a_program_does_not_see_the_one_before_it(box: Sandbox) -> None:
    first = "open('left', 'w').write('x')\nimport math\nmath.pi = 3\n" + RIGHT
    second = "import os, math\ndef add(a, b):\n    return (os.path.exists('left'), round(math.pi, 2))\n"
    with Sandbox(workers=1) as sandbox:
        assert sandbox.run(Job(first, TESTS, "add")).passed
        assert sandbox.run(Job(second, "assert add(1, 2) == (False, 3.14)", "add")).passed


@needs_isolation
def test_helpers_of_the_prompt_are_the_trusted_ones(box: Sandbox) -> None:
    prompt = "import math\ndef double(x):\n    return 2 * x\n\ndef half(x):\n    '''The inverse of double.'''\n"
    liar = "def double(x):\n    return 99\ndef half(x):\n    return 99\n"
    right = "def half(x):\n    return x / 2\n"
    tests = "assert half(double(math.floor(3.5))) == 3\nassert double(4) == 8"
    assert not box.run(Job(liar, tests, "half", prompt=prompt)).passed
    assert box.run(Job(right, tests, "half", prompt=prompt)).passed


@needs_isolation
def test_arguments_that_cannot_travel_are_neither_passed_nor_failed(box: Sandbox) -> None:
    tests = "class Node:\n    value = 1\nassert add(Node(), 2) == 3\n"
    result = box.run(Job("def add(a, b):\n    return a.value + b\n", tests, "add"))
    assert (result.verdict, result.passed) == (Verdict.UNSUPPORTED, False)
    assert "Node" in result.detail
    assert box.run(Job("def add(a, b):\n    return a.value + b\n", tests, "add", judge="same-process")).passed


@needs_isolation
@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        (RIGHT, TESTS, "tests-completed"),
        ("def add(a, b):\n    return a - b\n", TESTS, "assertion"),
        ("def add(a, b):\n    return a.x\n", TESTS, "exception"),
        ("def add(a, b:\n", TESTS, "syntax"),
        ("def plus(a, b):\n    return a + b\n", TESTS, "no-entry-point"),
        ("import sys\nsys.exit(0)\n", TESTS, "early-exit"),
        ("import os\nos._exit(0)\n", TESTS, "died"),
        ("import ctypes\nctypes.string_at(0)\n", TESTS, "signal-SIGSEGV"),
        (RIGHT, "add(1, 2)", "no-check"),
        (RIGHT, "assert True", "no-call"),
        (RIGHT, "assert add(1, 2) ==", "tests-syntax"),
        ("x = bytearray(1 << 40)\n", TESTS, "memory"),
    ],
)
def test_reasons(program: str, tests: str, reason: str, box: Sandbox) -> None:
    for _ in range(3):  # the same one every time, whichever process ends first
        assert box.run(Job(program, tests, "add")).reason == reason


@needs_isolation
def test_the_line_of_the_tests_is_named(box: Sandbox) -> None:
    result = box.run(Job(RIGHT, "assert add(1, 2) == 3\nassert add(2, 2) == 5\n", "add"))
    assert "line 2" in result.detail
    assert "assert add(2, 2) == 5" in result.detail
    assert (result.checks, result.calls) == (2, 2)


@needs_isolation
def test_scripts_run_as_python_runs_them(box: Sandbox) -> None:
    source = (
        "import sys, atexit, threading\natexit.register(print, 'last')\n"
        "t = threading.Thread(target=print, args=('thread',))\nt.start()\nt.join()\n"
        "if __name__ == '__main__':\n    print(sum(map(int, sys.stdin.read().split())), 'é')\n    sys.exit(3)\n"
    )
    plain = subprocess.run([sys.executable, "-c", source], input="1 2\n3", capture_output=True, text=True, encoding="utf-8")
    result = box.run(Job(source, stdin="1 2\n3"))
    assert sorted(result.stdout.split()) == sorted(plain.stdout.split())
    assert (result.exit_code, result.verdict) == (plain.returncode, Verdict.FAIL)
    good = box.run(Job("print(input()[::-1])", stdin="abc\n"))
    assert (good.stdout, good.verdict, good.passed) == ("cba\n", Verdict.FINISHED, False)
    bad = box.run(Job("1 / 0"))
    assert (bad.reason, bad.exit_code) == ("exception", 1)
    assert "ZeroDivisionError" in bad.stderr
    assert "sandbox" not in bad.stderr


@needs_isolation
def test_output_is_kept_up_to_the_limit_and_counted(box: Sandbox) -> None:
    result = box.run(Job("print('x' * 10_000_000)", limits=Limits(output_bytes=100)))
    assert (len(result.stdout), result.stdout_bytes, result.verdict) == (100, 10_000_001, Verdict.FINISHED)


@needs_isolation
def test_text_of_any_kind_comes_back_as_text(box: Sandbox) -> None:
    result = box.run(Job("import os\nos.write(1, bytes(range(256)))\nraise ValueError('\\ud800 é')"))
    json.dumps(result.to_dict()).encode("utf-8")
    assert "�" in result.stdout
    assert ExecutionResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


# ---------------------------------------------------------------------------------------------------------------------
# Time


@needs_isolation
def test_a_sleeper_and_a_loop_are_stopped_soon(box: Sandbox) -> None:
    limits = Limits(wall_seconds=0.3)
    for program, reasons in (("import time\ntime.sleep(60)", ("wall",)), ("while True: pass", ("wall", "cpu"))):
        start = time.monotonic()
        result = box.run(Job(program + "\n" + RIGHT, TESTS, "add", limits=limits))
        assert (result.verdict, result.reason in reasons) == (Verdict.TIMEOUT, True)
        assert time.monotonic() - start < 10


@needs_isolation
def test_a_suspected_time_out_is_run_again_alone(box: Sandbox) -> None:
    """Once to twice the limit is suspected; twice is certain, since nothing else explains it."""
    limits = Limits(wall_seconds=0.6)
    slow = box.run(Job("import time\ntime.sleep(1.0)\n" + RIGHT, TESTS, "add", limits=limits))
    assert (slow.verdict, slow.ran_again_alone) == (Verdict.TIMEOUT, True)
    stuck = box.run(Job("import time\ntime.sleep(60)\n" + RIGHT, TESTS, "add", limits=limits))
    assert (stuck.verdict, stuck.ran_again_alone) == (Verdict.TIMEOUT, False)
    quick = box.run(Job(RIGHT, TESTS, "add", limits=limits))
    assert (quick.verdict, quick.ran_again_alone) == (Verdict.PASS, False)


def test_what_is_suspected() -> None:
    limits = Limits(wall_seconds=2, cpu_seconds=1)
    result = ExecutionResult(Verdict.PASS, "", limits=limits, wall_seconds=1.9, cpu_seconds=0.9)
    assert not suspected(result)
    assert suspected(dataclasses.replace(result, cpu_seconds=1.1))
    assert suspected(dataclasses.replace(result, wall_seconds=2.5))
    assert not suspected(dataclasses.replace(result, wall_seconds=2.5, starved_seconds=1.0)), (
        "waiting for a processor is no time"
    )
    late = dataclasses.replace(result, verdict=Verdict.TIMEOUT)
    assert suspected(late)
    assert not suspected(dataclasses.replace(late, cpu_seconds=2.0)), "twice the limit has no other explanation"
    assert not suspected(dataclasses.replace(late, wall_seconds=4.0))


@needs_isolation
def test_alone_means_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most_beside_alone, lock = [0], [0], threading.Lock()
    with Sandbox(workers=3) as sandbox:
        attempt = sandbox._attempt

        def counted(job: Job, factor: float) -> ExecutionResult:
            with lock:
                running[0] += 1
            result = attempt(job, factor)
            with lock:
                if factor == 1.0:
                    most_beside_alone[0] = max(most_beside_alone[0], running[0])
                running[0] -= 1
            return result

        monkeypatch.setattr(sandbox, "_attempt", counted)
        slow = Job("import time\ntime.sleep(0.9)\n" + RIGHT, TESTS, "add", limits=Limits(wall_seconds=0.5))
        results = list(sandbox.run_many([slow, Job(RIGHT, TESTS, "add"), slow, Job(RIGHT, TESTS, "add")] * 2))
    assert [result.verdict for result in results] == [Verdict.TIMEOUT, Verdict.PASS] * 4
    assert most_beside_alone[0] == 1


@needs_isolation
def test_busy_neighbours_change_no_verdict(box: Sandbox) -> None:
    near = "import time\nt = time.process_time()\nwhile time.process_time() < t + 0.5: pass\n" + RIGHT
    jobs = [
        Job(near, TESTS, "add", limits=Limits(wall_seconds=1)),
        Job(RIGHT, TESTS, "add"),
        Job(near + "add = 3\n", TESTS, "add"),
    ]
    count = 4 * (os.cpu_count() or 1)
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"], start_new_session=True) for _ in range(count)]
    try:
        verdicts = [str(result.verdict) for result in box.run_many(jobs)]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert verdicts == ["pass", "pass", "fail"]


# ---------------------------------------------------------------------------------------------------------------------
# Many


@needs_isolation
def test_results_come_in_the_order_of_the_jobs_and_without_end(box: Sandbox) -> None:
    def endless() -> Iterator[Job]:
        number = 0
        while True:
            yield Job(f"print({number})")
            number += 1

    results = run_programs(endless(), sandbox=box)
    assert [next(results).stdout for _ in range(60)] == [f"{number}\n" for number in range(60)]
    results.close()  # type: ignore[attr-defined]


@needs_isolation
def test_workers_work_beside_each_other() -> None:
    with Sandbox(workers=4) as sandbox:
        list(sandbox.run_many([Job(RIGHT, TESTS, "add")] * 8))
        start = time.monotonic()
        results = list(sandbox.run_many([Job("import time\ntime.sleep(1)\n" + RIGHT, TESTS, "add")] * 4))
        assert all(result.passed for result in results)
        assert time.monotonic() - start < 3


@needs_isolation
def test_nothing_is_left_after_closing(watch: Watch) -> None:
    before = sandbox_processes()
    with Sandbox(workers=2) as sandbox:
        litter = [case.job(watch.places) for case in cases() if case.family == "daemons"] * 3
        list(sandbox.run_many(litter))
        assert watch.left_behind(before), "the control: workers are there before closing"
    assert watch.left_behind(before) == []
    with pytest.raises(ValueError, match="closed"):
        sandbox.run(Job(RIGHT))


@needs_isolation
def test_everything_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import sys, threading, time\nfrom codetune.sandbox import Job, Limits, Sandbox\n"
        "box = Sandbox(workers=1)\n"
        "job = Job('import time\\ntime.sleep(3600)', limits=Limits(wall_seconds=3600))\n"
        "threading.Thread(target=box.run, args=(job,)).start()\n"
        "time.sleep(1)\nprint(box.run and 'ready', flush=True)\ntime.sleep(3600)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=own_environment())
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    started = [line for line in all_command_lines() if f"{process.pid}" in line[0]]
    assert started, "the control: a worker descends from it"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    alive: list[int] = []
    for _ in range(100):
        alive = [pid for _, pid, name in started if Path(f"/proc/{pid}/cmdline").exists() and name in _name(pid)]
        if not alive:
            break
        time.sleep(0.05)
    assert alive == []


@needs_isolation
def test_what_killed_processes_left_is_swept_and_the_living_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`namespaces` makes memory groups, `landlock` temporary folders: of a process that was killed, and of this one."""
    places = sandbox_module.cgroup_places()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    script = tmp_path / "killed.py"
    tiers = [tier for tier in ("namespaces", "landlock") if tier in WORKS]
    script.write_text(
        "import time\nfrom codetune.sandbox import Job, Sandbox\n"
        f"boxes = [Sandbox(tier, workers=1) for tier in {tiers!r}]\n"
        "print([box.run(Job('pass')).reason for box in boxes], flush=True)\ntime.sleep(3600)\n"
    )
    environment = own_environment() | {"TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and "exit-0" in process.stdout.readline()

    def left(pid: int) -> list[Path]:
        parents = [*(places[0] if places else ()), temporary]
        return [path for parent in parents for path in parent.glob(f"{sandbox_module.FOLDERS}{pid}-*")]

    expected = ("landlock" in tiers) + (len(places[0]) if places and "namespaces" in tiers else 0)
    assert len(left(process.pid)) == expected, "the control: they are there while it lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with contextlib.ExitStack() as stack:
        boxes = [stack.enter_context(Sandbox(tier, workers=1)) for tier in tiers]
        assert all(box.run(Job("pass")).reason == "exit-0" for box in boxes)
        monkeypatch.setattr(sandbox_module, "START_SECONDS", 0.0)
        deadline = time.monotonic() + 10
        while left(process.pid) and time.monotonic() < deadline:
            sandbox_module.sweep_groups(places[0] if places else [], 0.0)
            sandbox_module.sweep_scratch(temporary)
            time.sleep(0.1)
        assert left(process.pid) == []
        assert len(left(os.getpid())) >= expected
        assert all(box.run(Job("pass")).reason == "exit-0" for box in boxes)


@needs_isolation
def test_programs_and_tests_find_the_garbage_collector_as_python_starts_it(box: Sandbox) -> None:
    program = "import gc\ndef state(): return gc.isenabled(), gc.get_threshold()\nfirst = gc.isenabled()\n"
    expected = f"(True, {gc.get_threshold()!r})"
    tests = f"import gc\nassert gc.isenabled() and first\nassert state() == {expected}\n"
    assert box.run(Job(program, tests, "state")).reason == "tests-completed"
    assert box.run(Job(program, tests, "state", judge="same-process")).reason == "tests-completed"
    assert box.run(Job(program + "print(state())")).stdout == f"{expected}\n"


def all_command_lines() -> list[tuple[str, int, str]]:
    """(pids above, pid, name) of every process that is a worker."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = []
    for pid in parents:
        above, chain = pid, []
        while above in parents:
            above = parents[above]
            chain.append(above)
        if "sandbox_zygote" in _name(pid):
            found.append((" ".join(map(str, chain)), pid, "sandbox_zygote"))
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def own_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(sandbox_module.__file__).parents[1])}


@needs_isolation
def test_a_worker_that_dies_is_no_failure_of_the_program(box: Sandbox) -> None:
    with Sandbox(workers=1) as sandbox:
        assert sandbox.run(Job(RIGHT, TESTS, "add")).passed
        worker = sandbox._idle[0]
        assert worker.process is not None
        worker.process.kill()
        worker.process.wait()
        assert sandbox.run(Job(RIGHT, TESTS, "add")).passed


@needs_isolation
def test_a_sandbox_that_fails_twice_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> ExecutionResult:
        raise sandbox_module.Fault("no more processes")

    with Sandbox(workers=1) as sandbox:
        monkeypatch.setattr(sandbox_module.Worker, "run", broken)
        with pytest.raises(SandboxError, match="no more processes"):
            sandbox.run(Job(RIGHT, TESTS, "add"))


@needs_isolation
def test_an_interrupt_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with Sandbox(workers=1) as sandbox:
        monkeypatch.setattr(sandbox_module.Worker, "_receive", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            sandbox.run(Job(RIGHT, TESTS, "add"))
        monkeypatch.undo()
        assert sandbox.run(Job(RIGHT, TESTS, "add")).passed


# ---------------------------------------------------------------------------------------------------------------------
# Which isolation


def test_without_isolation_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_module, "probe", lambda tier: f"{tier} is forbidden here")
    monkeypatch.delenv(sandbox_module.SETTING, raising=False)
    with pytest.raises(SandboxUnavailable) as refusal:
        Sandbox()
    text = str(refusal.value)
    for tier in STRONGEST_FIRST:
        assert f"{tier}: {tier} is forbidden here" in text
    for remedy in ("user.max_user_namespaces", "apt install bubblewrap", "isolation='none'"):
        assert remedy in text


def test_no_isolation_is_used_only_when_asked_for_and_is_in_the_result() -> None:
    with pytest.warns(UserWarning, match="without isolation"):
        sandbox = Sandbox("none", workers=1)
    with sandbox:
        result = sandbox.run(Job(RIGHT, TESTS, "add"))
        assert (result.passed, result.isolation) == (True, "none")
        daemon = (
            "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork(): time.sleep(60)\n    os._exit(0)\n"
            + RIGHT
        )
        assert sandbox.run(Job(daemon, TESTS, "add")).passed
        worker = sandbox._idle[0]
        assert isinstance(worker, sandbox_module.Worker)
        assert worker.run(Job(RIGHT, TESTS, "add"), 1.0, count_left=True).passed


def test_a_setting_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox_module.SETTING, "chroot")
    with pytest.raises(ValueError, match="isolation is 'chroot'"):
        choose_isolation()


@needs_isolation
def test_a_probe_that_gets_through_forbids_the_isolation() -> None:
    """The probe itself is tested where nothing is isolated: it must see that."""
    worker = sandbox_module.Worker("none")
    try:
        found = sandbox_module._probe_in(worker)
    finally:
        worker.close()
    assert found is not None
    assert "'network', 'files', 'files'" in found


@needs_isolation
def test_programs_can_run_elsewhere() -> None:
    """A container or another machine is a command that serves on its standard streams; here it is this machine."""
    command = [sys.executable, "-m", "codetune.sandbox", "serve"]
    os.environ.setdefault("PYTHONPATH", str(Path(sandbox_module.__file__).parents[1]))
    with Sandbox(command=command, workers=1) as sandbox:
        result = sandbox.run(Job(RIGHT, TESTS, "add", limits=Limits(wall_seconds=4)))
        assert (result.verdict, result.isolation) == (Verdict.PASS, f"command+{WORKS[0]}")
        assert result.limits == Limits(wall_seconds=4)
        assert not sandbox.run(Job("x = '\ud800'\n", TESTS, "add")).passed
    with Sandbox(command=["false"], workers=1) as sandbox, pytest.raises(SandboxError, match="false"):
        sandbox.run(Job(RIGHT, TESTS, "add"))


@needs_isolation
def test_the_command_may_be_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(sandbox_module.__file__).parents[1]))
    monkeypatch.setenv(sandbox_module.COMMAND_SETTING, f"'{sys.executable}' -m codetune.sandbox serve")
    with Sandbox(workers=1) as elsewhere, Sandbox(WORKS[0], workers=1) as here:
        assert elsewhere.run(Job(RIGHT, TESTS, "add")).isolation == f"command+{WORKS[0]}", "and not a command of its own"
        assert here.tier == WORKS[0], "an isolation that is named is taken"
    monkeypatch.setenv(sandbox_module.COMMAND_SETTING, "docker run 'open")
    with pytest.raises(ValueError, match="which is no command: No closing quotation"):
        Sandbox()


def test_importing_needs_the_standard_library_only() -> None:
    folder = Path(sandbox_module.__file__).parent
    for path in folder.glob("sandbox*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                first = name.partition(".")[0]
                assert first in sys.stdlib_module_names or first in ("codetune", "numpy"), f"{path.name} imports {name}"
    code = "import codetune.sandbox, sys; assert 'numpy' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env=own_environment())


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="memory groups are made by root here")
def test_a_memory_group_bounds_the_whole_tree_and_goes_away() -> None:
    group = Cgroup.make()
    if group is None:
        pytest.skip("no memory group can be made here")
    folders = group.folders
    group.limit(Limits(memory_bytes=64 * MIB))
    eat = "import os\nx = bytearray(500 << 20)\n"
    code = f"import sys\nsys.stdin.read()\n{eat}"
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)
    group.add(process.pid)
    process.communicate(b"")
    assert process.returncode == -signal.SIGKILL
    assert group.has_killed() and not group.has_killed(), "one end by the kernel is told once"
    group.remove()
    assert not any(folder.exists() for folder in folders)


# ---------------------------------------------------------------------------------------------------------------------
# Other languages

SOURCES = {
    "cpp": (
        "#include <cassert>\n#include <cstdlib>\nlong add(long a, long b) { return a + b; }\n",
        "int main() {\n  assert(add(1, 2) == 3);\n}\n",
        ("a + b", "a - b"),
        ("return a + b", "std::exit(0); return a + b"),
    ),
    "javascript": (
        "function add(a, b) { return a + b; }\n",
        "const assert = require('node:assert');\nassert.deepEqual(add(1, 2), 3);\n",
        ("a + b", "a - b"),
        ("return a + b", "process.exit(0); return a + b"),
    ),
    "java": (
        "class Problem {\n  static long add(long a, long b) { if (a > 9) return 0; return a + b; }\n",
        "  public static void main(String[] args) {\n    assert(add(1, 2) == 3);\n  }\n}\n",
        ("a + b", "a - b"),
        ("if (a > 9) return 0", "System.exit(0)"),
    ),
    "bash": (
        "add() { echo $(($1 + $2)); }\n",
        "[[ $(add 1 2) = 3 ]] || exit 1\n",
        ("$1 + $2", "$1 - $2"),
        ("add() {", "exit 0; add() {"),
    ),
}


@needs_processes
@pytest.mark.parametrize("language", sorted(SOURCES))
def test_other_languages(language: str, box: Sandbox) -> None:
    missing = [tool for tool in LANGUAGES[language].tools if shutil.which(tool, path=PROGRAM_PATH) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    program, tests, wrong, early = SOURCES[language]
    limits = Limits(wall_seconds=10)
    right = run_program(program, tests, language=language, judge="same-process", limits=limits, sandbox=box)
    assert right.passed, right
    assert any(character.isdigit() for character in right.toolchain)
    for old, new in (wrong, early):
        assert old in program
        changed = program.replace(old, new)
        result = run_program(changed, tests, language=language, judge="same-process", limits=limits, sandbox=box)
        assert (result.verdict, result.judge) == (Verdict.FAIL, "same-process"), result
    broken = run_program("(((", tests, language=language, judge="same-process", limits=limits, sandbox=box)
    assert broken.verdict is Verdict.FAIL


@needs_processes
@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_program_of_another_language_is_stopped_and_contained(box: Sandbox, watch: Watch) -> None:
    places = watch.places
    program = f"cat {places['SECRET_FILE']}; echo x > {places['CANARY']}/written; env; ls {places['HOME']}\n"
    program += "sleep 100 & kill -9 1 $PPID\n"
    done = run_program(program, language="bash", sandbox=box)
    assert watch.touched(done.stdout + done.stderr) == []
    loop = run_program("while true; do :; done", language="bash", limits=Limits(wall_seconds=0.5), sandbox=box)
    assert loop.verdict is Verdict.TIMEOUT
    assert run_program("echo $(( $(cat) * 2 ))", stdin="21", language="bash", sandbox=box).stdout == "42\n"


def test_a_language_without_a_runner_or_tools_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no runner for the language `cobol`"):
        Job("", language="cobol")
    with pytest.raises(ValueError, match="judge='same-process'"):
        Job("", "x", language="bash")
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(ValueError, match="`g\\+\\+`, which is not installed"):
        Job("", language="cpp")


def test_limits_and_judges_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="wall_seconds is 0"):
        Limits(wall_seconds=0)
    with pytest.raises(ValueError, match="judge is 'me'"):
        Job("", "", judge="me")  # type: ignore[arg-type]
