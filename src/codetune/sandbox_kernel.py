"""What the sandbox asks of the Linux kernel, by system call: namespaces, mounts, seccomp, Landlock, capabilities, limits.

In: numbers and paths. Out: nothing, or an `OSError` that names the call. The trade: `ctypes` and the numbers of two
architectures in one table, in place of libraries and helper programs that a machine may lack. What it does not do: decide
anything; which of these calls a program meets is written in `sandbox_zygote.py`. Standard library only: the process that
runs it starts without site-packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEWTIME = 0x00000080
CLONE_THREAD = 0x00010000
NEW_NAMESPACES = 0x7E020000 | CLONE_NEWTIME

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
SECCOMP_MODE_FILTER = 2

# System calls by name, on x86_64 and on aarch64 (which lacks the older ones).
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "_sysctl": (156, None),
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chmod": (90, None),
    "chown": (92, None),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "close_range": (436, 436),
    "create_module": (174, None),
    "delete_module": (176, 106),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fanotify_init": (300, 262),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "fcntl": (72, 25),
    "finit_module": (313, 273),
    "fork": (57, None),
    "fremovexattr": (199, 16),
    "fsconfig": (431, 431),
    "fsetxattr": (190, 7),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "futimesat": (261, None),
    "get_kernel_syms": (177, None),
    "init_module": (175, 105),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioperm": (173, None),
    "iopl": (172, None),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "lchown": (94, None),
    "lookup_dcookie": (212, 18),
    "lremovexattr": (198, 15),
    "lsetxattr": (189, 6),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mbind": (237, 235),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "msgctl": (71, 187),
    "msgget": (68, 186),
    "msgrcv": (70, 188),
    "msgsnd": (69, 189),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open": (2, None),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "openat": (257, 56),
    "openat2": (437, 437),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "query_module": (178, None),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "removexattr": (197, 14),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "semctl": (66, 191),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "set_mempolicy": (238, 237),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "settimeofday": (164, 170),
    "setxattr": (188, 5),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmget": (29, 194),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "sysfs": (139, None),
    "syslog": (103, 116),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "truncate": (76, 45),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
    "ustat": (136, None),
    "utime": (132, None),
    "utimensat": (280, 88),
    "utimes": (235, None),
    "vfork": (58, None),
    "vhangup": (153, 58),
}
# Numbers above this one are newer than the table, and are answered as a kernel that lacks them would.
NEWEST_KNOWN = 456


@dataclass(frozen=True)
class Architecture:
    """What a filter must know of a processor: its column in `NUMBERS`, its audit constant, where foreign numbers begin."""

    name: str
    column: int
    audit: int
    foreign_from: int | None = None


ARCHITECTURES = {
    # x32 programs come under the same constant with bit 30 set in the number; i386 ones under another constant.
    "x86_64": Architecture("x86_64", 0, 0xC000003E, 0x40000000),
    "aarch64": Architecture("aarch64", 1, 0xC00000B7),
}
MACHINE_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


@functools.cache
def architecture() -> Architecture:
    """This machine's.

    Raises:
        OSError: there is no table for it, hence no filter and no isolation.
    """
    name = platform.machine().lower()
    name = MACHINE_NAMES.get(name, name)
    if name not in ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"no table of system calls for {name}; there is one for {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _raise(name: str) -> None:
    code = ctypes.get_errno()
    raise OSError(code, f"{name}: {os.strerror(code)}")


def _call(name: str, *arguments: int | bytes | None) -> int:
    """One system call by its name in `NUMBERS`."""
    number = NUMBERS[name][architecture().column]
    assert number is not None
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *passed))
    if result < 0:
        _raise(name)
    return result


def unshare(flags: int) -> None:
    if _libc.unshare(ctypes.c_int(flags)):
        _raise("unshare")


def setns(descriptor: int, kind: int) -> None:
    if _libc.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)):
        _raise("setns")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    given = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    if _libc.mount(given[0], given[1], given[2], ctypes.c_ulong(flags), given[3]):
        _raise(f"mount {target}")


def bind_read_only(source: str, target: str) -> None:
    """Bind a file or a folder with everything mounted below it, read-only, without setuid programs and devices."""
    mount(source, target, None, MS_BIND | MS_REC)
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, MS_PRIVATE, 0)
    at_recursive, at_fdcwd = 0x8000, -100
    try:
        _call("mount_setattr", at_fdcwd, target.encode(), at_recursive, attributes, len(attributes))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        for place in (target, *mounts_below(target)):
            remount_read_only(place)


def mounts_below(target: str) -> list[str]:
    """Mount points under a folder, as this process sees them."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        places = [line.split()[4] for line in file]
    plain = [re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), place) for place in places]
    return [place for place in plain if place.startswith(f"{target}/")]


def remount_read_only(target: str) -> None:
    """One mount, before Linux 5.12: what the mount already forbids must be said again."""
    present = os.statvfs(target).f_flag
    relatime, st_relatime = 1 << 21, 4096
    flags = present & (MS_NOSUID | MS_NODEV | MS_NOEXEC | 1024 | 2048) | (relatime if present & st_relatime else 0)
    mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | flags)


def umount(target: str) -> None:
    if _libc.umount2(target.encode(), ctypes.c_int(MNT_DETACH)):
        _raise(f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    _call("pivot_root", new.encode(), old.encode())


def prctl(option: int, *arguments: int) -> None:
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(ctypes.c_int(option), *values):
        _raise(f"prctl {option}")


def close_from(first: int) -> None:
    """Close every descriptor from this number on, whatever opened it."""
    try:
        _call("close_range", first, 0xFFFFFFFF, 0)
    except OSError:
        os.closerange(first, 65536)


def bound_capabilities() -> None:
    """No program started from here on can gain a capability; those that this process holds, it keeps."""
    for number in range(64):
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError:
            break  # the first number that this kernel does not know, or no right to drop: then there is nothing to drop
    with contextlib.suppress(OSError):  # before Linux 4.3 there is no ambient set
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)


def drop_capabilities() -> None:
    """Give up every capability: effective, permitted and inheritable."""
    header = struct.pack("Ii", 0x20080522, 0)
    if _libc.capset(header, bytes(24)):
        _raise("capset")


def no_new_privileges() -> None:
    prctl(PR_SET_NO_NEW_PRIVS, 1)


# ---------------------------------------------------------------------------------------------------------------------
# seccomp: a filter made by hand, so that no library is needed

_LOAD, _EQUAL, _AT_LEAST, _SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

# Never needed by a program that computes an answer: kernel configuration, other processes' memory, mounts and namespaces,
# interfaces with a history of kernel faults (io_uring, bpf, userfaultfd, perf, keyrings).
FORBIDDEN = (
    "_sysctl acct add_key adjtimex bpf chroot clock_adjtime clock_settime create_module delete_module fanotify_init "
    "finit_module fsconfig fsmount fsopen fspick get_kernel_syms init_module io_uring_enter io_uring_register "
    "io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl lookup_dcookie memfd_secret mbind "
    "migrate_pages modify_ldt mount mount_setattr move_mount move_pages name_to_handle_at nfsservctl "
    "open_by_handle_at open_tree perf_event_open pidfd_getfd pivot_root process_madvise process_mrelease "
    "process_vm_readv process_vm_writev ptrace query_module quotactl quotactl_fd reboot request_key set_mempolicy "
    "setdomainname sethostname setns settimeofday swapoff swapon sysfs syslog umount2 unshare uselib userfaultfd "
    "ustat vhangup"
).split()
# Memory that neither a process's own limit nor a sum over processes sees.
UNSEEN_MEMORY = ("memfd_create", "shmget", "msgget", "mq_open")
# Where nothing but Landlock and this filter stands between the program and the user's other processes.
OTHER_PROCESSES = (
    "fork vfork execve execveat tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal setpriority "
    "sched_setaffinity sched_setattr sched_setparam sched_setscheduler ioprio_set socket shmget shmat shmctl msgget msgsnd "
    "msgrcv msgctl semget semop semtimedop semctl mq_open mq_unlink inotify_init inotify_init1"
).split()
# Of `fcntl` and `ioctl`: whom the kernel signals about a descriptor, leases, and being told of changes in folders. Before
# Landlock 6 nothing else keeps such a signal, of any number, inside.
_FCNTL_TO_OTHERS = (8, 10, 15, 1024, 1026)  # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY
_IOCTL_TO_OTHERS = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP
# Landlock does not judge these. They are answered with success and do nothing, so that copying a file still works.
PRETENDED = (
    "chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat setxattr "
    "lsetxattr fsetxattr removexattr lremovexattr fremovexattr"
).split()
_SOCKET_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: a network namespace contains these; vsock, for one, it does not
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C


_Instruction = tuple[int, int, int, int]  # operation, steps to skip if true, if false, value


def seccomp_program(
    arch: Architecture, *, single_process: bool, unseen_memory: bool, own_pid: int = 0, truncate: bool = True
) -> bytes:
    """The filter as BPF instructions: refuses foreign system-call interfaces first, then by number, then by argument.

    `single_process` is the tier without namespaces: no fork, no exec, no sockets, signals to the process itself only.
    `unseen_memory` allows memory files and System V memory: only where a memory cgroup counts them. `truncate` allows to cut
    a file off by its path: only where Landlock judges that.
    """
    actions: dict[int, list[_Instruction]] = {}

    def on(names: Sequence[str], body: list[_Instruction]) -> None:
        for name in names:
            number = NUMBERS[name][arch.column]
            if number is not None:
                actions[number] = body

    def refuse(names: Sequence[str], error: int) -> None:
        on(names, [(_RETURN, 0, 0, _ERRNO | error)])

    def argument(place: int) -> _Instruction:
        return (_LOAD, 0, 0, _ARGUMENTS + 8 * place)

    def none_of(place: int, values: Sequence[int]) -> list[_Instruction]:
        count = len(values)
        tests = [(_EQUAL, count - number, 0, value) for number, value in enumerate(values)]
        return [argument(place), *tests, allowed, denied]

    denied, allowed = (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    unsupported = (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT)
    refuse(FORBIDDEN, errno.EPERM)
    refuse(["clone3"], errno.ENOSYS)  # its flags lie behind a pointer; C libraries then fall back to clone
    if not unseen_memory:
        refuse(UNSEEN_MEMORY, errno.ENOSYS)
    if single_process:
        refuse(OTHER_PROCESSES, errno.EPERM)
        refuse(PRETENDED, 0)
        on(["clone"], [argument(0), (_SET, 1, 0, CLONE_THREAD), denied, allowed])
        on(["kill", "tgkill"], [argument(0), (_EQUAL, 1, 0, own_pid), denied, allowed])
        # Limits of oneself only: another process of the same user could otherwise be starved or unleashed.
        on(["prlimit64"], [argument(0), (_EQUAL, 2, 0, 0), (_EQUAL, 1, 0, own_pid), denied, allowed])
        on(["fcntl"], none_of(1, _FCNTL_TO_OTHERS))
        # Before Landlock 3 whoever may write a file may cut it off: by its path, or by opening it for reading alone.
        if not truncate:
            refuse(["truncate"], errno.EPERM)
        for name, place in (("open", 1), ("openat", 2)):
            one_of_two = [(_SET, 0, 1, os.O_WRONLY), (_SET, 1, 2, os.O_RDWR), (_SET, 1, 0, os.O_RDWR)]  # both: neither
            on([name], [argument(place), (_SET, 0, 4, os.O_TRUNC), *one_of_two, denied, allowed])
        refuse(["openat2"], errno.ENOSYS)  # its flags lie behind a pointer
    else:
        on(["clone"], [argument(0), (_SET, 0, 1, NEW_NAMESPACES), denied, allowed])
        count = len(_SOCKET_FAMILIES)
        families = [(_EQUAL, count - place, 0, family) for place, family in enumerate(_SOCKET_FAMILIES)]
        on(["socket"], [argument(0), *families, unsupported, allowed])
    on(["socketpair"], [argument(0), (_EQUAL, 1, 0, 1), unsupported, allowed])
    on(["ioctl"], none_of(1, (_TIOCSTI, _TIOCLINUX, *(_IOCTL_TO_OTHERS if single_process else ()))))

    code: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, arch.audit),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if arch.foreign_from is not None:
        code += [(_AT_LEAST, 0, 1, arch.foreign_from), (_RETURN, 0, 0, _KILL_PROCESS)]
    code += _search(_stretches(actions))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _stretches(actions: dict[int, list[_Instruction]]) -> list[tuple[int, list[_Instruction]]]:
    """Numbers from which an action holds, each until the next one."""
    missing = [(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    stretches: list[tuple[int, list[_Instruction]]] = []
    for number in range(NEWEST_KNOWN + 2):
        body = actions.get(number, [(_RETURN, 0, 0, _ALLOW)]) if number <= NEWEST_KNOWN else missing
        if not stretches or stretches[-1][1] != body:
            stretches.append((number, body))
    return stretches


def _search(stretches: list[tuple[int, list[_Instruction]]]) -> list[_Instruction]:
    """A binary search over the numbers: the kernel runs the filter once per number and program when it is installed."""
    if len(stretches) == 1:
        return stretches[0][1]
    half = len(stretches) // 2
    below, above = _search(stretches[:half]), _search(stretches[half:])
    assert len(below) < 256, "a jump of BPF is one byte"
    return [(_AT_LEAST, len(below), 0, stretches[half][0]), *below, *above]


def install_seccomp(program: bytes) -> None:
    """Put the filter on this process and on everything it starts; `no_new_privileges` comes first."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    if _libc.prctl(
        ctypes.c_int(PR_SET_SECCOMP), ctypes.c_ulong(SECCOMP_MODE_FILTER), header, ctypes.c_ulong(0), ctypes.c_ulong(0)
    ):
        _raise("prctl seccomp")


# ---------------------------------------------------------------------------------------------------------------------
# Landlock

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1, 2, 4, 8, 1 << 14, 1 << 15
_REFER, _DEVICES = 1 << 13, (1 << 6) | (1 << 11)  # devices: make_char, make_block
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV


def landlock_version() -> int:
    """The kernel's Landlock ABI.

    Raises:
        OSError: there is none, or it is switched off.
    """
    return _call("landlock_create_ruleset", None, 0, 1)


def landlock(read_only: list[str], devices: list[str], writable: list[str], run_from_writable: bool = False) -> int:
    """Restrict this process to these paths, to no TCP, and to signals and abstract sockets of its own; returns the ABI."""
    version = landlock_version()
    rights = (1 << 13) - 1
    if version >= 2:
        rights |= _REFER
    if version >= 3:
        rights |= _TRUNCATE
    if version >= 5:
        rights |= _IOCTL_DEV
    attributes = struct.pack("Q", rights)
    if version >= 4:
        attributes += struct.pack("Q", 3)  # TCP bind and connect
    if version >= 6:
        attributes += struct.pack("Q", 3)  # abstract UNIX sockets and signals stay inside
    rules = _call("landlock_create_ruleset", attributes, len(attributes), 0)
    try:
        for paths, granted in (
            (read_only, _EXECUTE | _READ_FILE | _READ_DIR),
            (devices, _READ_FILE | _WRITE_FILE),
            (writable, rights & ~_DEVICES & ~_IOCTL_DEV & ~(0 if run_from_writable else _EXECUTE)),
        ):
            for path in paths:
                try:
                    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                is_folder = os.path.isdir(path)
                allowed = granted if is_folder else granted & _FILE_RIGHTS
                rule = struct.pack("=Qi", allowed, place)
                try:
                    _call("landlock_add_rule", rules, 1, rule, 0)
                finally:
                    os.close(place)
        _call("landlock_restrict_self", rules, 0)
    finally:
        os.close(rules)
    return version
