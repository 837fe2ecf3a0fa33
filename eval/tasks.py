"""What a task is: questions out of a benchmark, how an answer is cut and graded, and how grades become scores.

What comes in: a suite in YAML (`recipes/eval`), which names tasks and their settings. What goes out: `Task` objects that
`eval.run` asks for prompts, hands completions to, and takes grades from. A grade says why, in a closed set of reasons; a
fault of the harness is no grade at all. The benchmarks are in modules of their own, and `registry` names them.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from codetune.artifacts import hash_json
from codetune.completions import Prompt, Sampling
from codetune.problems import Loaded, Problem
from codetune.recipe import settings_from_file
from codetune.sandbox import ExecutionResult, Job, Limits, Verdict
from codetune.tokens import Codec
from eval import scores

Run = Callable[[Job], ExecutionResult]
MIB = 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Suites


@dataclass(frozen=True)
class TaskSettings:
    """One task of a suite. Which of these count depends on the benchmark; docs/evaluation.md lists them."""

    benchmark: str  # a name of codetune.problems, or held-out, context, keys, repair
    form: str = ""  # how the question is put: the forms of each benchmark; none: its first
    limit: int | None = None  # problems, the first of the file; none: all
    ids: tuple[str, ...] = ()  # only these; empty: all
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0
    samples: int = 1  # completions of each problem
    max_new_tokens: int = 512
    k: tuple[int, ...] = (1,)  # of pass@k
    stop_strings: tuple[str, ...] | None = None  # none: the benchmark's own
    timeout_seconds: float = 3.0  # of processor time for one program
    memory_mib: int = 512
    judge: Literal["separate", "same-process"] = "separate"
    levels: tuple[str, ...] = ()  # apps: only these; empty: all
    harness: Literal["strict", "apps"] = "strict"  # apps: how outputs are compared
    lengths: tuple[int, ...] = ()  # context, keys, lcc: tokens of the prompt
    balanced: int | None = None  # lcc: so many problems, as evenly over lengths of context as there are; none: all
    depths: tuple[float, ...] = (0.0, 0.2, 0.4)  # keys: where the function stands
    prompts: int = 64  # keys: of each length and depth
    target_tokens: int = 256  # context: tokens at the end whose loss is taken
    classifier: str = ""  # safety, replies: a judge by name; none: the benchmark's own
    beyond_context: bool = False  # ask prompts longer than the positions that the model was trained with, too
    seed: int = 0

    @property
    def decoding(self) -> scores.Decoding:
        return "sampled" if self.temperature > 0 else "greedy"


@dataclass(frozen=True)
class Suite:
    """What one file of recipes/eval holds."""

    name: str
    tasks: dict[str, TaskSettings]
    title: str = ""  # for people: which table of the paper


def load_suite(path: Path, overrides: Sequence[str] = ()) -> Suite:
    """A suite from its file; overrides are `tasks.<name>.<key>=<value>`.

    Raises:
        ValueError: an unknown key or value, a task that cannot be as it is written; with the file and the key.
    """
    suite = settings_from_file(Suite, path, overrides)
    if not suite.tasks:
        raise ValueError(f"{path}: `tasks` is empty")
    for name, settings in suite.tasks.items():
        key = f"{path}: tasks.{name}"
        if settings.temperature == 0 and settings.samples > 1:
            raise ValueError(f"{key}: {settings.samples} greedy samples are one sample; raise `temperature`, or ask for 1")
        if settings.k and max(settings.k) > settings.samples:
            raise ValueError(f"{key}: pass@{max(settings.k)} is undefined for {settings.samples} samples; ask for more")
        if not 0 < settings.top_p <= 1 or settings.temperature < 0 or settings.samples < 1 or settings.max_new_tokens < 1:
            raise ValueError(f"{key}: temperature 0 or more, top_p in (0, 1], samples and max_new_tokens 1 or more")
        for field, number in (("limit", settings.limit), ("balanced", settings.balanced)):
            if number is not None and number < 1:
                raise ValueError(f"{key}: `{field}` is {number}; at least 1, or leave it out")
    return suite


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


class Reason(enum.StrEnum):
    """Why a sample was graded as it was. The set is closed: nothing else is ever written."""

    PASSED = "passed"
    COMPARED = "compared"  # with a reference, by figures; there is no pass or fail
    WRONG = "wrong-answer"  # a check failed
    EXCEPTION = "exception"
    SYNTAX = "syntax"  # it does not parse or compile
    TIMEOUT = "timeout"
    RESOURCE = "resource"  # more memory, files or processes than allowed
    CRASHED = "crashed"  # ended by a signal, or by itself
    EARLY_EXIT = "early-exit"  # ended before its tests, exit code or not
    EXIT_CODE = "exit-code"  # other languages: a failed check or an uncaught error
    NO_FUNCTION = "no-function"  # what the tests call is not defined
    NO_CHECK = "no-check"  # the tests checked nothing
    PROTOCOL = "protocol"  # it tried to speak for the tests
    UNSUPPORTED = "unsupported"  # its tests cannot be run apart from it; counted as not passed
    FORMAT = "format"  # the answer is not in the form that was asked for
    EMPTY = "empty"  # nothing was generated
    TOO_LONG = "prompt-too-long"  # the prompt does not fit into the model's context
    OTHER = "other"


_REASONS = {
    "assertion": Reason.WRONG,
    "syntax": Reason.SYNTAX,
    "compile": Reason.SYNTAX,
    "compile-time": Reason.SYNTAX,
    "exception": Reason.EXCEPTION,
    "no-entry-point": Reason.NO_FUNCTION,
    "early-exit": Reason.EARLY_EXIT,
    "exit-code": Reason.EXIT_CODE,
    "no-check": Reason.NO_CHECK,
    "no-call": Reason.NO_CHECK,
    "memory": Reason.RESOURCE,
    "scratch": Reason.RESOURCE,
    "processes": Reason.RESOURCE,
    "output": Reason.RESOURCE,
    "died": Reason.CRASHED,
    "protocol": Reason.PROTOCOL,
}


def reason_of(result: ExecutionResult) -> Reason:
    """The closed set's word for what the sandbox found."""
    if result.verdict is Verdict.PASS:
        return Reason.PASSED
    if result.verdict is Verdict.TIMEOUT:
        return Reason.TIMEOUT
    if result.verdict is Verdict.UNSUPPORTED:
        return Reason.UNSUPPORTED
    if "signal-" in result.reason:
        return Reason.CRASHED
    return _REASONS.get(result.reason, Reason.OTHER)


@dataclass(frozen=True)
class Cut:
    """What of a completion is graded."""

    text: str
    whole_program: bool = False  # it holds the prompt already
    problem: Reason | None = None  # it cannot be graded, and counts as failed
    notes: tuple[str, ...] = ()  # what was done to it, counted in results


@dataclass(frozen=True)
class Grade:
    """The verdict on one sample."""

    passed: bool | None  # none: this benchmark has figures only
    reason: Reason
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    detail: str = ""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    judge: str = ""
    isolation: str = ""
    toolchain: str = ""
    ran_again_alone: bool = False

    @classmethod
    def of_result(cls, result: ExecutionResult, **figures: float) -> Grade:
        return cls(
            result.passed,
            reason_of(result),
            figures,
            result.detail[:500],
            result.wall_seconds,
            result.cpu_seconds,
            result.judge,
            result.isolation,
            result.toolchain,
            result.ran_again_alone,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


class TaskRefused(ValueError):
    """This task cannot be done here or with this model; the message says why. It gets no score, least of all 0."""


def nothing_is_run(job: Job) -> ExecutionResult:
    """In the sandbox's place, for comparisons."""
    raise AssertionError(f"a comparison runs no program, and this one would run {job.program[:40]!r}")


@dataclass(frozen=True)
class Question:
    """One problem as it is put to the model; `text` is for people and servers, `token_ids` where only ids will do."""

    id: str
    text: str
    problem: Problem
    token_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] | None = None  # none: the task's

    def prompt(self) -> Prompt:
        return Prompt(self.id, self.text, self.token_ids)


@dataclass(frozen=True)
class Asker:
    """What questions may depend on of the model: its tokenizer, and how it wants to be spoken to."""

    codec: Codec | None = None
    render_chat: Callable[[str], tuple[int, ...]] | None = None  # a user's message -> ids; none: no chat template
    infill_trained: bool | None = None  # none: unknown
    stored: bool = False  # answers are given: nobody is asked, and no ids are needed

    def need_codec(self) -> Codec:
        if self.codec is None:
            raise TaskRefused("its prompts are token ids, so the model's tokenizer is needed: name it with --tokenizer")
        return self.codec

    def chat(self, message: str) -> tuple[int, ...]:
        if self.render_chat is None:
            raise TaskRefused(
                "the checkpoint has no chat template, and this form asks for one; use the form for base models"
            )
        return self.render_chat(message)


class Task:
    """Base of the benchmarks that a model answers in text.

    Attributes:
        forms: how questions can be put; the first is the default.
        stops: stop strings of the benchmark.
        program: whether answers are run, so that references are run first.
        floor_name: what the answer without content is called.
        most_failing: share of the benchmark's own solutions that may fail, where some are known to be wrong.
        unasked: what becomes of a prompt that does not fit: `failed`; `nothing`, compared as an empty answer; `left-out` of
            the mean, where an empty answer would score well (not toxic, no refusal).
    """

    forms: tuple[str, ...] = ("",)
    stops: tuple[str, ...] = ()
    program = True
    floor_name = "with nothing in the hole"
    most_failing = 0.0
    unasked: Literal["failed", "nothing", "left-out"] = "failed"
    as_plain_text = False  # asked so, since the checkpoint has no chat template

    def __init__(self, name: str, settings: TaskSettings, loaded: Loaded) -> None:
        self.name, self.settings, self.loaded = name, settings, loaded
        self.decoding: scores.Decoding = settings.decoding
        self.form = settings.form or self.forms[0]
        if self.form not in self.forms:
            raise ValueError(f"tasks.{name}.form is `{settings.form}`; {settings.benchmark} has {', '.join(self.forms)}")
        self.left_out_by_design = len(loaded.problems) - len(self.asked_by_design(list(loaded.problems)))
        self.problems = self.select(list(loaded.problems))
        if not self.problems:
            raise ValueError(f"tasks.{name}: no problem is left of {len(loaded.problems)}; look at ids, levels and limit")

    def asked_by_design(self, problems: list[Any]) -> list[Any]:
        """Of a file's problems those that the benchmark consists of, such as its test split; the others are no cut."""
        return problems

    @property
    def published(self) -> int | None:
        """How many problems the whole benchmark asks; where that depends on the release, how many a limit was laid over."""
        if self.loaded.published is None:
            return None if self.settings.limit is None else self.before_limit
        return self.loaded.published - self.left_out_by_design

    def select(self, problems: list[Any]) -> list[Any]:
        """The problems that the settings ask for, in the file's order; named ones may be any of the file's."""
        if not self.settings.ids:
            problems = self.asked_by_design(problems)
        if self.settings.ids:
            by_id = {problem.id: problem for problem in problems}
            unknown = [one for one in self.settings.ids if one not in by_id]
            if unknown:
                raise ValueError(f"tasks.{self.name}.ids: {', '.join(unknown[:3])} not in {self.loaded.benchmark}")
            problems = [by_id[one] for one in self.settings.ids]
        self.before_limit = len(problems)
        return problems[: self.settings.limit]

    def prepare(self, data: Path | None, load: Callable[[str], Loaded]) -> None:
        """Look for what the task needs beside its problems: toolchains, examples, judges. `load` reads other benchmarks.

        Raises:
            TaskRefused: it is not here.
        """

    # -- asking ---------------------------------------------------------------------------------------------------------

    def questions(self, asker: Asker) -> list[Question]:
        return [self.question(problem, asker) for problem in self.problems]

    def question(self, problem: Any, asker: Asker) -> Question:
        raise NotImplementedError

    def chat_or_text(self, asker: Asker, message: str) -> tuple[int, ...] | None:
        """The ids of a message as the checkpoint's template has it; None, and said in the results, where it has none."""
        if asker.render_chat is not None:
            return asker.render_chat(message)
        self.as_plain_text = not asker.stored
        return None

    def sampling(self, stop_strings: tuple[str, ...], stop_ids: tuple[int, ...]) -> Sampling:
        settings = self.settings
        return Sampling(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p if settings.temperature > 0 else 1.0,
            samples=settings.samples,
            stop_strings=stop_strings,
            stop_ids=stop_ids,
            seed=settings.seed,
        )

    def stop_ids(self, asker: Asker) -> tuple[int, ...]:
        """Tokens that end an answer beside the model's own."""
        return ()

    def stops_of(self, question: Question) -> tuple[str, ...]:
        if self.settings.stop_strings is not None:
            return self.settings.stop_strings
        return self.stops if question.stop_strings is None else question.stop_strings

    # -- grading --------------------------------------------------------------------------------------------------------

    def cut(self, question: Question, text: str, ended: str) -> Cut:
        """What of a text is graded; `ended` is how it ended: eos, stop_id, stop_string, length, or given (not by us)."""
        return Cut(text)

    def grade(self, question: Question, cut: Cut, run: Run) -> Grade:
        """The verdict; `run` is the sandbox, whose own faults go through here as they are."""
        raise NotImplementedError

    def grade_unasked(self, question: Question) -> Grade:
        """The grade of a problem whose prompt does not fit into the model's context."""
        if self.unasked == "failed":
            return Grade(False, Reason.TOO_LONG)
        figures = self.grade(question, Cut(""), nothing_is_run).figures if self.unasked == "nothing" else {}
        return Grade(None, Reason.TOO_LONG, figures)

    def reference(self, problem: Any) -> Cut | None:
        """The answer that must pass before any other is graded; none where the benchmark has none."""
        return None

    def floor(self, problem: Any) -> Cut | None:
        """An answer without content, whose score stands beside the others'; none where there is no such thing."""
        return None

    def probes(self) -> list[tuple[Job, bool]]:
        """Programs that must pass, and must not, before any answer is graded: for toolchains."""
        return []

    def limits(self) -> Limits:
        return Limits(wall_seconds=self.settings.timeout_seconds, memory_bytes=self.settings.memory_mib * MIB)

    # -- scoring --------------------------------------------------------------------------------------------------------

    def scores(self, grades: Mapping[str, Sequence[Grade]]) -> dict[str, scores.Score | None]:
        """Scores by name from the grades of each problem."""
        settings = self.settings
        if all(grade.passed is None for found in grades.values() for grade in found):
            return self.figure_scores(grades)
        counts = [(len(found), sum(bool(grade.passed) for grade in found)) for found in grades.values()]
        made = {f"pass@{k}": scores.pass_at_k_score(counts, k, self.decoding, settings.seed) for k in settings.k}
        return made | self.more_scores(grades)

    def more_scores(self, grades: Mapping[str, Sequence[Grade]]) -> dict[str, scores.Score | None]:
        """Scores beside pass@k."""
        return {}

    def figure_scores(self, grades: Mapping[str, Sequence[Grade]]) -> dict[str, scores.Score | None]:
        """The mean of each figure over problems, where all samples have it."""
        names = list(dict.fromkeys(name for found in grades.values() for grade in found for name in grade.figures))
        made: dict[str, scores.Score | None] = {}
        for name in names:
            values = [
                sum(grade.figures[name] for grade in found) / len(found)
                for found in grades.values()
                if found and all(name in grade.figures for grade in found)
            ]
            fewest = min(len(found) for found in grades.values())
            made[name] = scores.mean_score(values, fewest, self.decoding, self.settings.seed)
        return made

    def per_problem(self, grades: Mapping[str, Sequence[Grade]]) -> dict[str, float]:
        """One figure for each problem, for comparisons in pairs: the share that passed, or the first figure's mean."""
        found = {}
        for one, given in grades.items():
            values = [
                float(grade.passed) if grade.passed is not None else next(iter(grade.figures.values()), None)
                for grade in given
            ]
            if values and all(value is not None for value in values):
                found[one] = round(sum(value for value in values if value is not None) / len(values), 6)
        return found

    def per_problem_of(self, grades: Mapping[str, Sequence[Grade]]) -> str:
        """Which score the figures of `per_problem` make up."""
        first = next((grade for given in grades.values() for grade in given if grade.figures), None)
        compared = all(grade.passed is None for given in grades.values() for grade in given)
        return next(iter(first.figures)) if compared and first is not None else "pass@1"

    def notes(self) -> dict[str, Any]:
        """What a reader of the result must know of this task."""
        return {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A name for the problems and settings that decide grades; other grades are not gone on with."""
        problems = [dataclasses.asdict(problem) for problem in self.problems]
        return hash_json(
            [
                self.settings.benchmark,
                self.form,
                dataclasses.asdict(self.limits()),
                self.settings.judge,
                self.settings.harness,
                repr(problems),
            ]
        )


def count_reasons(grades: Mapping[str, Sequence[Grade]]) -> dict[str, int]:
    counts = Counter(str(grade.reason) for found in grades.values() for grade in found)
    return dict(sorted(counts.items()))
