"""Every way to choose experts on the same problems, through the engine, in one table.

`t2 eval --strategy ...` is this function. The problems of all tasks are mixed into the same
batches, so that the requests of a batch want different experts. The few-shot rows are told the task
of a question, as in the paper: a mixture is found once per task from its own shots. All other rows
see the question only.
"""

from __future__ import annotations

import copy
import logging
import random
import re
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from t2runtime.adapt.asking import tell_unnamed
from t2runtime.adapt.fewshot import Space, check_search, search
from t2runtime.adapt.mixtures import TaskMixture
from t2runtime.adapt.record import BASE, record_of_tasks
from t2runtime.adapt.router import RouterConfig, train_router
from t2runtime.adapt.shots import check_shots, draw_shots, held_out, is_marked, question_marks
from t2runtime.adapt.weights import Mixture
from t2runtime.engine import Transformer2
from t2runtime.evaluate import Score
from t2runtime.request import Output, count
from t2runtime.tasks import Problem, Source, Split
from t2runtime.verdicts import is_right, verdicts_of

logger = logging.getLogger(__name__)
#: Strategies whose pass 1 computes one row a question.
_LOOKS = ("prompt", "classifier", "mixture", "router", "record")
#: What a call says of one request: its strategy, given the task of each.
_Says = Callable[[Sequence[str]], Any]


@dataclass(frozen=True)
class Comparison:
    """A row of the table.

    shots: labelled problems that were used to choose experts, none of them scored. forwards: rows
    that choosing took, as `search` counts them, pass 1 included. search_seconds: of choosing once
    for all questions; 0 for what was read from a file. pass1_seconds, pass2_seconds: the engine's,
    summed over the batches. failed: problems without an answer (`Output.error`); they count as
    wrong. failure: why the first of them has none. left_out: problems that were not scored, since
    one of the strategies was found with them.
    """

    strategy: str
    score: Score
    by_task: dict[str, Score]
    shots: int
    forwards: int
    search_seconds: float
    pass1_seconds: float
    pass2_seconds: float
    failed: int = 0
    failure: str | None = None
    left_out: int = 0

    @property
    def ratio(self) -> float:
        """Pass 1 over pass 2, in seconds."""
        return self.pass1_seconds / self.pass2_seconds if self.pass2_seconds else 0.0

    def facts(self) -> dict[str, Any]:
        """As JSON takes it."""
        own = {
            name: getattr(self, name)
            for name in ("shots", "forwards", "search_seconds", "pass1_seconds", "pass2_seconds",
                         "ratio", "failed", "failure", "left_out")
        }  # fmt: skip
        by_task = {task: _facts(score) for task, score in self.by_task.items()}
        return {"strategy": self.strategy, **_facts(self.score), "by_task": by_task, **own}


@dataclass(frozen=True)
class _Way:
    """A strategy that is ready to answer, and what it took."""

    label: str
    t2: Transformer2
    says: _Says
    looks: bool = False
    shots: int = 0
    forwards: int = 0
    seconds: float = 0.0
    marks: tuple[str, ...] = ()  # of the problems that it was found with


def compare(
    t2: Transformer2,
    sources: Mapping[str, Source],
    strategies: Sequence[Any],
    *,
    split: Split = "test",
    problems: int = 60,
    names: Sequence[str] | None = None,
    mixtures: Mapping[str, TaskMixture] | None = None,
    methods: Sequence[str] = ("cem",),
    shots: int = 10,
    shots_from: Split = "validation",
    validation: int = 60,
    router: RouterConfig | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    rows: int = 64,
    progress: bool = False,
    **settings: Any,
) -> list[Comparison]:
    """A row for each of `strategies`, all on the same problems of `split`.

    Args:
        t2: the engine; it is left as it is.
        sources: the tasks by name; `problems` of each at most.
        strategies: what `Transformer2.generate` takes for a whole batch: None (the base), an
            expert's name, {name: weight}, "prompt", "classifier", "mixture", "few-shot", "router",
            "record". What an engine lacks is found first, and its cost is in the row: few-shot
            mixtures unless `mixtures` holds them ({task: mixture}, one row; else a row for each of
            `methods`, from `shots` problems of `shots_from` a task), the router (on training
            splits, `router` says how), the record (`validation` problems of each task, which is
            its category).
        names: experts that may be chosen in what is found (default: all but the classifier).
        max_new_tokens: of each answer; default: what its task says.
        seed: of problems, shots and searches. rows: questions a batch.
        settings: of `search`: population, generations, budget, per, ...

    A problem that any of the strategies was found with is left out for all of them. Raises
    ValueError for no tasks or strategies, one that is there twice or is unknown, and a mixture
    that does not say which problems were its shots.
    """
    for what, number in (("problems", problems), ("rows", rows), ("validation", validation)):
        count(what, number)
    labels = _checked(t2, sources, strategies)
    chosen = [name for name in t2.bank.names if name != t2.classifier]
    find = _Finder(t2, sources, list(names or chosen), seed, max_new_tokens, rows)
    more = shots if shots_from == split else 0
    kept: _Way | None = None
    if "few-shot" in strategies and mixtures is not None:
        kept = find.saved(mixtures)
    elif "few-shot" in strategies:
        size = Space(t2.bank, tuple(find.names), settings.get("per", "expert")).size
        check_searches(sources, methods, shots, shots_from, seed, size, settings)
        drawn = {task: draw_shots(one, shots, shots_from, seed) for task, one in sources.items()}
        marks = question_marks(shot for some in drawn.values() for shot in some)
        _held_out(sources, split, problems, more, seed, marks)  # raises before any search
    ways: list[_Way] = []
    for strategy, label in zip(strategies, labels, strict=True):
        if strategy == "few-shot" and kept is not None:
            ways.append(kept)
        elif strategy == "few-shot":
            ways += [find.few_shot(way, drawn, settings) for way in methods]
        elif strategy == "router":
            ways.append(find.router(router or RouterConfig(seed=seed)))
        elif strategy == "record":
            ways.append(find.record(validation))
        else:
            looks = isinstance(strategy, str) and strategy in _LOOKS
            ways.append(_Way(label, t2, lambda tasks, same=strategy: same, looks))  # type: ignore[misc]
    used = {mark for way in ways for mark in way.marks}
    asked, left = _held_out(sources, split, problems, more, seed, used)
    t2.generate([asked[0][1].prompt], None, max_new_tokens=1)  # what only a first call costs
    found = [_row(way, sources, asked, max_new_tokens, rows, progress) for way in ways]
    return [replace(row, left_out=left) for row in found]


def check_searches(
    sources: Mapping[str, Source], methods: Sequence[str], shots: int, shots_from: Split,
    seed: int, size: int | None, settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """Raise what the searches of `compare` would, before any of them begins: ValueError for bad
    settings, ImportError for a missing package. size: weights in a member, as far as it is known.
    """
    count("shots", shots)
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods must be distinct, at least one, got {', '.join(methods)}")
    for task, source in sources.items():
        drawn = source(shots, shots_from, seed)
        try:
            check_shots(drawn)
            for method in methods:
                check_search(method, len(drawn), size, **settings)
        except ValueError as error:
            raise ValueError(f"task {task!r}: {error}") from error


def _checked(
    t2: Transformer2, sources: Mapping[str, Source], strategies: Sequence[Any]
) -> list[str]:
    """What the rows are called; raises before any search for what cannot be compared."""
    if not sources or not strategies:
        what = "sources must hold at least one task" if not sources else "strategies must hold one"
        raise ValueError(f"{what}, got none")
    labels = [_label(strategy) for strategy in strategies]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"strategies must differ, got {', '.join(twice)} more than once")
    absent = {"few-shot", *(name for name in ("router", "record") if getattr(t2, name) is None)}
    for strategy in strategies:
        if not isinstance(strategy, str) or strategy not in absent:
            t2.dispatch([], strategy)
    return labels


def _label(strategy: Any) -> str:
    """How a row is called."""
    if isinstance(strategy, Mapping):
        return " + ".join(f"{name} {weight:g}" for name, weight in strategy.items())
    return BASE if strategy is None else str(strategy)


def _plain(task: str) -> str:
    """A task as the name of a mixture.

    >>> _plain("story:animal")
    'story-animal'
    """
    return re.sub(r"[^A-Za-z0-9_]+", "-", task).strip("-") or "task"


@dataclass(frozen=True)
class _Finder:
    """What strategies lack before they can answer."""

    t2: Transformer2
    sources: Mapping[str, Source]
    names: list[str]
    seed: int
    max_new_tokens: int | None
    rows: int

    @property
    def _model(self) -> tuple[Any, Any, Any]:
        return self.t2.model, self.t2.tokenizer, self.t2.bank

    def saved(self, mixtures: Mapping[str, TaskMixture]) -> _Way:
        """Mixtures that were found before."""
        missing = [task for task in self.sources if task not in mixtures]
        if missing:
            raise ValueError(
                f"mixtures must hold one for each task, got none for {', '.join(missing)}; there "
                f"are {', '.join(mixtures) or 'none'}. Find them with `t2 adapt`, or say NAME=TASK"
            )
        used = {task: mixtures[task] for task in self.sources}
        for mixture in used.values():
            mixture.check(self.t2.bank)
        return self._mixed("few-shot", used, 0.0)

    def _mixed(self, label: str, used: Mapping[str, TaskMixture], seconds: float) -> _Way:
        marks = tuple(mark for mixture in used.values() for mark in mixture.questions())
        forwards = sum(mixture.budget for mixture in used.values())

        def says(tasks: Sequence[str]) -> list[Mixture]:
            return [used[task] for task in tasks]

        return _Way(label, self.t2, says, False, len(set(marks)), forwards, seconds, marks)

    def few_shot(
        self, method: str, shots: Mapping[str, list[Problem]], settings: Mapping[str, Any]
    ) -> _Way:
        """A mixture of each task, found now."""
        began = time.perf_counter()
        used = {
            task: search(
                *self._model, self.names, shots[task],
                self.max_new_tokens or source.max_new_tokens,
                method=method, grader=source, seed=self.seed, chat=self.t2.chat, **settings,
            ).saved(_plain(task))
            for task, source in self.sources.items()
        }  # fmt: skip
        return self._mixed(f"few-shot, {method}", used, time.perf_counter() - began)

    def router(self, cfg: RouterConfig) -> _Way:
        """The engine's router, or one that is trained now."""
        seconds, t2, router = 0.0, self.t2, self.t2.router
        if router is None:
            began, t2 = time.perf_counter(), copy.copy(t2)
            router = train_router(
                *self._model, self.names, list(self.sources.values()), cfg, chat=t2.chat,
                max_new_tokens=self.max_new_tokens,
            )  # fmt: skip
            t2.router, seconds = router, time.perf_counter() - began
        shots, forwards = router.trained["questions"], router.trained["forwards"]
        return self._learned("router", t2, shots, forwards, seconds, router.questions)

    def record(self, count: int) -> _Way:
        """The engine's record, or one that is measured now; the tasks are its categories."""
        seconds, t2, record = 0.0, self.t2, self.t2.record
        if record is None:
            began, t2 = time.perf_counter(), copy.copy(t2)
            tell_unnamed(t2.categories_of("record"), self.sources)
            record = record_of_tasks(
                *self._model, self.names, self.sources, count, seed=self.seed, rows=self.rows,
                max_new_tokens=self.max_new_tokens, chat=t2.chat,
            )  # fmt: skip
            t2.record, seconds = record, time.perf_counter() - began
        return self._learned("record", t2, *record.used, seconds, record.questions)

    def _learned(
        self, name: str, t2: Transformer2, shots: int, forwards: int, seconds: float,
        marks: tuple[str, ...] | None,
    ) -> _Way:  # fmt: skip
        if marks is None:
            logger.warning(
                "the %s does not say which problems it was made with: those that are among the "
                "problems here are not noticed. Make it again with `t2 adapt`", name,
            )  # fmt: skip
        return _Way(name, t2, lambda _: name, True, shots, forwards, seconds, marks or ())


def _held_out(
    sources: Mapping[str, Source], split: Split, count: int, more: int, seed: int,
    used: Container[str],
) -> tuple[list[tuple[str, Problem]], int]:  # fmt: skip
    """(task, problem) to be scored, the tasks mixed; none with a mark among `used`, and how many
    had one. `more` are drawn in place of shots.
    """
    asked: list[tuple[str, Problem]] = []
    left = 0
    for task, source in sources.items():
        drawn = source(count + more, split, seed)
        rest, out = held_out(drawn, [problem for problem in drawn if is_marked(problem, used)])
        asked, left = asked + [(task, problem) for problem in rest[:count]], left + out
    random.Random(f"compare/{seed}").shuffle(asked)
    return asked, left


def _row(
    way: _Way, sources: Mapping[str, Source], asked: Sequence[tuple[str, Problem]],
    max_new_tokens: int | None, rows: int, progress: bool,
) -> Comparison:  # fmt: skip
    """Answer all problems in one way, and grade."""
    outputs: list[Output] = []
    first = second = 0.0
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=len(asked), desc=way.label, unit="problem", leave=False,
              disable=None if progress else True) as bar:  # fmt: skip
        for start in range(0, len(asked), rows):
            part = asked[start : start + rows]
            made = way.t2.generate(
                [problem.prompt for _, problem in part],
                way.says([task for task, _ in part]),
                max_new_tokens=[max_new_tokens or sources[task].max_new_tokens for task, _ in part],
            )
            outputs += made
            first, second = first + made[0].pass1_seconds, second + made[0].pass2_seconds
            bar.update(len(part))
    by_task: dict[str, Score] = {}
    for task, source in sources.items():
        mine = [(p, out) for (name, p), out in zip(asked, outputs, strict=True) if name == task]
        sound = [(problem, out.text) for problem, out in mine if out.error is None]
        verdicts = verdicts_of(source, [p for p, _ in sound], [text for _, text in sound])
        by_task[task] = Score(sum(map(is_right, verdicts)), len(mine))
    failures = [output.error for output in outputs if output.error is not None]
    return Comparison(
        way.label, Score(sum(s.right for s in by_task.values()), len(asked)), by_task,
        way.shots, way.forwards + way.looks * len(asked), way.seconds, first, second,
        len(failures), failures[0] if failures else None,
    )  # fmt: skip


def _facts(score: Score) -> dict[str, Any]:
    return {
        "accuracy": score.accuracy, "interval": score.interval, "right": score.right,
        "problems": score.total,
    }  # fmt: skip


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`Comparison.facts` as text: accuracy with its 95 % interval, by task, and what it cost."""
    width = max(8, *(len(row["strategy"]) for row in rows))
    tasks = {task: max(7, len(task)) for task in rows[0]["by_task"]}
    costs = {"shots": "{:,d}", "forwards": "{:,d}", "search_seconds": "{:.1f}",
             "pass1_seconds": "{:.2f}", "pass2_seconds": "{:.2f}", "ratio": "{:.1%}"}  # fmt: skip
    names = ("shots", "forwards", "search s", "pass 1 s", "pass 2 s", "1 : 2")
    lines = [
        f"  {'strategy':{width}s}  {'accuracy, %':>20s}  "
        + " ".join(f"{task:>{wide}s}" for task, wide in tasks.items())
        + "".join(f"{name:>10s}" for name in names)
    ]
    for row in rows:
        low, high = (100 * bound for bound in row["interval"])
        score = f"{100 * row['accuracy']:5.1f} [{low:5.1f}, {high:5.1f}]"
        each = " ".join(
            f"{100 * row['by_task'][task]['accuracy']:{wide}.1f}" for task, wide in tasks.items()
        )
        cost = "".join(f"{form.format(row[name]):>10s}" for name, form in costs.items())
        lines.append(f"  {row['strategy']:{width}s}  {score:>20s}  {each}{cost}")
    lines += [
        f"  {row['strategy']}: without an answer, counted as wrong: {row['failed']}; the first: "
        f"{row['failure']}"
        for row in rows
        if row["failed"]
    ]
    return "\n".join(lines)
