"""The page to try a model on: what it asks the model is what was trained, and it writes as the model does."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "codetune"))
from model_hub import ATTRIBUTES, TOKEN, ModelHub

from codetune.tokens import open_codec
from eval import app

SPACE_FILES = ("app.py", "README.md", "requirements.txt", "model.txt", "manifest.json")
CHAT = """{{ bos_token }}{% for turn in messages %}{{ 'Q: ' if turn.role == 'user' else 'A: ' }}{{ turn.content }}
{% endfor %}{% if add_generation_prompt %}A:{% endif %}"""

pytestmark = pytest.mark.xdist_group("finished")


@pytest.fixture(scope="module")
def model(finished_runs: Path) -> app.Model:
    return app.Model(str(finished_runs / "smoke" / "lcft" / "model"))


def test_prompts_are_those_of_training(model: app.Model) -> None:
    codec = open_codec(model.name)
    for prefix, suffix in (("def f(", "):\n"), ("", ""), ("x = ", " # <s> ▁<MID>"), ("é", "\n\n")):
        assert model.infill_ids(prefix, suffix) == codec.psm_prompt(prefix, suffix)
        assert model.prompt_ids(prefix) == codec.plain(codec.encode(prefix), last=False)


def test_a_space_that_a_tokenizer_puts_before_a_text_is_not_put_before_a_suffix(tmp_path: Path) -> None:
    """A family like Llama 2's, whose first piece of a text has a space of its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    tokenizer = Tokenizer(
        models.BPE({piece: place for place, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"extra_special_tokens": list(app.SENTINELS)})
    fast.save_pretrained(tmp_path)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), **shape)).save_pretrained(tmp_path)
    model, codec = app.Model(str(tmp_path)), open_codec(tmp_path)
    assert model.leading_space and codec.leading_space
    for prefix, suffix in (("ab", "ab"), ("a", " a"), ("", "b")):
        assert model.infill_ids(prefix, suffix) == codec.psm_prompt(prefix, suffix)
    assert model.decode(model.bare(" a")) == " a"


def test_what_is_streamed_ends_as_what_is_generated_at_once(model: app.Model) -> None:
    import torch

    ids = model.prompt_ids("def add(")
    steps = list(model.write(ids, 12, 0.0))
    out = model.model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    assert steps[-1] == model.decode(out[0, len(ids) :].tolist())
    assert all(later.startswith(earlier) for earlier, later in zip(steps, steps[1:], strict=False)) and len(steps) > 2


def test_whoever_leaves_ends_the_generation(model: app.Model) -> None:
    writing = model.write(model.prompt_ids("x"), 400, 0.0)
    next(writing)
    writing.close()
    assert list(model.write(model.prompt_ids("x"), 1, 0.0))  # the model is free again


def test_a_prompt_that_fills_the_context_is_told(model: app.Model) -> None:
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, the model's context 512; shorten it"):
        list(model.write(model.prompt_ids("x y " * 600), 4, 0.0))


def test_what_is_no_checkpoint_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        app.main(["--model", str(tmp_path)])
    assert "no checkpoint that transformers can load" in capsys.readouterr().err


def test_a_space_is_this_file_with_what_it_needs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (make try installs it)")
    app.main(["--model", "me/model", "--space", "me/try", "--dry-run"])
    listed = capsys.readouterr().out
    for name in SPACE_FILES:
        assert name in listed
    files = app.space_files("me/model", {"gradio": "6.0.0", "torch": "2.0", "transformers": "5.0", "accelerate": "1.0"})
    assert yaml.safe_load(files["README.md"].split("---\n")[1])["sdk"] == "gradio"
    assert not re.search(r"^(?:from|import) (?:codetune|eval)", files["app.py"], re.MULTILINE)
    with pytest.raises(SystemExit, match="2"):
        app.main(["--model", str(tmp_path), "--space", "me/try"])


def test_a_space_is_pushed_as_it_was_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (make try installs it)")
    from huggingface_hub import constants

    command = ["--model", "me/model", "--space", "me/try"]
    app.main([*command, "--dry-run"])
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    with ModelHub() as hub:
        for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": hub.url}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        app.main(command)
        assert f"space: {hub.url}/spaces/me/try/tree/main" in capsys.readouterr().out
        sent = hub.repositories["me/try"].commits[-1].files
        assert sorted({*sent} - {*ATTRIBUTES}) == listed == sorted(SPACE_FILES)
        assert sent["app.py"] == Path(app.__file__).read_bytes() and sent["model.txt"] == b"me/model\n"
        hub.make("me/notes", {"notes.txt": b"mine"})
        with pytest.raises(SystemExit, match="2"):
            app.main(["--model", "me/model", "--space", "me/notes"])
        assert "me/notes, revision main, holds files that are no such page" in capsys.readouterr().err
        assert hub.repositories["me/notes"].commits[-1].files == {**ATTRIBUTES, "notes.txt": b"mine"}


@pytest.fixture(scope="module")
def chat_model(model: app.Model, tmp_path_factory: pytest.TempPathFactory) -> app.Model:
    """The checkpoint with a chat template beside its tokenizer, as `make instruct` leaves it."""
    folder = Path(shutil.copytree(model.name, tmp_path_factory.mktemp("chat") / "model"))
    (folder / "chat_template.jinja").write_text(CHAT)
    return app.Model(str(folder))


def test_a_conversation_is_what_the_template_makes_of_it(chat_model: app.Model, model: app.Model) -> None:
    turns = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    assert chat_model.chats and not model.chats
    text = chat_model.tokenizer.decode(chat_model.chat_ids(turns))
    assert text.removeprefix(chat_model.tokenizer.bos_token).lstrip() == "Q: add\nA: x\nQ: y\nA:"


@pytest.fixture(scope="module")
def chat_page(chat_model: app.Model) -> Iterator[str]:
    yield from served(chat_model)


def test_the_page_answers_and_remembers_what_was_said(chat_page: str, chat_model: app.Model, browser: Any) -> None:
    tab = browser.new_page()
    tab.goto(chat_page)
    tab.get_by_role("tab", name="Chat").click()
    box = tab.get_by_test_id("textbox").last
    turns: list[dict[str, str]] = []
    for number, message in enumerate(("add two", "and three")):
        box.fill(message)
        box.press("Enter")
        turns.append({"role": "user", "content": message})
        expected = list(chat_model.write(chat_model.chat_ids(turns), 128, 0.0))[-1]
        turns.append({"role": "assistant", "content": expected})
        letters = "".join(expected.split())[:20]
        tab.wait_for_function(
            "([place, wanted]) => (document.querySelectorAll('.message.bot')[place]?.innerText ?? '')"
            ".replace(/\\s/g, '').includes(wanted)",
            arg=[number, letters],
            timeout=60_000,
        )
        assert letters
        tab.wait_for_timeout(300)  # until the box is free again
    tab.close()


def served(model: app.Model) -> Iterator[str]:
    pytest.importorskip("gradio", reason="gradio is not installed (make try installs it), so that its page is not opened")
    made = app.build_page(model)
    _, address, _ = made.launch(server_name="127.0.0.1", share=False, prevent_thread_lock=True, quiet=True, theme=made.theme)
    yield address
    made.close()


@pytest.fixture(scope="module")
def page(model: app.Model) -> Iterator[str]:
    yield from served(model)


def test_the_page_fills_in_at_the_cursor(page: str, model: app.Model, browser: Any) -> None:
    tab = browser.new_page()
    tab.goto(page)
    tab.get_by_role("tab", name="Fill in").click()
    box = tab.locator("#code textarea")
    box.fill("def f(x):\n    return \n")
    box.evaluate("(box) => { box.focus(); box.setSelectionRange(21, 21); }")
    tab.locator("#fill").click()
    expected = list(model.write(model.infill_ids("def f(x):\n    return ", "\n"), 128, 0.0))[-1]
    tab.wait_for_function(
        "(wanted) => document.querySelector('#code textarea').value === wanted",
        arg=f"def f(x):\n    return {expected}\n",
        timeout=60_000,
    )
    tab.close()
