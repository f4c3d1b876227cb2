"""Experts for the measurements: trained once per model, task, seed and recipe, and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2kernels.files import folder_lock
from t2runtime import tasks
from t2runtime.adapt.classifier import CategorySource
from t2runtime.adapt.prompt import SMALL
from t2runtime.demo.small import CLASSIFIER, TRAINING
from t2runtime.evidence import grid, work
from t2runtime.loading import load
from t2runtime.tasks import Generated, Source
from t2runtime.tasks.stories import PREFIX
from t2runtime.train import Config, train

_STORIES = next(iter(grid.stories("", [0]))).settings


def recipe(task: str, seed: int, changes: Mapping[str, Any] | None = None) -> Config:
    """How the expert of a task is trained: as in the demo, stories as in the evidence."""
    cfg = dataclasses.replace(TRAINING, seed=seed)
    if task == CLASSIFIER:
        cfg = dataclasses.replace(cfg, steps=30)
    elif task.startswith(PREFIX):
        cfg = dataclasses.replace(cfg, stop_at=None, **dict(_STORIES))
    return dataclasses.replace(cfg, **(changes or {}))


def source_of(task: str) -> Source:
    """The problems of a task: a generated skill, "story:..." or "classifier"."""
    if task == CLASSIFIER:
        return CategorySource({name: Generated(name) for name in tasks.CATEGORIES}, SMALL)
    return work.source_of(task)


def trained(
    folder: Path, task: str, seed: int, model: str, changes: Mapping[str, Any] | None = None
) -> Path:
    """The expert's file in `folder`: SVF on all linear layers of `model`, on training splits only.

    A second process that wants the same expert waits for the first; a killed one leaves nothing.
    """
    cfg = recipe(task, seed, changes)
    facts = json.dumps([model, task, dataclasses.asdict(cfg)], sort_keys=True)
    mark = hashlib.sha256(facts.encode()).hexdigest()[:12]
    own = folder / f"{task.replace(':', '-')}-{seed}-{mark}"
    path = own / "expert.safetensors"
    own.mkdir(parents=True, exist_ok=True)
    with alone(own):
        if not path.exists():
            base, tokenizer = load(model, "float32", "cpu")
            t2k.convert(base, progress=False)
            expert = train(base, tokenizer, source_of(task), cfg)
            expert.description = task
            expert.save(path)
    return path


@contextmanager
def alone(folder: Path, every: float = 1.0) -> Iterator[None]:
    """The folder's lock, waited for as long as another process has it."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(folder_lock(folder))
                break
            except RuntimeError:
                time.sleep(every)
        yield
