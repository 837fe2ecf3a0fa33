"""The server engine: against a real `transformers serve`, and against a server that behaves as badly as it is told to."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from codetune.engine_server import ServerEngine
from codetune.generate import EngineSettings, Prompt, Sampling, generate, open_engine, read_completions
from codetune.tokens import INFILL_CONTENTS, Codec, open_codec

TEXTS = ("def", "value value total", "x = 1\nfor", "return total + 1 0 1", "if x :")
PROMPTS = [Prompt(f"p{number}", text) for number, text in enumerate(TEXTS)]


# --- A real one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose tokenizer is as a server's library reads it: bytes are text, `<s>` stands before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.add_special_tokens({"extra_special_tokens": list(INFILL_CONTENTS)})
    folder = save_llama(tmp_path_factory.mktemp("served") / "model", fast)
    with open_engine(EngineSettings(model=str(folder))) as engine:
        (written,) = generate(engine, PROMPTS[1:2], Sampling(6))
        assert engine.codec.infill is not None
        end = engine.codec.infill.end
    weights = load_file(folder / "model.safetensors")
    head_VH = weights["lm_head.weight"]
    head_VH[end] = 1.01 * head_VH[written.token_ids[4]]  # some completions now end with <EOT>
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def served(byte_level: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a `transformers serve` on this CPU."""
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("served") / "log"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    arguments = ["serve", str(byte_level), "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("w") as out:
        server = subprocess.Popen([*command, *arguments], stdout=out, stderr=out, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 300
        while not _answers(url):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def asked(served: str, byte_level: Path) -> Iterator[ServerEngine]:
    settings = EngineSettings(kind="server", url=served, model=str(byte_level), tokenizer=str(byte_level), concurrency=3)
    with open_engine(settings) as engine:
        assert isinstance(engine, ServerEngine)
        yield engine


@pytest.mark.slow
@pytest.mark.parametrize("stops", [{}, {"stop_strings": ("e", "a", "x")}, {"stop_ids": "<EOT>"}])
def test_a_real_server_and_the_engine_here_write_the_same(
    asked: ServerEngine, byte_level: Path, stops: Any, tmp_path: Path
) -> None:
    assert asked.flavor == "transformers" and not asked.takes_ids
    infill = asked.codec.infill
    sampling = Sampling(10, **({"stop_ids": (infill.end,)} if "stop_ids" in stops else stops))
    there = {c.prompt_id: c for c in generate(asked, PROMPTS, sampling, tmp_path / "there.jsonl")}
    with open_engine(EngineSettings(model=str(byte_level), batch_rows=2)) as engine:
        here = {c.prompt_id: c for c in generate(engine, PROMPTS, sampling)}
    for name, own in here.items():
        assert there[name].text == own.text, name
        assert there[name].prompt_tokens == own.prompt_tokens and there[name].prompt_check == "length"
        named = "eos" if own.stop_reason == "stop_id" else own.stop_reason  # this server does not tell them apart
        assert there[name].stop_reason == named
    if stops:
        assert {own.stop_reason for own in here.values()} & {"stop_string", "stop_id"}, "nothing stopped, nothing was tested"


@pytest.mark.slow
def test_tokens_of_text_do_not_stop_a_server_that_gives_them_back(asked: ServerEngine) -> None:
    with pytest.raises(ValueError, match="`stop_ids` \\[60\\] are tokens of text"):
        next(generate(asked, PROMPTS, Sampling(2, stop_ids=(60,))))


@pytest.mark.slow
def test_ids_that_differ_are_said_and_infilling_is_refused(asked: ServerEngine, byte_level: Path) -> None:
    codec = open_codec(byte_level)
    (completion,) = generate(asked, [Prompt("p", "def", tuple(codec.encode("def")))], Sampling(2))  # without <s>
    assert completion.prompt_check == "differ" and asked.counts["prompts_that_differ"] >= 1
    fim = Prompt("fim", "▁<PRE>def▁<SUF>x▁<MID>", tuple(codec.psm_prompt("def", "x")))
    with pytest.raises(ValueError, match="prompt 'fim' is for infilling"):
        next(generate(asked, [fim], Sampling(2)))


@pytest.mark.slow
def test_a_real_server_draws_from_the_seed(asked: ServerEngine) -> None:
    sampling = Sampling(8, temperature=1.0, top_p=0.9, samples=2, seed=3)
    first = {(c.prompt_id, c.sample): c.text for c in generate(asked, PROMPTS[:1], sampling)}
    assert first == {(c.prompt_id, c.sample): c.text for c in generate(asked, PROMPTS[:1], sampling)}
    assert len(set(first.values())) == 2


# --- A bad one -------------------------------------------------------------------------------------------------------


class BadServer(http.server.ThreadingHTTPServer):
    """Real HTTP; `script` decides what each completion request meets, by its number."""

    daemon_threads = True

    def __init__(self, script: Callable[[int], str], codec: Codec | None = None, paths: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), BadHandler)
        self.script, self.codec, self.paths = script, codec, paths
        self.asked: list[dict[str, Any]] = []
        self.busy_pages = 0  # so many requests for pages are answered 503, as by a server that is still starting
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are what the tests are about."""


class BadHandler(http.server.BaseHTTPRequestHandler):
    server: BadServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing is printed."""

    def do_GET(self) -> None:
        if self.server.busy_pages:
            self.server.busy_pages -= 1
            self._answer(503, {})
        elif self.path == "/openapi.json" and self.server.paths:
            self._answer(200, {"paths": {path: {} for path in self.server.paths}})
        elif self.path == "/v1/models":
            self._answer(200, {"data": [{"id": "m"}]})
        else:
            self._answer(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        codec = self.server.codec
        if self.path == "/tokenize":
            assert codec is not None
            self._answer(200, {"tokens": codec.plain(codec.encode(body["prompt"]), last=False)})
            return
        with self.server.lock:
            self.server.asked.append(body)
            act = self.server.script(len(self.server.asked) - 1)
        if act == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif act == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
            self.connection.shutdown(socket.SHUT_RDWR)
        elif act == "slow":
            time.sleep(1.5)
        elif act.isdigit():
            self._answer(int(act), {"error": "no"}, {"Retry-After": "0"})
        else:
            prompt = body["prompt"]
            count = len(prompt) if isinstance(prompt, list) else 3
            choice: dict[str, Any] = {"text": f"{act} for {len(prompt)}", "finish_reason": "stop"}
            choice |= {"null": {"text": None}, "half a character": {"text": "a\ud800b"}}.get(act, {})
            choice |= {"number": {"text": 3}, "words as ids": {"token_ids": ["x"]}}.get(act, {})
            if body.get("return_token_ids"):
                choice |= {"token_ids": [40, 41, 2, 42]}
            self._answer(200, {"choices": [choice], "usage": {"prompt_tokens": count, "completion_tokens": 2}})

    def _answer(self, code: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


def settings_for(server: BadServer, **changes: Any) -> EngineSettings:
    known: dict[str, Any] = {
        "kind": "server",
        "url": server.url,
        "model": "m",
        "retry_seconds": 0.01,
        "timeout_seconds": 0.5,
    }
    return EngineSettings(**known | changes)


@pytest.mark.parametrize(
    ("act", "counted"),
    [
        ("429", "http_429"),
        ("503", "http_503"),
        ("drop", "dropped_connections"),
        ("half", "dropped_connections"),
        ("slow", "timeouts"),
    ],
)
def test_what_goes_wrong_for_a_while_is_counted_and_tried_again(act: str, counted: str, tmp_path: Path) -> None:
    server = BadServer(lambda number: act if number in (1, 2, 5) else "fine")
    with open_engine(settings_for(server)) as engine:
        written = {c.prompt_id: c.text for c in generate(engine, PROMPTS, Sampling(5), tmp_path / "out.jsonl")}
    assert written == {prompt.id: f"fine for {len(prompt.text)}" for prompt in PROMPTS}
    assert engine.counts[counted] == 3 and engine.counts["tried_again"] == 3 and not engine.counts["gave_up"]


def test_a_request_that_always_fails_is_left_and_the_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    down = True
    server = BadServer(lambda number: "429" if down and server.asked[number]["prompt"] == "def" else "fine")
    with open_engine(settings_for(server, max_tries=3)) as engine:
        with pytest.raises(ValueError, match=r"1 of 5 groups are left \(HTTP 429, 3 tries; .*http_429 3"):
            list(generate(engine, PROMPTS, Sampling(5), path))
        assert len(list(read_completions(path))) == 4
        down, before = False, len(server.asked)
        assert len(list(generate(engine, PROMPTS, Sampling(5), path))) == 5
        assert len(server.asked) == before + 1, "only what was left is asked for"


def test_a_server_that_is_down_is_given_up_on_soon() -> None:
    server = BadServer(lambda number: "503")
    many = [Prompt(f"p{number}", "x") for number in range(200)]
    engine = open_engine(settings_for(server, max_tries=2, concurrency=4))
    with engine, pytest.raises(ValueError, match="200 of 200 groups are left"):
        list(generate(engine, many, Sampling(5)))
    assert len(server.asked) < 50
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="no server answers there"):
        open_engine(settings_for(server, max_tries=2))


def test_a_server_that_is_still_starting_is_asked_again_what_it_is(tiny_parent: Path, tiny_codec: Codec) -> None:
    server = BadServer(lambda number: "fine", tiny_codec, paths=("/tokenize", "/v1/completions"))
    server.busy_pages = 3
    with open_engine(settings_for(server, tokenizer=str(tiny_parent))) as engine:
        assert isinstance(engine, ServerEngine) and engine.flavor == "vllm" and engine.takes_ids
        assert engine.counts["http_503"] == 3


def test_text_that_is_null_or_no_text_is_kept_as_what_a_file_can_hold(tmp_path: Path) -> None:
    server = BadServer(lambda number: ("null", "half a character")[number])
    with open_engine(settings_for(server, concurrency=1)) as engine:
        list(generate(engine, PROMPTS[:2], Sampling(5), tmp_path / "out.jsonl"))
    assert [completion.text for completion in read_completions(tmp_path / "out.jsonl")] == ["", "a\ufffdb"]


@pytest.mark.parametrize("act", ["number", "words as ids"])
def test_what_is_no_answer_ends_the_run_with_its_words(act: str) -> None:
    server = BadServer(lambda number: act)
    with open_engine(settings_for(server)) as engine, pytest.raises(ValueError, match="this is no answer of OpenAI's"):
        list(generate(engine, PROMPTS[:1], Sampling(5)))


def test_a_request_that_the_server_refuses_ends_the_run_with_its_words() -> None:
    server = BadServer(lambda number: "400")
    with open_engine(settings_for(server)) as engine, pytest.raises(ValueError, match='answers 400: {"error": "no"}'):
        list(generate(engine, PROMPTS, Sampling(5)))


def test_a_server_that_takes_ids_is_given_ids_and_its_ids_are_cut_by_our_rule(tiny_parent: Path, tiny_codec: Codec) -> None:
    server = BadServer(lambda number: "fine", tiny_codec, paths=("/tokenize", "/v1/completions"))
    fim = Prompt("fim", "", tuple(tiny_codec.psm_prompt("def", "x")))
    with open_engine(settings_for(server, tokenizer=str(tiny_parent))) as engine:
        assert isinstance(engine, ServerEngine) and engine.flavor == "vllm" and engine.takes_ids
        (completion,) = generate(engine, [fim], Sampling(9, stop_ids=(42,)))
    assert server.asked[-1]["prompt"] == list(fim.token_ids or ()) and server.asked[-1]["stop_token_ids"] == [2, 42]
    assert completion.token_ids == (40, 41, 2) and completion.stop_reason == "eos" and completion.prompt_check == "given"


def test_stop_ids_are_refused_where_a_server_cannot_be_told_of_them() -> None:
    server = BadServer(lambda number: "fine")
    with open_engine(settings_for(server)) as engine:
        with pytest.raises(ValueError, match="`stop_ids` \\[7\\]: OpenAI's completions know no stop ids"):
            next(generate(engine, PROMPTS, Sampling(5, stop_ids=(7,))))
        (completion,) = generate(engine, PROMPTS[:1], Sampling(5, stop_strings=(" for", "never")))
    assert (completion.text, completion.stop_reason) == ("fine", "stop_string")
    assert completion.prompt_check == "unknown" and completion.completion_tokens == 2


def test_settings_of_a_server_are_checked() -> None:
    with pytest.raises(ValueError, match="needs `url`"):
        open_engine(EngineSettings(kind="server", model="m"))
    with pytest.raises(ValueError, match="needs `model`"):
        open_engine(EngineSettings(kind="server", url="http://localhost:1"))
    with pytest.raises(ValueError, match="no such environment variable"):
        open_engine(
            EngineSettings(kind="server", url="http://localhost:1", model="m", api_key_variable="CODETUNE_NO_SUCH_KEY")
        )
