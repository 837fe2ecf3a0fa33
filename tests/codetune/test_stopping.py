"""Requests to stop and to save: who asks, who agrees, which files disappear, and how long is waited."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from codetune.artifacts import read_json
from codetune.stopping import EXIT_CODES, FLAGS, REASONS, Interrupted, Requests, end_of_budget, write_ended


def agree(*ranks: Requests) -> None:
    """What the all-reduce does."""
    flags = [rank.flags() for rank in ranks]
    for rank in ranks:
        rank.agree([sum(column) for column in zip(*flags, strict=True)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    here, there = Requests(), Requests()
    with here.listen():
        agree(here, there)
        assert here.stop is there.stop is None
        os.kill(os.getpid(), number)
        agree(here, there)
    assert here.stop == there.stop == number.name
    assert f"{number.name}: stopping after this step, with a checkpoint" in capfd.readouterr().err


def test_handlers_are_put_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with Requests().listen():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_launcher_that_passes_a_signal_on_does_not_end_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    """The whole process group is signalled, the launcher too, which then signals its processes again."""
    requests = Requests()
    with requests.listen():
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        agree(requests)
    assert requests.stop == "SIGINT"
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_ctrl_c_a_second_time_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = Requests()
    with requests.listen():
        os.kill(os.getpid(), signal.SIGINT)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 1.5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_file_asks_once_and_disappears_when_it_is_answered(tmp_path: Path) -> None:
    main, other = Requests(tmp_path), Requests(tmp_path, main=False)
    (tmp_path / "save-now").touch()
    agree(main, other)
    assert main.save and other.save
    assert main.stop is other.stop is None
    answered, nothing = main.answer(), other.answer()
    agree(main, other)
    assert not main.save and not other.save  # its checkpoint is on the way
    assert (tmp_path / "save-now").exists()
    nothing()
    answered()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_touched_again_asks_again(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    path = tmp_path / "save-now"
    path.touch()
    agree(requests)
    answered = requests.answer()
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    answered()
    assert path.exists()
    agree(requests)
    assert requests.save
    requests.answer()()
    assert not path.exists()


def test_stop_now_stops_all_ranks(tmp_path: Path) -> None:
    main, other = Requests(tmp_path), Requests(main=False)
    (tmp_path / "stop-now").touch()
    agree(main, other)
    assert main.stop == other.stop == "stop-now"


def test_files_from_before_the_process_are_removed_and_those_of_its_start_are_not(tmp_path: Path) -> None:
    for name, changed in (("save-now", time.time() + 5), ("stop-now", 1000.0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (changed, changed))
    assert Requests(tmp_path, main=False).remove_old_files() == []
    assert Requests(tmp_path).remove_old_files() == ["stop-now"]
    assert [path.name for path in tmp_path.iterdir()] == ["save-now"]


def test_the_budget_keeps_a_step_and_a_save_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 s, saves of 20 s (30 are kept in hand), steps of 8 s: no step begins with less than 38 s left."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    requests = Requests(end=100.0)
    requests.save_seconds = 20.0
    assert not requests.lacks_time()
    steps = 0
    while requests.stop is None:
        agree(requests)
        clock[0] += 8.0
        steps += 1
    last_look = clock[0] - 8.0
    assert last_look == 64.0  # 36 left; at 56 there were 44
    assert requests.stop == "the time budget"


def test_evaluation_and_saving_are_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    requests = Requests(end=100.0)
    agree(requests)
    clock[0] = 60.0  # of saving, say
    requests.after_pause()
    clock[0] = 61.0
    agree(requests)
    assert requests.stop is None  # a minute to a step would mean 39 are too few
    clock[0] = 99.5
    agree(requests)
    assert requests.stop == "the time budget"


def test_a_budget_that_is_spent_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"--minutes 0\.001: the budget was spent .* before anything was loaded; give it more"
    ):
        end_of_budget(0.001)
    end = end_of_budget(1000)
    assert end is not None
    assert 0 < end - time.monotonic() < 60_000
    assert end_of_budget(None) is None


def test_ranks_speak_of_the_same_reasons() -> None:
    assert len(Requests().flags()) == FLAGS == len(REASONS) + 1
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)
    assert Interrupted("SIGUSR1", Path("a/checkpoint-3")).exit_code == 75
    assert Interrupted("SIGINT", None).exit_code == 130
    assert "goes on from a/checkpoint-3" in str(Interrupted("SIGUSR1", Path("a/checkpoint-3")))


def test_how_it_ended_is_written_down(tmp_path: Path) -> None:
    write_ended(tmp_path, "stopped", reason="SIGTERM", checkpoint="checkpoint-3")
    written = read_json(tmp_path / "ended.json")
    assert (written["state"], written["exit_code"], written["checkpoint"]) == ("stopped", 75, "checkpoint-3")


def _hang(folder: str, grace_seconds: float | None, end: float | None, ready: object) -> None:
    requests = Requests(Path(folder), end=None if end is None else time.monotonic() + end, grace_seconds=grace_seconds)

    def give_up() -> str:
        (Path(folder) / "half-written").unlink()
        return "given up"

    requests.on_give_up = give_up
    with requests.listen():
        (Path(folder) / "half-written").touch()
        ready.set()  # pyright: ignore[reportAttributeAccessIssue]
        time.sleep(60)


@pytest.mark.parametrize(("grace_seconds", "end", "signalled"), [(0.3, None, True), (None, 0.5, False)])
def test_what_is_not_done_in_time_is_given_up(
    tmp_path: Path, grace_seconds: float | None, end: float | None, signalled: bool
) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hang, args=(str(tmp_path), grace_seconds, end, ready))
    process.start()
    assert ready.wait(30)
    if signalled:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == EXIT_CODES["stopped"]
    assert not list(tmp_path.iterdir())


def test_nothing_is_given_up_where_nobody_says_how_long_there_is(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    with requests.listen():
        os.kill(os.getpid(), signal.SIGTERM)
        agree(requests)
    assert requests.give_up_at() is None


WORKER = """
import os, signal, sys, time
from codetune.stopping import leave_signals_to_parent
child = os.fork()
if child == 0:
    leave_signals_to_parent()
    time.sleep(60)
    os._exit(1)
print(child, flush=True)
sys.stdin.readline()
os.kill(child, signal.SIGTERM)
print(os.WEXITSTATUS(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_loader_worker_is_ended_by_its_parent_alone(wait_until: Callable[[Callable[[], bool]], None]) -> None:
    source = str(Path(__file__).parents[2] / "src")
    parent = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env={**os.environ, "PYTHONPATH": source},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    blocked = Path(f"/proc/{child}/status")
    wait_until(lambda: bool(int(blocked.read_text().split("SigBlk:")[1].split()[0], 16) & 1 << (signal.SIGTERM - 1)))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(child, number)  # as a scheduler does to the whole group
    time.sleep(0.3)
    assert blocked.exists()
    out, _ = parent.communicate("now\n", timeout=30)
    assert out.strip() == "0"
