import json
from pathlib import Path

import pytest

from codetune.shape import ModelShape, known_shape, shape_from_dict, shape_of

# Code Llama's sizes: parameters with 32,000 and with 32,016 rows, worked out from the architecture (Llama 2; paper Sec. 2.1)
PARAMETERS = {
    "7b": (6_738_415_616, 6_738_546_688),
    "13b": (13_015_864_320, 13_016_028_160),
    "34b": (33_743_970_304, 33_744_232_448),
    "70b": (68_976_648_192, 68_976_910_336),
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_of_the_papers_sizes_are_exact(size: str) -> None:
    plain, infill = (known_shape(size, infill_tokens) for infill_tokens in (False, True))
    assert plain is not None and infill is not None
    assert (plain.parameters, infill.parameters) == PARAMETERS[size]


def test_smollm2_is_counted_with_its_one_table() -> None:
    shape = known_shape("smollm2-135m", infill_tokens=False)
    assert shape is not None and shape.parameters == 134_515_008  # what its model page says
    grown = known_shape("smollm2-135m", infill_tokens=True)
    assert grown is not None and grown.vocabulary == 49_160


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_library(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=97,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    assert shape_of(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_operations_of_a_hand_worked_model() -> None:
    shape = ModelShape(hidden=4, layers=1, heads=1, kv_heads=1, intermediate=8, vocabulary=10, context=6, head_size=4)
    assert shape.layer_matrices == 160
    assert shape.training_flops_per_token(6) == 1344  # 6 * (160 + 40) + 3 * 48


def test_a_config_file_says_the_same_as_the_object(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
    config.save_pretrained(tmp_path)
    assert shape_from_dict(json.loads((tmp_path / "config.json").read_text()), "here") == shape_of(config)


@pytest.mark.parametrize(
    ("change", "said"), [({"attention_bias": True}, "attention_bias"), ({"hidden_size": None}, "`hidden_size` is missing")]
)
def test_other_architectures_are_refused(change: dict[str, object], said: str) -> None:
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    config |= {"max_position_embeddings": 16}
    with pytest.raises(ValueError, match=said):
        shape_from_dict({**config, **change}, "some/config.json")
