"""The process that jails programs: started once per worker, closed in once, then one fork into a fresh jail per program.

In: over a socket, descriptors and limits; never a program, a test or a secret, so that no child can inherit one. Out:
how each program ended and what it used. The trade: a fork of a warm interpreter costs a few milliseconds where a new
one costs ten, for keeping this process free of anything worth reading. What it does not do: judge
(`sandbox_program.py`), or choose the isolation (`sandbox.py`). Started without site-packages; standard library only.

Tiers: `namespaces` (own user, process, mount, network, IPC and host-name namespaces), `landlock` (Landlock, seccomp, a
single process), `none` (limits only). Inside bubblewrap it runs as `landlock`.
"""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import json
import os
import resource
import select
import signal
import socket
import stat
import sys
import time
from typing import Any, NoReturn, cast

from codetune import sandbox_kernel as kernel
from codetune import sandbox_program as program

# Fills the slots 0 to 5 of a child's descriptors, by role: standard input, output, error, job, then its channel and report.
ROLES = {
    "solution": (None, "stdout", "stderr", "job", "channel"),
    "judge": (None, None, None, "job", "channel", "report"),
    "together": ("stdin", "stdout", "stderr", "job", "report"),
    "script": ("stdin", "stdout", "stderr", "job"),
    "command": ("stdin", "stdout", "stderr", "job", "report"),
}
INNER_ID = 1000  # the program's user inside a jail; the tests' is the next one
# Warm modules: what programs import most. They hold nothing of a program, and every child has its own copy. What is rare and
# written in C (hashlib, unicodedata, ...) is left out: each such library makes every fork and every end of a child longer.
WARM = (
    "abc array bisect calendar collections copy dataclasses datetime decimal enum fractions functools heapq io itertools "
    "math numbers operator os random re statistics string struct textwrap threading time traceback types typing"
)
FIRST_TICK_SECONDS, TICK_SECONDS = 0.02, 0.025
GRACE_SECONDS = 0.05
STACK_BYTES = 64 << 20
PAGE = resource.getpagesize()
ROOM_BYTES = 2 << 30  # of address space above the memory limit: what is reserved and never touched


class Zygote:
    """State that lives as long as the worker."""

    def __init__(self, control: socket.socket, settings: dict[str, Any]) -> None:
        self.control = control
        self.tier: str = settings["tier"]
        self.settings = settings
        self.several_ids: bool = settings.get("several_ids", False)
        self.null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.arch = kernel.architecture() if self.tier != "none" else None
        self.filter = b"" if self.tier in ("landlock", "none") else self.filter_for(0, False)  # the same for every program
        self.own_namespace = -1
        self.folders: list[str] = []

    # -- closing in

    def close_in(self) -> None:
        """Build the world that programs see. Called in the first process of the worker's own process namespace."""
        os.umask(0o022)
        if self.tier == "namespaces":
            self.build_root()
            self.own_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": "/tmp",
            "TMPDIR": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        if self.tier != "none":
            kernel.bound_capabilities()
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = [path for path in sys.path if path != self.settings["own_code"]]
        sys.path += [path for path in self.settings["packages"] if path not in sys.path]
        sys.argv[:] = ["solution.py"]
        for name in WARM.split():
            __import__(name)
        program.set_up_streams()
        warm_up()
        gc.collect()
        gc.freeze()
        gc.disable()  # for good in here, which makes no cycles; `sandbox_program` switches it on before untrusted code

    def build_root(self) -> None:
        """A root folder of its own: the system read-only, the interpreter, a few devices; no home and no secrets."""
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=4m,mode=755")
        os.mkdir("/tmp/.old")
        kernel.pivot_root("/tmp", "/tmp/.old")
        os.chdir("/")
        for folder in ("/dev", "/proc", "/tmp"):
            os.makedirs(folder, exist_ok=True)
        self.mount_proc()
        for path in self.settings["read_only"]:
            place(path)
        for name in ("null", "zero", "full", "random", "urandom"):
            os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
            kernel.mount(f"/.old/dev/{name}", f"/dev/{name}", None, kernel.MS_BIND)
        for link, target in (
            ("fd", "/proc/self/fd"),
            ("stdin", "fd/0"),
            ("stdout", "fd/1"),
            ("stderr", "fd/2"),
            ("shm", "/tmp"),
        ):
            os.symlink(target, f"/dev/{link}")
        os.makedirs("/etc", exist_ok=True)
        for name, text in (
            ("passwd", "root:x:0:0::/:/bin/sh\nprogram:x:1000:1000::/tmp:/bin/sh\ntests:x:1001:1001::/tmp:/bin/sh\n"),
            ("group", "root:x:0:\nprogram:x:1000:\ntests:x:1001:\n"),
            ("hosts", "127.0.0.1 localhost\n"),
        ):
            with open(f"/etc/{name}", "w", encoding="utf-8") as file:
                file.write(text)
        kernel.umount("/.old")
        os.rmdir("/.old")
        kernel.mount(
            "tmpfs", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
        )
        with contextlib.suppress(OSError):
            socket.sethostname("sandbox")

    def mount_proc(self) -> None:
        flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
        for options in (
            "subset=pid",
            None,
        ):  # before Linux 5.8 without the option: then it also shows facts about the machine
            try:
                kernel.mount("proc", "/proc", "proc", flags, options)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        raise OSError(errno.EINVAL, "mount /proc: refused")

    # -- one program

    def serve(self) -> NoReturn:
        """Answer the supervisor until it hangs up; then everything in here ends with this process."""
        while True:
            message, descriptors = self.receive()
            names: list[list[str]] = message["descriptors"]
            children: dict[str, int] = {}
            try:
                for place_of, role in enumerate(message["roles"]):
                    if place_of:
                        _, descriptors = self.receive()
                    given = dict(zip(names[place_of], descriptors, strict=True))
                    try:
                        children[role] = self.spawn(role, given, message["limits"])
                    finally:
                        for descriptor in descriptors:
                            os.close(descriptor)
                answer = self.watch(children, message["limits"])
            except OSError as error:
                for pid in children.values():
                    self.kill(pid)
                    os.waitpid(pid, 0)
                answer = {"fault": str(error)}
            self.clean_up()
            self.control.send(json.dumps(answer).encode())

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        descriptors = array.array("i")
        space, flags = socket.CMSG_SPACE(8 * descriptors.itemsize), socket.MSG_CMSG_CLOEXEC
        data, ancillary, _, _ = self.control.recvmsg(65536, space, flags)
        if not data:
            os._exit(0)
        for _, kind, content in ancillary:
            if kind == socket.SCM_RIGHTS:
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        return json.loads(data), list(descriptors)

    def spawn(self, role: str, given: dict[str, int], limits: dict[str, Any]) -> int:
        """Fork a child into a jail of its own."""
        folder = ""
        if self.tier == "namespaces":
            # subtle: after one unshare every later fork goes to the same new namespace, until this is undone by setns.
            kernel.setns(self.own_namespace, kernel.CLONE_NEWPID)
            kernel.unshare(kernel.CLONE_NEWPID)
        else:
            folder = self.make_folder(role)
        pid = os.fork()
        if pid:
            return pid
        try:
            self.enter_jail(role, given, limits, folder)
        except BaseException as error:  # noqa: BLE001  nothing of this process may go on outside a jail
            with contextlib.suppress(BaseException):
                os.write(2, f"jail: {error}\n".encode())
            os._exit(125)
        return run(role)

    def enter_jail(self, role: str, given: dict[str, int], limits: dict[str, Any], folder: str) -> None:
        """Everything between the fork and the first untrusted byte."""
        slots = ROLES[role]
        high = [os.dup(self.null if name is None else given[name]) for name in slots]
        for slot, descriptor in enumerate(high):
            os.dup2(descriptor, slot, inheritable=slot < 3)
        kernel.close_from(len(slots))
        os.setsid()
        if self.tier == "namespaces":
            kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
            sizes = f"size={limits['scratch_bytes']},nr_inodes={limits['scratch_files']},mode=1777"
            kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, sizes)
            self.mount_proc()
            os.chdir("/tmp")
        else:
            os.chdir(folder)
            os.environ["HOME"] = os.environ["TMPDIR"] = folder
        if self.settings["in_cgroup"]:
            score = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            os.write(score, b"1000")  # where the kernel must end one process of this worker, it is not the zygote
            os.close(score)
        self.set_limits(role, limits)
        if self.tier == "none":
            return
        assert self.arch is not None
        if self.several_ids:
            number = INNER_ID + (role == "judge") if self.tier == "namespaces" else self.settings["drop_to"]
            os.setgroups([])
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
        kernel.drop_capabilities()
        kernel.no_new_privileges()
        # What watches over commands must not be readable by them; elsewhere a change of user has set this to 0.
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0 if role == "command" else 1)
        # Inside bubblewrap a compiler may start processes: the worker, and with it all of them, ends after that one program.
        single = self.tier == "landlock" and not (role == "command" and self.settings["commands"])
        if self.tier == "landlock":
            kernel.landlock(self.settings["read_only"], DEVICES, [folder], run_from_writable=not single)
        kernel.install_seccomp(self.filter_for(os.getpid(), single) if self.tier == "landlock" else self.filter)

    def filter_for(self, pid: int, single: bool) -> bytes:
        """The seccomp filter of this tier; without a process namespace it names the one process that may be signalled."""
        assert self.arch is not None
        return kernel.seccomp_program(
            self.arch,
            single_process=single,
            unseen_memory=self.settings["in_cgroup"],
            own_pid=pid,
            truncate=self.tier != "landlock" or kernel.landlock_version() >= 3,
        )

    def set_limits(self, role: str, limits: dict[str, Any]) -> None:
        memory = limits["memory_bytes"]
        cpu = int(limits["cpu_seconds"] * limits["factor"]) + 2
        wide = role == "command"  # other runtimes reserve far more than they touch
        if wide:
            cpu += int(limits["compile_seconds"])
        processes = limits["processes"] + (0 if self.several_ids else 4)
        for name, soft, hard in (
            (resource.RLIMIT_DATA, 4 * memory if wide else memory, None),
            (resource.RLIMIT_AS, memory + (64 << 30 if wide else ROOM_BYTES), None),
            (resource.RLIMIT_STACK, STACK_BYTES, None),
            (resource.RLIMIT_CPU, cpu, cpu + 1),
            (resource.RLIMIT_FSIZE, limits["scratch_bytes"], None),
            (resource.RLIMIT_NOFILE, limits["open_files"], None),
            (resource.RLIMIT_CORE, 0, None),
            (resource.RLIMIT_MEMLOCK, 0, None),
            (resource.RLIMIT_MSGQUEUE, 0, None),
            (resource.RLIMIT_NPROC, processes if self.tier == "namespaces" else -1, None),
        ):
            if soft == -1:
                continue
            _, present = resource.getrlimit(name)
            allowed = present if present != resource.RLIM_INFINITY else max(soft, hard or soft)
            resource.setrlimit(name, (min(soft, allowed), min(hard or soft, allowed)))

    # -- watching

    def watch(self, children: dict[str, int], limits: dict[str, Any]) -> dict[str, Any]:
        """Wait for the process that decides, stop everything at a limit, and say what was used."""
        start = time.monotonic()
        decisive = children.get("judge") or next(iter(children.values()))
        descriptor = os.pidfd_open(decisive)
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        poller.register(self.control, select.POLLIN)
        stopped: str | None = None
        starved = peak = seen_cpu = 0.0
        tick = FIRST_TICK_SECONDS
        try:
            while True:
                events = poller.poll(tick * 1000)
                if any(number == self.control.fileno() for number, _ in events):
                    os._exit(0)  # the supervisor has gone, or speaks out of turn: end everything
                if events:
                    break
                tick = TICK_SECONDS
                wall = time.monotonic() - start
                use = self.use(set(children.values()))
                starved, peak, seen_cpu = max(starved, use["starved"]), max(peak, use["memory"]), max(seen_cpu, use["cpu"])
                stopped = over_limit(use, wall, limits)
                if stopped is None and self.folders:
                    size, files = folder_use(self.folders)
                    if size > limits["scratch_bytes"] or files > limits["scratch_files"]:
                        stopped = "scratch"
                if stopped:
                    break
        finally:
            os.close(descriptor)
        wall = time.monotonic() - start
        cpu, statuses = 0.0, {}
        for role, pid in children.items():
            ended = self.wait_briefly(pid) if stopped is None else False
            self.kill(pid)
            _, status, usage = os.wait4(pid, 0)
            statuses[role] = os.waitstatus_to_exitcode(status) if ended else None
            cpu += usage.ru_utime + usage.ru_stime
            if role != "judge":
                peak = max(peak, usage.ru_maxrss * 1024)
        if self.tier == "none":
            reap_strays()
        return {
            "statuses": statuses,
            "stopped": stopped,
            "wall": wall,
            "cpu": max(cpu, seen_cpu),  # what is ended before it is waited for is in the second alone
            "starved": min(starved, wall * 0.95),
            "peak": int(peak),
            "left": self.left() if limits.get("count_left") else 0,
        }

    def wait_briefly(self, pid: int) -> bool:
        """Whether a child ends by itself, which a solution does as soon as its tests have hung up."""
        descriptor = os.pidfd_open(pid)
        try:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            return bool(poller.poll(GRACE_SECONDS * 1000))
        finally:
            os.close(descriptor)

    def kill(self, pid: int) -> None:
        """End a child, and with it everything in its process namespace; without one, everything in its session."""
        with contextlib.suppress(ProcessLookupError):
            if self.tier != "namespaces":
                os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def left(self) -> int:
        """Processes of this worker beside the zygote."""
        if self.tier != "namespaces":
            return len(descendants({os.getpid()})) - 1
        return sum(name.isdigit() for name in os.listdir("/proc")) - 1

    def use(self, roots: set[int]) -> dict[str, float]:
        """Processor time, time waited for one, and memory of these processes and all their descendants."""
        cpu = starved = 0.0
        members = descendants(roots)
        memory = 0
        for pid, fields in members.items():
            cpu += sum(map(int, fields[11:15])) / TICKS_PER_SECOND
            memory += int(fields[21]) * PAGE
            starved += program.waited_for_cpu(pid)
        if memory > 64 << 20:
            memory = sum(proportional_memory(pid, int(fields[21]) * PAGE) for pid, fields in members.items())
        return {
            "cpu": cpu,
            "starved": starved,
            "memory": memory,
            "threads": sum(int(fields[17]) for fields in members.values()),
        }

    # -- scratch folders, where there is no mount namespace

    def make_folder(self, role: str) -> str:
        import tempfile

        folder = tempfile.mkdtemp(prefix=f"{role}-", dir=self.settings["scratch"])
        if self.several_ids:
            os.chown(folder, self.settings["drop_to"], self.settings["drop_to"])
        self.folders.append(folder)
        return folder

    def clean_up(self) -> None:
        while self.folders:
            remove_tree(self.folders.pop())


TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
DEVICES = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"]


def over_limit(use: dict[str, float], wall: float, limits: dict[str, Any]) -> str | None:
    """Which limit is passed. Wall time that was spent waiting for a processor does not count, up to ten times the limit."""
    factor = limits["factor"]
    if use["memory"] > limits["memory_bytes"]:
        return "memory"
    if use["threads"] > limits["processes"] + 2:  # the two that are ours; where no kernel limit counts them
        return "processes"
    extra = limits["compile_seconds"]
    if use["cpu"] > limits["cpu_seconds"] * factor + extra:
        return "cpu"
    if wall - min(use["starved"], wall * 0.95) > limits["wall_seconds"] * factor + extra:
        return "wall"
    return "wall" if wall > 10 * (limits["wall_seconds"] * factor + extra) else None


def place(path: str) -> None:
    """Put a file or folder of the old root at the same place in the new one, read-only; a symbolic link stays one."""
    old = f"/.old{path}"
    if os.path.lexists(path) or not os.path.lexists(old):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.makedirs(path, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.bind_read_only(old, path)


WARM_TIMES = 40  # the interpreter rewrites code for what it meets after some rounds; every child would do that anew
WARM_PROGRAM = (
    b"def repeat(value, times=2):\n    values = [value] * times\n    return (values, {'first': value}, {1.5, times}, None)\n"
)
WARM_TESTS = (
    "def check(candidate):\n"
    "    for value in ('a', 1, [True]):\n"
    "        assert candidate(value)[0] == [value, value], 'no'\n"
    "check(repeat)\n"
)


class Loop:
    """Solution and tests in one process: what the tests send is answered at once. For trusted code alone."""

    def __init__(self) -> None:
        self.solution = program.Solution(cast(Any, self))
        self.answer = ""

    def send(self, text: str) -> None:
        self.answer = self.solution.answer(json.loads(text))

    def receive(self) -> Any:
        return json.loads(self.answer)


def warm_up() -> None:
    """Do before the first fork what every child does: compile, encode, decode, ask and answer."""
    for _ in range(WARM_TIMES):
        loop = Loop()
        exec(program.compile_source(WARM_PROGRAM, "warm.py"), loop.solution.module.__dict__)  # noqa: S102  ours
        judge = program.Judge(cast(Any, loop), -1)
        space: dict[str, Any] = {program.CHECK: judge.count_check}
        tests = program.compile_tests(WARM_TESTS)
        program.bind_names(judge, space, program.names_used(tests), "repeat")
        exec(tests, space)  # noqa: S102
        assert (judge.checks, judge.calls) == (3, 3)
    del sys.modules[program.MODULE]


def run(role: str) -> NoReturn:
    if role == "solution":
        program.run_solution(3, 4)
    if role == "judge":
        program.run_tests(3, 4, 5)
    if role == "together":
        program.run_together(3, 4)
    if role == "script":
        program.run_script(3)
    program.run_command(3, 4)


def descendants(roots: set[int]) -> dict[int, list[str]]:
    """Fields of /proc/PID/stat behind the name, for these processes and everything below them."""
    fields: dict[int, list[str]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    fields[int(name)] = file.read().rpartition(")")[2].split()
            except (OSError, ValueError):
                continue
    found = {pid: fields[pid] for pid in roots if pid in fields}
    grew = True
    while grew:
        grew = False
        for pid, values in fields.items():
            if pid not in found and int(values[1]) in found:
                found[pid] = values
                grew = True
    return found


def proportional_memory(pid: int, otherwise: int) -> int:
    """A process's memory, pages that it shares counted by their share: forks of a warm interpreter share most of it."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return otherwise


def reap_strays() -> None:
    """End and reap what programs left behind, where no namespace does it: they are this process's children by now."""
    for _ in range(1000):
        strays = set(descendants({os.getpid()})) - {os.getpid()}
        for pid in strays:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def folder_use(folders: list[str]) -> tuple[int, int]:
    """Bytes and files below these folders; what vanishes meanwhile does not count."""
    size, files, waiting = 0, 0, list(folders)
    while waiting and files < 100_000:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    files += 1
                    with contextlib.suppress(OSError):
                        facts = entry.stat(follow_symlinks=False)
                        size += facts.st_blocks * 512
                        if stat.S_ISDIR(facts.st_mode):
                            waiting.append(entry.path)
        except OSError:
            continue
    return size, files


def remove_tree(folder: str) -> None:
    """Remove a folder whatever is in it: unreadable folders, paths of any depth, links (which are not followed)."""
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        while True:
            # Flatten: move every folder of the first level's children up until none has children, removing files on the way.
            deeper = False
            for name in os.listdir(root):
                if not stat.S_ISDIR(os.lstat(name, dir_fd=root).st_mode):
                    os.unlink(name, dir_fd=root)
                    continue
                with contextlib.suppress(OSError):
                    os.chmod(name, 0o700, dir_fd=root)
                inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=root)
                try:
                    for child in os.listdir(inner):
                        if stat.S_ISDIR(os.lstat(child, dir_fd=inner).st_mode):
                            with contextlib.suppress(OSError):
                                os.chmod(child, 0o700, dir_fd=inner)
                            os.rename(child, f"up-{time.monotonic_ns()}", src_dir_fd=inner, dst_dir_fd=root)
                            deeper = True
                        else:
                            os.unlink(child, dir_fd=inner)
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=root)
            if not deeper:
                break
    finally:
        os.close(root)
    os.rmdir(folder)


def main() -> NoReturn:
    """Unshare, let the supervisor map the users, fork into the new process namespace, close in, serve."""
    control = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(control.recv(1 << 20))
    try:
        if settings["tier"] == "namespaces":
            kernel.unshare(
                kernel.CLONE_NEWUSER
                | kernel.CLONE_NEWNS
                | kernel.CLONE_NEWPID
                | kernel.CLONE_NEWNET
                | kernel.CLONE_NEWIPC
                | kernel.CLONE_NEWUTS
                | kernel.CLONE_NEWCGROUP
            )
            control.send(b'{"unshared": true}')
            mapped = json.loads(control.recv(4096))
            if mapped.get("error"):
                raise OSError(errno.EPERM, mapped["error"])
            settings["several_ids"] = mapped["several_ids"]
            launcher = os.getpid()
            first = os.fork()
            if first:
                control.close()
                os.waitpid(first, 0)
                os._exit(0)
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() not in (0, launcher):
                os._exit(1)
        elif settings["tier"] == "none":
            kernel.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
        zygote = Zygote(control, settings)
        zygote.close_in()
    except OSError as error:
        control.send(json.dumps({"error": error.strerror or str(error)}).encode())
        os._exit(1)
    control.send(b'{"ready": true}')
    zygote.serve()
