"""What training must not see: by group, in every stage alike, and near copies of what is measured on."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from codetune.recipe import HeldOutSettings, SourceSettings
from data_pipelines.documents import Document, Drops, SourcePlan, plan_source, read_documents
from data_pipelines.held_out import HeldOut, collect_held_out, held_out_of, is_held_out_group


def write(path: Path, groups: int = 400, documents: int = 3) -> SourceSettings:
    """`documents` of ten long lines in each group, no line twice."""
    with path.open("w") as file:
        for group in range(groups):
            for number in range(documents):
                file.write(json.dumps({"text": text(f"{group}-{number}"), "repo": f"r{group}"}) + "\n")
    return SourceSettings(kind="jsonl", share=1.0, path=str(path), group_column="repo")


def text(name: str) -> str:
    return "".join(f"    value_{line} = compute_the_value('{name}', {line})\n" for line in range(10))


def plan(settings: SourceSettings, tmp_path: Path, lanes: int = 2, name: str = "code") -> SourcePlan:
    return plan_source(name, settings, lanes, tmp_path / "work", False)


def document(content: str, group: str = "g", name: str = "d") -> Document:
    return Document(content, name, "code", group, "Python", 0)


def test_a_group_is_held_out_by_its_name_alone() -> None:
    chosen = {f"repo-{number}" for number in range(20_000) if is_held_out_group(f"repo-{number}", 0.02)}
    assert 320 < len(chosen) < 480  # 400 expected, four standard deviations of 20
    assert all(is_held_out_group(name, 0.05) for name in chosen)  # a larger fraction holds out more, never others
    assert not is_held_out_group("repo-1", 0.0)


def test_training_and_measuring_share_no_group(tmp_path: Path) -> None:
    found = plan(write(tmp_path / "a.jsonl"), tmp_path)
    held_out = collect_held_out([found], HeldOutSettings(fraction=0.05, documents_per_source=10))
    drops = Drops()
    trained = [item for lane in range(2) for item in read_documents(found, lane, 2, 0, drops, held_out)]
    everything = [item for lane in range(2) for item in read_documents(found, lane, 2, 0, Drops(), None)]
    out = {f"r{number}" for number in range(400) if is_held_out_group(f"r{number}", 0.05)}
    assert out
    assert {item.group for item in trained} == {f"r{number}" for number in range(400)} - out
    assert {item.group for item in held_out.documents["code"]} <= out
    assert len(held_out.documents["code"]) == 10
    assert len({item.group for item in held_out.documents["code"]}) >= 8
    assert drops.as_dict() == {"code": {"held_out_group": 3 * len(out)}}
    assert len(trained) + 3 * len(out) == len(everything)


def test_the_held_out_set_knows_nothing_of_lanes(tmp_path: Path) -> None:
    settings = write(tmp_path / "a.jsonl")
    wanted = HeldOutSettings(fraction=0.05, documents_per_source=10)
    assert collect_held_out([plan(settings, tmp_path, 1)], wanted) == collect_held_out([plan(settings, tmp_path, 5)], wanted)


def test_the_search_ends(tmp_path: Path) -> None:
    found = plan(write(tmp_path / "a.jsonl"), tmp_path)
    few = collect_held_out([found], HeldOutSettings(fraction=0.05, search_documents=30))
    assert few.searched == {"code": 30}
    none = collect_held_out([found], HeldOutSettings(fraction=0.0))
    assert none.documents == {"code": ()}
    assert none.searched == {"code": 1200}
    assert collect_held_out([found], HeldOutSettings(fraction=0.5, documents_per_source=0)).documents == {"code": ()}


def test_near_copies_are_known_by_their_lines() -> None:
    known = held_out_of({"code": (document(text("held out")),)}, 0.1, {})
    lines = text("held out").splitlines(keepends=True)
    other = text("another").splitlines(keepends=True)
    assert known.is_near_copy(text("held out"))
    assert known.is_near_copy("class A:\n" + "".join("    " + line for line in lines))  # indented anew
    assert known.is_near_copy("".join(lines[:5] + other[:5]))  # half
    assert not known.is_near_copy("".join(lines[:4] + other[:5]))  # less than half
    assert not known.is_near_copy("".join(lines[:2]))  # two lines may be chance
    assert not known.is_near_copy(text("another"))
    assert not known.is_near_copy("x = 1\n" * 50)


def test_one_long_line_is_enough() -> None:
    paragraph = "The alkali metals are soft and shiny and react with water. " * 5
    known = held_out_of({"text": (document(paragraph),)}, 0.1, {})
    assert known.is_near_copy(paragraph + "\n")
    assert not known.is_near_copy(paragraph[:-30])


def test_boilerplate_says_nothing() -> None:
    licence = "".join(f"# this is line {number} of a licence that many files carry\n" for number in range(12))
    two_groups = (document(licence + text("a"), "g1"), document(licence + text("b"), "g2"))
    known = held_out_of({"code": two_groups}, 0.1, {})
    assert not known.is_near_copy(licence)
    assert not known.is_near_copy(licence + text("c"))
    assert known.is_near_copy(licence + text("a"))  # the licence does not thin out a copy either
    three = tuple(document(licence + text(name), "g1") for name in "abc")
    assert not held_out_of({"code": three}, 0.1, {}).is_near_copy(licence)


def test_equal_texts_are_known_however_short_and_wherever_they_stand() -> None:
    short = document("def a():\n    return 1\n")
    whole = text("in two groups")
    known = held_out_of({"code": (short, document(whole, "g1"), document(whole, "g2"), document(whole, "g3"))}, 0.1, {})
    assert known.is_near_copy(short.text)
    assert known.is_near_copy("def a():\r\n\treturn 1")  # but for the space in it
    assert not known.is_near_copy("def a():\n    return 2\n")
    assert not known.is_near_copy("def a():\n    return 1\n    # and more\n")
    assert known.is_near_copy(whole)
    assert known.is_near_copy(whole + "x = 1  # one more line, which is long enough\n")


def test_a_source_that_nothing_is_held_out_of_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(write(tmp_path / "a.jsonl", 40), tmp_path)
    collect_held_out([found], HeldOutSettings(fraction=0.5, documents_per_source=4))
    collect_held_out([found], HeldOutSettings(fraction=0.0, documents_per_source=0))
    assert capsys.readouterr().err == ""
    collect_held_out([found], HeldOutSettings(fraction=0.0, documents_per_source=4))
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing of data.sources.code: none of the 120 documents" in line and "raise data.held_out.fraction (0)" in line


def test_near_copies_are_dropped_and_counted_across_sources(tmp_path: Path) -> None:
    found = plan(write(tmp_path / "a.jsonl"), tmp_path)
    held_out = collect_held_out([found], HeldOutSettings(fraction=0.05, documents_per_source=10))
    copied = held_out.documents["code"][0].text
    path = tmp_path / "fork.jsonl"
    path.write_text(json.dumps({"text": copied}) + "\n" + json.dumps({"text": text("new")}) + "\n")
    fork = plan(SourceSettings(kind="jsonl", share=1.0, path=str(path)), tmp_path, 1, "fork")
    drops = Drops()
    kept = [item.text for item in read_documents(fork, 0, 1, 0, drops, held_out)]
    assert kept == [text("new")]
    assert drops.as_dict() == {"fork": {"near_copy_of_held_out": 1}}


def test_it_goes_to_other_processes(tmp_path: Path) -> None:
    found = plan(write(tmp_path / "a.jsonl", 100), tmp_path)
    held_out = collect_held_out([found], HeldOutSettings(fraction=0.1, documents_per_source=5))
    held_out.save(tmp_path / "held_out.json")
    assert HeldOut.load(tmp_path / "held_out.json") == held_out == pickle.loads(pickle.dumps(held_out))
    (tmp_path / "held_out.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        HeldOut.load(tmp_path / "held_out.json")


def test_generated_functions_are_held_out_where_they_are_made(tmp_path: Path) -> None:
    found = plan(SourceSettings(kind="generated", share=1.0), tmp_path)
    held_out = collect_held_out([found], HeldOutSettings(fraction=0.5, documents_per_source=12))
    measured: tuple[Any, ...] = held_out.documents["code"]
    drops = Drops()
    families = {item.group for item in read_documents(found, 0, 2, 0, drops, held_out)}
    assert len(measured) == 12
    assert not families & {item.group for item in measured}
    assert drops.as_dict() == {}
