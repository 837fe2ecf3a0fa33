"""What the scripts of this folder measure on: the embedded code as one file of real documents, and a tokenizer for it.

Nothing here is timed. The corpus is the Python source that comes with this interpreter and its packages, read by the same
readers as a recipe's `installed` sources.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from codetune.recipe import Recipe, SourceSettings, load_recipe
from codetune.tokens import open_codec
from data_pipelines.build import plan_build
from data_pipelines.documents import Document, Drops, plan_source, read_documents
from data_pipelines.held_out import collect_held_out
from data_pipelines.streams import SourceStream

PACKAGES = (
    "python-stdlib",
    "torch",
    "transformers",
    "pandas",
    "numpy",
    "networkx",
    "sympy",
    "datasets",
    "accelerate",
    "trl",
)


def real_code(characters: int, packages: tuple[str, ...] = PACKAGES) -> list[Document]:
    """About so many characters of whole source files."""
    settings = SourceSettings(kind="installed", share=1.0, distributions=packages, extensions=(".py",))
    with tempfile.TemporaryDirectory() as work:
        plan = plan_source("code", settings, 1, Path(work), False)
        found, total = [], 0
        for document in read_documents(plan, 0, 1, 0, Drops(), None):
            found.append(document)
            total += len(document.text)
            if total >= characters:
                break
    return found


def write_parquet(path: Path, documents: list[Document], row_group: int = 200) -> None:
    table = pa.table({"text": [document.text for document in documents], "id": [document.id for document in documents]})
    pq.write_table(table, path, row_group_size=row_group)


def write_jsonl(path: Path, documents: list[Document]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "id": document.id}) + "\n")


def train_tokenizer(folder: Path, documents: list[Document], pieces: int = 16_000) -> Path:
    """A byte-level BPE with the four infilling tokens, saved as a checkpoint's tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from codetune.tokens import INFILL_CONTENTS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in INFILL_CONTENTS])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(str(folder))
    return folder


def recipe_for(folder: Path, parent: Path, sources: dict[str, dict[str, Any]], *, rows: int, **data: Any) -> Recipe:
    """A recipe of 4,096-token rows over the given sources, its runs in `folder`."""
    row_tokens = data.pop("sequence_tokens", 4096)
    tree = {
        "name": "stage1",
        "size": "bench",
        "parent": str(parent),
        "runs": str(folder / "runs"),
        "data": {"sequence_tokens": row_tokens, "sources": sources, **data},
        "training": {"train_tokens": rows * row_tokens, "batch_tokens": row_tokens},
        "optimizer": {"learning_rate": 1.0e-4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return load_recipe(path)


def embedded_recipe(folder: Path, overrides: list[str]) -> Recipe:
    """The tiny stage1 recipe with its runs in `folder`, its parent a tokenizer as `make base` trains it."""
    recipe_path = "recipes/stage1/tiny.yaml"
    parent = Path("runs/tiny/base/model")
    if not (parent / "tokenizer.json").is_file():
        raise ValueError(f"{parent}: no tokenizer; run `make base` first")
    return load_recipe(recipe_path, [f"runs={folder}", f"parent={parent.resolve()}", *overrides])


def lane_streams(recipe: Recipe, work: Path) -> list[SourceStream]:
    """The sources of a recipe as streams of samples, in its first lane."""
    codec = open_codec(recipe.parent_path)
    plan = plan_build(recipe, codec, work)
    held_out = collect_held_out(plan.sources, recipe.need_data().held_out)
    data, drops = recipe.need_data(), Drops()
    return [
        SourceStream(
            source,
            codec,
            data.fim,
            seed=recipe.seed,
            row_tokens=data.sequence_tokens,
            lane=0,
            lanes=data.lanes,
            drops=drops,
            held_out=held_out,
        )
        for source in plan.sources
    ]
