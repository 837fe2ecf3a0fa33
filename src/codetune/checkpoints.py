"""Checkpoints in progress: written apart, sealed, renamed, and the old ones deleted last; in the background where it may be.

What comes in: a folder, and functions that write into it. What goes out: `checkpoint-<step>` folders, each whole or not
there. Two kinds, of the same content (weights, optimizer, schedule, random state: with less, a run does not go on to the
same weights):

    light    every `save_tokens`; the newest `keep_checkpoints` of them stay. What makes it light is that training does not
             wait for the disk, and that it is soon gone
    kept     every `keep_tokens`, and whenever one was asked for by `save-now`: never deleted

In the background means: copied on the spot, written by one thread while training goes on, sealed before the next save
begins. It costs a copy of weights and optimizer state in memory: the main rank's, or of each rank its own part (FSDP2).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codetune.artifacts import MANIFEST, read_json, replace_folder, seal_folder, write_json

TRIAL_BYTES = 32 * 2**20  # written to learn how fast a disk is
SAVE_TIMES = "save_seconds.json"


@dataclass(frozen=True)
class SaveJob:
    """One checkpoint on its way: where it is written, and what is left to be done."""

    step: int
    staging: Path  # holds the folder `checkpoint-<step>`
    parts: Sequence[Callable[[], Any]]  # what is still to be written
    manifest: dict[str, Any]
    keep: int
    started: float  # a reading of time.monotonic
    sealed: Callable[[], None]  # called once it has its name
    seals: bool = True  # off: another rank seals it, once this one's parts are written


class CheckpointWriter:
    """Finishes one checkpoint after another in a thread, never two at once; one on each rank, the main rank's seals."""

    def __init__(self, folder: Path, sealing: contextlib.AbstractContextManager[Any]) -> None:
        """`sealing` is held while a checkpoint gets its name."""
        self.folder = folder
        self.failure: tuple[int, Exception, int] | None = None  # step, error, bytes free: of a failed save, until told
        self.seconds = longest_save_seconds(folder)
        self._sealing = sealing
        self._figures: dict[str, float] | None = None
        self._waited_seconds = 0.0
        self._thread: threading.Thread | None = None
        self._abandoned = False

    def start(self, job: SaveJob) -> None:
        """Write what is left, seal it, give it its name, and delete what is no longer kept: all that in the background."""
        assert self._thread is None, "two saves at once"
        self._waited_seconds = time.monotonic() - job.started
        # a daemon, so that a second Ctrl-C need not wait for a slow disk
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{job.step}", daemon=True)
        self._thread.start()

    def _run(self, job: SaveJob) -> None:
        try:
            self._write(job)
        except Exception as error:  # noqa: BLE001  (nobody is above it in a thread; `SafeTraining` tells it at the next step)
            self.failed(job.step, error)
        finally:
            if job.seals:
                shutil.rmtree(job.staging, ignore_errors=True)

    def _write(self, job: SaveJob) -> None:
        for part in job.parts:
            part()
        if not job.seals:
            return
        name = f"checkpoint-{job.step}"
        seal_folder(job.staging / name, job.manifest)
        with self._sealing:
            if self._abandoned:
                return
            replace_folder(job.staging / name, self.folder / name)
        job.sealed()
        rotate_checkpoints(self.folder, job.keep, newest=job.step)
        seconds = time.monotonic() - job.started
        self.seconds = max(self.seconds, seconds)
        write_json(self.folder / SAVE_TIMES, {"longest": round(self.seconds, 3), "last": round(seconds, 3)})
        self._figures = {"save_step": job.step, "save_seconds": round(seconds, 3)}

    def failed(self, step: int, error: Exception) -> None:
        """Note a save that failed, and how full the disk is before what was written is taken away."""
        self.failure = step, error, shutil.disk_usage(self.folder).free

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            start = time.monotonic()
            self._thread.join()
            self._waited_seconds += time.monotonic() - start
            self._thread = None

    def abandon(self) -> None:
        """Let what is being written never get its name, and take it away."""
        with self._sealing:
            self._abandoned = True
        remove_leftovers(self.folder, "checkpoint")

    def take_figures(self) -> dict[str, float] | None:
        """What the last save took, and how much of it training waited for; once, when it is sealed."""
        if self._figures is None:
            return None
        figures, self._figures = self._figures, None
        return {**figures, "save_waited_seconds": round(self._waited_seconds, 3)}


def numbered_checkpoints(folder: Path) -> list[Path]:
    """Folders called `checkpoint-<step>`, oldest first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def is_kept(checkpoint: Path) -> bool:
    """Whether its manifest says that it is never to be deleted; one that cannot be read says nothing."""
    try:
        return bool(read_json(checkpoint / MANIFEST).get("kept"))
    except (ValueError, OSError):
        return False


def rotate_checkpoints(folder: Path, keep: int, newest: int) -> None:
    """Delete all but the newest `keep` checkpoints up to step `newest`, and those that are kept for good.

    A folder loses its name before its files.
    """
    names = [path for path in numbered_checkpoints(folder) if int(path.name.removeprefix("checkpoint-")) <= newest]
    for path in [path for path in names if not is_kept(path)][:-keep]:
        doomed = path.with_name(f".deleted-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """What a killed session left of folders called `name-...`: half-written and half-deleted ones, under other names.

    Killed between the two renames of `replace_folder`, it left the old folder, whole, under another name: that gets its own
    back.
    """
    for old in folder.glob(f".replaced-{name}-*"):
        target = folder / old.name.removeprefix(".replaced-").rpartition("-")[0]
        if not target.exists():
            old.rename(target)
    for state in ("incomplete", "deleted", "replaced"):
        for path in folder.glob(f".{state}-{name}-*"):
            shutil.rmtree(path, ignore_errors=True)


def longest_save_seconds(folder: Path) -> float:
    """What the longest save of this run took in earlier sessions; 0.0 where none is known."""
    path = folder / SAVE_TIMES
    return float(read_json(path)["longest"]) if path.is_file() else 0.0


def estimated_save_seconds(folder: Path, size_bytes: int) -> float:
    """What writing so many bytes would take on the disk of `folder`, by a trial of at most `TRIAL_BYTES`."""
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f".trial-{os.getpid()}"
    block = os.urandom(min(TRIAL_BYTES, max(size_bytes, 1)))
    start = time.monotonic()
    try:
        with trial.open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return (time.monotonic() - start) * size_bytes / len(block)
    finally:
        trial.unlink(missing_ok=True)
