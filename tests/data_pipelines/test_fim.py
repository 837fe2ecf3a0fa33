"""Which documents are infilled, where they are cut, and that nothing about it depends on order or company."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from codetune.artifacts import LAYOUTS
from codetune.recipe import FimSettings
from codetune.tokens import INFILL_CONTENTS, Codec, open_codec
from data_pipelines.documents import Document
from data_pipelines.fim import PLAIN, PSM, SPM, encode_documents, split_for_infill


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level pieces, so that every text can be encoded, and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def area(width, height):\n    return width * height\n"] * 9, trainer)
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in INFILL_CONTENTS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return open_codec(_tokenizer())


def _document(text: str, name: str = "a", pass_index: int = 0) -> Document:
    return Document(text=text, id=name, source="code", group="g", language="Python", pass_index=pass_index)


def test_the_draw_is_the_hash_worked_out_by_hand() -> None:
    digest = hashlib.blake2b(b"7\0area.py\x002", digest_size=32).digest()
    words = [int.from_bytes(digest[place : place + 8], "little") for place in (0, 8, 16, 24)]
    assert words[0] / 2**64 < 0.9  # or this document would be plain
    split = split_for_infill("0123456789", "area.py", 2, seed=7, rate=0.9, spm_rate=0.5)
    assert split is not None
    assert split.layout == (SPM if words[1] / 2**64 < 0.5 else PSM)
    assert [split.first, split.second] == sorted(int(word / 2**64 * 11) for word in words[2:])


def test_rates_and_cuts_are_those_of_the_paper() -> None:
    splits = [split_for_infill("x" * 99, f"document {number}", 0, 0, 0.9, 0.5) for number in range(20_000)]
    infilled = [split for split in splits if split is not None]
    # binomial: five standard errors
    assert abs(len(infilled) / 20_000 - 0.9) < 5 * (0.9 * 0.1 / 20_000) ** 0.5
    assert abs(sum(split.layout == SPM for split in infilled) / len(infilled) - 0.5) < 5 * 0.5 / len(infilled) ** 0.5
    # two independent uniform cuts: the smaller has mean 1/3 of the length, the larger 2/3; both ends can be drawn
    assert abs(sum(split.first for split in infilled) / len(infilled) / 99 - 1 / 3) < 0.01
    assert abs(sum(split.second for split in infilled) / len(infilled) / 99 - 2 / 3) < 0.01
    assert min(split.first for split in infilled) == 0 and max(split.second for split in infilled) == 99


def test_rate_zero_leaves_everything_plain_and_one_nothing() -> None:
    assert all(split_for_infill("text", str(n), 0, 0, 0.0, 0.5) is None for n in range(500))
    assert all(split_for_infill("text", str(n), 0, 0, 1.0, 0.5) is not None for n in range(500))
    assert all(split_for_infill("text", str(n), 0, 0, 1.0, 1.0).layout == SPM for n in range(100))  # type: ignore[union-attr]


def test_a_new_pass_and_another_seed_draw_anew() -> None:
    draws = {split_for_infill("x" * 500, "a", pass_index, seed, 1.0, 0.5) for pass_index in range(4) for seed in range(4)}
    assert len(draws) == 16


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=200), name=st.text(max_size=8))
def test_the_document_comes_back_whatever_the_layout(text: str, name: str) -> None:
    codec = _CODEC or _CODEC.append(open_codec(_tokenizer())) or _CODEC
    for rate in (0.0, 1.0):
        (sample,) = encode_documents([_document(text, name)], codec[0], FimSettings(), rate, 3, 4096)
        assert sample is not None
        assert codec[0].unfim(sample.input_ids.tolist(), LAYOUTS[sample.layout]) == text


_CODEC: list[Codec] = []


def test_company_does_not_change_a_sample(codec: Codec) -> None:
    documents = [_document(f"def f{n}(a):\n    return a + {n}\n" * (1 + n % 40), f"d{n}") for n in range(200)]
    together = encode_documents(documents, codec, FimSettings(), 0.9, 0, 256)
    alone = [encode_documents([document], codec, FimSettings(), 0.9, 0, 256)[0] for document in reversed(documents)][::-1]
    for one, other in zip(together, alone, strict=True):
        assert one is not None and other is not None
        assert one.layout == other.layout and one.input_ids.tolist() == other.input_ids.tolist()
    assert {sample.layout for sample in together if sample is not None} == {PLAIN, PSM, SPM}


def test_only_documents_that_fit_are_infilled(codec: Codec) -> None:
    for repeats in range(1, 60):  # lengths around the row, on both sides of the guess by characters
        document = _document("return width * height\n" * repeats, f"r{repeats}")
        (sample,) = encode_documents([document], codec, FimSettings(), 1.0, 0, 128)
        (alone,) = encode_documents([document], codec, FimSettings(), 1.0, 0, 10**9)
        assert sample is not None and alone is not None
        if len(alone) <= 128:
            assert sample.input_ids.tolist() == alone.input_ids.tolist() and sample.layout != PLAIN
        else:
            assert sample.layout == PLAIN
            assert sample.input_ids.tolist() == codec.plain(codec.encode(document.text))


def test_text_that_the_tokenizer_cannot_take_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    codec = open_codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    known, unknown = encode_documents([_document("a a"), _document("a b")], codec, FimSettings(), 0.0, 0, 64)
    assert known is not None and known.input_ids.tolist() == [1, 1]
    assert unknown is None


def test_the_command_shows_a_file_in_three_layouts(tmp_path: Path) -> None:
    _tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    source = tmp_path / "area.py"
    source.write_text("def area(width, height):\n    return width * height\n")
    command = [sys.executable, "-m", "data_pipelines.fim", str(source), "--tokenizer", str(tmp_path / "tokenizer")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.count("▁<PRE>") == shown.count("▁<EOT>") == 2 and "<s>def area" in shown
    missing = subprocess.run([*command[:3], "missing.py", *command[4:]], capture_output=True, text=True, check=False)
    assert missing.returncode == 2 and "missing.py" in missing.stderr and "Traceback" not in missing.stderr


def test_the_command_says_why_it_cannot_show_a_file(tmp_path: Path, tiny_parent: Path) -> None:
    marked, foreign = tmp_path / "marked.py", tmp_path / "foreign.py"
    marked.write_text("space = '\u2581'\n", encoding="utf-8")
    foreign.write_bytes(b"name = 'caf\xe9'\n")
    for file, reason in ((marked, "a literal U+2581"), (foreign, "not UTF-8"), (tmp_path / "none.py", "No such file")):
        command = [sys.executable, "-m", "data_pipelines.fim", str(file), "--tokenizer", str(tiny_parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {file}: ") and reason in done.stderr
