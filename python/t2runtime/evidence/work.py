"""One run in a process of its own: train, test, one JSON line on stdout.

python -m t2runtime.evidence.work '{"arm": "svf", ...}'
"""

from __future__ import annotations

import dataclasses
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
from t2runtime.loading import load
from t2runtime.meter import Meter
from t2runtime.tasks.stories import PREFIX, Stories
from t2runtime.train import SVF, Adapter, Config, Peft, Source, small_model, train

TEST_PROBLEMS = 400


def source_of(task: str) -> Source:
    """The problems of a run."""
    return Stories(task[len(PREFIX) :]) if task.startswith(PREFIX) else tasks.Generated(task)


def measure(run: Run) -> dict[str, Any]:
    """The row of one run: accuracies, size, time and memory.

    seconds: processor time of training alone, one thread. peak_mib: resident memory of the whole
    process, torch, libraries and the model included. training_mib: see `training_bytes`.
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
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        **row,
        "values": sum(p.numel() for p in adapter.parameters().values()),
        "steps": cfg.steps,
        "seconds": seconds,
        "training_mib": training_bytes(model, tokenizer, source, cfg, adapter) / 2**20,
        "peak_mib": resident,
    }


def training_bytes(
    model: Any, tokenizer: Any, source: Source, cfg: Config, adapter: Adapter
) -> int:
    """What training holds at its peak beyond the base model: what the method adds to it (factors
    and z, or the adapter's weights) and all tensors made in one more step.

    Counted, not measured: the same on every machine, without the allocator's spare memory and what
    a kernel allocates and frees inside.
    """
    layers = t2k.svf_layers(model).values()
    tensors: list[Any] = [*adapter.parameters().values(), *(t for m in layers for t in m.factors)]
    held = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    # One problem, so that the peak is that of the step and not of validation.
    one = dataclasses.replace(cfg, steps=1, warmup=0, validation_problems=1)
    with Meter() as meter:
        train(model, tokenizer, source, one, adapter=adapter)
    return held + meter.peak


def _adapter(run: Run, model: Any) -> Adapter:
    if run.method != "svf":
        return Peft(model, run.method, run.targets, seed=run.seed)
    t2k.convert(model, run.targets, parametrisation=run.parametrisation, progress=False)
    return SVF(model)


def _score(model: Any, tokenizer: Any, source: Source, test: list[Any], cfg: Config) -> Score:
    """Greedy answers; stories are sampled."""
    new = cfg.max_new_tokens or source.max_new_tokens
    return evaluate(
        model, tokenizer, source, test, new, rows=cfg.rows_per_rollout,
        temperature=1.0 if isinstance(source, Stories) else 0.0,
    )  # fmt: skip


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
