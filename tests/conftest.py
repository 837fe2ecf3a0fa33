"""A tiny tokenizer, a two-layer Llama checkpoint and small rows: built here, so that no test touches the network."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared by tests side by side
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from codetune import artifacts
from codetune.recipe import Recipe, load_recipe
from codetune.tokens import INFILL_CONTENTS, Codec, open_codec

SEQUENCE_TOKENS = 64
GROUP_ROWS = 8
SOURCES = ("python", "prose")
WORDS = (
    "def",
    "return",
    "value",
    "total",
    "for",
    "in",
    "range",
    "if",
    "x",
    "y",
    "+",
    "=",
    "1",
    "0",
    "(",
    ")",
    ":",
    "\n    ",
    "\n",
)


def toy_text(seed: int, words: int) -> str:
    """Text that looks a little like code; the same for the same seed."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """BPE without an implicit leading space; a space is the visible piece `▁`; the four infilling tokens are added ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|\n|▁?[^\sA-Za-z▁]+|▁"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator([toy_text(seed, 60) for seed in range(40)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"extra_special_tokens": list(INFILL_CONTENTS)})
    return fast


@pytest.fixture(scope="session")
def tiny_parent(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama checkpoint with random weights and its tokenizer; tests must not write into it."""
    return save_tiny_llama(tmp_path_factory.mktemp("parent") / "model", tiny_tokenizer)


@pytest.fixture(scope="session")
def save_llama() -> Callable[..., Path]:
    """`save_llama(folder, tokenizer, hidden_size=64)` saves a Llama of another size."""
    return save_tiny_llama


def save_tiny_llama(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """Save a Llama of about 50,000 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 8) * 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_codec(tiny_parent: Path) -> Codec:
    return open_codec(tiny_parent)


@pytest.fixture(scope="session")
def processes() -> Any:
    """Real processes without the seconds of importing torch in each of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["codetune.train"])
    return context


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """`wait_until(condition, running)`: look until it holds, for some minutes at most and while `running()` is true."""

    def wait(condition: Callable[[], bool], running: Callable[[], bool] = lambda: True, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert running(), "the process ended before what was waited for"
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.0005)

    return wait


UNUSED_TOKEN = 5  # a byte that no toy text has


@dataclasses.dataclass(frozen=True)
class Poison:
    """A parent in which the embedding of one token is NaN, and rows that are given that token."""

    parent: Path

    def row(self, rows_dir: Path, number: int) -> None:
        """Write a row anew, with the token in it."""
        rows = artifacts.open_rows(rows_dir)
        lane = number % rows.lanes
        packed = []
        for other in range(lane, len(rows), rows.lanes):
            row = {item.name: rows.row(other)[item.name] for item in dataclasses.fields(artifacts.PackedRow)}
            ids = np.array(row["input_ids"])
            assert UNUSED_TOKEN not in ids
            ids[1] = UNUSED_TOKEN if other == number else ids[1]
            packed.append(artifacts.PackedRow(**{**row, "input_ids": ids}))
        writer = artifacts.LaneWriter(rows_dir / f"lane-{lane:05d}.arrow", rows.manifest["vocabulary_size"])
        writer.write(packed)
        writer.close()


@pytest.fixture(scope="session")
def poison(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Poison:
    """Rows that are not finite in the middle of the model."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(tiny_parent, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][UNUSED_TOKEN] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Poison(folder)


@pytest.fixture
def make_run(make_run_in: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`make_run(**{"training.train_tokens": 4096})` writes a recipe and its rows, and returns the recipe's path."""
    return functools.partial(make_run_in, tmp_path)


@pytest.fixture(scope="session")
def make_run_in(tiny_parent: Path, tiny_codec: Codec) -> Callable[..., Path]:
    """`make_run`, for a folder that is given; equal settings make equal runs, whatever the folder and the name."""

    def make(folder: Path, name: str = "stage1", rows: bool = True, **settings: Any) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run_settings(name, folder, tiny_parent, settings)), encoding="utf-8")
        if rows:
            build_toy_rows(load_recipe(path), tiny_codec)
        return path

    return make


def run_settings(name: str, folder: Path, parent: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe of 8 steps of 4 rows."""
    source = {"kind": "folder", "path": "sources", "share": 0.5}
    tree: dict[str, Any] = {
        "name": name,
        "size": "test",
        "parent": str(parent),
        "runs": str(folder / "runs"),
        "seed": 7,
        "data": {
            "sequence_tokens": SEQUENCE_TOKENS,
            "sources": {"python": {**source, "group": "code"}, "prose": {**source}},
            "lanes": 2,
            "packing": {"group_rows": GROUP_ROWS},
        },
        "optimizer": {"learning_rate": 5.0e-3, "warmup_tokens": 512},
        "training": {
            "train_tokens": 8 * 4 * SEQUENCE_TOKENS,
            "batch_tokens": 4 * SEQUENCE_TOKENS,
            "micro_batch_rows": 2,
            "log_tokens": 4 * SEQUENCE_TOKENS,
            "save_tokens": 2 * 4 * SEQUENCE_TOKENS,
            "evaluate_tokens": 4 * 4 * SEQUENCE_TOKENS,
        },
        "model": {"precision": "fp32"},
        "probes": {"infill_prompts": 2, "infill_new_tokens": 6},
    }
    for key, value in changes.items():
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def build_toy_rows(recipe: Recipe, codec: Codec) -> artifacts.Rows:
    """Rows of toy documents in all layouts, as the build writes them, with held-out samples."""
    data, training = recipe.need_data(), recipe.need_training()
    folder, group = recipe.rows_dir, data.packing.group_rows
    needed = training.train_tokens // data.sequence_tokens
    groups = -(-needed // (group * data.lanes))
    files = []
    for lane in range(data.lanes):
        files.append(f"lane-{lane:05d}.arrow")
        writer = artifacts.LaneWriter(folder / files[-1], codec.vocabulary_size)
        for place in range(groups):
            seeds = range((lane * groups + place) * group, (lane * groups + place + 1) * group)
            writer.write([toy_row(codec, seed, data.sequence_tokens) for seed in seeds])
        writer.close()
    artifacts.write_held_out(folder / artifacts.HELD_OUT, held_out_toys(codec), codec.vocabulary_size)
    manifest = {
        "recipe": recipe.to_dict(),
        "fingerprint": "toy",
        "tokenizer": codec.fingerprint,
        "vocabulary_size": codec.vocabulary_size,
        "sequence_tokens": data.sequence_tokens,
        "lanes": data.lanes,
        "group_rows": group,
        "rows": groups * group * data.lanes,
        "source_names": list(SOURCES),
        "layout_names": list(artifacts.LAYOUTS),
        "kind_names": list(artifacts.KINDS),
    }
    artifacts.finish_rows(folder, files, codec.vocabulary_size, manifest)
    return artifacts.open_rows(folder)


def toy_row(codec: Codec, seed: int, sequence_tokens: int) -> artifacts.PackedRow:
    """A row of a few documents, some infilled, with a short tail left for padding."""
    ids: list[list[int]] = []
    layouts: list[int] = []
    draw = random.Random(seed)
    while True:
        text = toy_text(seed * 1000 + len(ids), draw.randint(3, 14))
        layout = draw.randrange(3)
        cut = sorted((draw.randint(0, len(text)), draw.randint(0, len(text))))
        sample = lay_out(codec, text, *cut, artifacts.LAYOUTS[layout])
        if sum(map(len, ids)) + len(sample) > sequence_tokens:
            break
        ids.append(sample)
        layouts.append(layout)
    if not ids:
        ids, layouts = [codec.plain(codec.encode("x"))], [0]
    count = len(ids)
    return artifacts.PackedRow(
        input_ids=np.array([token for sample in ids for token in sample]),
        document_lengths=[len(sample) for sample in ids],
        ids=[hashlib.sha256(f"{seed} {place}".encode()).hexdigest()[:8] for place in range(count)],
        sources=[(seed + place) % len(SOURCES) for place in range(count)],
        layouts=layouts,
        kinds=[0] * count,
        passes=[0] * count,
        pieces=[0] * count,
        loss_runs=[],
    )


def lay_out(codec: Codec, text: str, first: int, second: int, layout: str) -> list[int]:
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    if layout == "psm":
        return codec.psm(codec.encode(prefix), codec.encode_bare(suffix), codec.encode_bare(middle))
    if layout == "spm":
        return codec.spm(codec.encode_bare(suffix), codec.encode(prefix + middle))
    return codec.plain(codec.encode(text))


def held_out_toys(codec: Codec, documents: int = 4) -> list[artifacts.HeldOutSample]:
    """For each document plain text, and PSM and its reference for a cut of either kind."""
    samples = []
    for number in range(documents):
        text = toy_text(10_000_000 + number, 12)
        prefix, middle, suffix = text[:10], text[10:22], text[22:]
        name = SOURCES[number % len(SOURCES)]
        before, inside, after = codec.encode(prefix), codec.encode_bare(middle), codec.encode_bare(suffix)
        samples.append(artifacts.HeldOutSample(codec.plain(codec.encode(text)), "plain", name, f"held {number}"))
        for cut in artifacts.HELD_OUT_CUTS:
            texts = {"cut": cut, "prefix": prefix, "middle": middle, "suffix": suffix}
            counts = {"middle_tokens": len(inside), "middle_characters": len(middle)}
            psm = codec.psm(before, after, inside)
            spm = codec.spm(after, [*before, *inside])
            border = codec.plain([*before, *inside, *after])
            infilled = artifacts.HeldOutSample([], "", name, f"held {number}", **texts, **counts)
            end = len(psm) - 1
            start = end - len(inside)
            samples += [
                dataclasses.replace(infilled, input_ids=psm, layout="psm", middle_start=start, end_position=end),
                dataclasses.replace(infilled, input_ids=spm, layout="spm", middle_start=start, end_position=end),
                dataclasses.replace(infilled, input_ids=border, layout="plain_border", middle_start=1 + len(before)),
                dataclasses.replace(infilled, input_ids=border, layout="plain_joint", middle_start=1 + len(before)),
            ]
    return samples


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the size `smoke` as `make` makes them: base, stage1, lcft, and stage1-lora, an adapter. Tests must not change
    them.

    Tests that use it belong to the group `finished`, so that it is made once.
    """
    from codetune.train import train
    from data_pipelines.base import make_base
    from data_pipelines.build import build

    recipes, runs = Path(__file__).parents[1] / "recipes", tmp_path_factory.mktemp("finished") / "runs"
    for stage in ("base", "stage1", "lcft"):
        recipe = load_recipe(recipes / stage / "smoke.yaml", [f"runs={runs}", "probes.infill_prompts=4"])
        if stage == "base":
            make_base(recipe)
        build(recipe)
        train(recipe)
    settings = [f"runs={runs}", "name=stage1-lora", "probes.infill_prompts=0", "model.lora.rank=4"]
    recipe = load_recipe(recipes / "stage1" / "smoke.yaml", settings)
    shutil.copytree(runs / "smoke" / "stage1" / "rows", recipe.rows_dir)
    train(recipe)
    return runs


@pytest.fixture(scope="session")
def talk() -> Callable[..., list[dict[str, str]]]:
    """`talk(pairs)` gives messages of so many questions and answers."""
    return toy_talk


def toy_talk(pairs: int, words: int = 3, tag: int = 0) -> list[dict[str, str]]:
    turns = []
    for number in range(pairs):
        turns += [
            {"role": "user", "content": f"total {tag} {number} ?"},
            {"role": "assistant", "content": "value " * words + str(number)},
        ]
    return turns


@pytest.fixture(scope="session")
def chat_recipe_in(tiny_parent: Path) -> Callable[..., Path]:
    """`chat_recipe_in(folder, data__lanes=2)` writes a recipe over messages, rehearsal, and triplets that may be there."""

    def make(folder: Path, more: Any = (), **changes: Any) -> Path:
        talks = [*(toy_talk(1 + number % 3, tag=number) for number in range(60)), *more]
        lines = [json.dumps({"id": f"c{number}", "messages": messages}) for number, messages in enumerate(talks)]
        (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
        for name in ("code", "text"):
            (folder / name).mkdir(exist_ok=True)
            for number in range(40):
                text = f"x = {number}\n" + "value + total\n" * (number % 5 + 1)
                (folder / name / f"f{number}.py").write_text(text)
        tree: dict[str, Any] = {
            "name": "instruct",
            "size": "test",
            "parent": str(tiny_parent),
            "runs": str(folder / "runs"),
            "data": {
                "sequence_tokens": 128,
                "chat": {"template": "llama2"},
                "packing": {"group_rows": 64},
                "held_out": {"fraction": 0.1, "documents_per_source": 4},
                "sources": {
                    "chat": {
                        "kind": "jsonl",
                        "role": "instruct",
                        "share": 0.82,
                        "path": str(folder / "chat.jsonl"),
                        "conversation": "messages",
                        "text_column": "messages",
                        "id_column": "id",
                    },
                    "triplets": {
                        "kind": "jsonl",
                        "role": "self_instruct",
                        "share": 0.10,
                        "path": "self_instruct",
                        "conversation": "triplet",
                        "id_column": "id",
                        "optional": True,
                        "max_passes": 3,
                    },
                    "code": {"kind": "folder", "role": "rehearsal_code", "share": 0.06, "path": str(folder / "code")},
                    "text": {"kind": "folder", "role": "rehearsal_text", "share": 0.02, "path": str(folder / "text")},
                },
            },
            "optimizer": {"learning_rate": 1.0e-3},
            "training": {"train_tokens": 128 * 384, "batch_tokens": 512},
        }
        for key, value in changes.items():
            node = tree
            *sections, last = key.split("__")
            for section in sections:
                node = node[section]
            node[last] = value
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return make


@pytest.fixture(scope="session")
def llama2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Llama 2's own tokenizer with the four infill tokens, converted from its `tokenizer.model` and checked."""
    data = os.environ.get("CODETUNE_TEST_DATA")
    if not data:
        pytest.skip("CODETUNE_TEST_DATA is unset: Llama 2's tokenizer.model is not part of the project")
    from codetune.vocabulary import checked_tokenizer, grown_tokenizer, plan_growth

    folder = tmp_path_factory.mktemp("llama2")
    shutil.copyfile(Path(data) / "tokenizers" / "llama2_tokenizer.model", folder / "tokenizer.model")
    tokenizer, _ = checked_tokenizer(folder)
    return grown_tokenizer(tokenizer, plan_growth(tokenizer, 32_000, "Llama 2").infill_ids)
