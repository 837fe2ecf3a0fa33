"""What a run will cost and whether it fits, before anything runs: `make plan SIZE=7b STAGE=lcft GPUS=8xH100`.

What comes in: a recipe, kinds and numbers of GPUs, and a layout (an accelerate file, or none: the simplest one that fits).
What goes out: steps, epochs, memory per GPU by term for the layout and for the others, CPU memory, hours and cost, disk,
settings that conflict, and one sentence: fits or not, and what to change. Nothing is downloaded, no GPU, rows or parent are
needed and neither torch nor transformers is imported, so that it answers in a second.

The memory model is `memory.py`, its error band in docs/planning.md. Hours follow from arithmetic and an assumed MFU; they
do not know evaluation, saving or waiting for data. The model's shape is read from the parent's `config.json` where that is
there, else from the base recipe of its size.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from codetune.artifacts import MANIFEST, as_bytes, fail, read_json
from codetune.gpus import GIB, Cluster, parse_cluster
from codetune.memory import DEEPSPEED, LAYOUTS, SHARDED_WEIGHTS, Job, Lora, Memory, peak_memory
from codetune.recipe import Recipe, SourceSettings, did_you_mean_hint, load_recipe
from codetune.shape import ModelShape, known_shape, shape_from_dict
from codetune.steps import Steps, derive_steps

RECIPES = Path(__file__).resolve().parents[2] / "recipes"  # where a recipe of one's own has no bases beside it
DEFAULT_MFU = 0.4
ERROR_BAND = 0.15  # of what comes and goes in a step; bench/plan_memory.py measures it
DOCUMENT_TOKENS = 1000  # assumed, for what rows hold beside their tokens
DOCUMENT_BYTES = 90  # id, lengths and numbers of one document
MOST_GPUS = 4096  # that advice looks through
NEW_TOKEN_ROWS = 4

LAYOUT_NAMES = {
    "single": "one process",
    "ddp": "DDP",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3 offload",
    "fsdp2": "FSDP2",
}


# ---------------------------------------------------------------------------------------------------------------------
# What the plan is about


@dataclass(frozen=True)
class Choice:
    """A layout, with or without an adapter in place of training all weights."""

    layout: str
    lora: Lora | None = None

    @property
    def name(self) -> str:
        kind = "" if self.lora is None else f"{'QLoRA' if self.lora.quantized else 'LoRA'} {self.lora.rank}, "
        return kind + LAYOUT_NAMES[self.layout]


@dataclass(frozen=True)
class Plan:
    """Everything the report says, as values."""

    recipe: Recipe
    shape: ModelShape
    shape_origin: str
    cluster: Cluster
    chosen: Choice
    steps: Steps | None  # None: the world cannot share the batch
    memory: Mapping[str, Memory]  # by name of the choice, the chosen one first
    epochs: Mapping[str, float | None]
    hours: float | None  # by the clock
    mfu: float
    speed_origin: str
    price_per_gpu_hour: float | None
    disk: Mapping[str, int]
    conflicts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verdict: str = ""

    @property
    def here(self) -> Memory:
        return self.memory[self.chosen.name]

    @property
    def fits(self) -> bool:
        return fits(self.here, self.cluster)

    @property
    def gpu_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.cluster.count

    @property
    def tokens(self) -> int:
        training = self.recipe.need_training()
        return training.train_tokens // training.batch_tokens * training.batch_tokens


def make_plan(
    recipe: Recipe,
    cluster: Cluster,
    *,
    layout: str | None = None,
    mfu: float = DEFAULT_MFU,
    tokens_per_second: float | None = None,
    price_per_gpu_hour: float | None = None,
    source_tokens: Mapping[str, float] | None = None,
    recipes: Path = RECIPES,
) -> Plan:
    """Plan a run.

    Raises:
        ValueError: the model's shape is not known, a source is not the recipe's, or the layout needs other GPUs.
    """
    for need in (recipe.need_training, recipe.need_optimizer, recipe.need_data):
        need()
    shape, origin = find_shape(recipe, recipes)
    lora = _lora(recipe, shape)
    if layout is None:
        chosen = _simplest(recipe, shape, cluster, lora)
    else:
        chosen = Choice(_checked_layout(layout, cluster), lora)
    memory = {
        choice.name: peak_memory(job_of(recipe, shape, cluster, choice)) for choice in _choices(chosen, shape, cluster)
    }
    try:
        steps, refusal = derive_steps(recipe, cluster.count), None
    except ValueError as error:
        steps, refusal = None, str(error)
    conflicts, notes = find_conflicts(recipe, shape, cluster, chosen)
    hours, speed_origin = hours_of(recipe, shape, cluster, chosen, mfu, tokens_per_second)
    plan = Plan(
        recipe=recipe,
        shape=shape,
        shape_origin=origin,
        cluster=cluster,
        chosen=chosen,
        steps=steps,
        memory=memory,
        epochs=epochs_of(recipe, source_tokens or {}),
        hours=hours,
        mfu=mfu,
        speed_origin=speed_origin,
        price_per_gpu_hour=price_per_gpu_hour,
        disk=disk_of(recipe, shape, cluster, chosen),
        conflicts=([refusal] if refusal else []) + conflicts,
        notes=notes,
    )
    return dataclasses.replace(plan, verdict=verdict_of(plan))


def find_shape(recipe: Recipe, recipes: Path) -> tuple[ModelShape, str]:
    """The parent's shape: from its own `config.json` where that is on disk, else by the base recipe of this size.

    Raises:
        ValueError: neither says.
    """
    shape, origin = _shape_without_context(recipe, recipes)
    context = recipe.model.context_tokens or _context_of_parent(recipe, recipes)
    return (shape if context is None else dataclasses.replace(shape, context=context)), origin


def _context_of_parent(recipe: Recipe, recipes: Path) -> int | None:
    """The context that the parent's own recipe gives it, where the parent is not made yet; None where it changes nothing."""
    path = recipes / (recipe.parent or "base") / f"{recipe.size}.yaml"
    if recipe.parent is None or not path.is_file() or (Path(recipe.parent_path) / "config.json").is_file():
        return None
    return load_recipe(path).model.context_tokens


def _shape_without_context(recipe: Recipe, recipes: Path) -> tuple[ModelShape, str]:
    if recipe.parent is not None:
        config = Path(recipe.parent_path) / "config.json"
        if config.is_file():
            return shape_from_dict(read_json(config), str(config)), str(config)
    plain = recipes / "base" / f"{recipe.size}-plain.yaml"  # of the lineage without infill tokens
    named = (recipe.parent or "").endswith("-plain") or recipe.name.endswith("-plain")
    path = plain if named and plain.is_file() else recipes / "base" / f"{recipe.size}.yaml"
    base = recipe.base or (load_recipe(path).base if path.is_file() else None)
    if base is not None and base.origin == "scratch":
        names = ("vocabulary_size", "hidden_size", "layers", "heads", "intermediate_size", "context_tokens")
        rows, hidden, layers, heads, intermediate, context = (getattr(base, name) for name in names)
        kv_heads = base.kv_heads or heads
        return ModelShape(hidden, layers, heads, kv_heads, intermediate, rows, context, hidden // heads), str(path)
    infill = base.infill_tokens if base is not None else recipe.need_data().infills
    shape = known_shape(recipe.size, infill)
    if shape is None:
        raise ValueError(
            f"the shape of size `{recipe.size}` is not known: {recipe.parent_path if recipe.parent else path} has no "
            f"config.json; make or fetch the parent first, or give a folder with its config.json as `parent`"
        )
    return shape, f"the table of sizes, {shape.vocabulary:,} pieces"


def _lora(recipe: Recipe, shape: ModelShape) -> Lora | None:
    settings = recipe.model.lora
    if settings is None:
        return None
    new_rows = shape.vocabulary not in (32000, 49152)  # a vocabulary that was not grown has no new tokens
    return Lora(
        settings.rank,
        settings.target_modules,
        NEW_TOKEN_ROWS if settings.train_new_tokens and new_rows else 0,
        settings.quantization == "nf4",
        settings.double_quantization,
    )


def job_of(recipe: Recipe, shape: ModelShape, cluster: Cluster, choice: Choice, **changes: Any) -> Job:
    """One rank's job under a choice; `changes` replace fields of it."""
    training, data, model = recipe.need_training(), recipe.need_data(), recipe.model
    ranks = 1 if choice.layout == "single" else cluster.count
    rows = changes.get("rows", training.micro_batch_rows)
    bf16 = model.precision == "bf16" or model.precision == "auto" and (cluster.gpu.is_gpu or _cpu_has_bf16())
    job = Job(
        shape=shape,
        sequence_tokens=data.sequence_tokens,
        rows=rows,
        layout=choice.layout,
        ranks=ranks,
        ranks_per_machine=min(ranks, cluster.per_machine),
        accumulation=max(1, training.batch_tokens // data.sequence_tokens // ranks // rows),
        bf16=bf16,
        weights_bf16=model.weights_dtype == "bfloat16" or choice.lora is not None,
        attention=model.attention,
        isolated=data.packing.isolate_documents,
        fused_head=model.loss_head == "fused",
        checkpointing=model.activation_checkpointing,
        gpu=cluster.gpu.is_gpu,
        lora=choice.lora,
        background_saves=training.background_saves,
    )
    return dataclasses.replace(job, **changes)


def _cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16, as `model.precision: auto` asks (Linux)."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8") if info.is_file() else ""
    return "avx512_bf16" in flags or "amx_tile" in flags


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def layout_of_accelerate(path: Path) -> tuple[str, int | None]:
    """The layout that an accelerate configuration asks for, and the number of processes it names.

    Raises:
        ValueError: no such file, or a layout that the memory model does not have.
    """
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"{path}: no such file" + (f"; beside it are {', '.join(near)}" if near else ""))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    kind = str(tree.get("distributed_type", "NO")).upper() if isinstance(tree, dict) else "?"
    processes = tree.get("num_processes") if isinstance(tree, dict) else None
    if kind == "NO":
        return "single", processes
    if kind in ("MULTI_GPU", "MULTI_CPU"):
        return "ddp", processes
    if kind == "FSDP" and int(tree.get("fsdp_config", {}).get("fsdp_version", 1)) == 2:
        return "fsdp2", processes
    settings = tree.get("deepspeed_config", {}) if kind == "DEEPSPEED" else {}
    if tree.get("parallelism_config"):
        raise ValueError(
            f"{path}: rows shared between ranks (`parallelism_config`) are not in the memory model; plan with zero3.yaml, "
            "whose activations are those of whole rows and so an upper bound"
        )
    stage = settings.get("zero_stage")
    offloaded = [
        name for name in ("optimizer", "param") if settings.get(f"offload_{name}_device", "none") not in ("none", None)
    ]
    if stage in (2, 3) and not offloaded:
        return f"zero{stage}", processes
    if stage == 3 and len(offloaded) == 2:
        return "zero3_offload", processes
    what = f"zero_stage {stage} with offload of {' and '.join(offloaded) or 'nothing'}" if kind == "DEEPSPEED" else kind
    raise ValueError(f"{path}: {what} is a layout the plan does not know; it knows {', '.join(LAYOUT_NAMES.values())}")


def _checked_layout(layout: str, cluster: Cluster) -> str:
    if layout not in LAYOUTS:
        raise ValueError(f"no layout `{layout}`{did_you_mean_hint(layout, LAYOUTS)}")
    if layout == "single" and cluster.count > 1:
        raise ValueError(
            f"this layout is one process alone, but {cluster} are {cluster.count}; write GPUS={cluster.gpu.name}, or a "
            "layout of several (ACCELERATE=recipes/accelerate/zero3.yaml)"
        )
    return layout


def _order(cluster: Cluster) -> tuple[str, ...]:
    """Layouts that these GPUs can run, the simplest and fastest first."""
    if not cluster.gpu.is_gpu:
        return ("single",) if cluster.count == 1 else ("ddp",)
    return ("single", "zero3_offload") if cluster.count == 1 else ("ddp", "zero2", "zero3", "fsdp2", "zero3_offload")


def _simplest(recipe: Recipe, shape: ModelShape, cluster: Cluster, lora: Lora | None) -> Choice:
    """The first layout that fits; ZeRO-3, or the only one there is, where none does."""
    choices = [Choice(layout, lora) for layout in _order(cluster) if _runs(Choice(layout, lora))]
    for choice in choices:
        if fits(peak_memory(job_of(recipe, shape, cluster, choice)), cluster):
            return choice
    return next((choice for choice in choices if choice.layout == "zero3"), choices[0])


def _runs(choice: Choice) -> bool:
    """Whether training takes this choice: 4-bit weights and new tokens' rows are not shared out over ranks."""
    lora = choice.lora
    return lora is None or choice.layout not in SHARDED_WEIGHTS or not (lora.quantized or lora.trained_rows)


def _choices(chosen: Choice, shape: ModelShape, cluster: Cluster) -> list[Choice]:
    """The chosen one, then every other that these GPUs can run, then adapters."""
    order = _order(cluster)
    full = [Choice(layout) for layout in order]
    rows = NEW_TOKEN_ROWS if shape.vocabulary not in (32000, 49152) else 0
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapters = [Choice(order[0], Lora(64, targets, rows, quantized)) for quantized in (False, True)]
    others = [choice for choice in [*full, *(adapters if cluster.gpu.is_gpu else [])] if choice.name != chosen.name]
    return [chosen, *others]


def fits(memory: Memory, cluster: Cluster) -> bool:
    """Whether one rank's peak is no more than its device has; on a CPU the ranks of a machine share it."""
    share = 1 if cluster.gpu.is_gpu else cluster.per_machine
    return memory.total * share <= cluster.gpu.memory_bytes


def fits_narrowly(memory: Memory, cluster: Cluster) -> bool:
    """Whether it fits, but not if what comes and goes in a step were larger by the model's error band."""
    share = 1 if cluster.gpu.is_gpu else cluster.per_machine
    most = memory.total + ERROR_BAND * (memory.total - memory.resting)
    return fits(memory, cluster) and most * share > cluster.gpu.memory_bytes


# ---------------------------------------------------------------------------------------------------------------------
# Time, epochs, disk


def hours_of(
    recipe: Recipe, shape: ModelShape, cluster: Cluster, choice: Choice, mfu: float, tokens_per_second: float | None
) -> tuple[float | None, str]:
    """Hours by the clock, and where the speed comes from.

    Example: 1e9 tokens of 6e9 operations on 8 devices of 1e15 at MFU 0.4: 6e18 / 3.2e15 = 1,875 s, 0.52 hours
    """
    tokens = recipe.need_training().train_tokens
    if tokens_per_second is not None:
        return tokens / (tokens_per_second * cluster.count) / 3600, f"{tokens_per_second:,.0f} tokens/s a device, as given"
    peak = cluster.gpu.flops
    if peak is None:
        return None, "the peak speed of this device is not known; a measured speed can be given (--tokens-per-second)"
    if recipe.model.precision == "fp32":
        return None, "peaks are those of bf16, and the recipe computes in fp32; a measured speed can be given"
    flops = shape.training_flops_per_token(recipe.need_data().sequence_tokens)
    if choice.lora is not None:
        flops = flops * 2 // 3  # weights that stay as they are need no gradient of their own
    seconds = tokens * flops / (peak * mfu * cluster.count)
    return seconds / 3600, f"MFU {mfu:.0%} of {peak / 1e12:,.0f} TFLOPS, assumed"


def epochs_of(recipe: Recipe, given: Mapping[str, float]) -> dict[str, float | None]:
    """How often each source is read: as given, as rows on disk counted it, by the recipe's size of it, or None.

    Raises:
        ValueError: a size is given for a source that the recipe does not have.
    """
    data, tokens = recipe.need_data(), recipe.need_training().train_tokens
    for name in given:
        if name not in data.sources:
            raise ValueError(f"--source-tokens names `{name}`, which is no source{did_you_mean_hint(name, data.sources)}")
    manifest = recipe.rows_dir / MANIFEST
    counted = read_json(manifest).get("sources", {}) if manifest.is_file() else {}

    def epochs(name: str, source: SourceSettings) -> float | None:
        size = given.get(name) or source.size_tokens
        if size:
            return source.share * tokens / size
        facts = counted.get(name, {})
        return facts.get("epochs") or facts.get("epochs_estimated")

    return {name: epochs(name, source) for name, source in data.sources.items()}


def disk_of(recipe: Recipe, shape: ModelShape, cluster: Cluster, choice: Choice) -> dict[str, int]:
    """Bytes on disk: rows, one checkpoint, all that stay, one being written beside them, and the finished model."""
    training, data = recipe.need_training(), recipe.need_data()
    rows = training.train_tokens // training.batch_tokens * (training.batch_tokens // data.sequence_tokens)
    token = 2 if shape.vocabulary <= 2**16 else 4
    documents = max(1.0, data.sequence_tokens / DOCUMENT_TOKENS)
    row = data.sequence_tokens * token + round(documents * DOCUMENT_BYTES)
    n, trained = shape.parameters, job_of(recipe, shape, cluster, choice).trained
    wide = 2 if choice.layout in DEEPSPEED or choice.lora is not None or recipe.model.weights_dtype == "bfloat16" else 4
    if choice.lora is not None:
        checkpoint = 12 * trained
    elif choice.layout in DEEPSPEED:
        checkpoint = (2 + 12 + (2 if choice.layout == "zero2" else 0)) * n  # 16-bit weights, and the engine's own state
    else:
        checkpoint = 3 * wide * n  # weights and Adam's two moments
    kept = min(training.keep_checkpoints, _saves(recipe))
    never_deleted = _kept_for_good(recipe)
    disk = {"rows": rows * row, "one checkpoint": checkpoint, f"{kept} newest checkpoints": kept * checkpoint}
    if never_deleted:
        disk[f"{never_deleted} checkpoints kept for good"] = never_deleted * checkpoint
    return disk | {"one more while it is written": checkpoint, "the finished model": wide * n}


def _saves(recipe: Recipe) -> int:
    training = recipe.need_training()
    return 10 if training.save_tokens is None else max(1, training.train_tokens // training.save_tokens)


def _kept_for_good(recipe: Recipe) -> int:
    training = recipe.need_training()
    return 0 if training.keep_tokens is None else training.train_tokens // training.keep_tokens


# ---------------------------------------------------------------------------------------------------------------------
# What does not go together


def find_conflicts(recipe: Recipe, shape: ModelShape, cluster: Cluster, choice: Choice) -> tuple[list[str], list[str]]:
    """What would stop the run, and what is only worth knowing; each sentence names the setting and what to write."""
    data, training, model = recipe.need_data(), recipe.need_training(), recipe.model
    conflicts, notes = [], []
    if data.sequence_tokens > shape.context:
        conflicts.append(
            f"`data.sequence_tokens` is {data.sequence_tokens}, but the model has {shape.context} positions; write at most "
            f"{shape.context}, or make the context longer with the lcft stage"
        )
    if recipe.need_data().infills and shape.vocabulary == 32000:
        conflicts.append(
            "`data.fim.rate` is above 0, but this base has no infilling tokens; set it to 0, or make a base that has them"
        )
    flash = model.attention.startswith("flash_attention")
    if flash and data.packing.isolate_documents and training.micro_batch_rows > 1:
        conflicts.append(
            f"`model.attention` {model.attention} keeps documents apart in one row at a time, and "
            f"`training.micro_batch_rows` is {training.micro_batch_rows}; write 1"
        )
    if flash and importlib.util.find_spec("flash_attn") is None:
        notes.append(f"{model.attention} is not installed here; look whether it is where the run will be, or write sdpa")
    if not _runs(choice):
        conflicts.append(
            f"4-bit weights and new tokens' rows cannot be shared out over ranks, as {LAYOUT_NAMES[choice.layout]} does; "
            "launch with recipes/accelerate/ddp.yaml, or set `model.lora.train_new_tokens` to false"
        )
    if model.weights_dtype == "bfloat16" and choice.lora is None and choice.layout in ("single", "ddp"):
        notes.append(
            "`model.weights_dtype` is bfloat16 and this layout keeps no fp32 copy: updates smaller than 1/256 of a weight "
            "are lost; write float32"
        )
    mask = job_of(recipe, shape, cluster, choice).mask_elements
    if mask >= GIB // 4:
        notes.append(
            f"{model.attention} holds a mask of {data.sequence_tokens} x {data.sequence_tokens} for each row, "
            f"{as_bytes(mask)} in all and twice that in each layer; flash_attention_2 with "
            "`training.micro_batch_rows` 1 has none"
        )
    return conflicts, notes


# ---------------------------------------------------------------------------------------------------------------------
# The sentence at the end


def verdict_of(plan: Plan) -> str:
    """Fits or not, and what to change: the smallest change that the memory model finds enough."""
    if plan.conflicts:
        return f"does not run as it is: {plan.conflicts[0]}"
    have, need = plan.cluster.gpu.memory_bytes, plan.here.total
    if plan.fits:
        room = _largest_micro_batch(plan)
        more = f"; up to {room} rows at once would fit" if room > plan.recipe.need_training().micro_batch_rows else ""
        if fits_narrowly(plan.here, plan.cluster):
            more = f"; that is within the model's error band of {ERROR_BAND:.0%}, so try it before counting on it"
            easier = next((text for text in _changes(plan, with_room=True)), None)
            more += f", or take {easier}" if easier else ""
        return f"fits: {plan.chosen.name} needs {as_bytes(need)} of {as_bytes(have)}{_each(plan)}{more}"
    advice = list(itertools.islice(_changes(plan), 2))
    others = len(advice) > 1 and LAYOUT_NAMES["zero3_offload"] in advice[0]  # slow: say what else would do
    do = (
        f"; {' fits, or '.join(advice if others else advice[:1])} fits"
        if advice
        else f"; nothing here makes it fit, not even {MOST_GPUS} GPUs: take larger ones"
    )
    return f"does not fit: {plan.chosen.name} needs {as_bytes(need)} of {as_bytes(have)}{_each(plan)}{do}"


def _each(plan: Plan) -> str:
    return " per GPU" if plan.cluster.gpu.is_gpu else ""


def _largest_micro_batch(plan: Plan) -> int:
    rows = plan.recipe.need_training().batch_tokens // plan.recipe.need_data().sequence_tokens // plan.cluster.count
    fitting = [
        count
        for count in range(1, min(rows, 256) + 1)
        if rows % count == 0
        and fits(peak_memory(job_of(plan.recipe, plan.shape, plan.cluster, plan.chosen, rows=count)), plan.cluster)
    ]
    return max(fitting, default=0)


def _changes(plan: Plan, with_room: bool = False) -> Iterator[str]:
    """Changes that make it fit, or fit with room for the model's error, the smallest first."""

    def enough(cluster: Cluster, choice: Choice, **changes: Any) -> bool:
        if not _runs(choice):
            return False
        memory = peak_memory(job_of(plan.recipe, plan.shape, cluster, choice, **changes))
        return fits(memory, cluster) and not (with_room and fits_narrowly(memory, cluster))

    rows = plan.recipe.need_training().micro_batch_rows
    share = plan.recipe.need_training().batch_tokens // plan.recipe.need_data().sequence_tokens // plan.cluster.count
    fewer = [count for count in range(rows - 1, 0, -1) if share % count == 0]
    settings: list[tuple[str, dict[str, Any]]] = [(f"training.micro_batch_rows={count}", {"rows": count}) for count in fewer]
    if not plan.recipe.model.activation_checkpointing:
        settings.append(("model.activation_checkpointing=true", {"checkpointing": True}))
    if plan.recipe.model.loss_head == "logits":
        settings.append(("model.loss_head=fused", {"fused_head": True}))
    if plan.recipe.model.attention in ("sdpa", "eager"):
        settings.append(("model.attention=flash_attention_2 training.micro_batch_rows=1", {"attention": "flash", "rows": 1}))
    everything = {name: value for _, change in settings for name, value in change.items()}
    least = ("every setting above together", everything)
    tried = [*settings, *([least] if len(settings) > 1 else [])]
    for text, change in tried:
        if enough(plan.cluster, plan.chosen, **change):
            yield (
                f'SET="{text}"'
                if change is not everything
                else 'SET="' + " ".join(dict.fromkeys(_all_settings(tried))) + '"'
            )
    others = [Choice(layout, plan.chosen.lora) for layout in _order(plan.cluster)]
    for choice in others:
        for text, change in [("", {}), *tried[:-1]]:
            if choice != plan.chosen and enough(plan.cluster, choice, **change):
                host = peak_memory(job_of(plan.recipe, plan.shape, plan.cluster, choice, **change)).host_total
                told = (
                    f" ({as_bytes(host * plan.cluster.per_machine)} of CPU memory)"
                    if choice.layout == "zero3_offload"
                    else ""
                )
                yield f"{choice.name} on the same GPUs{told}" + (f' with SET="{text}"' if text else "")
                break
    if plan.cluster.gpu.is_gpu:
        yield from _more_gpus(plan, enough)
        for choice in _choices(plan.chosen, plan.shape, plan.cluster):
            if choice.lora is not None and enough(plan.cluster, choice):
                yield f"{choice.name} (`model.lora`)"


def _all_settings(tried: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """One of each setting, the strongest last one of a kind."""
    latest: dict[str, str] = {}
    for text, _ in tried[:-1]:
        for item in text.split():
            latest[item.partition("=")[0]] = item
    return list(latest.values())


def _more_gpus(plan: Plan, enough: Any) -> Iterator[str]:
    layout = plan.chosen.layout if plan.chosen.layout in SHARDED_WEIGHTS else "zero3"
    batch = plan.recipe.need_training().batch_tokens // plan.recipe.need_data().sequence_tokens
    per_machine = max(plan.cluster.per_machine, 8) if plan.cluster.count > 1 else 2
    count = plan.cluster.count * 2
    while count <= MOST_GPUS:
        cluster = Cluster(plan.cluster.gpu, max(1, count // per_machine), min(count, per_machine))
        rows = plan.recipe.need_training().micro_batch_rows
        for micro in (rows, 1):
            if batch % (cluster.count * micro) == 0 and enough(cluster, Choice(layout, plan.chosen.lora), rows=micro):
                less = "" if micro == rows else ' with SET="training.micro_batch_rows=1"'
                yield f"{LAYOUT_NAMES[layout]} on at least {cluster.count} of these GPUs{less}"
                return
        count *= 2


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(plan: Plan) -> str:
    """The plan for people."""
    return "\n".join([*_head_lines(plan), *_memory_lines(plan), *_cost_lines(plan), *_closing_lines(plan)])


def _head_lines(plan: Plan) -> list[str]:
    recipe, training, data = plan.recipe, plan.recipe.need_training(), plan.recipe.need_data()
    lines = [
        f"{recipe.size}/{recipe.name} on {plan.cluster}: {plan.chosen.name}",
        f"  model        {plan.shape.parameters:,} parameters ({plan.shape_origin}), {plan.shape.context:,} positions",
        f"  tokens       {training.train_tokens:,}, rows of {data.sequence_tokens:,}, batches of {training.batch_tokens:,}",
    ]
    if plan.steps is not None:
        steps = plan.steps
        lines.append(
            f"  steps        {steps.total:,} ({steps.warmup:,} warm-up), each {steps.batch_rows:,} rows = "
            f"{steps.world_size} ranks x {steps.accumulation} accumulated x {steps.micro_batch_rows} at once"
        )
    known = [
        f"{name} {epochs:.2f}" if epochs >= 0.1 else f"{name} {epochs:.2g}"
        for name, epochs in plan.epochs.items()
        if epochs is not None
    ]
    unknown = [name for name, epochs in plan.epochs.items() if epochs is None]
    lines.append("  epochs       " + (", ".join(known) or "none known"))
    if unknown:
        lines.append(f"               unknown: {', '.join(unknown)} (--source-tokens NAME=TOKENS says a source's size)")
    return lines


def _memory_lines(plan: Plan) -> list[str]:
    memory = plan.here
    lines = ["", f"memory per {'GPU' if plan.cluster.gpu.is_gpu else 'process'}, at its largest ({memory.moment})"]
    lines += [f"  {term:<24}{as_bytes(count):>14}" for term, count in memory.terms.items()]
    lines += [
        f"  {'together':<24}{as_bytes(memory.total):>14}   of {as_bytes(plan.cluster.gpu.memory_bytes)}",
        "",
    ]
    terms = ("weights", "gradients", "optimizer", "master copies", "activations", "loss head")
    unit, scale = ("GiB", GIB) if memory.total >= GIB else ("MiB", 2**20)
    names = "".join(f"{term.replace('master copies', 'master'):>12}" for term in terms)
    lines.append(f"  {'layout':<24}{names}{'other':>10}{'together':>10}  {unit}")
    for name, other in plan.memory.items():
        values = [other.terms.get(term, 0) for term in terms]
        rest = other.total - sum(values)
        figures = "".join(f"{value / scale:>12,.1f}" for value in values)
        figures += f"{rest / scale:>10,.1f}{other.total / scale:>10,.1f}"
        lines.append(f"  {name:<24}{figures}  {_fitting(other, plan.cluster)}")
    host = memory.host_total * plan.cluster.per_machine
    besides = [term for term, count in memory.host.items() if term != "weights while loading" and count]
    lines.append(
        f"  CPU memory, each machine {as_bytes(host):>13}"
        + f" (weights while loading{''.join(f', {term}' for term in besides)})"
    )
    return lines


def _fitting(memory: Memory, cluster: Cluster) -> str:
    return "does not fit" if not fits(memory, cluster) else "fits narrowly" if fits_narrowly(memory, cluster) else "fits"


def _cost_lines(plan: Plan) -> list[str]:
    lines = [""]
    if plan.hours is None:
        lines.append(f"  time         unknown: {plan.speed_origin}")
    else:
        hours = f"{plan.hours:,.0f}" if plan.hours >= 10 else f"{plan.hours:.2g}"
        days = f" ({plan.hours / 24:,.1f} days)" if plan.hours > 48 else ""
        lines.append(f"  time         {hours} hours{days}, {plan.gpu_hours:,.0f} GPU-hours ({plan.speed_origin})")
        if plan.price_per_gpu_hour is not None and plan.gpu_hours is not None:
            cost = plan.gpu_hours * plan.price_per_gpu_hour
            lines.append(f"  cost         {cost:,.0f} at {plan.price_per_gpu_hour:g} per GPU-hour")
        else:
            lines.append("  cost         PRICE=2.5 (--price-per-gpu-hour) says what a GPU-hour costs")
    lines += [
        f"  {'disk' if not index else '':<12} {as_bytes(count):>12}  {what}"
        for index, (what, count) in enumerate(plan.disk.items())
    ]
    return lines


def _closing_lines(plan: Plan) -> list[str]:
    lines = [""]
    lines += [f"  conflict: {sentence}" for sentence in plan.conflicts]
    lines += [f"  note: {sentence}" for sentence in plan.notes]
    return [*lines, plan.verdict]


def as_values(plan: Plan) -> dict[str, Any]:
    """The plan for programs."""
    return {
        "recipe": f"{plan.recipe.size}/{plan.recipe.name}",
        "gpus": {"name": plan.cluster.gpu.name, "machines": plan.cluster.machines, "per_machine": plan.cluster.per_machine},
        "layout": plan.chosen.name,
        "parameters": plan.shape.parameters,
        "steps": None if plan.steps is None else dataclasses.asdict(plan.steps),
        "epochs": dict(plan.epochs),
        "memory": {
            name: {"bytes": memory.total, "moment": memory.moment, "terms": dict(memory.terms), "host": dict(memory.host)}
            | {"fits": fits(memory, plan.cluster)}
            for name, memory in plan.memory.items()
        },
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "disk": dict(plan.disk),
        "conflicts": plan.conflicts,
        "notes": plan.notes,
        "fits": plan.fits,
        "verdict": plan.verdict,
    }


def _source_tokens(texts: Sequence[str]) -> dict[str, float]:
    """Read `name=20e9`. Raises ValueError where it is something else."""
    sizes = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            sizes[name] = float(number)
        except ValueError:
            raise ValueError(f"--source-tokens {text!r}: write NAME=TOKENS, such as python=20e9") from None
        if not 0 < sizes[name] < float("inf"):
            raise ValueError(f"--source-tokens {text!r}: a size is above 0")
    return sizes


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m codetune.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", required=True, help="YAML file, such as recipes/stage1/7b.yaml")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="section.key=value", help="settings to override"
    )
    parser.add_argument("--gpus", help="8xH100, 2x8xA100-80, ...; none: this machine's CPU, for embedded sizes")
    parser.add_argument("--accelerate", help="file in recipes/accelerate; none: the simplest layout that fits")
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="PRICE", help="in whatever currency")
    parser.add_argument("--mfu", type=float, default=DEFAULT_MFU, help=f"assumed share of the peak speed ({DEFAULT_MFU})")
    parser.add_argument("--tokens-per-second", type=float, help="of one device, measured, in place of an assumed MFU")
    parser.add_argument(
        "--source-tokens", nargs="+", action="extend", default=[], metavar="NAME=TOKENS", help="size of a source"
    )
    parser.add_argument("--json", action="store_true", help="print values instead of a report")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.set)
        if not 0 < options.mfu <= 1:
            raise ValueError(f"--mfu is {options.mfu}; write a share above 0 and at most 1, such as 0.4")
        for name, value, unit in (
            ("--tokens-per-second", options.tokens_per_second, "such as 3500"),
            ("--price-per-gpu-hour", options.price_per_gpu_hour, "such as 2.5"),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value:g}; write a number above 0, {unit}")
        if not options.gpus and not recipe.embedded:
            raise ValueError(
                "say on which GPUs: make plan GPUS=8xH100 with the same STAGE, SIZE, ARM or RECIPE, or here --gpus 8xH100"
            )
        cluster = parse_cluster(options.gpus or "cpu")
        layout, processes = (None, None) if options.accelerate is None else layout_of_accelerate(Path(options.accelerate))
        plan = make_plan(
            recipe,
            cluster,
            layout=layout,
            mfu=options.mfu,
            tokens_per_second=options.tokens_per_second,
            price_per_gpu_hour=options.price_per_gpu_hour,
            source_tokens=_source_tokens(options.source_tokens),
            recipes=own if (own := Path(options.recipe).parent.parent).joinpath("base").is_dir() else RECIPES,
        )
    except ValueError as error:
        fail(str(error))
    if processes not in (None, cluster.count):
        plan.notes.append(f"{options.accelerate} starts {processes} processes; launch with --num_processes {cluster.count}")
    print(json.dumps(as_values(plan), indent=1) if options.json else report(plan))


if __name__ == "__main__":
    main()
