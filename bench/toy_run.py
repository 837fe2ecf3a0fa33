"""A run for benchmarks of the trainer: a tiny Llama, rows of random tokens, held-out samples, all made here in a second.

What comes in: a folder and how long the run is to be. What goes out: the path of a recipe whose rows and parent are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from codetune import artifacts
from codetune.recipe import load_recipe
from codetune.tokens import INFILL_CONTENTS, open_codec

SEQUENCE_TOKENS, BATCH_ROWS, GROUP_ROWS = 64, 4, 32
BATCH_TOKENS = BATCH_ROWS * SEQUENCE_TOKENS


def make_parent(folder: Path) -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def value(x): return x + 1"] * 50, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"extra_special_tokens": list(INFILL_CONTENTS)})
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=320, max_position_embeddings=SEQUENCE_TOKENS)).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_run(folder: Path, parent: Path, steps: int, held_out_samples: int = 0, **training: int) -> Path:
    """A recipe with its rows; `training` is put over its settings."""
    tree = {
        "name": "stage1",
        "size": "bench",
        "parent": str(parent),
        "runs": str(folder / "runs"),
        "data": {
            "sequence_tokens": SEQUENCE_TOKENS,
            "sources": {"toy": {"kind": "generated", "share": 1.0}},
            "packing": {"group_rows": GROUP_ROWS},
        },
        "model": {"precision": "fp32"},
        "optimizer": {"learning_rate": 3.0e-3, "warmup_tokens": 10 * BATCH_TOKENS},
        "training": {
            "train_tokens": steps * BATCH_TOKENS,
            "batch_tokens": BATCH_TOKENS,
            "micro_batch_rows": 2,
            "log_tokens": BATCH_TOKENS,  # the log tells when to kill
            **training,
        },
        "probes": {"infill_prompts": 0},
    }
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    write_rows(path, steps, held_out_samples)
    return path


def write_rows(path: Path, steps: int, held_out_samples: int) -> None:
    """Rows of two documents each, the same for the same number; held-out samples of plain text, as long as a row."""
    recipe = load_recipe(path)
    codec = open_codec(recipe.parent_path)
    count = -(-steps * BATCH_ROWS // GROUP_ROWS) * GROUP_ROWS
    writer = artifacts.LaneWriter(recipe.rows_dir / "lane-00000.arrow", codec.vocabulary_size)
    draw = np.random.default_rng(0)
    rows = []
    for number in range(count):
        first = int(draw.integers(8, SEQUENCE_TOKENS - 8))
        rows.append(
            artifacts.PackedRow(
                input_ids=draw.integers(2, 258, SEQUENCE_TOKENS),
                document_lengths=[first, SEQUENCE_TOKENS - first],
                ids=[f"{number} {place}" for place in range(2)],
                sources=[0, 0],
                layouts=[0, 0],
                kinds=[0, 0],
                passes=[0, 0],
                pieces=[0, 0],
                loss_runs=[],
            )
        )
    writer.write(rows)
    writer.close()
    samples = [
        artifacts.HeldOutSample(draw.integers(2, 258, SEQUENCE_TOKENS).tolist(), "plain", "toy", f"held {number}")
        for number in range(held_out_samples)
    ]
    if samples:
        artifacts.write_held_out(recipe.rows_dir / artifacts.HELD_OUT, samples, codec.vocabulary_size)
    manifest = {
        "recipe": recipe.to_dict(),
        "fingerprint": "bench",
        "tokenizer": codec.fingerprint,
        "rows": count,
        "lanes": 1,
    }
    manifest |= {"vocabulary_size": codec.vocabulary_size, "sequence_tokens": SEQUENCE_TOKENS, "group_rows": GROUP_ROWS}
    names = {"source_names": ["toy"], "layout_names": list(artifacts.LAYOUTS), "kind_names": list(artifacts.KINDS)}
    artifacts.finish_rows(recipe.rows_dir, ["lane-00000.arrow"], codec.vocabulary_size, manifest | names)
