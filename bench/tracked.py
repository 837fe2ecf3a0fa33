"""Peaks of a training step without its memory: torch's `MemTracker` over fake tensors, with the very model code.

What comes in: a `Job` of one process on a CPU. What goes out: the most bytes that a step of it would hold, by torch's own
account. Nothing is allocated, so that it runs at 7B and 34B on any machine; kernels are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.overrides import TorchFunctionMode

from codetune import adapter
from codetune.memory import Job


def make_model(job: Job) -> Any:
    """The model of a job as training has it: fused head, attention, checkpointing, autocast around its forward pass."""
    from accelerate.utils.operations import convert_outputs_to_fp32
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = job.shape
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    config._attn_implementation = job.attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if job.weights_bf16 else torch.float32)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.train()
    adapter.add_fused_head(model)
    if job.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if job.bf16:  # what Accelerate does to a model of one process or DDP
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward))
    return model


def make_batch(job: Job, documents: int = 4) -> dict[str, torch.Tensor]:
    """One micro-batch of rows of so many documents each, ids drawn at random."""
    rows, tokens = job.rows, job.sequence_tokens
    positions_T = torch.arange(tokens // documents).repeat(documents)
    ids_BT = torch.randint(3, job.shape.vocabulary, (rows, tokens))
    return {
        "input_ids": ids_BT,
        "labels": ids_BT.clone(),
        "position_ids": positions_T.expand(rows, tokens).contiguous(),
    }


def step(
    job: Job,
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, torch.Tensor]],
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Forward and backward of each micro-batch, and the update, as the trainer makes them."""
    count = torch.tensor(job.accumulation * job.rows * (job.sequence_tokens - 1))
    fused = {"fused_lm_head": True} if job.fused_head else {}
    for batch in batches:
        before_each()
        loss = model(**batch, use_cache=False, num_items_in_batch=count, **fused).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


class EveryTokenLearnt(TorchFunctionMode):
    """Picks of elements by truth values take all of them: fake tensors have no values, and nearly all labels are learnt."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            picked, mask = args
            return picked.flatten(0, mask.dim() - 1).clone()
        return func(*args, **(kwargs or {}))


def tracked_peak(job: Job) -> tuple[int, int]:
    """Parameters, and the most bytes that the second step holds, weights and optimizer state included."""
    assert job.layout == "single" and not job.gpu
    with FakeTensorMode():
        model = make_model(job)
        optimizer = make_optimizer(model)
        batches = [make_batch(job) for _ in range(job.accumulation)]
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *(value for batch in batches for value in batch.values()))
        with tracker, EveryTokenLearnt():
            for _ in range(2):  # the first one makes the optimizer's state
                step(job, model, optimizer, batches, before_each=tracker.reset_mod_stats)
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        return sum(parameter.numel() for parameter in model.parameters()), int(peak)
