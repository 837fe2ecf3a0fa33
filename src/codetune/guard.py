"""What tells a step whose loss or gradient leaps from the others: the running median, and how far steps are from it.

What comes in: loss (nats per token) and gradient norm of each step, over all ranks. What goes out: for a step far above, a
record of what was found and what was usual. The measure is the median of the last `WINDOW` steps and the median distance
from it (times 1.4826, which makes it the standard deviation where figures are normal): a leap moves neither, and a larger
batch, whose losses scatter less, is judged more finely. All of it goes into checkpoints, so a resumed run judges alike.

What it does not do: judge the first `LEAST` steps, or a fall.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

WINDOW, LEAST = 128, 32  # steps that are looked back on; steps before anything is judged
NORMAL = 1.4826  # median distance of normal figures -> their standard deviation
FINEST = 0.01  # of the median: steps are not told apart more finely than this


class SpikeWatch:
    """Judges steps by those before them."""

    def __init__(self, deviations: float | None) -> None:
        """`deviations`: how many standard deviations above the median make a spike; none judges nothing."""
        self.deviations = deviations
        self.figures: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in ("loss", "gradient_norm")}

    def judge(self, **step: float) -> dict[str, float]:
        """What leaps, as `loss`, `loss_median` and so on; empty for a step like the others. A nan does not count.

        Example: losses 2.0 and 2.2 in turns (median 2.1, distance 0.1): 2.5 is 2.7 deviations above, 4.0 is 12.8
        """
        found: dict[str, float] = {}
        for name, value in step.items():
            past = self.figures[name]
            if self.deviations is None or len(past) < LEAST or not math.isfinite(value):
                continue
            usual = statistics.median(past)
            scatter = max(NORMAL * statistics.median(abs(other - usual) for other in past), FINEST * abs(usual))
            if value > usual + self.deviations * scatter:
                found |= {name: value, f"{name}_median": usual, f"{name}_deviations": (value - usual) / (scatter or 1e-30)}
        return found

    def remember(self, **step: float) -> None:
        """Add a step that was made."""
        for name, value in step.items():
            if math.isfinite(value):
                self.figures[name].append(value)

    def to_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self.figures.items()}

    def restore(self, saved: dict[str, Any]) -> None:
        for name, values in saved.items():
            self.figures[name] = deque(values, maxlen=WINDOW)
