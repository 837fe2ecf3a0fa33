"""Instruction data by execution feedback: the main path of `make self-instruct` (paper Sec. 2.5, App. H.1).

    questions   a model is asked for lists of interview questions, each list by another cell of a topic plan
    unique      equal questions once, near ones on demand; none that shares a run of words with a benchmark
    tests       a model writes tests for each question
    suites      the tests are taken out, and refused where passing them would mean nothing (`suites.py`)
    solutions   a model writes several functions for each question, shown one test of it, drawn at random
    verdicts    every function runs against all of the tests, isolated, the tests in another process
    triplets    question, tests and the first function that passed all of them, as `triplets.py` says

What comes in: a recipe, prompts, topics and examples as files. What goes out: `runs/<size>/<name>/triplets/`. Every pass but
`unique` and `triplets` is done in lanes, which know nothing of each other: local processes, tasks of Slurm or Ray
(`self_instruct.executor`), or one command per lane. What was done is not done again: completions are kept by groups, and
verdicts by 64 questions. Kept triplets are the same bytes whatever the number of workers and interruptions, on one machine,
in fp32 with transformers on a CPU.

    python -m data_pipelines.self_instruct --recipe recipes/self_instruct/tiny.yaml [--set key=value ...] [--workers N]
    python -m data_pipelines.self_instruct --recipe ... --pass tests --lane 3         # one lane of one pass, and no more
    python -m data_pipelines.self_instruct --recipe ... --replay all [--regenerate]   # kept triplets, made and run again
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codetune import artifacts
from codetune.artifacts import MANIFEST, fail, read_json, write_json
from codetune.generate import Completion
from codetune.recipe import Recipe, load_recipe
from codetune.sandbox import SandboxError, SandboxUnavailable, shared_sandbox
from codetune.slurm import CLUSTER
from data_pipelines.asking import LaneWorkers, ask_lane, close_engine
from data_pipelines.decontaminate import Contamination
from data_pipelines.executors import worker_count
from data_pipelines.questions import Question, keep_unique_questions, open_contamination, read_questions
from data_pipelines.self_instruct_run import ASKED, Records, Run, open_run
from data_pipelines.suites import Suite
from data_pipelines.triplets import QUESTIONS, RECORDS, TRIPLETS, Triplet
from data_pipelines.verdicts import judge_solutions, parse_solution, shown_test, suite_of, vet_suites

PASSES = ("questions", "unique", "tests", "suites", "solutions", "verdicts", "triplets")
FUNNEL = ("asked", "unique", "clean", "parsed", "usable", "solved", "kept")


def self_instruct(recipe: Recipe, workers: int = 1, cluster: Path = CLUSTER) -> Path:
    """Make the triplets of a recipe, or return at once when they are there.

    Raises:
        ValueError: something about the recipe, its files, the models or the output folder that the user can mend.
        SandboxUnavailable: programs cannot be isolated here.
    """
    run = open_run(recipe)
    if run.is_finished():
        if run.work.is_dir():  # of a session that was ended between its last two steps
            with artifacts.exclusive(recipe.run_dir, f"self-instruct {recipe.size}/{recipe.name}"):
                run.clear_work()
        print(f"triplets: {run.target} is finished")
        return run.target
    if run.settings.executor == "local":
        shared_sandbox()  # without isolation nothing can be kept: say so before models have been asked for hours
    with artifacts.exclusive(recipe.run_dir, f"self-instruct {recipe.size}/{recipe.name}"):
        run.claim()
        with LaneWorkers(run, workers, cluster) as lanes:
            lanes.ask("questions")
            run.timed("unique", lambda: keep_unique_questions(run))
            lanes.ask("tests")
            lanes.execute("suites")
            lanes.ask("solutions")
            lanes.execute("verdicts")
        manifest = write_triplets(run)
    print(funnel_table(manifest))
    print(f"triplets: {run.target}, {manifest['funnel']['kept']} kept of {manifest['funnel']['asked']} questions")
    return run.target


# ---------------------------------------------------------------------------------------------------------------------
# Triplets and the funnel


def write_triplets(run: Run) -> dict[str, Any]:
    """The finished folder: what was kept, every question's record, completions, and the manifest."""
    settings = run.settings
    unique = read_json(run.work / "unique.json")
    concluded = conclude_lanes(run)
    records = [record for _, record in concluded]
    counts = Counter({"asked": unique["asked"], "unique": unique["unique"], "clean": unique["clean"]})
    for record in records:
        counts.update(record["passed"])
    with artifacts.whole_folder(run.target) as folder:
        with (folder / TRIPLETS).open("w", encoding="utf-8") as file:
            file.writelines(triplet.to_line() for triplet, _ in concluded if triplet is not None)
        with (folder / RECORDS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in records)
        shutil.copyfile(run.work / "unique.json", folder / QUESTIONS)
        done = {}
        for name in ASKED:
            (folder / "completions" / name).mkdir(parents=True)
            for lane in range(settings.lanes):
                if run.lane_file(name, lane).is_file():
                    shutil.copyfile(run.lane_file(name, lane), folder / "completions" / name / f"lane-{lane:05d}.jsonl")
            facts = [read_json(run.lane_done(name, lane)) for lane in range(settings.lanes)]
            done[name] = {key: sum(fact[key] for fact in facts) for key in ("prompts", "answers", "tokens", "too_long")}
        executed = [verdict for record in records for verdict in record["verdicts"] if "isolation" in verdict]
        manifest = {
            "recipe": run.recipe.to_dict(),
            "fingerprint": run.fingerprint,
            "prompts": {name: file.fingerprint for name, file in run.prompts.items()},
            "engines": {name: any_header(run, name) for name in ASKED},
            "funnel": {name: counts[name] for name in FUNNEL},
            "drops": drops_of(unique, records),
            "solutions": dict(Counter(verdict["verdict"] for record in records for verdict in record["verdicts"])),
            "benchmarks": unique["benchmarks"],
            "sandbox": {key: sorted({verdict[key] for verdict in executed}) for key in ("isolation", "judge")},
            "asked": done,
            "seconds": run.seconds,
            "versions": artifacts.software_versions(),
        }
        write_json(folder / MANIFEST, manifest)
    run.clear_work()  # all of it is in the finished folder
    return manifest


def drops_of(unique: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Everything that was refused, by pass and reason; of tests and solutions every answer counts."""
    tests = Counter(refused["reason"] for record in records for refused in record["suite"]["refused"])
    solutions = Counter(v["reason"] for record in records for v in record["verdicts"] if v["verdict"] != "pass")
    triplets = Counter("contaminated" for record in records if record["ended"].startswith("contaminated"))
    every = {"questions": unique["drops"], "tests": tests, "solutions": solutions, "triplets": triplets}
    return {name: dict(sorted(found.items())) for name, found in every.items()}


def conclude_lanes(run: Run) -> list[tuple[Triplet | None, dict[str, Any]]]:
    """What became of every question, in order; lanes are read one at a time."""
    contamination = open_contamination(run.settings)
    asked: dict[tuple[str, int], dict[str, Any]] = {}
    for lane in range(run.settings.lanes):
        for name, answers in run.answers("questions", lane).items():
            asked |= {(name, answer.sample): step_facts(run, "questions", lane, answer) for answer in answers}
    concluded: dict[str, tuple[Triplet | None, dict[str, Any]]] = {}
    for lane in range(run.settings.lanes):
        facts = LaneFacts.read(run, lane)
        for question in read_questions(run, lane):
            first = asked[question.asked["prompt"], question.asked["sample"]] | {"item": question.asked["item"]}
            concluded[question.id] = conclude(run, question, first, facts, contamination)
    return [concluded[question.id] for question in read_questions(run)]


@dataclass(frozen=True)
class LaneFacts:
    """Everything that is known of a lane's questions."""

    tests: dict[str, list[Completion]]
    solutions: dict[str, list[Completion]]
    suites: dict[str, dict[str, Any]]
    verdicts: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, run: Run, lane: int) -> LaneFacts:
        suites, verdicts = (Records(run.lane_file(name, lane)).found for name in ("suites", "verdicts"))
        return cls(run.answers("tests", lane), run.answers("solutions", lane), suites, verdicts)


def conclude(
    run: Run, question: Question, first: dict[str, Any], facts: LaneFacts, contamination: Contamination
) -> tuple[Triplet | None, dict[str, Any]]:
    """The triplet of a question, if there is one, and its record: how far it came, why it ended there, all verdicts."""
    suite_record = facts.suites[question.id]
    suite = suite_of(suite_record["suite"])
    verdicts = facts.verdicts.get(question.id, {"verdicts": []})["verdicts"]
    passed = ["parsed"] * bool(suite_record["parsed"])
    record = {
        "id": question.id,
        "question": question.text,
        "lane": question.lane,
        "suite": suite_record,
        "verdicts": verdicts,
    }
    if suite is None:
        last = suite_record["refused"][-1]
        return None, record | {"passed": passed, "ended": f"tests: {last['reason']}"}
    passed.append("usable")
    solved = next((verdict["sample"] for verdict in verdicts if verdict["verdict"] == "pass"), None)
    if solved is None:
        why = Counter(verdict["reason"] for verdict in verdicts).most_common(1)
        return None, record | {"passed": passed, "ended": f"solutions: {why[0][0] if why else 'prompt-too-long'}"}
    passed.append("solved")
    tests = next(answer for answer in facts.tests[f"tests/{question.id}"] if answer.sample == suite_record["sample"])
    solution = next(answer for answer in facts.solutions[f"solutions/{question.id}"] if answer.sample == solved)
    triplet = make_triplet(run, question, suite, first, tests, solution, verdicts)
    hit = contamination.find(f"{triplet.question}\n{triplet.tests}\n{triplet.solution}")
    if hit is not None:
        return None, record | {"passed": passed, "ended": f"contaminated: {hit.benchmark} {hit.problem}: {hit.words}"}
    seconds = {"tests": tests.seconds, "solution": solution.seconds}
    return triplet, record | {"passed": [*passed, "kept"], "ended": "kept", "seconds": seconds}


def make_triplet(
    run: Run,
    question: Question,
    suite: Suite,
    first: dict[str, Any],
    tests: Completion,
    solution: Completion,
    verdicts: Sequence[dict[str, Any]],
) -> Triplet:
    """A triplet with all that is needed to make it again."""
    text = run.prompts["solutions"].open_text + solution.text
    source = parse_solution(text, suite.entry_point, stopped=solution.stopped)
    assert isinstance(source, str)
    provenance: dict[str, Any] = {
        "topic": question.topic,
        "difficulty": question.difficulty,
        "question": first,
        "tests": step_facts(run, "tests", question.lane, tests),
        "solution": step_facts(run, "solutions", question.lane, solution),
        "verdicts": [f"{verdict['verdict']}: {verdict['reason']}" for verdict in verdicts],
    }
    shown = shown_test(run, question.id, suite)
    return Triplet(question.id, question.text, suite.text, source, suite.entry_point, shown, provenance)


def step_facts(run: Run, name: str, lane: int, answer: Completion) -> dict[str, Any]:
    """Where an answer came from: its place, its seed, what was asked, the model and how it was drawn."""
    header = lane_header(run, name, lane)
    engine = {key: header["engine"].get(key) for key in ("kind", "model", "model_hash", "revision", "dtype")}
    place = {"lane": lane, "prompt": answer.prompt_id, "sample": answer.sample, "group": answer.group, "seed": answer.seed}
    drawn = {key: header["sampling"][key] for key in ("temperature", "top_p", "max_new_tokens", "stop_strings")}
    return {
        **place,
        "prompt_hash": answer.prompt_hash,
        "stop_reason": answer.stop_reason,
        "engine": engine,
        "sampling": drawn,
    }


@functools.cache
def _header(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        return json.loads(file.readline())


def lane_header(run: Run, name: str, lane: int) -> dict[str, Any]:
    """The first line of a lane's completions: engine and sampling."""
    return _header(run.lane_file(name, lane))


def any_header(run: Run, name: str) -> dict[str, Any]:
    """What wrote a pass's completions, from the first lane that asked anything; empty where none did."""
    paths = (run.lane_file(name, lane) for lane in range(run.settings.lanes))
    return next(({key: _header(path)[key] for key in ("engine", "sampling")} for path in paths if path.is_file()), {})


def funnel_table(manifest: dict[str, Any]) -> str:
    """The funnel as text, then what was refused at each step."""
    says = {
        "asked": "questions that the model wrote",
        "unique": "askable, not the same as an earlier one",
        "clean": "no benchmark's",
        "parsed": "with tests that parse",
        "usable": "with tests that mean something",
        "solved": "with a solution that passes all of them",
        "kept": "no benchmark's words in tests and solution either",
    }
    lines = [f"{name:<8}{manifest['funnel'][name]:>8,}  {text}" for name, text in says.items()]
    for name, reasons in manifest["drops"].items():
        if reasons:
            found = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
            lines.append(f"refused {name}: {found}")
    for name in manifest["benchmarks"]["missing"]:
        lines.append(f"not looked for: {name}, whose problems are not on this machine")
    seconds = manifest["seconds"]
    lines.append("seconds: " + ", ".join(f"{name} {seconds[name]:.0f}" for name in PASSES if name in seconds))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def do_pass(run: Run, name: str, lanes: Sequence[int] | None) -> None:
    """One pass, of some lanes or of all: what a job on one of many machines does."""
    every = range(run.settings.lanes) if lanes is None else lanes
    wrong = [lane for lane in every if not 0 <= lane < run.settings.lanes]
    if wrong:
        raise ValueError(f"--lane {wrong[0]}: this recipe has lanes 0 to {run.settings.lanes - 1}")
    if run.is_finished():
        print(f"triplets: {run.target} is finished")
        return
    run.claim()
    if name == "triplets":  # ends with the working folder, where times are kept
        print(funnel_table(write_triplets(run)))
        return
    run.timed(name, lambda: _do_pass(run, name, every))


def _do_pass(run: Run, name: str, every: Sequence[int]) -> None:
    if name in ASKED:
        for lane in every:
            print(f"{name}, lane {lane}: {ask_lane(run.recipe, name, lane)} answers")
        close_engine()
    elif name == "unique":
        keep_unique_questions(run)
    elif name == "suites":
        vet_suites(run, every)
    else:
        judge_solutions(run, every)


def usual_workers(recipe: Recipe) -> int:
    """Lanes at once where nobody says how many."""
    settings = recipe.need_self_instruct()
    if settings.executor == "slurm" or (settings.executor == "ray" and os.environ.get("RAY_ADDRESS")):
        return settings.lanes  # the cluster holds back what it has no room for
    return os.cpu_count() or 1 if recipe.embedded else 1


def main(arguments: list[str] | None = None) -> None:
    """Make the triplets of a recipe, do one pass of it, or make kept ones again."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.self_instruct", description=main.__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="section.key=value", dest="overrides")
    told = "lanes at once (here: a core each on a CPU, else 1; on a cluster: all)"
    parser.add_argument("--workers", type=worker_count, help=told)
    parser.add_argument("--cluster", type=Path, default=CLUSTER, help="what is particular to a Slurm cluster")
    parser.add_argument("--pass", choices=PASSES, dest="only", help="do one pass and stop")
    parser.add_argument("--lane", type=int, action="append", help="with --pass: this lane alone")
    parser.add_argument(
        "--replay", metavar="ID", help="a kept triplet by its id, or all: parse and run it again, and compare"
    )
    parser.add_argument("--regenerate", action="store_true", help="with --replay: ask the models again, too")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.replay:
            from data_pipelines.replay import replay

            sys.exit(0 if replay(recipe, options.replay, regenerate=options.regenerate) else 1)
        if options.only:
            do_pass(open_run(recipe), options.only, options.lane)
            return
        if options.lane is not None:
            raise ValueError("--lane goes with --pass: say which pass of that lane")
        self_instruct(recipe, options.workers or usual_workers(recipe), options.cluster)
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished is kept, run the same command again", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EPERM, errno.EDQUOT):
            raise
        fail(f"{error.filename or 'the output folder'}: {error.strerror}; mend that and run the same command again")
    except (ValueError, SandboxUnavailable, SandboxError) as error:
        fail(str(error))


if __name__ == "__main__":
    # subtle: tasks go to other processes by the name of their module, and `__main__` is another one there
    from data_pipelines import self_instruct as module

    module.main()
