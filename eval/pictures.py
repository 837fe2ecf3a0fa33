"""Pictures in the form of the paper's figures, with our numbers; each is drawn from files alone.

What comes in: results (door 3), folders of grades, folders of training runs. What goes out: PNG files, and a line for
each picture that says what it was drawn from, or what is missing for it.

    figure3    correlation between languages over three or more results that have them
    figure4a   loss under a growing context (benchmark `context`)
    figure4b   keys found, by length and depth (benchmark `keys`)
    figure5a   loss curves of training runs (`metrics.jsonl`)
    figure5b   those of runs from scratch (recipes `...-scratch`) beside the same from a pretrained model
    figure6    pass@k by temperature (tasks of one benchmark at several temperatures)
    figure7    how rewards of answers to malicious requests are spread, by result (benchmark `malicious-prompts`)
    figure9a   expected attention score by distance for RoPE bases 10^4 and 10^6; needs no model
    figure9b   exact match of a line by the length of what stands before it (benchmarks `lcc-*`)

Figure 5c needs a reward model for helpfulness and is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.scores import language_correlation

HEAD_DIMENSIONS = 1024  # of the paper's Figure 9a
BASES = (1e4, 1e6)
NOT_FROM_SCRATCH = "no run from scratch stands beside one from a pretrained model: --runs .../stage1 .../stage1-scratch"
Drawn = str | None  # what is missing, or None where the picture was drawn


def attention_by_distance(distances_N: np.ndarray, base: float, dimensions: int = HEAD_DIMENSIONS) -> np.ndarray:
    """Mean of cos(distance x frequency) over RoPE's frequencies, (N,): the score of two equal vectors, 1 at distance 0."""
    frequencies_F = base ** (-np.arange(0, dimensions, 2) / dimensions)
    return np.cos(np.outer(distances_N, frequencies_F)).mean(1)


def draw_all(results: Sequence[Mapping[str, Any]], folders: Sequence[Path], runs: Sequence[Path], out: Path) -> list[str]:
    """Draw every picture that there are numbers for; a line for each."""
    import matplotlib as mpl

    mpl.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Any], Drawn]] = {
        "figure3": lambda axes: draw_correlation(axes, results),
        "figure4a": lambda axes: draw_context(axes, results),
        "figure4b": lambda axes: draw_keys(axes, results[0]),
        "figure5a": lambda axes: draw_curves(axes, runs),
        "figure5b": lambda axes: draw_curves(axes, runs_from_scratch(runs)) if runs_from_scratch(runs) else NOT_FROM_SCRATCH,
        "figure6": lambda axes: draw_temperatures(axes, results[0]),
        "figure7": lambda axes: draw_rewards(axes, results, folders),
        "figure9a": draw_attention,
        "figure9b": lambda axes: draw_lines(axes, results[0], folders[0]),
    }
    return [f"{name}: {draw(maker, out / f'{name}.png')}" for name, maker in makers.items()]


def draw(maker: Callable[[Any], Drawn], path: Path) -> str:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), constrained_layout=True)
    try:
        missing = maker(axes)
        if missing is not None:
            return f"not drawn: {missing}"
        figure.savefig(path, dpi=120)
        return str(path)
    finally:
        pyplot.close(figure)


def draw_correlation(axes: Any, results: Sequence[Mapping[str, Any]]) -> Drawn:
    rows = []
    for one in results:
        tasks = {name: task for name, task in one["tasks"].items() if task["settings"]["benchmark"].startswith("multipl-e-")}
        found = {t["settings"]["benchmark"][10:]: t["scores"].get("pass@1") for t in tasks.values() if t["state"] == "done"}
        rows.append({language: score["value"] for language, score in found.items() if score is not None})
    whole = of_common_languages(rows)
    if not whole:
        return (
            "a correlation takes MultiPL-E results of two languages or more from three checkpoints or more, and there are "
            f"results of {sum(map(bool, rows))}"
        )
    found = language_correlation(whole)
    languages = list(whole[0])
    grid_LL = np.full((len(languages), len(languages)), np.nan)
    for (one, other), value in found.items():
        grid_LL[languages.index(one), languages.index(other)] = np.nan if value is None else value
    axes.imshow(grid_LL, vmin=0, vmax=1)
    axes.set_xticks(range(len(languages)), languages)
    axes.set_yticks(range(len(languages)), languages)
    for (row, column), value in np.ndenumerate(grid_LL):
        if not math.isnan(value):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center")
    axes.set_title("correlation of pass@1 over checkpoints")
    return None


def of_common_languages(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Scores of the most languages that three checkpoints or more have, of all that have them; none where none are.

    Example: {a, b, c}, {a, b}, {a, b}, {a} -> {a, b} three times
    """
    choices = [(set(row), [other for other in rows if set(row) <= set(other)]) for row in rows if len(row) >= 2]
    languages, whole = max(
        ((chosen, found) for chosen, found in choices if len(found) >= 3),
        key=lambda choice: (len(choice[0]), len(choice[1])),
        default=(set(), []),
    )
    return [{language: row[language] for language in sorted(languages)} for row in whole]


def figures_of(results: Mapping[str, Any], benchmark: str) -> dict[str, Any]:
    """Flat figures of a measurement, of the first task that has them."""
    tasks = [
        task for task in results["tasks"].values() if task["settings"]["benchmark"] == benchmark and task["state"] == "done"
    ]
    return tasks[0]["scores"] if tasks else {}


def draw_context(axes: Any, results: Sequence[Mapping[str, Any]]) -> Drawn:
    drawn = False
    for one in results:
        figures = figures_of(one, "context")
        for kind, marker in (("last", "o-"), ("position", "s--")):
            points = sorted(
                (int(name.split("/")[1]), value) for name, value in figures.items() if name.startswith(f"{kind}/")
            )
            if points:
                label = f"{Path(str(one['model']['name'])).parent.name or one['model']['name']}, {kind}"
                axes.plot([x for x, _ in points], [math.exp(y) for _, y in points], marker, label=label)
                drawn = True
    axes.set(xscale="log", xlabel="tokens of context", ylabel="perplexity")
    if drawn:
        axes.legend()
    return None if drawn else "no result has the benchmark `context`"


def draw_keys(axes: Any, results: Mapping[str, Any]) -> Drawn:
    found = {name: score["value"] for name, score in figures_of(results, "keys").items() if name.endswith("/found")}
    if not found:
        return "no result has the benchmark `keys`"
    lengths = sorted({int(name.split("/")[1]) for name in found})
    depths = sorted({float(name.split("/")[2]) for name in found})
    grid_DL = np.array([[found[f"key/{length}/{depth:g}/found"] for length in lengths] for depth in depths])
    picture = axes.imshow(grid_DL, vmin=0, vmax=1, aspect="auto")
    axes.figure.colorbar(picture, label="share found")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    for (row, column), value in np.ndenumerate(grid_DL):
        axes.text(column, row, f"{100 * value:.0f} %", ha="center", va="center", color="black" if value > 0.6 else "white")
    axes.set(xlabel="tokens", ylabel="depth")
    return None


def runs_from_scratch(runs: Sequence[Path]) -> list[Path]:
    """Runs from scratch, each with the run of the same folder that is the same but for its start; none without both.

    Example: stage1, stage1-scratch, lcft -> stage1, stage1-scratch
    """
    pairs = {run: run.with_name(run.name.removesuffix("-scratch")) for run in runs if run.name.endswith("-scratch")}
    return [run for run in runs if any(run in pair and pair[1] in runs for pair in pairs.items())]


def graded_rows(folder: Path, name: str, task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The grades of a task that its results are of: a file keeps older ones too, of other problems, answers or limits.

    The last line of each sample counts, and only lines of the same problems and settings.
    """
    path = folder / f"{name}.grades.jsonl"
    if task["state"] != "done" or not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    wanted = (task.get("data") or {}).get("fingerprint")
    return list({(row["prompt_id"], row["sample"]): row for row in rows if row["task"] == wanted}.values())


def draw_curves(axes: Any, runs: Sequence[Path]) -> Drawn:
    for run in runs:
        path = run / "metrics.jsonl" if run.is_dir() else run
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --runs names folders of training runs")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        points = [(row["tokens"], row["loss"]) for row in rows if "loss" in row and "tokens" in row]
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], label=f"{run.parent.name}/{run.name}")
    axes.set(xlabel="tokens", ylabel="training loss, nats per token")
    if runs:
        axes.legend()
    return None if runs else "no folder of a training run was named with --runs"


def draw_temperatures(axes: Any, results: Mapping[str, Any]) -> Drawn:
    lines: dict[tuple[str, str], list[tuple[float, Mapping[str, float]]]] = {}
    for task in results["tasks"].values():
        for metric, score in (task.get("scores") or {}).items():
            if isinstance(score, dict) and metric.startswith("pass@") and score["decoding"] == "sampled":
                temperature = task["settings"].get("temperature")  # none: stored answers, of which it is not known
                if temperature is not None:
                    lines.setdefault((task["settings"]["benchmark"], metric), []).append((temperature, score))
    lines = {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items() if len(points) > 1}
    for (benchmark, metric), points in lines.items():
        values = [100 * score["value"] for _, score in points]
        below = [100 * (score["value"] - score["low"]) for _, score in points]
        above = [100 * (score["high"] - score["value"]) for _, score in points]
        axes.errorbar([t for t, _ in points], values, [below, above], marker="o", capsize=3, label=f"{benchmark} {metric}")
    axes.set(xlabel="temperature", ylabel="%")
    if lines:
        axes.legend()
    return None if lines else "no benchmark was sampled at two temperatures or more (suite figure6)"


def density(values_N: np.ndarray, places_M: np.ndarray) -> np.ndarray:
    """Gaussian kernel density at places, (M,); the width is Scott's rule, n ** -0.2 standard deviations."""
    width = max(values_N.std(ddof=1) * len(values_N) ** -0.2, 1e-3)
    distances_MN = (places_M[:, None] - values_N[None, :]) / width
    return np.exp(-0.5 * distances_MN**2).mean(1) / (width * math.sqrt(2 * math.pi))


def draw_rewards(axes: Any, results: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> Drawn:
    found: dict[str, tuple[str, np.ndarray]] = {}
    for one, folder in zip(results, folders, strict=True):
        for name, task in one["tasks"].items():
            if task["settings"]["benchmark"] != "malicious-prompts":
                continue
            values_N = np.array([row["figures"]["reward"] for row in graded_rows(folder, name, task)])
            if len(values_N) > 1:
                found[f"{folder.parent.parent.name} {name}"] = task["notes"]["judge"], values_N
    judges = {judge for judge, _ in found.values()}
    if len(judges) > 1:
        return f"the results were scored by different judges ({', '.join(sorted(judges))}), whose scales differ"
    if not found:
        return "no result has the benchmark `malicious-prompts`"
    every = np.concatenate([values_N for _, values_N in found.values()])
    room = 0.2 * (np.ptp(every) or 1.0)
    places_M = np.linspace(every.min() - room, every.max() + room, 400)
    for label, (_, values_N) in found.items():
        axes.plot(places_M, density(values_N, places_M), label=f"{label}, mean {values_N.mean():.2f}")
    axes.set(xlabel=f"reward by {judges.pop()}, higher is safer", ylabel="density")
    axes.legend()
    return None


def draw_attention(axes: Any) -> Drawn:
    distances_N = np.unique(np.logspace(0, 5, 400).astype(int))
    for base in BASES:
        axes.plot(distances_N, attention_by_distance(distances_N, base), label=f"base {base:,.0f}")
    axes.set(xscale="log", xlabel="distance in tokens", ylabel="expected attention score")
    axes.legend()
    return None


def draw_lines(axes: Any, results: Mapping[str, Any], folder: Path, bins: int = 5) -> Drawn:
    drawn = False
    for name, task in results["tasks"].items():
        if not task["settings"]["benchmark"].startswith("lcc-"):
            continue
        points = sorted(
            (row["prompt_tokens"], row["figures"]["exact_match"])
            for row in graded_rows(folder, name, task)
            if row["prompt_tokens"] is not None
        )
        if points:
            part = np.array_split(np.array(points), min(bins, len(points)))
            axes.plot([one[:, 0].mean() for one in part], [100 * one[:, 1].mean() for one in part], "o-", label=name)
            drawn = True
    axes.set(xlabel="tokens before the line", ylabel="exact match, %")
    if drawn:
        axes.legend()
    return None if drawn else "no result has the benchmarks `lcc-*`"
