"""A run for benchmarks of the trainer: a tiny Llama, rows of random tokens, held-out samples, all made here in a second.

What comes in: a folder and how long the run is to be. What goes out: the path of a recipe whose rows and parent are there,
and what a launch of it left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from codetune import artifacts
from codetune.recipe import load_recipe
from codetune.tokens import INFILL_CONTENTS, open_codec

SEQUENCE_TOKENS, BATCH_ROWS, GROUP_ROWS = 64, 4, 32
BATCH_TOKENS = BATCH_ROWS * SEQUENCE_TOKENS


def make_parent(folder: Path, vocabulary: int = 320) -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer.

    ZeRO-3 keeps matrices of fewer than 100,000 weights whole on every rank; a `vocabulary` of 2048 is above that.
    """
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
    config = LlamaConfig(**shape, vocab_size=vocabulary, max_position_embeddings=SEQUENCE_TOKENS)
    LlamaForCausalLM(config).save_pretrained(folder)
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


# ---------------------------------------------------------------------------------------------------------------------
# Launching it, and what it left


def environment() -> dict[str, str]:
    """Of a command that is to import this repository, and to run the ranks of a GPU launch on the CPU."""
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root / "src"), str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": paths, "CODETUNE_CPU_RANKS": "1", "OMP_NUM_THREADS": "1"}


def launch(
    config: str,
    ranks: int,
    path: Path,
    poison: int | None = None,
    rows: Path | None = None,
    kill_at: int | None = None,
    changes: Sequence[str] = (),
) -> None:
    """`codetune.train` by `accelerate launch` with a file of ours; the rest is what `rank_job` is to do to it.

    Raises:
        RuntimeError: it ended otherwise than it should.
    """
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--main_process_port", "0"]
    command += ["--config_file", str(root / f"recipes/accelerate/{config}.yaml"), "--num_processes", str(ranks)]
    command += ["-m", "bench.rank_job", json.dumps({"poison": poison, "rows": rows and str(rows), "kill_at": kill_at})]
    command += ["--recipe", str(path), *(["--set", *changes] if changes else [])]
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=False)
    if (done.returncode == 0) != (kill_at is None):
        raise RuntimeError(
            f"{config}, {ranks} rank(s): exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def losses(path: Path) -> list[float]:
    """Training loss of each step."""
    lines = (load_recipe(path).run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def largest_difference(one: Path, other: Path) -> float:
    """Of the exported weights of two runs; nan where one is not finite."""
    from safetensors.torch import load_file

    a, b = (load_file(load_recipe(path).model_dir / "model.safetensors") for path in (one, other))
    assert set(a) == set(b)
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def rows_of_steps(path: Path) -> dict[int, set[int]]:
    """Step -> all rows that a rank read in it, in any session."""
    found: dict[int, set[int]] = {}
    for part in path.parent.glob(f"{path.name}.*"):
        for line in part.read_text(encoding="utf-8").splitlines():
            step, numbers = json.loads(line)
            found.setdefault(step, set()).update(numbers)
    return found
