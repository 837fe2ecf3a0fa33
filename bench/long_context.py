"""Tiny: loss beyond the trained length, without LCFT and with it, three kinds of positions; and what infilling keeps.

Reference: stage1 on its own, as trained and with base 10^6 put in without training; linear scaling and unchanged base beside
the new base, as in the paper's Table 18. All arms start from one stage1, read the same rows in the same order, and are
measured on the same tokens: the last 128 of held-out files of 6,144, given more and more of what stands before them. Middle
loss (nats per character) and end-token loss are those of stage1's held-out documents, for every arm, the Python stage and
the arms without infilling. One seed; differences below 0.03 nats are undecided. Runs stay in
`runs/bench-long-context`, a folder for each state of the code.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.stage_runs import BASE, build_and_train, need_base, runs_of
from codetune.artifacts import HELD_OUT, read_held_out, read_json
from codetune.recipe import load_recipe

MINUTES = 22
RUNS = runs_of(__file__)
LENGTHS = (192, 256, 512, 1024, 1536, 2048, 4096, 6144)
TARGET_TOKENS = 128
TRAINED, LONG = 256, 1024
# Recipe of each run; those of one line run two at once, and start from runs of the lines before.
WAVES = (
    ("stage1/tiny",),
    ("lcft/tiny", "python/tiny"),
    ("lcft/tiny-linear", "lcft/tiny-same-base"),
    ("lcft/tiny-no-infill", "python-lcft/tiny"),
)
FIGURES = ("psm_middle", "spm_middle", "psm_end", "spm_end")


def run(recipe: str) -> None:
    """Build and train, or find it done."""
    path = f"recipes/{recipe}.yaml"
    settings = [f"runs={RUNS}", "probes.infill_prompts=0", "probes.key_lengths=[]", "probes.context_lengths=[]"]
    if recipe.startswith("stage1"):
        settings.append(f"parent={BASE.resolve()}")
    build_and_train(path, settings)
    print(f"{recipe}: done", flush=True)


def load(folder: Path, base: float | None = None) -> Any:
    """A checkpoint, with another RoPE base put in where one is given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from codetune import adapter, rope
    from codetune.recipe import ModelSettings

    config = AutoConfig.from_pretrained(folder)
    rope.change_positions(config, ModelSettings(rope_base=base))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config)
    rope.check_frequencies(model, config, changed=base is not None)
    adapter.add_fused_head(model)
    return model


def main() -> None:
    from codetune.long_probes import context_losses
    from codetune.probes import held_out_losses, source_groups

    need_base()
    with ThreadPoolExecutor(2) as pool:
        for wave in WAVES:
            list(pool.map(run, wave))
    models = {
        recipe: RUNS / "tiny" / load_recipe(f"recipes/{recipe}.yaml").name / "model" for wave in WAVES for recipe in wave
    }
    rows = {stage: RUNS / "tiny" / stage / "rows" for stage in ("lcft", "stage1")}
    long, short = (read_held_out(rows[stage] / HELD_OUT) for stage in ("lcft", "stage1"))
    groups = source_groups(read_json(rows["stage1"] / "manifest.json"))

    arms = {
        "no LCFT, base 1e4": load(models["stage1/tiny"]),
        "no LCFT, base 1e6": load(models["stage1/tiny"], 1e6),
        "LCFT, base 1e6": load(models["lcft/tiny"]),
        "LCFT, base 1e4": load(models["lcft/tiny-same-base"]),
        "LCFT, linear 1/4": load(models["lcft/tiny-linear"]),
        "python, no LCFT": load(models["python/tiny"]),
        "python-lcft, 1e6": load(models["python-lcft/tiny"]),
    }
    count = sum(sample.layout == "long" for sample in long)
    print(f"\nloss of the same {count * TARGET_TOKENS:,} tokens, nats (stage1's rows {TRAINED}, LCFT's {LONG})")
    print(f"{'':20}" + "".join(f"{length:>9,}" for length in LENGTHS))
    context: dict[str, dict[int, float]] = {}
    for arm, model in arms.items():
        found = context_losses(model, long, LENGTHS, TARGET_TOKENS, tokens_per_batch=8192)
        context[arm] = {length: found[f"context/{length}"] for length in LENGTHS}
        print(f"{arm:20}" + "".join(f"{value:>9.4f}" for value in context[arm].values()), flush=True)

    print("\nstage1's held-out documents: plain in nats a token, middles in nats a character, end tokens in nats")
    print(f"{'':22}{'source':12}{'plain':>9}" + "".join(f"{figure:>12}" for figure in FIGURES))
    infilling: dict[str, dict[str, float]] = {}
    for recipe, folder in models.items():
        found = held_out_losses(load(folder), short, groups, tokens_per_batch=8192)
        infilling[recipe] = found
        for source in ("generated", "python", "cpp"):
            cells = "".join(f"{found[f'held_out/{source}/{figure}']:>12.4f}" for figure in FIGURES)
            print(f"{recipe:22}{source:12}{found[f'held_out/{source}/plain']:>9.4f}{cells}", flush=True)

    without, lengthened = context["no LCFT, base 1e4"], context["LCFT, base 1e6"]
    rises = {length: lengthened[length] - lengthened[TRAINED] for length in (LONG, LONG * 3 // 2)}
    before, after = infilling["stage1/tiny"], infilling["lcft/tiny"]
    change = {figure: after[f"held_out/generated/{figure}"] - before[f"held_out/generated/{figure}"] for figure in FIGURES}
    figures = {"context": context, "infilling": infilling, "lcft_rise_from_256": rises, "generated_change_by_lcft": change}
    print(f"\nwithout LCFT, from {TRAINED} to {2 * TRAINED} tokens: {without[2 * TRAINED] - without[TRAINED]:+.4f} nats")
    print("with LCFT, base 1e6, from 256: " + ", ".join(f"to {length:,} {rise:+.4f}" for length, rise in rises.items()))
    print(
        "infilling of generated code, by LCFT with the parent's rate: "
        + ", ".join(f"{k} {v:+.4f}" for k, v in change.items())
    )
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
