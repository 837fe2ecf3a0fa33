"""From verdicts to scores: pass@k that is undefined rather than flattering, intervals, correlations of languages.

What comes in: per problem, how many samples there were and how many passed, or any figure between 0 and 1. What goes out:
means over problems with 95 % intervals, drawn by bootstrap over the problems. A problem is the unit: two hundred samples of
one problem are one observation.

pass@k of a problem with n samples, c of them right, is 1 - C(n-c, k) / C(n, k) (Chen et al. 2021), in exact integers and
rounded once. It does not exist for n < k, and nothing here makes it up: not 1, and not the pass@n.

An interval over problems that all have the same score cannot be drawn: it would have no width. There the exact binomial
bound is given instead (none of 164: 0 to 2.2 %).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
Decoding = Literal["greedy", "sampled"]


@dataclass(frozen=True)
class Score:
    """A mean over problems and where it may lie; all as shares, not per cent."""

    value: float
    low: float
    high: float
    problems: int
    samples: int  # per problem, the fewest there were
    decoding: Decoding

    def to_dict(self) -> dict[str, Any]:
        rounded = {name: round(getattr(self, name), 6) for name in ("value", "low", "high")}
        return {**rounded, "problems": self.problems, "samples": self.samples, "decoding": self.decoding}

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


def pass_at_k(samples: int, passed: int, k: int) -> float | None:
    """The chance that one of k samples, drawn from these without putting back, passes; None where there are fewer than k.

    Example: 5 samples, 2 passed, k 1 -> 0.4; k 2 -> 0.7; k 6 -> None

    Raises:
        ValueError: counts that cannot be.
    """
    if k < 1 or not 0 <= passed <= samples:
        raise ValueError(f"{passed} passed of {samples} samples, k {k}: counts need 0 <= passed <= samples and k >= 1")
    if samples < k:
        return None
    ways = math.comb(samples, k)
    return (ways - math.comb(samples - passed, k)) / ways


def pass_at_k_score(counts: Sequence[tuple[int, int]], k: int, decoding: Decoding, seed: int = 0) -> Score | None:
    """The mean of pass@k over problems, each given as (samples, passed); None where any problem has fewer than k samples.

    Raises:
        ValueError: no problems, or one of them without a sample: it can be neither left out nor counted as failed.
    """
    without = sum(samples == 0 for samples, _ in counts)
    if not counts or without:
        raise ValueError(f"{without or 'all'} problems have no sample: grade them all, or say which ones are meant")
    values = [pass_at_k(samples, passed, k) for samples, passed in counts]
    if any(value is None for value in values):
        return None
    return mean_score([value for value in values if value is not None], min(n for n, _ in counts), decoding, seed)


def mean_score(values_P: Sequence[float], samples: int, decoding: Decoding, seed: int = 0) -> Score:
    """The mean over problems with its interval."""
    low, high = interval(values_P, seed=seed)
    return Score(float(np.mean(values_P)), low, high, len(values_P), samples, decoding)


def interval(values_P: Sequence[float], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Where the mean may lie, had other problems of the same kind been asked: percentiles of resampled means.

    Example: 164 zeros -> (0.0, 0.0222): the exact bound, since resampling zeros gives zeros
    """
    array_P = np.asarray(values_P, dtype=np.float64)
    outside = (1 - level) / 2
    if array_P.size == 0:
        raise ValueError("no problems, hence no interval")
    if (array_P == array_P[0]).all():
        bound = outside ** (1 / array_P.size)
        if array_P[0] == 0.0:
            return 0.0, 1 - bound
        return (bound, 1.0) if array_P[0] == 1.0 else (float(array_P[0]), float(array_P[0]))
    low, high = np.quantile(resampled_means(array_P, draws, seed), [outside, 1 - outside])
    return float(low), float(high)


def resampled_means(values_P: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Means of `draws` samples of the problems, with putting back, shape (draws,); a bounded number are held at once."""
    generator = np.random.default_rng(seed)
    block = max(1, 4_000_000 // values_P.size)
    parts = []
    for start in range(0, draws, block):
        places = generator.integers(0, values_P.size, (min(block, draws - start), values_P.size))
        parts.append(values_P[places].mean(1))
    return np.concatenate(parts)


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float], seed: int = 0) -> tuple[float, float, float]:
    """Mean difference over the problems that both have, with its interval; problems are drawn in pairs.

    Raises:
        ValueError: they have no problem in common.
    """
    shared = sorted(set(ours) & set(theirs))
    if not shared:
        raise ValueError("no problem in common: the two results are of different benchmarks")
    differences = [ours[name] - theirs[name] for name in shared]
    low, high = interval(differences, seed=seed) if len(set(differences)) > 1 else (differences[0], differences[0])
    return float(np.mean(differences)), low, high


def language_correlation(rows: Sequence[Mapping[str, float]]) -> dict[tuple[str, str], float | None]:
    """Pearson's correlation between languages over checkpoints (one row of scores each); the paper's Figure 3.

    A pair with a language that scores the same at every checkpoint has none.

    Raises:
        ValueError: fewer than three checkpoints, or rows of different languages.
    """
    if len(rows) < 3:
        raise ValueError(f"a correlation over {len(rows)} checkpoints says nothing; it takes three or more of one size")
    languages = list(rows[0])
    for row in rows:
        if set(row) != set(languages):
            odd = ", ".join(sorted(set(row) ^ set(languages)))
            raise ValueError(f"not every checkpoint has the same languages: {odd}")
    table_CL = np.array([[row[language] for language in languages] for row in rows])
    found: dict[tuple[str, str], float | None] = {}
    for first, one in enumerate(languages):
        for second, other in enumerate(languages[: first + 1]):
            pair_C2 = table_CL[:, [first, second]]
            constant = (pair_C2 == pair_C2[0]).all(0).any()
            found[one, other] = None if constant else float(np.corrcoef(pair_C2.T)[0, 1])
    return found
