"""Vocabularies: trained, checked against sentencepiece, grown."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from codetune import vocabulary
from codetune.tokens import INFILL_CONTENTS, open_codec
from codetune.vocabulary import (
    checked_tokenizer,
    difference,
    grown_tokenizer,
    plan_growth,
    real_code,
    tokenizer_from_sentencepiece,
    train_tokenizer,
    wrapped,
)

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")


@pytest.fixture(autouse=True, scope="module")
def fewer_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "COMPARED_FILES", 20)
        yield


@pytest.fixture(scope="module")
def llama2_model() -> Path:
    folder = os.environ.get("CODETUNE_TEST_DATA")
    path = Path(folder or "/nonexistent") / "tokenizers" / "llama2_tokenizer.model"
    if not path.is_file():
        pytest.skip(
            "Llama 2's tokenizer.model is not here; CODETUNE_TEST_DATA names a folder with tokenizers/llama2_tokenizer.model"
        )
    return path


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece BPE of the same make as Llama 2's, trained on the standard library."""
    return train_sentencepiece(tmp_path_factory.mktemp("sp") / "tokenizer.model", "bpe")


def train_sentencepiece(path: Path, kind: str) -> Path:
    written = io.BytesIO()
    lines = (line for text in real_code() for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=written,
        model_type=kind,
        vocab_size=700,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())
    return path


# --- training


@pytest.fixture(scope="module")
def trained() -> Any:
    return wrapped(train_tokenizer(real_code(), 500), unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_any_text_comes_back_from_a_trained_tokenizer(trained: Any) -> None:
    draw = random.Random(0)
    texts = ["", " ", "\n", "  x", "a\tb\r\n", "</s> <s> ▁<PRE> ▁", "\x00\x7f", "naïve 中文 🙂", "x" * 500, "1234567890"]
    texts += [
        "".join(chr(draw.choice([draw.randrange(1, 128), draw.randrange(160, 0xD000)])) for _ in range(60))
        for _ in range(100)
    ]
    codec = open_codec(trained)
    assert codec.leading_space
    for text, ids, bare in zip(texts, codec.encode_batch(texts), codec.encode_batch_bare(texts), strict=True):
        assert codec.decode_start(ids) == text
        assert codec.decode_bare(bare) == text
        assert not codec.has_control_ids(ids)
    assert (
        trained.decode(trained("def f(x):\n    return x", add_special_tokens=False).input_ids) == "def f(x):\n    return x"
    )


def test_line_ends_and_digits_are_pieces_of_their_own(trained: Any) -> None:
    codec = open_codec(trained)
    for piece in trained.get_vocab():
        assert "Ċ" not in piece or piece == "Ċ"  # `Ċ` is how the byte alphabet writes a line end
        assert len(piece) == 1 or not any(letter.isdigit() and letter.isascii() for letter in piece)
    line_end = codec.encode_bare("\n")
    assert codec.encode_bare("\n\n    12") == [
        *line_end,
        *line_end,
        *codec.encode_bare("    "),
        *codec.encode_bare("1"),
        *codec.encode_bare("2"),
    ]


def test_training_is_deterministic(trained: Any) -> None:
    again = train_tokenizer(real_code(), 500)
    assert again.to_str() == trained.backend_tokenizer.to_str()
    assert trained.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert trained("x").input_ids[0] == 1


# --- checking


def test_a_sentencepiece_model_is_rebuilt_exactly(small_model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(small_model))
    tokenizer = wrapped(tokenizer_from_sentencepiece(processor))
    assert difference(tokenizer, processor) is None
    text = "def f(中):\n    return '🙂'"
    assert open_codec(tokenizer).encode(text) == processor.encode(text)


def test_pieces_are_merged_by_score_not_by_id() -> None:
    class Scored:
        """Three pieces of text behind an unknown, a control and a byte piece, best score last."""

        scores = (0.0, 0.0, 0.0, -3.0, -2.0, -1.0, -4.0, -5.0)

        def IsUnknown(self, i: int) -> bool:
            return i == 0

        def IsControl(self, i: int) -> bool:
            return i == 1

        def IsByte(self, i: int) -> bool:
            return i == 2

        def GetScore(self, i: int) -> float:
            return self.scores[i]

    pieces = ["<unk>", "ab", "<0x0A>", "abc", "bc", "a", "b", "c"]
    # `ab` is a control piece here, so it is neither a result nor a part: abc is a + bc only
    assert vocabulary._merges_by_score(Scored(), pieces) == [("b", "c"), ("a", "bc")]  # type: ignore[arg-type]


def test_a_wrong_tokenizer_json_is_found_and_mended(small_model: Path, tmp_path: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(small_model))
    tree = json.loads(tokenizer_from_sentencepiece(processor).to_str())
    tree["model"]["merges"].reverse()
    wrapped(Tokenizer.from_str(json.dumps(tree)), bos_token="<s>").save_pretrained(tmp_path)
    shutil.copy(small_model, tmp_path / "tokenizer.model")
    tokenizer, how = checked_tokenizer(tmp_path)
    assert how.startswith("rebuilt from tokenizer.model") and "gave other ids" in how
    assert difference(tokenizer, processor) is None
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_survive_rebuilding(small_model: Path, tmp_path: Path, where: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(small_model))
    shutil.copy(small_model, tmp_path / "tokenizer.model")
    pieces = processor.GetPieceSize()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": pieces + 8}))
    with pytest.raises(ValueError, match=rf"{pieces} pieces, the model {pieces + 8} rows, and no file says which tokens"):
        checked_tokenizer(tmp_path)
    entries = {"<|user|>": pieces, "<|end|>": pieces + 2}  # a gap between them
    decoder = {str(token): {"content": content, "special": True} for content, token in entries.items()}
    known = entries if where == "added_tokens.json" else {"added_tokens_decoder": decoder}
    (tmp_path / where).write_text(json.dumps(known))
    tokenizer, how = checked_tokenizer(tmp_path)
    assert how.startswith("rebuilt from tokenizer.model")
    assert [tokenizer.get_vocab()[content] for content in entries] == list(entries.values())
    assert tokenizer("<|user|>a<|end|>").input_ids[1] == pieces
    growth = plan_growth(tokenizer, pieces + 8, "test")
    assert growth.infill_ids == (pieces + 3, pieces + 4, pieces + 5, pieces + 6)
    grown = grown_tokenizer(tokenizer, growth.infill_ids)
    assert grown.get_vocab()["<|end|>"] == pieces + 2


def test_a_right_tokenizer_json_is_kept(small_model: Path, tmp_path: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(small_model))
    kept = wrapped(tokenizer_from_sentencepiece(processor), eos_token="</s>")
    kept.save_pretrained(tmp_path)
    shutil.copy(small_model, tmp_path / "tokenizer.model")
    tokenizer, how = checked_tokenizer(tmp_path)
    assert how.startswith("tokenizer.json, equal")
    assert open_codec(tokenizer).fingerprint == open_codec(kept).fingerprint


def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model", "unigram")
    with pytest.raises(ValueError, match="could not be rebuilt"):
        checked_tokenizer(tmp_path)


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        checked_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        checked_tokenizer(tmp_path)


# --- Llama 2's own


@pytest.fixture(scope="module")
def grown_llama2(llama2_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama2")
    shutil.copy(llama2_model, folder / "tokenizer.model")
    tokenizer, how = checked_tokenizer(folder)
    assert "equal to sentencepiece" in how
    growth = plan_growth(tokenizer, 32_000, "test")
    return grown_tokenizer(tokenizer, growth.infill_ids)


def test_llama2_has_as_many_merges_as_counted(llama2_model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(llama2_model))
    assert len(json.loads(tokenizer_from_sentencepiece(processor).to_str())["model"]["merges"]) == 61_249


def test_transformers_own_conversion_of_llama2_is_mended(llama2_model: Path, tmp_path: Path) -> None:
    """What the library makes of tokenizer.model, saved as tokenizer.json beside it, must not get through."""
    from transformers import LlamaTokenizer

    shutil.copy(llama2_model, tmp_path / "tokenizer.model")
    converted = LlamaTokenizer.from_pretrained(str(tmp_path))
    converted.save_pretrained(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(llama2_model))
    tokenizer, how = checked_tokenizer(tmp_path)
    assert difference(tokenizer, processor) is None
    assert ("rebuilt" in how) == (difference(converted, processor) is not None)


def test_golden_infilling_vectors(grown_llama2: Any) -> None:
    """Prompts of the official code, training layouts worked out with an independent tokenizer."""
    codec = open_codec(grown_llama2)
    prefix, suffix = 'def remove_non_ascii(s: str) -> str:\n    """ ', "\n    return result\n"
    head = [
        822,
        3349,
        29918,
        5464,
        29918,
        294,
        18869,
        29898,
        29879,
        29901,
        851,
        29897,
        1599,
        851,
        29901,
        13,
        1678,
        9995,
        29871,
    ]
    tail = [13, 1678, 736, 1121, 13]
    assert codec.psm_prompt(prefix, suffix) == [1, 32007, *head, 32008, *tail, 32009]
    assert codec.spm_prompt(prefix, suffix) == [1, 32007, 32008, *tail, 32009, *head]
    behind = codec.encode_bare(":\n    pass\n")
    assert behind == [29901, 13, 1678, 1209, 13]
    psm = codec.psm(codec.encode("enu"), behind, codec.encode_bare("merate(xs)"))
    assert psm == [1, 32007, 427, 29884, 32008, *behind, 32009, 1050, 403, 29898, 10351, 29897, 32010]
    assert codec.spm(behind, codec.encode("enumerate(xs)")) == [
        1,
        32007,
        32008,
        *behind,
        32009,
        26985,
        29898,
        10351,
        29897,
        32010,
    ]


def test_golden_chat_vector(grown_llama2: Any) -> None:
    assert grown_llama2("[INST] hi [/INST]").input_ids == [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]


def test_ids_with_a_gap_survive_saving(grown_llama2: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    grown_llama2.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again.convert_tokens_to_ids(list(INFILL_CONTENTS)) == [32007, 32008, 32009, 32010]
    assert again.decode([32007], skip_special_tokens=True) == ""
    text = "def f(x):\n        return [x]  # ▁<PRE> is text here"
    assert again(text).input_ids == grown_llama2(text).input_ids
    assert not open_codec(again).has_control_ids(open_codec(again).encode(text))


# --- growing


def bytes_tokenizer(pieces: int = 260, ignore_merges: bool = False) -> Any:
    """A byte-level BPE without merges, filled up to a number of pieces, the last one `<|end|>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary_ = {piece: i for i, piece in enumerate([*alphabet, *(f"filler{i}" for i in range(pieces - 257))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary_, merges=[], ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return wrapped(tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize(
    ("pieces", "rows", "ids", "rows_after"),
    [
        (260, 260, (260, 261, 262, 263), 264),
        (261, 261, (261, 262, 263, 264), 272),
        (260, 264, (260, 261, 262, 263), 264),  # four free rows are enough
        (260, 263, (260, 261, 262, 263), 264),  # three are not
        (260, 300, (260, 261, 262, 263), 300),
    ],
)
def test_where_the_tokens_go(pieces: int, rows: int, ids: tuple[int, ...], rows_after: int) -> None:
    growth = plan_growth(bytes_tokenizer(pieces), rows, "test")
    assert (growth.infill_ids, growth.rows) == (ids, rows_after)


def test_a_llama2_vocabulary_gets_code_llamas_ids_and_records_padding() -> None:
    tokenizer = wrapped(Tokenizer(models.BPE(vocab={f"p{i}": i for i in range(32_000)}, merges=[])))
    growth = plan_growth(tokenizer, 32_000, "test")
    assert growth.infill_ids == (32007, 32008, 32009, 32010) and growth.rows == 32016
    assert growth.as_dict()["padding_rows"] == [[32000, 32007], [32011, 32016]]


def test_padding_rows_are_recorded() -> None:
    assert plan_growth(bytes_tokenizer(261), 261, "test").as_dict()["padding_rows"] == [[265, 272]]
    assert plan_growth(bytes_tokenizer(260), 260, "test").as_dict()["padding_rows"] == []


def test_a_vocabulary_is_grown_once_only() -> None:
    grown = grown_tokenizer(bytes_tokenizer(), (260, 261, 262, 263))
    with pytest.raises(ValueError, match="infilling tokens already"):
        plan_growth(grown, 264, "here")


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        plan_growth(bytes_tokenizer(260), 256, "here")


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_text_gives_the_same_ids_after_growing(ignore_merges: bool) -> None:
    before = bytes_tokenizer(ignore_merges=ignore_merges)
    before.chat_template = "{{ messages }}"
    grown = grown_tokenizer(before, (260, 261, 262, 263))
    for text in [*list(real_code())[:5], "▁<PRE> ▁<EOT><|end|> filler1"]:
        assert open_codec(grown).encode(text) == open_codec(before).encode(text)
    assert grown.chat_template == "{{ messages }}" and grown.eos_token == "<|end|>"
    assert grown("▁<PRE>x").input_ids[0] == 260  # in a prompt written as text, by whoever wants that


def test_new_rows_are_the_mean_of_the_real_old_ones() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for tied in (False, True):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=300, tie_word_embeddings=tied, **shape)).to(torch.bfloat16)
        old = [model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()]
        growth = plan_growth(bytes_tokenizer(298), 300, "test")
        assert growth.rows == 304
        vocabulary.grow_embeddings(model, growth)
        new = [model.model.embed_tokens.weight, model.lm_head.weight]
        assert (new[0] is new[1]) == tied
        for before, after in zip(old, new, strict=True):
            assert after.dtype == torch.bfloat16 and after.shape == (304, 16)
            assert torch.equal(after[:298], before[:298])
            mean = before[:298].double().mean(0)
            assert torch.allclose(after[298:].double(), mean.expand(6, -1), atol=2e-4)
        assert model.config.vocab_size == 304
        assert model(input_ids=torch.tensor([[1, 303]])).logits.shape == (1, 2, 304)


def test_a_normalizer_that_changes_text_is_not_taken_for_sentencepiece(small_model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(small_model))
    tokenizer = tokenizer_from_sentencepiece(processor)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), tokenizer.normalizer])
    found = difference(wrapped(tokenizer), processor)
    assert found is not None and "of 20 files" in found
