"""Near copies: candidates by datatrove's MinHash, decided by exact similarity, survivors chosen by content hash.

What comes in: documents of shards whose order is fixed. What goes out: for each shard the places of documents to drop, and
for each of them the document that is kept in its stead and how alike the two are.

`CodeSignature` is datatrove's signature step over tokens of code instead of words of English; `MinhashDedupBuckets` is
used as it is. What stands in place of its clustering: documents that share a bucket are compared by the exact Jaccard
similarity of their shingles, and go, in the order of their content hashes, either into the set that is kept or, where one
that is kept is alike, out. A chain of likenesses therefore drops no document that is not alike to one that stays, and
neither the number of tasks nor their order can change who stays.

The trade: comparing costs a second look at the candidates' texts, and one process holds their numbers (not their texts,
which lie in a memory-mapped file): for 10 million candidates about 2 GB.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.word_tokenizers import WordTokenizer

from codetune.artifacts import write_json
from codetune.recipe import NearCopySettings
from data_pipelines.shingles import code_tokens, jaccard, shingles

WHOLE_GROUP = 40  # documents with one bucket in common, up to which each is compared with each
ROWS_AT_ONCE = 2048  # shingles hashed at once: memory of a signature does not grow with the document

Node = tuple[int, int]  # shard, place in it


def minhash_config(settings: NearCopySettings) -> MinhashConfig:
    return MinhashConfig(settings.shingle_tokens, num_buckets=settings.buckets, hashes_per_bucket=settings.hashes, seed=1)


class _NoWords(WordTokenizer):
    """Datatrove's step wants a tokenizer of a language, and loads spacy for one; `CodeSignature` has shingles of its own."""

    def word_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    sent_tokenize = span_tokenize = word_tokenize  # pyright: ignore[reportAssignmentType]


class CodeSignature(MinhashDedupSignature):
    """datatrove's signatures of the shingles of `data_pipelines.shingles`, a stretch of them at a time."""

    def __init__(self, output_folder: str, config: MinhashConfig) -> None:
        no_words: Any = _NoWords()
        super().__init__(output_folder, config, language=no_words)

    def get_shingles(self, text: str) -> np.ndarray:
        return shingles(code_tokens(text), self.config.n_grams).reshape((-1, 1))

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        smallest = [super(CodeSignature, self).get_signature(part) for part in _stretches(shingles)]
        return np.min(np.array(smallest, np.uint64), axis=0).tolist()


def _stretches(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[start : start + ROWS_AT_ONCE]


def candidate_groups(folder: Path) -> Iterator[list[Node]]:
    """Documents with a bucket in common, bucket by bucket, out of the chains of pairs that datatrove writes."""
    for path in sorted(folder.glob("*.dups")):
        pairs = np.fromfile(path, "<u4").reshape(-1, 4)
        group: list[Node] = []
        for shard_a, place_a, shard_b, place_b in pairs.tolist():
            if not group or group[-1] != (shard_a, place_a):  # a chain goes on where the pair before it ended
                if group:
                    yield group
                group = [(shard_a, place_a)]
            group.append((shard_b, place_b))
        if group:
            yield group


def alike_pairs(
    groups: Iterable[list[Node]], shingles_of: Callable[[Node], np.ndarray], rank: Callable[[Node], bytes], similarity: float
) -> dict[tuple[Node, Node], float]:
    """Pairs at least so similar, with their similarity, of all that share a bucket.

    In a group of more than `WHOLE_GROUP`, documents in the order of `rank` are compared with those before them that were
    alike to none, which is as many as there are kinds of document in it.
    """
    seen: dict[tuple[Node, Node], float] = {}

    def look(a: Node, b: Node) -> float:
        pair = (a, b) if a < b else (b, a)
        if pair not in seen:
            seen[pair] = jaccard(shingles_of(a), shingles_of(b))
        return seen[pair]

    for group in groups:
        ordered = sorted(set(group), key=rank)
        if len(ordered) <= WHOLE_GROUP:
            for a, b in itertools.combinations(ordered, 2):
                look(a, b)
            continue
        leaders: list[Node] = []
        for node in ordered:
            if all(look(leader, node) < similarity for leader in leaders):
                leaders.append(node)
    return {pair: value for pair, value in seen.items() if value >= similarity}


def choose(pairs: dict[tuple[Node, Node], float], rank: Callable[[Node], bytes]) -> dict[Node, tuple[Node, float]]:
    """Who is dropped, for whom, and how alike they are: in order of `rank` each stays unless one that stays is alike.

    Example: b like a and c, ranks a < b < c -> b is dropped for a, and c stays: it is not like a
    """
    near: dict[Node, list[tuple[Node, float]]] = defaultdict(list)
    for (a, b), value in pairs.items():
        near[a].append((b, value))
        near[b].append((a, value))
    dropped: dict[Node, tuple[Node, float]] = {}
    kept: set[Node] = set()
    for node in sorted(near, key=rank):
        staying = [(-value, rank(other), other) for other, value in near[node] if other in kept]
        if staying:
            value, _, other = min(staying)
            dropped[node] = (other, -value)
        else:
            kept.add(node)
    return dropped


class ShingleStore:
    """Shingles of the candidates in a memory-mapped file, so that the process holds places and not sets."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._places: dict[Node, tuple[int, int]] = {}
        self._end = 0
        self._all: np.ndarray | None = None

    def add(self, node: Node, values: np.ndarray) -> None:
        self._file.write(values.tobytes())
        self._places[node] = (self._end, self._end + len(values))
        self._end += len(values)

    def close(self) -> None:
        self._file.close()
        self._all = np.memmap(self._path, np.uint64, "r") if self._end else np.empty(0, np.uint64)

    def __call__(self, node: Node) -> np.ndarray:
        assert self._all is not None, "close() first"
        start, end = self._places[node]
        return self._all[start:end]


def decide(
    buckets: Path, work: Path, documents: Callable[[int], Iterator[tuple[int, Any]]], shards: int, settings: NearCopySettings
) -> dict[str, int]:
    """Compare all candidates; write who is dropped for whom, `copies-<shard>.json`, and every alike pair, `pairs.jsonl`.

    `documents` gives a shard's documents with their places, in the order in which their signatures were made.
    """
    wanted: list[set[int]] = [set() for _ in range(shards)]
    for group in candidate_groups(buckets):
        for shard, place in group:
            wanted[shard].add(place)
    store = ShingleStore(work / "shingles.bin")
    ranks: dict[Node, bytes] = {}
    names: dict[Node, list[str]] = {}
    for shard in range(shards):
        for place, document in documents(shard) if wanted[shard] else ():
            if place in wanted[shard]:
                node = (shard, place)
                store.add(node, shingles(code_tokens(document.text), settings.shingle_tokens))
                key = f"{document.metadata['source']}\0{document.id}"
                ranks[node] = bytes.fromhex(document.metadata["content_hash"]) + key.encode()
                names[node] = [document.metadata["source"], document.id]
    store.close()
    pairs = alike_pairs(candidate_groups(buckets), store, ranks.__getitem__, settings.similarity)
    dropped = choose(pairs, ranks.__getitem__)
    for shard in range(shards):
        own = {
            str(place): [*names[other], round(value, 4)]
            for (home, place), (other, value) in dropped.items()
            if home == shard
        }
        write_json(work / f"copies-{shard:05d}.json", own)
    with (work / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for (a, b), value in sorted(pairs.items()):
            first, second = sorted((a, b), key=ranks.__getitem__)
            gone = [names[node] for node in (first, second) if node in dropped]
            line = {"a": names[first], "b": names[second], "similarity": round(value, 4), "dropped": gone}
            file.write(json.dumps(line) + "\n")
    store_path = work / "shingles.bin"
    del store
    store_path.unlink()
    return {"candidates": sum(map(len, wanted)), "pairs": len(pairs), "dropped": len(dropped)}
