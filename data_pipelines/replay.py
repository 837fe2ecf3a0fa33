"""Kept triplets, made again from their records: `python -m data_pipelines.self_instruct --recipe ... --replay all`.

What comes in: a finished folder of triplets. What goes out: a line per triplet and whether all were made again. Anywhere:
question, tests and solution are taken out of the stored completions once more, and stubs and solution run once more. With
`regenerate`, the groups of completions that they came from are asked for again and compared token by token: equal on the
same machine, in fp32 with transformers on a CPU; elsewhere the last bits of the logits may differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from codetune.completions import make_plan
from codetune.generate import Completion, read_completions
from codetune.recipe import Recipe
from codetune.sandbox import run_program
from data_pipelines.asking import close_engine, engine_of, lane_prompts, one_thread, resolved_engine
from data_pipelines.prompt_files import filled
from data_pipelines.questions import parse_questions, question_values
from data_pipelines.self_instruct_run import Run, open_run
from data_pipelines.suites import Refused, Suite, parse_suite
from data_pipelines.triplets import Triplet, read_triplets
from data_pipelines.verdicts import limits_of, parse_solution, shown_test, try_stubs

STEPS = {"question": "questions", "tests": "tests", "solution": "solutions"}


def replay(recipe: Recipe, which: str, *, regenerate: bool) -> bool:
    """Make one triplet again, or all; whether each came out as it was.

    Raises:
        ValueError: no triplets there, none of this id, or they were made by another recipe than this one.
    """
    run = open_run(recipe)
    if not run.is_finished():
        raise ValueError(f"{run.target}: no triplets to replay; make them first")
    chosen = [triplet for triplet in read_triplets(run.target) if which in ("all", triplet.id)]
    if not chosen and which != "all":
        raise ValueError(f"{run.target}: no triplet has the id {which!r}")
    answers = stored_answers(run, chosen)
    right = 0
    for triplet in chosen:
        problems = differences(run, triplet, answers)
        print(f"{triplet.id}: {'; '.join(problems) or 'parsed and run again, the same'}", flush=True)
        right += not problems
    print(f"replayed: {right} of {len(chosen)} triplets came out as they were")
    same = regenerate_groups(run, chosen, answers) if regenerate else True
    return right == len(chosen) and same


Answers = dict[tuple[str, int, str, int], Completion]  # pass, lane, prompt, sample


def stored_answers(run: Run, triplets: Sequence[Triplet]) -> Answers:
    """The completions that the triplets were made of, and those of their groups."""
    wanted = {(name, triplet.provenance[step]["lane"]) for triplet in triplets for step, name in STEPS.items()}
    found: Answers = {}
    for name, lane in sorted(wanted):
        for answer in read_completions(completions_file(run, name, lane)):
            found[name, lane, answer.prompt_id, answer.sample] = answer
    return found


def completions_file(run: Run, name: str, lane: int) -> Path:
    return run.target / "completions" / name / f"lane-{lane:05d}.jsonl"


def differences(run: Run, triplet: Triplet, answers: Answers) -> list[str]:
    """What comes out otherwise when a triplet is parsed and run again."""
    steps = {
        step: answers[
            name, triplet.provenance[step]["lane"], triplet.provenance[step]["prompt"], triplet.provenance[step]["sample"]
        ]
        for step, name in STEPS.items()
    }
    problems = [
        f"{step}: another {key}"
        for step, answer in steps.items()
        for key in ("seed", "prompt_hash")
        if getattr(answer, key) != triplet.provenance[step][key]
    ]
    number = int(steps["question"].prompt_id.rpartition("/")[2])
    open_text = filled(run.prompts["questions"].open_text, question_values(run, number))
    items = parse_questions(open_text, steps["question"].text, stopped=steps["question"].stopped)
    if items[triplet.provenance["question"]["item"]] != triplet.question:
        problems.append("the question is another")
    text = run.prompts["tests"].open_text + steps["tests"].text
    suite = parse_suite(text, triplet.question, stopped=steps["tests"].stopped, minimum_asserts=run.settings.minimum_asserts)
    if not isinstance(suite, Suite) or suite.text != triplet.tests:
        return [*problems, "the tests are others"]
    if shown_test(run, triplet.id, suite) != triplet.shown_test:
        problems.append("another test was shown")
    text = run.prompts["solutions"].open_text + steps["solution"].text
    solution = parse_solution(text, suite.entry_point, stopped=steps["solution"].stopped)
    if isinstance(solution, Refused) or solution != triplet.solution:
        return [*problems, "the solution is another"]
    result = run_program(solution, suite.text, entry_point=suite.entry_point, limits=limits_of(run.settings))
    if not result.passed:
        problems.append(f"the solution does not pass: {result.reason} {result.detail}")
    refused, _ = try_stubs({triplet.id: suite}, run.settings)[triplet.id]
    return [*problems, f"the tests: {refused.reason} {refused.detail}"] if refused else problems


def regenerate_groups(run: Run, triplets: Sequence[Triplet], answers: Answers) -> bool:
    """Ask for the triplets' groups again; whether every completion has the same tokens."""
    wanted = sorted(
        {(name, t.provenance[step]["lane"], t.provenance[step]["group"]) for t in triplets for step, name in STEPS.items()}
    )
    same = total = 0
    for name in STEPS.values():
        ask = run.ask(name)
        groups = [(lane, group) for other, lane, group in wanted if other == name]
        if not groups:
            continue
        with one_thread(ask.engine):
            engine = engine_of(resolved_engine(run.recipe, ask))
            for lane in sorted({lane for lane, _ in groups}):
                prompts, _ = lane_prompts(run, name, lane, engine)
                plan = make_plan(
                    prompts,
                    run.sampling(name),
                    codec=engine.codec,
                    context_tokens=engine.context_tokens,
                    group_requests=engine.group_requests,
                    engine=engine.describe(),
                )
                todo = [(group, plan.groups[group]) for of, group in groups if of == lane]
                for _, completions in engine.run(todo, run.sampling(name)):
                    for new in completions:
                        old = answers[name, lane, new.prompt_id, new.sample]
                        total += 1
                        same += (new.token_ids, new.text, new.seed) == (old.token_ids, old.text, old.seed)
    close_engine()
    print(f"regenerated: {same} of {total} completions have the same tokens")
    return same == total
