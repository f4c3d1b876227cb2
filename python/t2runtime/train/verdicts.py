"""From a source's verdicts to rewards; whatever goes wrong there is said with the problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from t2runtime.rewards import reward_of
from t2runtime.tasks import Problem, Source


def rewards_of(
    source: Source, problems: Sequence[Problem], completions: Sequence[str], wrong: float
) -> Tensor:
    """Rewards (rows,) of completions: 1 for True, `wrong` for False; a plain number is a reward
    by itself.
    """
    verdicts = _graded(source, problems, completions)
    if len(verdicts) != len(completions):
        raise ValueError(
            f"task {source.name!r} must grade {len(completions)} completions, "
            f"it gave {len(verdicts)} verdicts"
        )
    rewards = []
    for verdict, problem, text in zip(verdicts, problems, completions, strict=True):
        reward = reward_of(verdict, wrong) if isinstance(verdict, bool) else verdict
        if not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise ValueError(
                f"task {source.name!r} must grade with True, False or a finite number, "
                f"got {verdict!r} for {_named(problem, text)}"
            )
        rewards.append(float(reward))
    return torch.tensor(rewards)


def _graded(source: Source, problems: Sequence[Problem], completions: Sequence[str]) -> list[Any]:
    try:
        return list(source.grade(problems, completions))
    except Exception as error:
        for problem, text in zip(problems, completions, strict=True):
            try:
                source.grade([problem], [text])
            except Exception as alone:
                raise RuntimeError(
                    f"the reward of task {source.name!r} raised {type(alone).__name__}: {alone}; "
                    f"at {_named(problem, text)}"
                ) from alone
        raise RuntimeError(
            f"the reward of task {source.name!r} raised {type(error).__name__}: {error}; on "
            f"{len(completions)} completions together, on none of them alone"
        ) from error


def _named(problem: Problem, text: str) -> str:
    return f"prompt {_short(problem.prompt)}, completion {_short(text)}"


def _short(text: str, most: int = 120) -> str:
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"
