"""A run of self-instruct on disk: its recipe with the files that it names, its lanes' files, and what they hold.

What comes in: a recipe. What goes out: `Run`, which knows where everything lies and whether it belongs to this recipe. A
lane has one file per pass; completions are kept by `codetune.generate`, records of programs by `Records`, a line a question.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codetune.artifacts import MANIFEST, hash_json, read_json, write_json
from codetune.generate import Completion, Sampling, read_completions
from codetune.recipe import AskSettings, Recipe, SelfInstructSettings
from data_pipelines.prompt_files import PromptFile, read_prompt_file

ASKED = ("questions", "tests", "solutions")  # passes in which a model is asked
PLACES = {"questions": set(), "tests": {"question"}, "solutions": {"question", "test"}}
MAY_HAVE = {"questions": frozenset(("topic", "difficulty", "count", "shown", "next"))}
# Settings that say how the work is done and change no triplet.
MACHINE_KEYS = ("tensor_parallel", "data_parallel", "gpu_memory_share", "url", "api_key_variable", "concurrency")
MACHINE_KEYS += ("timeout_seconds", "max_tries", "retry_seconds", "device")


@dataclass(frozen=True)
class Run:
    """A recipe with the files that it names, read."""

    recipe: Recipe
    prompts: dict[str, PromptFile]
    topics: tuple[str, ...]
    seeds: tuple[str, ...]

    @property
    def settings(self) -> SelfInstructSettings:
        return self.recipe.need_self_instruct()

    @property
    def target(self) -> Path:
        return self.recipe.run_dir / "triplets"

    @property
    def work(self) -> Path:
        return self.recipe.run_dir / "work"

    @property
    def fingerprint(self) -> str:
        """Of all that decides the triplets, but for the models' weights, of which their completions' files keep a hash."""
        settings = {key: value for key, value in self.recipe.to_dict()["self_instruct"].items() if key != "executor"}
        for name in ASKED:
            settings[name]["engine"] = {k: v for k, v in settings[name]["engine"].items() if k not in MACHINE_KEYS}
        texts = {name: file.fingerprint for name, file in self.prompts.items()}
        return hash_json([settings, self.recipe.seed, texts, self.topics, self.seeds])

    def ask(self, name: str) -> AskSettings:
        return getattr(self.settings, name)

    def sampling(self, name: str) -> Sampling:
        ask = self.ask(name)
        return Sampling(ask.max_new_tokens, ask.temperature, ask.top_p, ask.samples, ask.stop_strings, seed=self.recipe.seed)

    def lane_file(self, name: str, lane: int) -> Path:
        return self.work / name / f"lane-{lane:05d}.jsonl"

    def lane_done(self, name: str, lane: int) -> Path:
        return self.work / name / f"lane-{lane:05d}.done.json"

    def claim(self) -> None:
        """Make the working folder this recipe's own.

        Raises:
            ValueError: another recipe has left its work there.
        """
        state = self.work / "run.json"
        if state.is_file() and read_json(state)["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.work}: holds the unfinished work of other settings, prompts or topics; delete the folder, or give "
                "this run another name (--set name=...)"
            )
        write_json(state, {"fingerprint": self.fingerprint})

    def is_finished(self) -> bool:
        """Whether the triplets of this recipe are there; those of another one are refused."""
        if not self.target.exists():
            return False
        if not (self.target / MANIFEST).is_file():
            raise ValueError(f"{self.target}: exists and holds no triplets; move it away, or --set runs=FOLDER")
        if read_json(self.target / MANIFEST)["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.target}: holds the triplets of other settings, prompts or topics; delete the folder to make them "
                "anew, or give this run another name (--set name=...)"
            )
        return True

    def is_concluded(self) -> bool:
        """Whether the finished folder is there, of whichever settings; from then on what was found is read in it."""
        return (self.target / MANIFEST).is_file()

    def clear_work(self) -> None:
        """Remove the working folder, of whose content the finished one has all that counts."""
        if self.work.is_dir():
            shutil.rmtree(self.work)

    @property
    def seconds(self) -> dict[str, float]:
        """Spent on each pass, in all sessions."""
        path = self.work / "seconds.json"
        return read_json(path) if path.is_file() else {}

    def timed(self, name: str, work: Any) -> None:
        """Do something and add its seconds to what earlier sessions spent on it; lanes on several machines may lose some."""
        start = time.monotonic()
        try:
            work()
        finally:
            spent = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 1)
            write_json(self.work / "seconds.json", self.seconds | {name: spent})

    def answers(self, name: str, lane: int) -> dict[str, list[Completion]]:
        """Completions of a lane by prompt, samples in order."""
        path = self.lane_file(name, lane)
        found: dict[str, list[Completion]] = {}
        for completion in read_completions(path) if path.is_file() else ():
            found.setdefault(completion.prompt_id, []).append(completion)
        return {key: sorted(items, key=lambda item: item.sample) for key, items in found.items()}


def open_run(recipe: Recipe) -> Run:
    """The recipe with its prompt files, topics and examples.

    Raises:
        ValueError: one of them is missing or not as it must be.
    """
    settings = recipe.need_self_instruct()
    prompts = {
        name: read_prompt_file(Path(getattr(settings, name).prompt), PLACES[name], MAY_HAVE.get(name, frozenset()))
        for name in ASKED
    }
    topics, seeds = read_lines(Path(settings.topics)), read_lines(Path(settings.seed_questions))
    if settings.shown_questions > len(seeds):
        raise ValueError(
            f"{settings.seed_questions}: {len(seeds)} questions, but `self_instruct.shown_questions` is "
            f"{settings.shown_questions}; write more of them, or a smaller number"
        )
    return Run(recipe, prompts, topics, seeds)


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a list that a user keeps; `#` begins a note."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no list that can be read here ({error})") from error
    found = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not found:
        raise ValueError(f"{path}: nothing in it; write one entry a line")
    return found


def draw(*what: Any) -> random.Random:
    """A stream of random numbers that belongs to these values and nothing else."""
    return random.Random(hashlib.sha256(json.dumps(what).encode()).digest())


class Records:
    """A file of JSON lines that is only ever added to."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.found = path, {}
        data = path.read_bytes() if path.is_file() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self.found[record["id"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: line {number} is damaged ({error!r}); delete the file, it is made again"
                ) from error
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Write some records, down to the disk."""
        lines = [json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in records]
        with self.path.open("ab") as file:
            file.write("".join(lines).encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
