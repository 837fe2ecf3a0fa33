"""The engine that asks a server with OpenAI's `/v1/completions`, whichever it is, and trusts nothing that it can check.

What comes in: groups of requests. What goes out: their completions, as answers arrive. What servers differ in is asked of
them once, at the start:

    ids as prompts          vLLM and others take them; then a prompt is exactly its ids
    text only               (`transformers serve`, most hosted ones) the text is sent, and its ids are compared with ours
                            where the server tells them (`/tokenize`), their number where it tells that (`usage`). Each
                            completion says what was found (`prompt_check`). A prompt with infilling tokens is refused
                            unless its ids are the same: one space more before a suffix is another prompt.
    ids of what it wrote    then our own rule cuts; else the text is cut at stop strings by the same rule, and the server's
                            word is taken for the rest: "length" is the limit, "eos" whatever ended it without being named
                            (its end token, a stop id, a stop string that it cut away)

Timeouts, dropped connections, 408, 429 and 5xx are counted, waited for and tried again; a request that fails every time is
left for the next call, the others go on. Other answers of 4xx are the user's to mend and end the run.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from codetune.completions import (
    Completion,
    Prompt,
    Request,
    Sampling,
    completed,
    encode_prompt,
    find_stop_string,
    hash_prompt,
)
from codetune.engines import Engine, Groups
from codetune.recipe import EngineSettings
from codetune.tokens import Codec, open_codec

logger = logging.getLogger(__name__)

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
LONGEST_WAIT_SECONDS = 60.0
STOP_STRINGS_SENT = 4  # more than four are refused by some servers; all of them are looked for in what comes back
GIVE_UP_AFTER = 8  # requests in a row that failed every time: then the server is taken to be down
PROBE_SECONDS = 60.0


class GaveUp(Exception):
    """One request failed on every try."""


class ServerEngine(Engine):
    """A server over HTTP.

    Attributes:
        takes_ids: whether it takes prompts as ids.
        tokenizes: whether it tells the ids of a text.
        flavor: whose extensions of the request it has.
    """

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        if not settings.url:
            raise ValueError("an engine of kind server needs `url`, such as http://localhost:8000")
        if not settings.model:
            raise ValueError("an engine of kind server needs `model`: the name by which the server knows it")
        self._root = settings.url.rstrip("/").removesuffix("/v1")
        self._key = _api_key(settings)
        self.codec = None if settings.tokenizer is None else open_codec(settings.tokenizer)
        self.eos_ids = () if self.codec is None or self.codec.eos_id is None else (self.codec.eos_id,)
        self.group_requests = settings.group_requests or 1  # its batches are its own affair
        try:
            self.context_tokens = self._find_model(settings.model)
            self.flavor = self._find_flavor() if settings.flavor == "auto" else settings.flavor
            self.tokenizes = self._server_ids("x = 1") is not None
            self.takes_ids = self.codec is not None and self._takes_ids(self.codec)
        except GaveUp as failure:
            raise ValueError(f"{self._root}: no server answers there ({failure}); start it, or correct `url`") from failure
        if self.flavor == "transformers" and self.codec is None:
            raise ValueError(
                f"{self._root} is a `transformers serve`, which must be told where completions end; write `tokenizer`: the "
                "folder or Hub id of the model's"
            )
        self._pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="completions")

    def describe(self) -> dict[str, Any]:
        """The server's name for the model; where it runs is not part of the numbers."""
        return {
            "kind": "server",
            "model": self.settings.model,
            "revision": self.settings.revision,
            "tokenizer": None if self.codec is None else self.codec.fingerprint,
            "flavor": self.flavor,
            "prompts": "ids" if self.takes_ids else "text",
        }

    def close(self) -> None:
        """End the threads; requests under way are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- before anything is asked -----------------------------------------------------------------------------------------

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Refuse stops that this server cannot be told of, and infilling prompts that it would encode otherwise.

        Raises:
            ValueError: either of these.
        """
        beyond = set(sampling.stop_ids) - set(self.eos_ids)
        if beyond and self.flavor == "openai":
            raise ValueError(
                f"`stop_ids` {sorted(beyond)}: OpenAI's completions know no stop ids, and this server has no extension for "
                "them that is known here; use stop strings, `flavor: vllm` where it takes `stop_token_ids`, or another "
                "engine"
            )
        of_text = [token for token in beyond if self.codec is not None and not self.codec.has_control_ids([token])]
        if of_text and self.flavor != "vllm":
            raise ValueError(
                f"`stop_ids` {sorted(of_text)} are tokens of text, and this server leaves them in what it gives back; "
                "use stop strings, or another engine"
            )
        infill = None if self.codec is None else self.codec.infill
        if infill is None or self.takes_ids or self.codec is None:
            return
        for prompt in prompts:
            ids = encode_prompt(prompt, self.codec)
            if infill.middle in ids and not self._encodes_to(prompt.text, ids):
                raise ValueError(
                    f"prompt {prompt.id!r} is for infilling, and the server does not show that it encodes it to the same "
                    "ids; it takes text only. Use a server that takes ids (vLLM), or the engine `transformers`"
                )

    def _encodes_to(self, text: str, ids: Sequence[int]) -> bool:
        try:
            return self._server_ids(text) == list(ids)
        except GaveUp as failure:
            raise ValueError(f"{self._root}: the server does not answer ({failure}); run the same again later") from failure

    def _check_prompt(self, request: Request, told: int | None) -> Any:
        """How far the server's prompt is known to be ours."""
        if self.takes_ids:
            return "given"
        if request.token_ids is None:
            return "unknown"
        if self.tokenizes:
            same = self._server_ids(request.prompt.text) == list(request.token_ids)
        elif told is not None:
            same = told == len(request.token_ids)
        else:
            return "unknown"
        if not same:
            self.counts["prompts_that_differ"] += 1
            if self.counts["prompts_that_differ"] == 1:
                logger.warning(
                    "prompt %s: the server encodes it to other ids than %s; its completions say `prompt_check: differ`",
                    request.prompt.id,
                    self.settings.tokenizer,
                )
            return "differ"
        return "equal" if self.tokenizes else "length"

    # -- asking -----------------------------------------------------------------------------------------------------------

    def run(self, groups: Groups, sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Groups as they finish, `concurrency` requests under way at once.

        Raises:
            ValueError: the server refused a request, or gave up on some; all others were given out before.
        """
        waiting = iter(groups)
        under_way: dict[Future[Completion], tuple[int, int]] = {}
        parts: dict[int, list[Completion | None]] = {}
        unfinished: set[int] = set()
        failures, last_failure = 0, ""
        # `transformers serve` seeds the whole process: with two requests at once, one draws from the other's seed
        one_by_one = self.flavor == "transformers" and sampling.temperature > 0
        at_once = 1 if one_by_one else self.settings.concurrency
        try:
            while True:
                while len(under_way) < at_once and failures < GIVE_UP_AFTER:
                    group = next(waiting, None)
                    if group is None:
                        break
                    number, requests = group
                    parts[number] = [None] * len(requests)
                    for place, request in enumerate(requests):
                        under_way[self._pool.submit(self._complete, request, sampling, number)] = (number, place)
                if not under_way:
                    break
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    number, place = under_way.pop(future)
                    try:
                        parts[number][place] = future.result()
                        failures = 0
                    except GaveUp as failure:
                        failures, last_failure = failures + 1, str(failure)
                        unfinished.add(number)
                    done = [part for part in parts[number] if part is not None]
                    if len(done) == len(parts[number]):
                        del parts[number]
                        yield number, done
        finally:
            for future in under_way:
                future.cancel()
        left = len(unfinished) + sum(1 for _ in waiting)
        if left:
            raise ValueError(
                f"{self._root} did not answer: {left} of {len(groups)} groups are left ({last_failure}; "
                f"{self._counted()}); what was finished is kept, run the same again when the server is back"
            )

    def _complete(self, request: Request, sampling: Sampling, group: int) -> Completion:
        start = time.perf_counter()
        answer = self._post("/v1/completions", self._body(request, sampling))
        choice, usage = _read_answer(self._root, answer)
        text, ids = _whole_characters(choice.get("text") or ""), choice.get("token_ids")
        told = usage.get("prompt_tokens")
        more = {
            "prompt_check": self._check_prompt(request, told),
            "group": group,
            "seconds": round(time.perf_counter() - start, 4),
        }
        if ids is not None and self.codec is not None:
            return completed(request, self.codec, ids, sampling, self.eos_ids, **more)
        found = find_stop_string(text, sampling.stop_strings)
        named = choice.get("stop_reason")  # vLLM's: the string that ended it, which the text may lack
        if found is not None or named in sampling.stop_strings:
            reason = "stop_string"
        elif choice.get("finish_reason") == "length":
            reason = "length"
        else:
            reason = "eos"
        return Completion(
            prompt_id=request.prompt.id,
            sample=request.sample,
            seed=request.seed,
            text=text if found is None else text[:found],
            raw_text=text,
            token_ids=(),
            stop_reason=reason,
            prompt_tokens=told if told is not None else len(request.token_ids or ()),
            completion_tokens=usage.get("completion_tokens") or 0,
            prompt_hash=hash_prompt(request.prompt, request.token_ids),
            **more,
        )

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        """The request, in the words of this server."""
        prompt: Any = list(request.token_ids or ()) if self.takes_ids else request.prompt.text
        body: dict[str, Any] = {"model": self.settings.model, "prompt": prompt, "max_tokens": request.max_new_tokens}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": request.seed}
        ends = list(dict.fromkeys([*self.eos_ids, *sampling.stop_ids]))
        if self.flavor == "transformers":  # it reads what it is not told from the model's own generation settings
            settings = {"max_new_tokens": request.max_new_tokens, "do_sample": sampling.temperature > 0}
            if sampling.temperature > 0:
                settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            if ends:
                settings |= {"eos_token_id": ends, "pad_token_id": ends[0] if self.codec is None else self.codec.pad_id}
            body["generation_config"] = json.dumps(settings)
            return body  # its own search for stop strings needs a vocabulary of a known kind; ours cuts what comes back
        if sampling.stop_strings:
            body["stop"] = list(sampling.stop_strings[:STOP_STRINGS_SENT])
        if self.flavor == "vllm":
            body |= {"stop_token_ids": ends, "return_token_ids": True, "include_stop_str_in_output": True}
        return body

    # -- what the server is -----------------------------------------------------------------------------------------------

    def _find_model(self, name: str) -> int | None:
        """The model's context, where the server tells it.

        Raises:
            ValueError: it does not serve the model.
        """
        listed = self._get("/v1/models")
        entries = listed.get("data", []) if isinstance(listed, dict) else []
        known = {entry.get("id"): entry for entry in entries if isinstance(entry, dict)}
        # vLLM lists what it serves; `transformers serve` lists what lies in a cache, and serves other models too
        if name not in known and any("max_model_len" in entry for entry in known.values()):
            raise ValueError(f"{self._root} serves {', '.join(sorted(map(str, known)))}, not {name!r}")
        return known.get(name, {}).get("max_model_len")

    def _find_flavor(self) -> str:
        described = self._get("/openapi.json")
        paths = described.get("paths", {}) if isinstance(described, dict) else {}
        if "/load_model" in paths and "/v1/completions" in paths:
            return "transformers"
        if "/tokenize" in paths and "/v1/completions" in paths:
            return "vllm"
        return "openai"

    def _takes_ids(self, codec: Codec) -> bool:
        """Whether a prompt of ids is taken as ids: the server must count exactly as many."""
        if self.flavor == "transformers":
            return False
        ids = codec.plain(codec.encode("x = 1\ny = 2"), last=False)
        with contextlib.suppress(ValueError):
            answer = self._post("/v1/completions", {"model": self.settings.model, "prompt": ids, "max_tokens": 1})
            return (answer.get("usage") or {}).get("prompt_tokens") == len(ids)
        return False

    def _server_ids(self, text: str) -> list[int] | None:
        """The ids that the server makes of a text, or None where it does not tell."""
        if self.flavor != "vllm":
            return None
        with contextlib.suppress(ValueError):
            ids = self._post("/tokenize", {"model": self.settings.model, "prompt": text}).get("tokens")
            return ids if isinstance(ids, list) else None
        return None

    # -- HTTP -------------------------------------------------------------------------------------------------------------

    def _get(self, path: str) -> Any:
        """An answer, or None where there is no such page."""
        try:
            return self._ask(path, None)
        except ValueError:
            return None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._ask(path, body)

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON that comes back.

        Raises:
            ValueError: the server refuses the request.
            GaveUp: no answer on any try.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        seconds = (
            self.settings.timeout_seconds if path == "/v1/completions" else min(self.settings.timeout_seconds, PROBE_SECONDS)
        )
        reason, pause = "", 0.0
        for attempt in range(self.settings.max_tries):
            if attempt:
                self.counts["tried_again"] += 1
                time.sleep(pause)
            pause = min(LONGEST_WAIT_SECONDS, self.settings.retry_seconds * 2**attempt)
            try:
                request = urllib.request.Request(self._root + path, data, headers)
                with urllib.request.urlopen(request, timeout=seconds) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:300]
                if error.code not in RETRIED or body is None and error.code == 500:  # a page that fails is not there
                    raise ValueError(f"{self._root}{path}: the server answers {error.code}: {said}") from error
                reason = f"HTTP {error.code}"
                self.counts[f"http_{error.code}"] += 1
                with contextlib.suppress(TypeError, ValueError):
                    pause = min(LONGEST_WAIT_SECONDS, max(pause, float(error.headers["Retry-After"])))
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                reason = "timeout" if isinstance(cause, TimeoutError) else "connection"
                self.counts["timeouts" if reason == "timeout" else "dropped_connections"] += 1
                reason += f" ({cause})"
            except ValueError as error:
                reason = f"not JSON ({error})"
                self.counts["not_json"] += 1
        self.counts["gave_up"] += 1
        raise GaveUp(f"{reason}, {self.settings.max_tries} tries")

    def _counted(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items())) or "no retries"


def _read_answer(root: str, answer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choice and the usage of an answer; a text of `null` is one of nothing, as some servers write it.

    Raises:
        ValueError: it is something else, with what it says.
    """
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        ids, told, text = choice.get("token_ids"), usage.get("prompt_tokens"), choice["text"]
        if (
            isinstance(text, str | None)
            and isinstance(told, int | None)
            and all(isinstance(token, int) for token in ids or ())
        ):
            return choice, usage
    except (KeyError, IndexError, TypeError, AttributeError):
        pass
    raise ValueError(f"{root}: this is no answer of OpenAI's completions: {str(answer)[:200]}")


def _whole_characters(text: str) -> str:
    """The text with halves of characters, which JSON can carry and no file can hold, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _api_key(settings: EngineSettings) -> str | None:
    if settings.api_key_variable is None:
        return None
    key = os.environ.get(settings.api_key_variable)
    if not key:
        raise ValueError(f"`api_key_variable` is {settings.api_key_variable}, but there is no such environment variable")
    return key
