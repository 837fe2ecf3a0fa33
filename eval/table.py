"""Results beside each other and beside the paper's: `make eval-table`, and pictures.

What comes in: results files (door 3) and `paper.csv`, typed from the paper's tables. What goes out: a table with
intervals that says of each difference whether it can mean anything, and pictures in the form of the paper's figures with
our numbers.

    python -m eval.table runs/tiny/stage1/eval/tiny
    python -m eval.table OURS OTHER --paper-model "Code Llama" --paper-size 7B --pictures pictures

Two results of the same problems are compared problem by problem; the paper's numbers have no problems to pair, so a
difference from them says nothing while theirs lies in our interval. Another size than the paper's is marked: it is there
for scale.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codetune.artifacts import fail, read_results
from codetune.paper import ROPE_PUT_IN, VARIANTS, Figure, cut_suite, form_in_paper, read_paper, stage_of
from eval.scores import paired_difference, pass_at_k

PAPER = Path(__file__).with_name("paper.csv")


def find_figure(
    figures: Sequence[Figure], task: Mapping[str, Any], metric: str, models: Sequence[str], size: str
) -> Figure | None:
    """The paper's number for a score: same benchmark, form and metric; the first of the models that has one."""
    benchmark, wanted = task["settings"]["benchmark"], form_in_paper(task)
    for model in models:
        for one in figures:
            same = (one.benchmark, one.form, one.metric) == (benchmark, wanted, metric)
            if same and (one.model, one.size) == (model, size):
                return one
    return None


def compare(results: Sequence[Mapping[str, Any]], models: Sequence[str], size: str, own_size: bool) -> list[str]:
    """The table's lines."""
    first, figures = results[0], read_paper(PAPER)
    names = [str(one["model"]["name"]) for one in results]
    lines = [f"ours: {names[0]}, suite {first['suite']['name']}"]
    for number, one in enumerate(results[1:], 1):
        lines.append(f"beside it ({number}): {names[number]}, suite {one['suite']['name']}")
    row = f"{models[0]} {size}" if models else "no row of its tables is like this model"
    lines.append(f"paper: {row}{'' if own_size or not models else ', another size: for scale only'}")
    heads = "".join(f"{f'({number})':>24}" for number in range(1, len(results)))
    lines.append(f"{'task':<24}{'score':<26}{'ours':>22}{heads}{'paper':>8}  remark")
    for name, task in first["tasks"].items():
        if task["state"] != "done":
            lines.append(f"{name:<24}{task['state']}: {task.get('why', '')[:90]}")
            continue
        for metric, score in task["scores"].items():
            if score is None:
                lines.append(f"{name:<24}{metric:<26}{'undefined':>22}")
                continue
            others, remarks = [], []
            for number, other in enumerate(results[1:], 1):
                found = other["tasks"].get(name, {})
                theirs = (found.get("scores") or {}).get(metric)
                others.append(f"{shown(theirs):>24}")
                if isinstance(score, dict) and isinstance(theirs, dict):
                    remarks.append(f"({number}) {difference(task, found, metric)}")
            paper = find_figure(figures, task, metric, models, size)
            if paper is not None:
                remarks.append(against_paper(score, paper, own_size, task))
            value = "" if paper is None else f"{paper.in_hundredths:g}"
            cells = f"{name:<24}{metric:<26}{shown(score):>22}{''.join(others)}{value:>8}"
            lines.append(f"{cells}  {'; '.join(remarks)}".rstrip())
    return lines


def shown(score: Any) -> str:
    """A score as text: per cent with its interval, or a figure as it is."""
    if isinstance(score, dict):
        return f"{100 * score['value']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
    return "-" if score is None else f"{score:.4f}"


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], metric: str) -> str:
    """What the difference of two results of one task means, by problems that both have."""
    values, others = each_problem(ours, metric), each_problem(theirs, metric)
    if not values or not others:
        return "not paired"
    if ours["data"]["fingerprint"] != theirs["data"]["fingerprint"]:
        return "other problems or limits: not comparable"
    if (ours.get("form"), decoding(ours)) != (theirs.get("form"), decoding(theirs)):
        return "other form or decoding: not comparable"
    mean, low, high = paired_difference(values, others)
    meaning = "means nothing" if low <= 0 <= high else "differs"
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] {meaning}"


def each_problem(task: Mapping[str, Any], metric: str) -> Mapping[str, float] | None:
    """A score's figure for each problem; pass@k of what passed of its samples; None where results do not keep it.

    Example: half of 4 samples passed, pass@2 -> 5/6
    """
    values, score = task.get("per_problem"), task["scores"].get(metric)
    if not values or not isinstance(score, dict) or metric == task.get("per_problem_of", "pass@1"):
        return values if isinstance(score, dict) else None
    k = re.fullmatch(r"pass@(\d+)", metric)
    if k is None or task.get("per_problem_of", "pass@1") != "pass@1" or "samples_of_a_problem" in task:
        return None
    samples = score["samples"]
    return {name: pass_at_k(samples, round(samples * value), int(k[1])) or 0.0 for name, value in values.items()}


def decoding(task: Mapping[str, Any]) -> Any:
    return next((score["decoding"] for score in task["scores"].values() if isinstance(score, dict)), None)


def against_paper(score: Any, paper: Figure, own_size: bool, task: Mapping[str, Any]) -> str:
    """What a difference from the paper's number means."""
    if not isinstance(score, dict):
        return "a loss: no interval"
    if cut := cut_suite(task):
        return f"{cut[0]} of {cut[1]} problems: not comparable"
    if not own_size:
        return "another size"
    if 100 * score["low"] <= paper.in_hundredths <= 100 * score["high"]:
        return "within our interval: means nothing"
    return f"outside our interval: {100 * score['value'] - paper.in_hundredths:+.1f}"


def paper_columns(model: Mapping[str, Any], name: str | None, size: str | None) -> tuple[tuple[str, ...], str, bool]:
    """Which rows of the paper stand beside this model, of which size, and whether that is the model's own."""
    variant = stage_of(str(model.get("stage") or ""), VARIANTS) or "lcft"  # somebody else's: the released models
    models = VARIANTS[variant] if "rope_base" not in model else ROPE_PUT_IN.get((variant, model["rope_base"]), ())
    models = (name,) if name else models
    own = str(model.get("size") or "").upper()
    known = own in ("7B", "13B", "34B", "70B")
    wanted = size or (own if known else "7B")
    return models, wanted, own == wanted


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and draw what can be drawn."""
    parser = argparse.ArgumentParser(prog="python -m eval.table", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="results.json or its folder; the first is ours")
    parser.add_argument("--paper-model", help="rows of paper.csv, such as `Code Llama - Python`; none: those of the stage")
    parser.add_argument("--paper-size", help="7B, 13B, 34B or 70B; none: the model's own, else 7B")
    parser.add_argument("--pictures", type=Path, help="folder for pictures")
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="folders of training runs, for loss curves")
    given = parser.parse_args(arguments)
    try:
        results = [read_results(path) for path in given.results]
        models, size, own_size = paper_columns(results[0]["model"], given.paper_model, given.paper_size)
        print("\n".join(compare(results, models, size, own_size)))
        if given.pictures is not None:
            from eval.pictures import draw_all

            folders = [path if path.is_dir() else path.parent for path in given.results]
            for line in draw_all(results, folders, given.runs, given.pictures):
                print(line)
    except ValueError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
