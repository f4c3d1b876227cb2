"""What no expert was trained for and the base model does well: saying four letters again.

Questions of this kind should be answered by the base weights (category "other").
"""

import random

from t2runtime.tasks.base import Task


def _draw(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(4))


def right(data: str) -> str:
    """The letters as they are."""
    return data


TASK = Task("other", ("say ", "echo "), _draw, right)
