"""The engine for many GPUs: vLLM, tensor parallel inside a copy of the model, and as many copies as there is room for.

What comes in: groups of requests. What goes out: their completions. Prompts are ids, and what comes back is ids, which our
own rule cuts; vLLM's stop strings only spare it the rest. Each copy (`data_parallel`) is a process of its own with its own
GPUs and takes the next group when it has finished one, so that a slow group holds nobody up.

vLLM chooses its batches as requests come, so that completions are not the same to the last bit from run to run; where a row
must be made again exactly, use the engine `transformers` in fp32. It needs the extra `vllm` and GPUs: **this module was not
run with vLLM**, tests run it with a stand-in that takes the same arguments.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from codetune.completions import Completion, Request, Sampling, completed
from codetune.engines import Engine, Groups, describe_model, end_ids, need_model
from codetune.recipe import EngineSettings
from codetune.tokens import Codec, open_codec

GROUP_REQUESTS = 1024  # several times what vLLM keeps under way at once
ASK_SECONDS = 5.0  # how often a waiting parent looks whether its copies live


class VllmEngine(Engine):
    """One vLLM in this process, or several in processes of their own."""

    codec: Codec

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        name = need_model(settings)
        try:
            import vllm  # pyright: ignore[reportMissingImports]  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"the engine `vllm` is not installed here ({error}); pip install -e '.[vllm]' on a machine with GPUs, "
                "or write `kind: transformers`"
            ) from error
        from transformers import AutoConfig, GenerationConfig

        self.codec = open_codec(settings.tokenizer or name, settings.revision if settings.tokenizer is None else None)
        revision: dict[str, Any] = {} if settings.revision is None else {"revision": settings.revision}
        try:
            config = AutoConfig.from_pretrained(name, **revision)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: no readable model there ({error})") from error
        try:
            generation = GenerationConfig.from_pretrained(name, **revision)
        except OSError:  # many models have none
            generation = None
        self.context_tokens = config.get_text_config().max_position_embeddings
        self.eos_ids = end_ids(self.codec, generation)
        self.group_requests = settings.group_requests or GROUP_REQUESTS
        self._copies = [] if settings.data_parallel > 1 else [open_vllm(settings)]

    def describe(self) -> dict[str, Any]:
        """The model and how its arithmetic is shared out."""
        settings = self.settings
        return describe_model(settings, need_model(settings), self.codec) | {
            "dtype": settings.dtype,
            "tensor_parallel": settings.tensor_parallel,
            "data_parallel": settings.data_parallel,
        }

    def run(self, groups: Groups, sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Groups as they finish."""
        of = dict(groups)
        written = self._one_by_one(groups, sampling) if self._copies else self._side_by_side(groups, sampling)
        for number, ids, seconds in written:
            more = {"group": number, "seconds": round(seconds / len(ids), 4)}
            yield (
                number,
                [
                    completed(request, self.codec, new, sampling, self.eos_ids, **more)
                    for request, new in zip(of[number], ids, strict=True)
                ],
            )

    def close(self) -> None:
        """Let go of the model; its GPUs are free when the object is gone."""
        self._copies = []

    def _one_by_one(self, groups: Groups, sampling: Sampling) -> Iterator[tuple[int, list[list[int]], float]]:
        for number, requests in groups:
            start = time.perf_counter()
            yield number, write_group(self._copies[0], requests, sampling, self.eos_ids), time.perf_counter() - start

    def _side_by_side(self, groups: Groups, sampling: Sampling) -> Iterator[tuple[int, list[list[int]], float]]:
        """One process per copy, each with its own GPUs; all end with this call.

        Raises:
            ValueError: a copy failed, with what it said.
        """
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        tasks, answers = context.Queue(), context.Queue()
        copies = min(self.settings.data_parallel, len(groups))
        devices = share_of_devices(visible_devices(), self.settings.tensor_parallel, self.settings.data_parallel)
        workers = [
            context.Process(
                target=work, args=(self.settings, devices[copy], tasks, answers, sampling, self.eos_ids), daemon=False
            )
            for copy in range(copies)
        ]
        for number, requests in groups:
            tasks.put((number, list(requests)))
        for _ in workers:
            tasks.put(None)
        for worker in workers:
            worker.start()
        try:
            for _ in groups:
                number, ids, seconds, failure = _next_answer(answers, workers)
                if failure:
                    raise ValueError(f"a copy of {self.settings.model} failed: {failure}")
                yield number, ids, seconds
        finally:
            for worker in workers:
                worker.terminate()
                worker.join()


def _next_answer(answers: Any, workers: Sequence[Any]) -> tuple[int, list[list[int]], float, str]:
    while True:
        try:
            return answers.get(timeout=ASK_SECONDS)
        except queue.Empty:
            codes = [worker.exitcode for worker in workers]
            if any(code not in (None, 0) for code in codes) or all(code is not None for code in codes):
                return -1, [], 0.0, f"its process ended with exit codes {codes}"


def work(
    settings: EngineSettings, devices: str | None, tasks: Any, answers: Any, sampling: Sampling, eos_ids: Sequence[int]
) -> None:
    """What the process of one copy does: a vLLM of its own, group after group until there is none."""
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices  # before vLLM or torch look for GPUs
    try:
        model = open_vllm(settings)
        while (task := tasks.get()) is not None:
            number, requests = task
            start = time.perf_counter()
            ids = write_group(model, requests, sampling, eos_ids)
            answers.put((number, ids, time.perf_counter() - start, ""))
    except Exception:  # noqa: BLE001  (nothing is swallowed: the parent raises it, with its traceback)
        answers.put((-1, [], 0.0, traceback.format_exc()))


def open_vllm(settings: EngineSettings) -> Any:
    """The offline engine that the settings ask for."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    return LLM(
        model=need_model(settings),
        tokenizer=settings.tokenizer or need_model(settings),
        revision=settings.revision,
        dtype=settings.dtype,
        tensor_parallel_size=settings.tensor_parallel,
        gpu_memory_utilization=settings.gpu_memory_share,
        generation_config="vllm",  # nothing is taken from the model's own sampling settings
        seed=0,  # each request has its own
    )


def write_group(model: Any, requests: Sequence[Request], sampling: Sampling, eos_ids: Sequence[int]) -> list[list[int]]:
    """New ids of each request; vLLM gives answers in the order of the prompts."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    prompts = [{"prompt_token_ids": list(request.token_ids or ())} for request in requests]
    settings = [
        SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.seed,
            max_tokens=request.max_new_tokens,
            stop=list(sampling.stop_strings) or None,
            stop_token_ids=list(dict.fromkeys([*eos_ids, *sampling.stop_ids])),
            include_stop_str_in_output=True,
            skip_special_tokens=False,
        )
        for request in requests
    ]
    outputs = model.generate(prompts, settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def visible_devices() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def share_of_devices(devices: Sequence[str], each: int, copies: int) -> list[str]:
    """The GPUs of each copy.

    Example: 0 1 2 3, 2 each, 2 copies -> ["0,1", "2,3"]

    Raises:
        ValueError: too few of them.
    """
    if len(devices) < each * copies:
        raise ValueError(
            f"`data_parallel` {copies} times `tensor_parallel` {each} are {each * copies} GPUs, and {len(devices)} are "
            "visible here; lower one of them"
        )
    return [",".join(devices[copy * each : (copy + 1) * each]) for copy in range(copies)]
