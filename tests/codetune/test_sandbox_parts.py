"""The parts of the sandbox that can be looked at without running a program: values, filters, clean-up, marks."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codetune import sandbox_kernel as kernel
from codetune.sandbox_languages import LANGUAGES
from codetune.sandbox_program import CHECK, compile_tests
from codetune.sandbox_values import Decoder, Encoder, Malformed, Unsupported
from codetune.sandbox_zygote import remove_tree

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
hashable = st.recursive(scalars, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=6)
values = st.recursive(
    hashable
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.datetimes()
    | st.dates()
    | st.timedeltas()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.sets(hashable, max_size=4)
        | st.tuples(inner)
    ),
    max_leaves=20,
)


def there_and_back(value: Any) -> Any:
    def refuse(item: Any) -> Any:
        raise Unsupported(type(item).__name__)

    def unknown(form: list[Any]) -> Any:
        raise Malformed("a handle")

    return Decoder(unknown).decode(json.loads(Encoder(refuse).text(value)))


@given(values)
def test_plain_values_arrive_as_they_were(value: Any) -> None:
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value)


def test_types_that_json_lacks() -> None:
    for value in (
        2**70_000,
        -(3**9000),
        "\ud800",
        range(1, 9, 2),
        slice(1, None),
        ...,
        bytearray(b"\x00\xff"),
        collections.deque([1, 2], maxlen=3),
        decimal.Decimal("1.10"),
        fractions.Fraction(2, 3),
        datetime.timedelta(days=1, microseconds=5),
    ):
        back = there_and_back(value)
        assert (back, type(back)) == (value, type(value))
    assert there_and_back(len) is len
    assert there_and_back(ValueError) is ValueError
    assert str(there_and_back(float("nan"))) == "nan"


def test_values_of_subclasses_travel_as_their_plain_base() -> None:
    class Equal(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    back = there_and_back([Equal(5), collections.OrderedDict(a=1), collections.Counter("aa")])
    assert [type(item) for item in back] == [int, dict, dict]
    assert back == [5, {"a": 1}, {"a": 2}]
    assert back[0] != 6
    point = collections.namedtuple("point", "x y")(1, 2)
    assert (there_and_back(point).y, there_and_back(point)) == (2, (1, 2))


def test_one_object_in_two_places_stays_one() -> None:
    row: list[int] = [1]
    back = there_and_back({"a": [row, row], "b": row})
    back["b"].append(2)
    assert back == {"a": [[1, 2], [1, 2]], "b": [1, 2]}
    loop: list[Any] = []
    loop.append(loop)
    assert there_and_back(loop)[0][0] is not None


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        "[]",
        "[1]",
        '["no such tag"]',
        '["=", 5]',
        '["=", -1]',
        '["@", 0]',
        '["i", 5]',
        '["d", 1]',
        '["s", ["l"]]',
        '["D", "x"]',
        '["r", 1]',
        '["g", "builtins.eval"]',
        '["g", "eval"]',
        '["g", "getattr"]',
        '["T", "x", 1]',
        '["n", "x", ["a b"], 1]',
        '["n", "__import__(1)", []]',
        '["b", 1]',
    ],
)
def test_what_no_encoder_writes_is_malformed(text: str) -> None:
    def unknown(form: list[Any]) -> Any:
        raise Malformed("a handle")

    with pytest.raises(Malformed):
        Decoder(unknown).decode(json.loads(text))


# ---------------------------------------------------------------------------------------------------------------------
# seccomp: the filter is run here as the kernel runs it


def answer(program: bytes, number: int, audit: int, arguments: tuple[int, ...] = ()) -> int:
    """What a filter returns for a system call."""
    data = struct.pack("=iIQ6Q", number, audit, 0, *(arguments + (0,) * 6)[:6])
    code = [struct.unpack_from("HBBI", program, place) for place in range(0, len(program), 8)]
    place = value = 0
    while True:
        operation, if_true, if_false, constant = code[place]
        place += 1
        if operation == 0x20:
            (value,) = struct.unpack_from("=I", data, constant)
        elif operation == 0x06:
            return constant
        else:
            holds = {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[operation]
            place += if_true if holds else if_false


ALLOW, KILL, EPERM, ENOSYS, EAFNOSUPPORT, PRETENDED = 0x7FFF0000, 0x80000000, 0x50001, 0x50026, 0x50061, 0x50000
# Numbers as in the kernel's own tables: x86_64, aarch64.
CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "openat": (257, 56),
    "mmap": (9, 222),
    "futex": (202, 98),
    "exit_group": (231, 94),
    "getpid": (39, 172),
}


@pytest.mark.parametrize("arch", kernel.ARCHITECTURES.values(), ids=lambda arch: arch.name)
@pytest.mark.parametrize("single", [False, True])
def test_filters_on_both_architectures(arch: kernel.Architecture, single: bool) -> None:
    program = kernel.seccomp_program(arch, single_process=single, unseen_memory=False, own_pid=77)
    column = arch.column

    def of(number: int | None, *arguments: int) -> int:
        assert number is not None
        return answer(program, number, arch.audit, arguments)

    def named(name: str, *arguments: int) -> int:
        return of(kernel.NUMBERS[name][column], *arguments)

    for name, numbers in CALLS.items():
        assert of(numbers[column]) == ALLOW, name
    for name in kernel.FORBIDDEN:
        if kernel.NUMBERS[name][column] is not None:
            assert named(name) == EPERM, name
    for other in (0x40000003, 0x40000028, 0xC000003E, 0xC00000B7):  # i386, 32-bit ARM, x86_64, aarch64
        if other != arch.audit:
            assert answer(program, CALLS["getpid"][column], other) == KILL
    if arch.name == "x86_64":
        assert of(0x40000000 + 39) == KILL
    assert named("clone3") == ENOSYS
    assert of(kernel.NEWEST_KNOWN) in (ALLOW, ENOSYS)
    for number in (kernel.NEWEST_KNOWN + 1, 500, 0x3FFFFFFF):
        assert of(number) == ENOSYS
    assert named("memfd_create") == ENOSYS
    assert named("clone", 0x3D0F00) == ALLOW, "a thread"
    assert named("clone", 0x10000011) == EPERM, "a user namespace"
    assert named("clone", 17) == (EPERM if single else ALLOW), "a process"
    assert named("socketpair", 1) == ALLOW
    assert named("ioctl", 0, 0x5412) == EPERM
    assert named("ioctl", 0, 0x5401) == ALLOW
    if single:
        assert named("socket", 2) == EPERM
        assert (named("kill", 77), named("kill", 78), named("kill", 0), named("kill", 0xFFFFFFFF)) == (
            ALLOW,
            EPERM,
            EPERM,
            EPERM,
        )
        assert (named("tgkill", 77, 80), named("tgkill", 1, 1)) == (ALLOW, EPERM)
        assert (named("prlimit64", 0), named("prlimit64", 77), named("prlimit64", 1)) == (ALLOW, ALLOW, EPERM)
        assert named("fchmod") == PRETENDED
        assert named("execve") == EPERM
        other = (
            "shmat",
            "shmctl",
            "msgsnd",
            "msgrcv",
            "msgctl",
            "semop",
            "semctl",
            "semtimedop",
            "mq_unlink",
            "inotify_init1",
        )
        assert [named(name) for name in other] == [EPERM] * len(other)
        # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY; F_GETFL, F_SETFL, F_SETLK; FIOSETOWN, SIOCSPGRP, FIONREAD
        assert [named("fcntl", 3, command) for command in (8, 10, 15, 1024, 1026)] == [EPERM] * 5
        assert [named("fcntl", 3, command) for command in (3, 4, 6)] == [ALLOW] * 3
        assert [named("ioctl", 3, command) for command in (0x8901, 0x8902, 0x541B)] == [EPERM, EPERM, ALLOW]
        # reading, writing, both, and the fourth mode that is neither, each with O_TRUNC and without
        assert [named("openat", 0, 0, mode | 0x200) for mode in range(4)] == [EPERM, ALLOW, ALLOW, EPERM]
        assert [named("openat", 0, 0, mode) for mode in range(4)] == [ALLOW] * 4
        assert named("openat2") == ENOSYS
        old = kernel.seccomp_program(arch, single_process=True, unseen_memory=False, own_pid=77, truncate=False)
        assert answer(old, kernel.NUMBERS["truncate"][column] or 0, arch.audit) == EPERM
        assert named("truncate") == ALLOW
    else:
        assert [named("socket", family) for family in (1, 2, 10)] == [ALLOW] * 3
        assert [named("socket", family) for family in (16, 17, 40)] == [EAFNOSUPPORT] * 3
        assert (named("kill", 1), named("execve"), named("fchmod")) == (ALLOW, ALLOW, ALLOW)
        assert (named("fcntl", 3, 8), named("ioctl", 3, 0x8901), named("openat", 0, 0, 0x200)) == (ALLOW, ALLOW, ALLOW)
    counted = kernel.seccomp_program(arch, single_process=single, unseen_memory=True, own_pid=77)
    assert answer(counted, kernel.NUMBERS["memfd_create"][column] or 0, arch.audit) == ALLOW


def test_the_table_of_system_calls_is_the_kernel_headers() -> None:
    places = (("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1))
    seen = 0
    for path, column in places:
        if not Path(path).is_file():
            continue
        known = {}
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            words = line.replace("__NR3264_", "__NR_").split()
            if len(words) == 3 and words[0] == "#define" and words[1].startswith("__NR_") and words[2].isdigit():
                known[words[1].removeprefix("__NR_")] = int(words[2])
        for name, numbers in kernel.NUMBERS.items():
            if name in known:
                seen += 1
                assert numbers[column] == known[name], name
    if not seen:
        pytest.skip("the kernel's headers are not installed")


# ---------------------------------------------------------------------------------------------------------------------


def test_clean_up_removes_anything_and_follows_nothing(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "link").symlink_to(outside)
    os.link(outside / "kept", folder / "hard")
    os.mkfifo(folder / "fifo")
    (folder / "locked").mkdir()
    (folder / "locked" / "file").write_text("x")
    (folder / "locked" / "inner").mkdir()
    (folder / "locked" / "inner").chmod(0)
    (folder / "locked").chmod(0)
    here = os.open(folder, os.O_RDONLY)
    for _ in range(1500):  # deeper than a path may be long, and than Python may recurse
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    remove_tree(str(folder))
    assert not folder.exists()
    assert (outside / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    ("tests", "checks"),
    [
        ("assert True\n", 1),
        ("for i in range(3):\n    assert i < 5\n", 3),
        ("def check(f):\n    assert f\n", 0),
        ("if 1 == 2:\n    raise AssertionError\n", 1),
        ("if False:\n    assert True\n", 0),
        ("class T:\n    def assertEqual(self, a, b): pass\nT().assertEqual(1, 1)\n", 1),
        ("from __future__ import annotations\nassert 1, 'one'\n", 1),
        ("x = 1\n", 0),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    assert True\nfinally:\n    assert True\n", 2),
        ("match 1:\n    case 1:\n        assert True\n", 1),
        ("if 1 == 2:\n    pass\nelif 1 == 1:\n    assert True\nelse:\n    assert False\n", 1),
        ("while True:\n    assert True\n    break\nelse:\n    assert False\n", 1),
        ("from contextlib import nullcontext as raises\nwith raises(), raises():\n    pass\n", 1),
        ("f = lambda: [x if x else 0 for x in (1, 2)]\nassert f()\n", 1),
    ],
)
def test_checks_that_are_reached_are_counted(tests: str, checks: int) -> None:
    counted = [0]

    def count() -> None:
        counted[0] += 1

    exec(compile_tests(tests), {CHECK: count})
    assert counted == [checks]


def test_the_mark_goes_where_the_tests_end() -> None:
    assert LANGUAGES["bash"].mark("true", "M").splitlines() == ["true", "printf '\\n%s\\n' M"]
    cpp = LANGUAGES["cpp"].mark("int f() { return 1; }\nint main() { assert(f() == 1); }", "M")
    assert cpp.index("assert") < cpp.index('"\\nM"') < cpp.rindex("}")
    java = LANGUAGES["java"].mark("class Problem { void f() {} public static void main(String[] a) { assert true; } }", "M")
    assert java.index("assert") < java.index("M") < java.rindex("}")
    assert java[java.index("M") :].count("}") == 2
    assert LANGUAGES["cpp"].mark("int main;", "M") == "int main;", "it has no braces, and can therefore not pass"
