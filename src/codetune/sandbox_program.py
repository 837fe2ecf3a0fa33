"""What runs inside a jail: the solution's side, the tests' side, both in one process, or a command of another language.

In: a job, read from a descriptor after the jail is closed. Out: for the solution, answers to calls over a socket; for
the tests, one report in a memory file that only the tests' process has. The trade: two processes and about 0.1 ms a
call, for a verdict that the solution cannot write. What it does not do: jail anything (`sandbox_zygote.py` has, before
it comes here), or protect tests from themselves: hostile tests can report what they like. Standard library only.
"""

# ruff: noqa: BLE001, S102  running what others wrote, and surviving whatever it raises, is what this module is for

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import io
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from codetune.sandbox_values import NAMED, Decoder, Encoder, Malformed, Unsupported, lazy_items

MOST_BYTES = 64 << 20  # of one message between solution and tests
MOST_TEXT = 400  # characters of an exception's message
MODULE = "solution"
CHECK = "__count_a_check__"
NOT_PLAIN = object()
TEST_RUNNERS = ("unittest", "doctest", "_pytest", "pytest")  # some of their exceptions end a test without failing it


def read_all(descriptor: int) -> bytes:
    """A memory file from its start, whatever its offset."""
    size = os.fstat(descriptor).st_size
    parts: list[bytes] = []
    place = 0
    while place < size:
        part = os.pread(descriptor, size - place, place)
        if not part:
            break
        parts.append(part)
        place += len(part)
    return b"".join(parts)


def text_of(error: BaseException) -> str:
    """An exception's message, which may itself raise, be endless or be no text."""
    try:
        return str(error)[:MOST_TEXT].encode("utf-8", "backslashreplace").decode("utf-8")
    except BaseException:
        return "(its message could not be read)"


def write_report(descriptor: int, **facts: Any) -> None:
    os.pwrite(descriptor, json.dumps(facts).encode() + b"\n", 0)


class Channel:
    """Messages over a stream socket: four bytes of length, then JSON."""

    def __init__(self, descriptor: int) -> None:
        self.socket = socket.socket(fileno=descriptor)

    def send(self, text: str) -> None:
        data = text.encode()
        if len(data) > MOST_BYTES:
            raise Unsupported(f"a value of {len(data):,} bytes, more than {MOST_BYTES:,}")
        self.socket.sendall(struct.pack("!I", len(data)) + data)

    def receive(self) -> Any:
        """The next message; EOFError where the other side has ended, Malformed where it is no message."""
        (size,) = struct.unpack("!I", self._exactly(4))
        if size > MOST_BYTES:
            raise Malformed("a message that is too long")
        try:
            return json.loads(self._exactly(size))
        except (ValueError, RecursionError) as error:
            raise Malformed("a message that is no JSON") from error

    def _exactly(self, size: int) -> bytes:
        data = self.socket.recv(size)
        if len(data) == size:
            return data
        parts = [data]
        missing = size - len(data)
        while missing:
            if not parts[-1]:
                raise EOFError
            parts.append(self.socket.recv(min(missing, 1 << 20)))
            missing -= len(parts[-1])
        return b"".join(parts)


def set_up_streams() -> None:
    """Text streams on descriptors 0 to 2, as an interpreter that was just started has them.

    Made once, before any program: they read and write whatever a child has at these places by then.
    """
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r", closefd=False)), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
    raw = io.BufferedWriter(io.FileIO(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def flush() -> None:
    """Write out what the program printed; a program may have closed or replaced the streams."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def new_module(name: str) -> types.ModuleType:
    """An empty module that can be found by its name, as dataclasses and pickling need."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.__dict__["__builtins__"] = builtins
    return module


def compile_source(source: bytes, name: str) -> types.CodeType:
    """Compile a program. `dont_inherit`: a `from __future__` of ours must not become one of the program's.

    Raises:
        SyntaxError: it does not parse, for whatever reason the compiler has.
    """
    try:
        return compile(source.decode("utf-8", "surrogatepass").removeprefix("\ufeff"), name, "exec", dont_inherit=True)
    except SyntaxError:
        raise
    except (ValueError, RecursionError, MemoryError, OverflowError, UnicodeError) as error:
        raise SyntaxError(f"{type(error).__name__}: {text_of(error)}") from None


def collect_garbage_from_here() -> None:
    """Switch the collector on, which the zygote's children begin without: it looks at nothing that was there before."""
    gc.freeze()
    gc.enable()


def frame_depth() -> int:
    depth, frame = 0, sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    return depth


def same_recursion_for_all() -> None:
    """A program finds as many free frames as it does under `python file.py`, whatever depth it is called from here."""
    sys.setrecursionlimit(1000 + frame_depth() + 4)


# ---------------------------------------------------------------------------------------------------------------------
# The solution's side


class Solution:
    """Runs a program and answers calls. All of this is in the program's reach; the tests' side believes nothing it says."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.module = new_module(MODULE)

    def handle(self, value: Any) -> Any:
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        kind = "exception" if isinstance(value, type) and issubclass(value, BaseException) else "object"
        kind = "module" if isinstance(value, types.ModuleType) else kind
        kind = "coroutine" if isinstance(value, types.CoroutineType) else kind
        kind = "member" if isinstance(value, int | float | str) else kind  # of an enumeration; all others are plain
        name = getattr(value, "__name__", "")
        form: list[Any] = ["h", number, kind, name if isinstance(name, str) else ""]
        if kind == "exception":
            form.append(lineage(type(value) if not isinstance(value, type) else value))
        if kind == "member":
            form.append(plain_of_member(value))
        return form

    def found(self, form: list[Any]) -> Any:
        if form[0] == "h":
            return self.objects[form[1]]
        if form[0] == "k":
            return self.callback(form[1])
        raise Malformed("an unknown kind of value")

    def callback(self, number: int) -> Callable[..., Any]:
        """A function of the tests, to be called from here."""

        def call_the_tests(*positional: Any, **named: Any) -> Any:
            encoder = Encoder(self.handle)
            self.channel.send(json.dumps(["callback", number, encoder.encode(list(positional)), encoder.encode(named)]))
            return self.serve()

        return call_the_tests

    def load(self, source: bytes) -> None:
        try:
            code = compile_source(source, f"{MODULE}.py")
        except SyntaxError as error:
            self.channel.send(json.dumps(["syntax", text_of(error)]))
            os._exit(1)
        collect_garbage_from_here()
        try:
            exec(code, self.module.__dict__)
        except BaseException as error:
            flush()
            self.channel.send(json.dumps(["raised", *describe(error)]))
            os._exit(1)
        flush()
        self.channel.send('["loaded"]')

    def serve(self) -> Any:
        """Answer requests; ends with the process, or with the value of the callback that is under way."""
        while True:
            try:
                request = self.channel.receive()
            except EOFError:
                flush()
                os._exit(0)
            if request[0] == "returned":
                return Decoder(self.found).decode(request[1])
            if request[0] == "threw":
                raise NAMED.get(request[1], RuntimeError)(request[2])
            self.channel.send(self.answer(request))

    def answer(self, request: list[Any]) -> str:
        operation, *rest = request
        decoder = Decoder(self.found)
        try:
            arguments = [decoder.decode(item) for item in rest]
            before = Encoder(self.handle).text(arguments) if operation == "call" else ""
            originals = {id(value): place for place, value in enumerate(decoder.mutable)}
            value = OPERATIONS[operation](self, *arguments)
            encoder = Encoder(self.handle, originals)
            result = encoder.encode(value)
            changed: Any = None
            if operation == "call" and originals and Encoder(self.handle).text(arguments) != before:
                changed = [encoder.contents(item, type(item)) for item in decoder.mutable]
            text = json.dumps(["value", result, changed], separators=(",", ":"))
        except RecursionError as error:
            text = json.dumps(["raised", *describe(error)])
        except BaseException as error:
            text = json.dumps(["raised", *describe(error)])
        flush()
        return (
            text
            if len(text) <= MOST_BYTES
            else json.dumps(["raised", ["builtins.ValueError"], "ValueError", "too large", []])
        )


def lineage(kind: type) -> list[str]:
    """A class and its bases by name, nearest first."""
    return [f"{base.__module__}.{base.__qualname__}"[:200] for base in kind.__mro__]


def describe(error: BaseException) -> list[Any]:
    arguments = []
    for value in error.args[:5]:
        if type(value) in (int, float, bool, type(None)):
            arguments.append(value)
        elif type(value) is str:
            arguments.append(value[:10_000])
        else:
            arguments.append(text_of(error))
    try:
        json.dumps(arguments)
    except ValueError:
        arguments = []
    return [lineage(type(error)), type(error).__name__[:200], text_of(error), arguments]


def plain_of_member(value: Any) -> int | float | str:
    """The number or text that a member of an enumeration is, whatever its own methods say."""
    if isinstance(value, int):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, float) else str.__str__(value)


def awaited(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


def _names(solution: Solution, names: list[str]) -> dict[str, Any]:
    space = solution.module.__dict__
    return {name: space[name] for name in names if name in space}


OPERATIONS: dict[str, Callable[..., Any]] = {
    "names": _names,
    "call": lambda solution, target, positional, named: target(*positional, **named),
    "method": lambda solution, target, name, positional: getattr(type(target), name)(target, *positional),
    "getattr": lambda solution, target, name: getattr(target, name),
    "setattr": lambda solution, target, name, value: setattr(target, name, value),
    "isinstance": lambda solution, target, kind: isinstance(target, kind),
    "binary": lambda solution, name, left, right: NAMED[f"operator.{name}"](left, right),
    "unary": lambda solution, name, target: UNARY[name](target),
    "contains": lambda solution, target, item: item in target,
    "setitem": lambda solution, target, key, value: target.__setitem__(key, value),
    "delitem": lambda solution, target, key: target.__delitem__(key),
    "next": lambda solution, target: ("item", next(target)),
    "await": lambda solution, target: awaited(target),
    "enter": lambda solution, target: target.__enter__(),
    "exit": lambda solution, target: target.__exit__(None, None, None),
}
UNARY: dict[str, Callable[[Any], Any]] = {
    "len": len,
    "iter": iter,
    "reversed": reversed,
    "str": str,
    "repr": repr,
    "bool": bool,
    "hash": hash,
    "int": int,
    "float": float,
    "index": NAMED["operator.index"],
    "abs": abs,
    "neg": NAMED["operator.neg"],
    "pos": NAMED["operator.pos"],
    "invert": NAMED["operator.invert"],
}


def run_solution(job: int, channel: int) -> NoReturn:
    """The solution's process: load the program, answer the tests until they hang up."""
    source = read_all(job)
    os.close(job)
    same_recursion_for_all()
    solution = Solution(Channel(channel))
    solution.load(source)
    solution.serve()
    os._exit(0)


# ---------------------------------------------------------------------------------------------------------------------
# The tests' side


class Judge:
    """Holds the report and the connection to the solution."""

    def __init__(self, channel: Channel, report: int) -> None:
        self.channel = channel
        self.report = report
        self.calls = 0
        self.checks = 0
        self.callbacks: list[Callable[..., Any]] = []
        self.exceptions: dict[str, type[Exception]] = {}
        self.handles: dict[int, Handle] = {}

    def end(self, verdict: str, reason: str, detail: str = "") -> NoReturn:
        """Write the report and end the process, past whatever the tests catch."""
        write_report(self.report, verdict=verdict, reason=reason, detail=detail, checks=self.checks, calls=self.calls)
        os._exit(0)

    def count_check(self) -> None:
        self.checks += 1

    # -- what is received

    def receive(self) -> list[Any]:
        try:
            message = self.channel.receive()
        except (EOFError, ConnectionError):
            self.end("fail", "died", "the program's process ended before its tests did")
        except Malformed as error:
            self.end("fail", "protocol", f"the program sent {error}")
        if type(message) is not list or not message or type(message[0]) is not str:
            self.end("fail", "protocol", "the program sent something that is no answer")
        return message

    def decode(self, form: Any, decoder: Decoder | None = None) -> Any:
        try:
            return (decoder or Decoder(self.found)).decode(form)
        except (Malformed, RecursionError) as error:
            self.end("fail", "protocol", f"the program sent {text_of(error)}")

    def found(self, form: list[Any]) -> Any:
        """A handle the solution sent: an object of its own, an exception class, or a function of the tests coming back."""
        if form[0] == "k" and type(form[1]) is int and 0 <= form[1] < len(self.callbacks):
            return self.callbacks[form[1]]
        if form[0] != "h" or len(form) < 4 or type(form[1]) is not int or type(form[3]) is not str:
            raise Malformed("a value of no known kind")
        if form[2] == "exception" and len(form) == 5:
            return self.exception_class(form[4])
        if form[1] not in self.handles:
            plain = form[4] if form[2] == "member" and type(form[-1]) in (int, float, str, bool) else NOT_PLAIN
            self.handles[form[1]] = Handle(self, form[1], str(form[2]), form[3], plain)
        handle = self.handles[form[1]]
        return self.coroutine(handle) if form[2] == "coroutine" else handle

    async def coroutine(self, handle: Handle) -> Any:
        """What the tests await; it runs over there, in a loop of its own."""
        return self.ask("await", handle)

    def exception_class(self, names: Any) -> type[Exception]:
        """The class of this side for a class of the other, by the names of its bases."""
        if type(names) is not list or not all(type(name) is str for name in names) or not names:
            raise Malformed("an exception without a class")
        first = names[0]
        if first not in self.exceptions:
            base: type[Exception] = Exception
            for name in names:
                module, _, attribute = name.rpartition(".")
                known = module != MODULE and module.partition(".")[0] not in TEST_RUNNERS
                value = getattr(sys.modules.get(module), attribute, None) if known else None
                if isinstance(value, type) and issubclass(value, Exception):
                    base = value
                    break
            is_base = first == f"{base.__module__}.{base.__qualname__}"
            title = first.rpartition(".")[2]
            self.exceptions[first] = base if is_base else type(title, (base,), {})
        return self.exceptions[first]

    def raised(self, message: list[Any]) -> Exception:
        """The exception of this side for one that was raised over there; one that ends an interpreter ends the tests."""
        try:
            _, names, title, text, arguments = message
        except ValueError:
            self.end("fail", "protocol", "the program sent an exception that is none")
        if type(names) is not list or "builtins.Exception" not in names:
            reason = "early-exit" if type(names) is list and "builtins.SystemExit" in names else "exception"
            self.end("fail", reason, f"{title}: {text}" if text else str(title))
        try:
            kind = self.exception_class(names)
        except Malformed as error:
            self.end("fail", "protocol", f"the program sent {error}")
        given = [value for value in arguments if type(value) in (str, int, float, bool, type(None))]
        try:
            error = kind(*given)
        except Exception:
            error = Exception.__new__(kind)
            error.args = (str(text),)
        error.__dict__["_from_solution"] = True
        return error

    # -- what is asked

    def argument(self, value: Any) -> Any:
        """How an object of the tests that is not plain travels."""
        if isinstance(value, Handle):
            return ["h", object.__getattribute__(value, "_number")]
        items = lazy_items(value)
        if items is not None:
            return ["it", *map(Encoder(self.argument).encode, items)]
        if isinstance(value, types.FunctionType | types.MethodType):
            self.callbacks.append(value)
            return ["k", len(self.callbacks) - 1]
        for name, kind in self.exceptions.items():
            if value is kind:
                return ["g", name.rpartition(".")[2]]
        raise Unsupported(f"an argument of type {type(value).__name__}, which cannot be handed to another process")

    def ask(self, operation: str, *arguments: Any) -> Any:
        """Ask the solution for something: its value, its exception, and what it did to the arguments."""
        encoder = Encoder(self.argument)
        try:
            forms = [encoder.encode(value) for value in arguments]
            self.channel.send(json.dumps([operation, *forms], separators=(",", ":")))
        except Unsupported as error:
            self.end("unsupported", "argument", str(error))
        except RecursionError:
            self.end("unsupported", "argument", "an argument that is nested too deeply")
        except (BrokenPipeError, ConnectionError):
            self.end("fail", "died", "the program's process ended before its tests did")
        while True:
            message = self.receive()
            if message[0] == "callback":
                self.answer_callback(message)
                continue
            if message[0] == "raised":
                error = self.raised(message)
                if isinstance(error, StopIteration) and operation != "next":
                    # It would end a `map` or a `for` of the tests' without a word, and with it what they check (as PEP 479).
                    raise RuntimeError("the program raised StopIteration") from error
                raise error
            if message[0] != "value" or len(message) != 3:
                self.end("fail", "protocol", "the program sent something that is no answer")
            decoder = Decoder(self.found, encoder.mutable)
            value = self.decode(message[1], decoder)
            if type(message[2]) is list:
                self.update(encoder.mutable, message[2], decoder)
            return value

    def update(self, originals: list[Any], forms: list[Any], decoder: Decoder) -> None:
        """Do to the arguments what the solution did to its copies."""
        try:
            for original, form in zip(originals, forms, strict=True):
                if type(form) is not list or form[:1] not in (["l"], ["d"], ["s"]):
                    raise Malformed("a changed argument of another kind")
                new = decoder.fill({"l": list, "d": dict, "s": set}[form[0]](), form, remember=False)
                if not isinstance(original, type(new)):
                    raise Malformed("a changed argument of another kind")
                if isinstance(original, list):
                    original[:] = new
                else:
                    original.clear()
                    original.update(new)
        except (Malformed, RecursionError, ValueError) as error:
            self.end("fail", "protocol", f"the program sent {text_of(error)}")

    def answer_callback(self, message: list[Any]) -> None:
        """The solution calls a function that the tests gave it; it can reach no other function of this side."""
        try:
            number = message[1]
            if type(number) is not int or not 0 <= number < len(self.callbacks):
                raise Malformed("a call of no known function")
            positional, named = self.decode(message[2]), self.decode(message[3])
        except (Malformed, IndexError) as error:
            self.end("fail", "protocol", f"the program sent {text_of(error)}")
        try:
            value = self.callbacks[number](*positional, **named)
        except Exception as error:
            self.channel.send(json.dumps(["threw", type(error).__name__, text_of(error)]))
            return
        try:
            self.channel.send(json.dumps(["returned", Encoder(self.argument).encode(value)]))
        except Unsupported as error:
            self.end("unsupported", "argument", str(error))


class Handle:
    """An object of the solution's that is not plain, and never equals a plain value.

    Calls, attributes, items, length and text of it are asked over there. What would leave a check to the program's word, the
    tests' value in its hand, is not: `abs(answer - 3) < 1e-6`, `answer <= 3` and `3 in answer` end as unsupported where the
    answer is an object that defines subtraction, order or membership by itself. Arithmetic may give another object, which
    remembers that it was told (`_told`). A member of an enumeration of numbers or texts is one of them here, too (`_plain`).
    """

    def __init__(self, judge: Judge, number: int, kind: str, name: str, plain: Any) -> None:
        for attribute, value in (("_judge", judge), ("_number", number), ("_kind", kind), ("_title", name)):
            object.__setattr__(self, attribute, value)
        object.__setattr__(self, "_plain", plain)
        object.__setattr__(self, "_told", False)

    def _ask(self, operation: str, *arguments: Any) -> Any:
        return object.__getattribute__(self, "_judge").ask(operation, *arguments)

    def _operate(self, operation: str, name: str, *operands: Any) -> Any:
        """An operation that gives numbers or truths, on this object and perhaps another value."""
        answer = self._ask(operation, name, *operands)
        theirs = [operand for operand in operands if isinstance(operand, Handle)]
        told = len(theirs) < len(operands) or any(operand._told for operand in theirs)
        if told and isinstance(answer, Handle):
            object.__setattr__(answer, "_told", True)
        elif told and len(theirs) < 2:
            self._cannot_tell(f"`{name}` of an object of the program's own class and a value of the tests")
        return answer

    def _cannot_tell(self, what: str) -> NoReturn:
        judge: Judge = object.__getattribute__(self, "_judge")
        judge.end("unsupported", "operator", f"{what}: the program would be asked to decide")

    def __call__(self, *positional: Any, **named: Any) -> Any:
        object.__getattribute__(self, "_judge").calls += 1
        return self._ask("call", self, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":
            return object.__getattribute__(self, "_title")
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def __eq__(self, other: object) -> Any:
        if self is other:
            return True
        if isinstance(other, Handle):
            return self._ask("binary", "eq", self, other) is True
        if self._plain is not NOT_PLAIN:
            return self._plain == other
        compare = type(other).__eq__
        if compare is object.__eq__ or is_plain(other):
            return False
        answer = compare(other, self)  # an object of the tests' may have an answer of its own
        if answer is NotImplemented:
            self._cannot_tell(f"equality of an object of the program's and one of type {type(other).__name__}")
        return answer

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._ask("unary", "hash", self) if self._plain is NOT_PLAIN else self._plain)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Handle) and self._ask("isinstance", value, self) is True

    def __iter__(self) -> Iterator[Any]:
        return self if self._kind == "iterator" else self._ask("unary", "iter", self)

    def __next__(self) -> Any:
        return self._ask("next", self)[1]

    def __contains__(self, item: Any) -> bool:
        if self._plain is not NOT_PLAIN:
            return item in self._plain
        if isinstance(item, Handle):
            return self._ask("contains", self, item) is True
        try:
            items = iter(self)
        except TypeError:
            self._cannot_tell("`in` of an object that cannot be gone through")
        return any(each is item or each == item for each in items)

    def __bool__(self) -> bool:
        return self._operate("unary", "bool", self) is True

    def __str__(self) -> str:
        return _exactly(str, self._ask("unary", "str", self))

    def __repr__(self) -> str:
        return _exactly(str, self._ask("unary", "repr", self))

    def __len__(self) -> int:
        return _exactly(int, self._ask("unary", "len", self))

    def __int__(self) -> int:
        return _exactly(int, self._operate("unary", "int", self))

    def __index__(self) -> int:
        return _exactly(int, self._operate("unary", "index", self))

    def __float__(self) -> float:
        return _exactly(float, self._operate("unary", "float", self))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("binary", "getitem", self, key)

    def __reversed__(self) -> Any:
        return self._ask("unary", "reversed", self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._ask("delitem", self, key)

    def __enter__(self) -> Any:
        return self._ask("enter", self)

    def __exit__(self, *error: object) -> None:
        self._ask("exit", self)


def is_plain(value: Any) -> bool:
    """Whether a value of the tests' is plain data, perhaps with objects of the program's in it."""
    try:
        Encoder(_only_handles).encode(value)
    except (Unsupported, RecursionError):
        return False
    return True


def _only_handles(value: Any) -> Any:
    if not isinstance(value, Handle):
        raise Unsupported
    return []


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"the program answered {type(value).__name__} where {kind.__name__} belongs")
    return value


def _operator_method(name: str, reflected: bool) -> Callable[[Any, Any], Any]:
    def method(self: Handle, other: Any) -> Any:
        if self._plain is not NOT_PLAIN and not isinstance(other, Handle):
            left, right = (other, self._plain) if reflected else (self._plain, other)
            return NAMED[f"operator.{name}"](left, right)
        left, right = (other, self) if reflected else (self, other)
        return self._operate("binary", name, left, right)

    return method


for _word in "lt le gt ge".split():
    setattr(Handle, f"__{_word}__", _operator_method(_word, False))
for _word in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
    _function = f"{_word}_" if _word in ("and", "or") else _word
    setattr(Handle, f"__{_word}__", _operator_method(_function, False))
    setattr(Handle, f"__r{_word}__", _operator_method(_function, True))
for _word in "abs neg pos invert".split():
    setattr(Handle, f"__{_word}__", lambda self, name=_word: self._operate("unary", name, self))


CHECKING = ("assert", "raises")  # how a call's name begins that checks something; the second stands behind `with`


def count_checks(tree: ast.AST) -> None:
    """Put a count before every `assert`, every `if` that may raise, and every call of something named like an assertion.

    Only statements are looked at, and they stand only in lists of statements: expressions are most of a tree.
    """
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        statements = getattr(tree, field, None)
        if not isinstance(statements, list):  # of a lambda and of `a if b else c` it is an expression
            continue
        counted = []
        for statement in statements:
            count_checks(statement)
            if _checks(statement):
                call = ast.Expr(ast.Call(ast.Name(CHECK, ast.Load()), [], []))
                ast.copy_location(call, statement)
                ast.fix_missing_locations(call)
                counted.append(call)
            counted.append(statement)
        statements[:] = counted


def _checks(statement: ast.AST) -> bool:
    """Whether a statement checks something when it is come by."""
    if isinstance(statement, ast.Assert):
        return True
    if isinstance(statement, ast.If):
        return any(isinstance(line, ast.Raise) for line in (*statement.body, *statement.orelse))
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Call) and _called(statement.value).startswith(CHECKING[0])
    if isinstance(statement, ast.With):
        names = [_called(item.context_expr) for item in statement.items]
        return any(name.startswith(CHECKING[0]) or name == CHECKING[1] for name in names)
    return False


def _called(call: ast.AST) -> str:
    """The name of what is called, in lower case, without the object that it belongs to."""
    function = getattr(call, "func", None)
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name.lower()


def compile_tests(source: str) -> types.CodeType:
    """Tests that count the checks they come by. Raises SyntaxError as `compile_source` does."""
    try:
        tree = ast.parse(source, "tests.py")
        count_checks(tree)
        return compile(tree, "tests.py", "exec", dont_inherit=True)
    except SyntaxError:
        raise
    except (ValueError, RecursionError, MemoryError, OverflowError, UnicodeError) as error:
        raise SyntaxError(f"{type(error).__name__}: {text_of(error)}") from None


def names_used(code: types.CodeType) -> set[str]:
    """Every global name that code mentions, nested functions included."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= names_used(constant)
    return found


def place_in_tests(error: BaseException, source: str) -> str:
    """The line of the tests that an exception passed last."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            line = trace.tb_lineno
        trace = trace.tb_next
    lines = source.splitlines()
    return f" at line {line} of the tests: {lines[line - 1].strip()[:300]}" if 0 < line <= len(lines) else ""


def run_tests(job: int, channel: int, report: int) -> NoReturn:
    """The tests' process."""
    facts = json.loads(read_all(job))
    os.close(job)
    same_recursion_for_all()
    judge = Judge(Channel(channel), report)
    source, prompt, entry_point = facts["tests"], facts["prompt"], facts["entry_point"]
    module = new_module("tests")
    space = module.__dict__
    space[CHECK] = judge.count_check
    try:
        code = compile_tests(source)
    except SyntaxError as error:
        judge.end("fail", "tests-syntax", f"the tests do not parse: {text_of(error)}")
    try:
        exec(compile_source(prompt.encode("utf-8", "surrogatepass"), "prompt.py"), space)
    except BaseException as error:
        judge.end("unsupported", "prompt", f"the prompt's own code cannot run: {type(error).__name__}: {text_of(error)}")
    loaded = judge.receive()
    if loaded[0] == "syntax":
        judge.end("fail", "syntax", str(loaded[1])[:MOST_TEXT])
    if loaded[0] == "raised":
        judge.end("fail", _load_reason(loaded), ": ".join(str(part)[:MOST_TEXT] for part in loaded[2:4]))
    if loaded[0] != "loaded":
        judge.end("fail", "protocol", "the program sent something that is no answer")
    bind_names(judge, space, names_used(code), entry_point)
    random.seed(0)
    collect_garbage_from_here()
    try:
        exec(code, space)
    except AssertionError as error:
        judge.end("fail", "assertion", f"AssertionError{place_in_tests(error, source)} {text_of(error)}".rstrip())
    except SystemExit:
        judge.end("fail", "early-exit", "the tests ended the interpreter before they were through")
    except BaseException as error:
        judge.end("fail", "exception", f"{type(error).__name__}: {text_of(error)}{place_in_tests(error, source)}")
    judge.end(*conclusion(judge.checks, judge.calls))


def conclusion(checks: int, calls: int | None) -> tuple[str, str, str]:
    """The verdict on tests that ran to their end."""
    if not checks:
        return "fail", "no-check", "the tests ran to their end without checking anything: no assert was reached"
    if calls == 0:
        return "fail", "no-call", "the tests never called the program"
    return "pass", "tests-completed", ""


def _load_reason(message: list[Any]) -> str:
    names = message[1] if len(message) > 1 and type(message[1]) is list else []
    if "builtins.SystemExit" in names:
        return "early-exit"
    return "memory" if "builtins.MemoryError" in names else "exception"


def bind_names(judge: Judge, space: dict[str, Any], wanted: set[str], entry_point: str | None) -> None:
    """Give the tests the solution's names that they mention; the prompt's, the builtins and the tests' own come first."""
    own = {name for name in wanted if name in space or hasattr(builtins, name)}
    asked = sorted((wanted - own) | ({entry_point} if entry_point else set()))
    answer = judge.ask("names", asked)
    if type(answer) is not dict:
        judge.end("fail", "protocol", "the program sent something that is no answer")
    for name in asked:
        if name not in answer:
            continue
        value = answer[name]
        if isinstance(value, Handle) and object.__getattribute__(value, "_kind") == "module":
            # `import math` in the solution serves tests that say math.isclose, by this side's own module.
            if object.__getattribute__(value, "_title") == name and name in sys.stdlib_module_names:
                space[name] = __import__(name)
            continue
        space[name] = value
    if entry_point and (entry_point not in answer or not callable(answer[entry_point])):
        judge.end("fail", "no-entry-point", f"the program defines no function `{entry_point}`")


# ---------------------------------------------------------------------------------------------------------------------
# Both in one process, and a program by itself


def run_together(job: int, report: int) -> NoReturn:
    """Program and tests in one interpreter: the program can forge the verdict, and the result says that it was so."""
    facts = json.loads(read_all(job))
    os.close(job)
    same_recursion_for_all()
    space = new_module(MODULE).__dict__
    checks = [0]

    def finish(verdict: str, reason: str, detail: str = "") -> NoReturn:
        flush()
        write_report(
            report, verdict=verdict, reason=reason, detail=detail, checks=checks[0], calls=None, nonce=facts["nonce"]
        )
        os._exit(0)

    def count_check() -> None:
        checks[0] += 1

    source = facts["tests"]
    try:
        program = compile_source(facts["program"].encode("utf-8", "surrogatepass"), f"{MODULE}.py")
    except SyntaxError as error:
        finish("fail", "syntax", text_of(error))
    try:
        tests = compile_tests(source)
    except SyntaxError as error:
        finish("fail", "tests-syntax", f"the tests do not parse: {text_of(error)}")
    collect_garbage_from_here()
    try:
        exec(program, space)
        entry_point = facts["entry_point"]
        if entry_point and not callable(space.get(entry_point)):
            finish("fail", "no-entry-point", f"the program defines no function `{entry_point}`")
        space[CHECK] = count_check
        random.seed(0)
        exec(tests, space)
    except AssertionError as error:
        finish("fail", "assertion", f"AssertionError{place_in_tests(error, source)} {text_of(error)}".rstrip())
    except SystemExit:
        finish("fail", "early-exit", "the program or its tests ended the interpreter before the tests were through")
    except MemoryError:
        finish("fail", "memory", "MemoryError")
    except BaseException as error:
        finish("fail", "exception", f"{type(error).__name__}: {text_of(error)}{place_in_tests(error, source)}")
    finish(*conclusion(checks[0], None))


def run_script(job: int) -> NoReturn:
    """A program by itself, as `python file.py` runs it: `__name__` is `__main__`, and its exit status is the process's."""
    source = read_all(job)
    os.close(job)
    same_recursion_for_all()
    module = new_module("__main__")
    module.__dict__["__file__"] = "solution.py"
    status = 0
    collect_garbage_from_here()
    try:
        exec(compile_source(source, "solution.py"), module.__dict__)
    except SystemExit as ending:
        status = _exit_status(ending.code)
    except BaseException as error:
        status = 1
        _print_traceback(error)
    with contextlib.suppress(BaseException):
        getattr(threading, "_shutdown")()  # noqa: B009  what the interpreter itself calls: waits for threads
        import atexit

        atexit._run_exitfuncs()
    flush()
    os._exit(status)


def _exit_status(code: Any) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    with contextlib.suppress(BaseException):
        print(code, file=sys.stderr)
    return 1


def _print_traceback(error: BaseException) -> None:
    import traceback

    with contextlib.suppress(BaseException):
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != "solution.py":
            trace = trace.tb_next
        traceback.print_exception(type(error), error, trace)


# ---------------------------------------------------------------------------------------------------------------------
# Other languages


def run_command(job: int, report: int) -> NoReturn:
    """Compile and run a program of another language. This process is the jail's first: nothing in it can kill it."""
    facts = json.loads(read_all(job))
    os.close(job)
    for name, text in facts["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(text)
    environment = {**os.environ, **facts["environment"]}
    if facts["compile"]:
        with open("compile.log", "wb") as log:
            code, stopped, seconds = _run_step(facts["compile"], environment, facts["compile_seconds"], log.fileno())
        if code != 0:
            with open("compile.log", "rb") as log:
                text = log.read(4000).decode("utf-8", "replace")
            write_report(report, step="compile", code=code, stopped=stopped, seconds=seconds, output=text)
            os._exit(0)
        for name in facts["files"]:
            os.remove(name)  # the program cannot look for the end mark in its own source
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, stopped, seconds = _run_step(facts["run"], environment, facts["wall_seconds"], None)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    write_report(report, step="run", code=code, stopped=stopped, seconds=seconds, cpu=cpu, output="")
    os._exit(0)


def _run_step(
    command: list[str], environment: dict[str, str], seconds: float, log: int | None
) -> tuple[int, str | None, float]:
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if log is not None else 0,
            stdout=log,
            stderr=log,
            env=environment,
            close_fds=True,
        )
    except OSError as error:
        return 127, f"cannot run {command[0]}: {error.strerror}", 0.0
    stopped = None
    effective = 0.0
    while True:
        try:
            code = process.wait(min(max(seconds - effective, 0.01), 0.5))
            break
        except subprocess.TimeoutExpired:
            passed = time.monotonic() - start
            effective = passed - min(waited_for_cpu(process.pid), passed * 0.95)
            if effective >= seconds:
                stopped = "wall"
                process.kill()
                code = process.wait()
                break
    if code == -signal.SIGXCPU:
        stopped = "cpu"
    return code, stopped, effective or time.monotonic() - start


def waited_for_cpu(pid: int) -> float:
    """Seconds that a process's threads were ready to run and had no processor; 0 where the kernel does not say."""
    total = 0
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat", "rb") as file:
                total += int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        pass
    return total / 1e9
