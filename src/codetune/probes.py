"""What a model can do on held-out documents: losses while it trains, infilling prompts at the end, for any checkpoint.

What comes in: a model, and the held-out samples that the build wrote beside the rows. What goes out: figures.

    plain           nats per token, left to right
    psm, spm        nats per character of the middle, and nats of the end-of-infill token
    border, joint   nats per character of the same middle, left to right, with the same cut between tokens: what PSM
                    (border) and SPM (joint) are to beat
    answer          nats per token of a conversation's last answer, and of the token that stops it
    generated       greedy completions: stop rate (the end token itself, not the limit), exact match, first-line match,
                    against a plain continuation of the prefix, which is forgiven for not knowing where the middle ends

What a long context is worth, and whether a key in it is found again, is in `long_probes.py`; the command below prints it
too, as far as the rows' recipe asks for it.

No forward pass holds all logits. Each sample is alone in its row, padded at the end where nothing looks back at it.

    python -m codetune.probes --checkpoint runs/tiny/stage1/model --rows runs/tiny/stage1/rows
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from codetune import adapter, cpu_ranks
from codetune.artifacts import HELD_OUT, HELD_OUT_CUTS, MANIFEST, HeldOutSample, fail, read_held_out, read_json
from codetune.long_probes import length_batches, long_context_figures, long_context_table
from codetune.recipe import ProbeSettings, recipe_from_dict
from codetune.tokens import Codec, open_codec

SUMS = (
    "plain_nats",
    "plain_tokens",
    "plain_border_nats",
    "plain_border_characters",
    "plain_joint_nats",
    "plain_joint_characters",
    "psm_nats",
    "psm_characters",
    "psm_end_nats",
    "psm_ends",
    "spm_nats",
    "spm_characters",
    "spm_end_nats",
    "spm_ends",
    "chat_nats",
    "chat_tokens",
    "chat_end_nats",
    "chat_ends",
)
FIGURES = {  # figure: (sum, count)
    "plain": ("plain_nats", "plain_tokens"),
    "psm_middle": ("psm_nats", "psm_characters"),
    "border_middle": ("plain_border_nats", "plain_border_characters"),
    "spm_middle": ("spm_nats", "spm_characters"),
    "joint_middle": ("plain_joint_nats", "plain_joint_characters"),
    "psm_end": ("psm_end_nats", "psm_ends"),
    "spm_end": ("spm_end_nats", "spm_ends"),
    "answer": ("chat_nats", "chat_tokens"),
    "answer_end": ("chat_end_nats", "chat_ends"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@torch.no_grad()
def held_out_losses(
    model: Any,
    samples: Sequence[HeldOutSample],
    groups: Mapping[str, str],
    tokens_per_batch: int,
    accelerator: Any = None,
    cut: str = "span",
    poll: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Figures per source, and per group of sources, named `held_out/<source>/<figure>`, of one kind of cut.

    With an accelerator, batches are shared out over its ranks; all make the same number of forward passes, as sharded models
    need. The model must have a fused head. `poll` is called before every batch, on all ranks alike; it may raise.
    """
    whole = ("plain", "chat")
    samples = [sample for sample in samples if sample.layout in whole or sample.cut == cut and sample.layout != "long"]
    sources = sorted({sample.source for sample in samples})
    batches = length_batches([len(sample.input_ids) for sample in samples], tokens_per_batch)
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device
    sums_SM = torch.zeros(len(sources), len(SUMS), dtype=torch.float64)
    was_training = model.training
    model.eval()
    for place in range(rank, -(-len(batches) // world) * world, world):
        if poll is not None:
            poll()
        batch = [samples[index] for index in batches[place % len(batches)]]
        losses_BT = sample_losses(model, batch, device)
        if place < len(batches):  # the rest are there so that every rank does as many
            for sample, losses_T in zip(batch, losses_BT, strict=True):
                add_losses(sums_SM[sources.index(sample.source)], sample, losses_T)
    model.train(was_training)
    if accelerator is not None:
        sums_SM = accelerator.reduce(sums_SM.to(accelerator.device), "sum").cpu()
    return figures_of(sources, sums_SM, groups)


def sample_losses(model: Any, samples: Sequence[HeldOutSample], device: torch.device) -> torch.Tensor:
    """Loss of every token in nats, (B, T) on the CPU, T the longest sample."""
    longest = max(len(sample.input_ids) for sample in samples)
    input_ids_BT = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels_BT = torch.full_like(input_ids_BT, -100)
    for row, sample in enumerate(samples):
        input_ids_BT[row, : len(sample.input_ids)] = torch.as_tensor(sample.input_ids)
        labels_BT[row, : len(sample.input_ids)] = input_ids_BT[row, : len(sample.input_ids)]
    return adapter.fused_token_losses(model, input_ids_BT.to(device), labels_BT.to(device)).cpu()


def add_losses(sums_M: torch.Tensor, sample: HeldOutSample, losses_T: torch.Tensor) -> None:
    """Add one sample's losses to its source's sums."""

    def add(name: str, value: float) -> None:
        sums_M[SUMS.index(name)] += value

    if sample.layout == "chat":
        add("chat_nats", losses_T[sample.middle_start : sample.end_position].double().sum().item())
        add("chat_tokens", sample.middle_tokens)
        add("chat_end_nats", losses_T[sample.end_position].item())
        add("chat_ends", 1)
        return
    if sample.layout == "plain":
        add("plain_nats", losses_T.double().sum().item())
        add("plain_tokens", len(sample.input_ids) - 1)
        return
    middle_T = losses_T[sample.middle_start : sample.middle_start + sample.middle_tokens]
    add(f"{sample.layout}_nats", middle_T.double().sum().item())
    add(f"{sample.layout}_characters", sample.middle_characters)
    if sample.end_position >= 0:
        add(f"{sample.layout}_end_nats", losses_T[sample.end_position].item())
        add(f"{sample.layout}_ends", 1)


def figures_of(sources: Sequence[str], sums_SM: torch.Tensor, groups: Mapping[str, str]) -> dict[str, float]:
    """Means of the sums, per source and for each group of several."""
    lines = {source: sums_SM[row] for row, source in enumerate(sources)}
    for group, members in groups_of_several(sources, groups).items():
        lines[f"group:{group}"] = sums_SM[[sources.index(source) for source in members]].sum(0)
    return {
        f"held_out/{name}/{figure}": round((sums_M[SUMS.index(total)] / sums_M[SUMS.index(count)]).item(), 6)
        for name, sums_M in lines.items()
        for figure, (total, count) in FIGURES.items()
        if sums_M[SUMS.index(count)] > 0
    }


# ---------------------------------------------------------------------------------------------------------------------
# Infilling prompts


def choose_prompts(
    samples: Sequence[HeldOutSample], layout: str, limit: int, longest: int | None = None
) -> list[HeldOutSample]:
    """Up to `limit` samples of a layout cut at a line, one source after the other; a blank middle asks nothing.

    Prompts of more than `longest` tokens are passed over: behind them a completion would leave the model's context.
    """
    by_source: dict[str, list[HeldOutSample]] = {}
    for sample in samples:
        asks = sample.layout == layout and sample.cut == "line" and bool(sample.middle.strip())
        if asks and (longest is None or sample.middle_start <= longest):
            by_source.setdefault(sample.source, []).append(sample)
    rounds = itertools.zip_longest(*by_source.values())
    return [sample for around in rounds for sample in around if sample is not None][:limit]


def infill_report(
    model: Any,
    codec: Codec,
    samples: Sequence[HeldOutSample],
    groups: Mapping[str, str],
    prompts_per_layout: int,
    new_tokens: int,
    tokens_per_batch: int = 8192,
    poll: Callable[[], None] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Greedy infilling: form (psm, spm, prefix_only) -> source, group of several, and `all` -> rates between 0 and 1.

    `prefix_only` continues the prefixes of the PSM prompts left to right. Prompts leave `new_tokens` of room in the context.
    """
    if codec.infill is None or prompts_per_layout == 0:
        return {}
    longest = model.config.get_text_config().max_position_embeddings - new_tokens
    report = {}
    for form in ("psm", "spm", "prefix_only"):
        chosen = choose_prompts(samples, "spm" if form == "spm" else "psm", prompts_per_layout, longest)
        prompts = [_prompt(codec, form, sample) for sample in chosen]
        end = codec.infill.end if form != "prefix_only" else None
        stops = [token for token in (end, codec.eos_id) if token is not None]
        completions = generate_greedy(model, prompts, stops, codec.pad_id, new_tokens, tokens_per_batch, poll)
        scores = [score_completion(codec, form, *pair) for pair in zip(chosen, completions, strict=True)]
        names = [sample.source for sample in chosen]
        lines = {"all": set(names)} | {name: {name} for name in sorted(set(names))}
        lines |= {f"group:{group}": set(members) for group, members in groups_of_several(sorted(set(names)), groups).items()}
        report[form] = {line: _mean_scores(scores, names, members) for line, members in lines.items() if members}
    return report


def groups_of_several(sources: Sequence[str], groups: Mapping[str, str]) -> dict[str, list[str]]:
    """Groups with more than one of these sources.

    Example: ["c", "en", "py"], {"c": "code", "py": "code", "en": "text"} -> {"code": ["c", "py"]}
    """
    members: dict[str, list[str]] = {}
    for source in sources:
        members.setdefault(groups.get(source, source), []).append(source)
    return {group: found for group, found in sorted(members.items()) if len(found) > 1}


def _prompt(codec: Codec, form: str, sample: HeldOutSample) -> list[int]:
    if form == "prefix_only":
        return codec.plain(codec.encode(sample.prefix), last=False)
    make = codec.psm_prompt if form == "psm" else codec.spm_prompt
    return make(sample.prefix, sample.suffix)


def score_completion(codec: Codec, form: str, sample: HeldOutSample, ids: list[int]) -> dict[str, float]:
    """One completion against the middle."""
    stopped = codec.infill is not None and codec.infill.end in ids
    text = codec.decode_bare(ids)
    wanted, closed = first_line(sample.middle)
    line, _ = first_line(text)
    # a plain continuation cannot know that the middle ends inside a line, so its line may go on
    same = line.startswith(wanted) if form == "prefix_only" and not closed else line == wanted
    scores = {"first_line_match": float(same)}
    if form != "prefix_only":
        scores |= {"stop_rate": float(stopped), "exact_match": float(stopped and text == sample.middle)}
    return scores


def first_line(text: str) -> tuple[str, bool]:
    """The first line that is not blank, and whether a newline closes it.

    Example: a blank line, then `  x = 1`, then `  y` -> ("  x = 1", True)
    """
    lines = text.split("\n")
    for place, line in enumerate(lines):
        if line.strip():
            return line, place < len(lines) - 1
    return "", False


def _mean_scores(scores: Sequence[dict[str, float]], names: Sequence[str], members: set[str]) -> dict[str, float]:
    kept = [score for score, own in zip(scores, names, strict=True) if own in members]
    means = {figure: round(sum(score[figure] for score in kept) / len(kept), 4) for figure in kept[0]}
    return {"prompts": len(kept), **means}


@torch.no_grad()
def generate_greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    pad_id: int,
    new_tokens: int,
    tokens_per_batch: int,
    poll: Callable[[], None] | None = None,
) -> list[list[int]]:
    """New ids of each prompt, up to and with the first stop id; prompts are batched by length and padded on the left."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
    )
    was_training = model.training
    model.eval()
    completions: list[list[int]] = [[] for _ in prompts]
    for batch in length_batches([len(prompt) + new_tokens for prompt in prompts], tokens_per_batch):
        if poll is not None:
            poll()
        longest = max(len(prompts[index]) for index in batch)
        input_ids_BT = torch.full((len(batch), longest), pad_id, dtype=torch.int64)
        attention_mask_BT = torch.zeros_like(input_ids_BT)
        for row, index in enumerate(batch):
            input_ids_BT[row, longest - len(prompts[index]) :] = torch.as_tensor(prompts[index])
            attention_mask_BT[row, longest - len(prompts[index]) :] = 1
        out_BT = model.generate(
            input_ids=input_ids_BT.to(device), attention_mask=attention_mask_BT.to(device), generation_config=config
        )
        for index, ids in zip(batch, out_BT[:, longest:].tolist(), strict=True):
            completions[index] = cut_after_stop(ids, stop_ids)
    model.train(was_training)
    return completions


def cut_after_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Example: [5, 2, 0, 0] with stop id 2 -> [5, 2]"""
    place = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: place + 1]


# ---------------------------------------------------------------------------------------------------------------------
# Printing


def source_groups(rows_manifest: Mapping[str, Any]) -> dict[str, str]:
    """Source -> the group it is added up in, from the recipe that built the rows."""
    sources = rows_manifest["recipe"]["data"]["sources"]
    return {name: settings.get("group") or name for name, settings in sources.items()}


def losses_table(figures: Mapping[str, float]) -> str:
    """Held-out losses as a table for people."""
    figures = {name: value for name, value in figures.items() if name.startswith("held_out/")}
    names = list(dict.fromkeys(key.split("/")[1] for key in figures))
    known = {key.split("/")[2] for key in figures}
    shown = [figure for figure in FIGURES if figure in known or not figure.startswith("answer")]
    lines = [f"{'held out':24}" + "".join(f"{figure:>15}" for figure in shown)]
    for name in names:
        cells = [figures.get(f"held_out/{name}/{figure}") for figure in shown]
        lines.append(f"{name:24}" + "".join(f"{'-':>15}" if cell is None else f"{cell:>15.4f}" for cell in cells))
    return "\n".join([*lines, "plain, answer and *_end in nats per token, *_middle in nats per character"])


def infill_table(report: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Infilling rates as a table for people."""
    figures = ("stop_rate", "exact_match", "first_line_match")
    lines = [f"{'infilling':12}{'sources':20}{'prompts':>8}" + "".join(f"{figure:>18}" for figure in figures)]
    for form, by_group in report.items():
        for group, scores in by_group.items():
            cells = "".join(f"{scores[figure]:>17.1%} " if figure in scores else f"{'-':>18}" for figure in figures)
            lines.append(f"{form:12}{group:20}{scores['prompts']:>8.0f}{cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print held-out losses and infilling rates of one checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m codetune.probes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="folder of a finished checkpoint, or a Hub id")
    parser.add_argument("--rows", required=True, type=Path, help="folder of packed rows with held-out samples")
    parser.add_argument("--prompts", type=int, default=100, help="infilling prompts per layout (100); 0 for none")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens generated per prompt at most (64)")
    parser.add_argument(
        "--context-lengths", type=int, nargs="*", metavar="TOKENS", help="contexts to measure under; none: the recipe's"
    )
    parser.add_argument(
        "--key-lengths", type=int, nargs="*", metavar="TOKENS", help="prompts to find a key in; none: the recipe's"
    )
    options = parser.parse_args(arguments)
    cpu_ranks.settle_deepspeed()
    long = {"context_lengths": options.context_lengths, "key_lengths": options.key_lengths}
    changes = {name: tuple(value) for name, value in long.items() if value is not None}
    try:
        measure_checkpoint(options.checkpoint, options.rows, options.prompts, options.new_tokens, changes)
    except ValueError as error:
        fail(str(error))


def measure_checkpoint(
    checkpoint: str, rows: Path, prompts: int, new_tokens: int, long_changes: Mapping[str, tuple[int, ...]]
) -> None:
    """Load a checkpoint in fp32 and print its tables; `long_changes` are laid over the `probes` of the rows' recipe."""
    from transformers import AutoModelForCausalLM

    samples = read_held_out(rows / HELD_OUT)
    if not samples:
        raise ValueError(
            f"{rows}: no held-out samples there; write `data.held_out` into the recipe and build with `make data`"
        )
    manifest = read_json(rows / MANIFEST)
    codec = open_codec(checkpoint)
    if manifest["tokenizer"] != codec.fingerprint:
        raise ValueError(f"{rows} was built with another tokenizer than {checkpoint}'s; give rows of the same family")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"{checkpoint}: no readable checkpoint ({error})") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    adapter.add_fused_head(model)
    groups = source_groups(manifest)
    for cut in HELD_OUT_CUTS:
        print(f"middles cut at {'random characters' if cut == 'span' else 'a whole line'}")
        print(losses_table(held_out_losses(model, samples, groups, tokens_per_batch=8192, cut=cut)) + "\n")
    report = infill_report(model, codec, samples, groups, prompts, new_tokens)
    if report:
        print(infill_table(report) + "\n")
    settings: ProbeSettings = replace(recipe_from_dict(manifest["recipe"], str(rows / MANIFEST)).probes, **long_changes)
    print(long_context_table(long_context_figures(model, codec, samples, settings, tokens_per_batch=8192)))


if __name__ == "__main__":
    main()
