"""Every way to choose experts on the same problems, in one table with Wilson's intervals.

The few-shot rows are told the task of a question, as in the paper: a mixture is found once per task
from its own shots. All other rows see the question only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import t2kernels as t2k
from t2runtime.adapt.fewshot import METHODS, search
from t2runtime.adapt.record import BASE, measure_record
from t2runtime.adapt.router import RouterConfig, train_router
from t2runtime.adapt.shots import held_out
from t2runtime.evaluate import Score
from t2runtime.generation import complete
from t2runtime.tasks import Problem, Source
from t2runtime.verdicts import is_right, verdicts_of

#: Names the category of each question: pass 1 by prompt, by a classification expert, ...
Pass1 = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class Comparison:
    """A row of the table. `labelled` problems were used to choose experts, none of them scored;
    `forwards` as `search` counts them; `seconds` of choosing, once for all questions.
    """

    strategy: str
    score: Score
    by_task: dict[str, Score]
    labelled: int
    forwards: int
    seconds: float


def compare(
    model: Any,
    tokenizer: Any,
    bank: t2k.ExpertBank,
    names: Sequence[str],
    sources: Mapping[str, Source],
    passes: Mapping[str, Pass1],
    *,
    methods: Sequence[str] = METHODS,
    problems: int = 60,
    shots: int = 10,
    validation: int = 60,
    router: RouterConfig | None = None,
    seed: int = 0,
    rows: int = 256,
    **settings: Any,
) -> list[Comparison]:
    """Base, each of `passes`, few shots by each of `methods`, the router, and past performance (the
    category is that of the last of `passes`), on the same test problems.

    names: the experts that may be chosen; a category of another name means the base. sources: by
    category. settings: of `search` (population, generations, budget, per, ...). Shots and the
    record are of validation splits, the router is trained on training splits; a test problem that
    is a shot is left out for every row.
    """
    if not sources:
        raise ValueError("sources must hold at least one task, got none")
    given = {task: source(shots, "validation", seed) for task, source in sources.items()}
    everyone = [shot for part in given.values() for shot in part]
    asked = {
        task: held_out(source(problems, "test", seed), everyone)[0]
        for task, source in sources.items()
    }
    new = max(source.max_new_tokens for source in sources.values())
    questions = [p.prompt for part in asked.values() for p in part]
    count = len(questions)
    table: list[Comparison] = []

    def add(strategy: str, choose: Callable[[], tuple[Tensor, int, int]]) -> None:
        began = time.perf_counter()
        alpha, labelled, forwards = choose()
        seconds = time.perf_counter() - began
        texts = _answers(model, tokenizer, bank, questions, alpha, new, rows)
        by_task = _graded(sources, asked, texts)
        score = Score(sum(s.right for s in by_task.values()), count)
        table.append(Comparison(strategy, score, by_task, labelled, forwards, seconds))

    def one_hot(chosen: Sequence[str | None]) -> Tensor:
        alpha = torch.zeros(len(chosen), len(bank.names))
        for row, name in enumerate(chosen):
            if name in names:
                alpha[row, bank.names.index(str(name))] = 1.0
        return alpha

    def few_shot(method: str) -> tuple[Tensor, int, int]:
        parts, forwards = [], 0
        for task, source in sources.items():
            found = search(
                model, tokenizer, bank, names, given[task], new, method=method, grader=source,
                seed=seed, **settings,
            )  # fmt: skip
            parts.append(found.alpha[None].expand(len(asked[task]), *found.alpha.shape))
            forwards += found.forwards
        return torch.cat(parts), len(everyone), forwards

    def routed() -> tuple[Tensor, int, int]:
        cfg = router or RouterConfig(seed=seed)
        made = train_router(model, tokenizer, bank, names, list(sources.values()), cfg)
        used = cfg.steps * cfg.rows
        return made.alpha(model, tokenizer, questions, bank=bank), used, 3 * used + count

    def remembered() -> tuple[Tensor, int, int]:
        pass1 = list(passes.values())[-1]
        seen = {task: source(validation, "validation", seed) for task, source in sources.items()}
        known: dict[str, str | None] = {}
        for task, source in sources.items():
            part = {task: seen[task]}
            record = measure_record(model, tokenizer, bank, names, part, new, source, rows=rows)
            known[task] = record.choose(task)
        used = sum(map(len, seen.values()))
        chosen = [known.get(category) for category in pass1(questions)]
        return one_hot(chosen), used, used * (1 + len(names)) + count

    add(BASE, lambda: (torch.zeros(count, len(bank.names)), 0, 0))
    for label, pass1 in passes.items():
        add(label, lambda pass1=pass1: (one_hot(pass1(questions)), 0, count))  # type: ignore[misc]
    for method in methods:
        add(f"few-shot, {method}", lambda method=method: few_shot(method))  # type: ignore[misc]
    add("router", routed)
    if passes:
        add("past performance", remembered)
    return table


def _answers(
    model: Any, tokenizer: Any, bank: t2k.ExpertBank, questions: Sequence[str], alpha: Tensor,
    new: int, rows: int,
) -> list[str]:  # fmt: skip
    """Greedy answers of each question under its own row of alpha."""
    texts: list[str] = []
    for start in range(0, len(questions), rows):
        part = slice(start, start + rows)
        with bank.use(alpha[part]):
            texts += complete(model, tokenizer, questions[part], new).texts
    return texts


def _graded(
    sources: Mapping[str, Source], asked: Mapping[str, Sequence[Problem]], texts: Sequence[str]
) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    start = 0
    for task, part in asked.items():
        verdicts = verdicts_of(sources[task], part, texts[start : start + len(part)])
        scores[task] = Score(sum(map(is_right, verdicts)), len(part))
        start += len(part)
    return scores


def text_table(rows: Sequence[Comparison]) -> str:
    """The rows as text: accuracy with its 95 % interval, by task, and what choosing cost."""
    width = max(len(row.strategy) for row in rows)
    tasks = list(rows[0].by_task)
    lines = [
        f"{rows[0].score.total} test problems, greedy, 95 % intervals; per task in %",
        f"  {'strategy':{width}s}  {'accuracy':>22s}  " + " ".join(f"{t[:7]:>7s}" for t in tasks)
        + f"{'labelled':>10s}{'forwards':>10s}{'seconds':>9s}",
    ]  # fmt: skip
    for row in rows:
        each = " ".join(f"{100 * row.by_task[task].accuracy:7.1f}" for task in tasks)
        lines.append(
            f"  {row.strategy:{width}s}  {row.score!s:>22s}  {each}"
            f"{row.labelled:10,d}{row.forwards:10,d}{row.seconds:9.1f}"
        )
    return "\n".join(lines)
