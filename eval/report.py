"""One page about runs, from the doors only: MAIN PATH of `make report` and `make watch`.

    python -m eval.report --runs runs/tiny                                  runs/tiny/report.html, all runs side by side
    python -m eval.report --runs runs/tiny --run stage1 --run lcft --out page.html
    python -m eval.report --runs runs/tiny --watch                          the same, served on loopback, as the runs go on

What comes in: a folder of runs, finished or not. What goes out: one HTML file that holds everything it needs (styles,
charts, the charting library) and asks nothing of any network; a policy in the page forbids it to. Charts are Vega-Lite,
which the wheel `vl-convert-python` carries; pages are a Jinja template that escapes everything; what goes to scripts is JSON
in which no tag can begin.

The trade: the charting library is 0.9 MB of each page. What it does not do: train, measure, or judge.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import http.server
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codetune.artifacts import fail
from codetune.paper import paper_value, read_paper
from eval import charts
from eval.charts import Chart
from eval.pictures import of_common_languages
from eval.runs import STATES, TREE, DataFacts, RunFacts, find_data, find_runs
from eval.scores import language_correlation
from eval.shapes import number

TEMPLATES = Path(__file__).parent / "templates"
PAPER = Path(__file__).with_name("paper.csv")
REFRESH_SECONDS = 5
SKIPPED_SHOWN, NOTES_SHOWN = 200, 20  # of a run; the page says how many more there are
VEGA_LITE = "6.4"


@dataclass(frozen=True)
class Box:
    """One stage in the picture of the pipeline, in units of the picture."""

    name: str
    state: str
    words: str
    x: int
    y: int
    parent: tuple[int, int] | None
    done: float  # 0 to 1
    fed: tuple[tuple[int, int], ...] = ()  # places of the stages that read what is made here: data, not a checkpoint


def write_report(folder: Path, out: Path, names: Sequence[str] = ()) -> Path:
    """Read the runs, render the page, replace `out` whole.

    Raises:
        ValueError: no runs there, or the page cannot be written.
    """
    page = render(*find_all(folder, names), folder.name)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise ValueError(f"{out}: the page cannot be written ({error}); say another place with --out") from error
    finally:
        temporary.unlink(missing_ok=True)
    return out


def find_all(folder: Path, names: Sequence[str]) -> tuple[list[RunFacts], list[DataFacts]]:
    """The runs, and the data beside them."""
    runs = find_runs(folder, names)
    return runs, find_data(folder, runs)


def render(runs: Sequence[RunFacts], data: Sequence[DataFacts], title: str, watching: bool = False) -> str:
    """The page's text."""
    made = [run for run in runs if run.state != "missing"]
    drawn: list[Chart] = []

    def place(found: Sequence[Chart | None]) -> list[dict[str, Any]]:
        """Number the charts in the order of the page."""
        kept = [chart for chart in found if chart is not None]
        drawn.extend(kept)
        return [
            {"number": len(drawn) - len(kept) + index, "title": chart.title, "note": chart.note}
            for index, chart in enumerate(kept)
        ]

    together = place([charts.loss_chart(made), *charts.small_charts(made)])
    paper = place(
        [
            charts.context_chart(made),
            *(charts.key_chart(run) for run in made),
            charts.temperature_chart(temperatures(made)),
            charts.correlation_chart(correlations(made)),
        ]
    )
    sections = [
        {
            "run": run,
            "cards": cards(run),
            "charts": place([*charts.held_out_charts(run), charts.mix_chart(run), charts.layout_chart(run)]),
            "sources": source_table(run),
            "skipped": run.skipped[:SKIPPED_SHOWN],
            "skipped_more": max(0, len(run.skipped) - SKIPPED_SHOWN),
            "notes": run.notes[:NOTES_SHOWN],
            "notes_more": max(0, len(run.notes) - NOTES_SHOWN),
        }
        for run in made
    ]
    values = {
        "title": title,
        "made_at": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "watching": watching,
        "boxes": pipeline(runs, data),
        "data_notes": [note for made in data for note in made.notes],
        "states": STATES,
        "summary": [summary(run) for run in made],
        "together": together,
        "paper": paper,
        "scores": score_table(made),
        "refused": refused(made),
        "sections": sections,
        "specs": script_json([chart.spec for chart in drawn]),
        "styles": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "script": (TEMPLATES / "report.js").read_text(encoding="utf-8"),
        "library": library(),
        "refresh": REFRESH_SECONDS * 1000 if watching else 0,
    }
    return environment().get_template("report.html.jinja").render(values)


@functools.cache
def environment() -> Any:
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["integer"] = lambda value: f"{value:,.0f}"
    made.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    made.filters["short"] = lambda value: f"{value:.4g}"
    return made


@functools.cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, out of the wheel."""
    import vl_convert

    text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    assert "</script" not in text
    return text


def script_json(value: Any) -> str:
    """JSON in which nothing can end a script element or begin another: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def pipeline(runs: Sequence[RunFacts], data: Sequence[DataFacts] = ()) -> list[Box]:
    """Where each stage stands in the picture: a column per step from the start, a row per branch; data in rows below."""
    found = {run.name: run for run in runs}
    parents: dict[str, str | None] = {}
    for name, parent in TREE:
        parents[name] = parent
    for run in runs:
        if run.parent in {*parents, *found} - {run.name}:
            parents[run.name] = run.parent
        else:
            parents.setdefault(run.name, None)
    places: dict[str, tuple[int, int]] = {}
    next_row = 0

    def put(name: str, column: int) -> None:
        nonlocal next_row
        places[name] = (column, next_row)
        children = [child for child, parent in parents.items() if parent == name and child not in places]
        for index, child in enumerate(children):
            if index:
                next_row += 1
            put(child, column + 1)

    # where parents go round in a circle, as a damaged recipe may have it, there is no root: the first of them is put as one
    for root in [*(name for name, parent in parents.items() if parent is None), *parents]:
        if root not in places:
            if places:
                next_row += 1
            put(root, 0)
    boxes = []
    for name, (x, y) in places.items():
        run = found.get(name)
        state = run.state if run is not None else "missing"
        done = 1.0 if state == "finished" else (run.progress or 0.0) if run is not None else 0.0
        words = STATES[state] + (f", {100 * done:.0f} %" if run is not None and 0 < done < 1 else "")
        parent = places.get(parents[name] or "")
        boxes.append(Box(name, state, words, x, y, parent if parent is not None and parent[0] < x else None, done))
    for made in data:
        fed = tuple(places[name] for name in made.feeds if name in places)
        column, next_row = max(0, min((x for x, _ in fed), default=0) - 1), next_row + 1
        done = 1.0 if made.state == "finished" else 0.0
        boxes.append(Box(made.name, made.state, made.words, column, next_row, None, done, fed))
    return boxes


def summary(run: RunFacts) -> dict[str, Any]:
    """A line of the table of runs; None where there is nothing to say."""
    last = run.curves["loss"].values[-1] if run.curves.get("loss") and run.curves["loss"].values else None
    speed = run.curves.get("tokens_per_second")
    code = run.held_out.get(("group:code", "plain"))
    rope = run.manifest.get("rope") or {}
    return {
        "name": run.name,
        "state": run.state,
        "parent": run.parent,
        "tokens": run.tokens or None,
        "steps": run.steps or None,
        "hours": run.ledger.get("seconds", 0) / 3600 or None,
        "loss": last,
        "held_out": code.values[-1] if code and code.values else None,
        "speed": speed.values[-1] if speed and speed.values else None,
        "context": rope.get("context_tokens"),
        "skipped": run.ledger.get("skipped_steps"),
    }


def cards(run: RunFacts) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    shown: list[tuple[str, str]] = [("state", STATES[run.state])]
    if run.tokens:
        shown += [("tokens", f"{run.tokens:,}"), ("steps", f"{run.steps:,}")]
    rope = run.manifest.get("rope") or {}
    if rope.get("base") is not None:
        shown.append(("RoPE base", f"{rope['base']:,.0f}"))
    if rope.get("context_tokens") is not None:
        shown.append(("context", f"{rope['context_tokens']:,} tokens"))
    fim = ((run.recipe.get("data") or {}).get("fim") or {}).get("rate")
    if fim is not None:
        shown.append(("infilling asked for", f"{100 * fim:g} % of whole documents"))
    if run.rows:
        shown.append(("rows", f"{run.rows.get('rows', 0):,} of {run.rows.get('sequence_tokens', 0):,} tokens"))
    hardware = run.manifest.get("hardware") or {}
    if {"devices", "device"} <= set(hardware):
        shown.append(("hardware", f"{hardware['devices']} x {hardware['device']}"))
    return shown


def source_table(run: RunFacts) -> list[dict[str, Any]]:
    """Per source: shares, tokens, passes, documents dropped."""
    table = []
    read = {name: sum(layouts.values()) for name, layouts in (run.ledger.get("tokens") or {}).items()}
    total = sum(read.values())
    drops = run.rows.get("drops") or {}
    for name, facts in (run.rows.get("sources") or {}).items():
        epochs = facts.get("epochs") if facts.get("epochs") is not None else facts.get("epochs_estimated")
        table.append(
            {
                "name": name,
                "planned": facts.get("share"),
                "realised": read.get(name, 0) / total if total else None,
                "tokens": read.get(name) or None,
                "epochs": epochs,
                "dropped": sum((drops.get(name) or {}).values()),
                "why": ", ".join(f"{reason} {count:,}" for reason, count in sorted((drops.get(name) or {}).items())),
            }
        )
    return table


def each_score(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Every score of every suite, with what is needed to compare."""
    found, figures = [], read_paper(PAPER)
    for run in runs:
        for suite, results in run.results.items():
            put_in = (results.get("model") or {}).get(
                "rope_base"
            )  # another model than the stage's, which the paper's rows are of
            for task, facts in results["tasks"].items():
                settings = facts.get("settings") or {}
                for metric, score in (facts.get("scores") or {}).items():
                    interval = isinstance(score, Mapping)
                    value = score.get("value") if interval else score
                    if number(value) is None:
                        continue
                    found.append(
                        {
                            "run": run.name,
                            "size": run.size,
                            "suite": suite,
                            "task": task,
                            "benchmark": settings.get("benchmark", task),
                            "paper": None if put_in else paper_value(figures, facts, metric, run.name, run.size),
                            "metric": metric,
                            "value": value,
                            "share": interval,
                            "low": score.get("low") if interval else None,
                            "high": score.get("high") if interval else None,
                            "problems": score.get("problems") if interval else None,
                            "temperature": settings.get("temperature"),
                            "form": settings.get("form") or "",
                        }
                    )
    return found


def score_table(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """A line per task and metric, a column per run, and the paper's where it has one for this size."""
    scores = [score for score in each_score(runs) if score["share"]]
    names = list(dict.fromkeys(score["run"] for score in scores))
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for score in scores:
        key = (score["suite"], score["task"], score["metric"])
        line = lines.setdefault(key, {"suite": key[0], "task": key[1], "metric": key[2], "runs": {}, "paper": None})
        line["runs"][score["run"]] = score
        line["paper"] = line["paper"] if line["paper"] is not None else score["paper"]
    return {"runs": names, "lines": list(lines.values())}


def refused(runs: Sequence[RunFacts]) -> list[dict[str, str]]:
    """Tasks without a score, and why."""
    return [
        {
            "run": run.name,
            "suite": suite,
            "task": task,
            "state": facts.get("state", "not known"),
            "why": str(facts.get("why", "")),
        }
        for run in runs
        for suite, results in run.results.items()
        for task, facts in results["tasks"].items()
        if facts.get("state") != "done"
    ]


def temperatures(runs: Sequence[RunFacts]) -> list[tuple[str, str, float, float]]:
    """Scores of one benchmark of one run at several temperatures."""
    return [
        (f"{score['run']} {score['benchmark']}", score["metric"], score["temperature"], score["value"])
        for score in each_score(runs)
        if score["share"] and score["temperature"] and score["metric"].startswith("pass@")
    ]


def correlations(runs: Sequence[RunFacts]) -> list[tuple[str, str, float]]:
    """Pearson's r of pass@1 between languages of MultiPL-E, over three runs or more that have them."""
    rows: dict[str, dict[str, float]] = {}
    for score in each_score(runs):
        if score["metric"] == "pass@1" and str(score["benchmark"]).startswith("multipl-e-"):
            rows.setdefault(score["run"], {})[str(score["benchmark"]).removeprefix("multipl-e-")] = score["value"]
    whole = of_common_languages(list(rows.values()))
    if not whole:
        return []
    return [(a, b, r) for (a, b), r in language_correlation(whole).items() if r is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Watching


class Watcher:
    """The page of runs in progress: made again when a file of theirs has changed, and not more often than it is asked
    for.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names
        self._seen: str | None = None
        self._page = b""

    def version(self) -> str:
        """A word that changes with the files that the page is made of."""
        newest, count = 0, 0
        patterns = ("*/*.json*", "*/*/manifest.json", "*/dataset/curate.json", "*/eval/*/results.json", "*/.lock")
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                with contextlib.suppress(FileNotFoundError):  # replaced or removed since it was listed
                    facts = path.stat()
                    newest, count = max(newest, facts.st_mtime_ns), count + facts.st_size
        return f"{newest}-{count}"

    def page(self) -> tuple[str, bytes]:
        version = self.version()
        if version != self._seen:
            self._page = render(*find_all(self.folder, self.names), self.folder.name, watching=True).encode()
            self._seen = version
        return version, self._page


class Handler(http.server.BaseHTTPRequestHandler):
    """The page at `/`, and at `/version` whether there is a newer one; to this machine alone."""

    watcher: Watcher

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  (its name in the base class)
        """Nothing: who watches sees it."""

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0].strip("[]")
        if host not in ("127.0.0.1", "localhost", "::1"):  # a name that somebody else's page resolves to this machine
            return self.answer(403, b"only by the name of this machine: 127.0.0.1 or localhost", "text/plain")
        if self.path == "/version":
            return self.answer(200, self.watcher.version().encode(), "text/plain")
        if self.path != "/":
            return self.answer(404, b"there is one page: /", "text/plain")
        try:
            _, page = self.watcher.page()
        except ValueError as error:
            return self.answer(503, str(error).encode(), "text/plain")
        return self.answer(200, page, "text/html; charset=utf-8")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)


def serve(folder: Path, names: Sequence[str], port: int) -> http.server.ThreadingHTTPServer:
    """A server on loopback, not started yet.

    Raises:
        ValueError: no runs there, or the port is taken.
    """
    watcher = Watcher(folder, names)
    watcher.page()
    handler = type("Watching", (Handler,), {"watcher": watcher})
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise ValueError(f"port {port} cannot be used ({error}); say another: make watch PORT=8001") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of runs of one size, such as runs/tiny")
    parser.add_argument("--run", action="append", default=[], help="one of them by name; again for more; none: all")
    parser.add_argument("--out", type=Path, help="the page; none: report.html in the folder of the runs")
    parser.add_argument("--watch", action="store_true", help="serve the page on loopback and make it again as runs go on")
    parser.add_argument("--port", type=int, default=8000, help="with --watch; 0 takes any that is free")
    options = parser.parse_args(arguments)
    try:
        if options.watch:
            server = serve(options.runs, options.run, options.port)
            print(f"watching {options.runs}: http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                server.server_close()
            return
        start = time.monotonic()
        out = write_report(options.runs, options.out or options.runs / "report.html", options.run)
    except ValueError as error:
        fail(str(error))
    size = out.stat().st_size / 1e6
    print(
        f"report: {out.resolve().as_uri()} ({size:.2f} MB, {time.monotonic() - start:.1f} s); no network is needed to read "
        "it"
    )


if __name__ == "__main__":
    main()
