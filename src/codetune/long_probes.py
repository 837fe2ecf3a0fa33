"""What a long context is worth to a model: two probes, run at the end of a stage, at intervals, or on any checkpoint.

What comes in: a model and held-out samples. What goes out: flat figures.

    context/<tokens>            nats per token of the same targets, the last tokens of long held-out documents, as what the
                                model is given grows (so many tokens, targets included), to several times the trained length
    key/<tokens>/<depth>/found  share of prompts in which a key is found again: a function that returns a two-digit number
                                stands at that depth (0 beginning, 1 end) of a prompt of other code, which ends in
                                `assert my_function() == ` (paper Sec. 3.3 and App. G.2)
    key/<tokens>/<depth>/nats   loss of the number there, which falls before anything is found

A key counts as found when every token of the number is the likeliest one, given the prompt and the tokens before it: that is
what greedy generation would write, without generating, so that models shared out over many devices are measured too.

No forward pass holds all logits: only those of targets are made. What it does not show: what a model does with a context
besides looking up one thing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from codetune import adapter
from codetune.artifacts import HeldOutSample
from codetune.recipe import ProbeSettings
from codetune.tokens import Codec

KEY_FUNCTION = 'def my_function() -> int:\n    """The program calls this function at its end."""\n    return {value}\n\n\n'
KEY_QUESTION = "assert my_function() == "


def long_context_figures(
    model: Any,
    codec: Codec,
    samples: Sequence[HeldOutSample],
    settings: ProbeSettings,
    tokens_per_batch: int,
    accelerator: Any = None,
    poll: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Both probes, as far as the settings ask for them; all ranks must call it, and all get the figures."""
    figures = {}
    if settings.context_lengths:
        lengths, targets = settings.context_lengths, settings.context_target_tokens
        figures |= context_losses(model, samples, lengths, targets, tokens_per_batch, accelerator, poll)
    if settings.key_lengths:
        figures |= key_figures(model, key_prompts(codec, samples, settings), tokens_per_batch, accelerator, poll)
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# The same targets under more and more context


def context_losses(
    model: Any,
    samples: Sequence[HeldOutSample],
    lengths: Sequence[int],
    target_tokens: int,
    tokens_per_batch: int,
    accelerator: Any = None,
    poll: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Nats per token of the last `target_tokens` of each long sample, given only its last `length` tokens, targets included.

    Example: length 256, 64 targets: tokens 192 to 255 are foretold from what stands before each of them, back to token 0

    Raises:
        ValueError: no long samples, or too short ones.
    """
    long = [sample.input_ids for sample in samples if sample.layout == "long"]
    if not long or min(map(len, long)) < max(lengths):
        found = f"the shortest has {min(map(len, long))} tokens" if long else "there are none"
        raise ValueError(
            f"`probes.context_lengths` asks for held-out documents of {max(lengths)} tokens, and {found}; set "
            "`data.held_out.long_documents` and `data.held_out.long_tokens`, and build the rows again with `make data`"
        )
    rows = [Row(ids[-length:], range(length - target_tokens, length)) for length in lengths for ids in long]
    sums_L2 = torch.zeros(len(lengths), 2, dtype=torch.float64)
    for number, losses_T, _ in target_results(model, rows, tokens_per_batch, accelerator, poll):
        sums_L2[number // len(long)] += torch.tensor([losses_T.double().sum().item(), len(losses_T)])
    sums_L2 = _sum_over_ranks(sums_L2, accelerator)
    return {
        f"context/{length}": round((nats / count).item(), 6) for length, (nats, count) in zip(lengths, sums_L2, strict=True)
    }


@dataclass(frozen=True)
class Row:
    """One text alone in its row, and the places in it of the tokens that are measured."""

    input_ids: list[int]
    targets: range


@torch.no_grad()
def target_results(
    model: Any,
    rows: Sequence[Row],
    tokens_per_batch: int,
    accelerator: Any = None,
    poll: Callable[[], None] | None = None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each row its number, the loss of each target in nats, and whether each is the likeliest token; both (targets,).

    With an accelerator a rank gets its part of the rows; all make the same number of forward passes, as sharded models need.
    `poll` is called before every batch, on all ranks alike; it may raise. Rows are padded at the end, where nothing
    looks back at them.
    """
    batches = length_batches([len(row.input_ids) for row in rows], tokens_per_batch)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for turn in range(rank, -(-len(batches) // world) * world, world):
        if poll is not None:
            poll()
        numbers = batches[turn % len(batches)]
        batch = [rows[number] for number in numbers]
        input_ids_BT = torch.zeros(len(batch), max(len(row.input_ids) for row in batch), dtype=torch.int64)
        for place, row in enumerate(batch):
            input_ids_BT[place, : len(row.input_ids)] = torch.as_tensor(row.input_ids)
        keep = sorted({target - 1 for row in batch for target in row.targets})  # what foretells the targets
        position_ids_BT = torch.arange(input_ids_BT.shape[1]).expand_as(input_ids_BT)
        logits_BKV = adapter.selected_logits(
            model, input_ids_BT.to(device), position_ids_BT.to(device), torch.tensor(keep, device=device)
        )
        if turn >= len(batches):  # made so that every rank does as many
            continue
        for place, (number, row) in enumerate(zip(numbers, batch, strict=True)):
            first = keep.index(row.targets[0] - 1)
            logits_KV = logits_BKV[place, first : first + len(row.targets)].float()
            wanted_K = torch.as_tensor(row.input_ids[row.targets.start : row.targets.stop], device=device)
            losses_K = torch.nn.functional.cross_entropy(logits_KV, wanted_K, reduction="none")
            yield number, losses_K.cpu(), (logits_KV.argmax(-1) == wanted_K).cpu()
    model.train(was_training)


def _sum_over_ranks(sums: torch.Tensor, accelerator: Any) -> torch.Tensor:
    return sums if accelerator is None else accelerator.reduce(sums.to(accelerator.device), "sum").cpu()


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first; a batch has at most so many tokens, padding included.

    Example: [3, 9, 4], 10 -> [[1], [2, 0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


# ---------------------------------------------------------------------------------------------------------------------
# Finding a key again


@dataclass(frozen=True)
class KeyPrompt:
    """A prompt and the number that continues it."""

    tokens: int  # what was asked for; the prompt has a little less
    depth: float
    input_ids: list[int]  # prompt and number
    answer_start: int


def key_prompts(codec: Codec, samples: Sequence[HeldOutSample], settings: ProbeSettings) -> list[KeyPrompt]:
    """`key_prompts` of them for each length and depth; the same for the same held-out documents.

    Raises:
        ValueError: no held-out document to fill the prompts with.
    """
    source = key_source(samples, settings.key_source)
    texts = [
        codec.decode_start(sample.input_ids) for sample in samples if sample.layout == "plain" and sample.source == source
    ]
    if not texts:
        raise ValueError(
            f"`probes.key_lengths` needs held-out documents of the source {source!r} to fill its prompts with, and there "
            "are none; raise `data.held_out.documents_per_source`, or name another `probes.key_source`"
        )
    return [
        key_prompt(codec, texts, tokens, depth, draw=random.Random(f"key {tokens} {depth:g} {number}"))
        for tokens in settings.key_lengths
        for depth in settings.key_depths
        for number in range(settings.key_prompts)
    ]


def key_source(samples: Sequence[HeldOutSample], wanted: str | None) -> str | None:
    """The source that is named, else `python` where there is one, else the first."""
    sources = list(dict.fromkeys(sample.source for sample in samples if sample.layout == "plain"))
    if wanted is not None:
        return wanted
    return "python" if "python" in sources else next(iter(sources), None)


def key_prompt(codec: Codec, texts: Sequence[str], tokens: int, depth: float, draw: random.Random) -> KeyPrompt:
    """One prompt of at most `tokens` tokens: whole lines of the texts, the key function at `depth`, the question at the end.

    The function stands between top-level statements, at the place nearest to the depth.
    """
    number = str(draw.randint(10, 99))
    key = KEY_FUNCTION.format(value=number)
    room = tokens - len(codec.plain(codec.encode(f"\n{key}{KEY_QUESTION}{number}"), last=False))
    lines, ends = _filler(codec, draw.sample(list(texts), len(texts)), room)
    tops = [place for place in range(len(lines) + 1) if _is_top(lines, place)]
    total = ends[-1] if ends else 0
    place = min(tops, key=lambda place: abs((ends[place - 1] if place else 0) - depth * total))
    prompt = "".join([*lines[:place], key, *lines[place:], KEY_QUESTION])
    asked, answered = (codec.plain(codec.encode(text), last=False) for text in (prompt, prompt + number))
    # the number may share a token with the space before it: then the answer begins with that token
    start = next((at for at, pair in enumerate(zip(asked, answered, strict=False)) if pair[0] != pair[1]), len(asked))
    return KeyPrompt(tokens, depth, answered, start)


def _filler(codec: Codec, texts: Iterable[str], room: int) -> tuple[list[str], list[int]]:
    """Whole lines of the texts, one after another and from the first one again, and the tokens up to each line's end."""
    lines: list[str] = []
    ends: list[int] = []
    for text in itertools.cycle(texts):
        block = [f"{line}\n" for line in [*text.strip("\n").split("\n"), ""]]
        for line, ids in zip(block, codec.encode_batch_bare(block), strict=True):
            if (ends[-1] if ends else 0) + len(ids) > room:
                return lines, ends
            lines.append(line)
            ends.append((ends[-1] if ends else 0) + len(ids))
    raise AssertionError("no texts")


def _is_top(lines: Sequence[str], place: int) -> bool:
    """Whether a function may stand before this line: it begins a text, or a top-level statement behind a blank line."""
    if place == 0 or place == len(lines):
        return True
    return not lines[place - 1].strip() and not lines[place][0].isspace()


def key_figures(
    model: Any,
    prompts: Sequence[KeyPrompt],
    tokens_per_batch: int,
    accelerator: Any = None,
    poll: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Share of keys found and loss of the number, by length and depth."""
    cells = list(dict.fromkeys((prompt.tokens, prompt.depth) for prompt in prompts))
    rows = [Row(prompt.input_ids, range(prompt.answer_start, len(prompt.input_ids))) for prompt in prompts]
    sums_C3 = torch.zeros(len(cells), 3, dtype=torch.float64)
    for number, losses_T, right_T in target_results(model, rows, tokens_per_batch, accelerator, poll):
        cell = cells.index((prompts[number].tokens, prompts[number].depth))
        sums_C3[cell] += torch.tensor([float(right_T.all()), losses_T.double().sum().item(), 1.0])
    sums_C3 = _sum_over_ranks(sums_C3, accelerator)
    figures = {}
    for (tokens, depth), (found, nats, count) in zip(cells, sums_C3.tolist(), strict=True):
        figures[f"key/{tokens}/{depth:g}/found"] = round(found / count, 6)
        figures[f"key/{tokens}/{depth:g}/nats"] = round(nats / count, 6)
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def long_context_table(figures: dict[str, float], trained_tokens: int | None = None) -> str:
    """Both probes as text for people; nothing where none was made."""
    lines = []
    context = {int(name.split("/")[1]): value for name, value in figures.items() if name.startswith("context/")}
    if context:
        rows = "" if trained_tokens is None else f" (rows of training: {trained_tokens:,} tokens)"
        lines.append(f"loss of the same tokens, nats, as the context before them grows{rows}")
        lines.append("".join(f"{length:>10,}" for length in context))
        lines.append("".join(f"{value:>10.4f}" for value in context.values()))
    keys = [name.split("/")[1:3] for name in figures if name.startswith("key/") and name.endswith("/found")]
    if keys:
        lines.append(f"{'key found':>10}{'tokens':>10}{'depth':>8}{'nats of the number':>22}")
    for tokens, depth in keys:
        found, nats = (figures[f"key/{tokens}/{depth}/{figure}"] for figure in ("found", "nats"))
        lines.append(f"{found:>10.1%}{int(tokens):>10,}{depth:>8}{nats:>22.4f}")
    return "\n".join(lines)
