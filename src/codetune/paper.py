"""The paper's numbers beside ours: which of its rows is like a stage of ours.

What comes in: a data file typed from the paper's tables (table, benchmark, form, metric, model, size, value), a task of a
results file, and the stage and size of the checkpoint. What goes out: the paper's number for the same size and variant, or
None: a number of another size is not shown beside ours.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIANTS = {  # a stage here -> the paper's rows that are like it, the nearest first
    "stage1": (
        "Code Llama [LCFT=no]",
        "Code Llama [FIM=yes,LCFT=no]",
        "Code Llama [before LCFT, theta=1e4]",
        "Code Llama",
    ),
    "lcft": (
        "Code Llama",
        "Code Llama [LCFT=yes]",
        "Code Llama [FIM=yes,LCFT=yes]",
        "Code Llama [after LCFT, theta=1e6 (released 7B)]",
    ),
    "python": ("Code Llama - Python [FIM=no,LCFT=no]", "Code Llama - Python"),
    "python-lcft": ("Code Llama - Python", "Code Llama - Python [FIM=no,LCFT=yes]"),
    "instruct": ("Code Llama - Instruct", "Code Llama - Instruct [SI=yes]"),
    "unnatural": ("Unnatural Code Llama",),
    "base": ("Llama 2", "Llama 2 [FIM=no,LCFT=no]"),
    # Arms: the paper's ablations; those that are ours alone have no row there, and least of all that of their stage.
    "stage1-plain": ("Code Llama [FIM=no,LCFT=no]",),
    "stage1-scratch": (),
    "lcft-same-base": ("Code Llama [after LCFT, theta=1e4]",),
    "lcft-linear": ("Code Llama [after LCFT, frequency scaling 1/4]",),
    "lcft-no-infill": (),
    "instruct-no-self-instruct": ("Code Llama - Instruct [SI=no]",),
    "instruct-no-rehearsal": (),
}
ROPE_PUT_IN = {("stage1", 1e6): ("Code Llama [before LCFT, theta=1e6 at inference only]",)}  # Table 18's second row
USUAL_TEMPERATURES = (0, 0.6, 0.8)  # those of the tables; others are of the sweep, and say so in their form


@dataclass(frozen=True)
class Figure:
    """One number of the paper, in its own units: per cent, but sentiment between -1 and 1."""

    table: str
    benchmark: str
    form: str
    metric: str
    model: str
    size: str
    value: float

    @property
    def in_hundredths(self) -> float:
        """As our scores are shown, a hundred times the share or the mean."""
        return 100 * self.value if self._is_a_mean else self.value

    @property
    def source(self) -> str:
        """Where `in_hundredths` is from, as a model card says it: the line of the data file.

        Example: the paper's Table 2, HumanEval -> paper.csv#T2/humaneval//pass@1/Code Llama/7B, in back quotes
        """
        line = "/".join((self.table, self.benchmark, self.form, self.metric, self.model, self.size))
        return ("100 x " if self._is_a_mean else "") + f"`paper.csv#{line}`"

    @property
    def _is_a_mean(self) -> bool:
        return self.metric.startswith("sentiment")


def read_paper(path: Path | None) -> list[Figure]:
    """The paper's numbers; none where there is no file.

    Raises:
        ValueError: a line that is none.
    """
    if path is None or not path.is_file():
        return []
    figures = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                figures.append(Figure(**{**row, "value": float(row["value"])}))
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: not a figure of the paper ({error})") from error
    return figures


def stage_of(run: str, stages: Iterable[str]) -> str | None:
    """The stage that a run is of, by its name; None where it is of none of these.

    Example: python-lcft-plain, of python and python-lcft -> python-lcft
    """
    longest_first = sorted(stages, key=len, reverse=True)
    return next((stage for stage in longest_first if run == stage or run.startswith(f"{stage}-")), None)


def form_in_paper(task: Mapping[str, Any]) -> str:
    """The form of a task as `paper.csv` names it.

    Example: form "", temperature 0.4 -> " T=0.4"
    """
    settings = task.get("settings") or {}
    temperature, form = settings.get("temperature", 0), task.get("form") or settings.get("form") or ""
    return form if temperature in USUAL_TEMPERATURES else f"{form} T={temperature:g}"


def cut_suite(task: Mapping[str, Any]) -> tuple[int, int] | None:
    """Problems asked and problems published, of a task that asked fewer than its benchmark has; None for a whole one.

    Example: data {"asked": 20, "published": 164} -> (20, 164)
    """
    data = task.get("data") or {}
    asked, published = data.get("asked"), data.get("published")
    return None if asked is None or published in (None, asked) else (asked, published)


def paper_figure(figures: Iterable[Figure], task: Mapping[str, Any], metric: str, stage: str, size: str) -> Figure | None:
    """The paper's number for the same benchmark, form, metric, size and variant; None for a part of its problems.

    Example: humaneval, pass@1, lcft, 7b -> the row `Code Llama`, 7B
    """
    if cut_suite(task):
        return None
    settings = task.get("settings") or {}
    wanted = form_in_paper(task)
    variant = stage_of(stage, VARIANTS)
    found = {
        one.model: one
        for one in figures
        if (one.benchmark, one.form, one.metric) == (settings.get("benchmark"), wanted, metric)
        and one.size.lower() == size.lower()
    }
    return next((found[model] for model in VARIANTS.get(variant or "", ()) if model in found), None)


def paper_value(figures: Iterable[Figure], task: Mapping[str, Any], metric: str, stage: str, size: str) -> float | None:
    """The number of `paper_figure` alone."""
    found = paper_figure(figures, task, metric, stage, size)
    return None if found is None else found.in_hundredths
