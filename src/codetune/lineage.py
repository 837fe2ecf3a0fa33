"""From a finished folder back to what it was made from, by the manifests alone.

What comes in: the folder of a model, an adapter or a checkpoint of a run. What goes out: one `Stage` per run, the newest
first, down to the base that `make base` made or to a Hub id. Each parent's folder is hashed and compared with what its child
recorded: a folder that was made again since is not the parent, and what it says is not told of it.

What it does not do: guess. Where the chain breaks, it says where and why.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from codetune.artifacts import MANIFEST, model_hash, read_json, why_invalid

CHECKPOINT = "checkpoint-"
NEEDED = ("recipe", "parent", "rows", "rope", "steps", "tokens", "ledger", "seconds")  # of a trained model's manifest


@dataclass(frozen=True)
class Stage:
    """One run of the lineage: what its manifest says."""

    name: str  # place in the tree of stages: init, base, stage1, ...
    size: str
    folder: Path
    hash: str  # of weights, configuration and tokenizer, as children record it
    manifest: Mapping[str, Any]
    kind: str = "model"  # model, adapter, checkpoint, base

    @property
    def run_dir(self) -> Path:
        return self.folder.parents[1] if self.kind == "checkpoint" else self.folder.parent

    @property
    def is_base(self) -> bool:
        """Whether `make base` made it: nothing was trained."""
        return self.kind == "base"

    @property
    def recipe(self) -> Mapping[str, Any]:
        return self.manifest["recipe"]


@dataclass(frozen=True)
class Lineage:
    """The stages, newest first, and what is known of the end of the chain."""

    stages: tuple[Stage, ...]
    ends: str | None = None  # a Hub id that the oldest stage started from
    broken: str | None = None  # why the chain ends before its end
    missing: Mapping[str, Any] = field(default_factory=dict)  # what the last child recorded of the parent that is missing

    @property
    def newest(self) -> Stage:
        return self.stages[0]

    @property
    def base(self) -> Stage | None:
        """What `make base` made, where the chain reaches it."""
        return self.stages[-1] if self.stages[-1].is_base else None


def why_unusable(folder: Path, check_hashes: bool = True) -> str | None:
    """`why_invalid`, also for a manifest that is JSON and yet none of ours."""
    try:
        return why_invalid(folder, check_hashes)
    except (TypeError, KeyError, AttributeError):
        return "its manifest.json is damaged"


def read_stage(folder: Path) -> Stage:
    """The run behind a folder that is finished and as it was sealed.

    Raises:
        ValueError: it is not there, not finished, or damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; train it first")
    reason = why_unusable(folder)
    if reason is not None:
        raise ValueError(f"{folder}: {reason}; publish and report only what is finished and whole")
    manifest = read_json(folder / MANIFEST)
    if folder.name.startswith(CHECKPOINT):
        return _checkpoint(folder, manifest)
    if "recipe" not in manifest:
        raise ValueError(f"{folder / MANIFEST}: no recipe in it; this is not a checkpoint of codetune")
    recipe = manifest["recipe"]
    if manifest.get("stage") == "base":
        name = folder.parent.name if folder.name == "model" else recipe["name"]
        return Stage(name, recipe["size"], folder, model_hash(folder), manifest, "base")
    missing = [key for key in NEEDED if key not in manifest] + [
        f"recipe.{key}" for key in ("name", "size") if key not in recipe
    ]
    if missing:
        raise ValueError(
            f"{folder / MANIFEST}: no {', '.join(missing)} in it; it was cut, or is no trained model's: train it again"
        )
    kind = "adapter" if (folder / "adapter_config.json").is_file() else "model"
    return Stage(recipe["name"], recipe["size"], folder, model_hash(folder), manifest, kind)


def _checkpoint(folder: Path, sealed: Mapping[str, Any]) -> Stage:
    """A checkpoint of a run in progress, told in the words of a finished model's manifest."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    run_dir = folder.parents[1]
    rows = read_json(run_dir / "rows" / MANIFEST)
    if rows.get("fingerprint") != sealed.get("rows"):
        raise ValueError(f"{folder}: it was trained on other rows than those in {run_dir / 'rows'}; build those again")
    measured = metrics_at(run_dir / "metrics.jsonl", sealed["step"])
    config = read_json(folder / "config.json")
    rope = config.get("rope_parameters") or {}
    manifest = {
        "recipe": recipe,
        "parent": sealed["parent"],
        "rows": {name: value for name, value in rows.items() if name != "recipe"},
        "rope": {
            "base": rope.get("rope_theta"),
            "type": rope.get("rope_type"),
            "linear_factor": rope.get("factor", 1.0),
            "context_tokens": config["max_position_embeddings"],
        },
        "steps": sealed["step"],
        "tokens": sealed["step"] * recipe["training"]["batch_tokens"],
        "ledger": sealed["ledger"],
        "seconds": sealed["ledger"]["seconds"],
        "held_out": {name: value for name, value in measured.items() if name.startswith("held_out/")},
        "long_context": {name: value for name, value in measured.items() if name.startswith(("context/", "key/"))},
        "infilling": {},
        "files": sealed["files"],
    }
    return Stage(recipe["name"], recipe["size"], folder, model_hash(folder), manifest, "checkpoint")


def metrics_at(path: Path, step: int) -> dict[str, Any]:
    """What was measured on held-out documents at a step of a run; nothing where nothing was.

    A line that a killed session left half written says nothing of a sealed step.
    """
    found: dict[str, Any] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("step") == step and any(name.startswith(("held_out/", "context/", "key/")) for name in record):
                found = {name: value for name, value in record.items() if "/" in name}
    return found


def follow(folder: Path) -> Lineage:
    """From a folder back to its base.

    Raises:
        ValueError: the folder itself is not finished.
    """
    stages = [read_stage(folder)]
    while not stages[-1].is_base:
        parent = stages[-1].manifest["parent"]
        found, reason = _find(parent, stages[-1])
        if found is None and "/" in parent["path"] and parent.get("commit"):
            return Lineage(tuple(stages), ends=parent["path"])
        if found is None:
            return Lineage(tuple(stages), broken=reason, missing=parent)
        stages.append(found)
    return Lineage(tuple(stages))


def _find(parent: Mapping[str, Any], child: Stage) -> tuple[Stage | None, str]:
    """The parent, at the place that was recorded, or beside its child where all runs were moved together; or why not."""
    recorded = Path(parent["path"])
    beside = child.run_dir.parent / recorded.parent.name / recorded.name
    reason = f"{parent['path']} is not here any more"
    for place in dict.fromkeys((recorded, beside)):
        if not place.is_dir():
            continue
        wrong = why_unusable(place, check_hashes=False)
        if wrong is not None:
            reason = f"{place}: {wrong}"
            continue
        stage = read_stage(place)
        if stage.hash == parent["hash"]:
            return stage, ""
        reason = f"{place} was made again since, with other weights"
    return None, reason


@dataclass(frozen=True)
class Weights:
    """What the headers of safetensors files say."""

    parameters: int
    size_bytes: int
    dtypes: tuple[str, ...]


def read_weights(folder: Path) -> Weights:
    """Parameters and types of a folder's weights, from the headers alone."""
    parameters, size, dtypes = 0, 0, set()
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        for tensor in safetensors_header(path).values():
            count = 1
            for length in tensor["shape"]:
                count *= length
            parameters += count
            dtypes.add(tensor["dtype"])
    return Weights(parameters, size, tuple(sorted(dtypes)))


def safetensors_header(path: Path) -> dict[str, Any]:
    """Name, type and shape of each tensor: eight bytes of length, little-endian, then JSON.

    Raises:
        ValueError: not a safetensors file.
    """
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= 100 * 2**20:
            raise ValueError(f"{path}: not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from error
    return {name: value for name, value in header.items() if name != "__metadata__"}
