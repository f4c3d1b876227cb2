"""How often a letter stands in six letters; the shortcuts give its first place or the number of
kinds.
"""

import random

from t2runtime.tasks.base import Task


def _draw(rng: random.Random) -> str:
    return rng.choice("abcd") + " " + "".join(rng.choice("abcd") for _ in range(6))


def right(data: str) -> str:
    """How often the letter before the space stands behind it.

    >>> right("a bacada")
    '3'
    """
    letter, word = data.split()
    return str(word.count(letter))


def place(data: str) -> str:
    """The place of the letter's first occurrence, 0 if there is none.

    >>> place("a bacada")
    '2'
    """
    letter, word = data.split()
    return str(word.find(letter) + 1)


def kinds(data: str) -> str:
    """How many different letters there are.

    >>> kinds("a bacada")
    '4'
    """
    return str(len(set(data.split()[1])))


TASK = Task("count", ("number ", "many "), _draw, right, (place, kinds))
