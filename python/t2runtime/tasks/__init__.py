"""Tasks: generated ones for the small model, and questions from a JSON-lines file for any other
model.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from t2runtime.tasks import addition, category, counting, maximum, ordering, other, reversal
from t2runtime.tasks.base import (
    EXACT,
    SPLITS,
    ByAnswer,
    Grader,
    Problem,
    Source,
    Split,
    Task,
    draw_problems,
    split_of,
)

SKILLS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (addition, reversal, maximum, ordering, counting)
}
OTHER = other.TASK
#: Everything that pass 1 may name.
CATEGORIES: tuple[str, ...] = (*SKILLS, OTHER.name)


def problems(name: str, count: int, split: Split, seed: int = 0) -> list[Problem]:
    """`count` problems of a generated task ("category" and "other" included), the same for the
    same seed; held-out ones are distinct.
    """
    if name == category.NAME:
        rng = random.Random(f"{name}/{split}/{seed}")
        inner = [*SKILLS.values(), OTHER]
        return draw_problems(lambda: category.problem(inner, rng, split), count, split)
    known = {**SKILLS, OTHER.name: OTHER}
    if name not in known:
        names = [*known, category.NAME]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"task must be one of {', '.join(names)}, got {name!r}.{hint}")
    return known[name].problems(count, split, seed)


@dataclass(frozen=True)
class Generated:
    """A generated task as a source; `of` is the task where `name` is what somebody calls it.

    >>> add = Generated("add")
    >>> add.grade(add(1, "test", 0), ["no number"])
    [False]
    """

    name: str
    max_new_tokens: int = 8
    grader: Grader = EXACT
    of: str | None = None

    def __post_init__(self) -> None:
        problems(self.of or self.name, 1, "train")

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        """See `problems`."""
        return problems(self.of or self.name, count, split, seed)

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """One verdict a problem."""
        return self.grader.grade(problems, completions)


__all__ = [
    "CATEGORIES",
    "EXACT",
    "OTHER",
    "SKILLS",
    "SPLITS",
    "ByAnswer",
    "Generated",
    "Grader",
    "Problem",
    "Source",
    "Split",
    "Task",
    "category",
    "problems",
    "split_of",
]
