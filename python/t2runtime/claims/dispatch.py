"""Every way to choose experts on the mixed problems of the trained skills and of unseen tasks, and
accuracy against the number of shots.

All answers come from `Transformer2`: one batch holds all tasks of a set, every request with its own
mixture. Few shots are told the task of a question, as in the paper: a mixture is found once a task.
The other strategies see the question only.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import t2kernels as t2k
from t2runtime.adapt.fewshot import METHODS, FewShot, search
from t2runtime.adapt.prompt import SMALL
from t2runtime.adapt.record import BASE, measure_record
from t2runtime.adapt.router import RouterConfig, train_router
from t2runtime.adapt.shots import held_out
from t2runtime.adapt.weights import Mixture
from t2runtime.claims.dispatch_report import CLAIMS, draw, section
from t2runtime.claims.units import Context
from t2runtime.claims.unseen import UNSEEN
from t2runtime.demo.small import CLASSIFIER, NEW_TOKENS, SKILLS
from t2runtime.engine import Output, Transformer2
from t2runtime.loading import load
from t2runtime.tasks import Generated, Problem, Source
from t2runtime.verdicts import is_right, verdicts_of

__all__ = ["CLAIMS", "draw", "measure", "measure_shots", "section"]

#: Rows by the number of shots; each holds the ones before it.
SHOTS = (3, 5, 10, 20)
SEEN: dict[str, Source] = {name: Generated(name) for name in SKILLS}
SETS: dict[str, Mapping[str, Source]] = {"trained": SEEN, "unseen": UNSEEN}
#: Few-shot strategies: the search, and whether every layer has its own weights.
SEARCHES = {
    **{f"few-shot, {method}": (method, "expert") for method in METHODS},
    "few-shot, cem per layer": ("cem", "layer"),
}
_DIGITS = 3
_TIMED = 3


@dataclass(frozen=True)
class Bench:
    """The model with the experts of a seed, and the problems of one set.

    asked: {task: test problems}; shots: {task: as many as the most}, none of them asked.
    """

    engine: Transformer2
    sources: Mapping[str, Source]
    asked: dict[str, list[Problem]]
    shots: dict[str, list[Problem]]
    seed: int

    @property
    def questions(self) -> list[str]:
        """Of all tasks, in one batch."""
        return [problem.prompt for part in self.asked.values() for problem in part]

    def answers(self, strategy: Any) -> list[Output]:
        """The engine's, all of which must be there."""
        outputs = self.engine.generate(self.questions, strategy, max_new_tokens=NEW_TOKENS)
        for output in outputs:
            if output.error:
                raise RuntimeError(
                    f"a request failed under strategy {strategy!r:.80}: {output.error}"
                )
        return outputs

    def accuracy(self, outputs: Sequence[Output]) -> dict[str, float]:
        """{task: right answers in %}."""
        texts = iter(output.text for output in outputs)
        found = {}
        for task, problems in self.asked.items():
            own = [next(texts) for _ in problems]
            verdicts = verdicts_of(self.sources[task], problems, own)
            found[task] = 100 * sum(map(is_right, verdicts)) / len(problems)
        return found

    def each(self, mixtures: Mapping[str, Mixture]) -> list[Mixture]:
        """One mixture a request, from one a task."""
        return [mixtures[task] for task, problems in self.asked.items() for _ in problems]

    def searched(self, task: str, count: int, settings: Mapping[str, Any], method: str = "cem",
                 per: Any = "expert") -> FewShot:  # fmt: skip
        """The mixture found from the first `count` shots of a task."""
        return search(
            self.engine.model, self.engine.tokenizer, self.engine.bank, SKILLS,
            self.shots[task][:count], NEW_TOKENS, method=method, per=per,
            population=settings["population"], elites=min(6, settings["population"]),
            generations=settings["generations"], grader=self.sources[task], seed=self.seed,
        )  # fmt: skip


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


def bench(engine: Transformer2, name: str, seed: int, problems: int) -> Bench:
    """The problems of a set: tests, and shots of validation splits."""
    sources = SETS[name]
    shots = {task: source(max(SHOTS), "validation", seed) for task, source in sources.items()}
    used = [shot for part in shots.values() for shot in part]
    asked = {
        task: held_out(source(problems, "test", seed), used)[0] for task, source in sources.items()
    }
    return Bench(engine, sources, asked, shots, seed)


def measure(seed: int, context: Context) -> dict[str, Any]:
    """Accuracy of every strategy on both sets, the mixtures found, and what pass 1 said."""
    engine = engine_of(seed, context)
    learnt = _learnt(engine, seed, context.settings)
    return {
        name: _set(
            bench(engine, name, seed, context.settings["problems"]), context.settings, learnt
        )
        for name in SETS
    }


#: What is learnt once from the trained skills: {strategy: outputs of pass 1 -> mixtures}.
Learnt = dict[str, Callable[[Sequence[str], Sequence[Output]], list[Mixture]]]


def _learnt(engine: Transformer2, seed: int, settings: Mapping[str, Any]) -> Learnt:
    """The router, trained on training splits of the skills, and the record of past performance, on
    validation splits: neither has seen an unseen task.
    """
    model, tokenizer, bank = engine.model, engine.tokenizer, engine.bank
    cfg = RouterConfig(seed=seed, steps=settings["router_steps"])
    router = train_router(model, tokenizer, bank, SKILLS, list(SEEN.values()), cfg)
    past = {task: source(60, "validation", seed) for task, source in SEEN.items()}
    record = measure_record(model, tokenizer, bank, SKILLS, past, NEW_TOKENS, SEEN[SKILLS[0]])

    def routed(questions: Sequence[str], _: Sequence[Output]) -> list[Mixture]:
        rows = router.alpha(model, tokenizer, questions).tolist()
        return [dict(zip(router.names, row, strict=True)) for row in rows]

    def remembered(_: Sequence[str], said: Sequence[Output]) -> list[Mixture]:
        return [record.choose(str(output.category)) for output in said]

    return {"router": routed, "past performance": remembered}


def _set(bench: Bench, settings: Mapping[str, Any], learnt: Learnt) -> dict[str, Any]:
    reached: dict[str, dict[str, float]] = {}
    named: dict[str, dict[str, dict[str, float]]] = {}
    said: list[Output] = []
    reached[BASE] = bench.accuracy(bench.answers(None))
    for name in SKILLS:
        reached[f"expert {name}"] = bench.accuracy(bench.answers(name))
    for strategy in ("mixture", "prompt", CLASSIFIER):
        said = bench.answers(strategy)
        reached[strategy] = bench.accuracy(said)
        named[strategy] = _categories(bench, said)
    for strategy, choose in learnt.items():
        mixtures = choose(bench.questions, said)  # the category is the classification expert's
        reached[strategy] = bench.accuracy(bench.answers(mixtures))
    alpha: dict[str, dict[str, Any]] = {}
    forwards: dict[str, float] = {}
    for strategy, (method, per) in SEARCHES.items():
        found = {
            task: bench.searched(task, settings["shots"], settings, method, per)
            for task in bench.sources
        }
        mixtures = bench.each({task: one.saved("found") for task, one in found.items()})
        reached[strategy] = bench.accuracy(bench.answers(mixtures))
        alpha[strategy] = {task: _alpha(one) for task, one in found.items()}
        forwards[strategy] = statistics.fmean(one.forwards for one in found.values())
    return {
        "problems": {task: len(part) for task, part in bench.asked.items()},
        "accuracy": reached, "named": named, "alpha": alpha, "forwards": forwards,
        "seconds": _seconds(bench),
    }  # fmt: skip


def _categories(bench: Bench, outputs: Sequence[Output]) -> dict[str, dict[str, float]]:
    """{task: {category: share in %}} of what pass 1 said."""
    said = iter(str(output.category) for output in outputs)
    return {
        task: {
            category: 100 * times / len(problems)
            for category, times in Counter(next(said) for _ in problems).items()
        }
        for task, problems in bench.asked.items()
    }


def _alpha(found: FewShot) -> list[Any]:
    """(K,) or (L, K) over SKILLS."""
    alpha = found.search.best.reshape(found.space.shape)
    return [_short(row) for row in alpha.tolist()]


def _short(value: Any) -> Any:
    return [_short(v) for v in value] if isinstance(value, list) else round(value, _DIGITS)


def _seconds(bench: Bench) -> dict[str, float]:
    """Median seconds of pass 1 and pass 2 over the whole set, prompt strategy, in turns."""
    runs = [bench.answers("prompt")[0] for _ in range(_TIMED)]
    return {
        "pass1": statistics.median(run.pass1_seconds for run in runs),
        "pass2": statistics.median(run.pass2_seconds for run in runs),
    }


def measure_shots(seed: int, context: Context) -> dict[str, Any]:
    """{set: {"accuracy": {shots: {task: %}}, "alpha": {shots: {task: (K,)}}}}, by CEM."""
    engine = engine_of(seed, context)
    row: dict[str, Any] = {}
    for name in SETS:
        own = bench(engine, name, seed, context.settings["problems"])
        by_count: dict[str, Any] = {"accuracy": {}, "alpha": {}}
        by_count["accuracy"]["0"] = own.accuracy(own.answers(None))
        for count in SHOTS:
            found = {task: own.searched(task, count, context.settings) for task in own.sources}
            mixtures = own.each({task: one.mixture for task, one in found.items()})
            by_count["accuracy"][str(count)] = own.accuracy(own.answers(mixtures))
            by_count["alpha"][str(count)] = {task: _alpha(one) for task, one in found.items()}
        row[name] = by_count
    return row
