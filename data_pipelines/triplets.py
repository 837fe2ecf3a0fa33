"""The door between self-instruct and conversations: questions, the tests that decide, and a solution that passed them.

On disk: a folder with `triplets.jsonl` (one object per line), `records.jsonl` (every question with where it ended and why,
kept or not, with times) and `manifest.json` (the funnel, the recipe, the models). The folder is there whole or not at all.
`triplets.jsonl` holds nothing that depends on time or machine, so that equal runs write equal bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codetune.artifacts import MANIFEST, read_json

TRIPLETS, RECORDS, QUESTIONS = "triplets.jsonl", "records.jsonl", "questions.json"


@dataclass(frozen=True)
class Triplet:
    """One question with its tests and the first solution that passed all of them."""

    id: str
    question: str
    tests: str  # asserts, one per line, imports before them
    solution: str  # source of a function, as the model wrote it between its tags
    entry_point: str  # the function that the tests call
    shown_test: str  # the one that the solution was written for; the others were hidden from it
    provenance: dict[str, Any] = field(
        default_factory=dict
    )  # prompts, seeds, models, parameters, verdicts: see the manifest

    def to_line(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True) + "\n"


def read_triplets(folder: Path) -> Iterator[Triplet]:
    """The kept triplets of a finished run, in order.

    Raises:
        ValueError: no such run, an unfinished one, or a line that is no triplet.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: no triplets; make them with `make self-instruct`")
    expected = read_json(folder / MANIFEST)["funnel"]["kept"]
    names = {item.name for item in dataclasses.fields(Triplet)}
    count = 0
    with (folder / TRIPLETS).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                facts = json.loads(line)
                triplet = Triplet(**{name: facts[name] for name in names})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{folder / TRIPLETS}: line {number} is no triplet ({error!r}); make it again") from error
            count += 1
            yield triplet
    if count != expected:
        raise ValueError(f"{folder}: the manifest promises {expected} triplets, there are {count}; make them again")
