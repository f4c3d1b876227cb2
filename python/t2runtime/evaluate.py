"""Greedy accuracy with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from t2runtime.generation import complete
from t2runtime.tasks import Grader, Problem
from t2runtime.verdicts import is_right, verdicts_of


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; unlike the plain one it stays sensible near 0 and 1.

    >>> [round(bound, 3) for bound in wilson(8, 10)]
    [0.49, 0.943]
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"wilson: need 0 <= right <= total and total >= 1, got {right} of {total}")
    share = right / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Score:
    """Right answers of a number of problems."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson(self.right, self.total)

    def gains_over(self, base: Score, points: float = 15.0) -> bool:
        """At least `points` percentage points better, and the two intervals do not touch."""
        apart = self.interval[0] > base.interval[1]
        return apart and 100 * (self.accuracy - base.accuracy) >= points

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.accuracy:5.1f} % [{100 * low:5.1f}, {100 * high:5.1f}]"


def facts(score: Score) -> dict[str, Any]:
    """A score as JSON takes it."""
    return {"accuracy": score.accuracy, "interval": score.interval, "of": score.total}


def evaluate(
    model: Any,
    tokenizer: Any,
    grader: Grader,
    problems: Sequence[Problem],
    max_new_tokens: int,
    *,
    rows: int = 256,
    temperature: float = 0.0,
    chat: str = "auto",
    label: str | None = None,
) -> Score:
    """Accuracy, greedy or of samples at a temperature, under whatever weights or mixture are in
    force around the call; `grader` is usually the source of the problems. With a `label` a progress
    bar shows it, on a terminal.
    """
    right = 0
    # disable=None: no bar where stderr is not a terminal.
    bar = tqdm(total=len(problems), desc=label, unit="problem", leave=False,
               disable=True if label is None else None)  # fmt: skip
    with bar:
        for start in range(0, len(problems), rows):
            part = problems[start : start + rows]
            prompts = [problem.prompt for problem in part]
            texts = complete(
                model, tokenizer, prompts, max_new_tokens, temperature=temperature, chat=chat
            ).texts
            right += sum(map(is_right, verdicts_of(grader, part, texts)))
            bar.update(len(part))
    return Score(right, len(problems))
