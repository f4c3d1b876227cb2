"""Which of three names comes first in the alphabet; the shortcuts take the last or the first one
said.
"""

import random

from t2runtime.tasks.base import Task

NAMES = ("ann", "bob", "cal", "dan", "eve", "fay", "gus", "hal",
         "ian", "joe", "kim", "leo", "may", "ned", "pam", "ray")  # fmt: skip


def _draw(rng: random.Random) -> str:
    return " ".join(rng.sample(NAMES, 3))


def right(data: str) -> str:
    """The name that comes first in the alphabet.

    >>> right("eve bob kim")
    'bob'
    """
    return min(data.split())


def said_last(data: str) -> str:
    """The last name said."""
    return data.split()[-1]


def said_first(data: str) -> str:
    """The first name said."""
    return data.split()[0]


TASK = Task("order", ("abc ", "who "), _draw, right, (said_last, said_first))
