"""Packed rows against each document alone: the largest difference of logits, for every attention offered on a CPU.

Rows of documents of random length, all logits of every document, in fp32, at two row lengths and with one row and four at
once; the reference is each document in a forward pass of its own, by the same implementation, and by `eager`. What an
implementation cannot do here is said in its own words.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

MINUTES = 2
TARGET = 1e-5
SHAPE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY = 2048
ROWS = ((256, 1), (256, 4), (1024, 1), (1024, 4))
OFFERED = ("sdpa", "eager", "flex_attention", "flash_attention_2")


def make_model(attention: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = LlamaConfig(
        **SHAPE, vocab_size=VOCABULARY, max_position_embeddings=1024, rope_parameters=rope, initializer_range=0.088
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def random_rows(tokens: int, rows: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Ids and positions (B, T), and the documents' lengths in each row."""
    input_ids_BT = torch.randint(3, VOCABULARY, (rows, tokens), generator=draw)
    lengths = []
    for _ in range(rows):
        cuts = sorted(set(torch.randint(1, tokens, (5,), generator=draw).tolist()))
        lengths.append([end - start for start, end in zip([0, *cuts], [*cuts, tokens], strict=True)])
    position_ids_BT = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return input_ids_BT, position_ids_BT, lengths


@torch.no_grad()
def largest_difference(model: Any, alone: Any, tokens: int, rows: int) -> tuple[float, float]:
    """Between packed logits and each document's own, by this implementation and by `alone`."""
    input_ids_BT, position_ids_BT, lengths = random_rows(tokens, rows, torch.Generator().manual_seed(tokens + rows))
    packed_BTV = model(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False).logits
    own = reference = 0.0
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            ids_1T = input_ids_BT[row : row + 1, start : start + length]
            packed_TV = packed_BTV[row, start : start + length]
            own = max(own, (packed_TV - model(input_ids=ids_1T, use_cache=False).logits[0]).abs().max().item())
            reference = max(reference, (packed_TV - alone(input_ids=ids_1T, use_cache=False).logits[0]).abs().max().item())
            start += length
    return own, reference


def main() -> None:
    figures: dict[str, Any] = {}
    eager = make_model("eager")
    worst = 0.0
    print(f"largest difference of logits, packed against alone, fp32 (to reach: under {TARGET:g})")
    for attention in OFFERED:
        try:
            model = make_model(attention)
            found = {f"{rows} x {tokens}": largest_difference(model, eager, tokens, rows) for tokens, rows in ROWS}
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0][:150]
            figures[attention] = {"not run": f"{type(error).__name__}: {reason}"}
            print(f"{attention:20} does not run here: {type(error).__name__}: {reason}")
            continue
        figures[attention] = found
        worst = max(worst, *(max(pair) for pair in found.values()))
        cells = "   ".join(f"{name}: {own:.1e} (eager alone {other:.1e})" for name, (own, other) in found.items())
        print(f"{attention:20} {cells}")
    with torch.no_grad():
        input_ids_BT, position_ids_BT, lengths = random_rows(256, 1, torch.Generator().manual_seed(257))
        kept = make_model("sdpa")(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=True).logits
        last = lengths[0][-1]
        leak = (kept[0, -last:] - eager(input_ids=input_ids_BT[:, -last:], use_cache=False).logits[0]).abs().max().item()
    print(f"what a leak looks like (sdpa with a cache, the library's default): {leak:.2g}")
    figures |= {"largest": worst, "leak": leak}
    print(f"largest of all that run: {worst:.1e}: {'under' if worst < TARGET else 'NOT under'} {TARGET:g}")
    print("RESULT " + json.dumps(figures))
    sys.exit(0 if worst < TARGET else 1)


if __name__ == "__main__":
    main()
