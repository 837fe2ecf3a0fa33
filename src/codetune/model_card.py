"""The model card: what a checkpoint is, from manifests and results alone.

What comes in: a lineage, results of this very checkpoint where there are any, and where it is to be published. What goes
out: the text of README.md, whose metadata has passed `huggingface_hub`'s own checks, and the list of its claims: every
number in it, as shown, with the place that it is from. Nobody types a number: a test takes cards apart, and computes every
claim again from its source alone.

A source is a reference in back quotes, or arithmetic on some of them:

    `manifest.json#rope.base`                  file and key; files without a folder lie beside the card, that of a model it
                                               was made from at its place among the runs: `stage1/model/manifest.json`
    `manifest.json#ledger.tokens.*.psm`        the same key under all names
    sum(`manifest.json#ledger.tokens`)         every number below a key, or of several keys, added up; 0 for none
    part(1, `manifest.json#context/512`)       a number that is part of the key itself
    elements(`*.safetensors`), bytes(...)      counted in the files
    `paper.csv#...`, `gpus.py#...`, `--watts`  the paper's table, the table of GPUs, what the user said

Two figures are estimates and say so: the power that a device takes, which is the maker's figure (for a CPU a flat one per
core) or the user's, and the carbon of a kilowatt-hour, which is what the paper's own total comes to (228.55 t for 1,400
thousand hours at 400 W) or the user's.

What it does not do: measure anything, or praise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codetune.artifacts import LAYOUTS, MANIFEST
from codetune.gpus import device_watts
from codetune.lineage import Lineage, Stage, Weights, read_weights
from codetune.origins import Licence, drawn_anew, from_random_weights, hub_model, licence_of
from codetune.paper import stage_of
from codetune.tokens import Codec, open_codec

TEMPLATES = Path(__file__).parent / "templates"
PAPER_GRAMS_PER_KWH = 228.55e6 / (1_400_000 * 0.4)  # Table 26: grams over kilowatt-hours; 408
PAPER_GRAMS_SOURCE = "228.55e6 / (1400000 x 0.4); the paper's Table 26"
CORE_WATTS = 8.0  # of a CPU core at work: server processors' makers give 4 to 8, ours is the upper end
PROBE = ("def area(r):\n    return ", "\n\nprint(area(2))\n")  # the card's own infilling code must give these the right ids

SUBJECTS = {  # what a stage makes, by the first word of its name
    "base": "a starting checkpoint for code training",
    "init": "a starting checkpoint for code training",
    "stage1": "a code model: trained on code, text about code and natural language",
    "python": "a Python model: a code model trained on, mostly on Python",
    "lcft": "a code model after long-context fine-tuning",
    "python-lcft": "a Python model after long-context fine-tuning",
    "instruct": "a code model that follows instructions",
    "unnatural": "a code model that follows instructions",
}


@dataclass(frozen=True)
class Claim:
    """One number of the card."""

    shown: str
    source: str  # as the module's docstring has it
    value: Any


Words = tuple[str | Claim, ...]  # words with numbers in them, to be written one after the other
# What `lineage` reads of a checkpoint within a run that is the parent of another: its own manifest says less than a model's.
OF_A_CHECKPOINT = {
    "tokens": (f"{MANIFEST}#step", "recipe.yaml#training.batch_tokens"),
    "rope.base": ("config.json#rope_parameters.rope_theta",),
    "rope.context_tokens": ("config.json#max_position_embeddings",),
}


@dataclass
class Claims:
    """Numbers on their way into the card, each with where it is from."""

    newest: Stage  # its files lie beside the card
    made: list[Claim] = field(default_factory=list)

    def show(self, value: Any, form: str, source: str) -> str:
        shown = shown_as(value, form)
        self.made.append(Claim(shown, source, value))
        return shown

    def at(self, stage: Stage, key: str, file: str = MANIFEST) -> str:
        """The reference to a key of a file of a stage.

        Example: the parent's manifest, `steps` -> `stage1/model/manifest.json#steps`, in back quotes
        """
        place = "" if stage is self.newest else f"{stage.folder.relative_to(stage.run_dir.parent).as_posix()}/"
        found = OF_A_CHECKPOINT.get(key) if place and stage.kind == "checkpoint" else None
        return " x ".join(f"`{place}{one}`" for one in found or (f"{file}#{key}",))

    def of(self, stage: Stage, value: Any, form: str, key: str) -> str:
        """Show what the manifest has under a key."""
        return self.show(value, form, self.at(stage, key))


@dataclass(frozen=True)
class Card:
    """What goes into README.md, and where each of its numbers is from."""

    text: str
    claims: tuple[Claim, ...]
    licence: Licence


@dataclass(frozen=True)
class Score:
    """One line of results, ours beside the paper's."""

    benchmark: str
    metric: str
    value: float
    unit: str = ""  # behind the number: %
    low: float | None = None  # 95 % interval
    high: float | None = None
    problems: int | None = None
    settings: tuple[Words, ...] = ()
    paper: float | None = None  # for the same size and variant
    source: str = "results.json"  # file#key of the score; its value, low, high and problems lie below where `nested` is true
    nested: bool = False
    paper_source: str = ""

    @property
    def is_benchmark(self) -> bool:
        """Whether it is a benchmark's score of its problems; else a measurement such as a loss."""
        return self.unit == "%"


def shown_as(value: Any, form: str) -> str:
    """A number as people read it.

    Example: (1234567, "integer") -> "1,234,567"; (0.49982, "share") -> "49.98 %"; (None, ...) -> "not known"
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "not known"
    forms: dict[str, Callable[[Any], str]] = {
        "integer": lambda x: f"{x:,.0f}",
        "share": lambda x: f"{100 * x:.2f} %",
        "nats": lambda x: f"{x:.3f}",
        "number": lambda x: f"{x:.6g}",
        "score": lambda x: f"{x:.1f}",
        "epochs": lambda x: f"{x:.3g}",
        "hours": lambda x: f"{x:,.3g}" if x < 100 else f"{x:,.0f}",
        "text": str,
    }
    return forms[form](value)


def write_card(
    lineage: Lineage,
    *,
    name: str,
    repository: str | None = None,
    base_repository: str | None = None,
    licence: Licence | None = None,
    scores: Iterable[Score] = (),
    grams_per_kwh: float = PAPER_GRAMS_PER_KWH,
    device_watts_given: float | None = None,
    revision: str = "main",
) -> Card:
    """The card of the lineage's newest stage.

    Raises:
        ValueError: no licence is known for its base, metadata that the Hub would refuse, or a chat template or tokenizer
        that
            the card's own code would not fit.
    """
    stage = lineage.newest
    claims, scores = Claims(stage), list(scores)
    codec = open_codec(stage.folder)
    licence = licence or licence_of(lineage)
    facts = {
        "title": name,
        "repository": repository or f"<your name>/{name}",
        "revision": revision,
        "subject": SUBJECTS.get(stage_of(stage.name, SUBJECTS) or "", "a model trained by codetune"),
        "run": stage.name,
        "size": stage.size,
        "kind": stage.kind,
        "embedded": bool(stage.recipe.get("embedded")),
        "weights": _weights(stage, claims),
        "lineage": [_ancestor(lineage, place, claims) for place in range(len(lineage.stages))],
        "lineage_ends": lineage.ends,
        "lineage_broken": _broken(lineage, claims),
        "base_repository": base_repository,
        "context": _context(stage, claims),
        "training": _training(stage, claims),
        "mix": _mix(stage, claims),
        "fim": _fim(stage, claims),
        "cost": _cost(lineage, claims, grams_per_kwh, device_watts_given),
        "held_out": _held_out(stage, claims),
        "infilling": _infilling(stage, claims),
        "long_context": _long_context(stage, claims),
        "scores": [_score(score, claims) for score in scores],
        "infill": _infill_code(stage, codec),
        "bos": codec.bos_id is not None,
        "eos": _stops(stage, claims),
        "chat": has_chat_template(stage.folder),
        "licence": licence,
        "sources": _sources(lineage),
        "versions": {
            name: claims.of(stage, version, "text", f"versions.{name}")
            for name, version in (stage.manifest.get("versions") or {}).items()
        },
    }
    metadata = _metadata(lineage, facts, licence, scores)
    text = _environment().get_template("model_card.md.jinja").render(**facts)
    return Card(check_metadata(f"---\n{metadata}\n---\n\n{text}"), tuple(claims.made), licence)


def check_metadata(text: str) -> str:
    """The card again, once `huggingface_hub` has read its metadata back without a complaint.

    Raises:
        ValueError: the metadata is not what the Hub takes.
    """
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
        index = card.data.to_dict().get("model-index") or []
    except Exception as error:
        raise ValueError(f"the card's metadata would be refused by the Hub: {error}") from error
    for entry in index:
        for result in entry["results"]:
            for metric in result["metrics"]:
                if not isinstance(metric["value"], int | float) or not math.isfinite(metric["value"]):
                    raise ValueError(
                        f"the card's metadata has {metric['value']!r} as {metric['type']}; a result is a number"
                    )
    return text


# ---------------------------------------------------------------------------------------------------------------------
# What the manifests say, section by section


def _weights(stage: Stage, claims: Claims) -> dict[str, str]:
    weights: Weights = read_weights(stage.folder)
    return {
        "parameters": claims.show(weights.parameters, "integer", "elements(`*.safetensors`)"),
        "megabytes": claims.show(weights.size_bytes / 1e6, "number", "bytes(`*.safetensors`) / 1e6"),
        "dtypes": claims.show(", ".join(weights.dtypes), "text", "types(`*.safetensors`)"),
    }


def _ancestor(lineage: Lineage, place: int, claims: Claims) -> dict[str, Any]:
    stage = lineage.stages[place]
    manifest = stage.manifest
    if stage.is_base:
        source = manifest.get("source") or {}
        path = source.get("path") if isinstance(source, Mapping) else None
        origin = {
            "scratch": "random weights, made here",
            "hub": "from the Hub",
            "wheel": "from a wheel",
            "folder": "a folder",
        }
        made_of = origin.get(manifest.get("origin", ""), "")
        what = f"{made_of}: {path}" if path and manifest.get("origin") != "folder" else made_of
        what += ", of which only vocabulary and shape were taken; random weights" if drawn_anew(lineage) else ""
        context, rope = manifest.get("context_tokens"), manifest.get("rope_base")
        keys, tokens = ("context_tokens", "rope_base"), "none"
    else:
        what = SUBJECTS.get(stage_of(stage.name, SUBJECTS) or "", "trained")
        context, rope = manifest["rope"]["context_tokens"], manifest["rope"]["base"]
        keys = ("rope.context_tokens", "rope.base")
        tokens = claims.of(stage, manifest["tokens"], "integer", "tokens")
    # what a child recorded of its parent, and what the folder that goes records of the one it is made of
    recorded = claims.at(lineage.stages[place - 1], "parent.hash") if place else claims.at(stage, "published.hash")
    return {
        "name": stage.name,
        "hash": claims.show(stage.hash, "text", recorded),
        "what": what,
        "tokens": tokens,
        "context": claims.of(stage, context, "integer", keys[0]),
        "rope_base": claims.of(stage, rope, "integer", keys[1]),
    }


def _broken(lineage: Lineage, claims: Claims) -> dict[str, str] | None:
    if lineage.broken is None:
        return None
    recorded = claims.of(lineage.stages[-1], lineage.missing.get("hash"), "text", "parent.hash")
    return {"why": "what was recorded could not be found again", "hash": recorded}


def _context(stage: Stage, claims: Claims) -> dict[str, Any]:
    if stage.is_base:
        manifest = stage.manifest
        return {
            "tokens": claims.of(stage, manifest.get("context_tokens"), "integer", "context_tokens"),
            "base": claims.of(stage, manifest.get("rope_base"), "integer", "rope_base"),
            "trained": None,
            "factor": None,
        }
    rope = stage.manifest["rope"]
    factor = rope.get("linear_factor") or 1.0
    return {
        "tokens": claims.of(stage, rope["context_tokens"], "integer", "rope.context_tokens"),
        "base": claims.of(stage, rope["base"], "integer", "rope.base"),
        "trained": claims.of(stage, stage.manifest["rows"]["sequence_tokens"], "integer", "rows.sequence_tokens"),
        "factor": claims.of(stage, factor, "number", "rope.linear_factor") if factor != 1.0 else None,
    }


def _training(stage: Stage, claims: Claims) -> list[tuple[str, str]]:
    """Hyperparameters, by the name that a reader looks for."""
    if stage.is_base:
        return []
    recipe, manifest = stage.recipe, stage.manifest
    optimizer, training = recipe["optimizer"], recipe["training"]

    def show(key: str, form: str, value: Any) -> str:
        return claims.of(stage, value, form, key)

    betas = [show(f"recipe.optimizer.{name}", "number", optimizer[name]) for name in ("beta1", "beta2")]
    peak, fraction = (claims.at(stage, f"recipe.optimizer.{key}") for key in ("learning_rate", "final_rate_fraction"))
    final = optimizer["learning_rate"] * optimizer["final_rate_fraction"]
    lines = [
        ("optimizer", f"AdamW, beta {betas[0]} and {betas[1]}, epsilon "
         + show("recipe.optimizer.epsilon", "number", optimizer["epsilon"])),
        ("peak learning rate", show("recipe.optimizer.learning_rate", "number", optimizer["learning_rate"])),
        ("schedule", f"{optimizer['schedule']}"
         + (f", down to {claims.show(final, 'number', f'{peak} x {fraction}')}"
            if optimizer["schedule"] == "cosine" else "")
         + f", after {show('recipe.optimizer.warmup_tokens', 'integer', optimizer['warmup_tokens'])} tokens of warm-up"),
        ("weight decay", show("recipe.optimizer.weight_decay", "number", optimizer["weight_decay"])),
        ("gradient clipping", show("recipe.optimizer.max_gradient_norm", "number", optimizer["max_gradient_norm"])),
        ("batch", show("recipe.training.batch_tokens", "integer", training["batch_tokens"]) + " tokens"),
        ("row", show("rows.sequence_tokens", "integer", manifest["rows"]["sequence_tokens"]) + " tokens, packed; documents "
         + ("do not see each other" if manifest["rows"].get("isolate_documents") else "are concatenated")),
        ("steps", show("steps", "integer", manifest["steps"])),
        ("tokens", show("tokens", "integer", manifest["tokens"]) + ", padding included"),
        ("steps left out", show("ledger.skipped_steps", "integer", manifest["ledger"]["skipped_steps"])),
        ("precision", show("recipe.model.precision", "text", recipe["model"]["precision"]) + ", weights "
         + show("recipe.model.weights_dtype", "text", recipe["model"]["weights_dtype"])),
        ("seed", show("recipe.seed", "integer", recipe["seed"])),
    ]  # fmt: skip
    lora = recipe["model"].get("lora")
    if lora:
        rank, alpha = (
            show("recipe.model.lora.rank", "integer", lora["rank"]),
            show("recipe.model.lora.alpha", "number", lora["alpha"]),
        )
        lines.append(
            (
                "adapter",
                f"rank {rank}, alpha {alpha}, on {', '.join(lora['target_modules'])}; quantization {lora['quantization']}",
            )
        )
    return lines


def _mix(stage: Stage, claims: Claims) -> list[dict[str, str]]:
    """Per source: what was planned, what training read, and how often."""
    if stage.is_base:
        return []
    manifest = stage.manifest
    tokens = manifest["ledger"]["tokens"]
    total = sum(sum(layouts.values()) for layouts in tokens.values())
    table = []
    for name in manifest["rows"]["source_names"]:
        read, source = sum(tokens.get(name, {}).values()), manifest["rows"]["sources"][name]
        epochs, estimated = source.get("epochs"), source.get("epochs_estimated")
        known = epochs if epochs is not None else estimated
        note = stage.recipe["data"]["sources"][name].get("license_note")
        where, taken = f"rows.sources.{name}", f"sum({claims.at(stage, f'ledger.tokens.{name}')})"
        # epochs are counted of the rows that were built; training may have read a part of them
        passes = None if known is None else known * read / max(1, sum(source["tokens_in_rows"].values()))
        counted = "epochs_estimated" if epochs is None and known is not None else "epochs"
        times = f"{claims.at(stage, f'{where}.{counted}')} x {taken} / sum({claims.at(stage, f'{where}.tokens_in_rows')})"
        everything = f"sum({claims.at(stage, 'ledger.tokens')})"
        table.append(
            {
                "name": name,
                "planned": claims.of(stage, source["share"], "share", f"{where}.share"),
                "realised": claims.show(read / total if total else None, "share", f"{taken} / {everything}"),
                "tokens": claims.show(read, "integer", taken),
                "epochs": claims.show(passes, "epochs", times),
                "estimated": epochs is None and known is not None,
                "licence": claims.of(stage, note, "text", f"recipe.data.sources.{name}.license_note")
                if note
                else "not recorded",
            }
        )
    return table


def _fim(stage: Stage, claims: Claims) -> dict[str, str] | None:
    """The infilling that was asked for and that training met."""
    if stage.is_base:
        return None
    manifest = stage.manifest
    by_layout = dict.fromkeys(LAYOUTS, 0)
    for layouts in manifest["ledger"]["tokens"].values():
        for layout, count in layouts.items():
            by_layout[layout] = by_layout.get(layout, 0) + count
    total, sources = sum(by_layout.values()), manifest["rows"]["sources"].values()
    documents = {layout: sum(source["layouts"].get(layout, 0) for source in sources) for layout in LAYOUTS}
    infilled, fitting = documents["psm"] + documents["spm"], sum(source["documents_fitting"] for source in sources)
    if not infilled:
        return None
    everything = f"sum({claims.at(stage, 'ledger.tokens')})"

    def summed(key: str) -> str:
        return f"sum({claims.at(stage, f'{key}.psm')}, {claims.at(stage, f'{key}.spm')})"

    def share(layout: str, count: int) -> str:
        where = f"sum({claims.at(stage, f'ledger.tokens.*.{layout}')}) / {everything}"
        return claims.show(count / total, "share", where)

    counted = f"{summed('rows.sources.*.layouts')} / sum({claims.at(stage, 'rows.sources.*.documents_fitting')})"
    return {
        "rate": claims.of(stage, stage.recipe["data"]["fim"]["rate"], "share", "recipe.data.fim.rate"),
        "of_fitting": claims.show(infilled / fitting if fitting else None, "share", counted),
        "tokens": claims.show(
            (by_layout["psm"] + by_layout["spm"]) / total, "share", f"{summed('ledger.tokens.*')} / {everything}"
        ),
        "psm": share("psm", by_layout["psm"]),
        "spm": share("spm", by_layout["spm"]),
    }


def _cost(lineage: Lineage, claims: Claims, grams_per_kwh: float, watts_given: float | None) -> dict[str, Any]:
    """Device-hours of every trained stage of the lineage, and what they may have cost in carbon."""
    table, grams, hours_known = [], 0.0, 0.0
    hours_sources, energy_sources = [], []
    grams_source = PAPER_GRAMS_SOURCE if grams_per_kwh == PAPER_GRAMS_PER_KWH else "`--grams-per-kwh`"
    for stage in lineage.stages:
        hardware = stage.manifest.get("hardware")
        if stage.is_base or hardware is None:
            continue
        hours = stage.manifest["seconds"] / 3600 * hardware["devices"]
        watts, rule = _watts(stage, claims, watts_given)
        grams += hours * watts / 1000 * grams_per_kwh
        hours_known += hours
        devices = claims.of(stage, hardware["devices"], "integer", "hardware.devices")
        hours_sources.append(f"{claims.at(stage, 'seconds')} / 3600 x {claims.at(stage, 'hardware.devices')}")
        energy_sources.append(f"{hours_sources[-1]} x {rule}")
        table.append(
            {
                "name": stage.name,
                "hardware": f"{devices} x {claims.of(stage, hardware['device'], 'text', 'hardware.device')}",
                "hours": claims.show(hours, "hours", hours_sources[-1]),
                "watts": claims.show(watts, "number", rule),
            }
        )
    if not table:
        return {}
    rate, _, note = grams_source.partition("; ")
    rounded = float(f"{grams:.4g}")  # for the metadata
    energy = f"({' + '.join(energy_sources)}) / 1000 x {rate}"
    claims.show(rounded, "number", energy)
    return {
        "table": table,
        "hours": claims.show(hours_known, "hours", " + ".join(hours_sources)),
        "grams": rounded,
        "carbon": claims.show(grams / 1000, "number", f"{energy} / 1000"),
        "grams_per_kwh": claims.show(grams_per_kwh, "integer", grams_source),
        "power": "power is what its publisher gave"
        if watts_given is not None
        else "power is the maker's figure (for a CPU: a flat figure per core)",
        "grid": "the carbon of a kilowatt-hour is what the paper's own total comes to"
        if note
        else "the carbon of a kilowatt-hour is what its publisher gave",
        "source": "estimate: device-hours x "
        + ("the publisher's power" if watts_given is not None else "the makers' power")
        + " x grams per kWh, see below",
        "not_recorded": [stage.name for stage in lineage.stages if not stage.is_base and not stage.manifest.get("hardware")],
    }


def _watts(stage: Stage, claims: Claims, given: float | None) -> tuple[float, str]:
    """The power of a device of a stage, and where that is from."""
    hardware = stage.manifest["hardware"]
    if given is not None:
        return given, "`--watts`"
    known = device_watts(hardware["device"])
    if known is not None:
        return known, f"`gpus.py#{hardware['device']}`"
    cores, devices = hardware.get("cores", 1), max(1, hardware["devices"])
    counted = claims.at(stage, "hardware.cores") if "cores" in hardware else "1"
    return CORE_WATTS * cores / devices, f"{CORE_WATTS:g} x {counted} / {claims.at(stage, 'hardware.devices')}"


def _held_out(stage: Stage, claims: Claims) -> list[dict[str, str]]:
    """Nats per token on held-out documents, by source: plain, and the middles in both layouts."""
    if stage.is_base:
        return []
    found, table = stage.manifest.get("held_out") or {}, []
    columns = ("plain", "psm_middle", "spm_middle", "border_middle", "joint_middle")
    for name in stage.manifest["rows"]["source_names"]:
        values = {column: found.get(f"held_out/{name}/{column}") for column in columns}
        if any(value is not None for value in values.values()):
            table.append(
                {"name": name}
                | {
                    column: claims.of(stage, value, "nats", f"held_out.held_out/{name}/{column}")
                    if value is not None
                    else "-"
                    for column, value in values.items()
                }
            )
    return table


def _infilling(stage: Stage, claims: Claims) -> list[dict[str, str]]:
    found, table = stage.manifest.get("infilling") or {}, []
    for layout in ("psm", "spm", "prefix_only"):
        everything = (found.get(layout) or {}).get("all")
        if everything:
            where = f"infilling.{layout}.all"
            table.append(
                {"layout": {"prefix_only": "prefix alone, for comparison"}.get(layout, layout.upper())}
                | {
                    key: claims.of(stage, everything[key], form, f"{where}.{key}") if key in everything else "-"
                    for key, form in (
                        ("prompts", "integer"),
                        ("exact_match", "share"),
                        ("first_line_match", "share"),
                        ("stop_rate", "share"),
                    )
                }
            )
    return table


def _long_context(stage: Stage, claims: Claims) -> dict[str, Any]:
    found = stage.manifest.get("long_context") or {}
    losses = sorted((int(name.split("/")[1]), name, value) for name, value in found.items() if name.startswith("context/"))
    keys = sorted(
        (int(name.split("/")[1]), float(name.split("/")[2]), name, value)
        for name, value in found.items()
        if name.startswith("key/") and name.endswith("/found")
    )

    def of_key(name: str, place: int, value: float, form: str) -> str:
        return claims.show(value, form, f"part({place}, {claims.at(stage, f'long_context.{name}')})")

    return {
        "losses": [
            (of_key(name, 1, length, "integer"), claims.of(stage, value, "nats", f"long_context.{name}"))
            for length, name, value in losses
        ],
        "found": [
            (
                of_key(name, 1, length, "integer"),
                of_key(name, 2, depth, "number"),
                claims.of(stage, value, "share", f"long_context.{name}"),
            )
            for length, depth, name, value in keys
        ],
    }


def _score(score: Score, claims: Claims) -> dict[str, str]:
    times = "100 x " if score.unit == "%" else ""

    def of(key: str) -> str:
        return f"`{score.source}.{key}`" if score.nested else f"`{score.source}`"

    interval = "-"
    if score.low is not None and score.high is not None:
        bounds = (("low", score.low), ("high", score.high))
        low, high = (claims.show(value, "score", f"{times}{of(key)}") for key, value in bounds)
        interval = f"{low} to {high}"
    claims.made += [part for words in score.settings for part in words if isinstance(part, Claim)]
    settings = ("".join(part.shown if isinstance(part, Claim) else part for part in words) for words in score.settings)
    return {
        "benchmark": score.benchmark,
        "metric": score.metric,
        "ours": claims.show(score.value, "score" if score.unit == "%" else "number", f"{times}{of('value')}"),
        "interval": interval,
        "problems": "-" if score.problems is None else claims.show(score.problems, "integer", of("problems")),
        "settings": ", ".join(settings),
        "paper": "-" if score.paper is None else claims.show(score.paper, "score", score.paper_source),
    }


# ---------------------------------------------------------------------------------------------------------------------
# How to prompt


def _infill_code(stage: Stage, codec: Codec) -> dict[str, Any] | None:
    """Whether the card shows infilling, and how bare text is encoded; only where the model met it in training.

    Raises:
        ValueError: the code that the card would show gives other ids than those that were trained.
    """
    if codec.infill is None or not _met_infilling(stage):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(stage.folder))
    shown = {"leading_space": codec.leading_space, "bos": codec.bos_id is not None}
    namespace: dict[str, Any] = {"tokenizer": tokenizer}
    code = _environment().get_template("infill_ids.py.jinja").render(infill=shown)
    exec(code, namespace)  # noqa: S102  (our own template)
    for prefix, suffix in (PROBE, ("", "x"), ("x = ", "")):
        if namespace["infill_ids"](prefix, suffix) != codec.psm_prompt(prefix, suffix):
            raise ValueError(
                f"{stage.folder}: transformers encodes infilling prompts of this tokenizer otherwise than training did; "
                "the card's "
                "code would be wrong, so that nothing is published (see docs/fim.md)"
            )
    return shown


def _met_infilling(stage: Stage) -> bool:
    tokens = (stage.manifest.get("ledger") or {}).get("tokens") or {}
    return any(layouts.get("psm", 0) for layouts in tokens.values())


def _stops(stage: Stage, claims: Claims) -> list[str]:
    """The ids at which generation stops."""
    path, key = stage.folder / "generation_config.json", "eos_token_id"
    value = json.loads(path.read_text(encoding="utf-8")).get(key) if path.is_file() else None
    ids = {f"{key}.{place}": one for place, one in enumerate(value)} if isinstance(value, list) else {key: value}
    return [claims.show(one, "text", claims.at(stage, at, path.name)) for at, one in ids.items() if one is not None]


def has_chat_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    inside = path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    return bool(inside) or (folder / "chat_template.jinja").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Licence and metadata


def _sources(lineage: Lineage) -> list[str]:
    """Data sets of the Hub that any stage of the lineage was trained on."""
    found = []
    for stage in lineage.stages:
        for source in ((stage.recipe.get("data") or {}).get("sources") or {}).values():
            if source.get("kind") == "hub" and source.get("path") and source["path"] not in found:
                found.append(source["path"])
    return found


def _metadata(lineage: Lineage, facts: Mapping[str, Any], licence: Licence, scores: list[Score]) -> str:
    """The YAML head of the card.

    Its `model-index` has the benchmarks' scores and the plain loss of each source: what can be set beside other models. The
    rest of what was measured is in the card's tables.
    """
    from huggingface_hub import EvalResult, ModelCardData

    stage = lineage.newest
    parent = facts["base_repository"] or hub_model(lineage)
    optional: dict[str, Any] = {}
    if parent is not None:
        optional |= {"base_model": parent, "base_model_relation": "adapter" if stage.kind == "adapter" else "finetune"}
    if facts["cost"]:
        optional["co2_eq_emissions"] = {
            "emissions": facts["cost"]["grams"],
            "source": facts["cost"]["source"],
            "training_type": "pre-training" if from_random_weights(lineage) else "fine-tuning",
            "hardware_used": facts["cost"]["table"][0]["hardware"],
        }
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.benchmark.lower().replace(" ", "-"),
            dataset_name=score.benchmark,
            metric_type=score.metric,
            metric_value=round(score.value, 4),
            metric_args={"settings": words} if (words := said["settings"]) else None,  # one benchmark may stand there twice
        )
        for score, said in zip(scores, facts["scores"], strict=True)
        if score.is_benchmark
    ]
    for name in [] if stage.is_base else stage.manifest["rows"]["source_names"]:
        value = (stage.manifest.get("held_out") or {}).get(f"held_out/{name}/plain")
        if value is not None and math.isfinite(value):
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type="held-out-documents",
                    dataset_name=f"held-out documents of the source {name}",
                    dataset_config=name,
                    metric_type="loss",
                    metric_name="nats per token",
                    metric_value=round(value, 6),
                )
            )
    tags = ["code", "codetune", "llama"]
    if facts["infill"]:
        tags.append("fill-in-the-middle")
    data = ModelCardData(
        language=["code", "en"],
        license=licence.id,
        license_name=licence.name if licence.id == "other" else None,
        license_link=licence.link or ("LICENSE.md" if licence.id == "other" else None),
        library_name="peft" if stage.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=facts["sources"] or None,
        model_name=facts["title"],
        eval_results=results or None,
        **optional,
    )
    return data.to_yaml().strip()


def _environment() -> Any:
    """Templates of Markdown: no HTML escaping, but a filter `md` for what comes from recipes."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["md"] = markdown_text
    return environment


def markdown_text(value: Any) -> str:
    r"""Text that Markdown shows as it is: no tag, no table cell, no emphasis, no line of its own.

    Example: `<b>|x_y` -> `&lt;b&gt;\|x\_y`
    """
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in ("\\", "|", "`", "*", "_", "[", "]"):
        text = text.replace(mark, f"\\{mark}")
    return text
