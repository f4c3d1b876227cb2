"""A task by its name on the command line: a generated one, or a JSON-lines file."""

from __future__ import annotations

from pathlib import Path

from t2runtime import rewards, tasks
from t2runtime.tasks import ByAnswer, Source
from t2runtime.tasks.jsonl import JsonLines


def source(name: str, *, data: str | Path | None = None, extract: str | None = None) -> Source:
    """The source of problems called `name`: "add", "category", ..., or a path that ends in
    .jsonl. `extract` names the way answers are read, where it is not the task's own.
    """
    if extract is not None and extract not in rewards.EXTRACTORS:
        raise ValueError(f"extract must be one of {', '.join(rewards.EXTRACTORS)}, got {extract!r}")
    grader = tasks.EXACT if extract is None else ByAnswer(rewards.EXTRACTORS[extract])
    if name.endswith(".jsonl"):
        return JsonLines(Path(name), grader)
    if data is not None:
        raise ValueError(f"task {name!r} is generated and reads no data, got data={str(data)!r}")
    return tasks.Generated(name, grader=grader)
