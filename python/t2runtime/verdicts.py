"""Verdicts of a grader, checked; whatever goes wrong there is said with the problem.

A verdict is True, False, or a finite number, which is then the reward itself; right is what is
above 0. Scalars of numpy and torch without dimensions are taken for what they hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from t2runtime.tasks import Grader, Problem


def verdicts_of(
    grader: Grader, problems: Sequence[Problem], completions: Sequence[str]
) -> list[bool | float]:
    """One verdict per completion. Raises RuntimeError where the grader raises, ValueError where it
    gives something else; both name the task, and the prompt and completion where one is to blame.
    """
    verdicts = _graded(grader, problems, completions)
    if len(verdicts) != len(completions):
        raise ValueError(
            f"{_task(grader)} must grade {len(completions)} completions, "
            f"it gave {len(verdicts)} verdicts"
        )
    checked: list[bool | float] = []
    for verdict, problem, text in zip(verdicts, problems, completions, strict=True):
        value = _plain(verdict)
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            raise ValueError(
                f"{_task(grader)} must grade with True, False or a finite number, "
                f"got {verdict!r:.80} for {_named(problem, text)}"
            )
        checked.append(value if isinstance(value, bool) else float(value))
    return checked


def is_right(verdict: bool | float) -> bool:
    """A reward of 0 or less is that of a wrong answer."""
    return verdict > 0


def _plain(verdict: Any) -> Any:
    """What a scalar of numpy or torch holds; anything else as it is."""
    if getattr(verdict, "shape", None) == () and hasattr(verdict, "item"):
        return verdict.item()
    return verdict


def _graded(grader: Grader, problems: Sequence[Problem], completions: Sequence[str]) -> list[Any]:
    try:
        verdicts = grader.grade(problems, completions)
    except Exception as error:
        for problem, text in zip(problems, completions, strict=True):
            try:
                grader.grade([problem], [text])
            except Exception as alone:
                raise RuntimeError(
                    f"the reward of {_task(grader)} raised {type(alone).__name__}: {alone}; "
                    f"at {_named(problem, text)}"
                ) from alone
        raise RuntimeError(
            f"the reward of {_task(grader)} raised {type(error).__name__}: {error}; on "
            f"{len(completions)} completions together, on none of them alone"
        ) from error
    # A tensor or array of one dimension gives its scalars.
    if isinstance(verdicts, (str, bytes)) or not hasattr(verdicts, "__len__"):
        raise ValueError(
            f"{_task(grader)} must grade with a list, one verdict per completion, "
            f"got {verdicts!r:.80}"
        )
    return list(verdicts)


def _task(grader: Grader) -> str:
    name = getattr(grader, "name", None)
    return f"grader {type(grader).__name__}" if name is None else f"task {name!r}"


def _named(problem: Problem, text: str) -> str:
    return f"prompt {_short(problem.prompt)}, completion {_short(text)}"


def _short(text: str, most: int = 120) -> str:
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"
