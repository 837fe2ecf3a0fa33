"""Being asked to stop or to save, in whatever way machines and people ask, and the answer that all ranks agree on.

What comes in: SIGINT, SIGTERM and SIGUSR1 (Slurm's `--signal`), a time budget, and the files `save-now` and `stop-now` in
the run's folder, which the main rank looks for. What goes out: flags that the trainer sums over the ranks with its own at
every step, and between the batches of an evaluation; so all ranks save and end at the same place, whichever was asked.

After a request to stop, a machine waits for so long and then kills. Where `grace_seconds` says how long, or a budget when it
ends, a save that is not sealed by then is given up: what was written of it is removed, and the process ends.

How a launcher tells the ends apart: by the exit code (`EXIT_CODES`), or, behind launchers that make 1 of every code that is
not 0 (torchrun, accelerate launch), by `ended.json` in the run's folder. A process that was killed leaves none.

What it does not do: hurry a save, or end a step in its middle.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from codetune.artifacts import write_json

SAVE_NOW, STOP_NOW, ENDED = "save-now", "stop-now", "ended.json"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
BUDGET = "the time budget"
REASONS = (*(number.name for number in SIGNALS), BUDGET, STOP_NOW)  # a flag each, in this order
FLAGS = len(REASONS) + 1  # and one more: save

# 75 is EX_TEMPFAIL of sysexits.h, "try again later": whoever sees it starts the same command again; not so after Ctrl-C
EXIT_CODES = {"finished": 0, "failed": 2, "stopped": 75, "interrupted": 128 + signal.SIGINT}
SAFETY = 1.5  # a save is expected to take so many times what the longest one took
AGAIN_SECONDS = 1.0  # a Ctrl-C this long after the first ends at once; launchers pass the first one on within it


class Interrupted(Exception):
    """The run was asked to end and has; what it can go on from is whole."""

    def __init__(self, reason: str, checkpoint: Path | None) -> None:
        goes_on = f"goes on from {checkpoint}" if checkpoint is not None else "begins anew: no step had been made"
        super().__init__(f"stopped ({reason}); the same command {goes_on}")
        self.reason, self.checkpoint = reason, checkpoint
        self.exit_code = EXIT_CODES["interrupted" if reason == "SIGINT" else "stopped"]


class StopAgreed(Exception):
    """All ranks have agreed to stop; ends an evaluation in its middle."""


class Requests:
    """What this rank was asked for, and what all ranks have agreed on."""

    def __init__(
        self, run_dir: Path | None = None, main: bool = True, end: float | None = None, grace_seconds: float | None = None
    ) -> None:
        """`end` is a reading of `time.monotonic`; the files in `run_dir` are looked for by the main rank alone."""
        self.run_dir = run_dir if main else None
        self.end, self.grace_seconds = end, grace_seconds
        self.stop: str | None = None  # one of REASONS: all ranks stop
        self.save = False  # all ranks save
        self.save_seconds = 0.0  # that the next save is expected to take
        self.sealing = threading.RLock()  # held while a checkpoint gets its name
        self.on_give_up: Callable[[], str] | None = None  # removes what is half-written, returns a sentence
        self._owner = os.getpid()
        self._asked: dict[str, float] = {}  # reason -> when this rank first heard of it
        self._taken: dict[str, int] = {}  # request file -> its time of change when it was seen
        self._answering: dict[str, int] = {}  # the same, of the checkpoint that is on its way
        self._last_poll: float | None = None
        self._longest_poll = 0.0
        self._given_up = threading.Event()

    # -- asking -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Take signals as requests while the block runs, and give up what is not done in time."""
        previous: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        watcher = threading.Thread(target=self._watch, name="grace", daemon=True)
        if self.end is not None or self.grace_seconds is not None:
            watcher.start()
        try:
            yield
        finally:
            self._given_up.set()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: types.FrameType | None) -> None:
        """Note the signal. subtle: launchers pass on what the whole process group was sent, so it may come twice."""
        if os.getpid() != self._owner:
            return  # a worker of the data loader, which has this handler from its parent
        name, now = signal.Signals(number).name, time.monotonic()
        if name == "SIGINT" and now - self._asked.get(name, now) >= AGAIN_SECONDS:
            raise KeyboardInterrupt
        if not self._asked.keys() & {item.name for item in SIGNALS}:
            advice = " (Ctrl-C once more: at once)" if name == "SIGINT" else ""
            # not print: it may be interrupted in the middle of its own buffer
            os.write(sys.stderr.fileno(), f"\n{name}: stopping after this step, with a checkpoint{advice}\n".encode())
        self._asked.setdefault(name, now)

    def flags(self) -> list[float]:
        """What this rank asks for, as numbers to be summed over the ranks; `FLAGS` of them."""
        now = time.monotonic()
        if self._last_poll is not None:
            self._longest_poll = max(self._longest_poll, now - self._last_poll)
        self._last_poll = now
        if self.left_seconds() < self._longest_poll + SAFETY * self.save_seconds:  # of one more step, and a save
            self._asked.setdefault(BUDGET, now)
        if self._file_asks(STOP_NOW):
            self._asked.setdefault(STOP_NOW, now)
        return [float(reason in self._asked) for reason in REASONS] + [float(self._file_asks(SAVE_NOW))]

    def agree(self, totals: list[float]) -> None:
        """Take the sums over all ranks of `flags`. A request holds until it is answered."""
        for reason, total in zip(REASONS, totals[: len(REASONS)], strict=True):
            if total > 0:
                self._asked.setdefault(reason, time.monotonic())  # the grace period runs on every rank
                self.stop = self.stop or reason
        self.save = self.save or totals[len(REASONS)] > 0

    def after_pause(self) -> None:
        """What was done since the last look was no step."""
        self._last_poll = time.monotonic()

    def left_seconds(self) -> float:
        return float("inf") if self.end is None else self.end - time.monotonic()

    def lacks_time(self) -> bool:
        """Whether the budget that is left is shorter than one save."""
        return self.left_seconds() < SAFETY * self.save_seconds

    # -- files --------------------------------------------------------------------------------------------------------

    def _file_asks(self, name: str) -> bool:
        """Whether the file is there, new since it was last seen."""
        if self.run_dir is None:
            return False
        try:
            changed = (self.run_dir / name).stat().st_mtime_ns
        except FileNotFoundError:
            return False
        fresh = changed not in (self._taken.get(name), self._answering.get(name))
        if fresh:
            self._taken[name] = changed
        return fresh

    def answer(self) -> Callable[[], None]:
        """A checkpoint is on its way: call what is returned once it is sealed, and the files that asked for it disappear.

        A file that was touched again in the meantime stays, and asks for another one.
        """
        taken, self._taken, self.save = self._taken, {}, False
        folder = self.run_dir

        def remove() -> None:
            for name, changed in taken.items():
                assert folder is not None
                with contextlib.suppress(FileNotFoundError):
                    if (folder / name).stat().st_mtime_ns == changed:
                        (folder / name).unlink()

        self._answering = taken
        return remove

    def remove_old_files(self) -> list[str]:
        """Take away request files from before this process began; what was asked since then counts. Returns their names."""
        removed = []
        for name in (SAVE_NOW, STOP_NOW):
            with contextlib.suppress(FileNotFoundError):
                if self.run_dir is not None and (self.run_dir / name).stat().st_mtime < psutil.Process().create_time():
                    (self.run_dir / name).unlink()
                    removed.append(name)
        return removed

    def reason(self) -> str:
        """Why the run is to end, as far as this rank knows."""
        return self.stop or next(iter(self._asked), BUDGET)

    # -- giving up ----------------------------------------------------------------------------------------------------

    def give_up_at(self) -> float | None:
        """When whatever is still going on is to be given up; None for never."""
        ends = [] if self.end is None else [self.end]
        signals = [when for reason, when in list(self._asked.items()) if reason in signal.Signals.__members__]
        if signals and self.grace_seconds is not None:
            ends.append(min(signals) + self.grace_seconds)
        return min(ends, default=None)

    def _watch(self) -> None:
        """In a thread of its own, so that neither a disk nor a collective that hangs can keep it from looking."""
        while not self._given_up.wait(0.05):
            end = self.give_up_at()
            if end is not None and time.monotonic() >= end:
                with self.sealing:
                    try:
                        sentence = "" if self.on_give_up is None else self.on_give_up()
                        os.write(sys.stderr.fileno(), f"\n{sentence}\n".encode() if sentence else b"")
                    finally:
                        os._exit(EXIT_CODES["stopped"])  # what waits in a collective or on a disk cannot be ended otherwise


def leave_signals_to_parent() -> None:
    """In a worker of the data loader: what the whole process group is sent must not end it, its parent still must.

    A worker that dies of SIGTERM takes the run down before it has saved. PyTorch ends its workers by SIGTERM too.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo([signal.SIGTERM])
            if received.si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def end_of_budget(minutes: float | None) -> float | None:
    """When a budget that began with this process ends, as a reading of `time.monotonic`.

    Raises:
        ValueError: it has ended already.
    """
    if minutes is None:
        return None
    age = time.time() - psutil.Process().create_time()
    left = minutes * 60 - age
    if left <= 0:
        raise ValueError(
            f"--minutes {minutes:g}: the budget was spent {-left:.0f} s ago, before anything was loaded; give it more. "
            "Nothing was changed"
        )
    return time.monotonic() + left


def write_ended(run_dir: Path, state: str, **facts: Any) -> None:
    """Say in `ended.json` how the session ended: finished, stopped, interrupted or failed."""
    write_json(run_dir / ENDED, {"state": state, "exit_code": EXIT_CODES[state], "time": time.time(), **facts})
