"""Experts of one model on another of the same shapes: in the order of the singular values, in a
random order, and mixed by few shots.

The second model is made like the package's small one from another seed, once for a folder of
results; experts, random orders and shots follow the seed of the row. It is trained more shortly,
on 2,000 steps of half as many rows. That teaches it no addition (its base answers 8 %, the first
model's 40 %), so addition is not among the tasks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime import base_model, tasks
from t2runtime.adapt.fewshot import search
from t2runtime.adapt.shots import held_out
from t2runtime.claims.claim import Claim
from t2runtime.claims.compose import shown, table
from t2runtime.claims.experts import alone
from t2runtime.claims.units import Context
from t2runtime.demo.small import NEW_TOKENS
from t2runtime.evaluate import evaluate
from t2runtime.evidence.ledger import Row
from t2runtime.formats.transfer import ORDERS, transfer
from t2runtime.loading import load
from t2runtime.tasks import EXACT, Problem

BASE, OWN, FEW_SHOT = "base", "own", "few-shot"
KIND = "transfer"
#: What both models have to gain from an expert.
TASKS = ("reverse", "max", "order")
_PEAK_LR = 2e-3
#: Changes to the recipe of the second model's own experts, which only say what could be reached.
_OWN = {"prompts": 16, "validate_every": 5}


def second_model(context: Context) -> Path:
    """The folder of the second base model, trained now unless it has been.

    Its seed, steps and rows a step are the settings "second_seed", "second_steps", "second_rows".
    A second process that wants it waits for the first; half of one is trained again.
    """
    seed, steps, rows = (context.settings[f"second_{name}"] for name in ("seed", "steps", "rows"))
    folder = context.out / f"base-{seed}-{steps}-{rows}"
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        if not (folder / "training.json").exists():  # written last
            base_model.make(folder, seed, steps, rows, _PEAK_LR, 64)
    return folder


def measure(seed: int, context: Context) -> dict[str, Any]:
    """{"first" and "second": {weights: {task: greedy %}}, "alpha": {order: {task: (K,)}}}.

    first: the model that the experts were trained on, with each task's expert as it is ("own") and
    in a random order. second: its base, its own experts, and those of the first model in each of
    `ORDERS`, the task's own one and the mixture that few shots find of all.
    """
    second = str(second_model(context))
    experts = {name: t2k.Expert.load(context.trained(name, seed)) for name in TASKS}
    asked, shots = _problems(seed, context.settings)
    first = _Bench(context.model, seed, experts, ("shuffled", OWN))
    row: dict[str, Any] = {"problems": {name: len(part) for name, part in asked.items()}}
    row["first"] = first.table(asked)
    own = {name: t2k.Expert.load(context.trained(name, seed, second, **_OWN)) for name in TASKS}
    there = _Bench(second, seed, experts, ORDERS, own)
    row["second"] = there.table(asked)
    row["alpha"] = {}
    for order in ORDERS:
        reached, alpha = there.few_shot(order, asked, shots, seed, context.settings)
        row["second"][f"{FEW_SHOT}, {order}"], row["alpha"][order] = reached, alpha
    return row


def _problems(
    seed: int, settings: Mapping[str, Any]
) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]]]:
    """Test problems and shots of each task; none is both."""
    shots = {n: tasks.problems(n, settings["shots"], "validation", seed) for n in TASKS}
    asked = {n: tasks.problems(n, settings["problems"], "test", seed) for n in TASKS}
    return {n: held_out(part, shots[n])[0] for n, part in asked.items()}, shots


class _Bench:
    """A model with groups of experts in its bank, under the names "GROUP-TASK"."""

    def __init__(
        self, path: str, seed: int, experts: Mapping[str, t2k.Expert], orders: Sequence[str],
        own: Mapping[str, t2k.Expert] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = load(path, "float32", "cpu")
        t2k.convert(self.model, progress=False)
        self.bank = t2k.ExpertBank(self.model)
        self.groups = tuple(dict.fromkeys((*orders, OWN)))
        for task, expert in experts.items():
            for order in orders:
                if order != OWN:
                    moved = transfer(expert, self.model, order, seed=seed)
                    self.bank.add(f"{order}-{task}", moved)
            self.bank.add(f"{OWN}-{task}", (own or experts)[task])

    def accuracy(self, routing: Any, problems: Sequence[Problem]) -> float:
        """Greedy accuracy in % under one mixture."""
        with self.bank.use(routing):
            found = evaluate(self.model, self.tokenizer, EXACT, problems, NEW_TOKENS)
        return 100 * found.accuracy

    def table(self, asked: Mapping[str, Sequence[Problem]]) -> dict[str, dict[str, float]]:
        """{"base" or group: {task: % under the task's own expert of the group}}."""
        found = {BASE: {task: self.accuracy(None, part) for task, part in asked.items()}}
        for group in self.groups:
            found[group] = {t: self.accuracy(f"{group}-{t}", part) for t, part in asked.items()}
        return found

    def few_shot(
        self, group: str, asked: Mapping[str, Sequence[Problem]],
        shots: Mapping[str, Sequence[Problem]], seed: int, settings: Mapping[str, Any],
    ) -> tuple[dict[str, float], dict[str, list[float]]]:  # fmt: skip
        """({task: % under the mixture found}, {task: its weights over TASKS})."""
        names, population = [f"{group}-{task}" for task in TASKS], settings["population"]
        reached, alpha = {}, {}
        for task, problems in asked.items():
            found = search(
                self.model, self.tokenizer, self.bank, names, shots[task], NEW_TOKENS,
                population=population, elites=min(6, population),
                generations=settings["generations"], seed=seed,
            )  # fmt: skip
            reached[task] = self.accuracy(found.mixture, problems)
            alpha[task] = [round(weight, 3) for weight in found.search.best.tolist()]
        return reached, alpha


# -- what the rows say -----------------------------------------------------------------------------


def _mean(row: Row, weights: str, model: str = "second") -> float:
    return statistics.fmean(row[model][weights].values())


def _less(more: str, less: str, model: str = "second") -> Callable[[Row], float]:
    """The difference of two means over tasks, in points."""
    return lambda row: _mean(row, more, model) - _mean(row, less, model)


_POINTS = "mean greedy accuracy over three skills, points"
_DIFFERS = (
    "two models of 0.9 M parameters trained from different seeds on the same kind of text; the "
    "tasks are those of the experts. One second model: seeds differ in experts, orders and shots."
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Experts of another model, in the order of singular values, beat the base",
        "cross-model transfer", f"{_POINTS}, ordered less base", _DIFFERS, KIND,
        _less("sigma", BASE), low=0,
    ),
    Claim(
        "A random order is worse than that of the singular values", "cross-model transfer",
        f"{_POINTS}, ordered less shuffled", _DIFFERS, KIND, _less("sigma", "shuffled"), low=0,
    ),
    Claim(
        "Few-shot mixtures of another model's experts beat the base", "cross-model transfer",
        f"{_POINTS}, few-shot less base", _DIFFERS, KIND, _less(f"{FEW_SHOT}, sigma", BASE), low=0,
    ),
    Claim(
        "A random order is worse than that of the singular values on the experts' own model",
        "not in the paper", f"{_POINTS}, as trained less shuffled", _DIFFERS, KIND,
        _less(OWN, "shuffled", "first"), low=0,
    ),
    Claim(
        "Few-shot mixtures of ordered experts beat those of shuffled ones", "not in the paper",
        f"{_POINTS}, ordered less shuffled", _DIFFERS, KIND,
        _less(f"{FEW_SHOT}, sigma", f"{FEW_SHOT}, shuffled"), low=0,
    ),
)  # fmt: skip


def section(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """The table of both models, where there are two rows or more."""
    own = rows.get(KIND, ())
    if len(own) < 2:
        return []
    lines = []
    for model in ("first", "second"):
        for weights in own[0][model]:
            cells = [shown([row[model][weights][task] for row in own]) for task in TASKS]
            mean = shown([_mean(row, weights, model) for row in own])
            lines.append([model, weights, *cells, mean])
    return table(
        "Experts on another model",
        f"Greedy accuracy in % on {min(own[0]['problems'].values())} problems or more a task, 95 % "
        f"intervals over {len(own)} seeds. The experts were trained on the first model; the second "
        "was trained from another seed. own: the model's own experts, as trained.",
        ["model", "weights", *TASKS, "mean"], lines,
    )  # fmt: skip
