"""The questions of self-instruct: which are asked for, what is taken out of the answers, and which are kept.

What comes in: the topic plan, examples, and answers that are numbered lists. What goes out: questions, each once, none that
shares a run of words with a benchmark, dealt to lanes; whatever is not taken has a reason that is counted. A question's id
depends on its text alone, and so do the random numbers that its tests and solutions are drawn with.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from codetune.artifacts import read_json, write_json
from codetune.generate import Completion
from codetune.problems import benchmark_texts
from codetune.recipe import SelfInstructSettings
from data_pipelines.decontaminate import Contamination, words_of
from data_pipelines.prompt_files import TAGS, filled
from data_pipelines.self_instruct_run import Run, draw
from data_pipelines.suites import Refused
from data_pipelines.triplets import QUESTIONS

SHORTEST, LONGEST = 20, 600  # characters of a question
SHINGLE_WORDS = 3
ITEM = re.compile(r"^[ \t]*(?:\*\*)?(\d{1,3})[.)][ \t]+", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """A question and where it came from."""

    id: str
    text: str
    lane: int
    topic: str
    difficulty: str
    asked: dict[str, Any]  # prompt, sample, item


def topic_cell(run: Run, number: int) -> tuple[str, str]:
    """Topic and difficulty of a question prompt: all topics once in an order of their own, then again in another.

    Example: 3 topics, 2 difficulties: prompts 0 to 5 have every pair once
    """
    turn, place = divmod(number, len(run.topics))
    order = list(run.topics)
    draw(run.recipe.seed, "topics", turn).shuffle(order)
    difficulties = run.settings.difficulties
    first = sorted(run.topics).index(order[place])
    return order[place], difficulties[(first + turn) % len(difficulties)]


def question_values(run: Run, number: int) -> dict[str, str]:
    """What fills the places of a question prompt."""
    settings = run.settings
    topic, difficulty = topic_cell(run, number)
    shown = draw(run.recipe.seed, "shown", number).sample(run.seeds, settings.shown_questions)
    lines = "\n".join(f"{place}. {text}" for place, text in enumerate(shown, start=1))
    count, following = str(settings.questions_per_prompt), str(len(shown) + 1)
    return {"topic": topic, "difficulty": difficulty, "count": count, "shown": lines, "next": following}


def parse_questions(open_text: str, answer: str, *, stopped: bool) -> list[str | Refused]:
    """The items of a numbered list of which `open_text` holds the first ones; an unfinished last one is refused.

    Example: "1. A" with a "2." below it, answer "B" with "3. C" below it -> B and C; C is refused if the answer was cut off
    """
    text = open_text + answer
    starts = [*ITEM.finditer(text)]
    found: list[str | Refused] = []
    for place, match in enumerate(starts):
        end = starts[place + 1].start() if place + 1 < len(starts) else len(text)
        if end <= len(open_text):
            continue  # one of the examples
        item = " ".join(text[match.end() : end].split("\n\n")[0].replace("**", "").split())
        last = place + 1 == len(starts)
        found.append(Refused("cut-off", item) if last and not stopped else checked_question(item))
    return found


def checked_question(item: str) -> str | Refused:
    """A question that can be asked, or why not."""
    if not SHORTEST <= len(item) <= LONGEST:
        return Refused("too-short" if len(item) < SHORTEST else "too-long", item[:100])
    if TAGS.search(item) or not item.isprintable():
        return Refused("control-text", item[:100])
    if len(set(words_of(item))) < 4:
        return Refused("no-words", item[:100])
    return item


def keep_unique_questions(run: Run) -> None:
    """Every question once, no benchmark's, in the order of their prompts; dealt to lanes."""
    path = run.work / "unique.json"
    if path.is_file():
        return
    settings = run.settings
    contamination = open_contamination(settings)
    answers: dict[str, list[Completion]] = {}
    for lane in range(settings.lanes):
        answers |= run.answers("questions", lane)
    drops: Counter[str] = Counter()
    asked = clean = 0
    seen, near = {normal(seed) for seed in run.seeds}, NearDuplicates(settings.near_duplicates)
    kept: list[dict[str, Any]] = []
    hits: list[dict[str, str]] = []
    for number in range(settings.question_prompts):
        topic, difficulty = topic_cell(run, number)
        open_text = filled(run.prompts["questions"].open_text, question_values(run, number))
        for completion in answers.get(f"questions/{number:06d}", ()):
            items = parse_questions(open_text, completion.text, stopped=completion.stopped)
            if not items:
                drops["no-list"] += 1
            for place, item in enumerate(items):
                asked += 1
                if isinstance(item, Refused):
                    drops[item.reason] += 1
                    continue
                key = normal(item)
                if key in seen:
                    drops["duplicate"] += 1
                    continue
                seen.add(key)
                if near.is_near(item):
                    drops["near-duplicate"] += 1
                    continue
                hit = contamination.find(item)
                if hit is not None:
                    drops["contaminated"] += 1
                    hits.append({"question": item, "benchmark": hit.benchmark, "problem": hit.problem, "words": hit.words})
                    continue
                clean += 1
                if settings.max_questions is not None and len(kept) >= settings.max_questions:
                    drops["beyond max_questions"] += 1
                    continue
                asked_as = {"prompt": completion.prompt_id, "sample": completion.sample, "item": place}
                question = {
                    "id": question_id(item),
                    "text": item,
                    "topic": topic,
                    "difficulty": difficulty,
                    "asked": asked_as,
                }
                kept.append(question | {"lane": len(kept) % settings.lanes})
    facts = {"asked": asked, "unique": asked - _not_unique(drops), "clean": len(kept), "drops": dict(drops), "hits": hits}
    benchmarks = {"read": contamination.read, "missing": contamination.missing}
    write_json(path, facts | {"questions": kept, "benchmarks": benchmarks})


def _not_unique(drops: Counter[str]) -> int:
    return sum(count for reason, count in drops.items() if reason not in ("contaminated", "beyond max_questions", "no-list"))


def normal(text: str) -> str:
    """What makes two questions the same: their text, whatever the space, the case and the last mark."""
    return " ".join(text.lower().split()).rstrip(".!?")


def question_id(text: str) -> str:
    """A name that depends on the text alone, so that nothing before it can change what is drawn for it."""
    return "q" + hashlib.sha256(normal(text).encode("utf-8", "surrogatepass")).hexdigest()[:12]


class NearDuplicates:
    """Questions that share most of their word triples with an earlier one (Jaccard); off without a threshold."""

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self._having: dict[tuple[str, ...], list[int]] = {}  # triple -> questions
        self._sizes: list[int] = []

    def is_near(self, text: str) -> bool:
        """Whether an earlier question is near; otherwise this one is remembered."""
        if self.threshold is None:
            return False
        words = words_of(text)
        triples = {tuple(words[start : start + SHINGLE_WORDS]) for start in range(max(1, len(words) - SHINGLE_WORDS + 1))}
        shared: Counter[int] = Counter(number for triple in triples for number in self._having.get(triple, ()))
        for number, common in shared.items():
            if common / (len(triples) + self._sizes[number] - common) >= self.threshold:
                return True
        for triple in triples:
            self._having.setdefault(triple, []).append(len(self._sizes))
        self._sizes.append(len(triples))
        return False


def open_contamination(settings: SelfInstructSettings) -> Contamination:
    """The benchmarks' n-grams.

    Raises:
        ValueError: a damaged file; a benchmark that cannot be read, where the recipe requires it.
    """
    texts = benchmark_texts(settings.benchmark_data, names=settings.benchmarks, hub=settings.benchmark_hub)
    if settings.require_benchmarks and texts.missing:
        name, why = next(iter(texts.missing.items()))
        raise ValueError(f"self_instruct.benchmarks: {name} cannot be read, and `require_benchmarks` is on: {why}")
    return Contamination(texts, settings.ngram_words)


def read_questions(run: Run, lane: int | None = None) -> list[Question]:
    """The unique questions, of one lane or of all."""
    path = run.target / QUESTIONS if run.is_concluded() else run.work / "unique.json"
    if not path.is_file():
        raise ValueError(f"{path}: the pass `unique` has not been done yet; it needs every lane of `questions`")
    found = [Question(**facts) for facts in read_json(path)["questions"]]
    return [question for question in found if lane is None or question.lane == lane]
