"""Filling in the middle: HumanEval infilling, judged by tests; single lines in three languages and docstrings, by
comparison.

What comes in: problems with a prefix and a suffix. What goes out: tasks whose prompts are ids in the training layouts,
PSM or SPM (`codetune.tokens`), ended by the end-of-infill token.

HumanEval's middles are whole lines, newline included. An answer that ended by itself is taken as it is; one that did not is
cut, in the single-line task, behind its first line that is not blank. Beside the score stands the floor: how many
problems pass with nothing in the hole (27 of 1,033 single lines). A checkpoint whose infilling tokens were never trained
is refused.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from codetune.problems import DocstringProblem, InfillProblem, LineProblem
from codetune.sandbox import Job
from eval.functions import before_function
from eval.tasks import Asker, Cut, Grade, Question, Reason, Run, Task, TaskRefused
from eval.text_scores import exact_match, first_line, smoothed_bleu

HOLE = "<hole>"  # for people; no model sees it
BRACES = frozenset(")}];, ")


class Infilling(Task):
    """Base of the tasks with a hole."""

    forms = ("psm", "spm")

    def questions(self, asker: Asker) -> list[Question]:
        if not asker.stored:
            if asker.need_codec().infill is None:
                raise TaskRefused("the checkpoint's vocabulary has no infilling tokens")
            if asker.infill_trained is False:
                raise TaskRefused(
                    "the checkpoint's infilling tokens were never trained (no infilled document was in its training, or "
                    "their embeddings are as they were added); evaluate stage1 or a model after it"
                )
            self.trained = asker.infill_trained
        return super().questions(asker)

    def notes(self) -> dict[str, Any]:
        unknown = getattr(self, "trained", True) is None
        return {"infill tokens": "not known whether they were trained"} if unknown else {}

    def stop_ids(self, asker: Asker) -> tuple[int, ...]:
        return (asker.need_codec().need_infill().end,)

    def ask(self, problem: Any, prefix: str, suffix: str, asker: Asker) -> Question:
        text = f"{prefix}{HOLE}{suffix}"
        if asker.stored:
            return Question(problem.id, text, problem)
        codec = asker.need_codec()
        ids = codec.psm_prompt(prefix, suffix) if self.form == "psm" else codec.spm_prompt(prefix, suffix)
        return Question(problem.id, text, problem, tuple(ids))


class HumanEvalInfilling(Infilling):
    """A hole in one of HumanEval's functions."""

    def question(self, problem: InfillProblem, asker: Asker) -> Question:
        return self.ask(problem, problem.prefix, problem.suffix, asker)

    def cut(self, question: Question, text: str, ended: str) -> Cut:
        problem = question.problem
        assert isinstance(problem, InfillProblem)
        if ended in ("stop_id", "eos", "given"):
            return Cut(text)  # an empty middle is an answer, too
        if problem.span == "single-line":
            return Cut(up_to_line_end(text), notes=("cut-at-line-end",))
        return Cut(text, notes=("not-ended",))

    def grade(self, question: Question, cut: Cut, run: Run) -> Grade:
        problem = question.problem
        assert isinstance(problem, InfillProblem)
        program = cut.text if cut.whole_program else problem.prefix + cut.text + problem.suffix
        tests = f"{problem.tests}\ncheck({problem.entry_point})"
        # Three tests call a helper of HumanEval's prompt; theirs is the published one, whatever was written into the hole.
        helpers = before_function(problem.prefix + problem.reference + problem.suffix, problem.entry_point or "")
        judge = self.settings.judge
        return Grade.of_result(
            run(Job(program, tests, problem.entry_point, prompt=helpers, judge=judge, limits=self.limits()))
        )

    def reference(self, problem: InfillProblem) -> Cut:
        return Cut(problem.reference)

    def floor(self, problem: InfillProblem) -> Cut:
        return Cut("")


def up_to_line_end(text: str) -> str:
    r"""Text up to and with the end of its first line that is not blank; the line end is added where there is none.

    Example: "\n  a\nb" -> "\n  a\n"
    """
    kept = []
    for line in re.split(r"(?<=\n)", text):  # never `splitlines`, which cuts at form feeds and other characters inside lines
        kept.append(line)
        if line.strip():
            break
    joined = "".join(kept)
    return joined if joined.endswith("\n") else f"{joined}\n"


class LineInfilling(Infilling):
    """One line taken out of a MultiPL-E solution, in Python, Java and JavaScript; exact match (Allal et al.; Table 6)."""

    program = False
    unasked = "nothing"

    def question(self, problem: InfillProblem, asker: Asker) -> Question:
        return self.ask(problem, problem.prefix, problem.suffix, asker)

    def cut(self, question: Question, text: str, ended: str) -> Cut:
        return Cut(first_line(text))

    def grade(self, question: Question, cut: Cut, run: Run) -> Grade:
        problem = question.problem
        assert isinstance(problem, InfillProblem)
        same = float(cut.text.strip() == problem.reference.strip())
        figures = {"exact_match": same, f"exact_match/{problem.language}": same}
        if not set(problem.reference.strip()) <= BRACES:  # a third of the Java lines are a brace
            figures |= {"exact_match_without_braces": same, f"exact_match_without_braces/{problem.language}": same}
        return Grade(None, Reason.COMPARED, figures)


class Docstring(Infilling):
    """The docstring of a Python function, by its first line (CodeXGLUE; Table 13)."""

    program = False
    unasked = "nothing"

    def question(self, problem: DocstringProblem, asker: Asker) -> Question:
        # The opening quotes and one space are the prefix's, and there are no closing ones (Appendix E).
        return self.ask(problem, f'{problem.header}""" ', problem.body, asker)

    def cut(self, question: Question, text: str, ended: str) -> Cut:
        return Cut(first_line(text).strip())

    def grade(self, question: Question, cut: Cut, run: Run) -> Grade:
        problem = question.problem
        assert isinstance(problem, DocstringProblem)
        return Grade(None, Reason.COMPARED, {"bleu": smoothed_bleu(cut.text, clean_docstring(problem.reference))})


def clean_docstring(text: str) -> str:
    """The reference as it is scored: on one line, without the r of a raw string."""
    text = " ".join(text.split())
    return text.removeprefix('r"""').strip('" ')


def length_bin(problem: LineProblem) -> int:
    """Example: contexts of 4,096 to 8,191 characters -> 12"""
    return max(len(problem.context), 1).bit_length() - 1


def balanced(problems: Sequence[LineProblem], total: int, seed: int) -> list[LineProblem]:
    """So many problems, as many from each bin of lengths as can be: small bins give all that they have, in the file's order.

    Example: bins of 2, 10 and 100 problems, 30 wanted -> 2, 10 and 18
    """
    bins: dict[int, list[LineProblem]] = {}
    for problem in problems:
        bins.setdefault(length_bin(problem), []).append(problem)
    taken: set[str] = set()
    left = total
    for place, name in enumerate(sorted(bins, key=lambda name: (len(bins[name]), name))):
        share = left // (len(bins) - place)  # of what is left, for this bin and those behind it, which have as many or more
        found = bins[name]
        chosen = found if len(found) <= share else random.Random(f"{seed} {name}").sample(found, share)
        taken |= {one.id for one in chosen}
        left -= len(chosen)
    return [problem for problem in problems if problem.id in taken]


class Lines(Task):
    """The line that follows a long context (LCC; Table 7): exact match, BLEU and edit similarity.

    `lengths: [4000]` keeps so many tokens right before the line, as for models without long-context training; none keeps
    all. `balanced: 548` takes so many problems, spread over lengths of context as evenly as there are problems (the paper's
    LCC-balanced, whose recipe is not printed): bins are doublings of the context's characters.
    """

    program = False
    unasked = "nothing"

    def select(self, problems: list[Any]) -> list[Any]:
        if self.settings.balanced is not None and not self.settings.ids:
            problems = balanced(problems, self.settings.balanced, self.settings.seed)
        return super().select(problems)

    def notes(self) -> dict[str, Any]:
        lengths = Counter(length_bin(problem) for problem in self.problems)
        return {"problems by characters of context, from": {str(2**one): lengths[one] for one in sorted(lengths)}}

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        if len(self.settings.lengths) > 1:
            raise ValueError(f"tasks.{self.name}.lengths: one number of tokens to keep before the line, or none for all")
        self.kept = self.settings.lengths[0] if self.settings.lengths else None
        self.form = "" if self.kept is None else f"last {self.kept}"

    def question(self, problem: Any, asker: Asker) -> Question:
        # The line begins on its own; where a copy of the data ends without the line end, it is put there.
        text = problem.context if problem.context.endswith("\n") else f"{problem.context}\n"
        if self.kept is None or asker.stored:
            return Question(problem.id, text, problem)
        codec = asker.need_codec()
        ids: Sequence[int] = codec.encode(text)
        if len(ids) > self.kept:
            return Question(problem.id, text, problem, tuple(codec.plain(ids[-self.kept :], last=False)))
        return Question(problem.id, text, problem, tuple(codec.plain(ids, last=False)))

    def cut(self, question: Question, text: str, ended: str) -> Cut:
        return Cut(first_line(text).strip())

    def grade(self, question: Question, cut: Cut, run: Run) -> Grade:
        from eval.text_scores import edit_similarity

        reference = question.problem.reference.strip()  # pyright: ignore[reportAttributeAccessIssue]
        figures = {"exact_match": exact_match(cut.text, reference), "bleu": smoothed_bleu(cut.text, reference)}
        return Grade(None, Reason.COMPARED, {**figures, "edit_similarity": edit_similarity(cut.text, reference)})
