"""Completions from a model: MAIN PATH of generation, whichever engine writes them.

What comes in: an engine's settings, prompts, and how to sample. What goes out: completions as their groups finish, and a
JSONL file that the same call goes on with after any interruption. Three engines:

    transformers   here, on a CPU or one GPU (`engine_local.py`)
    vllm           the extra `vllm`; tensor parallel, and data parallel in processes (`engine_vllm.py`)
    server         any server with OpenAI's completions (`engine_server.py`)

Prompts are ids where the engine takes them. Stops and truncation are one function for all (`completions.cut_at_stop`). A
completion's random numbers come from its own seed, never from its place in a batch; what shares a batch still changes the
last bits of the logits, which is why groups are fixed by the plan. It does not choose prompts, and it runs no code.

Example:
    engine = open_engine(EngineSettings(model="runs/tiny/stage1/model"))
    for completion in generate(engine, [Prompt("p", "def f(x):")], Sampling(max_new_tokens=32), Path("out.jsonl")):
        print(completion.text, completion.stop_reason)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from codetune.completions import Completion, CompletionFile, Prompt, Sampling, make_plan, read_completions
from codetune.engines import Engine
from codetune.recipe import EngineSettings

__all__ = ["Completion", "Engine", "EngineSettings", "Prompt", "Sampling", "generate", "open_engine", "read_completions"]


def open_engine(settings: EngineSettings) -> Engine:
    """The engine that the settings ask for, its model loaded or its server asked; a context manager.

    Raises:
        ValueError: no model, no tokenizer or no server there, or a package that is not installed.
    """
    if settings.rope_base is not None and settings.kind != "transformers":
        raise ValueError(f"`rope_base` is changed by the transformers engine alone, and this one is {settings.kind}")
    if settings.kind == "server":
        from codetune.engine_server import ServerEngine

        return ServerEngine(settings)
    if settings.kind == "vllm":
        from codetune.engine_vllm import VllmEngine

        return VllmEngine(settings)
    from codetune.engine_local import LocalEngine

    return LocalEngine(settings)


def generate(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, path: Path | None = None
) -> Iterator[Completion]:
    """Every completion that was asked for: those in the file first, then the others as their groups finish.

    Raises:
        ValueError: prompts that cannot be asked, a file with completions of another plan, or a server that gave up on some
            of them; what was finished is in the file then, and the same call goes on from there.
    """
    engine.check(prompts, sampling)
    plan = make_plan(
        prompts,
        sampling,
        codec=engine.codec,
        context_tokens=engine.context_tokens,
        group_requests=engine.group_requests,
        engine=engine.describe(),
    )
    file = None if path is None else CompletionFile(path, plan)
    try:
        done = {} if file is None else dict(file.done)
        for group in sorted(done):
            yield from done[group]
        left = [number for number in range(len(plan.groups)) if number not in done]
        for number, completions in engine.run([(number, plan.groups[number]) for number in left], sampling):
            if file is not None:
                file.write(number, completions)
            yield from completions
    finally:
        if file is not None:
            file.close()
