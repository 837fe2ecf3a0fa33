"""Grading: answers in, one line per sample out, in a file that is gone on with after any interruption.

What comes in: a task, its questions and the answers. What goes out: grades by problem. Programs run through
`codetune.sandbox`, as many at once as it has workers. A fault of the sandbox is no verdict: the sample stays without a
grade, is counted, and is tried again by the next run; above a share of faults grading stops.

References come first. A benchmark whose own solutions do not pass here is refused, since nothing else that it says could be
believed; that check is kept beside the grades and is made again when problems, limits or Python change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from codetune.artifacts import hash_json, read_json, write_json
from codetune.sandbox import Sandbox, SandboxError
from eval.stored import Answer
from eval.tasks import Cut, Grade, Question, Reason, Task, TaskRefused

MOST_FAULTS = 0.02  # of the samples; above that the machine is to blame, and grading stops
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclasses.dataclass
class Graded:
    """The grades of one task, and what could not be graded."""

    grades: dict[str, list[Grade]]
    faults: list[str]
    notes: dict[str, int]
    seconds: float
    graded_now: int
    bytes_before: int = 0  # of the file of grades, before those of this run


class LineFile:
    """Lines of JSON with a key each, added one by one; the last line of a killed process is cut off and redone."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        whole = 0
        if path.is_file():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            for number, line in enumerate(data[:whole].splitlines(), 1):
                try:
                    self.rows.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(
                        f"{path}, line {number}: damaged ({error}); move the file away to grade again"
                    ) from error
        self._file = path.open("ab")
        self._file.truncate(whole)

    def add(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def grade_answers(
    task: Task,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    too_long: Sequence[str],
    sandbox: Callable[[], Sandbox],
    path: Path,
) -> Graded:
    """Grade what has no grade yet. `too_long` are problems whose prompt does not fit: failed, with that reason.

    Raises:
        TaskRefused: more faults of the sandbox than can be by chance.
    """
    by_id = {question.id: question for question in questions}
    file = LineFile(path)
    bytes_before = path.stat().st_size
    start = time.monotonic()
    try:
        known = {(row["prompt_id"], row["sample"]): row for row in file.rows if row["task"] == task.fingerprint}
        grades: dict[tuple[str, int], Grade] = {}
        notes: dict[str, int] = {}
        left: list[tuple[Answer, Cut]] = []
        for answer in answers:
            cut = cut_answer(task, by_id[answer.prompt_id], answer)
            for note in cut.notes:
                notes[note] = notes.get(note, 0) + 1
            row = known.get((answer.prompt_id, answer.sample))
            if row is not None and row["cut_hash"] == hash_cut(cut):
                grades[answer.prompt_id, answer.sample] = grade_of(row)
            else:
                left.append((answer, cut))
        run = sandbox().run if task.program and left else _no_sandbox
        faults = []
        work = in_threads(lambda one: _grade_one(task, by_id[one[0].prompt_id], one[1], run), left, sandbox, task)
        for (answer, cut), grade in tqdm(
            work, total=len(left), desc=f"grade {task.name}", unit=" samples", disable=not left
        ):
            if isinstance(grade, SandboxError):
                faults.append(f"{answer.prompt_id}, sample {answer.sample}: {grade}")
                if len(faults) > max(2.0, MOST_FAULTS * len(answers)):
                    raise TaskRefused(
                        f"the sandbox failed on {len(faults)} samples, so grading stops; the last: {faults[-1]}"
                    )
                continue
            grades[answer.prompt_id, answer.sample] = grade
            file.add(
                {
                    "prompt_id": answer.prompt_id,
                    "sample": answer.sample,
                    "task": task.fingerprint,
                    "cut_hash": hash_cut(cut),
                    "cut": cut.text,
                    "raw": answer.text,
                    "ended": answer.ended,
                    "prompt_tokens": answer.prompt_tokens,
                    "completion_tokens": answer.completion_tokens,
                    "notes": cut.notes,
                    **dataclasses.asdict(grade),
                }
            )
    finally:
        file.close()
    found: dict[str, list[Grade]] = {question.id: [] for question in questions}
    for (prompt_id, _), grade in sorted(grades.items(), key=lambda item: item[0]):
        found[prompt_id].append(grade)
    for prompt_id in too_long:
        found[prompt_id] = [task.grade_unasked(by_id[prompt_id])] * task.settings.samples
    return Graded(found, faults, notes, time.monotonic() - start, len(left), bytes_before)


def cut_answer(task: Task, question: Question, answer: Answer) -> Cut:
    if answer.whole_program:
        return Cut(answer.text, whole_program=True)
    return task.cut(question, answer.text, answer.ended)


def hash_cut(cut: Cut) -> str:
    return hash_json([cut.text.encode("utf-8", "surrogatepass").hex(), cut.whole_program, str(cut.problem)])


def grade_of(row: dict[str, Any]) -> Grade:
    """A grade from its line."""
    names = {item.name for item in dataclasses.fields(Grade)}
    return Grade(**{**{name: row[name] for name in names if name in row}, "reason": Reason(row["reason"])})


def _no_sandbox(_: Any) -> Any:
    raise AssertionError("a task without programs asked for the sandbox")


def _grade_one(task: Task, question: Question, cut: Cut, run: Any) -> Grade | SandboxError:
    if cut.problem is not None:
        return Grade(False, cut.problem)
    try:
        return task.grade(question, cut, run)
    except SandboxError as error:
        return error


def in_threads(
    work: Callable[[Item], Made], items: Sequence[Item], sandbox: Callable[[], Sandbox], task: Task
) -> Iterator[tuple[Item, Made]]:
    """Each item with what was made of it, as they finish; a bounded number are under way."""
    workers = sandbox().workers if task.program and items else 1
    if workers == 1 or not task.program:
        yield from ((item, work(item)) for item in items)
        return
    waiting: Iterable[Item] = iter(items)
    running: dict[Future[Made], Item] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="grade") as pool:
        try:
            while True:
                while len(running) < 4 * workers:
                    item = next(waiting, None)  # pyright: ignore[reportArgumentType, reportCallIssue]
                    if item is None:
                        break
                    running[pool.submit(work, item)] = item
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()


def check_probes(task: Task, sandbox: Callable[[], Sandbox]) -> None:
    """Let the toolchain prove itself.

    Raises:
        TaskRefused: it judges a program wrongly that is known to be right or wrong.
    """
    for job, right in task.probes():
        result = sandbox().run(job)
        if result.passed != right:
            raise TaskRefused(
                f"the toolchain of {job.language} ({result.toolchain}) calls a {'right' if right else 'wrong'} program "
                f"{result.reason}: {result.detail[:200] or result.stderr[:200]}"
            )


def check_probes_again(task: Task, sandbox: Callable[[], Sandbox], path: Path, graded: Graded) -> None:
    """Let the toolchain prove itself behind the last answer, too: one that went in mid-run calls right programs wrong.

    Raises:
        TaskRefused: it no longer judges rightly; what it judged in this run is taken out of the file of grades.
    """
    try:
        check_probes(task, sandbox)
    except (ValueError, SandboxError) as error:
        os.truncate(path, graded.bytes_before)
        raise TaskRefused(
            f"a toolchain went or changed while answers were graded, so that the {graded.graded_now} grades of this run are "
            f"taken back; mend it and run again: {error}"
        ) from error


def check_references(
    task: Task, questions: Sequence[Question], sandbox: Callable[[], Sandbox], folder: Path
) -> dict[str, Any]:
    """Run the benchmark's own solutions; a failure is the harness's or the data's, and nothing else is graded then.

    Raises:
        TaskRefused: one of them does not pass; which, and why.
    """
    pairs = [(question, task.reference(question.problem)) for question in questions]
    pairs = [(question, cut) for question, cut in pairs if cut is not None]
    if not task.program:
        return {"references": 0}
    check_probes(task, sandbox)
    if not pairs:
        return {"references": 0}
    path = folder / "references.json"
    known = read_json(path) if path.is_file() else {}
    key = hash_json([task.fingerprint, platform.python_version(), sys.platform])
    if key in known:
        return known[key] | {"cached": True}
    start, failed, judges = time.monotonic(), [], {}
    run = sandbox().run

    def work(pair: tuple[Question, Cut]) -> Grade | SandboxError:
        return _grade_one(task, pair[0], pair[1], run)

    progress = tqdm(
        in_threads(work, pairs, sandbox, task), total=len(pairs), desc=f"references {task.name}", unit=" programs"
    )
    for (question, _), grade in progress:
        if isinstance(grade, SandboxError) or not grade.passed:
            why = str(grade) if isinstance(grade, SandboxError) else f"{grade.reason} ({grade.detail[:120]})"
            failed.append(f"{question.id}: {why}")
        else:
            judges[grade.judge] = judges.get(grade.judge, 0) + 1
    if len(failed) > task.most_failing * len(pairs):
        raise TaskRefused(
            f"{len(failed)} of {len(pairs)} reference solutions do not pass here, so no answer can be judged: "
            f"{'; '.join(failed[:3])}"
        )
    facts: dict[str, Any] = {"references": len(pairs), "failed": failed, "judges": judges}
    floors = [(question, cut) for question in questions if (cut := task.floor(question.problem)) is not None]
    if floors:
        graded = [grade for _, grade in in_threads(work, floors, sandbox, task)]
        if any(isinstance(grade, SandboxError) for grade in graded):
            raise TaskRefused("the sandbox failed on answers without content, so their score is not known; run again")
        passed = sum(bool(getattr(grade, "passed", False)) for grade in graded)
        facts["floor"] = {"name": task.floor_name, "passed": passed, "of": len(floors)}
    facts["seconds"] = round(time.monotonic() - start, 2)
    with contextlib.suppress(ValueError):
        known = read_json(path) if path.is_file() else {}
    write_json(path, known | {key: facts})
    return facts
