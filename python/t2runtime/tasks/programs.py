"""Grading of answers that are programs: assembled, then run against the problem's tests in the
sandbox.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from t2runtime import rewards
from t2runtime.sandbox import Limits, run_all
from t2runtime.tasks.base import Problem


def as_written(problem: Problem, completion: str) -> str | None:
    """The program in the completion."""
    return rewards.code(completion, problem.answer or None)


@dataclass(frozen=True)
class ByTests:
    """Right is what passes all of `Problem.tests`; `Problem.answer` is the name to be defined.

    assemble makes the program of a completion (None: there is none, which is wrong). workers
    programs run at once; those whose turn has not come after total_seconds are wrong and said in
    the log. unsafe: see `t2runtime.sandbox`.
    """

    assemble: Callable[[Problem, str], str | None] = as_written
    limits: Limits = field(default_factory=Limits)
    workers: int | None = None
    total_seconds: float | None = 3600.0
    unsafe: bool = False

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """One verdict a problem; equal programs for equal tests are run once."""
        asked: dict[tuple[str, tuple[str, ...]], bool] = {}
        keys = []
        for problem, completion in zip(problems, completions, strict=True):
            program = self.assemble(problem, completion)
            keys.append(None if program is None else (program, problem.tests))
        asked = dict.fromkeys((key for key in keys if key is not None), False)
        verdicts = run_all(
            list(asked), self.limits, workers=self.workers,
            total_seconds=self.total_seconds, unsafe=self.unsafe,
        )  # fmt: skip
        for key, verdict in zip(asked, verdicts, strict=True):
            asked[key] = verdict.right
        return [key is not None and asked[key] for key in keys]
