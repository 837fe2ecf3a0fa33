"""Generated functions: valid Python, the same for everyone, and held out by template."""

from __future__ import annotations

import ast
import keyword
import re
from itertools import islice

import pytest

from data_pipelines import generated
from data_pipelines.generated import (
    NAMES,
    families,
    generated_documents,
    generated_held_out_documents,
    is_held_out_family,
)


@pytest.fixture(autouse=True)
def short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "DOCUMENTS_PER_PASS", 2_000)


def one_pass(lanes: int = 1, pass_index: int = 0) -> list[tuple[str, str, str]]:
    return [document for lane in range(lanes) for document in generated_documents(lane, lanes, pass_index)]


def steps_of(text: str) -> tuple[str, ...]:
    """The template, read off the text: the name of the function."""
    return tuple(text.partition("(")[0].removeprefix("def ").split("_"))


def test_every_document_is_valid_python_and_short() -> None:
    for text, identity, family in [*one_pass(), *generated_held_out_documents(200)]:
        ast.parse(text)
        assert text.endswith("\n") and 80 <= len(text) <= 260, identity
        assert "-".join(steps_of(text)) == family


def test_lanes_deal_out_the_same_documents_whatever_their_number() -> None:
    whole = one_pass()
    assert len(whole) == generated.DOCUMENTS_PER_PASS
    assert sorted(one_pass(lanes=3)) == sorted(one_pass(lanes=8)) == sorted(whole)
    assert len({identity for _, identity, _ in whole}) == len(whole)


def test_a_pass_is_the_same_twice_and_the_next_one_is_new() -> None:
    first, again, second = one_pass(), one_pass(), one_pass(pass_index=1)
    assert first == again
    seen = {text for text, _, _ in first}
    assert sum(text in seen for text, _, _ in second) < 0.01 * len(second)


def test_families_are_held_out_whole() -> None:
    trained = {steps_of(text) for text, _, _ in [*one_pass(), *one_pass(pass_index=1)]}
    measured = {steps_of(text) for text, _, _ in generated_held_out_documents(400)}
    assert not trained & measured and len(measured) > 30
    assert not any(map(is_held_out_family, trained)) and all(map(is_held_out_family, measured))
    # no trained function begins with the two steps of a measured one either
    assert not {steps[:2] for steps in trained} & {steps[:2] for steps in measured}
    # and yet every step is trained in every place that a measured function has it: only the sequence is new
    seen = {(place, step) for steps in trained for place, step in enumerate(steps)}
    assert {(place, step) for steps in measured for place, step in enumerate(steps)} <= seen


def test_about_one_family_in_eight_is_held_out() -> None:
    chosen = [is_held_out_family(steps) for steps in families()]
    assert len(chosen) == 12 * 11 + 12 * 11 * 10
    assert 0.05 < sum(chosen) / len(chosen) < 0.20


def test_names_are_carried_through_a_document() -> None:
    """Every name stands in its document twice or more: what a cut takes away, the rest tells."""
    for text, _, _ in [*islice(generated_documents(0, 1, 0), 1000), *generated_held_out_documents(100)]:
        words = re.findall(r"[a-z]+", text)
        assert all(words.count(name) > 1 for name in {*words} & {*NAMES}), text


def test_names_are_usable_names() -> None:
    assert not any(keyword.iskeyword(name) for name in NAMES)
    assert len(set(NAMES)) == len(NAMES)
