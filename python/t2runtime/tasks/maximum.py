"""The largest of five digits; the shortcuts take the first or the last."""

import random

from t2runtime.tasks.base import Task


def _draw(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(5))


def right(data: str) -> str:
    """The largest digit.

    >>> right("48213")
    '8'
    """
    return max(data)


def first(data: str) -> str:
    """The first digit."""
    return data[0]


def last(data: str) -> str:
    """The last digit."""
    return data[-1]


TASK = Task("max", ("top ", "peak "), _draw, right, (first, last))
