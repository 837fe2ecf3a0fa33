"""Terms worked by hand, and peaks against torch's own account of the very model code under fake tensors."""

import dataclasses
from typing import Any

import pytest

from bench.tracked import tracked_peak
from codetune.memory import CPU_HEAD_TOKENS, Job, Lora, frozen_bytes, layer_activations, peak_memory
from codetune.shape import ModelShape, known_shape

SMALL = ModelShape(hidden=4, layers=1, heads=1, kv_heads=1, intermediate=8, vocabulary=10, context=64, head_size=4)
SEVEN = known_shape("7b", infill_tokens=True)
assert SEVEN is not None
N = SEVEN.parameters


def standing(layout: str, ranks: int = 8, **changes: Any) -> dict[str, int]:
    terms = peak_memory(Job(SEVEN, 4096, layout=layout, ranks=ranks, checkpointing=True, **changes)).terms
    return {name: terms.get(name, 0) for name in ("weights", "gradients", "optimizer", "master copies")}


def test_one_process_holds_sixteen_bytes_a_parameter() -> None:
    assert standing("single", 1, accumulation=2) == {
        "weights": 4 * N,
        "gradients": 4 * N,
        "optimizer": 8 * N,
        "master copies": 0,
    }


def test_zero3_shares_sixteen_bytes_a_parameter_over_its_ranks() -> None:
    found = standing("zero3")
    assert found["weights"] + found["optimizer"] + found["master copies"] == pytest.approx(14 * N / 8)
    in_flight = 2 * SEVEN.layer_matrices  # one layer's gradients, before they are reduced
    assert sum(found.values()) in (pytest.approx(16 * N / 8), pytest.approx(16 * N / 8 + in_flight))


def test_zero2_keeps_whole_weights() -> None:
    found = standing("zero2")
    assert (
        found["weights"] == 2 * N
        and found["optimizer"] == pytest.approx(N)
        and found["master copies"] == pytest.approx(N / 2)
    )


def test_fsdp2_shares_fp32_weights() -> None:
    found = standing("fsdp2")
    assert found["weights"] == pytest.approx(N / 2) and found["optimizer"] == pytest.approx(N)


def test_offload_moves_the_optimizer_to_the_machines_memory() -> None:
    memory = peak_memory(Job(SEVEN, 4096, layout="zero3_offload", ranks=8, ranks_per_machine=8, checkpointing=True))
    assert "optimizer" not in memory.terms
    assert memory.host["optimizer and master weights"] == pytest.approx(12 * N / 8)


def test_ddp_holds_its_buckets_besides() -> None:
    assert peak_memory(Job(SEVEN, 4096, layout="ddp", ranks=8, checkpointing=True)).terms["buffers"] == 4 * N


@pytest.mark.parametrize("layout", ["zero2", "zero3", "zero3_offload", "fsdp2"])
def test_more_ranks_never_need_more_memory_each(layout: str) -> None:
    totals = [
        peak_memory(Job(SEVEN, 4096, layout=layout, ranks=ranks, checkpointing=True)).total for ranks in (2, 8, 64, 512)
    ]
    assert totals == sorted(totals, reverse=True)


def test_a_layer_keeps_what_was_counted_by_hand() -> None:
    # fp32, 16 tokens, no mask: two norms of 4 + 4 bytes, two inputs of 4; q, k, v and out of 4 elements; 4 x 8 of the MLP
    job = Job(SMALL, 16, bf16=False, attention="flash_attention_2")
    assert layer_activations(job) == 16 * (4 * (4 + 4 + 4 + 4 + 4 + 4) + 4 * 16 + 4 * 4 * 8 + 4 + 8)
    masked = dataclasses.replace(job, attention="sdpa")
    assert layer_activations(masked) - layer_activations(job) == 4 * 16 * 16


def test_four_bit_weights_are_half_a_byte_and_their_scales() -> None:
    lora = Lora(8, ("q_proj",), quantized=True, double_quantized=False)
    rest = SEVEN.parameters - SEVEN.layers * SEVEN.layer_matrices
    assert frozen_bytes(SEVEN, lora, weights_bf16=True) == SEVEN.layers * SEVEN.layer_matrices * 9 // 16 + 2 * rest


def test_adapters_have_the_parameters_that_peft_makes() -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config.num_key_value_heads, config.vocab_size = 2, 64
    model = peft.get_peft_model(LlamaForCausalLM(config), peft.LoraConfig(r=4, target_modules=list(names)))
    shape = ModelShape(32, 2, 4, 2, 48, 64, 2048, 8)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert Lora(4, names).parameters(shape) == trained


# ---------------------------------------------------------------------------------------------------------------------
# Against torch's tracker

MIDDLE = ModelShape(512, 4, 8, 2, 1376, 8192, 4096, 64)


@pytest.mark.parametrize(
    "job",
    [
        Job(MIDDLE, 1024, bf16=True, checkpointing=True, accumulation=2, gpu=False),
        Job(MIDDLE, 512, rows=3, bf16=False, gpu=False),
        Job(MIDDLE, 1024, bf16=True, fused_head=False, gpu=False),
        Job(MIDDLE, 2048, weights_bf16=True, checkpointing=True, gpu=False),
        Job(dataclasses.replace(MIDDLE, tied=True), 1024, bf16=False, fused_head=False, checkpointing=True, gpu=False),
    ],
    ids=["autocast-accumulated", "fp32-rows", "autocast-logits", "bf16-weights", "fp32-tied-logits"],
)
def test_a_step_peaks_where_torch_says(job: Job) -> None:
    parameters, peak = tracked_peak(job)
    memory = peak_memory(job)
    assert parameters == job.parameters
    assert memory.total - memory.resting == pytest.approx(peak - memory.resting, rel=0.1)


def test_the_fused_head_works_in_tiles_of_the_size_that_is_counted_with() -> None:
    from trl.kernels import chunked_logprob

    from codetune import adapter

    adapter.settle_head_tiles()
    assert chunked_logprob.TOKEN_CHUNK_SIZE == CPU_HEAD_TOKENS
