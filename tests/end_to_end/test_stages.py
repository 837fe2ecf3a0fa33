"""From nothing to long context and to conversations at the size `smoke`, stage by stage, as `make` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from codetune.artifacts import read_json, why_invalid
from codetune.recipe import load_recipe
from codetune.sft import tune
from codetune.train import train
from data_pipelines.base import make_base
from data_pipelines.build import build
from data_pipelines.self_instruct import self_instruct

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
def test_every_stage_of_the_smallest_size(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    facts = {}
    for stage in ("base", "stage1", "python", "lcft", "python-lcft", "instruct", "unnatural"):
        recipe = load_recipe(RECIPES / stage / "smoke.yaml", [f"runs={tmp_path}", "probes.infill_prompts=0"])
        if stage == "base":
            make_base(recipe)
        build(recipe)
        folder = (train if recipe.need_data().chat is None else tune)(recipe)
        assert why_invalid(folder) is None
        facts[stage] = read_json(folder / "manifest.json")
    for stage in ("base", "stage1", "python"):
        assert facts[stage]["rope"]["base"] == 10_000.0 and facts[stage]["rope"]["lengthened_by"] is None
    for stage in ("lcft", "python-lcft"):
        rope = {"base": 1e6, "type": "default", "linear_factor": 1.0, "context_tokens": 512, "lengthened_by": stage}
        assert facts[stage]["rope"] == rope
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "smoke" / stage / "model")
        assert model.model.rotary_emb.inv_freq.tolist() == pytest.approx([1e6 ** (-2 * i / 16) for i in range(8)], rel=1e-6)
        assert {"context/64", "context/1024", "key/512/0.4/found"} <= set(facts[stage]["long_context"])
        assert facts[stage]["lengths"]["python"]["token_percentiles"]["50"] == 512  # whole rows of one document
    assert sum(facts["python"]["ledger"]["tokens"]["python"].values()) > 0.7 * facts["python"]["ledger"]["document_tokens"]
    assert set(facts["python"]["ledger"]["tokens"]["python"]) == {"plain"}
    made = self_instruct(load_recipe(RECIPES / "self_instruct" / "smoke.yaml", [f"runs={tmp_path}"]))
    manifest = read_json(made / "manifest.json")  # noise: what matters is that every pass came to its end
    assert (manifest["asked"]["questions"]["answers"], manifest["funnel"]["asked"] > 0) == (4, True)
    for stage in ("instruct", "unnatural"):
        assert facts[stage]["rope"] == facts["lcft" if stage == "instruct" else "python-lcft"]["rope"]
        assert facts[stage]["chat"]["prompts"] == 4 and "held_out/functions/answer_end" in facts[stage]["held_out"]
        assert {"psm", "spm"} & set(facts[stage]["ledger"]["tokens"]["python"]), "rehearsal is infilled"
    again = load_recipe(RECIPES / "lcft" / "smoke.yaml", [f"runs={tmp_path}", "parent=lcft", "name=lcft-again"])
    with pytest.raises(ValueError, match="lengthened by the run `lcft` already"):
        build(again)
