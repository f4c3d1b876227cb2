"""A task by its name on the command line: a generated one, or a JSON-lines file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from t2runtime import tasks
from t2runtime.tasks.jsonl import JsonLines
from t2runtime.train import Source


def source(name: str) -> Source:
    """The source of problems called `name`: "add", "category", ..., or a path that ends in
    .jsonl.
    """
    if name.endswith(".jsonl"):
        return JsonLines(Path(name))
    tasks.problems(name, 1, "train")
    return partial(tasks.problems, name)
