"""Benchmarks of one model: MAIN PATH of `make eval`.

What comes in: a checkpoint folder, a Hub id or a server, and a suite (`recipes/eval/*.yaml`). What goes out, in one folder:
`results.json` (door 3), and for each task the completions and the grades, a line per sample.

    python -m eval.run --suite recipes/eval/tiny.yaml --model runs/tiny/stage1/model --out runs/tiny/stage1/eval/tiny
    python -m eval.run --suite ... --model ... --out ... --step grade                # again, without generating
    python -m eval.run --suite ... --out ... --completions humaneval=samples.jsonl   # of whoever wrote them

Generating and grading are two steps; both go on where a killed run stopped. Whatever cannot be done here (data that is
not there, a toolchain, a judge, a checkpoint that was never taught to infill) is refused by name in the results, without a
score. The trade: a task is generated whole before it is graded, so the sandbox waits for the model. What it does not do:
compare results (`eval.table`), or decide what is worth measuring (the suites).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from codetune.artifacts import (
    RESULTS,
    exclusive,
    fail,
    hash_file,
    hash_json,
    read_json,
    read_results,
    software_versions,
    write_json,
    write_results,
)
from codetune.completions import encode_prompt
from codetune.generate import EngineSettings, generate
from codetune.paper import cut_suite
from codetune.problems import DataMissing, Loaded, load_problems
from codetune.sandbox import Sandbox, SandboxUnavailable
from codetune.sandbox_languages import jars
from eval import registry
from eval.grading import check_probes_again, check_references, grade_answers
from eval.stored import Answer, answer_of, read_answers
from eval.target import Target, hardware
from eval.tasks import Asker, Question, Suite, Task, TaskRefused, TaskSettings, count_reasons, load_suite

IDENTITY = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run was asked for beside its suite."""

    out: Path
    data: Path | None = None
    rows: Path | None = None  # packed rows, for losses on held-out documents
    completions: dict[str, Path] = dataclasses.field(default_factory=dict)  # task -> file
    step: str = "all"  # generate, grade, all
    tasks: tuple[str, ...] = ()  # only these; empty: all
    hub: bool = True
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    name: str | None = None  # of the model, where only stored completions are graded


def run_suite(suite: Suite, target: Target | None, options: Options) -> dict[str, Any]:
    """Every task of a suite, one after another; results are written after each of them.

    Raises:
        ValueError: a folder that holds something else, a task that is not in the suite, a damaged file.
    """
    unknown = [name for name in (*options.tasks, *options.completions) if name not in suite.tasks]
    if unknown:
        raise ValueError(f"the suite {suite.name} has no task {', '.join(unknown)}; it has {', '.join(suite.tasks)}")
    with exclusive(options.out, f"evaluating with {suite.name}"), Sandboxes() as sandboxes:
        results = begin_results(suite, target, options)
        for name, settings in suite.tasks.items():
            if options.tasks and name not in options.tasks:
                continue
            say(f"{name}: {settings.benchmark}{f', {settings.form}' if settings.form else ''}")
            try:
                facts = run_task(name, settings, target, options, sandboxes)
            except (TaskRefused, DataMissing, SandboxUnavailable) as error:
                facts = {"state": "refused", "why": str(error), "settings": settings_facts(settings)}
            results["tasks"][name] = facts
            if target is not None and target._engine is not None:
                results["engine"] = target.engine().describe()
            write_results(options.out, results)
            say(summary(facts))
    return results


def run_task(
    name: str, settings: TaskSettings, target: Target | None, options: Options, sandboxes: Sandboxes
) -> dict[str, Any]:
    """One task: problems, references, answers, grades, scores."""
    kind = registry.find(settings.benchmark)
    if kind.measure is not None:
        return measure(name, settings, kind, need_target(target, name), options)
    loaded = kind.load(settings, lambda benchmark: load(benchmark, options), sandboxes.open)
    assert kind.task is not None
    task = kind.task(name, settings, loaded)
    task.prepare(options.data, lambda benchmark: load(benchmark, options))
    stored = options.completions.get(name)
    asker = Asker(stored=True) if stored is not None else need_target(target, name).asker()
    questions = task.questions(asker)
    facts: dict[str, Any] = {"settings": settings_facts(settings, stored is not None), "data": data_facts(loaded, task)}
    facts |= {"form": task.form, "prompt_of_sample_0": prompt_facts(questions[0], asker), "notes": task.notes()}
    if task.as_plain_text:
        facts["notes"]["asked as plain text"] = "the checkpoint has no chat template"
    if options.step != "generate":
        facts["references"] = check_references(task, questions, sandboxes.open, options.out)
    if stored is not None:
        answers, too_long = read_answers(stored, [question.id for question in questions]), []
        facts["completions"] = {"file": stored.name, "sha256": hash_file(stored)}
        if len(answers) > len(questions):
            task.decoding = "sampled"  # whatever the suite would have asked for: they are given
    else:
        start = time.monotonic()
        answers, too_long = generate_answers(task, questions, need_target(target, name), asker, options)
        facts["generation_seconds"] = round(time.monotonic() - start, 2)
    facts |= answer_facts(answers, too_long, settings)
    if options.step == "generate":
        return {"state": "generated", **facts}
    grades_path = options.out / f"{name}.grades.jsonl"
    graded = grade_answers(task, questions, answers, too_long, sandboxes.open, grades_path)
    if graded.graded_now:
        check_probes_again(task, sandboxes.open, grades_path, graded)
    facts |= {
        "reasons": count_reasons(graded.grades),
        "cut_notes": graded.notes,
        "grading_seconds": round(graded.seconds, 2),
    }
    grades = [grade for found in graded.grades.values() for grade in found]
    for key in ("judge", "isolation", "toolchain"):
        facts[f"{key}s"] = {
            value: sum(getattr(g, key) == value for g in grades)
            for value in sorted({getattr(g, key) for g in grades} - {""})
        }
    facts["ran_again_alone"] = sum(grade.ran_again_alone for grade in grades)
    if graded.faults:
        why = f"the sandbox failed on {len(graded.faults)} samples, so there is no score; run again to grade them"
        return {"state": "faults", "why": f"{why}: {graded.faults[0]}", **facts}
    found = task.scores(graded.grades)
    facts["scores"] = {key: None if score is None else score.to_dict() for key, score in found.items()}
    facts["per_problem"] = task.per_problem(graded.grades)
    facts["per_problem_of"] = task.per_problem_of(graded.grades)
    return {"state": "done", **facts}


def measure(name: str, settings: TaskSettings, kind: registry.Kind, target: Target, options: Options) -> dict[str, Any]:
    """A task that takes losses instead of text."""
    assert kind.measure is not None
    start = time.monotonic()
    found = kind.measure(settings, target, options.rows, options.data, options.out / f"{name}.measured.jsonl")
    seconds = round(time.monotonic() - start, 2)
    return {"state": "done", "settings": settings_facts(settings), "scores": found, "generation_seconds": seconds}


# ---------------------------------------------------------------------------------------------------------------------
# Its steps


def load(benchmark: str, options: Options) -> Loaded:
    return load_problems(benchmark, options.data, hub=options.hub, revisions=options.revisions)


def need_target(target: Target | None, name: str) -> Target:
    if target is None:
        raise TaskRefused(f"no model was named, and no completions for {name}; give --model, or --completions {name}=FILE")
    return target


def generate_answers(
    task: Task, questions: Sequence[Question], target: Target, asker: Asker, options: Options
) -> tuple[list[Answer], list[str]]:
    """Completions of every question whose prompt fits, and the ids of the others; goes on with what is on the disk.

    When grading alone, nothing is generated: what is missing is an error.
    """
    engine = target.engine()
    too_long = []
    limit = None if task.settings.beyond_context else engine.context_tokens
    if asker.codec is not None and limit is not None:
        for question in questions:
            if len(encode_prompt(question.prompt(), asker.codec)) >= limit:
                too_long.append(question.id)
    asked = [question for question in questions if question.id not in set(too_long)]
    if not asked:
        raise TaskRefused(f"no prompt fits into the model's context of {limit} tokens")
    stops = {task.stops_of(question) for question in asked}
    assert len(stops) == 1, "one benchmark, one set of stop strings"
    sampling = task.sampling(stops.pop(), task.stop_ids(asker))
    path = options.out / f"{task.name}.completions.jsonl"
    if options.step == "grade" and not path.is_file():
        raise TaskRefused(f"nothing was generated yet ({path.name} is not there); run without --step grade first")
    found = generate(engine, [question.prompt() for question in asked], sampling, path)
    total = len(asked) * task.settings.samples
    answers, tokens = [], 0
    with positions(engine, limit), tqdm(total=total, desc=f"generate {task.name}", unit=" completions") as progress:
        for completion in found:
            answers.append(answer_of(completion))
            tokens += completion.completion_tokens
            progress.set_postfix_str(f"{tokens} tokens", refresh=False)
            progress.update()
    return answers, too_long


@contextlib.contextmanager
def positions(engine: Any, limit: int | None) -> Iterator[None]:
    """Let the engine read so many tokens; None for as many as come, which positions that rotate (RoPE) allow.

    Raises:
        TaskRefused: an engine that has a limit of its own.
    """
    own = engine.context_tokens
    if limit is None and own is not None and engine.settings.kind != "transformers":
        raise TaskRefused("`beyond_context` needs the transformers engine: another has a limit of its own")
    engine.context_tokens = limit
    try:
        yield
    finally:
        engine.context_tokens = own


def begin_results(suite: Suite, target: Target | None, options: Options) -> dict[str, Any]:
    """What is known before the first task; a folder with results of something else is refused."""
    model = {"name": options.name or "stored completions"} if target is None else target.facts()
    identity = {"suite": suite.name, "model": {key: model.get(key) for key in ("name", "hash", "revision")}}
    if "rope_base" in model:
        identity["model"]["rope_base"] = model["rope_base"]
    path = options.out / IDENTITY
    if path.is_file() and read_json(path) != identity:
        old = read_json(path)
        raise ValueError(
            f"{options.out} holds the evaluation of {old['model']['name']} with the suite {old['suite']} (hash "
            f"{old['model'].get('hash')}); give another --out, or move that one away"
        )
    write_json(path, identity)
    tasks = read_results(options.out)["tasks"] if (options.out / RESULTS).is_file() else {}
    return {
        "suite": {"name": suite.name, "title": suite.title, "settings": hash_json(dataclasses.asdict(suite))},
        "model": model,
        "engine": None,
        "versions": software_versions(),
        "hardware": hardware(),
        "tasks": {name: facts for name, facts in tasks.items() if name in suite.tasks},
    }


GENERATION = ("temperature", "top_p", "samples", "max_new_tokens", "stop_strings", "beyond_context")


def settings_facts(settings: TaskSettings, stored: bool = False) -> dict[str, Any]:
    """The settings that differ from a task's defaults, and those that always matter.

    Of stored answers, whose own settings are not known here, none of those that decide how answers are generated.
    """
    default = TaskSettings(settings.benchmark)
    always = ("benchmark", "temperature", "top_p", "samples", "max_new_tokens", "timeout_seconds")
    tree = {key: value for key, value in dataclasses.asdict(settings).items() if not stored or key not in GENERATION}
    return {key: value for key, value in tree.items() if key in always or value != getattr(default, key)}


def data_facts(loaded: Loaded, task: Task) -> dict[str, Any]:
    facts = {"source": loaded.source, "read": len(loaded.problems), "published": task.published}
    return facts | {"asked": len(task.problems), "fingerprint": task.fingerprint}


def prompt_facts(question: Question, asker: Asker) -> dict[str, Any]:
    """The whole prompt of the first sample, as text and, where there is a tokenizer, as ids."""
    facts: dict[str, Any] = {"id": question.id, "text": question.text}
    if asker.codec is not None:
        facts["token_ids"] = list(encode_prompt(question.prompt(), asker.codec))
        facts["shown"] = asker.codec.decode(facts["token_ids"])
    return facts


def answer_facts(answers: Sequence[Answer], too_long: Sequence[str], settings: TaskSettings) -> dict[str, Any]:
    ended = [answer.ended for answer in answers]
    each = Counter(answer.prompt_id for answer in answers).values()
    facts: dict[str, Any] = {
        "samples": len(answers),
        "ended": {reason: ended.count(reason) for reason in sorted(set(ended))},
    }
    facts["prompts_too_long"] = list(too_long)
    facts["empty"] = sum(not answer.text.strip() for answer in answers)
    for key in ("prompt_tokens", "completion_tokens"):
        facts[key] = sum(getattr(answer, key) or 0 for answer in answers)
    # Cut by the model's context before the limit that was asked for: such answers are shorter than the settings say.
    facts["cut_by_the_context"] = sum(
        answer.ended == "length" and (answer.completion_tokens or 0) < settings.max_new_tokens for answer in answers
    )
    if each and min(each) < max(each):
        facts["samples_of_a_problem"] = {"fewest": min(each), "most": max(each)}
    return facts


class Sandboxes:
    """The sandbox of a run, started when the first program is to be run."""

    def __init__(self) -> None:
        self._sandbox: Sandbox | None = None
        self._jars: list[str] = []

    def open(self) -> Sandbox:
        """The sandbox; a new one when a task has named jars that programs may read."""
        if self._sandbox is not None and self._jars != jars():
            self._sandbox.close()
            self._sandbox = None
        if self._sandbox is None:
            self._jars = jars()
            self._sandbox = Sandbox(read_only=self._jars)
        return self._sandbox

    def __enter__(self) -> Sandboxes:
        return self

    def __exit__(self, *error: object) -> None:
        if self._sandbox is not None:
            self._sandbox.close()


# ---------------------------------------------------------------------------------------------------------------------
# Talking


def say(text: str) -> None:
    print(text, flush=True)


def summary(facts: dict[str, Any]) -> str:
    """One task in a few lines."""
    if facts["state"] in ("refused", "faults"):
        return f"  {facts['state']}: {facts['why']}"
    if facts["state"] == "generated":
        return f"  generated: {facts['samples']} completions"
    lines = []
    for name, score in facts["scores"].items():
        if score is None:
            lines.append(f"  {name:<28} undefined for so few samples")
        elif isinstance(score, dict):
            interval = f"[{score['low']:.1%}, {score['high']:.1%}]"
            lines.append(
                f"  {name:<28} {score['value']:>8.2%}  {interval}, {score['problems']} problems, {score['decoding']}"
            )
        else:
            lines.append(f"  {name:<28} {score:>8.4f}")
    if facts.get("reasons"):
        lines.append("  " + ", ".join(f"{reason} {count}" for reason, count in facts["reasons"].items()))
    floor = facts.get("references", {}).get("floor")
    if floor:
        lines.append(f"  {floor['name']:<28} {floor['passed'] / floor['of']:>8.2%}  {floor['passed']} of {floor['of']}")
    if cut := cut_suite(facts):
        lines.append(f"  {cut[0]} of the benchmark's {cut[1]} problems")
    if "asked as plain text" in (facts.get("notes") or {}):
        lines.append("  the checkpoint has no chat template: asked as plain text")
    if facts.get("prompts_too_long"):
        lines.append(f"  {len(facts['prompts_too_long'])} prompts do not fit into the model's context, and were not asked")
    for key, words in (("empty", "empty answers"), ("cut_by_the_context", "answers cut by the model's context")):
        if facts.get(key):
            lines.append(f"  {facts[key]} {words}")
    if uneven := facts.get("samples_of_a_problem"):
        lines.append(f"  not as many samples of each problem: {uneven['fewest']} to {uneven['most']}; is the file whole?")
    return "\n".join(lines)


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """`name=value` arguments as a dictionary."""
    found = {}
    for value in values:
        name, separator, rest = value.partition("=")
        if not separator or not name or not rest:
            raise ValueError(f"{option} {value!r}: write {option} NAME=VALUE")
        found[name] = rest
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", required=True, type=Path, help="a file of recipes/eval")
    parser.add_argument("--out", required=True, type=Path, help="folder of results; gone on with if it is there")
    parser.add_argument("--model", help="checkpoint folder, Hub id, or the name by which a server serves it")
    parser.add_argument("--model-revision", help="of a Hub id: a commit")
    parser.add_argument("--tokenizer", help="folder or Hub id of the tokenizer; none: the model's")
    parser.add_argument("--engine", choices=("transformers", "vllm", "server"), default="transformers")
    parser.add_argument("--url", help="of a server")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--rope-base", type=float, help="read positions as if RoPE's base were this (Table 18's second row)")
    parser.add_argument("--batch-rows", type=int, default=16, help="completions written at once (16)")
    parser.add_argument("--group-requests", type=int, help="completions that are kept whole or redone after a kill (128)")
    parser.add_argument("--data", type=Path, help="folder with the benchmarks' own files; else wheels and the Hub")
    parser.add_argument("--rows", type=Path, help="packed rows with held-out documents, for held-out losses")
    parser.add_argument(
        "--completions", nargs="*", default=[], metavar="TASK=FILE", help="grade these instead of generating"
    )
    parser.add_argument("--name", help="of the model, for stored completions")
    parser.add_argument("--step", choices=("all", "generate", "grade"), default="all")
    parser.add_argument("--tasks", nargs="*", default=[], metavar="TASK", help="only these of the suite")
    parser.add_argument("--offline", action="store_true", help="do not ask the Hub for data")
    parser.add_argument("--revision", nargs="*", default=[], metavar="BENCHMARK=COMMIT", help="of data on the Hub")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="over the suite's: tasks.humaneval.limit=5"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a suite; exit code 0 when every task is done, 1 when some were refused, 2 when nothing could begin."""
    given = parse(arguments)
    target = None
    try:
        suite = load_suite(given.suite, given.set)
        files = {name: Path(path) for name, path in pairs(given.completions, "--completions").items()}
        options = Options(
            out=given.out,
            data=given.data,
            rows=given.rows,
            completions=files,
            step=given.step,
            tasks=tuple(given.tasks or (files if given.model is None and given.url is None else ())),
            hub=not given.offline,
            revisions=pairs(given.revision, "--revision"),
            name=given.name,
        )
        if given.model or given.url:
            target = Target(
                EngineSettings(
                    kind=given.engine,
                    model=given.model,
                    revision=given.model_revision,
                    tokenizer=given.tokenizer,
                    dtype=given.dtype,
                    rope_base=given.rope_base,
                    batch_rows=given.batch_rows,
                    group_requests=given.group_requests,
                    url=given.url,
                )
            )
        results = run_suite(suite, target, options)
    except ValueError as error:
        fail(str(error))
    finally:
        if target is not None:
            target.close()
    undone = [name for name, facts in results["tasks"].items() if facts["state"] not in ("done", "generated")]
    say(f"results: {given.out / RESULTS}")
    if undone:
        print(f"without a score: {', '.join(undone)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
