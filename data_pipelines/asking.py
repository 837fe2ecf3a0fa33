"""How self-instruct works through its lanes: models asked and programs run, in this process, in several, or on a cluster.

What comes in: a run and the name of a pass. What goes out: completions and records in the lanes' files. On a CPU every lane
computes in one thread and knows nothing of the others, so that the number of workers changes no token.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from codetune.artifacts import MANIFEST, read_json, write_json
from codetune.generate import Engine, Prompt, generate, open_engine
from codetune.problems import UNPINNED
from codetune.recipe import AskSettings, EngineSettings, Recipe
from codetune.sandbox import Sandbox
from codetune.slurm import CLUSTER
from data_pipelines.executors import run_tasks
from data_pipelines.prompt_files import Renderer
from data_pipelines.questions import question_values, read_questions
from data_pipelines.self_instruct_run import ASKED, Run, open_run
from data_pipelines.verdicts import judge_solutions, read_suites, shown_test, vet_suites


def lane_values(run: Run, name: str, lane: int) -> Iterator[tuple[str, dict[str, str]]]:
    """(prompt id, what fills its places) of everything that a lane asks in a pass."""
    if name == "questions":
        for number in range(lane, run.settings.question_prompts, run.settings.lanes):
            yield f"questions/{number:06d}", question_values(run, number)
        return
    suites = read_suites(run, lane) if name == "solutions" else {}
    for question in read_questions(run, lane):
        suite = suites.get(question.id)
        if name == "tests":
            yield f"tests/{question.id}", {"question": question.text}
        elif suite is not None:
            yield f"solutions/{question.id}", {"question": question.text, "test": shown_test(run, question.id, suite)}


def resolved_engine(recipe: Recipe, ask: AskSettings) -> EngineSettings:
    """The engine of a pass; `runs/...` is taken below the folder of all runs.

    Raises:
        ValueError: a model of ours that was not made yet.
    """
    engine = ask.engine
    if engine.revision == UNPINNED:
        raise ValueError(
            f"the engine of {engine.model} has `revision: unpinned`; write a commit (`make pin` looks it up), or "
            "take whatever is there now with --set self_instruct.PASS.engine.revision=main"
        )
    changed: dict[str, str] = {}
    for name in ("model", "tokenizer"):
        value = getattr(engine, name)
        if value and value.startswith("runs/") and engine.kind != "server":
            folder = Path(recipe.runs) / value.removeprefix("runs/")
            if not (folder / MANIFEST).is_file():
                parts = value.split("/")
                raise ValueError(f"{folder}: no checkpoint there; make it first: make {parts[2]} SIZE={parts[1]}")
            changed[name] = str(folder)
    return dataclasses.replace(engine, **changed)


def make_renderer(ask: AskSettings, engine: Engine) -> Renderer:
    """Prompts in the form that a pass asks in."""
    if ask.format != "template":
        return Renderer(ask.format, engine.codec)
    from transformers import AutoTokenizer

    source = engine.settings.tokenizer or (engine.settings.model if engine.settings.kind != "server" else None)
    tokenizer = None if source is None else AutoTokenizer.from_pretrained(source, revision=engine.settings.revision)
    return Renderer(ask.format, engine.codec, tokenizer)


def lane_prompts(run: Run, name: str, lane: int, engine: Engine) -> tuple[list[Prompt], int]:
    """What a lane asks in a pass, and how many prompts are too long for the model to be asked."""
    renderer, file = make_renderer(run.ask(name), engine), run.prompts[name]
    prompts, too_long = [], 0
    for prompt_id, values in lane_values(run, name, lane):
        prompt = renderer.prompt(file, prompt_id, values)
        ids = prompt.token_ids
        if ids is None and engine.codec is not None:
            ids = tuple(engine.codec.plain(engine.codec.encode(prompt.text), last=False))
        if ids is not None and engine.context_tokens is not None and len(ids) >= engine.context_tokens:
            too_long += 1
            continue
        prompts.append(prompt)
    return prompts, too_long


PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>: a signal for when the parent ends

_engine: tuple[EngineSettings, Engine] | None = None  # of this process: loading a model takes longer than a small lane


def engine_of(settings: EngineSettings) -> Engine:
    """The engine of this process, opened when other settings are asked for than last time."""
    global _engine
    if _engine is not None and _engine[0] == settings:
        return _engine[1]
    close_engine()
    _engine = (settings, open_engine(settings))
    return _engine[1]


def close_engine() -> None:
    """Let go of this process's model."""
    global _engine
    if _engine is not None:
        _engine[1].close()
    _engine = None


def ask_lane(recipe: Recipe, name: str, lane: int) -> int:
    """Ask what a lane asks in a pass; what is in its file already is not asked again. Gives the number of answers."""
    run = open_run(recipe)
    done = run.lane_done(name, lane)
    if done.is_file():
        return read_json(done)["answers"]
    if next(lane_values(run, name, lane), None) is None:  # nothing to ask: no reason to load a model
        write_json(done, {"prompts": 0, "answers": 0, "tokens": 0, "too_long": 0, "seconds": 0.0, "counts": {}})
        return 0
    start = time.monotonic()
    with one_thread(run.ask(name).engine):
        engine = engine_of(resolved_engine(recipe, run.ask(name)))
        prompts, too_long = lane_prompts(run, name, lane, engine)
        answers = tokens = 0
        for completion in generate(engine, prompts, run.sampling(name), run.lane_file(name, lane)) if prompts else ():
            answers += 1
            tokens += completion.completion_tokens
    facts = {"prompts": len(prompts), "answers": answers, "tokens": tokens, "too_long": too_long}
    write_json(done, facts | {"seconds": round(time.monotonic() - start, 1), "counts": dict(engine.counts)})
    return answers


@contextlib.contextmanager
def one_thread(engine: EngineSettings) -> Iterator[None]:
    """On a CPU every lane computes in one thread: sums in another number of threads may differ in their last bits."""
    if engine.kind != "transformers":
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class LaneTask:
    """One lane of a pass on a cluster, in the form in which datatrove runs it: called with (documents, rank, world size)."""

    recipe: Recipe
    name: str
    programs_at_once: int | None  # none: as many as there are processors that this process may use

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        assert world_size == self.recipe.need_self_instruct().lanes
        if self.name in ASKED:
            ask_lane(self.recipe, self.name, rank)
            close_engine()
            return
        with Sandbox(workers=self.programs_at_once) as sandbox:
            work = vet_suites if self.name == "suites" else judge_solutions
            work(open_run(self.recipe), [rank], sandbox)

    def __reduce__(self) -> tuple[Any, ...]:
        return lane_task, (self.recipe, self.name, self.programs_at_once)


def lane_task(recipe: Recipe, name: str, programs_at_once: int | None) -> LaneTask:
    """A lane's task, in this process or one that the executor starts: there too, errors reach the user through ours."""
    from loguru import logger

    logger.disable("datatrove")
    return LaneTask(recipe, name, programs_at_once)


def gpus_of(engine: EngineSettings) -> int:
    """How many GPUs an engine is to be given, where somebody gives them out."""
    if engine.kind == "vllm":
        return engine.tensor_parallel * engine.data_parallel
    return int(engine.kind == "transformers" and engine.device == "cuda")


class LaneWorkers:
    """Processes that work lane by lane, by `self_instruct.executor`.

    `local`: processes of ours, which keep a model from pass to pass; with one worker, this process. Programs are run by this
    process, a worker of the sandbox on each core. `slurm`, `ray`: each lane of each pass is a task there.
    """

    def __init__(self, run: Run, workers: int, cluster: Path = CLUSTER) -> None:
        self.run = run
        self.workers = max(1, min(workers, run.settings.lanes))
        self.cluster = cluster
        self.is_local = run.settings.executor == "local"
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> LaneWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        close_engine()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def ask(self, name: str) -> None:
        """Every lane of a pass that is not finished."""
        lanes = [lane for lane in range(self.run.settings.lanes) if not self.run.lane_done(name, lane).is_file()]
        self.run.timed(name, lambda: self._ask(name, lanes) if self.is_local else self._submit(name))
        facts = [read_json(self.run.lane_done(name, lane)) for lane in range(self.run.settings.lanes)]
        total = {key: sum(fact[key] for fact in facts) for key in ("prompts", "answers", "tokens", "too_long")}
        late = f", {total['too_long']} too long to be asked" if total["too_long"] else ""
        print(
            f"{name}: {total['prompts']} prompts, {total['answers']} answers, {total['tokens']:,} tokens{late}", flush=True
        )

    def execute(self, name: str) -> None:
        """Run the programs of a pass, `suites` or `verdicts`, that were not run yet."""
        work = vet_suites if name == "suites" else judge_solutions
        self.run.timed(name, lambda: work(self.run) if self.is_local else self._submit(name))

    def _submit(self, name: str) -> None:
        """Every lane of a pass as a task of a cluster."""
        executor = self.run.settings.executor
        # Ray gives a task one processor and does not bind it there; under Slurm a task sees those that it was given
        at_once = 1 if executor == "ray" else None
        task = lane_task(self.run.recipe, name, at_once)
        gpus = gpus_of(self.run.ask(name).engine) if name in ASKED else 0
        logs = self.run.work / "logs" / name
        run_tasks(executor, task, self.run.settings.lanes, self.workers, logs, self.cluster, gpus)

    def _ask(self, name: str, lanes: Sequence[int]) -> None:
        if self.workers == 1 or len(lanes) <= 1 and self._pool is None:
            for lane in lanes:
                ask_lane(self.run.recipe, name, lane)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, initializer=_end_with_parent, initargs=(os.getpid(),))
        try:
            for future in [self._pool.submit(ask_lane, self.run.recipe, name, lane) for lane in lanes]:
                future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"a process that asked for {name} was ended, most likely for want of memory; run the same command again "
                "with fewer workers (--workers 1)"
            ) from error


def _end_with_parent(parent: int) -> None:
    """A worker whose parent was killed must not go on writing beside the next session's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()  # elsewhere, and for a parent that was gone before
