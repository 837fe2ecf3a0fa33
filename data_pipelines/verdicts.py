"""What self-instruct executes: tests tried on stubs, and solutions run against tests, in `codetune.sandbox`.

What comes in: answers of models. What goes out: a record per question, in a file that is only added to. Tests run in another
process than the function they test; both are untrusted and isolated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, cast

from codetune.generate import Completion
from codetune.recipe import SelfInstructSettings
from codetune.sandbox import (
    ExecutionResult,
    Job,
    Limits,
    Sandbox,
    Verdict,
    run_programs,
)
from data_pipelines.questions import Question, read_questions
from data_pipelines.self_instruct_run import Records, Run, batches, draw
from data_pipelines.suites import Refused, Suite, find_block, parse_suite, parsed, stubs, without_fence
from data_pipelines.triplets import RECORDS

STUB_SECONDS = 2.0
BATCH_QUESTIONS = 64  # whose programs run before their records are written


def limits_of(settings: SelfInstructSettings, wall_seconds: float | None = None) -> Limits:
    return Limits(wall_seconds=wall_seconds or settings.wall_seconds, memory_bytes=settings.memory_mib * 2**20)


def vet_suites(run: Run, lanes: Iterable[int] | None = None, sandbox: Sandbox | None = None) -> None:
    """For each question the first answer whose tests are usable, and why the ones before it were not."""
    for lane in range(run.settings.lanes) if lanes is None else lanes:
        records = Records(run.lane_file("suites", lane))
        left = [question for question in read_questions(run, lane) if question.id not in records.found]
        answers = run.answers("tests", lane) if left else {}
        for batch in batches(left, BATCH_QUESTIONS):
            records.add(vet_batch(run, batch, answers, sandbox))


def vet_batch(
    run: Run, questions: Sequence[Question], answers: dict[str, list[Completion]], sandbox: Sandbox | None
) -> list[dict[str, Any]]:
    """Records of some questions: answers are read one after the other, and those that can be are tried on stubs."""
    records = {
        question.id: {"id": question.id, "suite": None, "sample": None, "parsed": False, "refused": [], "stubs": 0}
        for question in questions
    }
    open_text = run.prompts["tests"].open_text
    waiting = {question.id: list(answers.get(f"tests/{question.id}", ())) for question in questions}
    texts = {question.id: question.text for question in questions}
    for question in questions:
        if not waiting[question.id]:
            records[question.id]["refused"].append({"sample": None, "reason": "prompt-too-long", "detail": ""})
    while any(waiting.values()):
        candidates: dict[str, Suite] = {}
        for name, left in waiting.items():
            while left and name not in candidates:
                answer = left.pop(0)
                suite = parse_suite(
                    open_text + answer.text,
                    texts[name],
                    stopped=answer.stopped,
                    minimum_asserts=run.settings.minimum_asserts,
                )
                records[name]["sample"] = answer.sample
                if isinstance(suite, Refused):
                    records[name]["refused"].append(_refusal(answer.sample, suite))
                    continue
                records[name]["parsed"] = True
                candidates[name] = suite
        for name, (refused, count) in try_stubs(candidates, run.settings, sandbox).items():
            records[name]["stubs"] += count
            if refused is not None:
                records[name]["refused"].append(_refusal(records[name]["sample"], refused))
                continue
            suite = candidates[name]
            records[name]["suite"] = {
                "entry_point": suite.entry_point,
                "imports": suite.imports,
                "asserts": suite.asserts,
                "duplicates": suite.duplicates,
            }
            waiting[name].clear()
    return [records[question.id] for question in questions]


def _refusal(sample: int | None, refused: Refused) -> dict[str, Any]:
    return {"sample": sample, "reason": refused.reason, "detail": refused.detail}


def try_stubs(
    suites: dict[str, Suite], settings: SelfInstructSettings, sandbox: Sandbox | None = None
) -> dict[str, tuple[Refused | None, int]]:
    """Whether a stub passes, by question, and how many were run; the empty function goes first, for tests that never end."""
    found: dict[str, tuple[Refused | None, int]] = {}
    limits = limits_of(settings, STUB_SECONDS)
    every = {name: list(stubs(suite)) for name, suite in suites.items()}

    def run_stubs(chosen: list[tuple[str, int]]) -> None:
        jobs = [
            Job(every[name][place].program, suites[name].text, suites[name].entry_point, limits=limits)
            for name, place in chosen
        ]
        for (name, place), result in zip(chosen, run_programs(jobs, sandbox=sandbox), strict=True):
            refused, count = found.get(name, (None, 0))
            found[name] = (refused or _judge_stub(every[name][place].name, result), count + 1)

    run_stubs([(name, 0) for name in every])
    run_stubs([(name, place) for name in every if found[name][0] is None for place in range(1, len(every[name]))])
    return found


def _judge_stub(name: str, result: ExecutionResult) -> Refused | None:
    if result.verdict is Verdict.PASS:
        return Refused("vacuous", f"passed by a function that gives: {name}")
    if result.verdict is Verdict.UNSUPPORTED:
        return Refused("unsupported", result.detail[:200])
    if result.verdict is Verdict.TIMEOUT:
        return Refused("tests-time-out", result.detail[:200])
    if result.reason in ("memory", "scratch", "processes") or result.detail.startswith("MemoryError"):
        return Refused("tests-memory", result.detail[:200])  # a stub needs next to nothing
    if result.reason == "tests-syntax":
        return Refused("syntax", result.detail[:200])
    return None


def read_suites(run: Run, lane: int) -> dict[str, Suite | None]:
    """The usable tests of a lane's questions, from the working folder or the finished one."""
    records = finished_suites(run, lane) if run.is_concluded() else Records(run.lane_file("suites", lane)).found
    missing = [question.id for question in read_questions(run, lane) if question.id not in records]
    if missing:
        raise ValueError(
            f"{run.lane_file('suites', lane)}: {len(missing)} questions are missing; do the pass `suites` first"
        )
    return {name: suite_of(record["suite"]) for name, record in records.items()}


def finished_suites(run: Run, lane: int) -> dict[str, dict[str, Any]]:
    """The records of a lane's suites, out of those of all questions."""
    with (run.target / RECORDS).open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return {record["id"]: record["suite"] for record in records if record["lane"] == lane}


def suite_of(facts: dict[str, Any] | None) -> Suite | None:
    """Tests from their record."""
    if facts is None:
        return None
    return Suite(facts["entry_point"], tuple(facts["imports"]), tuple(facts["asserts"]), facts["duplicates"])


def shown_test(run: Run, question_id: str, suite: Suite) -> str:
    """The one test that solutions are shown, drawn by the question's id."""
    return draw(run.recipe.seed, "shown test", question_id).choice(suite.asserts)


def parse_solution(text: str, entry_point: str, *, stopped: bool) -> str | Refused:
    """The source between [PYTHON] and [/PYTHON], if it parses and defines the function that the tests call."""
    block = find_block(text, "[PYTHON]", "[/PYTHON]", stopped=stopped)
    if isinstance(block, Refused):
        return block
    source = without_fence(block).strip("\n").rstrip() + "\n"
    tree = parsed(source)
    if isinstance(tree, Refused):
        return tree
    names = {getattr(node, "name", None) for node in tree.body}
    names |= {target.id for node in tree.body for target in getattr(node, "targets", ()) if hasattr(target, "id")}
    if entry_point not in names:
        return Refused("no-function", f"no {entry_point}")
    return source


def judge_solutions(run: Run, lanes: Iterable[int] | None = None, sandbox: Sandbox | None = None) -> None:
    """Run every solution against all tests of its question."""
    for lane in range(run.settings.lanes) if lanes is None else lanes:
        records = Records(run.lane_file("verdicts", lane))
        suites = read_suites(run, lane)
        questions = [question for question in read_questions(run, lane) if suites[question.id] is not None]
        left = [question for question in questions if question.id not in records.found]
        answers = run.answers("solutions", lane) if left else {}
        for batch in batches(left, BATCH_QUESTIONS):
            records.add(judge_batch(run, batch, answers, suites, sandbox))


def judge_batch(
    run: Run,
    questions: Sequence[Question],
    answers: dict[str, list[Completion]],
    suites: dict[str, Suite | None],
    sandbox: Sandbox | None,
) -> list[dict[str, Any]]:
    """Records of some questions: the verdict of each of their solutions."""
    open_text, limits = run.prompts["solutions"].open_text, limits_of(run.settings)
    records = {question.id: {"id": question.id, "verdicts": []} for question in questions}
    jobs, places = [], []
    for question in questions:
        suite = cast(Suite, suites[question.id])
        for answer in answers.get(f"solutions/{question.id}", ()):
            source = parse_solution(open_text + answer.text, suite.entry_point, stopped=answer.stopped)
            verdicts = records[question.id]["verdicts"]
            if isinstance(source, Refused):
                verdicts.append(
                    {"sample": answer.sample, "verdict": "fail", "reason": source.reason, "detail": source.detail}
                )
                continue
            verdicts.append({"sample": answer.sample})
            jobs.append(Job(source, suite.text, suite.entry_point, limits=limits))
            places.append(verdicts[-1])
    for place, result in zip(places, run_programs(jobs, sandbox=sandbox), strict=True):
        place |= verdict_facts(result)
    return list(records.values())


def verdict_facts(result: ExecutionResult) -> dict[str, Any]:
    """What a record keeps of an execution."""
    facts = {"verdict": str(result.verdict), "reason": result.reason, "detail": result.detail[:300], "checks": result.checks}
    facts |= {"calls": result.calls, "isolation": result.isolation, "judge": result.judge}
    return facts | {"wall_seconds": result.wall_seconds, "cpu_seconds": result.cpu_seconds}
