"""Tiny: realised shares of rehearsal, and what instruction tuning forgets with it and without it.

Reference: the parent (lcft) on the same held-out documents and conversations, and the same stage without rehearsal: as many
tokens, the same rates and seed. Forgetting is the rise of the held-out loss, of plain documents in nats per token, of
middles in nats per character (infilling). One seed; differences below 0.03 nats are undecided. Runs stay in
`runs/bench-instruct`, a folder for each state of the code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.stage_runs import BASE, build_and_train, need_base, runs_of
from codetune.artifacts import HELD_OUT, read_held_out, read_json
from codetune.recipe import load_recipe

MINUTES = 14
RUNS = runs_of(__file__)
STAGES = ("stage1/tiny", "lcft/tiny", "instruct/tiny", "instruct/tiny-no-rehearsal")
SOURCES = ("python", "cpp", "generated", "text")
PLANNED = {"code": 0.06, "text": 0.02}


def folder_of(recipe: str) -> Path:
    return RUNS / "tiny" / load_recipe(f"recipes/{recipe}.yaml").name


def shares(manifest: dict[str, Any]) -> dict[str, float]:
    """Realised shares of the rows' tokens by group."""
    found: dict[str, float] = {}
    for source in manifest["sources"].values():
        found[source["group"]] = found.get(source["group"], 0.0) + source["share_realised"]
    return found


def losses(folder: Path, samples: list[Any], groups: dict[str, str]) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    from codetune import adapter
    from codetune.probes import held_out_losses

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    adapter.add_fused_head(model)
    return held_out_losses(model, samples, groups, tokens_per_batch=8192)


def main() -> None:
    from codetune.probes import source_groups

    need_base()
    for recipe in STAGES:
        settings = [f"runs={RUNS}", "probes.infill_prompts=0", "probes.key_lengths=[]", "probes.context_lengths=[]"]
        if recipe.startswith("stage1"):
            settings.append(f"parent={BASE.resolve()}")
        build_and_train(f"recipes/{recipe}.yaml", settings)
        print(f"{recipe}: done", flush=True)
    manifest = read_json(folder_of("instruct/tiny") / "rows" / "manifest.json")
    realised = shares(manifest)
    off = {group: abs(realised[group] - share) for group, share in PLANNED.items()}
    print("\nshares of tokens in rows")
    for group, share in PLANNED.items():
        print(f"{group:8}{realised[group]:>9.3%} of {manifest['tokens']:,} tokens; asked for {share:.0%}")

    samples = read_held_out(folder_of("instruct/tiny") / "rows" / HELD_OUT)
    groups = source_groups(manifest)
    arms = {"before (lcft)": "lcft/tiny", "with rehearsal": "instruct/tiny", "without": "instruct/tiny-no-rehearsal"}
    found = {arm: losses(folder_of(recipe) / "model", samples, groups) for arm, recipe in arms.items()}
    before = found["before (lcft)"]
    keys = [f"held_out/{source}/plain" for source in SOURCES]
    keys += [f"held_out/generated/{figure}" for figure in ("psm_middle", "spm_middle", "psm_end", "spm_end")]
    keys += ["held_out/functions/answer", "held_out/functions/answer_end"]
    print(f"\n{'held out':32}" + "".join(f"{arm:>18}" for arm in arms))
    for key in keys:
        cells = [
            f"{found[arm][key]:>18.4f}" if arm == "before (lcft)" else f"{found[arm][key] - before[key]:>+18.4f}"
            for arm in arms
        ]
        print(f"{key.removeprefix('held_out/'):32}" + "".join(cells))
    print("nats per token (middles: per character); the arms as differences from before")
    for recipe in ("instruct/tiny", "instruct/tiny-no-rehearsal"):
        chat = read_json(folder_of(recipe) / "model" / "manifest.json")["chat"]
        print(
            f"{recipe}: stop rate {chat['stop_rate']:.1%}, tagged {chat['tagged_rate']:.1%} of {chat['prompts']} held-out "
            "prompts"
        )
    figures = {
        "shares": realised,
        "off_by": off,
        "losses": {arm: {key: value[key] for key in keys} for arm, value in found.items()},
    }
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
