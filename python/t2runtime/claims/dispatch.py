"""Every way to choose experts on the mixed problems of the trained skills and of unseen tasks, and
accuracy against the number of shots.

All answers come from `t2runtime.compare`, as in `t2 eval`: a batch holds all tasks of a set, every
request with its own mixture. Few shots are told the task of a question, as in the paper: a mixture
is found once a task. The other strategies see the question only, and what they learn from (the
router, the record) are the trained skills.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import t2kernels as t2k
from t2runtime.adapt.fewshot import METHODS, FewShot, search
from t2runtime.adapt.prompt import SMALL
from t2runtime.adapt.record import record_of_tasks
from t2runtime.adapt.router import RouterConfig, train_router
from t2runtime.claims.dispatch_report import CLAIMS, draw, section
from t2runtime.claims.units import Context
from t2runtime.claims.unseen import UNSEEN
from t2runtime.compare import Comparison, compare
from t2runtime.demo.small import CLASSIFIER, NEW_TOKENS, SKILLS
from t2runtime.engine import Transformer2
from t2runtime.loading import load
from t2runtime.tasks import Generated, Source

__all__ = ["CLAIMS", "draw", "measure", "measure_shots", "section"]

#: Rows by the number of shots; each holds the ones before it.
SHOTS = (3, 5, 10, 20)
SEEN: dict[str, Source] = {name: Generated(name) for name in SKILLS}
SETS: dict[str, Mapping[str, Source]] = {"trained": SEEN, "unseen": UNSEEN}
#: Few-shot strategies: the search, and whether every layer has its own weights.
SEARCHES: dict[str, tuple[str, Any]] = {
    **{f"few-shot, {method}": (method, "expert") for method in METHODS},
    "few-shot, cem per layer": ("cem", "layer"),
}
#: Validation problems of each skill that the record is made from.
_RECORD = 60
_ROWS = 256
_DIGITS = 3


def engine_of(seed: int, context: Context) -> Transformer2:
    """The small model with an expert a skill and the classification expert, all of this seed."""
    files = {name: context.trained(name, seed) for name in (*SKILLS, CLASSIFIER)}
    model, tokenizer = load(context.model, "float32", "cpu")
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for name, path in files.items():
        bank.add(name, t2k.Expert.load(path))
    # A category without an expert means the base.
    plain = {name: name if name in SKILLS else None for name in SMALL.names}
    return Transformer2(
        model, tokenizer, bank, categories=SMALL, classifier=CLASSIFIER, mixtures=plain
    )


def measure(seed: int, context: Context) -> dict[str, Any]:
    """{set: accuracy of every strategy, the mixtures found, and what pass 1 said}."""
    t2, settings = engine_of(seed, context), context.settings
    parts = (t2.model, t2.tokenizer, t2.bank, SKILLS)
    cfg = RouterConfig(seed=seed, steps=settings["router_steps"])
    t2.router = train_router(*parts, list(SEEN.values()), cfg)
    t2.record = record_of_tasks(*parts, SEEN, _RECORD, seed=seed)
    return {name: _set(t2, sources, seed, settings) for name, sources in SETS.items()}


def _set(
    t2: Transformer2, sources: Mapping[str, Source], seed: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    count = settings["problems"]
    ways = [None, *SKILLS, "mixture", "prompt", CLASSIFIER, "router", "record"]
    rows = {row.strategy: row for row in compare(
        t2, sources, ways, problems=count, seed=seed, rows=_ROWS
    )}  # fmt: skip
    alpha: dict[str, dict[str, Any]] = {}
    for label, (method, per) in SEARCHES.items():
        found = _found(t2, sources, settings["shots"], seed, settings, method, per)
        rows[label] = _scored(t2, sources, found, seed, count)
        alpha[label] = {task: _alpha(one) for task, one in found.items()}
    problems = {task: score.total for task, score in rows["prompt"].by_task.items()}
    return {
        "problems": problems,
        "accuracy": {f"expert {k}" if k in SKILLS else k: _by_task(v) for k, v in rows.items()},
        "named": {way: _named(t2, sources, way, seed, count) for way in ("prompt", CLASSIFIER)},
        "alpha": alpha,
        "forwards": {label: rows[label].forwards / len(sources) for label in SEARCHES},
        "seconds": {"pass1": rows["prompt"].pass1_seconds, "pass2": rows["prompt"].pass2_seconds},
    }


def _found(
    t2: Transformer2, sources: Mapping[str, Source], shots: int, seed: int,
    settings: Mapping[str, Any], method: str = "cem", per: Any = "expert",
) -> dict[str, FewShot]:  # fmt: skip
    """The mixture of each task, from `shots` of its validation problems."""
    return {
        task: search(
            t2.model, t2.tokenizer, t2.bank, SKILLS, source(shots, "validation", seed), NEW_TOKENS,
            method=method, per=per, population=settings["population"],
            generations=settings["generations"], grader=source, seed=seed,
        )
        for task, source in sources.items()
    }  # fmt: skip


def _scored(
    t2: Transformer2, sources: Mapping[str, Source], found: Mapping[str, FewShot], seed: int,
    count: int,
) -> Comparison:  # fmt: skip
    """The test problems, each answered with the mixture of its task."""
    mixtures = {task: one.saved("found") for task, one in found.items()}
    (row,) = compare(
        t2, sources, ["few-shot"], mixtures=mixtures, problems=count, seed=seed, rows=_ROWS
    )
    return row


def _by_task(row: Comparison) -> dict[str, float]:
    """{task: right answers in %}; all questions must have an answer."""
    if row.failed:
        raise RuntimeError(
            f"{row.failed} requests failed under strategy {row.strategy}: {row.failure}"
        )
    return {task: 100 * score.accuracy for task, score in row.by_task.items()}


def _named(
    t2: Transformer2, sources: Mapping[str, Source], strategy: str, seed: int, count: int
) -> dict[str, dict[str, float]]:
    """{task: {category: share in %}} of what pass 1 says."""
    shares = {}
    for task, source in sources.items():
        said = t2.dispatch([p.prompt for p in source(count, "test", seed)], strategy)
        times = Counter(str(output.category) for output in said)
        shares[task] = {name: 100 * n / len(said) for name, n in times.items()}
    return shares


def _alpha(found: FewShot) -> list[Any]:
    """(K,) or (L, K) over SKILLS."""
    return _short(found.search.best.reshape(found.space.shape).tolist())  # type: ignore[no-any-return]


def _short(value: Any) -> Any:
    return [_short(v) for v in value] if isinstance(value, list) else round(value, _DIGITS)


def measure_shots(seed: int, context: Context) -> dict[str, Any]:
    """{"accuracy": {shots: {task: %}}, "alpha": {shots: {task: (K,)}}} of the unseen tasks, by CEM;
    0 shots is the base.
    """
    t2, settings = engine_of(seed, context), context.settings
    count = settings["problems"]
    (base,) = compare(t2, UNSEEN, [None], problems=count, seed=seed, rows=_ROWS)
    accuracy, alpha = {"0": _by_task(base)}, {}
    for shots in SHOTS:
        found = _found(t2, UNSEEN, shots, seed, settings)
        accuracy[str(shots)] = _by_task(_scored(t2, UNSEEN, found, seed, count))
        alpha[str(shots)] = {task: _alpha(one) for task, one in found.items()}
    return {"accuracy": accuracy, "alpha": alpha}
