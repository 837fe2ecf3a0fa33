"""Reference solutions and empty middles through the whole of `eval.run`, against the counts that were published for them.

What comes in: HumanEval from its wheel, with the single-line holes made of it; the files of MBPP and of random-span-light
from the folder that CODETUNE_TEST_DATA names, left out where it is not set. Reference: the numbers of problems, all of
which must pass, and 27 and 0 empty middles.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from codetune.problems import DataMissing, load_problems
from eval import registry
from eval.grading import check_references
from eval.run import Sandboxes
from eval.tasks import Asker, TaskSettings

MINUTES = 8
TASKS: dict[str, tuple[TaskSettings, int, int | None]] = {  # settings, references that must pass, empty middles that do
    "humaneval": (TaskSettings("humaneval"), 164, None),
    "mbpp, test split": (TaskSettings("mbpp"), 500, None),
    "mbpp, all": (TaskSettings("mbpp"), 974, None),
    "mbpp sanitized, all": (TaskSettings("mbpp-sanitized", form="zero-shot"), 427, None),
    "single line": (TaskSettings("humaneval-infilling-single-line"), 1033, 27),
    "random span, light": (TaskSettings("humaneval-infilling-random-span-light"), 164, 0),
}


def main() -> None:
    data = os.environ.get("CODETUNE_TEST_DATA")
    figures: dict[str, Any] = {}
    with Sandboxes() as sandboxes, tempfile.TemporaryDirectory() as folder:
        for name, (settings, wanted, wanted_floor) in TASKS.items():
            try:
                loaded = load_problems(settings.benchmark, data, hub=False)
            except DataMissing:
                print(f"{name}: left out, CODETUNE_TEST_DATA names no folder with it")
                continue
            kind = registry.find(settings.benchmark)
            assert kind.task is not None
            if name.endswith("all"):
                settings = TaskSettings(settings.benchmark, form=settings.form, ids=tuple(one.id for one in loaded.problems))
            task = kind.task("task", settings, loaded)
            facts = check_references(task, task.questions(Asker(stored=True)), sandboxes.open, Path(folder))
            floor = facts.get("floor", {}).get("passed")
            beside = "" if floor is None else f"; empty middles {floor} (published {wanted_floor})"
            print(f"{name}: {facts['references']} of {wanted} pass, judged {facts['judges']}{beside}")
            figures[name] = {"passed": facts["references"], "published": wanted, "judges": facts["judges"], "floor": floor}
            assert facts["references"] == wanted and floor == wanted_floor and not facts["failed"]
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
