"""What every engine is: a tokenizer, a context, and a way to run groups of requests. The engines have a module each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from codetune.artifacts import model_hash, software_versions
from codetune.completions import Completion, Prompt, Request, Sampling
from codetune.recipe import EngineSettings
from codetune.tokens import Codec

Groups = Sequence[tuple[int, Sequence[Request]]]


class Engine:
    """Base of the engines.

    Attributes:
        codec: the tokenizer; None only where a server's is not known here.
        eos_ids: tokens with which this model ends by itself.
        context_tokens: positions the model has, or None where a server does not tell.
        group_requests: how many requests are kept whole or redone.
        counts: what happened on the way (a server's retries by reason).
    """

    codec: Any  # Codec, or None
    eos_ids: tuple[int, ...]
    context_tokens: int | None
    group_requests: int

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()

    def describe(self) -> dict[str, Any]:
        """What decides the numbers, for the file's first line and for provenance."""
        raise NotImplementedError

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Refuse what this engine cannot do as asked.

        Raises:
            ValueError: see the engines.
        """

    def run(self, groups: Groups, sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """The groups' completions, each group in the order of its requests, as they finish."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the model, its processes and connections."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def describe_model(settings: EngineSettings, model: str, codec: Codec) -> dict[str, Any]:
    """What an engine that loads a model itself says of it."""
    return {
        "kind": settings.kind,
        "model": model,
        "model_hash": model_hash(Path(model)) if Path(model).is_dir() else None,
        "revision": settings.revision,
        "tokenizer": codec.fingerprint,
        "versions": software_versions(),
    }


def need_model(settings: EngineSettings) -> str:
    """The model's folder or Hub id.

    Raises:
        ValueError: none was written.
    """
    if not settings.model:
        raise ValueError(f"an engine of kind {settings.kind} needs `model`: a folder, or a Hub id")
    return settings.model


def end_ids(codec: Codec, generation: Any) -> tuple[int, ...]:
    """The tokenizer's end token, and those of the model's generation configuration (chat models end with their own)."""
    own = getattr(generation, "eos_token_id", None)
    listed = own if isinstance(own, list | tuple) else [own]
    return tuple(dict.fromkeys(token for token in (codec.eos_id, *listed) if token is not None))
