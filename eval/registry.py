"""Which benchmark is done by which module: the names that a suite may use."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from codetune.problems import BENCHMARKS, MULTIPL_E_LANGUAGES, Loaded
from codetune.sandbox import Sandbox
from codetune.sandbox_languages import LANGUAGES
from eval.contests import Apps
from eval.functions import HumanEval, Mbpp
from eval.infilling import Docstring, HumanEvalInfilling, LineInfilling, Lines
from eval.languages import MultiplE
from eval.repair import Repair, repair_problems
from eval.tasks import Task, TaskSettings
from eval.words import Bold, FalseRefusals, Gsm8k, MaliciousPrompts, Toxigen, TruthfulQa

Load = Callable[[str], Loaded]
Measure = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A task class, or a function that measures without generating."""

    task: Callable[[str, TaskSettings, Loaded], Task] | None = None
    measure: Measure | None = None
    # How problems are made that must be run first; none: those of the benchmark of the same name are read.
    problems: Callable[[TaskSettings, Load, Callable[[], Sandbox]], Loaded] | None = None

    def load(self, settings: TaskSettings, load: Load, sandbox: Callable[[], Sandbox]) -> Loaded:
        return load(settings.benchmark) if self.problems is None else self.problems(settings, load, sandbox)


def _measure(name: str) -> Measure:
    """A measurement by name; its module, and torch with it, is imported when it is made."""

    def measure(*given: Any) -> dict[str, Any]:
        from eval.losses import MEASURES

        return MEASURES[name](*given)

    return measure


RUNNERS = {"python", *LANGUAGES}  # languages that the sandbox can run

KINDS: dict[str, Kind] = {
    "humaneval": Kind(HumanEval),
    "humaneval-plus": Kind(HumanEval),
    "mbpp": Kind(Mbpp),
    "mbpp-sanitized": Kind(Mbpp),
    "mbpp-plus": Kind(Mbpp),
    "humaneval-infilling-single-line": Kind(HumanEvalInfilling),
    "humaneval-infilling-multi-line": Kind(HumanEvalInfilling),
    "humaneval-infilling-random-span": Kind(HumanEvalInfilling),
    "humaneval-infilling-random-span-light": Kind(HumanEvalInfilling),
    "line-infilling": Kind(LineInfilling),
    "docstring": Kind(Docstring),
    "repair": Kind(Repair, problems=repair_problems),
    "apps": Kind(Apps),
    "gsm8k": Kind(Gsm8k),
    "bold": Kind(Bold),
    "truthfulqa": Kind(TruthfulQa),
    "toxigen": Kind(Toxigen),
    "malicious-prompts": Kind(MaliciousPrompts),
    "false-refusals": Kind(FalseRefusals),
    **{f"multipl-e-{short}": Kind(MultiplE) for short, name in MULTIPL_E_LANGUAGES.items() if name in RUNNERS},
    "lcc-python": Kind(Lines),
    "lcc-java": Kind(Lines),
    "lcc-csharp": Kind(Lines),
    **{name: Kind(measure=_measure(name)) for name in ("held-out", "context", "keys")},
}


def find(benchmark: str) -> Kind:
    """How a benchmark is done.

    Raises:
        ValueError: nobody here does it.
    """
    if benchmark in KINDS:
        return KINDS[benchmark]
    near = difflib.get_close_matches(benchmark, KINDS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = "it can be read, but no task is made of it" if benchmark in BENCHMARKS else f"there are {', '.join(KINDS)}"
    raise ValueError(f"no benchmark `{benchmark}` for a suite: {known}{hint}")
