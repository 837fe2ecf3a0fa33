"""SmolLM2-135M before and after a continuation with infilling: middles, end token, prompts, HumanEval's single lines.

One run of `recipes/stage1/smollm2-135m.yaml` over TRAIN_TOKENS tokens. Reference: the base that it starts from, measured
alike on the same held-out documents, and beside each middle the same text left to right with the same border. The suite is
Table 14's single lines, the first PROBLEMS of the published 1,033, PSM and SPM, judged by tests; before the continuation it
is refused, since the base's infilling tokens were never trained, and its floor is what an empty middle passes.

Everything is kept in a folder of this very code, training by its checkpoints and answers by groups of 64: a script that was
ended goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.smollm2_humaneval import MODEL, evaluate, need_model
from bench.stage_runs import build_and_train, runs_of
from codetune.artifacts import HELD_OUT, HELD_OUT_CUTS, read_held_out, read_json, write_json
from codetune.recipe import load_recipe

MINUTES = 50
RECIPE = "recipes/stage1/smollm2-135m.yaml"
TRAIN_TOKENS = 102_400  # the recipe's own: 100 steps
PROMPTS = 48
NEW_TOKENS = 48
PROBLEMS = 200
LAYOUTS = {"psm": "border", "spm": "joint"}  # and the plain reading that has the same border
SUITE = "recipes/eval/table14.yaml"
TASKS = ("single-line-psm", "single-line-spm")
RUNS = runs_of(__file__)


def settings() -> list[str]:
    training = [f"training.train_tokens={TRAIN_TOKENS}", f"optimizer.warmup_tokens={TRAIN_TOKENS // 20}"]
    return [*training, "training.evaluate_tokens=102400", f"runs={RUNS}", f"parent={MODEL.resolve()}"]


def probed(name: str, checkpoint: Path, rows: Path) -> dict[str, Any]:
    """Held-out losses and infilling prompts of one checkpoint; kept, and not measured again."""
    path = RUNS / f"{name}.json"
    if path.is_file():
        return read_json(path)
    from transformers import AutoModelForCausalLM

    from codetune import adapter, probes
    from codetune.tokens import open_codec

    samples, groups = read_held_out(rows / HELD_OUT), probes.source_groups(read_json(rows / "manifest.json"))
    model: Any = AutoModelForCausalLM.from_pretrained(str(checkpoint))
    report = probes.infill_report(model, open_codec(checkpoint), samples, groups, PROMPTS, NEW_TOKENS)
    adapter.add_fused_head(model)
    losses = {cut: probes.held_out_losses(model, samples, groups, tokens_per_batch=8192, cut=cut) for cut in HELD_OUT_CUTS}
    write_json(path, {"losses": losses, "prompts": report})
    return read_json(path)


def main() -> None:
    need_model()
    build_and_train(RECIPE, settings())
    recipe = load_recipe(RECIPE, settings())
    places = {"before": MODEL, "after": recipe.model_dir}
    found = {name: probed(name, checkpoint, recipe.rows_dir) for name, checkpoint in places.items()}
    for cut in HELD_OUT_CUTS:
        print(
            f"\nmiddles cut at {'random characters' if cut == 'span' else 'a whole line'}; nats a character, before -> after"
        )
        before, after = (found[name]["losses"][cut] for name in places)
        for source in sorted({name.split("/")[1] for name in before}):
            for layout, border in LAYOUTS.items():
                cells = []
                for figure in (f"{layout}_middle", f"{border}_middle", f"{layout}_end"):
                    key = f"held_out/{source}/{figure}"
                    if key in before:
                        cells.append(f"{figure} {before[key]:.3f} -> {after[key]:.3f}")
                print(f"{source:12} {'  '.join(cells)}")
    print("\ngreedy answers to held-out holes, before -> after")
    before, after = (found[name]["prompts"] for name in places)
    for form, sources in before.items():
        for source, scores in sources.items():
            values = (f"{key} {value:.3g} -> {after[form][source][key]:.3g}" for key, value in scores.items())
            print(f"{source:12} {form:12} " + "  ".join(values))
    print()
    changes = [f"tasks.{task}.{key}" for task in TASKS for key in (f"limit={PROBLEMS}", f"max_new_tokens={NEW_TOKENS}")]
    more = ["--tasks", *TASKS, "--group-requests", "64", "--set", *changes]
    suites = {name: evaluate(SUITE, RUNS / f"suite-{name}", "--model", str(place), *more) for name, place in places.items()}
    for name, results in suites.items():
        for task in TASKS:
            facts = results["tasks"][task]
            score = facts.get("scores", {}).get("pass@1")
            said = (
                facts["why"] if score is None else f"pass@1 {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
            )
            floor = facts.get("references", {}).get("floor")
            beside = "" if floor is None else f"; empty middle {floor['passed']} of {floor['of']}"
            print(f"{name:8}{task:18}{said}{beside}")
    scores = {name: {task: results["tasks"][task].get("scores") for task in TASKS} for name, results in suites.items()}
    print("RESULT " + json.dumps({"tokens": TRAIN_TOKENS, "probes": found, "suite": scores}))


if __name__ == "__main__":
    main()
