"""Long documents are preferred by exact shares, and those that a context is measured on are held out and long enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from codetune.artifacts import HELD_OUT, open_rows, read_held_out
from codetune.recipe import LongDocumentSettings, load_recipe
from codetune.tokens import open_codec
from data_pipelines.build import build
from data_pipelines.fim import Sample
from data_pipelines.held_out import is_held_out_group
from data_pipelines.long_documents import LongPreference

ROW = 128


def test_the_rule_by_hand() -> None:
    prefers = LongPreference(LongDocumentSettings(minimum_tokens=4, share=0.5), None)
    assert [prefers.takes(tokens) for tokens in (2, 4, 2, 2, 1)] == [False, True, True, True, False]
    assert (prefers.long_tokens, prefers.short_tokens) == (4, 4)
    everything = LongPreference(LongDocumentSettings(minimum_tokens=4, share=0.5), share=0.0)
    assert all(everything.takes(1) for _ in range(5)) and not everything.finds_nothing()
    nothing_short = LongPreference(LongDocumentSettings(minimum_tokens=4, share=1.0), None)
    assert not nothing_short.takes(3) and nothing_short.finds_nothing()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_share_is_never_missed_and_is_met_where_short_ones_abound(share: float) -> None:
    draw = np.random.default_rng(1)
    prefers = LongPreference(LongDocumentSettings(minimum_tokens=100, share=share), None)
    for tokens in np.where(draw.random(4000) < 0.1, draw.integers(100, 400, 4000), draw.integers(1, 100, 4000)).tolist():
        prefers.takes(tokens)
        total = prefers.long_tokens + prefers.short_tokens
        assert total == 0 or prefers.long_tokens / total >= share
    # one document in ten is long and five times as long as the others: a third of all tokens
    realised = prefers.long_tokens / (prefers.long_tokens + prefers.short_tokens)
    assert realised == pytest.approx(max(share, 0.357), abs=0.03)


def test_only_the_first_tokens_are_used_and_the_rest_is_counted() -> None:
    prefers = LongPreference(LongDocumentSettings(minimum_tokens=4, first_tokens=16), None)
    sample = Sample(np.arange(40), 0, "a", 0)
    assert prefers.cut_to_first_tokens(sample) == 24
    assert sample.input_ids.tolist() == list(range(16))
    assert prefers.cut_to_first_tokens(sample) == 0


# ---------------------------------------------------------------------------------------------------------------------
# In a build


def _lines(source: str, number: int, count: int) -> str:
    return "".join(f"{source}_{number}_{line} = {line} + {number}\n" for line in range(count))


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_parent: Path) -> Path:
    """In `code` every fifth document is longer than a row, the others have a tenth of one; `text` has short ones."""
    for source, longest in (("code", 60), ("text", 3)):
        counts = [longest if number % 5 == 0 else 1 + number % 2 for number in range(300)]
        records = [{"text": _lines(source, n, count), "group": f"{source}-{n // 5}"} for n, count in enumerate(counts)]
        (tmp_path / f"{source}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = {
        name: {"kind": "jsonl", "share": 0.5, "path": str(tmp_path / f"{name}.jsonl"), "group_column": "group"}
        for name in ("code", "text")
    }
    sources["text"]["long_share"] = 0.0
    data: dict[str, Any] = {"sequence_tokens": ROW, "sources": sources, "packing": {"group_rows": 16}}
    data["long_documents"] = {"minimum_tokens": 100, "share": 0.75, "first_tokens": 300}
    data["held_out"] = {"fraction": 0.2, "documents_per_source": 4, "long_documents": 3, "long_tokens": 400}
    data["held_out"] |= {"long_sources": ["code"]}
    tree = {
        "name": "lcft",
        "size": "test",
        "parent": str(tiny_parent),
        "runs": str(tmp_path / "runs"),
        "data": data,
        "training": {"train_tokens": ROW * 64, "batch_tokens": ROW * 4},
        "optimizer": {"learning_rate": 1.0e-3},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_rows_are_mostly_of_long_documents_and_every_other_is_counted(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(recipe_file)
    rows = open_rows(build(recipe))
    manifest = rows.manifest
    code = manifest["sources"]["code"]
    lengths, by_document = [], dict[str, int]()
    for number in range(len(rows)):
        row = rows.row(number)
        for place, length in enumerate(row["document_lengths"].tolist()):
            if row["sources"][place] == 0:
                key = f"{row['ids'][place]} {row['passes'][place]}"
                by_document[key] = by_document.get(key, 0) + length
            lengths.append((int(row["sources"][place]), length))
    taken = sum(by_document.values())
    assert sum(tokens for tokens in by_document.values() if tokens >= 100) / taken == pytest.approx(0.75, abs=0.05)
    assert max(by_document.values()) == 300  # of about 800
    assert code["documents_cut"] > 0 and code["tokens_left_out"] > 0
    assert manifest["drops"]["code"]["shorter_than_asked"] > 0
    assert "shorter_than_asked" not in manifest["drops"].get("text", {})
    seen = code["documents_encoded"] + sum(
        count for reason, count in manifest["drops"]["code"].items() if reason == "shorter_than_asked"
    )
    assert seen == code["documents_read"]
    assert code["tokens_encoded"] == taken + code["tokens_not_packed"] + code["tokens_not_taken"]
    assert manifest["lengths"]["all"]["documents"] == len(lengths)
    for place, name in enumerate(("code", "text")):
        own = [length for source, length in lengths if source == place]
        assert (manifest["lengths"][name]["documents"], manifest["lengths"][name]["tokens"]) == (len(own), sum(own))
        assert manifest["lengths"][name]["percentiles"]["50"] == sorted(own)[-(-len(own) // 2) - 1]
    printed = capsys.readouterr().out
    assert "tokens by the length of their document" in printed and "tokens behind the first ones" in printed


def test_long_held_out_documents_are_long_and_of_held_out_groups(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    rows = open_rows(build(recipe))
    codec = open_codec(recipe.parent_path)
    long = [sample for sample in read_held_out(rows.path / HELD_OUT) if sample.layout == "long"]
    assert len(long) == 3
    for sample in long:
        assert sample.source == "code" and len(sample.input_ids) == 400
        text = codec.decode_start(sample.input_ids)
        number = int(text.split("_")[1])
        assert is_held_out_group(f"code-{number // 5}", 0.2)
        assert _lines("code", number, 60).startswith(text)


def test_documents_of_a_group_are_joined_where_none_is_long_enough(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["data.held_out.long_sources=[text]", "data.held_out.long_tokens=60"]
    recipe = load_recipe(recipe_file, settings)
    rows = open_rows(build(recipe))
    long = [sample for sample in read_held_out(rows.path / HELD_OUT) if sample.layout == "long"]
    texts = [open_codec(recipe.parent_path).decode_start(sample.input_ids) for sample in long]
    assert len(texts) == 3
    for text in texts:
        groups = {int(line.split("_")[1]) // 5 for line in text.splitlines() if line.count("_") >= 2}
        assert len(groups) == 1 and len({line.split("_")[1] for line in text.splitlines() if line.count("_") >= 2}) > 1
    recipe = load_recipe(recipe_file, [*settings, "data.held_out.long_tokens=6000", f"runs={recipe_file.parent / 'other'}"])
    build(recipe)
    assert "0 of 3 documents of 6000 tokens found in data.sources.text" in capsys.readouterr().err


def test_a_source_without_long_documents_says_what_to_write(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"`text` has no document of 100 tokens .* write `data.sources.text.long_share: 0`"):
        build(load_recipe(recipe_file, ["data.sources.text.long_share=0.5"]))


def test_a_parent_that_was_lengthened_or_is_missing_is_refused_before_anything_is_built(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["parent=python"])
    with pytest.raises(ValueError, match=r"`parent` is 'python'; make it first \(make python SIZE=test\)"):
        build(recipe)
    with pytest.raises(ValueError, match="has other positions already"):
        build(load_recipe(recipe_file, ["model.rope_base=5000.0"]))
    assert not recipe.rows_dir.exists()
