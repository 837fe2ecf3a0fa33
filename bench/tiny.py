"""The tiny stage1 against its base and against the same run without infilling, three seeds.

Six runs of `recipes/stage1/tiny.yaml` from one base, two at once with one thread each; finished ones of this very code are
kept in `runs/bench-tiny` and not run again. Everything is measured on the same held-out documents: real code (python, cpp),
and generated functions whose template families no run has seen. Reported as it is: loss on each, middles against plain text
with the same border in nats per character, end-token loss, and greedy infilling of whole lines (running into the length
limit is not a stop).
"""

from __future__ import annotations

import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.stage_runs import BASE, build_and_train, need_base, runs_of
from codetune.artifacts import HELD_OUT, read_held_out, read_json
from codetune.recipe import Recipe, load_recipe

MINUTES = 35
RECIPE = "recipes/stage1/tiny.yaml"
SEEDS = (0, 1, 2)
ARMS = {"infilling": 0.9, "plain only": 0.0}
RUNS = runs_of(__file__)


def overrides(seed: int, rate: float) -> list[str]:
    folder = RUNS / f"seed{seed}-fim{rate:g}"
    return [f"seed={seed}", f"data.fim.rate={rate}", f"runs={folder}", f"parent={BASE.resolve()}"]


def run(seed: int, rate: float) -> dict[str, Any]:
    """The manifest of the finished model."""
    manifest = build_and_train(RECIPE, overrides(seed, rate))
    print(f"seed {seed}, infill rate {rate:g}: done", flush=True)
    return manifest


def base_figures(recipe: Recipe) -> dict[str, float]:
    """The base on the same held-out samples."""
    from transformers import AutoModelForCausalLM

    from codetune import adapter, probes

    model: Any = AutoModelForCausalLM.from_pretrained(str(BASE))
    adapter.add_fused_head(model)
    groups = probes.source_groups(read_json(recipe.rows_dir / "manifest.json"))
    return probes.held_out_losses(model, read_held_out(recipe.rows_dir / HELD_OUT), groups, tokens_per_batch=8192)


def mean_and_range(values: list[float]) -> str:
    return f"{statistics.mean(values):8.4f} [{min(values):.4f}, {max(values):.4f}]"


def main() -> None:
    need_base()
    jobs = [(seed, arm) for seed in SEEDS for arm in ARMS]
    with ThreadPoolExecutor(2) as pool:
        manifests = list(pool.map(lambda job: run(job[0], ARMS[job[1]]), jobs))
    found = dict(zip(jobs, manifests, strict=True))
    base = base_figures(load_recipe(RECIPE, overrides(0, 0.9)))
    figures: dict[str, Any] = {"base": base, "runs": []}
    for (seed, arm), manifest in found.items():
        figures["runs"].append(
            {"seed": seed, "arm": arm, "held_out": manifest["held_out"], "infilling": manifest["infilling"]}
        )

    def values(arm: str, source: str, figure: str) -> list[float]:
        return [found[seed, arm]["held_out"][f"held_out/{source}/{figure}"] for seed in SEEDS]

    print("\nmean over three seeds [smallest, largest]")
    ratios = {}
    for source in ("python", "cpp", "generated"):
        ours, plain = values("infilling", source, "plain"), values("plain only", source, "plain")
        ratios[source] = [a / b for a, b in zip(ours, plain, strict=True)]
        print(
            f"{source:10} plain, nats/token: base {base[f'held_out/{source}/plain']:.4f}   infilling {mean_and_range(ours)}"
        )
        print(f"{'':10} plain only {mean_and_range(plain)}   infilling over plain only {mean_and_range(ratios[source])}")
        for layout, border in (("psm", "border"), ("spm", "joint")):
            middle, reference = (
                values("infilling", source, f"{layout}_middle"),
                values("infilling", source, f"{border}_middle"),
            )
            end = values("infilling", source, f"{layout}_end")
            share = [a / b for a, b in zip(middle, reference, strict=True)]
            print(
                f"{'':10} {layout} middle, nats/char: {mean_and_range(middle)} over the same border {mean_and_range(share)}"
            )
            print(f"{'':10} {layout} end token, nats: {mean_and_range(end)}")
            figures[f"{source}_{layout}_over_border"] = share
    print("\ngreedy infilling of whole lines, held-out generated functions and real Python")
    for source in ("generated", "python"):
        for form in ("psm", "spm", "prefix_only"):
            scores = [found[seed, "infilling"]["infilling"][form][source] for seed in SEEDS]
            cells = {name: statistics.mean(score[name] for score in scores) for name in scores[0] if name != "prompts"}
            prompts = sum(score["prompts"] for score in scores)
            print(f"{source:10} {form:12} {prompts:4.0f} prompts  " + "  ".join(f"{k} {v:.1%}" for k, v in cells.items()))
    figures["plain_over_plain_only"] = ratios
    real = statistics.mean([*ratios["python"], *ratios["cpp"]])
    print(f"\nplain loss on real code, infilling over plain only: {real:.4f} (to reach: within 1.02)")
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
