"""pass@k as a metric of the `evaluate` library: isolated, offline, undefined for n < k.

What comes in: for each problem its tests and a list of candidate programs. What goes out: pass@k as a dictionary, and every
program's result. Nothing is downloaded, and no environment variable has to be set: programs run in codetune's sandbox,
their tests in another process.

    from eval.metric import PassAtK
    PassAtK().compute(references=["assert add(2, 3) == 5"], predictions=[["def add(a, b): return a + b"]], k=[1])

The library's own `code_eval` fetches its script from the Hub, runs candidates in its own process tree behind a guard that
does not isolate, and leaves out a k that some problem has too few samples for; here that k is None.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from codetune.sandbox import Job, Limits, run_programs
from eval.scores import pass_at_k_score
from eval.tasks import reason_of


class PassAtK(evaluate.Metric):
    """Unbiased pass@k over problems; `references` are tests, `predictions` lists of programs."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Unbiased pass@k of programs run in isolation, with a 95 % interval over problems.",
            citation="Chen et al. 2021, arXiv 2107.03374",
            inputs_description="predictions: for each problem a list of programs. references: for each problem its tests.",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("string")), "references": datasets.Value("string")}
            ),
        )

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *,
        predictions: Sequence[Sequence[str]],
        references: Sequence[str],
        k: Sequence[int] = (1, 10, 100),
        timeout_seconds: float = 3.0,
    ) -> dict[str, Any]:
        """pass@k for each k, its interval, and the results of each problem's programs.

        Raises:
            ValueError: a problem without programs.
        """
        if any(not programs for programs in predictions):
            raise ValueError("a problem has no program; give one, an empty text if that was the answer")
        limits = Limits(wall_seconds=timeout_seconds)
        pairs = [(place, program) for place, programs in enumerate(predictions) for program in programs]
        jobs = (Job(program, references[place], limits=limits) for place, program in pairs)
        results: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for (place, _), result in zip(pairs, run_programs(jobs), strict=True):
            results[place].append({"passed": result.passed, "reason": str(reason_of(result)), "detail": result.detail})
        counts = [(len(found), sum(row["passed"] for row in found)) for found in results.values()]
        made: dict[str, Any] = {"results": dict(results)}
        for one in k:
            score = pass_at_k_score(counts, one, "sampled")
            made[f"pass@{one}"] = None if score is None else score.value
            made[f"pass@{one}_interval"] = None if score is None else [score.low, score.high]
        return made
