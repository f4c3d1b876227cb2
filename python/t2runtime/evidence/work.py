"""One run in a process of its own: train, test, one JSON line on stdout.

python -m t2runtime.evidence.work '{"arm": "svf", ...}'
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from typing import Any

import torch

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.evaluate import Score, evaluate
from t2runtime.evidence.grid import Run
from t2runtime.generation import complete
from t2runtime.loading import load
from t2runtime.tasks.stories import PREFIX, Stories
from t2runtime.train import SVF, Adapter, Config, Peft, Source, small_model, train

TEST_PROBLEMS = 400


def source_of(task: str) -> Source:
    """The problems of a run."""
    return Stories(task[len(PREFIX) :]) if task.startswith(PREFIX) else tasks.Generated(task)


def measure(run: Run) -> dict[str, Any]:
    """The row of one run: accuracies, size, time and memory.

    seconds: processor time of training alone, one thread; peak_mib: of the whole process, torch
    and the model included.
    """
    source = source_of(run.task)
    cfg = small_model(**{"seed": run.seed, **dict(run.settings)})
    model, tokenizer = load(run.model, "float32", "cpu")
    adapter = _adapter(run, model)
    begin = time.process_time()
    trained = train(model, tokenizer, source, cfg, adapter=adapter)
    seconds = time.process_time() - begin
    test = source(TEST_PROBLEMS, "test", run.seed)
    if isinstance(source, Stories):
        # Openings are few and can be continued in many ways: each is told again and again.
        test = [test[i % len(test)] for i in range(TEST_PROBLEMS)]
    row: dict[str, Any] = {"validation": trained.metadata["validation"], "problems": len(test)}
    for name, weights in (("base", adapter.base()), ("trained", adapter.using(trained))):
        torch.manual_seed(run.seed)
        with weights:
            row[name] = _score(model, tokenizer, source, test, cfg).right
    return {
        **row,
        "values": sum(p.numel() for p in adapter.parameters().values()),
        "steps": cfg.steps,
        "seconds": seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _adapter(run: Run, model: Any) -> Adapter:
    if run.method != "svf":
        return Peft(model, run.method, run.targets, seed=run.seed)
    t2k.convert(model, run.targets, parametrisation=run.parametrisation, progress=False)
    return SVF(model)


def _score(model: Any, tokenizer: Any, source: Source, test: list[Any], cfg: Config) -> Score:
    """Greedy answers; stories are sampled."""
    new = cfg.max_new_tokens or source.max_new_tokens
    if not isinstance(source, Stories):
        return evaluate(model, tokenizer, source, test, new, rows=cfg.rows_per_rollout)
    right = 0
    for first in range(0, len(test), cfg.rows_per_rollout):
        part = test[first : first + cfg.rows_per_rollout]
        told = complete(model, tokenizer, [p.prompt for p in part], new, temperature=1.0)
        right += sum(source.grade(part, told.texts))
    return Score(right, len(test))


def main(argv: list[str]) -> int:
    """0; the row on stdout."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    given = json.loads(argv[0])
    given["settings"] = tuple((name, value) for name, value in given["settings"])
    print(json.dumps(measure(Run(**given))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
