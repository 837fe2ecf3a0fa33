"""Near copies against every pair compared, who stays, and benchmark texts found in documents."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupSignature

from codetune.problems import BenchmarkText, load_problems
from codetune.recipe import NearCopySettings
from data_pipelines.benchmark_overlap import index_of
from data_pipelines.near_copies import CodeSignature, alike_pairs, candidate_groups, choose, decide, minhash_config
from data_pipelines.shingles import code_tokens, jaccard, shingles, words


def test_shingles_are_sets_of_neighbouring_tokens() -> None:
    assert len(code_tokens("f(x_1)")) == 4
    assert (code_tokens("f( x_1 )\n") == code_tokens("f(x_1)")).all()
    assert (words('f("A b", 1)') == words("F a\nB 1")).all()
    tokens = code_tokens("a b c d a b c d")
    assert len(shingles(tokens, 3)) == 4  # abc bcd cda dab, each once
    assert len(shingles(tokens, 9)) == 0
    assert jaccard(shingles(code_tokens("a b c d"), 2), shingles(code_tokens("b c d e"), 2)) == 2 / 4


def test_shingles_differ_where_the_runs_of_words_do() -> None:
    """Against Python's own sets of tuples."""
    draw = np.random.default_rng(0)
    one, two = ([f"w{item}" for item in draw.integers(0, 4, 200)] for _ in range(2))
    sets = [{tuple(tokens[i : i + 4]) for i in range(197)} for tokens in (one, two)]
    hashed = [shingles(code_tokens(" ".join(tokens)), 4) for tokens in (one, two)]
    assert [len(item) for item in hashed] == [len(item) for item in sets]
    assert jaccard(*hashed) == len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_a_long_documents_signature_is_datatroves(tmp_path: Path) -> None:
    step = CodeSignature(str(tmp_path), minhash_config(NearCopySettings()))
    shingle_set = np.random.default_rng(0).integers(0, 2**63, (5000, 1)).astype(np.uint64)
    assert step.get_signature(shingle_set) == MinhashDedupSignature.get_signature(step, shingle_set)


def test_a_document_is_dropped_only_for_one_that_stays_and_is_alike() -> None:
    a, b, c, d = (0, 0), (0, 1), (1, 0), (1, 1)
    rank = {a: b"1", b: b"2", c: b"3", d: b"4"}.__getitem__
    assert choose({(a, b): 0.8, (b, c): 0.9}, rank) == {b: (a, 0.8)}  # c is like b, which goes, and not like a
    assert choose({(a, b): 0.8, (a, c): 0.7, (b, c): 0.9}, rank) == {b: (a, 0.8), c: (a, 0.7)}
    assert choose({(a, d): 0.8, (c, d): 0.9}, rank) == {d: (c, 0.9)}  # for the one that is more alike


def test_a_large_group_is_compared_with_those_that_differ() -> None:
    nodes = [(0, place) for place in range(100)]
    sets = {node: shingles(code_tokens(" ".join(f"k{node[1] % 3}w{i}" for i in range(30))), 5) for node in nodes}
    looked = []

    def look(node: tuple[int, int]) -> np.ndarray:
        looked.append(node)
        return sets[node]

    rank = {node: b"%03d" % node[1] for node in nodes}.__getitem__
    pairs = alike_pairs([nodes], look, rank, 0.7)
    assert choose(pairs, rank).keys() == set(nodes[3:])  # three kinds of document, one of each stays
    assert len(looked) < 2 * 3 * 100  # and not 100 * 99


def changed(text: str, kind: int) -> str:
    return [text, text.replace("alpha", "beta"), text + "\n# a note\n", text[: len(text) * 4 // 5]][kind]


def test_pairs_are_those_of_every_pair_compared(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    texts = []
    for _ in range(40):
        body = "\n".join(f"    v{int(a)} = alpha + w{int(b)}" for a, b in draw.integers(0, 10**6, (20, 2)))
        texts += [changed(f"def f{int(draw.integers(10**9))}():\n{body}", kind) for kind in range(4)]
    settings = NearCopySettings()
    documents: list[Any] = [
        Document(text, str(number), metadata={"source": "s", "content_hash": f"{number:032x}"})
        for number, text in enumerate(texts)
    ]
    for shard in range(2):
        step = CodeSignature(str(tmp_path / "signatures"), minhash_config(settings))
        step.run(iter(documents[shard::2]), shard, 2)  # pyright: ignore[reportArgumentType]
    for bucket in range(settings.buckets):
        find = MinhashDedupBuckets(str(tmp_path / "signatures"), str(tmp_path / "buckets"), config=minhash_config(settings))
        find.run(None, bucket, settings.buckets)  # pyright: ignore[reportArgumentType]
    sets = {
        node: shingles(code_tokens(documents[node[0] + 2 * node[1]].text), 5)
        for node in itertools.product(range(2), range(80))
    }
    truth = {pair for pair in itertools.combinations(sorted(sets), 2) if jaccard(sets[pair[0]], sets[pair[1]]) >= 0.7}
    rank = {node: documents[node[0] + 2 * node[1]].metadata["content_hash"].encode() for node in sets}
    found = alike_pairs(candidate_groups(tmp_path / "buckets"), sets.__getitem__, rank.__getitem__, 0.7)
    assert found.keys() <= truth  # every one is exact
    assert len(found) >= 0.95 * len(truth) and len(truth) >= 80
    counts = decide(tmp_path / "buckets", tmp_path, lambda shard: enumerate(documents[shard::2]), 2, settings)
    assert counts["pairs"] == len(found)
    assert not (tmp_path / "shingles.bin").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


@pytest.fixture(scope="module")
def human_eval() -> list[Any]:
    return list(load_problems("humaneval", hub=False).problems)


def test_copied_and_reformatted_problems_are_found_and_clean_code_is_not(human_eval: list[Any]) -> None:
    index = index_of(
        (BenchmarkText("humaneval", item.id, kind, text) for item in human_eval for kind, text in item.texts()), 10
    )
    around = "import os\n\n\ndef walk(folder):\n    return sorted(os.listdir(folder))\n\n\n"
    for problem in human_eval:
        program = problem.prompt + problem.reference
        for text in (around + program, around + ast.unparse(ast.parse(program)), program.replace("    ", "\t")):
            hits = index.hits(text, 0.5)
            assert problem.id in {hit.problem for hit in hits}, (problem.id, hits)
    for module in (ast, itertools.__class__, Path):
        text = Path(getattr(module, "__file__", ast.__file__)).read_text()
        assert index.hits(text, 0.5) == []


def test_the_share_of_a_text_decides() -> None:
    sentence = "one two three four five six seven eight nine ten eleven twelve"  # 3 runs of 10 words
    index = index_of([BenchmarkText("b", "p", "prompt", sentence), BenchmarkText("b", "q", "prompt", "too short")], 10)
    assert index.facts["benchmarks"] == {"b": {"texts": 1, "too_short": 1}}
    assert [hit.share for hit in index.hits(f"before {sentence.upper()}. after", 0.5)] == [1.0]
    two_of_three = sentence.removesuffix(" twelve")
    assert [hit.share for hit in index.hits(two_of_three, 0.5)] == [0.6667]
    assert index.hits(two_of_three, 0.7) == []
    assert index.hits(sentence.removesuffix(" eleven twelve"), 0.5) == []
