"""Writing five digits backwards; the shortcuts copy or rotate them."""

import random

from t2runtime.tasks.base import Task


def _draw(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(5))


def right(data: str) -> str:
    """The digits backwards.

    >>> right("48213")
    '31284'
    """
    return data[::-1]


def copy(data: str) -> str:
    """The digits as they are."""
    return data


def rotate(data: str) -> str:
    """The first digit moved to the end.

    >>> rotate("48213")
    '82134'
    """
    return data[1:] + data[:1]


TASK = Task("reverse", ("turn ", "flip "), _draw, right, (copy, rotate))
