"""The model that is evaluated: what it is called, what its prompts may be, and whether it can infill at all.

What comes in: a checkpoint folder, a Hub id or a server. What goes out: an open engine, an `Asker`, and facts for the
results. A checkpoint can infill when its vocabulary has the four tokens and some training has seen them: the manifest's
count of infilled tokens, here or in a parent, says so; four equal rows of the embedding, as `make base` writes them, say
not.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from codetune.artifacts import MANIFEST, model_hash, read_json
from codetune.generate import EngineSettings, open_engine
from codetune.tokens import CODE_LLAMA_IDS, Codec, InfillIds
from eval.tasks import Asker


class Target:
    """A model that is opened when it is first needed: grading alone never loads it."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self._engine: Any = None

    @property
    def name(self) -> str:
        return str(self.settings.model or self.settings.url)

    @property
    def folder(self) -> Path | None:
        path = Path(self.settings.model or "")
        return path if self.settings.model and path.is_dir() else None

    def engine(self) -> Any:
        if self._engine is None:
            self._engine = open_engine(self.settings)
        return self._engine

    def asker(self) -> Asker:
        """How questions are put to this model."""
        codec = self.engine().codec
        trained = None
        if codec is not None and self.folder is not None:
            trained = infill_trained(self.folder, codec)
        elif codec is not None and getattr(self.engine(), "model", None) is not None:
            trained = infill_trained_in(self.engine().model, codec)
        source = self.settings.tokenizer or (None if self.settings.kind == "server" else self.settings.model)
        return Asker(codec, None if source is None else chat_renderer(source, self.settings.revision), trained)

    def facts(self) -> dict[str, Any]:
        """For the results, without opening anything."""
        facts: dict[str, Any] = {"name": self.name, "revision": self.settings.revision, "kind": self.settings.kind}
        if self.settings.rope_base is not None:
            facts["rope_base"] = self.settings.rope_base
        if self.folder is None:
            return facts
        facts["hash"] = model_hash(self.folder)
        if (self.folder / MANIFEST).is_file():
            manifest = read_json(self.folder / MANIFEST)
            recipe = manifest.get("recipe", {})
            facts |= {key: recipe.get(key) for key in ("size", "parent")} | {"stage": recipe.get("name")}
            facts["tokens_trained"] = manifest.get("tokens")
        return facts

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def hardware() -> dict[str, Any]:
    """The machine, without its name."""
    facts: dict[str, Any] = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "gpus": []}
    with contextlib.suppress(ImportError):
        import torch

        facts["gpus"] = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    return facts


def chat_renderer(source: str, revision: str | None) -> Callable[[str], tuple[int, ...]] | None:
    """A user's message as the checkpoint's own template renders it, as ids; None where it has none.

    The template's text becomes ids as the tokenizer has them, control tokens included: they are the template's.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError):
        return None
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(message: str) -> tuple[int, ...]:
        messages = [{"role": "user", "content": message}]
        made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return tuple(made["input_ids"])

    return render


def infill_trained(folder: Path, codec: Codec) -> bool | None:
    """Whether the infilling tokens of a checkpoint were ever trained; None where nothing tells."""
    if codec.infill is None:
        return False
    if same_rows(folder, codec.infill):
        return False
    found = trained_by_manifest(folder)
    ids = (codec.infill.prefix, codec.infill.suffix, codec.infill.middle, codec.infill.end)
    return True if found is None and ids == CODE_LLAMA_IDS else found


def infill_trained_in(model: Any, codec: Codec) -> bool | None:
    """The same of a model of the Hub, by its weights and ids alone."""
    if codec.infill is None:
        return False
    ids = (codec.infill.prefix, codec.infill.suffix, codec.infill.middle, codec.infill.end)
    table = model.get_input_embeddings().weight
    if max(ids) >= table.shape[0] or all(bool((table[one] == table[ids[0]]).all()) for one in ids):
        return False
    return True if ids == CODE_LLAMA_IDS else None


def trained_by_manifest(folder: Path) -> bool | None:
    """What the manifests of a checkpoint and of its parents say; None where one of them is not there."""
    seen: set[Path] = set()
    while (folder / MANIFEST).is_file() and folder not in seen:
        seen.add(folder)
        manifest = read_json(folder / MANIFEST)
        tokens = manifest.get("ledger", {}).get("tokens", {})
        if any(layouts.get(name, 0) for layouts in tokens.values() for name in ("psm", "spm")):
            return True
        parent = manifest.get("parent")
        if not parent or not parent.get("path"):
            return False
        folder = Path(parent["path"])
    return None


def same_rows(folder: Path, infill: InfillIds) -> bool:
    """Whether the four tokens have one and the same embedding: they were added, and nothing was learnt since."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    name = "model.embed_tokens.weight"
    file = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name) if index.is_file() else "model.safetensors"
    if file is None or not (folder / file).is_file():
        return False
    with safe_open(folder / file, "pt") as weights:
        if name not in weights.keys():  # noqa: SIM118  a reader without `in`
            return False
        table = weights.get_slice(name)
        if max(infill.prefix, infill.suffix, infill.middle, infill.end) >= table.get_shape()[0]:
            return True  # no rows at all
        rows = [table[one : one + 1] for one in (infill.prefix, infill.suffix, infill.middle, infill.end)]
    return all(bool((row == rows[0]).all()) for row in rows)
