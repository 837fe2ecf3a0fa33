"""Self-instruct: the funnel counts everything, nothing depends on workers or kills, and what is kept passes again.

A model that writes on command stands behind the engine's interface (`Script`); programs run in the real sandbox. The last
test goes through a real model, whose answers are noise.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from codetune import sandbox
from codetune.artifacts import read_json
from codetune.completions import Completion, Request, Sampling
from codetune.engines import Engine, Groups
from codetune.recipe import EngineSettings, Recipe, load_recipe
from codetune.sandbox import STRONGEST_FIRST, probe, run_program
from data_pipelines import asking
from data_pipelines import self_instruct as module
from data_pipelines.questions import NearDuplicates, checked_question, open_contamination, parse_questions, topic_cell
from data_pipelines.replay import replay
from data_pipelines.self_instruct import self_instruct
from data_pipelines.self_instruct_run import Run, open_run
from data_pipelines.suites import Refused
from data_pipelines.triplets import read_triplets
from data_pipelines.verdicts import parse_solution

needs_isolation = pytest.mark.skipif(
    sys.platform != "linux" or all(probe(tier) for tier in STRONGEST_FIRST), reason="no isolation works here"
)
TASKS = {"double": "2 * n", "square": "n * n", "negate": "-n", "next_one": "n + 1", "third": "3 * n"}


class Script(Engine):
    """Answers by the prompt's text: what a model might write, good and bad."""

    calls: ClassVar[Counter[str]] = Counter()

    def __init__(self, answer: Callable[[Request], tuple[str, bool]]) -> None:
        super().__init__(EngineSettings(model="script"))
        self.codec, self.eos_ids, self.context_tokens, self.group_requests = None, (), None, 3
        self.answer = answer

    def describe(self) -> dict[str, Any]:
        return {"kind": "script", "model": "script", "model_hash": "0", "revision": None, "dtype": "none"}

    def run(self, groups: Groups, sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for number, requests in groups:
            found = []
            for request in requests:
                Script.calls[request.prompt.id] += 1
                text, stopped = self.answer(request)
                found.append(
                    Completion(
                        request.prompt.id,
                        request.sample,
                        request.seed,
                        text,
                        text,
                        (),
                        "eos" if stopped else "length",
                        1,
                        len(text),
                        request.prompt_hash,
                        group=number,
                    )
                )
            yield number, found


def answer(request: Request) -> tuple[str, bool]:
    """Five good tasks, and every kind of bad answer."""
    name, text = request.prompt.id.partition("/")[0], request.prompt.text
    task = next((task for task in TASKS if f"function {task}(n)" in text), None)
    if name == "questions":
        prompt = int(request.prompt.id.rpartition("/")[2])
        good = [f"Write a function {task}(n) that works on the number n." for task in list(TASKS)[prompt : prompt + 3]]
        bad = [
            "Too short.",
            "Write a function tag(n) for [INST] in a text.",
            "Write a function prose(n) that tells a story.",
        ]
        bad += ["Write a function constant(n) that gives seven.", "Write a function unsolved(n) that nobody can solve."]
        items = [*good, *bad, "The last one is cut"]
        return "".join(f"{n}. {item}\n" for n, item in enumerate(items, start=2)).removeprefix("2."), False
    if name == "tests":
        if "prose(n)" in text:
            return "I would test it with several numbers.", True
        if "constant(n)" in text:
            return "[TESTS]\nassert constant(1) == 7\nassert constant(2) == 7\n[/TESTS]", True
        if task is None:
            return "[TESTS]\nassert unsolved(1) == 2\nassert unsolved(2) == 5\n[/TESTS]", True
        values = [eval(TASKS[task], {"n": n}) for n in (2, 5, -3)]
        lines = [
            f"#Test case {n}:\nassert {task}({x}) == {y}" for n, (x, y) in enumerate(zip((2, 5, -3), values, strict=True))
        ]
        return "[TESTS]\n" + "\n".join(lines) + "\n[/TESTS]", True
    if task is None:
        return "[PYTHON]\ndef unsolved(n):\n    return n\n[/PYTHON]", True
    wrong = [
        "",
        "Sure, here it is.",
        f"[PYTHON]\ndef {task}(n:\n[/PYTHON]",
        "[PYTHON]\ndef other(n):\n    return n\n[/PYTHON]",
    ]
    wrong += [
        "[PYTHON]\nimport os\nos._exit(0)\n" + f"def {task}(n): pass\n[/PYTHON]",
        f"[PYTHON]\ndef {task}(n):\n    return {{2",
    ]
    right = f"[PYTHON]\ndef {task}(n):\n    return {TASKS[task]}\n[/PYTHON] That is all."
    place = (request.sample + len(task)) % 10
    return (wrong[place], place != 5) if place < len(wrong) else (right, True)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    Script.calls.clear()
    monkeypatch.setattr(asking, "open_engine", lambda settings: Script(answer))
    monkeypatch.setattr(asking, "_engine", None)
    return Script.calls


def make_recipe(folder: Path, **changes: Any) -> Path:
    prompts = {
        "questions": "=== user\nAsk about %%%topic%%%.\n=== assistant\n1. An example of a question.\n2.",
        "tests": "=== user\nProblem: %%%question%%%",
        "solutions": "=== user\nProblem: %%%question%%%\nTest: %%%test%%%",
    }
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "topics": "topics.txt",
        "seed_questions": "seeds.txt",
        "question_prompts": 3,
        "shown_questions": 1,
    }
    settings |= {"lanes": 2, "benchmarks": ["humaneval"]}
    for name, text in prompts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        settings[name] = {"prompt": str(folder / f"{name}.txt"), "max_new_tokens": 50, "format": "llama2"}
    settings["solutions"]["samples"] = 10
    for name, text in (
        ("topics", "# a note\nnumbers\nwords\n"),
        ("seed_questions", "Write a function f(x) that does it.\n"),
    ):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        settings[name] = str(folder / f"{name}.txt")
    tree = {"name": "self_instruct", "size": "test", "runs": str(folder / "runs"), "self_instruct": settings | changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(make_recipe(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The whole funnel


@needs_isolation
def test_the_funnel_counts_everything_and_keeps_what_passed(recipe: Recipe, script: Counter[str]) -> None:
    folder = self_instruct(recipe)
    manifest = read_json(folder / "manifest.json")
    # 3 prompts of 9 items each. Good tasks: 0-2, 1-3, 2-4, so 4 repeat; 3 bad ones come three times; two are never askable.
    assert manifest["funnel"] == {
        "asked": 27,
        "unique": 8,
        "clean": 8,
        "parsed": 7,
        "usable": 6,
        "solved": 5,
        "kept": 5,
    }
    assert manifest["drops"]["questions"] == {"control-text": 3, "cut-off": 3, "duplicate": 10, "too-short": 3}
    assert manifest["drops"]["tests"] == {"no-tag": 1, "vacuous": 1}
    # of ten solutions to each of the five tasks every wrong one comes once; all ten to `unsolved` are wrong
    assert manifest["drops"]["solutions"] == {
        "nothing": 5,
        "no-tag": 5,
        "syntax": 5,
        "no-function": 5,
        "died": 5,
        "cut-off": 5,
        "assertion": 10,
    }
    assert manifest["solutions"] == {"pass": 20, "fail": 40}
    kept = list(read_triplets(folder))
    assert {triplet.entry_point for triplet in kept} == set(TASKS)
    for triplet in kept:
        assert triplet.shown_test in triplet.tests.splitlines()
        assert triplet.solution == f"def {triplet.entry_point}(n):\n    return {TASKS[triplet.entry_point]}\n"
        verdicts = triplet.provenance["verdicts"]
        first = next(n for n, verdict in enumerate(verdicts) if verdict.startswith("pass"))
        assert (len(verdicts), triplet.provenance["solution"]["sample"]) == (10, first)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert Counter(record["ended"] for record in records) == {
        "kept": 5,
        "tests: no-tag": 1,
        "tests: vacuous": 1,
        "solutions: assertion": 1,
    }


@needs_isolation
def test_kept_triplets_pass_again_and_a_constant_passes_none(recipe: Recipe, script: Counter[str], capsys: Any) -> None:
    folder = self_instruct(recipe)
    assert replay(recipe, "all", regenerate=True)
    said = capsys.readouterr().out
    assert "replayed: 5 of 5 triplets came out as they were" in said
    assert "completions have the same tokens" in said
    for triplet in read_triplets(folder):
        assert run_program(triplet.solution, triplet.tests, entry_point=triplet.entry_point).passed
        for constant in ("None", "0", "True", "[]", "4"):
            stub = f"def {triplet.entry_point}(*arguments):\n    return {constant}\n"
            assert not run_program(stub, triplet.tests, entry_point=triplet.entry_point).passed
    with pytest.raises(ValueError, match="no triplet has the id 'nobody'"):
        replay(recipe, "nobody", regenerate=False)


@needs_isolation
def test_a_replay_sees_what_was_changed(recipe: Recipe, script: Counter[str], capsys: Any) -> None:
    folder = self_instruct(recipe)
    path = folder / "triplets.jsonl"
    path.write_text(path.read_text().replace("return 2 * n", "return 2 + n"), encoding="utf-8")
    assert not replay(recipe, "all", regenerate=False)
    assert "the solution is another" in capsys.readouterr().out


@needs_isolation
def test_lanes_of_their_own_commands_make_the_same_triplets(recipe: Recipe, script: Counter[str], tmp_path: Path) -> None:
    whole = (self_instruct(recipe) / "triplets.jsonl").read_bytes()
    other = load_recipe(make_recipe(tmp_path / "other"))
    for name in ("questions", "unique", "tests", "suites", "solutions", "verdicts", "triplets"):
        for lane in (1, 0) if name not in ("unique", "triplets") else (None,):
            module.do_pass(open_run(other), name, None if lane is None else [lane])
    assert (other.run_dir / "triplets" / "triplets.jsonl").read_bytes() == whole


@needs_isolation
@pytest.mark.parametrize("after", [1, 9, 21])
def test_interrupted_anywhere_it_goes_on_to_the_same(
    after: int, recipe: Recipe, tmp_path: Path, script: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th write to the disk fails, as if the process had been killed there."""
    reference = load_recipe(make_recipe(tmp_path / "reference"))
    whole = (self_instruct(reference) / "triplets.jsonl").read_bytes()
    once = Counter(script)
    script.clear()
    count = [0]
    sync = os.fsync

    def failing(descriptor: int) -> None:
        count[0] += 1
        if count[0] == after:
            raise KeyboardInterrupt
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(KeyboardInterrupt):
        self_instruct(recipe)
    monkeypatch.setattr(os, "fsync", sync)
    asking.close_engine()
    folder = self_instruct(recipe)
    assert (folder / "triplets.jsonl").read_bytes() == whole
    again = script - once
    assert sum(again.values()) <= 3, "more than one group was asked again"


@needs_isolation
def test_a_finished_run_is_not_done_again_and_another_is_refused(
    recipe: Recipe, tmp_path: Path, script: Counter[str]
) -> None:
    folder = self_instruct(recipe)
    script.clear()
    work = open_run(recipe).work
    assert not work.exists(), "the finished folder has all of it"
    (work / "tests").mkdir(parents=True)  # a session that was killed between its last two steps
    assert self_instruct(recipe) == folder
    assert not script and not work.exists()
    (tmp_path / "tests.txt").write_text("=== user\nOther words: %%%question%%%", encoding="utf-8")
    with pytest.raises(ValueError, match="triplets of other settings, prompts or topics"):
        self_instruct(recipe)


def test_without_isolation_no_model_is_asked(recipe: Recipe, script: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "probe", lambda tier: f"{tier} is forbidden here")
    monkeypatch.setattr(sandbox, "_shared", None)
    monkeypatch.delenv(sandbox.SETTING, raising=False)
    with pytest.raises(sandbox.SandboxUnavailable, match="no isolation works here"):
        self_instruct(recipe)
    assert not script and not recipe.run_dir.exists()


@needs_isolation
def test_unfinished_work_of_other_settings_is_refused(recipe: Recipe, tmp_path: Path, script: Counter[str]) -> None:
    module.do_pass(open_run(recipe), "questions", None)
    (tmp_path / "tests.txt").write_text("=== user\nOther words: %%%question%%%", encoding="utf-8")
    with pytest.raises(ValueError, match="unfinished work of other settings"):
        self_instruct(recipe)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_items_of_a_list_are_questions() -> None:
    text = " Write a function a(x) that gives x.\n\n3) **Write a function b(x)\nthat gives y.**\nSome prose.\n\nBye!\n4. Wri"
    items = parse_questions("1. One.\n2.", text, stopped=False)
    assert items[:2] == ["Write a function a(x) that gives x.", "Write a function b(x) that gives y. Some prose."]
    assert isinstance(items[2], Refused) and items[2].reason == "cut-off"
    assert parse_questions("1. One.\n2.", "", stopped=True) == []
    assert parse_questions("1. One.\n2.", " x", stopped=True) == [Refused("too-short", "x")]
    assert parse_questions("", "No list at all.", stopped=True) == []


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("Short.", "too-short"),
        ("word " * 200, "too-long"),
        ("Write a function that gives <|im_end|> for x.", "control-text"),
        ("Write a function that gives \x07 for every x.", "control-text"),
        ("ha ha ha ha ha ha ha ha ha ha", "no-words"),
    ],
)
def test_items_that_are_no_questions(item: str, reason: str) -> None:
    found = checked_question(item)
    assert isinstance(found, Refused)
    assert found.reason == reason


def test_the_topic_plan_meets_every_pair_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = make_recipe(tmp_path)
    (tmp_path / "topics.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    run: Run = open_run(load_recipe(path, ["self_instruct.difficulties=[easy, medium, hard]"]))
    cells = [topic_cell(run, number) for number in range(12)]
    assert len(set(cells)) == 12
    assert {topic for topic, _ in cells[:4]} == {"a", "b", "c", "d"}
    assert [topic for topic, _ in cells[:4]] != [topic for topic, _ in cells[4:8]] or cells[:4] != cells[4:8]


def test_near_duplicates_are_dropped_on_demand() -> None:
    first = "Write a function that returns the sum of all even numbers of a list."
    near = "Write a function that returns the sum of all odd numbers of a list."
    off, on = NearDuplicates(None), NearDuplicates(0.5)
    assert [off.is_near(text) for text in (first, first)] == [False, False]
    # 12 triples each; "even" and "odd" stand in three of them: 9 / (12 + 12 - 9) = 0.6
    assert [on.is_near(text) for text in (first, near, "Write a function that reverses a string.")] == [False, True, False]
    strict = NearDuplicates(0.61)
    assert [strict.is_near(text) for text in (first, near)] == [False, False]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[PYTHON]\ndef f(x):\n    return x\n[/PYTHON]", "def f(x):\n    return x\n"),
        ("[PYTHON]\n```python\nimport math\nf = math.sqrt\n```\n[/PYTHON]", "import math\nf = math.sqrt\n"),
        ("[PYTHON]\ndef g(x):\n    return x\n[/PYTHON]", "no-function"),
        ("[PYTHON]\ndef f(x) return x\n[/PYTHON]", "syntax"),
        ("def f(x):\n    return x\n", "no-tag"),
        ("", "nothing"),
    ],
)
def test_solutions_are_taken_out_of_answers(text: str, found: str) -> None:
    solution = parse_solution(text, "f", stopped=True)
    assert (solution.reason if isinstance(solution, Refused) else solution) == found


def test_benchmarks_that_are_required_must_be_there(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, benchmarks=["mbpp"], require_benchmarks=True)
    with pytest.raises(ValueError, match="mbpp cannot be read, and `require_benchmarks` is on"):
        open_contamination(load_recipe(path).need_self_instruct())


def test_a_model_of_ours_that_is_missing_is_named(tmp_path: Path) -> None:
    recipe = load_recipe(make_recipe(tmp_path))
    ask = recipe.need_self_instruct().tests
    missing = dataclasses.replace(ask, engine=EngineSettings(model="runs/smollm2-135m/base/model"))
    with pytest.raises(ValueError, match="make base SIZE=smollm2-135m"):
        asking.resolved_engine(recipe, missing)
    unpinned = dataclasses.replace(ask, engine=EngineSettings(model="a/b", revision="unpinned"))
    with pytest.raises(ValueError, match="revision: unpinned"):
        asking.resolved_engine(recipe, unpinned)


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 questions, but `self_instruct.shown_questions` is 3"):
        open_run(load_recipe(make_recipe(tmp_path, shown_questions=3)))
    (tmp_path / "topics.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="nothing in it"):
        open_run(load_recipe(tmp_path / "recipe.yaml", ["self_instruct.shown_questions=1"]))


# ---------------------------------------------------------------------------------------------------------------------
# Through a real model


@needs_isolation
@pytest.mark.slow
def test_two_workers_make_what_one_makes(tiny_parent: Path, tmp_path: Path) -> None:
    """A real model with random weights: its questions are noise, but they are the same noise."""
    engine = {"model": str(tiny_parent), "batch_rows": 2, "group_requests": 2}
    made = []
    for workers in (1, 2):
        path = make_recipe(tmp_path / str(workers), question_prompts=4)
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        for step in ("questions", "tests", "solutions"):
            tree["self_instruct"][step] |= {"engine": engine, "format": "plain", "samples": 1, "max_new_tokens": 24}
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        folder = self_instruct(load_recipe(path), workers)
        made.append([(folder / name).read_bytes() for name in ("triplets.jsonl", "questions.json")])
    assert made[0] == made[1]
    assert json.loads(made[0][1])["asked"] > 0
