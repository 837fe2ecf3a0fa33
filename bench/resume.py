"""Killed with SIGKILL in mid-training and started again, against the same run left alone.

A tiny Llama and toy rows, made here; `codetune.train` as a command, killed at several moments (at random steps, and while a
checkpoint is being written). What is compared: the final weights, bit for bit, and the rows that the last session read
against the rows that were left to read.

    python -m bench.resume
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from codetune import artifacts
from codetune.recipe import load_recipe
from codetune.tokens import INFILL_CONTENTS, open_codec

MINUTES = 2
SEQUENCE_TOKENS, BATCH_ROWS, STEPS, SAVE_EVERY, GROUP_ROWS = 64, 4, 150, 10, 32


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


def make_run(folder: Path, parent: Path) -> Path:
    """A recipe with its rows."""
    batch_tokens = BATCH_ROWS * SEQUENCE_TOKENS
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
        "optimizer": {"learning_rate": 3.0e-3, "warmup_tokens": 10 * batch_tokens},
        "training": {
            "train_tokens": STEPS * batch_tokens,
            "batch_tokens": batch_tokens,
            "micro_batch_rows": 2,
            "save_tokens": SAVE_EVERY * batch_tokens,
            "log_tokens": batch_tokens,  # the log tells when to kill
        },
    }
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    write_rows(path)
    return path


def write_rows(path: Path) -> None:
    """Rows of two documents each, the same for the same number."""
    recipe = load_recipe(path)
    codec = open_codec(recipe.parent_path)
    count = -(-STEPS * BATCH_ROWS // GROUP_ROWS) * GROUP_ROWS
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


def start(path: Path) -> subprocess.Popen[bytes]:
    source = str(Path(__file__).parents[1] / "src")
    command = [sys.executable, "-m", "codetune.train", "--recipe", str(path)]
    paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill_at(path: Path, step: int, while_saving: bool) -> None:
    """Start the run and kill it at a step, or while the checkpoint of a step is being written."""
    recipe = load_recipe(path)
    process = start(path)
    staging = recipe.checkpoints_dir / f".incomplete-checkpoint-{step}"
    metrics = recipe.run_dir / "metrics.jsonl"
    while process.poll() is None:
        if staging.exists() if while_saving else metrics.exists() and f'"step": {step},' in metrics.read_text():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the run ended by itself with code {process.returncode} before step {step}")


def digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(prog="python -m bench.resume")
    parser.add_argument("--kills", type=int, default=4)
    options = parser.parse_args()
    draw = random.Random(0)
    steps = sorted(draw.sample(range(15, STEPS - 15), options.kills))
    with tempfile.TemporaryDirectory() as name:
        parent = make_parent(Path(name) / "parent")
        alone, killed = make_run(Path(name) / "alone", parent), make_run(Path(name) / "killed", parent)
        if start(alone).wait() != 0:
            raise RuntimeError("the run that was left alone failed")
        for count, step in enumerate(steps):
            saving = count % 2 == 1
            kill_at(killed, -(-step // SAVE_EVERY) * SAVE_EVERY if saving else step, while_saving=saving)
        if start(killed).wait() != 0:
            raise RuntimeError("the run that was killed did not end")
        models = [load_recipe(path).model_dir for path in (alone, killed)]
        equal = digest(models[0]) == digest(models[1])
        session = artifacts.read_json(models[1] / artifacts.MANIFEST)["session"]
    resumed = int(session["resumed_from"].removeprefix("checkpoint-"))
    needed, read = (STEPS - resumed) * BATCH_ROWS, session["rows_read_by_main_rank"]
    verdict = "bit-identical" if equal else "different"
    print(f"killed {options.kills} times near steps {steps} of {STEPS}: final weights {verdict} (to reach: bit-identical)")
    print(f"last session, from step {resumed}: {read} rows read, {needed} needed (to reach: equal)")
    figures = {"identical": equal, "kills": options.kills, "rows_read": read, "rows_needed": needed}
    print("RESULT " + json.dumps(figures | {"reached": equal and read == needed}))


if __name__ == "__main__":
    main()
