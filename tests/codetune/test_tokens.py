"""Layouts against hand-worked sequences, and text that must stay text, for every tokenizer family."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from codetune.tokens import CODE_LLAMA_IDS, INFILL_CONTENTS, Codec, open_codec

CORPUS = [
    "def area(width, height):\n    return width * height\n",
    "for index in range(10):\n    print(index, 'here')\n",
    "class Stack:\n    def push(self, item):\n        self.items.append(item)\n",
] * 5
# every string that is a control token in one family or another, as it stands in real source files
CONTROL_TEXT = (
    "a <s> b</s> <unk> <|endoftext|> <|im_start|>user▁<PRE>x ▁<SUF> ▁<MID> ▁<EOT> [INST] hi [/INST] <<SYS>> <pad>\n"
)


def _family(name: str) -> Tokenizer:
    """A small tokenizer put together as the named family puts its own."""
    byte_level = name == "byte_level"
    tokenizer = Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>", byte_fallback=not byte_level))
    specials = ["<|endoftext|>", "<|im_start|>"] if byte_level else ["<unk>", "<s>", "</s>"]
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        replace_back = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = []
        if name == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            tokenizer.decoder = replace_back
        elif name == "replace_only":
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=name.removeprefix("metaspace_"), split=False)
            tokenizer.decoder = replace_back
        specials += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if not byte_level:  # byte pieces are ordinary pieces of the vocabulary, as in Llama's
        import json

        tree = json.loads(tokenizer.to_str())
        tree["added_tokens"] = [token for token in tree["added_tokens"] if not token["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in INFILL_CONTENTS])
    tokenizer.add_tokens([AddedToken("<pad>", special=False), AddedToken("[INST]", special=False), AddedToken("<<SYS>>")])
    if not byte_level:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


FAMILIES = ("prepend", "metaspace_first", "metaspace_always", "metaspace_never", "replace_only", "byte_level")


@pytest.fixture(scope="module", params=FAMILIES)
def codec(request: pytest.FixtureRequest) -> Codec:
    name = request.param
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} if name == "byte_level" else {}
    names = names or {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return open_codec(PreTrainedTokenizerFast(tokenizer_object=_family(name), **names))


def test_the_leading_space_is_found_in_every_sentencepiece_variant() -> None:
    found = {name: open_codec(PreTrainedTokenizerFast(tokenizer_object=_family(name))).leading_space for name in FAMILIES}
    assert found == {
        "prepend": True,
        "metaspace_first": True,
        "metaspace_always": True,
        "metaspace_never": False,
        "replace_only": False,
        "byte_level": False,
    }


def test_text_never_becomes_a_control_token(codec: Codec) -> None:
    for text in (CONTROL_TEXT, CONTROL_TEXT.strip(), "</s>", "▁<PRE>", "<s><s>", "[INST]"):
        ids = codec.encode(text)
        assert not codec.has_control_ids(ids)
        if codec.represents(text):
            assert codec.decode_start(ids) == text


def test_only_families_that_write_spaces_as_u2581_refuse_it(codec: Codec) -> None:
    byte_level = codec.name(codec.bos_id or 0) == "<|endoftext|>"
    assert codec.represents("a b") and codec.represents("a ▁ b") == byte_level


def test_text_that_the_normalizer_would_rewrite_is_refused() -> None:
    tokenizer = _family("byte_level")
    tokenizer.normalizer = normalizers.NFC()  # Qwen's
    codec = open_codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    composed, apart = "caf\u00e9", "cafe\u0301"
    assert codec.represents(composed) and codec.decode_start(codec.encode(composed)) == composed
    assert not codec.represents(apart) and codec.decode_start(codec.encode(apart)) == composed


def test_control_ids_are_noticed(codec: Codec) -> None:
    assert codec.infill is not None and codec.bos_id is not None
    assert codec.has_control_ids([codec.bos_id]) and codec.has_control_ids([codec.infill.middle])
    assert not codec.has_control_ids([])


def test_bare_encoding_has_no_leading_space_and_start_encoding_has_one(codec: Codec) -> None:
    bare, start = codec.encode_bare("here"), codec.encode("here")
    assert codec.decode_bare(bare) == "here"
    assert codec.decode_bare(start) == (" here" if codec.leading_space else "here")
    # text that begins with a space keeps it, beside the implicit one
    assert codec.decode_start(codec.encode(" here")) == " here"
    assert codec.encode(" here") != codec.encode("here")


def test_layouts_by_hand(codec: Codec) -> None:
    infill, bos, eos = codec.infill, codec.bos_id, codec.eos_id
    assert infill is not None
    assert codec.plain([5, 6]) == [bos, 5, 6, eos]
    assert codec.plain([5, 6], first=False) == [5, 6, eos]
    assert codec.plain([5, 6], last=False) == [bos, 5, 6]
    assert codec.psm([5], [6], [7]) == [bos, infill.prefix, 5, infill.suffix, 6, infill.middle, 7, infill.end]
    assert codec.spm([6], [5, 7]) == [bos, infill.prefix, infill.suffix, 6, infill.middle, 5, 7, infill.end]


def test_a_prompt_is_the_training_layout_up_to_the_middle(codec: Codec) -> None:
    infill = codec.infill
    assert infill is not None
    psm = codec.psm(codec.encode("def f("), codec.encode_bare("):\n"), codec.encode_bare("x"))
    prompt = codec.psm_prompt("def f(", "):\n")
    assert psm[: len(prompt)] == prompt and prompt[-1] == infill.middle
    spm = codec.spm_prompt("def f(", "):\n")
    assert spm == [
        codec.bos_id,
        infill.prefix,
        infill.suffix,
        *codec.encode_bare("):\n"),
        infill.middle,
        *codec.encode("def f("),
    ]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="▁"), max_size=60),
    cuts=st.tuples(*[st.integers(0, 60)] * 2),
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_gives_the_document_back(name: str, text: str, cuts: tuple[int, int]) -> None:
    codec = _CODECS.setdefault(name, open_codec(PreTrainedTokenizerFast(tokenizer_object=_family(name))))
    first, second = sorted(min(cut, len(text)) for cut in cuts)
    prefix, middle, suffix = text[:first], text[first:second], text[second:]
    assert codec.unfim(codec.plain(codec.encode(text)), "plain") == text
    psm = codec.psm(codec.encode(prefix), codec.encode_bare(suffix), codec.encode_bare(middle))
    assert codec.unfim(psm, "psm") == text
    assert codec.unfim(codec.spm(codec.encode_bare(suffix), codec.encode(prefix + middle)), "spm") == text


_CODECS: dict[str, Codec] = {}


def test_a_model_with_too_few_rows_is_refused() -> None:
    import json

    tree = json.loads(_family("prepend").to_str())
    with pytest.raises(ValueError, match="embedding rows"):
        Codec(tree, bos_id=1, eos_id=2, pad_id=None, vocabulary_size=100)


def test_asking_for_infilling_without_the_tokens_says_what_to_do() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    codec = open_codec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    with pytest.raises(ValueError, match="make base"):
        codec.psm([0], [1], [0])


# -- Llama 2's own vocabulary: ids that Meta's own code gives -----------------------------------------------

PRE = 'def remove_non_ascii(s: str) -> str:\n    """ '
SUF = "\n    return result\n"
PSM_IDS = (
    "1,32007,822,3349,29918,5464,29918,294,18869,29898,29879,29901,851,29897,"
    "1599,851,29901,13,1678,9995,29871,32008,13,1678,736,1121,13,32009"
)
SPM_IDS = (
    "1,32007,32008,13,1678,736,1121,13,32009,822,3349,29918,5464,29918,294,18869,"
    "29898,29879,29901,851,29897,1599,851,29901,13,1678,9995,29871"
)
PSM_TRAIN = "1,32007,427,29884,32008,29901,13,1678,1209,13,32009,1050,403,29898,10351,29897,32010"
SPM_TRAIN = "1,32007,32008,29901,13,1678,1209,13,32009,26985,29898,10351,29897,32010"


def _ids(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


@pytest.fixture(scope="module")
def llama2(llama2_tokenizer: Any) -> Codec:
    return open_codec(llama2_tokenizer)


def test_llama2_prompts_are_metas(llama2: Codec) -> None:
    infill = llama2.infill
    assert infill is not None and (infill.prefix, infill.suffix, infill.middle, infill.end) == CODE_LLAMA_IDS
    assert llama2.psm_prompt(PRE, SUF) == _ids(PSM_IDS)
    assert llama2.spm_prompt(PRE, SUF) == _ids(SPM_IDS)


def test_llama2_training_layouts_are_the_papers(llama2: Codec) -> None:
    prefix, middle, suffix = "enu", "merate(xs)", ":\n    pass\n"
    assert llama2.psm(llama2.encode(prefix), llama2.encode_bare(suffix), llama2.encode_bare(middle)) == _ids(PSM_TRAIN)
    assert llama2.spm(llama2.encode_bare(suffix), llama2.encode(prefix + middle)) == _ids(SPM_TRAIN)
    assert [1, *llama2.encode("[INST] hi [/INST]")] == [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]
