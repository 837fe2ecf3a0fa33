"""How much memory training takes, in closed form: per term, for one rank, at the moment of the step that needs most.

What comes in: a `Job` (model shape, layout, ranks, rows, precision, attention, head). What goes out: `Memory`, whose terms
add up to the peak. No torch and no weights. The trade: closed forms follow the code of Llama in transformers, of trl's
head, DeepSpeed and FSDP2 as installed, operation by operation, and must be read again when one of them changes;
`bench/plan_memory.py` compares them with torch's memory tracking of that very code under fake tensors at 7B and 34B, and
with measured peaks.

Names of axes: H hidden, I intermediate, Q all queries (heads x head size), T tokens of a row, V vocabulary, N parameters.

How the peak is found: a step passes through a few moments at which something is largest (end of forward, in the head, first
and last layer's backward, update). Between them memory changes linearly, so the peak is at one of them. What stands all the
while (weights, optimizer) is the same at each.

What it does not do: fragmentation and libraries' own memory on a GPU are an assumption (`ALLOCATOR_FRACTION`,
`CONTEXT_BYTES`), not a measurement; sequence parallelism is not modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from codetune.shape import ModelShape

GIB = 2**30

# trl's fused head works on tiles of this many tokens and pieces. Without Triton it makes fp32 copies of a tile, 29 bytes a
# logit at once, so that there our tiles are smaller (adapter.add_fused_head).
HEAD_TOKENS, HEAD_PIECES = 4096, 32768
CPU_HEAD_TOKENS = 512

# DeepSpeed's defaults, in elements; recipes/accelerate leaves them as they are
ZERO_BUCKET = 500_000_000  # gradients gathered before they are reduced
ZERO_LIVE = 1_000_000_000  # gathered weights kept at once under ZeRO-3
ZERO_SUB_GROUP = 1_000_000_000  # of the optimizer's update under ZeRO-3

# Assumed of a GPU, not measured: the driver's context and kernels, NCCL's buffers where there are several ranks, and what
# the caching allocator holds beyond what is in use.
CONTEXT_BYTES = GIB // 2
NCCL_BYTES = GIB
ALLOCATOR_FRACTION = 0.05

LAYOUTS = ("single", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2")
SHARDED_WEIGHTS = ("zero3", "zero3_offload", "fsdp2")
DEEPSPEED = ("zero2", "zero3", "zero3_offload")


@dataclass(frozen=True)
class Lora:
    """Adapters of this rank beside linear layers; the parent's weights are frozen."""

    rank: int
    target_modules: tuple[str, ...]
    trained_rows: int = 0  # of embedding and head: the new tokens
    quantized: bool = False  # the layers' matrices in 4 bits (nf4)
    double_quantized: bool = True

    def parameters(self, shape: ModelShape) -> int:
        """Trained weights. Example: rank 2 on q_proj of hidden 4, one head of 4, one layer: 2 * (4 + 4) = 16"""
        inner = {"q_proj": shape.queries, "k_proj": shape.keys, "v_proj": shape.keys, "o_proj": shape.queries}
        wide = ("gate_proj", "up_proj", "down_proj")
        pairs = sum(
            self.rank * (shape.hidden + (shape.intermediate if name in wide else inner[name]))
            for name in self.target_modules
        )
        return shape.layers * pairs + self.trained_rows * shape.hidden * (1 if shape.tied else 2)


@dataclass(frozen=True)
class Job:
    """What decides the memory of one rank."""

    shape: ModelShape
    sequence_tokens: int
    rows: int = 1  # of a micro-batch
    layout: str = "single"
    ranks: int = 1
    ranks_per_machine: int = 1
    accumulation: int = 1
    bf16: bool = True  # arithmetic
    weights_bf16: bool = False  # the weights that the optimizer updates, where no layout keeps its own copy
    attention: str = "sdpa"
    isolated: bool = True  # packed documents do not see each other
    fused_head: bool = True
    checkpointing: bool = False
    gpu: bool = True  # else a CPU: the head's kernels differ, and there is no context
    lora: Lora | None = None
    background_saves: bool = False  # a copy of weights and optimizer state is written while training goes on

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence_tokens

    @property
    def parameters(self) -> int:
        return self.shape.parameters

    @property
    def trained(self) -> int:
        return self.parameters if self.lora is None else self.lora.parameters(self.shape)

    @property
    def autocast(self) -> bool:
        """fp32 weights are cast to bf16 for each product, and the residual stream stays fp32."""
        return self.bf16 and not self.weights_bf16 and self.layout in ("single", "ddp")

    @property
    def compute_bytes(self) -> int:
        """Of an element in matrix products."""
        return 2 if self.bf16 or self.weights_bf16 else 4

    @property
    def residual_bytes(self) -> int:
        """Of an element of the residual stream: the embedding's own type."""
        return 4 if self.autocast else self.compute_bytes

    @property
    def mask_elements(self) -> int:
        """Of the mask that keeps packed documents apart; flash attention needs none."""
        masked = self.isolated and self.attention in ("sdpa", "eager")
        return self.rows * self.sequence_tokens**2 if masked else 0


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak, by term, and of its share of the machine's own memory."""

    terms: Mapping[str, int]
    moment: str
    host: Mapping[str, int] = field(default_factory=dict)  # CPU memory, by term, of one rank

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def resting(self) -> int:
        """What stands between steps: the rest comes and goes within one."""
        return self.terms.get("weights", 0) + self.terms.get("optimizer", 0) + self.terms.get("master copies", 0)

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def peak_memory(job: Job) -> Memory:
    """The peak of one rank.

    Example: ZeRO-3 over 8 ranks holds 2N/8 of weights, 2N/8 of gradients, 8N/8 of Adam's state and 4N/8 of master weights
    """
    standing = _standing(job)
    moments = _moments(job)
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    terms = dict(standing)
    for term, count in moments[name].items():
        terms[term] = terms.get(term, 0) + count
    if job.gpu:
        libraries = CONTEXT_BYTES + (NCCL_BYTES if job.ranks > 1 else 0)
        terms["allocator and context"] = libraries + round(ALLOCATOR_FRACTION * sum(terms.values()))
    else:
        terms["copy being saved"] = _copy_being_saved(job)
    return Memory({term: count for term, count in terms.items() if count}, name, _host(job))


# ---------------------------------------------------------------------------------------------------------------------
# What stands


def _standing(job: Job) -> dict[str, int]:
    """Weights, optimizer's state, master copies, and buffers that are allocated once."""
    n, ranks = job.parameters, job.ranks
    weight = job.compute_bytes if job.layout in DEEPSPEED else 2 if job.weights_bf16 else 4
    if job.lora is not None:
        return _standing_of_lora(job)
    if job.layout in ("single", "ddp"):
        return {"weights": weight * n, "optimizer": 2 * weight * n, "buffers": weight * n if job.layout == "ddp" else 0}
    if job.layout == "fsdp2":
        shard = -(-n // ranks)
        return {"weights": 4 * shard, "optimizer": 8 * shard}
    shard = -(-n // ranks)
    weights = weight * (n if job.layout == "zero2" else shard)
    if job.layout == "zero3_offload":
        return {"buffers": _bucket(job)}
    return {
        "weights": weights,
        "gradients": weight * shard if job.layout == "zero3" else 0,  # one flat buffer, made at the start
        "optimizer": 8 * shard,
        "master copies": 4 * shard,
        "buffers": _bucket(job),
    }


def _bucket(job: Job) -> int:
    return job.compute_bytes * ZERO_BUCKET


def frozen_bytes(shape: ModelShape, lora: Lora, weights_bf16: bool) -> int:
    """Of the parent's weights under an adapter.

    nf4: half a byte a weight, and a scale for each block of 64, in fp32, or quantized once more: 8 bits, and an fp32 scale
    for each 256 of them.
    """
    weight = 2 if weights_bf16 else 4
    if not lora.quantized:
        return weight * shape.parameters
    matrices = shape.layers * shape.layer_matrices
    scales = matrices // 64 + 4 * (matrices // (64 * 256)) if lora.double_quantized else 4 * (matrices // 64)
    return matrices // 2 + scales + weight * (shape.parameters - matrices)


def _standing_of_lora(job: Job) -> dict[str, int]:
    """The frozen weights, and fp32 weights, gradients and state of the adapter."""
    assert job.lora is not None
    frozen = frozen_bytes(job.shape, job.lora, job.weights_bf16)
    shards = job.ranks if job.layout in SHARDED_WEIGHTS else 1
    states = job.ranks if job.layout in (*DEEPSPEED, "fsdp2") else 1
    terms = {"weights": -(-frozen // shards) + 4 * job.trained // shards, "optimizer": 8 * job.trained // states}
    terms["buffers"] = 4 * job.trained if job.layout == "ddp" else _bucket(job) if job.layout in DEEPSPEED else 0
    return terms


# ---------------------------------------------------------------------------------------------------------------------
# What comes and goes in a step


def layer_activations(job: Job) -> int:
    """Bytes that one layer keeps for its backward pass, its input among them.

    By element of H and token: each norm keeps its input in fp32 (4) and what it is scaled from (the residual's type); the
    input of the matrices behind it is kept once, or under autocast once for each of them, as each casts it anew; then
    queries, keys and values as attention takes them, and its output. The MLP keeps gate, up, the activated gate and their
    product. Under a frozen parent a norm keeps its input only, and each adapter a copy of what goes into it.
    """
    shape, c, r = job.shape, job.compute_bytes, job.residual_bytes
    attention = 2 * shape.queries + 2 * (shape.keys if _grouped(job) else shape.queries)
    if job.lora is None:
        inputs = 5 * c if job.autocast else 2 * c
        per_token = shape.hidden * (2 * (4 + r) + inputs) + c * attention + 4 * c * shape.intermediate
    else:
        targets = len(job.lora.target_modules)
        per_token = shape.hidden * (2 * 4 + 5 * c) + c * (attention + shape.queries) + 4 * c * shape.intermediate
        per_token += targets * c * job.lora.rank
    per_token += 4 * shape.heads + 8  # log-sum-exp of attention, and the norms' inverse roots
    return job.tokens * per_token + _attention_map(job)


def _grouped(job: Job) -> bool:
    """Whether attention reads grouped keys and values as they are, or copies of them for each query head."""
    return job.mask_elements == 0 and job.attention != "eager"


def _forward_working(job: Job) -> int:
    """What a layer's forward pass has at once where nothing of it is kept: attention's own, or the MLP's."""
    if not job.checkpointing:
        return 0
    c, shape = job.compute_bytes, job.shape
    return max(_attention_map(job) + 6 * c * shape.queries * job.tokens, 3 * c * shape.intermediate * job.tokens)


def _attention_map(job: Job) -> int:
    """What a layer keeps of tokens x tokens: sdpa the mask as numbers; eager all probabilities, in fp32 and as computed."""
    c = job.compute_bytes
    if job.attention == "eager":
        per_head = 4 + (c if c != 4 else 0) + c
        return job.rows * job.sequence_tokens**2 * job.shape.heads * per_head
    return c * job.mask_elements


def _moments(job: Job) -> dict[str, dict[str, int]]:
    """Bytes by term at each moment that may be the peak."""
    shape, layers = job.shape, job.shape.layers
    c, r, tokens = job.compute_bytes, job.residual_bytes, job.tokens
    layer, entrance = layer_activations(job), r * shape.hidden * tokens
    kept = entrance if job.checkpointing else layer
    if job.autocast and job.lora is None:
        # cast weights: kept for the whole forward pass, and by each layer that is not computed again
        casts = c * layers * shape.layer_matrices
        kept_casts = 0 if job.checkpointing else c * shape.layer_matrices
    else:
        casts = kept_casts = 0
    outside = _outside_layers(job)
    head = _head(job)
    # of a layer's backward: the MLP's gradients while most of what was kept is still there, and one weight's gradient
    working = max(0, 2 * c * shape.intermediate - 2 * r * shape.hidden) * tokens + c * shape.hidden * shape.intermediate
    again = layer - entrance + c * shape.layer_matrices * job.autocast if job.checkpointing else 0
    gradients = _gradients(job)
    stack = layers * (kept + kept_casts)
    gathered = _gathered(job)
    return {
        "forward of the last layer": {
            "gradients": gradients.before,
            "activations": stack + _mask_and_angles(job) + (casts if job.checkpointing else 0) + _forward_working(job),
            "gathered layers": gathered.forward,
        },
        "end of the forward pass": {
            "gradients": gradients.before,
            "activations": stack + outside + (casts if job.checkpointing else 0),
            "loss head": head.forward,
            "gathered layers": gathered.forward,
        },
        "backward of the head": {
            "gradients": gradients.before,
            "activations": stack + outside,
            "loss head": head.backward,
            "gathered layers": gathered.head,
        },
        "backward of the last layer": {
            "gradients": gradients.after_head,
            "activations": stack + again + working + outside - head.kept,
            "gathered layers": gathered.backward,
        },
        "backward of the first layer": {
            "gradients": gradients.after_layers,
            "activations": kept + kept_casts + again + working + _mask_and_angles(job),
            "gathered layers": gathered.backward,
        },
        "backward of the embedding": {
            "gradients": gradients.all,
            "activations": _mask_and_angles(job) + gradients.table_again,
            "gathered layers": gathered.head,
        },
        "update": {"gradients": gradients.update, "buffers": _update_buffers(job)},
    }


@dataclass(frozen=True)
class _Gradients:
    """Bytes that gradients hold, besides what stands, at points of a micro-batch."""

    before: int
    after_head: int
    after_layers: int
    all: int
    update: int  # when all of them have been reduced
    table_again: int  # the embedding's, made whole before it is added to what is there


def _gradients(job: Job) -> _Gradients:
    table = job.shape.table_parameters
    if job.lora is not None:
        count = 4 * job.trained // (job.ranks if job.layout == "fsdp2" else 1)
        return _Gradients(count, count, count, count, count, 0)
    if job.layout in ("single", "ddp"):
        weight = 2 if job.weights_bf16 else 4
        everything = weight * job.parameters
        if job.layout == "ddp" or job.accumulation > 1:
            return _Gradients(everything, everything, everything, everything, everything, weight * table)
        head = weight * (table + job.shape.hidden)
        made_last = weight * (job.shape.layer_parameters + (0 if job.shape.tied else table))
        again = weight * table if job.shape.tied else 0
        return _Gradients(0, head, everything - made_last, everything, everything, again)
    shard = -(-job.parameters // job.ranks)
    layer = job.compute_bytes * job.shape.layer_matrices
    if job.layout == "fsdp2":
        # whole layers' gradients in flight: computed, and being reduced
        before = 4 * shard if job.accumulation > 1 else 0
        whole = 4 * shard + 2 * layer
        return _Gradients(before, before + 2 * layer, whole, whole, 4 * shard, 0)
    if job.layout == "zero2":
        before = job.compute_bytes * shard if job.accumulation > 1 else 0
        whole = job.compute_bytes * shard + layer
        return _Gradients(before, before + layer, whole, whole, whole - layer, job.compute_bytes * table)
    return _Gradients(0, layer, layer, layer, 0, job.compute_bytes * table)  # ZeRO-3's own partition stands


@dataclass(frozen=True)
class _Gathered:
    """Whole weights that a rank holds for a while: of the layers in forward and in backward, and of the head."""

    forward: int
    backward: int
    head: int


def _gathered(job: Job) -> _Gathered:
    shape, c = job.shape, job.compute_bytes
    table = c * shape.table_parameters
    layer = c * shape.layer_parameters
    if job.lora is not None and job.lora.trained_rows:
        # peft lays the trained rows into a copy of each table
        copies = (1 if shape.tied else 2) * table
        return _Gathered(copies, copies, copies)
    if job.layout == "fsdp2":
        # one layer in use, the next one gathered and copied out; embedding apart, final norm and head kept until the end
        return _Gathered(3 * layer + table, 3 * layer + table, table + layer)
    if job.layout in ("zero3", "zero3_offload"):
        live = c * min(shape.parameters, ZERO_LIVE)
        return _Gathered(max(live, table + layer), max(live, 2 * layer), max(live, table))
    return _Gathered(0, 0, 0)


def _update_buffers(job: Job) -> int:
    """fp32 gradients that ZeRO makes of its bf16 partition for the update."""
    if job.lora is not None or job.compute_bytes == 4:
        return 0
    shard = -(-job.parameters // job.ranks)
    if job.layout == "zero2":
        return 6 * shard  # fp32 gradients, and the flat copy they are cast from
    return 4 * min(shard, ZERO_SUB_GROUP) if job.layout == "zero3" else 0


# ---------------------------------------------------------------------------------------------------------------------
# Outside the layers: mask, angles, final norm, head


def _mask_and_angles(job: Job) -> int:
    """The mask as truth values, cosines and sines, ids, labels and positions."""
    angles = 2 * job.residual_bytes * job.shape.head_size
    return job.mask_elements + job.tokens * (angles + 40)


def _final_norm(job: Job) -> int:
    """The last layer's output in fp32, what the norm is scaled from, and the normed states that the head keeps."""
    per_element = (4 + 2 * job.residual_bytes) if job.lora is None else 4 + job.residual_bytes
    return per_element * job.shape.hidden * job.tokens


def _outside_layers(job: Job) -> int:
    return _mask_and_angles(job) + _final_norm(job)


@dataclass(frozen=True)
class _Head:
    forward: int
    backward: int
    kept: int  # of what the forward pass keeps, freed by the head's backward


def _head(job: Job) -> _Head:
    """Bytes of the loss head while it works, besides the normed states it starts from."""
    shape, c, r, tokens, v = job.shape, job.compute_bytes, job.residual_bytes, job.tokens, job.shape.vocabulary
    table, states = shape.table_parameters, shape.hidden * tokens
    kept = _final_norm(job)
    cast = c * table if job.autocast else 0
    if not job.fused_head:
        wide = 4 if c == 2 else 0  # logits are made fp32 for the loss
        forward = tokens * v * (c + wide + 4) + cast
        # log-probabilities (kept), their gradient as it comes and as it goes on
        return _Head(forward, tokens * v * 12 + cast, kept)
    tile_tokens = min(HEAD_TOKENS if job.gpu else CPU_HEAD_TOKENS, tokens)
    tile, used = tile_tokens * HEAD_PIECES * c, tile_tokens * min(v, HEAD_PIECES)
    chunk = tile_tokens * shape.hidden * c
    gradients = 4 * states + (4 * table if job.lora is None else 0)
    compact = r * states  # states that have a label are copied together
    if job.gpu:
        typed = (2 * states + 2 * table) if r == 2 and job.lora is None else 0  # gradients, once more in their own type
        return _Head(compact + tile + cast + chunk, compact + tile + cast + chunk + gradients + typed, kept)
    # without Triton the same in torch, with whole fp32 copies of the tile
    return _Head(
        compact + tile + used * FORWARD_TILES + cast + chunk,
        compact + tile + used * BACKWARD_TILES + cast + chunk + gradients,
        kept,
    )


FORWARD_TILES, BACKWARD_TILES = 12, 29  # bytes of fp32 temporaries for each logit of a tile, on a CPU


# ---------------------------------------------------------------------------------------------------------------------
# CPU memory


def _host(job: Job) -> dict[str, int]:
    """What one rank needs of the machine's memory: weights while they are loaded, and whatever is offloaded."""
    weight = 2 if job.weights_bf16 else 4
    if job.layout == "fsdp2":
        loading = weight * job.parameters // job.ranks_per_machine  # the first rank of a machine loads, the others wait
    elif job.layout in ("zero3", "zero3_offload"):
        loading = weight * job.parameters // job.ranks  # taken apart while it is read
    else:
        loading = weight * job.parameters
    terms = {"weights while loading": loading}
    if job.gpu:
        terms["copy being saved"] = _copy_being_saved(job) // job.ranks_per_machine  # the first rank has it
    if job.layout == "zero3_offload":
        shard = -(-job.parameters // job.ranks)
        terms |= {"optimizer and master weights": 12 * shard, "weights": job.compute_bytes * shard}
        terms["gradients"] = (job.compute_bytes + 4) * shard
    return terms


def _copy_being_saved(job: Job) -> int:
    """What a save in the background writes from; only where a rank holds everything whole."""
    whole = job.background_saves and job.layout in ("single", "ddp") and job.lora is None
    return 3 * (2 if job.weights_bf16 else 4) * job.parameters if whole else 0
