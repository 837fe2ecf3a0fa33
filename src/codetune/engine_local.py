"""The default engine: transformers, on a CPU or one GPU, with rows that stop by themselves.

What comes in: groups of requests. What goes out: their completions. A group is written by a batch of `batch_rows` rows: one
that stops leaves the batch at once, and the next request of the group takes its place; samples of one prompt share its
forward pass. So no token is computed for a completion that has ended, where plain `generate` computes until the last of
its batch ends (`make bench ONLY=generation` compares). Rows are padded on the left; the cache holds no more columns than the
longest row that is left.

Greedy completions are those of `generate` but for ties in the last bits. Random ones draw from the row's own seed: step t of
a completion takes the t-th number of its seed, so a row's place in the batch, and who else is in it, draws nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from codetune import adapter
from codetune.artifacts import splitmix64
from codetune.completions import Completion, Request, Sampling, completed, cut_at_stop, find_stop_string
from codetune.engines import Engine, Groups, describe_model, end_ids, need_model
from codetune.recipe import EngineSettings, ModelSettings
from codetune.rope import change_positions, check_frequencies
from codetune.tokens import Codec, open_codec

GROUP_REQUESTS = 128
REFILL_SHARE = 4  # new rows come in once a quarter of the batch is free: each time costs a forward pass of its own


@dataclass
class Row:
    """One completion being written."""

    place: int  # in the group
    request: Request
    ids: list[int] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Tokens in the cache: all but the last one."""
        assert self.request.token_ids is not None
        return len(self.request.token_ids) + len(self.ids) - 1


class LocalEngine(Engine):
    """A model loaded into this process."""

    codec: Codec

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        name = need_model(settings)
        self.device = _device(settings)
        self.dtype = _dtype(settings, self.device)
        self.codec = open_codec(settings.tokenizer or name, settings.revision if settings.tokenizer is None else None)
        self.model = _load(settings, name, self.dtype, self.device)
        text = self.model.config.get_text_config()
        if text.vocab_size < self.codec.vocabulary_size:
            raise ValueError(f"{name}: the tokenizer has more ids ({self.codec.vocabulary_size}) than the model has rows")
        self.context_tokens = text.max_position_embeddings
        self.eos_ids = end_ids(self.codec, self.model.generation_config)
        self.group_requests = settings.group_requests or GROUP_REQUESTS

    def describe(self) -> dict[str, Any]:
        """The model, the arithmetic, and what decides which rows share a batch."""
        settings = self.settings
        batch = {"batch_rows": settings.batch_rows, "batch_tokens": settings.batch_tokens, "attention": settings.attention}
        numbers: dict[str, Any] = {"dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type}
        if settings.rope_base is not None:
            numbers["rope_base"] = settings.rope_base
        commit = getattr(self.model.config, "_commit_hash", None)  # of the Hub; a folder has a hash of its own
        if commit:
            numbers["commit"] = commit
        return describe_model(settings, need_model(settings), self.codec) | batch | numbers

    def run(self, groups: Groups, sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Group after group."""
        for number, requests in groups:
            start = time.perf_counter()
            ids = self.write_group(requests, sampling)
            more = {"group": number, "seconds": round((time.perf_counter() - start) / len(requests), 4)}
            yield (
                number,
                [
                    completed(request, self.codec, new, sampling, self.eos_ids, **more)
                    for request, new in zip(requests, ids, strict=True)
                ],
            )

    @torch.inference_mode()
    def write_group(self, requests: Sequence[Request], sampling: Sampling) -> list[list[int]]:
        """New ids of each request, with the token that stopped it."""
        waiting = deque(Row(place, request) for place, request in enumerate(requests))
        longest = max(len(request.token_ids or ()) + request.max_new_tokens for request in requests)
        slots = max(1, min(self.settings.batch_rows, self.settings.batch_tokens // longest))
        finished: list[list[int]] = [[] for _ in requests]
        rows: list[Row] = []
        cache: Any = None
        while waiting or rows:
            free = slots - len(rows)
            if waiting and (not rows or free * REFILL_SHARE >= slots):
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                own, logits_BV = self._read_prompts(new)
                self._add_tokens(new, logits_BV, sampling)
                cache = own if not rows else adapter.join_caches(cache, own)
                rows += new
            else:
                self._add_tokens(rows, self._step(rows, cache), sampling)
            left = [place for place, row in enumerate(rows) if not self._has_ended(row, sampling)]
            if len(left) < len(rows):
                for place, row in enumerate(rows):
                    if place not in left:
                        finished[row.place] = row.ids
                rows = [rows[place] for place in left]
                if rows:
                    adapter.keep_cache_rows(cache, left, columns=max(row.columns for row in rows))
        return finished

    def _read_prompts(self, rows: Sequence[Row]) -> tuple[Any, torch.Tensor]:
        """The cache of new rows and the logits behind their prompts; a prompt of several samples is read once."""
        prompts = list(dict.fromkeys(row.request.token_ids for row in rows))
        longest = max(len(prompt or ()) for prompt in prompts)
        input_ids_BT = torch.full((len(prompts), longest), self.codec.pad_id, dtype=torch.int64)
        attention_mask_BT = torch.zeros_like(input_ids_BT)
        for place, prompt in enumerate(prompts):
            assert prompt is not None
            input_ids_BT[place, longest - len(prompt) :] = torch.as_tensor(prompt)
            attention_mask_BT[place, longest - len(prompt) :] = 1
        cache, logits_BV = adapter.read_prompts(self.model, input_ids_BT.to(self.device), attention_mask_BT.to(self.device))
        places = [prompts.index(row.request.token_ids) for row in rows]
        if places != list(range(len(prompts))):
            adapter.keep_cache_rows(cache, places, columns=longest)
        return cache, logits_BV[torch.as_tensor(places, device=logits_BV.device)]

    def _step(self, rows: Sequence[Row], cache: Any) -> torch.Tensor:
        """Logits behind each row's last token, (B, V)."""
        columns_B = [row.columns for row in rows]
        longest = max(columns_B)
        last_B1 = torch.tensor([[row.ids[-1]] for row in rows])
        places_T = torch.arange(longest + 1)
        attention_mask_BT = (places_T >= longest - torch.tensor(columns_B)[:, None]).long()
        position_ids_B1 = torch.tensor(columns_B)[:, None]
        return adapter.next_logits(
            self.model,
            last_B1.to(self.device),
            attention_mask_BT.to(self.device),
            position_ids_B1.to(self.device),
            cache,
        )

    def _add_tokens(self, rows: Sequence[Row], logits_BV: torch.Tensor, sampling: Sampling) -> None:
        draws_B = [uniform(row.request.seed, len(row.ids)) for row in rows]
        for row, token in zip(rows, choose_tokens(logits_BV, sampling, draws_B), strict=True):
            row.ids.append(token)

    def _has_ended(self, row: Row, sampling: Sampling) -> bool:
        if row.ids[-1] in self.eos_ids or row.ids[-1] in sampling.stop_ids:
            return True
        if len(row.ids) >= row.request.max_new_tokens:
            return True
        if not sampling.stop_strings:
            return False
        # a stop string lies in the last so many tokens, of a byte or more each; a hit there is looked at as a whole
        tail = row.ids[-4 * max(map(len, sampling.stop_strings)) - 8 :]
        if find_stop_string(self.codec.decode_bare(tail), sampling.stop_strings) is None:
            return False
        return cut_at_stop(self.codec, row.ids, sampling, self.eos_ids)[3] == "stop_string"


def uniform(seed: int, step: int) -> float:
    """A number from 0 to below 1: the `step`-th of a seed."""
    mixed = splitmix64(np.uint64(step) + splitmix64(np.uint64(seed)))
    return int(mixed >> np.uint64(11)) * 2.0**-53


def choose_tokens(logits_BV: torch.Tensor, sampling: Sampling, draws_B: Sequence[float]) -> list[int]:
    """The next token of each row: the likeliest, or drawn at a temperature from the smallest set that holds `top_p`.

    `draws_B` are numbers from 0 to below 1, which pick along the tokens in order of falling probability.

    Example: probabilities 0.5, 0.3, 0.2, top_p 0.7: the first two are kept, and a draw of 0.7 picks the second (0.5 / 0.8)
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(-1).tolist()
    probabilities_BV, tokens_BV = (
        (logits_BV.float() / sampling.temperature).softmax(-1).double().sort(dim=-1, descending=True, stable=True)
    )
    below_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    kept_BV = torch.where(below_BV < sampling.top_p, probabilities_BV, 0.0)
    upto_BV = kept_BV.cumsum(-1)
    targets_B1 = torch.tensor(draws_B, dtype=torch.float64, device=upto_BV.device)[:, None] * upto_BV[:, -1:]
    places_B1 = (upto_BV <= targets_B1).sum(-1, keepdim=True)
    last_B1 = (kept_BV > 0).sum(-1, keepdim=True) - 1
    return tokens_BV.gather(-1, torch.minimum(places_B1, last_B1))[:, 0].tolist()


def _device(settings: EngineSettings) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` is cuda, but there is no GPU here; write cpu, or auto")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(settings: EngineSettings, device: torch.device) -> torch.dtype:
    name = settings.dtype if settings.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def _load(settings: EngineSettings, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: Any = AutoConfig.from_pretrained(name, revision=settings.revision)
        change_positions(config, ModelSettings(rope_base=settings.rope_base))
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, revision=settings.revision, dtype=dtype, attn_implementation=settings.attention
        )
        check_frequencies(model, config, changed=settings.rope_base is not None)
    except (OSError, ImportError) as error:
        raise ValueError(f"{name}: no model that can be loaded here ({error})") from error
    return model.to(device).eval()
