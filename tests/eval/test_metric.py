"""pass@k for the `evaluate` library: offline, isolated, and undefined where it must be."""

import pytest

pytest.importorskip("evaluate", reason="the package evaluate is not installed (extra `eval`)")

from eval.metric import PassAtK

RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"
FORGED = "import os\nos._exit(0)\n"
TESTS = "assert add(2, 3) == 5\nassert add(0, 0) == 0"


def test_scores_are_the_closed_form_and_k_beyond_the_samples_is_none() -> None:
    found = PassAtK().compute(
        references=[TESTS, TESTS], predictions=[[RIGHT, WRONG, FORGED, RIGHT], [WRONG] * 4], k=[1, 2, 10]
    )
    assert found is not None
    # first problem: 2 of 4 pass, so 1/2 and 1 - C(2,2)/C(4,2) = 5/6; second: none
    assert found["pass@1"] == pytest.approx(0.25) and found["pass@2"] == pytest.approx(5 / 12)
    assert found["pass@10"] is None and found["pass@10_interval"] is None
    assert [row["reason"] for row in found["results"][0]] == ["passed", "wrong-answer", "crashed", "passed"]


def test_a_problem_without_programs_is_an_error() -> None:
    with pytest.raises(ValueError, match="a problem has no program"):
        PassAtK().compute(references=[TESTS], predictions=[[]])
