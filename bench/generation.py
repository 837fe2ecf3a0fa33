"""Tokens a second of the engine `transformers`, against `generate` in plain equal batches, and whether they are the same.

Reference: transformers' `generate`, batches of as many prompts in the order in which they come, padded on the left, until
the last of a batch has ended: what a loop over a list does. Same model (the tiny base, fp32), same prompts of mixed lengths,
same end tokens (the model's own and the newline, so that completions are lines, of mixed lengths too). Tokens are counted up
to the one that ended a completion, for both. The two take turns, and the better of three runs counts for each.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.corpus import real_code
from bench.stage_runs import BASE, need_base
from codetune.completions import make_plan
from codetune.engine_local import LocalEngine
from codetune.generate import EngineSettings, Prompt, Sampling, generate

MINUTES = 3
PROMPTS, ROWS, NEW_TOKENS, TURNS = 256, 16, 96, 3
PACKAGES = ("python-stdlib", "networkx")


def prompts_of(engine: LocalEngine) -> list[Prompt]:
    """Beginnings of source files, of 8 to 150 tokens, drawn evenly."""
    draw = random.Random(0)
    found = []
    for document in real_code(3_000_000, PACKAGES):
        ids = engine.codec.plain(engine.codec.encode(document.text[:1000]), last=False)
        count = draw.randint(8, 150)
        if len(ids) >= count:
            found.append(Prompt(f"p{len(found)}", "", tuple(ids[:count])))
        if len(found) == PROMPTS:
            break
    draw.shuffle(found)
    return found


def plain(engine: LocalEngine, prompts: list[Prompt], ends: list[int]) -> dict[str, tuple[int, ...]]:
    """`generate` on equal batches, in the order of the prompts."""
    written = {}
    for start in range(0, len(prompts), ROWS):
        batch = prompts[start : start + ROWS]
        longest = max(len(prompt.token_ids or ()) for prompt in batch)
        input_ids_BT = torch.full((len(batch), longest), engine.codec.pad_id)
        mask_BT = torch.zeros_like(input_ids_BT)
        for row, prompt in enumerate(batch):
            ids = prompt.token_ids or ()
            input_ids_BT[row, longest - len(ids) :] = torch.tensor(ids)
            mask_BT[row, longest - len(ids) :] = 1
        out_BT = engine.model.generate(
            input_ids=input_ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=engine.codec.pad_id,
        )
        for prompt, ids in zip(batch, out_BT[:, longest:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
            written[prompt.id] = tuple(ids[: stop + 1])
    return written


def margin(engine: LocalEngine, prompt: Prompt, ids: tuple[int, ...], others: tuple[int, ...]) -> float:
    """Logits between the two tokens where two completions first differ, in one pass over the prompt and what both have."""
    place = next(place for place, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other)
    with torch.inference_mode():
        logits_V = engine.model(torch.tensor([[*(prompt.token_ids or ()), *ids[:place]]])).logits[0, -1]
    return abs(float(logits_V[ids[place]] - logits_V[others[place]]))


def best(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    need_base()
    engine = LocalEngine(EngineSettings(model=str(BASE), batch_rows=ROWS, dtype="float32", device="cpu"))
    prompts = prompts_of(engine)
    (newline,) = engine.codec.encode_bare("\n")
    ends = [*engine.eos_ids, newline]
    sampling = Sampling(NEW_TOKENS, stop_ids=(newline,))
    settings: dict[str, Any] = {"codec": engine.codec, "context_tokens": engine.context_tokens, "engine": {}}
    plan = make_plan(prompts, sampling, group_requests=engine.group_requests, **settings)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    ours: dict[str, tuple[int, ...]] = {}
    theirs: dict[str, tuple[int, ...]] = {}
    for _ in range(TURNS):
        seconds["plain"].append(best(lambda: theirs.update(plain(engine, prompts, ends))))
        seconds["ours"].append(
            best(lambda: ours.update({done.prompt_id: done.token_ids for done in generate(engine, prompts, sampling)}))
        )
    tokens = sum(map(len, theirs.values()))
    same = sum(ours[name] == ids for name, ids in theirs.items())
    lengths = sorted(map(len, theirs.values()))
    speeds = {name: tokens / min(taken) for name, taken in seconds.items()}
    print(
        f"{len(prompts)} prompts in {len(plan.groups)} groups; completions of {lengths[0]} to {lengths[-1]} tokens, median "
        f"{lengths[len(lengths) // 2]}"
    )
    print(f"plain batches of {ROWS}: {speeds['plain']:,.0f} tokens/s")
    print(
        f"the engine, {ROWS} rows: {speeds['ours']:,.0f} tokens/s, {speeds['ours'] / speeds['plain']:.2f} times "
        "(to reach: 1.5)"
    )
    margins = [
        margin(engine, prompt, ours[prompt.id], theirs[prompt.id])
        for prompt in prompts
        if prompt.id in theirs and ours[prompt.id] != theirs[prompt.id]
    ]
    told = f"; where the others part, their two tokens are at most {max(margins):.1e} of a logit apart" if margins else ""
    print(f"completions equal: {same} of {len(theirs)}{told}")
    figures = {name: round(speed, 1) for name, speed in speeds.items()} | {
        "ratio": round(speeds["ours"] / speeds["plain"], 3)
    }
    print("RESULT " + json.dumps(figures | {"equal": same, "prompts": len(theirs)}))


if __name__ == "__main__":
    main()
