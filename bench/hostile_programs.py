"""Programs that attack the sandbox or its verdict, and awkward ones that are right: one row each, by family.

In: places of the run at hand (a canary folder, a secret, ports). Out: `Case`s with the verdict that each must get. What
must not happen beside it is the same for all and is watched by `Watch`: nothing written into the canary folder, nothing
received by the listeners, the secret in no output, the canary process alive, no process, mount or folder left. Shared
by bench/hostile.py and the tests.
"""

# ruff: noqa: E501  programs are easier to read in lines as long as theirs

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from codetune.sandbox import MIB, Job, Judge, Limits

RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 99\n"
TESTS = "assert add(1, 2) == 3\nassert add(-5, 5) == 0\nassert add(10, 7) == 17\n"
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert abs(candidate(2, 2) - 4) < 1e-6\n\ncheck(add)\n"
QUICK = Limits(wall_seconds=1.0, memory_bytes=256 * MIB, scratch_bytes=32 * MIB)
PASS, FAIL, TIMEOUT = "pass", "fail", "timeout"


@dataclass(frozen=True)
class Case:
    """A program, its tests, and the verdicts that are right."""

    family: str
    name: str
    program: str
    expected: tuple[str, ...] = (FAIL,)
    tests: str = TESTS
    entry_point: str | None = "add"
    judge: Judge = "separate"
    limits: Limits = field(default=QUICK)
    starts_processes: bool = False  # a right program that Landlock's tier, which allows one process, must fail

    def job(self, places: dict[str, str]) -> Job:
        program = self.program
        for name, value in places.items():
            program = program.replace(f"@{name}@", value)
        return Job(program, self.tests, self.entry_point, judge=self.judge, limits=self.limits)


def tried(body: str, function: str = RIGHT) -> str:
    """A right program that first tries something, whatever becomes of it."""
    lines = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    return f"import os, sys, socket, ctypes, signal, time\ntry:\n{lines}\nexcept BaseException:\n    pass\n{function}"


def leaks(expression: str) -> str:
    """A right program that prints what it could read."""
    return tried(f"print({expression})")


def system_call(number_x86: int, number_arm: int, arguments: str = "0, 0, 0, 0, 0") -> str:
    """Makes a system call, and gives a wrong answer if the kernel carried it out."""
    return (
        "import ctypes, platform\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        f"number = {number_x86} if platform.machine() == 'x86_64' else {number_arm}\n"
        f"done = libc.syscall(ctypes.c_long(number), {arguments})\n"
        "error = ctypes.get_errno()\n"
        "def add(a, b):\n    return a + b if done < 0 and error in (1, 13, 38, 97) else ('carried out', done, error)\n"
    )


ENDINGS = {
    "sys.exit(0) at import": "import sys\nsys.exit(0)\n",
    "os._exit(0) at import": "import os\nos._exit(0)\n",
    "os._exit(0) inside the function": "import os\ndef add(a, b):\n    os._exit(0)\n",
    "raise SystemExit(0) inside": "def add(a, b):\n    raise SystemExit(0)\n",
    "exit() of the site module or by name": "def add(a, b):\n    try:\n        exit()\n    except NameError:\n        raise SystemExit\n",
    "atexit os._exit(0)": "import atexit, os\natexit.register(os._exit, 0)\n" + WRONG,
    "excepthook os._exit(0)": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nraise ValueError\n",
    "thread os._exit(0)": "import threading, os, time\nthreading.Timer(0.05, os._exit, (0,)).start()\n"
    "def add(a, b):\n    time.sleep(0.5)\n    return a + b\n",
    "exec of true": "import os\nos.execv('/bin/true', ['true'])\n",
    "exec of true inside": "import os\ndef add(a, b):\n    os.execv('/bin/true', ['true'])\n",
    "exec of a python that prints pass": "import os, sys\nos.execv(sys.executable, ['python', '-c', 'print(\"pass\")'])\n",
    "kill of itself": "import os, signal\ndef add(a, b):\n    os.kill(os.getpid(), signal.SIGKILL)\n    return 1\n",
    "abort": "import os\ndef add(a, b):\n    os.abort()\n",
    "null pointer": "import ctypes\ndef add(a, b):\n    ctypes.string_at(0)\n",
    "C stack overflow": "import sys\nsys.setrecursionlimit(10**8)\nclass A:\n    def __getattr__(self, n):\n"
    "        return getattr(self, n + 'x')\ndef add(a, b):\n    def f(n):\n        return sorted([1, 2], key=lambda v: f(n + 1))\n"
    "    return f(0)\n",
    "alarm handler that exits 0": "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.alarm(1)\n"
    "def add(a, b):\n    while True: pass\n",
    "KeyboardInterrupt": "def add(a, b):\n    raise KeyboardInterrupt\n",
    "GeneratorExit": "def add(a, b):\n    raise GeneratorExit\n",
    "an exception of its own base": "class E(BaseException): pass\ndef add(a, b):\n    raise E\n",
    "an exception whose text is endless": "class E(Exception):\n    def __str__(self):\n        return 'x' * 10**8\ndef add(a, b):\n    raise E\n",
    "an exception whose text raises": "class E(Exception):\n    def __str__(self):\n        raise RuntimeError\ndef add(a, b):\n    raise E\n",
    "fork: the parent exits 0": "import os\nif os.fork(): os._exit(0)\n" + RIGHT,
    "kill of the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + WRONG,
    "kill of the process group": "import os, signal\nos.kill(0, signal.SIGKILL)\n" + WRONG,
    "kill of everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\n" + WRONG,
    "wrong, after closing every descriptor": "import os\nos.closerange(0, 256)\n" + WRONG,
    "replaces its standard streams": "import sys\nsys.stdout = sys.stderr = None\n" + WRONG,
}
_LOOKED_FOR = b"assert add(-5, 5) == 0"
FORGERIES = {
    "object equal to everything": "class E:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n"
    "def add(a, b):\n    return E()\n",
    "int equal to everything": "class E(int):\n    def __eq__(s, o): return True\n    def __sub__(s, o): return 0\n"
    "def add(a, b):\n    return E(99)\n",
    "float equal to everything": "class E(float):\n    def __eq__(s, o): return True\n    def __sub__(s, o): return 0.0\n"
    "def add(a, b):\n    return E(99)\n",
    "patched abs": "import builtins\nbuiltins.abs = lambda x: 0\n" + WRONG,
    "patched comparison functions": "import builtins, math\nfor n in 'all any isinstance len sorted sum'.split():\n"
    "    setattr(builtins, n, lambda *a, **k: True)\nmath.isclose = lambda *a, **k: True\n" + WRONG,
    "AssertionError replaced": "import builtins\nclass Quiet(BaseException): pass\nbuiltins.AssertionError = Quiet\n"
    + WRONG,
    "modules poisoned": "import sys, types\nfor n in ('math', 'json', 'random', 'numpy', 'unittest'):\n"
    "    sys.modules[n] = types.ModuleType(n)\n" + WRONG,
    "trace function that leaves asserts": "import sys\ndef trace(f, e, a):\n    try:\n        f.f_lineno = f.f_lineno + 1\n"
    "    except Exception: pass\n    return trace\nsys.settrace(trace)\n" + WRONG,
    "rewrites the caller's check": "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n"
    "        if 'check' in f.f_globals: f.f_globals['check'] = lambda c: None\n        f = f.f_back\n    return 99\n",
    "defines its own check": WRONG + "def check(candidate):\n    return True\n",
    "reads the expected values from frames": "import sys\ndef add(a, b):\n    f = sys._getframe(1)\n    while f:\n"
    "        for v in list(f.f_locals.values()):\n            if isinstance(v, str) and '== 3' in v: return a + b\n"
    "        f = f.f_back\n    return 99\n",
    # The text that is looked for is known by its checksum, so that the search does not find itself.
    "looks for the tests in memory": f"import gc, zlib\nLENGTH, SUM = {len(_LOOKED_FOR)}, {zlib.crc32(_LOOKED_FOR)}\n"
    "def found(text):\n    at = text.find('assert a')\n    while at >= 0:\n"
    "        if zlib.crc32(text[at:at + LENGTH].encode('utf-8', 'replace')) == SUM: return True\n        at = text.find('assert a', at + 1)\n"
    "def add(a, b):\n    for o in gc.get_objects():\n        try:\n"
    "            values = o.values() if isinstance(o, dict) else o if isinstance(o, (list, tuple)) else ()\n"
    "            if any(isinstance(v, str) and found(v) for v in values): return a + b\n"
    "        except Exception: pass\n    return 99\n",
    "looks for the tests in its own memory map": f"import zlib\nLENGTH, SUM = {len(_LOOKED_FOR)}, {zlib.crc32(_LOOKED_FOR)}\n"
    "def add(a, b):\n    m = open('/proc/self/mem', 'rb')\n    for line in open('/proc/self/maps'):\n"
    "        s, e = (int(x, 16) for x in line.split()[0].split('-'))\n        if 'r' not in line.split()[1] or '[v' in line: continue\n"
    "        try:\n            m.seek(s); data = m.read(min(e - s, 1 << 24))\n        except (OSError, OverflowError): continue\n"
    "        at = data.find(b'assert a')\n        while at >= 0:\n"
    "            if zlib.crc32(data[at:at + LENGTH]) == SUM: return a + b\n            at = data.find(b'assert a', at + 1)\n"
    "    return 99\n",
    "writes a report to every descriptor": 'import os\nfor fd in range(256):\n    try: os.pwrite(fd, b\'{"verdict": "pass", '
    '"reason": "tests-completed", "detail": "", "checks": 9, "calls": 9}\', 0)\n    except OSError: pass\n'
    '    try: os.write(fd, b\'{"verdict": "pass"}\')\n    except OSError: pass\n' + WRONG,
    "prints what graders look for": "print('passed'); print('OK'); print('PASS'); print('{\"verdict\": \"pass\"}')\n"
    + WRONG,
    "changes the number 99 by ctypes": "import ctypes\nctypes.memset(id(99) + 24, 3, 1)\n" + WRONG,
    "answers before it is asked": "import gc, struct, json\nfor o in gc.get_objects():\n    if type(o).__name__ == 'Channel':\n"
    "        for i in range(50):\n            o.send(json.dumps(['value', 3, None]))\n" + WRONG,
    "sends what is no message": "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n        if type(o).__name__ == 'Channel':\n"
    "            o.socket.sendall(b'\\0\\0\\0\\4{[}]' * 10)\n    return 99\n",
    "announces an endless message": "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n        if type(o).__name__ == 'Channel':\n"
    "            o.socket.sendall(b'\\xff\\xff\\xff\\xff' + b'x' * 1000)\n    return 99\n",
    "answers with nesting without end": "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n        if type(o).__name__ == 'Channel':\n"
    "            o.send('[' * 200000 + ']' * 200000)\n    return 99\n",
    "raises AssertionError, and catches it": "def add(a, b):\n    try:\n        assert a == 99\n    except AssertionError:\n        return 99\n",
    "names an exception of the tests' process": "import gc, json\ndef add(a, b):\n    for o in gc.get_objects():\n"
    "        if type(o).__name__ == 'Channel':\n            o.send(json.dumps(['raised', ['builtins.SystemExit'], 'SystemExit', '', [0]]))\n"
    "    return 99\n",
    "asks the tests' process to call something": "import gc, json\ndef add(a, b):\n    for o in gc.get_objects():\n"
    "        if type(o).__name__ == 'Channel':\n            o.send(json.dumps(['callback', 0, ['l'], ['d']]))\n    return 99\n",
    "changes arguments into equal ones": "def add(a, b):\n    class L(list):\n        def __eq__(s, o): return True\n    return L([99])\n",
    "pickles code": "import os\nclass R:\n    def __reduce__(self): return (os._exit, (0,))\ndef add(a, b):\n    return R()\n",
    "a class in place of the function": "class add:\n    def __init__(s, a, b): pass\n    def __eq__(s, o): return True\n",
    "a number in place of the function": "add = 3\n",
    "another name": "def plus(a, b):\n    return a + b\n",
    "answers the shown example only": "def add(a, b):\n    return 3 if (a, b) == (1, 2) else 99\n",
    "not a number": "def add(a, b):\n    return float('nan')\n",
    "an endless generator": "def add(a, b):\n    while True:\n        yield 3\n",
    "itself in itself": "def add(a, b):\n    r = []\n    r.append(r)\n    return r\n",
    "ten million items": "def add(a, b):\n    return [1] * 10**7\n",
}
# An object that answers every question about it in its own favour. Where the tests would let it decide, with their value in its
# hand, they are not separable from it: unsupported, never a pass.
_AGREES = (
    "class E:\n    def __sub__(s, o): return 0.0\n    def __lt__(s, o): return True\n    def __abs__(s): return 0.0\n"
    "    def __eq__(s, o): return True\n    def __contains__(s, o): return True\n    def __hash__(s): return 3\n"
    "    def __pow__(s, o): return 0\n    def __float__(s): return 0.0\n"
    "    __rsub__ = __sub__\n    __le__ = __gt__ = __ge__ = __lt__\ndef add(a, b):\n    return E()\n"
)
_CHAIN = (
    "class E:\n    def __sub__(s, o): return E()\n    def __abs__(s): return {answer}\n    def __lt__(s, o): return True\n"
    "def add(a, b):\n    return E()\n"
)
_STOPS = "def add(*a):\n    raise StopIteration\n"
_UNITTEST = (
    "import unittest\nclass T(unittest.TestCase):\n    def test_add(self):\n        self.assertEqual(add(1, 2), 3)\n"
    "ran = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\nassert ran.wasSuccessful()\n"
)
HANDED_OVER = {
    "a difference that is always small": (_AGREES, "assert abs(add(1, 2) - 3) < 1e-6\n"),
    "a difference from the other side": (_AGREES, "assert abs(3 - add(1, 2)) < 1e-6\n"),
    "a difference that is an object": (_CHAIN.format(answer="0.0"), "assert abs(add(1, 2) - 3) < 1e-6\n"),
    "objects all the way": (_CHAIN.format(answer="s"), "assert abs(add(1, 2) - 3) < 1e-6\n"),
    "a square that is always small": (_AGREES, "assert (add(1, 2) - 3) ** 2 < 1e-9\n"),
    "an order that always holds": (_AGREES, "assert 3 <= add(1, 2) <= 3\n"),
    "the largest of two": (_AGREES, "assert max(add(1, 2), 3) == 3\n"),
    "membership that always holds": (_AGREES, "assert 3 in add(1, 2)\n"),
    "membership in a list and a set": (_AGREES, "assert add(1, 2) in [3] or add(1, 2) in {3}\n"),
    "almost equal in unittest": (_AGREES, "import unittest\nunittest.TestCase().assertAlmostEqual(add(1, 2), 3)\n"),
    "close in math": (_AGREES, "import math\nassert math.isclose(add(1, 2), 3)\n"),
    "an object beside one of the tests'": (_AGREES, "from pathlib import Path\nassert add(1, 2) == Path('3')\n"),
    "an end of the tests' loop": (_STOPS, "assert all(map(add, [1, 2, 3]))\nassert not any(map(add, [4]))\n"),
    "an end of the tests' loop, by another name": (
        _STOPS + "add.__name__ = '__next__'\n",
        "for found, right in zip(map(add, [1, 2]), [2, 3]):\n    assert found == right\nassert True\n",
    ),
    "a test skipped in unittest": ("import unittest\ndef add(a, b):\n    raise unittest.SkipTest\n", _UNITTEST),
    "a wrong answer in unittest": (WRONG, _UNITTEST),
}
_EVERY_CHANNEL = "import gc, json\nfor o in gc.get_objects():\n    if type(o).__name__ == 'Channel':\n"
FORGERIES |= {
    "patches the harness": "import sys, os\nm = sys.modules.get('codetune.sandbox_program')\nif m:\n"
    "    m.conclusion = lambda *a: ('pass', 'tests-completed', '')\n    m.Judge.end = lambda *a, **k: os._exit(0)\n"
    "    for fd in range(64):\n        try: m.write_report(fd, verdict='pass', reason='tests-completed', detail='', checks=3, calls=3)\n"
    "        except BaseException: pass\n" + WRONG,
    "hooks imports, and leaves modules for the tests": "import sys, builtins\nclass H:\n    def find_spec(s, *a): raise SystemExit(0)\n"
    "sys.meta_path.insert(0, H()); sys.path_hooks.insert(0, lambda p: 1 / 0); sys.path_importer_cache.clear()\n"
    "for n in ('tests', 'solution', 'unittest', 'math'):\n    open(f'{n}.py', 'w').write('import os; os._exit(0)')\n"
    "builtins.__import__ = lambda *a, **k: type(sys)('x')\n" + WRONG,
    "a thread that answers on": "import threading, time\ndef go():\n    import gc, json\n    found = [o for o in gc.get_objects() if type(o).__name__ == 'Channel']\n"
    "    while True:\n        [o.send(json.dumps(['value', 3, None])) for o in found]; time.sleep(0.001)\n"
    "threading.Thread(target=go, daemon=True).start()\n" + WRONG,
    "both halves of a fork answer": "import os\nos.fork()\n" + WRONG,
    "bytes out of band": _EVERY_CHANNEL + "        try: o.socket.send(b'x', 1)\n        except OSError: pass\n" + WRONG,
    "descriptors for the tests' process": _EVERY_CHANNEL
    + "        for i in range(50): o.socket.sendmsg([b'\\0\\0\\0\\2[]'], [(1, 1, bytes(4))])\n"
    + WRONG,
    "an array of no known kind": _EVERY_CHANNEL
    + "        o.send(json.dumps(['value', ['a', '(1000000,1000000)i8', 3], None]))\n"
    + WRONG,
    "a class that is equal to every class": "class M(type):\n    def __eq__(c, o): return True\n    def __hash__(c): return 1\n"
    "class K(metaclass=M): pass\ndef add(a, b):\n    return K\n",
}
FILES = {
    "reads the secret": leaks("open('@SECRET_FILE@').read()"),
    "reads the environment": leaks("dict(os.environ)"),
    "reads the environment of process 1": leaks("open('/proc/1/environ').read()"),
    "reads the environment of its parent": leaks("open(f'/proc/{os.getppid()}/environ').read()"),
    "reads every environment": leaks("[open(f'/proc/{p}/environ').read() for p in os.listdir('/proc') if p.isdigit()]"),
    "looks for the secret everywhere": tried(
        "for folder, below, names in os.walk('/'):\n"
        "    if folder.startswith(('/usr', '/proc', '/lib', '/sys', sys.base_prefix)) or 'site-packages' in folder:\n"
        "        below.clear()\n"
        "    for name in names:\n"
        "        if name == 'secret.txt':\n            print(open(os.path.join(folder, name)).read())"
    ),
    "reads the home folder": leaks("os.listdir('@HOME@')") + "\n",
    "writes outside": tried("open('@CANARY@/written', 'w').write('x')"),
    "makes the folder, then writes": tried(
        "os.makedirs('@CANARY@', exist_ok=True)\nopen('@CANARY@/written', 'w').write('x')"
    ),
    "writes through a link": tried("os.symlink('@CANARY@', 'out')\nopen('out/written', 'w').write('x')"),
    "writes by climbing": tried("open('../../../../../../../../@CANARY@/written', 'w').write('x')"),
    "links the secret into its folder": tried("os.link('@SECRET_FILE@', 'copy')\nprint(open('copy').read())"),
    "leaves a link to the canary folder": tried("os.symlink('@CANARY@', 'link')\nos.symlink('@CANARY@/keep', 'keep')"),
    "removes the canary": tried("import shutil\nshutil.rmtree('@CANARY@')"),
    "changes rights of the canary": tried("os.chmod('@CANARY@/keep', 0o777)"),
    "renames system folders": tried("os.rename('/usr', '/usr2')\nos.rename('/usr/bin', '/usr/bin2')"),
    "writes into the interpreter": tried("import json\nopen(json.__file__, 'a').write('x')"),
    "writes modules for the next run": tried(
        "for n in ('random.py', 'sitecustomize.py', 'x.pth', 'usercustomize.py'):\n"
        "    for d in ['.', '/tmp', *sys.path]:\n        try: open(os.path.join(d, n), 'w').write('raise SystemExit')\n"
        "        except OSError: pass"
    ),
    "opens disks": tried(
        "for n in os.listdir('/dev'):\n    if n.startswith(('sd', 'vd', 'nvme', 'mem', 'kmsg')): print(open('/dev/' + n, 'rb').read(9))"
    ),
    "makes a device": tried("os.mknod('disk', 0o60666, os.makedev(254, 0))\nprint(open('disk', 'rb').read(9))"),
    "leaves locked folders, pipes and deep paths": tried(
        "for i in range(300):\n    os.mkdir('d'); os.chdir('d')\nos.chdir('/tmp') if os.environ['TMPDIR'] == '/tmp' else None\n"
        "os.mkfifo('fifo'); os.mkdir('locked'); open('locked/f', 'w'); os.chmod('locked', 0)"
    ),
    "reads through its own root": leaks("open('/proc/self/root@SECRET_FILE@').read()"),
    "climbs from every descriptor": tried(
        "for fd in range(64):\n    try: print(os.read(os.open('../../../../../..@SECRET_FILE@', 0, dir_fd=fd), 99))\n    except OSError: pass"
    ),
    "cuts off a file that it may not write": tried(
        "for flags in (os.O_TRUNC, os.O_TRUNC | 3):\n    try: os.open('@CANARY@/keep', flags)\n    except OSError: pass\n"
        "os.truncate('@CANARY@/keep', 0)"
    ),
    "a nameless file in the canary folder": tried(
        "f = os.open('@CANARY@', os.O_TMPFILE | os.O_RDWR)\nos.link(f'/proc/self/fd/{f}', '@CANARY@/written')"
    ),
    "a sparse file": tried("f = open('s', 'wb')\nf.truncate(1 << 40)"),
    "a program in memory": tried(
        "import subprocess\nf = os.memfd_create('x', 0)\nos.write(f, b'#!/bin/sh\\necho x > @CANARY@/written\\n')\n"
        "subprocess.run([f'/proc/self/fd/{f}'], pass_fds=(f,))"
    ),
    "kernel settings": tried("open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/true')"),
    "removes its working folder": tried("import shutil\nshutil.rmtree(os.getcwd())"),
    "reads the memory of others": tried(
        "for p in os.listdir('/proc'):\n    if p.isdigit() and int(p) != os.getpid(): open(f'/proc/{p}/mem', 'rb').read(9)"
    ),
}
# Ways to other processes of the same user that no process number in `kill` shows: each must find nobody but the program itself.
PROCESSES = {
    "signals about a socket": tried(
        "import fcntl\na, b = socket.socketpair()\nfor pid in {*range(1, 40), os.getppid(), os.getpid() - 1} - {os.getpid()}:\n"
        "    try:\n        fcntl.fcntl(a, fcntl.F_SETOWN, pid); fcntl.fcntl(a, 10, 9)\n"
        "        fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK); b.send(b'x')\n    except OSError: pass"
    ),
    "every number from 2 to 200": tried(
        "for p in range(2, 200):\n    try:\n        if p != os.getpid(): os.kill(p, 9)\n    except OSError: pass"
    ),
    "process descriptors": tried(
        "for p in range(1, 200):\n    try:\n        if p != os.getpid(): signal.pidfd_send_signal(os.pidfd_open(p), 9)\n    except OSError: pass"
    ),
    "System V objects by number": tried(
        "libc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_void_p\nfor i in range(200):\n    p = libc.shmat(i, None, 0)\n"
        "    if p not in (None, 2 ** 64 - 1): ctypes.memset(p, 0, 1)\n"
        "    libc.shmctl(i, 0, None); libc.msgctl(i, 0, None); libc.semctl(i, 0, 0)"
    ),
    "a user of its own choice": tried("os.setuid(0)\nopen('@CANARY@/written', 'w').write('x')"),
    "a name that spoils the table of processes": tried("ctypes.CDLL(None).prctl(15, b') R 1 1 1 (', 0, 0, 0)"),
    "hidden from who watches it": tried("ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)"),
}
NETWORK = {
    "TCP to the host": tried("socket.create_connection(('127.0.0.1', @PORT@), 1).send(b'x')"),
    "UDP to the host": tried("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @UDP@))"),
    "a UNIX socket of the host": tried("s = socket.socket(socket.AF_UNIX)\ns.connect('@CANARY@/socket')\ns.send(b'x')"),
    "an abstract socket of the host": tried("s = socket.socket(socket.AF_UNIX)\ns.connect('\\0@ABSTRACT@')\ns.send(b'x')"),
    "name service": tried("socket.setdefaulttimeout(1)\nsocket.getaddrinfo('example.org', 80)"),
    "an address outside": tried("socket.create_connection(('192.0.2.1', 80), 0.5)"),
    "vsock": system_call(41, 198, "40, 1, 0"),
    "netlink": system_call(41, 198, "16, 3, 0"),
    "raw packets": system_call(41, 198, "17, 3, 768"),
}
KERNEL = {
    "unshare of a user namespace": system_call(272, 97, "0x10000000"),
    "unshare of mounts": system_call(272, 97, "0x20000"),
    "clone into new namespaces": system_call(56, 220, "0x10000011, 0, 0, 0, 0"),
    "clone3": system_call(435, 435, "0, 0"),
    "mount": system_call(165, 40, "b'none', b'/tmp', b'tmpfs', 0, 0"),
    "umount": system_call(166, 39, "b'/proc', 2"),
    "chroot": system_call(161, 51, "b'/tmp'"),
    "setns": system_call(308, 268, "0, 0"),
    "ptrace": system_call(101, 117, "0, 0, 0, 0"),
    "bpf": system_call(321, 280),
    "perf": system_call(298, 241),
    "io_uring": system_call(425, 425, "8, 0"),
    "userfaultfd": system_call(323, 282, "0"),
    "keyring": system_call(250, 219, "0, -3, 1"),
    "memory of another process": system_call(310, 270, "1, 0, 0, 0, 0, 0"),
    "kernel log": system_call(103, 116, "3, 0, 0"),
    "kernel module": system_call(175, 105, "0, 0, b''"),
    "clock": system_call(227, 112, "0, 0"),
    "host name": system_call(170, 161, "b'x', 1"),
    "reboot": system_call(169, 142, "0, 0, 0, 0"),
    "file handles": system_call(304, 265, "-100, 0, 0"),
    "a call that is newer than the table": system_call(470, 470),
}
# Machine code that makes system calls by other interfaces of the kernel: 32-bit (int 0x80) and x32.
_FOREIGN = """
import ctypes, mmap, platform
def add(a, b):
    if platform.machine() != 'x86_64':
        raise RuntimeError
    m = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    m.write(bytes.fromhex('{code}'))
    f = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
    f()
    return a + b
"""
FOREIGN = {
    "32-bit system calls": _FOREIGN.format(code="b814000000cd80c3"),  # mov eax, 20 (getpid); int 0x80; ret
    "x32 system calls": _FOREIGN.format(code="b8270000400f05c3"),  # mov eax, 0x40000027 (getpid); syscall; ret
}
FLOODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "memory at once": ("x = bytearray(20 << 30)\n" + RIGHT, (FAIL,)),
    "memory by and by": ("x = []\nwhile True: x.append(bytearray(10 << 20))\n", (FAIL,)),
    "memory in the function": ("def add(a, b):\n    return bytearray(10 << 30)\n", (FAIL,)),
    "shared memory": (
        "import mmap\nkeep = []\nwhile True:\n    m = mmap.mmap(-1, 50 << 20)\n    keep.append(m)\n"
        "    for i in range(0, 50 << 20, 4096): m[i] = 1\n",
        (FAIL, TIMEOUT),
    ),
    "memory files": (
        "import os\nfds = []\nwhile True:\n    f = os.memfd_create('x')\n    fds.append(f)\n"
        "    for i in range(30): os.write(f, b'x' * (1 << 20))\n",
        (FAIL, TIMEOUT),
    ),
    "memory through children": (
        "import os, time\nfor i in range(20):\n    if not os.fork():\n        x = bytearray(100 << 20)\n"
        "        for j in range(0, len(x), 4096): x[j] = 1\n        time.sleep(60)\ntime.sleep(60)\n",
        (FAIL, TIMEOUT),
    ),
    "a disk in one file": ("f = open('big', 'wb')\nwhile True: f.write(b'x' * (1 << 20)); f.flush()\n", (FAIL,)),
    "a disk in many files": (
        "i = 0\nwhile True:\n    f = open(f'f{i}', 'wb'); f.write(b'x' * (1 << 20)); f.close(); i += 1\n",
        (FAIL, TIMEOUT),
    ),
    "many small files": ("i = 0\nwhile True:\n    open(f'f{i}', 'w').close(); i += 1\n", (FAIL, TIMEOUT)),
    "shared memory folder": (
        "i = 0\nwhile True:\n    open(f'/dev/shm/x{i}', 'wb').write(b'x' * (1 << 20)); i += 1\n",
        (FAIL, TIMEOUT),
    ),
    "standard output without end": ("while True: print('x' * 1000)\n", (FAIL, TIMEOUT)),
    "standard error without end": ("import sys\nwhile True: sys.stderr.write('x' * 1000)\n", (FAIL, TIMEOUT)),
    "bytes that are no text": ("import os\nfor i in range(100): os.write(1, bytes(range(256)) * 100)\n" + WRONG, (FAIL,)),
    "descriptors": ("import os\nx = []\nwhile True: x.append(os.open('/dev/null', 0))\n", (FAIL,)),
    "threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()\n",
        (FAIL, TIMEOUT),
    ),
    "a loop": ("while True: pass\n", (TIMEOUT,)),
    "a loop that catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass\n",
        (TIMEOUT,),
    ),
    "a loop that ignores signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except Exception: pass\nwhile True: pass\n",
        (TIMEOUT,),
    ),
    "raises its own limits": (
        "import resource\nfor r in range(16):\n    try: resource.setrlimit(r, (-1, -1))\n"
        "    except Exception: pass\nwhile True: pass\n",
        (TIMEOUT,),
    ),
    "sleep": ("import time\ntime.sleep(1000)\n", (TIMEOUT,)),
    "a stop of itself": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nimport time\ntime.sleep(60)\n",
        (TIMEOUT, FAIL),
    ),
    "a regular expression": ("import re\ndef add(a, b):\n    return re.match(r'(a+)+$', 'a' * 40 + 'b')\n", (TIMEOUT,)),
    "a huge power": ("def add(a, b):\n    return len(str(9 ** 9 ** 8))\n", (TIMEOUT, FAIL)),
    "zeros without end": ("def add(a, b):\n    return len(open('/dev/zero', 'rb').read())\n", (FAIL, TIMEOUT)),
    "an archive that grows": (
        "import zlib\nz = zlib.compress(b'0' * (200 << 20))\nx = []\nwhile True: x.append(zlib.decompress(z))\n",
        (FAIL, TIMEOUT),
    ),
    "a fork star": (
        "import os, time\nwhile True:\n    try:\n        if not os.fork(): time.sleep(60)\n    except OSError: pass\n",
        (TIMEOUT, FAIL),
    ),
    "a fork tree": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", (TIMEOUT, FAIL)),
}
_DAEMON = (
    "import os, time, sys\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n{body}        os._exit(0)\n    os._exit(0)\n"
    + RIGHT
)
DAEMONS = {
    "a daemon that sleeps": _DAEMON.format(body="        time.sleep(60)\n"),
    "a daemon that holds the output": _DAEMON.format(body="        while True: time.sleep(1); print('x', flush=True)\n"),
    "a daemon that closes everything": _DAEMON.format(body="        os.closerange(0, 256); time.sleep(60)\n"),
    "a shell in the background": "import subprocess\nsubprocess.Popen(['sh', '-c', 'nohup sleep 60 &'])\n" + RIGHT,
}
SOURCES = {
    "nothing": "",
    "only a comment": "# to do",
    "a zero byte": "def add(a, b):\n    return a + b\0\n",
    "half a character": "x = '\ud800'\ndef add(a, b):\n    return 99\n",
    "parentheses without end": "x = " + "(" * 5000 + ")" * 5000 + "\n" + RIGHT,
    "an unclosed string": "def add(a, b):\n    '''\n    return a + b\n",
    "prose": "Here is the function that you asked for:\n\n```python\ndef add(a, b): return a + b\n```\n",
    "code that raises": "raise ValueError('no')\n" + RIGHT,
    "an import that is not there": "import no_such_module\n" + RIGHT,
}
HOSTILE_TESTS = {
    "tests without an assert": "add(1, 2)\n",
    "tests that never call": "assert True\nassert 1 + 1 == 2\n",
    "tests that end early": "import sys\nassert add(1, 2) == 3\nsys.exit(0)\nassert add(1, 2) == 4\n",
    "tests that end the process": "import os\nassert add(1, 2) == 3\nos._exit(0)\n",
    "tests in a function that nobody calls": "def test_add():\n    assert add(1, 2) == 3\n",
    "an assert that is never reached": "if add(1, 2) == 4:\n    assert False\n",
    "tests that do not parse": "assert add(1, 2) == \n",
    "tests that contradict themselves": "assert add(1, 2) == 3\nassert add(1, 2) == 4\n",
    "tests of another function": "assert sub(1, 2) == -1\n",
    "tests that catch everything and are empty": "try:\n    add(1, 2)\nexcept BaseException:\n    pass\n",
}
RIGHT_PROGRAMS: dict[str, tuple[str, str, bool]] = {
    "plain": (RIGHT, TESTS, False),
    "threads": (
        "import threading\ndef add(a, b):\n    out = []\n    ts = [threading.Thread(target=out.append, args=(v,)) for v in (a, b)]\n"
        "    [t.start() for t in ts]; [t.join() for t in ts]\n    return sum(out)\n",
        TESTS,
        False,
    ),
    "a pool of threads": (
        "from concurrent.futures import ThreadPoolExecutor\ndef add(a, b):\n    with ThreadPoolExecutor(8) as p:\n"
        "        return sum(p.map(int, (a, b)))\n",
        TESTS,
        False,
    ),
    "a thread that never ends": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n" + RIGHT,
        TESTS,
        False,
    ),
    "processes": (
        "import multiprocessing\ndef _half(v):\n    return v\ndef add(a, b):\n    with multiprocessing.get_context('fork').Pool(2) as p:\n"
        "        return sum(p.map(_half, (a, b)))\n",
        "assert add(1, 2) == 3",
        True,
    ),
    "a python of its own": (
        "import subprocess, sys\ndef add(a, b):\n    return int(subprocess.run([sys.executable, '-S', '-c', f'print({a}+{b})'],\n"
        "        capture_output=True, text=True).stdout)\n",
        "assert add(1, 2) == 3",
        True,
    ),
    "a shell": (
        "import subprocess\ndef add(a, b):\n    return int(subprocess.check_output(['sh', '-c', f'echo $(({a} + {b}))']))\n",
        "assert add(1, 2) == 3",
        True,
    ),
    "asyncio": (
        "import asyncio\nasync def go(a, b):\n    await asyncio.sleep(0.01)\n    return a + b\ndef add(a, b):\n    return asyncio.run(go(a, b))\n",
        TESTS,
        False,
    ),
    "temporary files": (
        "import tempfile, os\ndef add(a, b):\n    with tempfile.NamedTemporaryFile('w+') as f:\n        f.write(f'{a} {b}'); f.seek(0)\n"
        "        with tempfile.TemporaryDirectory() as d:\n            open(os.path.join(d, 'x'), 'w').write('y')\n        return sum(map(int, f.read().split()))\n",
        TESTS,
        False,
    ),
    "copies a file": (
        "import shutil, os\ndef add(a, b):\n    open('a', 'w').write('1'); shutil.copy2('a', 'b'); os.chmod('b', 0o600)\n    return a + b\n",
        TESTS,
        False,
    ),
    "recursion to 900": (
        "def add(a, b):\n    def f(n):\n        return 0 if n == 0 else f(n - 1)\n    return f(900) + a + b\n",
        TESTS,
        False,
    ),
    "recursion to 100,000": (
        "import sys\nsys.setrecursionlimit(10**6)\ndef add(a, b):\n    def f(n):\n        return 0 if n == 0 else f(n - 1)\n    return f(100_000) + a + b\n",
        TESTS,
        False,
    ),
    "recursion in a thread with a large stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(64 << 20)\ndef add(a, b):\n    out = []\n"
        "    def f(n):\n        return 0 if n == 0 else f(n - 1)\n    t = threading.Thread(target=lambda: out.append(f(20_000)))\n    t.start(); t.join()\n    return out[0] + a + b\n",
        TESTS,
        False,
    ),
    "standard input at its end": (
        "import sys\nrest = sys.stdin.read()\ntry:\n    input()\nexcept EOFError:\n    rest = ''\ndef add(a, b):\n    return a + b + len(rest)\n",
        TESTS,
        False,
    ),
    "noise on standard error": (
        "import sys, warnings\nwarnings.warn('old')\nprint('noise', file=sys.stderr)\nprint('é ü 漢')\n" + RIGHT,
        TESTS,
        False,
    ),
    "a main guard": (
        RIGHT + "if __name__ == '__main__':\n    import sys\n    print(add(int(sys.argv[1]), int(input())))\n",
        TESTS,
        False,
    ),
    "a future import first": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef add(a: int, b: Nothing) -> P:\n    return P(a).x + b\n",
        TESTS,
        False,
    ),
    "Unicode": ("def add(a, b):\n    ñ = {'漢字': a, '😀': b}\n    return ñ['漢字'] + ñ['😀']\n", TESTS, False),
    "carriage returns": (RIGHT.replace("\n", "\r\n"), TESTS, False),
    "a byte order mark": ("\ufeff" + RIGHT, TESTS, False),
    "ten megabytes of source": ("x = '" + "y" * 10_000_000 + "'\n" + RIGHT, TESTS, False),
    "large arguments": (
        "def add(a, b):\n    return sum(a) + len(b)\n",
        "assert add(list(range(200_000)), 'x' * 1_000_000) == 19_999_900_000 + 1_000_000",
        False,
    ),
    "arguments changed in place": (
        "def add(a, b):\n    a.append(b); a.sort(); a[0] = {1: 'x'}\n",
        "v = [3, 1]\nassert add(v, 2) is None\nassert v == [{1: 'x'}, 2, 3]\n",
        False,
    ),
    "arguments that are one object": (
        "def add(a, b):\n    a[0].append(b)\n    return a\n",
        "r = [[]] * 2\nassert add(r, 7) == [[7], [7]]\nassert add(r, 8) is r\n",
        False,
    ),
    "values of many types": (
        "def add(a, b):\n    return [a, b, (a,), {a: {b}}, 1.5, -0.0, 2 ** 100, 'é', b'\\xff', None, True, 1j, range(3), frozenset({1})]\n",
        "assert add(1, 2) == [1, 2, (1,), {1: {2}}, 1.5, 0.0, 2 ** 100, 'é', b'\\xff', None, True, 1j, range(3), frozenset({1})]\nassert type(add(1, 2)[10]) is bool",
        False,
    ),
    "decimals, fractions, dates, named tuples": (
        "from decimal import Decimal\nfrom fractions import Fraction\nfrom datetime import date\nfrom collections import namedtuple, deque, Counter, defaultdict\nP = namedtuple('P', 'x y')\n"
        "def add(a, b):\n    return P(Decimal('0.1'), Fraction(1, 3)), date(2020, 1, 2), deque([1]), Counter('aab'), defaultdict(list, {1: [2]})\n",
        "from decimal import Decimal\nfrom fractions import Fraction\nfrom datetime import date\nfrom collections import deque\nv = add(1, 2)\nassert v[0].x == Decimal('0.1') and v[0] == (Decimal('0.1'), Fraction(1, 3))\n"
        "assert v[1:] == (date(2020, 1, 2), deque([1]), {'a': 2, 'b': 1}, {1: [2]})",
        False,
    ),
    "a generator": (
        "def add(a, b):\n    yield from range(a, b)\n",
        "assert list(add(1, 4)) == [1, 2, 3]\nassert next(add(1, 4)) == 1",
        False,
    ),
    "a class with methods": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, v):\n        self.items.append(v)\n        return self\n    def __len__(self):\n        return len(self.items)\n    def __getitem__(self, i):\n        return self.items[i]\n"
        "def add(a, b):\n    return Stack().push(a).push(b)\n",
        "s = add(1, 2)\nassert len(s) == 2 and s[1] == 2 and s.items == [1, 2]\nassert len(s.push(3)) == 3\nassert isinstance(s, Stack) and not isinstance(s, int)\nassert [v for v in s.items] == [1, 2, 3]",
        False,
    ),
    "a function that takes functions": (
        "def add(f, v):\n    return [f(x) for x in v]\n",
        "assert add(lambda x: x * 2, [1, 2]) == [2, 4]\nassert add(abs, [-1]) == [1]\nassert add(str, (3,)) == ['3']",
        False,
    ),
    "a function that returns functions": ("def add(a):\n    return lambda b: a + b\n", "assert add(1)(2) == 3", False),
    "exceptions of builtin classes": (
        "def add(a, b):\n    if a < 0:\n        raise ValueError('negative')\n    return {}[b]\n",
        "try:\n    add(-1, 2)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'negative'\ntry:\n    add(1, 2)\n    assert False\nexcept KeyError as e:\n    assert e.args == (2,)",
        False,
    ),
    "exceptions of its own classes": (
        "class Odd(ValueError):\n    pass\ndef add(a, b):\n    raise Odd('no', 3)\n",
        "try:\n    add(1, 2)\n    assert False\nexcept Odd as e:\n    assert e.args == ('no', 3) and isinstance(e, ValueError)",
        False,
    ),
    "150 megabytes": ("x = bytearray(150 << 20)\n" + RIGHT, TESTS, False),
    "after closing every descriptor but its own": ("import os\nos.closerange(0, 3)\n" + RIGHT, TESTS, False),
    "a sleep below the limit": ("import time\ntime.sleep(0.7)\n" + RIGHT, TESTS, False),
    "an assertion that is raised by hand": (RIGHT, "if add(1, 2) != 3:\n    raise AssertionError\n", False),
    "a check function": (RIGHT, CHECK, False),
    "random draws": (
        "import random\n" + RIGHT,
        "import random\nfor _ in range(50):\n    x, y = random.randint(0, 1000), random.randint(0, 1000)\n    assert add(x, y) == x + y",
        False,
    ),
    "a member of an enumeration": (
        "from enum import IntEnum, StrEnum\nfrom http import HTTPStatus\nclass N(IntEnum):\n    A = 3\nclass S(StrEnum):\n    B = 'b'\n"
        "def add(a, b):\n    return [N.A, S.B, HTTPStatus.OK]\n",
        "n, s, ok = add(1, 2)\nassert n == 3 and s == 'b' and ok == 200 and n < 4 and n + 1 == 4\nassert n.name == 'A' and n is N.A and hash(n) == hash(3)",
        False,
    ),
    "operators of its own class": (
        "class V:\n    def __init__(s, x, y): s.x, s.y = x, y\n    def __add__(s, o): return V(s.x + o.x, s.y + o.y)\n    def __mul__(s, k): return V(s.x * k, s.y * k)\n"
        "    __rmul__ = __mul__\n    def __eq__(s, o): return (s.x, s.y) == (o.x, o.y)\n    def __lt__(s, o): return abs(s) < abs(o)\n    def __iter__(s): return iter((s.x, s.y))\n"
        "    def __abs__(s): return (s.x ** 2 + s.y ** 2) ** 0.5\ndef add(a, b):\n    return V(a, b)\n",
        "v = add(3, 4)\nassert (v * 2).x == 6 and (2 * v).y == 8 and tuple(v + v) == (6, 8)\nassert abs(v) == 5.0 and v < v * 2 and v * 2 == V(6, 8)\nassert 4 in v and 5 not in v",
        False,
    ),
    "a coroutine": (
        "import asyncio\nasync def add(a, b):\n    await asyncio.sleep(0)\n    return a + b\n",
        "import asyncio\nassert asyncio.run(add(1, 2)) == 3\nasync def both():\n    return await asyncio.gather(add(1, 1), add(2, 2))\nassert asyncio.run(both()) == [2, 4]",
        False,
    ),
    "an iterator of its own": (
        "class I:\n    def __init__(s, n): s.n = n\n    def __iter__(s): return s\n    def __next__(s):\n        if not s.n: raise StopIteration\n        s.n -= 1\n        return s.n\ndef add(a, b):\n    return I(a + b)\n",
        "i = add(1, 1)\nassert next(i) == 1 and next(i) == 0\ntry:\n    next(i)\n    assert False\nexcept StopIteration:\n    pass\nassert list(add(1, 2)) == [2, 1, 0]",
        False,
    ),
    "tests of unittest": (RIGHT, _UNITTEST, False),
    "its name is a builtin's": ("def sum(a, b):\n    return a + b\n", "assert sum(1, 2) == 3", False),
}
NUMPY = (
    "import numpy as np\ndef add(a, b):\n    return np.array(a) + b\n",
    "import numpy as np\nr = add([1, 2], 3)\nassert (r == np.array([4, 5])).all()\nassert r.tolist() == [4, 5]",
)
# What a process boundary cannot decide: the program is asked for the answer. Passing here is a known limit, not a success.
UNDECIDABLE = {
    "two objects of the program's own class": (
        "class P:\n    def __init__(s, x): pass\n    def __eq__(s, o): return True\ndef add(a, b):\n    return P(99)\n",
        "assert add(1, 2) == P(3)\n",
    ),
    "a value that the program computes on both sides": (
        "def add(x):\n    return x\ndef decode(x):\n    return x\n",
        "assert decode(add('abc')) == 'abc'\n",
    ),
    "a table of the visible inputs": ("def add(a, b):\n    return {(1, 2): 3, (-5, 5): 0, (10, 7): 17}[a, b]\n", TESTS),
}


def cases() -> list[Case]:
    """Every program of the suite whose verdict a process boundary decides."""
    found = [Case("endings", name, text) for name, text in ENDINGS.items()]
    found += [
        Case("forgeries", name, text, (FAIL, TIMEOUT), tests=CHECK if "abs" in name else TESTS)
        for name, text in FORGERIES.items()
    ]
    found += [Case("files", name, text, (PASS,)) for name, text in FILES.items()]
    found += [
        Case("checks handed over", name, text, (FAIL, "unsupported"), tests=tests)
        for name, (text, tests) in HANDED_OVER.items()
    ]
    found += [Case("other processes", name, text, (PASS,)) for name, text in PROCESSES.items()]
    found += [Case("network", name, text, (PASS,)) for name, text in NETWORK.items()]
    found += [Case("kernel", name, text, (PASS,)) for name, text in KERNEL.items()]
    found += [Case("foreign system calls", name, text) for name, text in FOREIGN.items()]
    found += [Case("daemons", name, text, (PASS,), starts_processes=True) for name, text in DAEMONS.items()]
    found += [Case("sources", name, text) for name, text in SOURCES.items()]
    found += [Case("tests", name, RIGHT, (FAIL,), tests=text) for name, text in HOSTILE_TESTS.items()]
    found += [Case("tests", "tests without an end", RIGHT, (TIMEOUT,), tests="while True: add(1, 2)\n")]
    found += [
        Case(
            "right programs", name, text, (PASS,), tests, _entry(text), limits=Limits(wall_seconds=8), starts_processes=forks
        )
        for name, (text, tests, forks) in RIGHT_PROGRAMS.items()
    ]
    found += [Case("floods", name, text, expected) for name, (text, expected) in FLOODS.items()]
    return found


def numpy_case() -> Case:
    return Case("right programs", "numpy", *(NUMPY[0], (PASS,), NUMPY[1]), limits=Limits(wall_seconds=20))


def _entry(program: str) -> str:
    return "sum" if "def sum(" in program else "add"


class Watch:
    """Things that hostile programs would touch, and whether they were. A context manager."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="codetune-canary-"))
        self.secret = f"secret-{uuid.uuid4().hex}"
        (self.folder / "secret.txt").write_text(self.secret, encoding="utf-8")
        (self.folder / "keep").write_text("kept", encoding="utf-8")
        os.chmod(self.folder, 0o777)
        os.chmod(self.folder / "keep", 0o644)
        os.environ["CODETUNE_CANARY_TOKEN"] = self.secret
        self.abstract = f"codetune-canary-{uuid.uuid4().hex}"
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix, self.hidden = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.folder / "socket"))
        os.chmod(self.folder / "socket", 0o777)
        self.hidden.bind(f"\0{self.abstract}")
        for listener in (self.unix, self.hidden):
            listener.listen()
        for listener in (self.tcp, self.udp, self.unix, self.hidden):
            listener.setblocking(False)
        self.canary = subprocess.Popen(["sleep", "3600"])
        self.mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        self.entries = sorted(os.listdir(self.folder))

    def __enter__(self) -> Watch:
        return self

    @property
    def places(self) -> dict[str, str]:
        """What stands for the names between @ in the programs."""
        return {
            "CANARY": str(self.folder),
            "SECRET_FILE": str(self.folder / "secret.txt"),
            "HOME": os.path.expanduser("~"),
            "PORT": str(self.tcp.getsockname()[1]),
            "UDP": str(self.udp.getsockname()[1]),
            "ABSTRACT": self.abstract,
        }

    def touched(self, printed: str = "") -> list[str]:
        """What a program did to the world outside, in words; nothing is what belongs there."""
        return list(self._touched(printed))

    def _touched(self, printed: str) -> Iterator[str]:
        if self.secret in printed:
            yield "the secret was printed"
        if sorted(os.listdir(self.folder)) != self.entries:
            yield f"the canary folder holds {sorted(os.listdir(self.folder))}"
        elif (self.folder / "keep").read_text(encoding="utf-8") != "kept" or (
            self.folder / "keep"
        ).stat().st_mode & 0o777 != 0o644:
            yield "the canary file was changed"
        for name, listener in (("TCP", self.tcp), ("UNIX", self.unix), ("abstract", self.hidden)):
            try:
                listener.accept()[0].close()
                yield f"the {name} listener was reached"
            except BlockingIOError:
                pass
        try:
            self.udp.recv(9)
            yield "the UDP listener was reached"
        except BlockingIOError:
            pass
        if self.canary.poll() is not None:
            yield "the canary process was ended"
        if Path("/proc/self/mountinfo").read_text(encoding="utf-8") != self.mounts:
            yield "there are other mounts than before"

    def left_behind(self, before: list[str]) -> list[str]:
        """Folders and processes of sandboxes of this process that were not there before; asked after one was closed."""
        return sorted({*sandbox_folders(), *sandbox_processes()} - {*before})

    def __exit__(self, *error: object) -> None:
        self.canary.kill()
        self.canary.wait()
        for listener in (self.tcp, self.udp, self.unix, self.hidden):
            listener.close()
        del os.environ["CODETUNE_CANARY_TOKEN"]
        shutil.rmtree(self.folder)


def sandbox_folders() -> list[str]:
    """Scratch folders of this process's sandboxes."""
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(f"codetune-sandbox-{os.getpid()}-")]


def sandbox_processes() -> list[str]:
    """Workers that descend from this process."""
    parents, lines = {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)] = int(
                    Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                )
                lines[int(name)] = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            except OSError:
                continue
    found = []
    for pid, line in lines.items():
        above, steps = pid, 0
        while above in parents and above != os.getpid() and steps < 50:
            above, steps = parents[above], steps + 1
        if above == os.getpid() and pid != os.getpid() and "sandbox_zygote" in line:
            found.append(f"process {pid}: {line[:80]}")
    return found
