"""The report's page: size and time for the runs of `make demo` and for 100,000 logged steps, and its first paint in a
browser.

Reference: the same page with every point of every curve (nothing thinned out), from the same log in the same run. First
paint and time until every chart is drawn are Chromium's own, headless, from the file; without Chromium they are left out.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

MINUTES = 2
WORK = Path("runs/bench-report")
STEPS = 100_000


def write_log(path: Path, steps: int) -> None:
    """A log as training writes it, ledger and all."""
    draw = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for step in range(1, steps + 1):
            tokens = {name: {"plain": step * 50, "psm": step * 40, "spm": step * 40} for name in ("python", "cpp", "text")}
            record: dict[str, Any] = {
                "step": step,
                "tokens": step * 4096,
                "loss": 2 + draw.random(),
                "grad_norm": draw.random(),
            }
            record |= {
                "learning_rate": 1e-3,
                "tokens_per_second": 7000 + draw.random(),
                "mfu_percent": 15.0,
                "memory_gib": 1.0,
            }
            file.write(
                json.dumps(record | {"ledger": {"tokens": tokens, "padding": 0, "rows": step, "seconds": step}}) + "\n"
            )


def build(folder: Path, out: Path) -> dict[str, float]:
    """Make the page as the command does, in this process; CPU seconds and size."""
    from eval import report

    report.library.cache_clear()
    start, cpu = time.monotonic(), time.process_time()
    report.write_report(folder, out)
    seconds = {"seconds": round(time.monotonic() - start, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
    return {**seconds, "megabytes": round(out.stat().st_size / 1e6, 3)}


def paint(out: Path) -> dict[str, Any]:
    """What a browser says about the page."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        return {"browser": "none here"}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        context = browser.new_context(offline=True)
        tab, said = context.new_page(), []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        start = time.monotonic()
        tab.goto(out.resolve().as_uri())
        tab.wait_for_selector("body[data-drawn]", timeout=300_000)
        drawn = time.monotonic() - start
        script = "performance.getEntriesByType('paint').find((entry) => entry.name === 'first-contentful-paint').startTime"
        found = {"first_paint_ms": round(tab.evaluate(script)), "all_drawn_seconds": round(drawn, 2), "console": len(said)}
        found["charts"] = tab.locator("[data-chart] svg").count()
        browser.close()
    return found


def main() -> None:
    from eval import runs

    figures: dict[str, Any] = {}
    small = next(
        (Path("runs") / size for size in ("tiny", "smoke") if (Path("runs") / size / "stage1" / "model").is_dir()), None
    )
    if small is None:
        print("no finished runs here: `make demo` makes those of tiny", file=sys.stderr)
        raise SystemExit(1)
    out = WORK / f"{small.name}.html"
    WORK.mkdir(parents=True, exist_ok=True)
    figures[small.name] = {**build(small, out), **paint(out)}
    long = WORK / "long" / "stage1"
    write_log(long / "metrics.jsonl", STEPS)
    out = WORK / "long.html"
    figures["100,000 steps"] = {**build(long.parent, out), **paint(out)}
    points = runs.Curve.points
    runs.Curve.points = lambda self, most=0: points(self, 10**9)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        figures["100,000 steps, not thinned"] = build(long.parent, WORK / "all.html")
    finally:
        runs.Curve.points = points
    for name, found in figures.items():
        print(f"{name:<28} " + ", ".join(f"{key} {value}" for key, value in found.items()))
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
