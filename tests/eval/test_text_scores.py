"""Texts are compared as published scorers compare them."""

import json
import os
import re
from pathlib import Path

import pytest

from eval.text_scores import edit_similarity, exact_match, first_line, smoothed_bleu, split_punctuation


def real_data() -> Path:
    folder = os.environ.get("CODETUNE_TEST_DATA")
    if not folder:
        pytest.skip("CODETUNE_TEST_DATA does not name a folder with the scorers' fixtures")
    return Path(folder)


def test_the_docstring_fixture_has_its_published_bleu() -> None:
    def lines(name: str) -> list[str]:
        text = (real_data() / "docstring" / name).read_text(encoding="utf-8")
        return [line.partition("\t")[2] for line in text.splitlines()]

    pairs = list(zip(lines("predictions.txt"), lines("reference.txt"), strict=True))
    bleu = 100 * sum(smoothed_bleu(prediction, reference) for prediction, reference in pairs) / len(pairs)
    assert bleu == pytest.approx(9.554726113590661, abs=1e-12)


def test_the_line_fixture_has_its_published_scores() -> None:
    folder = real_data() / "codexglue_line"

    def without_literals(code: str) -> str:
        for kind, whole, text in re.findall(r"<(STR|NUM|CHAR)_LIT(:(.*?))?>", code, re.DOTALL):
            code = code.replace(f"<{kind}_LIT{whole}>", text)
        return code

    golds = [without_literals(json.loads(line)["gt"]) for line in (folder / "answers.json").read_text().splitlines()]
    given = [without_literals(line.strip()) for line in (folder / "predictions.txt").read_text().splitlines()]
    assert 100 * sum(map(edit_similarity, given, golds)) / len(golds) == pytest.approx(43.8)
    assert sum(map(exact_match, given, golds)) == 0


def test_bleu_of_worked_examples() -> None:
    assert smoothed_bleu("return the sum", "return the sum") == pytest.approx(1.0)
    # one of two words, no pair of (1 + 1): (1/2 * 1/2 * 1/1 * 1/1) ** (1/4), no brevity penalty
    assert smoothed_bleu("a b", "a c") == pytest.approx((0.5 * 0.5) ** 0.25)
    assert smoothed_bleu("", "a") == pytest.approx(0.0, abs=1e-30)


def test_edit_similarity_is_in_whole_per_cent() -> None:
    assert edit_similarity("abcd", "abxd") == 0.75
    assert edit_similarity("abc", "abd") == 0.67
    assert (edit_similarity("", "abc"), edit_similarity("x", "x")) == (0.0, 1.0)


def test_words_decide_an_exact_match() -> None:
    assert exact_match("  return  x", "return x") == 1.0 and exact_match("returnx", "return x") == 0.0
    assert first_line("\n  \n\tx = 1\ny") == "\tx = 1" and first_line(" \n") == ""
    assert split_punctuation("x.y(1)") == "x . y ( 1 )"
