"""Pass 1 as a task: naming the category of a question.

The base model's competing procedure looks at the data and not at the words before them: five
digits are always "reverse", bare letters always "other". So the base names some categories and
misses others, and a classification expert has something to gain.
"""

import random

from t2runtime.tasks.base import Problem, Split, Task

NAME = "category"
PREFIX = "kind? "


def prompt(question: str) -> str:
    """The pass-1 prompt of a question.

    >>> prompt("flip 48213=")
    'kind? flip 48213='
    """
    return PREFIX + question


def by_data(task: Task) -> str:
    """The category that the data alone suggest."""
    return {"max": "reverse", "count": "other"}.get(task.name, task.name)


def problem(tasks: list[Task], rng: random.Random, split: Split) -> Problem:
    """One question of one of the tasks, asked for its category."""
    inner = rng.choice(tasks).problem(rng, split)
    return Problem(prompt(inner.prompt), inner.category, NAME)
