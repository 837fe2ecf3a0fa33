"""Generated functions: valid Python, the same for everyone, and held out by template."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from itertools import islice

import pytest

from data_pipelines import generated
from data_pipelines.generated import (
    FAMILIES,
    HELD_OUT_FAMILIES,
    NAMES,
    VERBS,
    generated_documents,
    generated_held_out_documents,
)


@pytest.fixture(autouse=True)
def short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "DOCUMENTS_PER_PASS", 2_000)


def one_pass(lanes: int = 1, pass_index: int = 0, families: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    return [document for lane in range(lanes) for document in generated_documents(families, lane, lanes, pass_index)]


def test_every_document_is_valid_python_and_short() -> None:
    documents = [*generated_documents((), 0, 1, 0), *generated_held_out_documents(200)]
    for text, identity, _ in documents:
        ast.parse(text)
        assert text.endswith("\n") and 80 <= len(text) <= 400, identity
    assert {family for _, _, family in documents} == {*FAMILIES, *HELD_OUT_FAMILIES}


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


def test_chosen_families_only() -> None:
    documents = one_pass(families=("guard", "tally"))
    assert {family for _, _, family in documents} == {"guard", "tally"}
    assert len(documents) == generated.DOCUMENTS_PER_PASS


def test_a_held_out_or_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="held out"):
        next(generated_documents((HELD_OUT_FAMILIES[0],), 0, 1, 0))
    with pytest.raises(ValueError, match="no training family 'gaurd'"):
        next(generated_documents(("gaurd",), 0, 1, 0))


def template_of(text: str) -> str:
    """A document with names, verbs and numbers taken out."""
    return re.sub(
        r"[A-Za-z]+", lambda word: "N" if word[0].lower() in {*NAMES, *VERBS} else word[0], re.sub(r"\d", "0", text)
    )


def test_no_training_document_has_a_held_out_template() -> None:
    trained = {template_of(text) for text, _, _ in one_pass()}
    held_out = {template_of(text) for text, _, _ in generated_held_out_documents(400)}
    assert len(held_out) >= len(HELD_OUT_FAMILIES)
    assert not trained & held_out


def test_names_are_carried_through_a_document() -> None:
    """At least nine names in ten stand in their document twice or more: what a cut takes away, the rest tells."""
    repeated = total = 0
    for text, _, _ in [*islice(generated_documents((), 0, 1, 0), 1000), *generated_held_out_documents(100)]:
        words = re.findall(r"[a-z]+", text.lower())
        for name in {*words} & {*NAMES}:
            total += 1
            repeated += words.count(name) > 1
    assert repeated > 0.9 * total


def test_names_are_usable_names() -> None:
    assert not any(keyword.iskeyword(name) for name in NAMES)
    assert len(set(NAMES)) == len(NAMES)
    called = {"int", "str", "zip", "print"}
    assert called <= set(dir(builtins)) and not called & set(NAMES)
