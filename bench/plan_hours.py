"""`make plan`'s arithmetic against the paper's GPU-hours: the MFU that they imply (paper, Table 26).

The paper gives hours for all models of a release together, on A100-80: 400,000 for the nine of 7B to 34B, and 1,400,000
with the three of 70B. Their operations are added up here from tokens and shapes. Whether the Python models of 7B and 13B
had a first stage of their own, without infilling, is not said (their vocabulary suggests it), hence two sums. Evaluation,
failed runs and experiments are in the hours or not; the paper does not say.

    python -m bench.plan_hours
"""

from __future__ import annotations

import argparse
import json

from codetune.gpus import GPUS
from codetune.shape import known_shape

MINUTES = 0.1
STAGE1, PYTHON, INSTRUCT = 500e9, 100e9, 5e9
# rows of 16,384; steps x batch: 3,000 and 10,000 of 2M, 11,000 of 1M (Sec. 2.6)
LCFT = {"7b": 3_000 * 2**21, "13b": 10_000 * 2**21, "34b": 11_000 * 2**20}
HOURS = {"7b to 34b, nine models": 400_000, "70b, three models": 1_000_000}


def operations(size: str, tokens: float, sequence_tokens: int) -> float:
    shape = known_shape(size, infill_tokens=True)
    assert shape is not None
    return tokens * shape.training_flops_per_token(sequence_tokens)


def of_nine(own_first_stage: bool) -> float:
    """Base, Python and Instruct at three sizes."""
    total = 0.0
    for size, lcft in LCFT.items():
        total += operations(size, STAGE1 + PYTHON + INSTRUCT, 4096) + 2 * operations(size, lcft, 16384)
        total += operations(size, STAGE1, 4096) if own_first_stage and size != "34b" else 0.0
    return total


def of_seventy() -> float:
    """1T of code, 100B of Python, and long context for the base model; instruct tokens are not readable and left out."""
    return operations("70b", 1e12 + PYTHON, 4096) + operations("70b", 10_000 * 2**21, 16384)


def main() -> None:
    """Print the implied MFU of each sum."""
    argparse.ArgumentParser(prog="python -m bench.plan_hours").parse_args()
    peak = GPUS["A100-80"].flops
    assert peak is not None
    nine, seventy = HOURS
    implied = {
        f"{nine}, one first stage a size": of_nine(False) / (HOURS[nine] * 3600 * peak),
        f"{nine}, the Python models of 7b and 13b with their own": of_nine(True) / (HOURS[nine] * 3600 * peak),
        seventy: of_seventy() / (HOURS[seventy] * 3600 * peak),
        "all twelve": (of_nine(False) + of_seventy()) / (sum(HOURS.values()) * 3600 * peak),
    }
    for what, mfu in implied.items():
        print(f"{what:<80}{mfu:>7.1%}")
    print("RESULT " + json.dumps({what: round(mfu, 4) for what, mfu in implied.items()}))


if __name__ == "__main__":
    main()
