"""Charts of the report as Vega-Lite specifications: plain data, drawn in the reader's browser.

What comes in: facts of runs. What goes out: dictionaries with their data in them. Words from recipes (names of sources and
runs) are only ever values of the data, never names of fields or parts of an expression, so that no name can become anything
else. Colours of lines are left to the page, which has one set for light and one for dark.

The trade: every chart carries its own copy of its points (at most 800 a curve), which costs some kilobytes and spares the
page any fetching.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.runs import Curve, RunFacts

Spec = dict[str, Any]
HEIGHT = 200
DIGITS = 5


@dataclass(frozen=True)
class Chart:
    """One picture: what it shows in words, and its specification."""

    title: str
    note: str
    spec: Spec


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def base(values: list[Mapping[str, Any]], **parts: Any) -> Spec:
    return {"width": "container", "height": HEIGHT, "data": {"values": values}, **parts}


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": title, **more}


def tokens_axis() -> dict[str, Any]:
    return {
        "field": "t",
        "type": "quantitative",
        "axis": axis("tokens", format="~s", tickCount=6),
        "scale": {"nice": False},
    }


def series_color(title: str | None = None) -> dict[str, Any]:
    return {"field": "s", "type": "nominal", "sort": None, "legend": {"title": title, "orient": "top", "columns": 4}}


def lines(
    curves: Mapping[str, Curve], y_title: str, *, zero: bool = False, log: bool = False, share: bool = False
) -> Spec | None:
    """Curves over tokens, one colour each; None where there is no point."""
    values: list[Mapping[str, Any]] = [
        {"t": tokens, "v": rounded(value), "s": name}
        for name, curve in curves.items()
        for tokens, value in curve.points(800 if len(curves) < 6 else 300)
        if not log or value > 0
    ]
    if not values:
        return None
    scale = {"type": "log"} if log else {"zero": zero, "nice": True}
    y_axis = axis(y_title, format="~%" if share else ",.3~r", tickCount=3 if log else 5)
    few = max(len(curve.values) for curve in curves.values()) <= 30
    return base(
        values,
        mark={"type": "line", "point": few and {"size": 18}, "strokeWidth": 1.4, "tooltip": True},
        encoding={
            "x": tokens_axis(),
            "y": {"field": "v", "type": "quantitative", "axis": y_axis, "scale": scale},
            "color": series_color(),
            "tooltip": [
                {"field": "s", "type": "nominal", "title": "curve"},
                {"field": "t", "type": "quantitative", "title": "tokens", "format": ",.0f"},
                {"field": "v", "type": "quantitative", "title": y_title, "format": ".4~%" if share else ".5~g"},
            ],
        },
    )


def loss_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Training loss of each run, with the steps that leapt marked."""
    curves = {run.name: run.curves["loss"] for run in runs if "loss" in run.curves}
    spec = lines(curves, "nats per token")
    if spec is None:
        return None
    marks = []
    for run in runs:
        if not run.steps or "loss" not in run.curves:
            continue
        per_step = run.tokens / run.steps
        marks += [
            {"t": record["step"] * per_step, "v": record["loss"], "s": run.name, "r": record["reason"]}
            for record in run.skipped[:500]
            if record["step"] is not None and record["loss"] is not None and abs(record["loss"]) < 1e6
        ]
    if marks:
        line = {key: spec.pop(key) for key in ("mark", "encoding", "data")}
        encoding = {key: value for key, value in line["encoding"].items() if key != "tooltip"}
        tooltip = [
            {"field": "r", "type": "nominal", "title": "step"},
            {"field": "v", "type": "quantitative", "title": "loss"},
        ]
        point = {"type": "point", "shape": "cross", "size": 60, "filled": True, "angle": 45}
        spec["layer"] = [line, {"data": {"values": marks}, "mark": point, "encoding": {**encoding, "tooltip": tooltip}}]
    note = (
        "Each run counts its own tokens. Crosses: steps that leapt or were left out."
        if marks
        else "Each run counts its own tokens."
    )
    return Chart("Training loss", note, spec)


def held_out_charts(run: RunFacts) -> list[Chart]:
    """Losses on held-out documents, per source: plain, and the middles in both layouts."""
    charts = []
    for column, title, note in (
        ("plain", "Held-out loss, plain", "Documents kept out of training, read from left to right."),
        ("psm_middle", "Held-out middles, PSM", "The middle alone, after prefix and suffix."),
        ("spm_middle", "Held-out middles, SPM", "The middle alone, after suffix and prefix."),
    ):
        curves = {source: curve for (source, kind), curve in run.held_out.items() if kind == column and ":" not in source}
        spec = lines(curves, "nats per token")
        if spec is not None:
            charts.append(Chart(title, note, spec))
    return charts


def mix_chart(run: RunFacts) -> Chart | None:
    """Planned against realised shares of tokens."""
    read = {name: sum(layouts.values()) for name, layouts in (run.ledger.get("tokens") or {}).items()}
    planned = {name: facts.get("share") for name, facts in (run.rows.get("sources") or {}).items()}
    total = sum(read.values())
    if not planned or not total:
        return None
    values: list[Mapping[str, Any]] = []
    for name, share in planned.items():
        values += [
            {"n": name, "s": "planned", "v": rounded(share or 0.0)},
            {"n": name, "s": "realised", "v": rounded(read.get(name, 0) / total)},
        ]
    spec = base(
        values,
        mark={"type": "bar", "tooltip": True, "cornerRadiusEnd": 2},
        encoding={
            "y": {"field": "n", "type": "nominal", "sort": None, "axis": axis("")},
            "yOffset": {"field": "s", "sort": None},
            "x": {"field": "v", "type": "quantitative", "axis": axis("share of the tokens", format="~%", tickCount=5)},
            "color": series_color(),
            "tooltip": [
                {"field": "n", "type": "nominal", "title": "source"},
                {"field": "s", "type": "nominal", "title": "share"},
                {"field": "v", "type": "quantitative", "title": "of tokens", "format": ".2%"},
            ],
        },
    )
    return Chart("Mix: planned and realised", "Shares of tokens, control tokens included.", spec)


def layout_chart(run: RunFacts) -> Chart | None:
    spec = lines(
        {layout.upper(): curve for layout, curve in run.infilled.items()}, "share of the tokens", zero=True, share=True
    )
    note = "Share of the tokens since the last log that were in infilled documents."
    return None if spec is None else Chart("Infilling met in training", note, spec)


def small_charts(runs: Sequence[RunFacts]) -> list[Chart]:
    """Learning rate, speed and the rest, all runs together."""
    charts = []
    for name, title, unit, log in (
        ("learning_rate", "Learning rate", "learning rate", False),
        ("grad_norm", "Gradient norm", "before clipping", True),
        ("tokens_per_second", "Throughput", "tokens per second", False),
        ("mfu_percent", "Model FLOPs utilisation", "% of the peak", False),
        ("memory_gib", "Memory", "GiB, the most so far", False),
    ):
        curves = {run.name: run.curves[name] for run in runs if name in run.curves}
        spec = lines(curves, unit, zero=name not in ("grad_norm",), log=log)
        if spec is not None:
            charts.append(Chart(title, "", spec))
    return charts


# ---------------------------------------------------------------------------------------------------------------------
# The paper's pictures, with our numbers


def context_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Loss of the same tokens against the length of the context; the length of the rows is marked (paper, Fig. 4a)."""
    values = [
        {"t": length, "v": rounded(loss), "s": run.name} for run in runs for length, loss in sorted(run.context.items())
    ]
    if not values:
        return None
    trained = [
        {"t": run.rows["sequence_tokens"], "s": run.name} for run in runs if run.context and "sequence_tokens" in run.rows
    ]
    x = {
        "field": "t",
        "type": "quantitative",
        "scale": {"type": "log", "base": 2, "nice": False},
        "axis": axis("tokens of context", format="~s"),
    }
    y = {"field": "v", "type": "quantitative", "scale": {"zero": False}, "axis": axis("nats per token", tickCount=5)}
    tooltip = [
        {"field": "s", "type": "nominal", "title": "run"},
        {"field": "t", "type": "quantitative", "title": "context", "format": ",.0f"},
        {"field": "v", "type": "quantitative", "title": "nats", "format": ".5~g"},
    ]
    spec: Spec = {
        "width": "container",
        "height": HEIGHT,
        "layer": [
            {
                "data": {"values": trained},
                "mark": {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 1.4},
                "encoding": {"x": x, "color": series_color()},
            },
            {
                "data": {"values": values},
                "mark": {"type": "line", "point": {"size": 28}, "strokeWidth": 1.6},
                "encoding": {"x": x, "y": y, "color": series_color(), "tooltip": tooltip},
            },
        ],
    }
    note = "The same held-out tokens under more and more context. Dashed: the length of a run's rows (paper, Fig. 4a)."
    return Chart("Loss against context length", note, spec)


def key_chart(run: RunFacts) -> Chart | None:
    """Keys found by length and position (paper, Fig. 4b)."""
    values: list[Mapping[str, Any]] = [
        {"t": f"{length:,}", "d": f"{depth:g}", "v": rounded(found)} for (length, depth), found in sorted(run.keys.items())
    ]
    if not values:
        return None
    x = {"field": "t", "type": "ordinal", "sort": None, "axis": axis("tokens of the prompt", labelAngle=0)}
    y = {"field": "d", "type": "ordinal", "axis": axis("position of the key (0: start)")}
    label = {"condition": {"test": "datum.v > 0.5", "value": "white"}, "value": "black"}
    spec: Spec = {
        "width": "container",
        "height": max(90, 34 * len({value["d"] for value in values})),
        "data": {"values": values},
        "encoding": {"x": x, "y": y},
        "layer": [
            {
                "mark": {"type": "rect", "tooltip": True},
                "encoding": {
                    "color": {
                        "field": "v",
                        "type": "quantitative",
                        "scale": {"domain": [0, 1], "range": ["#dbe7f5", "#1c4f8f"]},
                        "legend": None,
                    }
                },
            },
            {
                "mark": {"type": "text", "fontSize": 12},
                "encoding": {"text": {"field": "v", "type": "quantitative", "format": ".0%"}, "color": label},
            },
        ],
    }
    return Chart(
        f"Key retrieval: {run.name}", "Share of prompts in which a key in code was found again (paper, Fig. 4b).", spec
    )


def temperature_chart(points: Iterable[tuple[str, str, float, float]]) -> Chart | None:
    """pass@k against temperature (paper, Fig. 6); points are (benchmark, metric, temperature, score)."""
    values: list[Mapping[str, Any]] = [
        {"t": temperature, "v": rounded(score), "s": f"{benchmark}, {metric}"}
        for benchmark, metric, temperature, score in points
    ]
    if len({value["t"] for value in values}) < 2:
        return None
    spec = base(
        sorted(values, key=lambda value: value["t"]),
        mark={"type": "line", "point": {"size": 28}},
        encoding={
            "x": {"field": "t", "type": "quantitative", "axis": axis("temperature", tickCount=6)},
            "y": {"field": "v", "type": "quantitative", "axis": axis("score", format="~%", tickCount=5)},
            "color": series_color(),
            "tooltip": [
                {"field": "s", "type": "nominal", "title": "score"},
                {"field": "t", "type": "quantitative", "title": "temperature"},
                {"field": "v", "type": "quantitative", "title": "value", "format": ".1%"},
            ],
        },
    )
    return Chart(
        "pass@k against temperature", "Sampled suites of one checkpoint at several temperatures (paper, Fig. 6).", spec
    )


def correlation_chart(cells: Sequence[tuple[str, str, float]]) -> Chart | None:
    """Correlation of languages over checkpoints (paper, Fig. 3); cells are (language, language, Pearson's r)."""
    if not cells:
        return None
    values: list[Mapping[str, Any]] = [{"a": a, "b": b, "v": round(r, 2)} for a, b, r in cells]
    label = {"condition": {"test": "abs(datum.v) > 0.5", "value": "white"}, "value": "black"}
    scale = {"domain": [-1, 0, 1], "range": ["#b2452b", "#f1f1ee", "#1c4f8f"]}
    spec: Spec = {
        "width": "container",
        "height": max(120, 34 * len({a for a, _, _ in cells})),
        "data": {"values": values},
        "encoding": {
            "x": {"field": "a", "type": "nominal", "sort": None, "axis": axis("", labelAngle=0)},
            "y": {"field": "b", "type": "nominal", "sort": None, "axis": axis("")},
        },
        "layer": [
            {
                "mark": {"type": "rect", "tooltip": True},
                "encoding": {"color": {"field": "v", "type": "quantitative", "scale": scale, "legend": None}},
            },
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {"text": {"field": "v", "type": "quantitative", "format": ".2f"}, "color": label},
            },
        ],
    }
    return Chart(
        "Languages that rise and fall together", "Pearson's correlation of scores over checkpoints (paper, Fig. 3).", spec
    )
