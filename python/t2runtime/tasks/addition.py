"""Adding two two-digit numbers; the shortcuts forget the carries or subtract."""

import random

from t2runtime.tasks.base import Task


def _draw(rng: random.Random) -> str:
    return f"{rng.randint(10, 99)}+{rng.randint(10, 99)}"


def _numbers(data: str) -> tuple[int, int]:
    a, b = data.split("+")
    return int(a), int(b)


def right(data: str) -> str:
    """The sum.

    >>> right("37+48")
    '85'
    """
    return str(sum(_numbers(data)))


def without_carry(data: str) -> str:
    """Digit by digit, every carry forgotten.

    >>> without_carry("37+48")
    '75'
    """
    a, b = _numbers(data)
    return f"{(a // 10 + b // 10) % 10}{(a + b) % 10}"


def difference(data: str) -> str:
    """The larger minus the smaller.

    >>> difference("37+48")
    '11'
    """
    a, b = _numbers(data)
    return str(abs(a - b))


TASK = Task("add", ("", "sum "), _draw, right, (without_carry, difference))
