"""From steps that leapt or were left out to their rows, and from those to their text, in one command.

What comes in: a recipe whose run has written `skipped_steps.jsonl`, and its rows. What goes out, on the terminal: each step
with what was found in it and what was usual, its micro-batches with the worst loss first, the text of every row, and the
setting that leaves these rows out of the next run.

    python -m data_pipelines.spikes --recipe recipes/stage1/tiny.yaml               # every step, its worst micro-batch
    python -m data_pipelines.spikes --recipe recipes/stage1/tiny.yaml --step 412 --micro-batches 99

What it does not do: say which row of a micro-batch was to blame; the loss is known for all of them together. With
`training.micro_batch_rows: 1` it is known for each.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from codetune.artifacts import SKIPPED_STEPS, Rows, fail, open_rows
from codetune.recipe import load_recipe
from data_pipelines.build import explain_row


def read_records(path: Path) -> list[dict[str, Any]]:
    """The steps that a run has written down.

    Raises:
        ValueError: none, or not readable.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there: no step of this run has leapt or was left out")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not readable ({error}); take the damaged line out") from error


def worst_first(micro_batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Micro-batches by loss, those whose loss is not finite before all others.

    Example: losses 2.0, None, 3.0 -> None, 3.0, 2.0
    """
    return sorted(micro_batches, key=lambda batch: -math.inf if batch["loss"] is None else -batch["loss"])


def describe(record: Mapping[str, Any]) -> str:
    """One step as a line.

    Example: step 412, a spike, made: loss 5.2 (usual 2.1, 14.2 deviations), gradient norm 0.4
    """
    parts = []
    for name, words in (("loss", "loss"), ("gradient_norm", "gradient norm")):
        value = record.get(name)
        text = f"{words} {'not finite' if value is None else format(value, '.4g')}"
        if f"{name}_median" in record:
            text += f" (usual {record[f'{name}_median']:.4g}, {record[f'{name}_deviations']:.1f} deviations)"
        parts.append(text)
    what = "a spike" if record["reason"] == "spike" else "not finite"
    return f"step {record['step']}, {what}, {'left out' if record['skipped'] else 'made'}: {', '.join(parts)}"


def explain_steps(records: Sequence[Mapping[str, Any]], rows: Rows, micro_batches: int) -> Iterator[str]:
    """Text for people, step by step: the `micro_batches` worst of each."""
    shown: list[int] = []
    for record in records:
        yield f"=== {describe(record)}"
        batches = worst_first(record["micro_batches"])
        for batch in batches[:micro_batches]:
            loss = "not finite" if batch["loss"] is None else f"{batch['loss']:.4f}"
            yield f"rank {batch['rank']}, micro-batch {batch['micro_batch']}: loss {loss}, rows {batch['rows']}"
            for number in batch["rows"]:
                yield explain_row(rows, number)
            shown += [number for number in batch["rows"] if number not in shown]
        if len(batches) > micro_batches:
            yield f"({len(batches) - micro_batches} more micro-batch(es): --micro-batches {len(batches)} shows them)"
    yield f"to leave these rows out: training.skip_rows=[{','.join(map(str, sorted(shown)))}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows of steps that leapt or were left out."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.spikes", description=main.__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.key=value", dest="overrides")
    parser.add_argument("--step", type=int, help="only this step")
    parser.add_argument("--micro-batches", type=int, default=1, help="of each step, the worst first (1)")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        path = recipe.run_dir / SKIPPED_STEPS
        records = read_records(path)
        chosen = [record for record in records if options.step in (None, record["step"])]
        if not chosen:
            known = ", ".join(str(record["step"]) for record in records) or "none"
            raise ValueError(f"{path} has no step {options.step}; it has {known}")
        for text in explain_steps(chosen, open_rows(recipe.rows_dir), max(options.micro_batches, 1)):
            print(text)
    except ValueError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
