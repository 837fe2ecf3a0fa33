"""Losses of a long text in chunks against one forward pass: the same to 1e-5, with memory that grows by the cache alone.

Reference: the model's own forward pass over the whole text, all logits at once, in the same run, at a length where it
fits. The peak is the process's, in a fresh process for each length; taken from it: the process before, and the cache's
bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys

MINUTES = 3
LENGTHS = (2048, 8192, 32768)
ONE_SHOT = 2048
SHAPE = {"vocab_size": 32016, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


def child(kind: str, tokens: int) -> None:
    """One measurement in this process, as a line of JSON."""
    import resource

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from eval.losses import chunked_losses

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, SHAPE["vocab_size"], (max(tokens, 64),)).tolist()
    chunked_losses(model, ids[:64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if kind == "chunks":
        losses_T = chunked_losses(model, ids)
    else:
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            losses_T = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="none")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    cache = 2 * SHAPE["num_hidden_layers"] * SHAPE["hidden_size"] * 4 * tokens
    print(json.dumps({"peak": peak, "cache": cache, "losses": losses_T[:ONE_SHOT].tolist()}))


def measure(kind: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.chunked_losses", kind, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    whole, chunks = measure("one-shot", ONE_SHOT), measure("chunks", ONE_SHOT)
    apart = max(abs(one - other) for one, other in zip(whole["losses"], chunks["losses"], strict=True))
    print(f"{ONE_SHOT} tokens: largest difference of a token's loss {apart:.2e} nats (to reach: 1e-5)")
    print(f"one pass, {ONE_SHOT} tokens: {whole['peak'] / 2**20:.0f} MiB more at the peak")
    beside = {}
    for tokens in LENGTHS:
        found = measure("chunks", tokens)
        beside[tokens] = round((found["peak"] - found["cache"]) / 2**20, 1)
        peak, cache = (found[name] / 2**20 for name in ("peak", "cache"))
        print(f"chunks, {tokens} tokens: {peak:.0f} MiB, of these the cache {cache:.0f}, the rest {beside[tokens]}")
    figures = {"largest_difference": apart, "one_shot_mib": round(whole["peak"] / 2**20, 1), "beside_the_cache_mib": beside}
    print("RESULT " + json.dumps(figures))
    assert apart <= 1e-5


if __name__ == "__main__":
    if len(sys.argv) == 3:
        child(sys.argv[1], int(sys.argv[2]))
    else:
        main()
