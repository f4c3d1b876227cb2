"""Tasks that neither the base model's text nor any expert's training had, near what they had.

Chosen by the base model's accuracy alone: of five new words for each skill the one that it answers
best, one item more for each skill, both only where it answers 10 % or more; and counting, which has
no expert. Nothing was left of reversing: the base answers 0 % of it in new words or other lengths.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from t2runtime.tasks import EXACT, SKILLS, Generated, Problem, Source, Split, Task
from t2runtime.tasks.ordering import NAMES


@dataclass(frozen=True)
class Variant:
    """A task that differs from a generated one in its words or its data, as a source."""

    name: str
    task: Task
    max_new_tokens: int = 8

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        """Problems of one split; see `tasks.problems`."""
        return self.task.problems(count, split, seed)

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """One verdict a problem."""
        return EXACT.grade(problems, completions)


def _six_digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(6))


def _four_names(rng: random.Random) -> str:
    return " ".join(rng.sample(NAMES, 4))


def _variant(
    name: str,
    skill: str,
    words: Sequence[str] = (),
    draw: Callable[[random.Random], str] | None = None,
) -> Variant:
    plain = SKILLS[skill]
    phrasings = tuple(word + " " for word in words) or plain.phrasings
    return Variant(name, Task(skill, phrasings, draw or plain.draw, plain.right))


#: By name; the category of a problem is the skill that it is near to.
UNSEEN: dict[str, Source] = {
    source.name: source
    for source in (
        _variant("add, new word", "add", ["sums"]),
        _variant("max, new word", "max", ["peaks"]),
        _variant("order, new word", "order", ["whos"]),
        _variant("max of six", "max", draw=_six_digits),
        _variant("order of four", "order", draw=_four_names),
        Generated("count"),
    )
}
