"""What the rows of `dispatch` answer, as claims, tables and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2runtime.claims.claim import Claim
from t2runtime.claims.unseen import UNSEEN as UNSEEN_TASKS
from t2runtime.evidence.intervals import interval
from t2runtime.evidence.ledger import Row

Rows = Mapping[str, Sequence[Row]]
TRAINED, UNSEEN = "trained", "unseen"
#: The few-shot strategy of the paper: one weight per expert, found by CEM.
CEM, LAYERS = "few-shot, cem", "few-shot, cem per layer"
#: Pass 1 over pass 2 of the paper's ARC-Challenge, the largest of its three.
_PAPER_RATIO = 0.47
_FLAT = 2.0
_SPREAD = 1.5


def accuracy(row: Row, name: str, strategy: str) -> float:
    """Of a strategy on a set: the mean over its tasks, which have as many problems each, in %."""
    return statistics.fmean(row[name]["accuracy"][strategy].values())


def gain(name: str, first: str, second: str) -> Callable[[Row], float]:
    """First less second, in points."""
    return lambda row: accuracy(row, name, first) - accuracy(row, name, second)


def by_shots(first: int, second: int) -> Callable[[Row], float]:
    """Accuracy with `first` shots less that with `second`, in points; 0 shots is the base."""
    return lambda row: _with_shots(row, str(first)) - _with_shots(row, str(second))


def _with_shots(row: Row, count: str) -> float:
    return statistics.fmean(row["accuracy"][count].values())


def _own_expert(row: Row) -> float:
    found = row[TRAINED]["accuracy"]
    return statistics.fmean(
        found[f"expert {task}"][task] - base for task, base in found["base"].items()
    )


def _dispatched(strategy: str, row: Row) -> float:
    """Questions of the trained skills whose skill pass 1 names, in %."""
    named = row[TRAINED]["named"][strategy]
    return statistics.fmean(shares.get(task, 0.0) for task, shares in named.items())


def effective(alpha: Sequence[float]) -> float:
    """How many experts a mixture has, (Σα)² / Σα²; 0 for the base.

    >>> effective([1.0, 0.0]), effective([0.5, 0.5]), effective([0.0, 0.0])
    (1.0, 2.0, 0.0)
    """
    squares = sum(a * a for a in alpha)
    return sum(alpha) ** 2 / squares if squares else 0.0


def _spread(row: Row) -> float:
    return statistics.fmean(effective(alpha) for alpha in row[UNSEEN]["alpha"][CEM].values())


def _ratio(row: Row) -> float:
    """Over both sets."""
    seconds = [row[name]["seconds"] for name in (TRAINED, UNSEEN)]
    return sum(s["pass1"] for s in seconds) / sum(s["pass2"] for s in seconds)


_POINTS = "difference in greedy accuracy on six mixed unseen tasks, points"
_TASKS = (
    "the unseen tasks are new words and lengths for skills that have an expert, and counting, "
    "which has none; the paper's are harder relatives of its training tasks (MATH, HumanEval, "
    "ARC-Challenge), which the public code dispatches by data set, here every question by itself."
)
_FEW = f"{_TASKS} Ten shots, all strategies scored on the same problems, none of them a shot."

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "An expert beats the base on its own task", "table 1",
        "difference in greedy accuracy, mean of four skills, points",
        "four generated skills whose right procedure is a minority in the base's training text.",
        "dispatch", _own_expert, low=0,
    ),
    Claim("Unseen tasks: prompt dispatch beats the base", "table 2", _POINTS, _TASKS,
          "dispatch", gain(UNSEEN, "prompt", "base"), low=0),
    Claim("Unseen tasks: classification expert beats prompt", "table 2", _POINTS, _TASKS,
          "dispatch", gain(UNSEEN, "classifier", "prompt"), low=0),
    Claim("Unseen tasks: few-shot beats the classification expert", "table 2", _POINTS, _FEW,
          "dispatch", gain(UNSEEN, CEM, "classifier"), low=0),
    Claim("Unseen tasks: few-shot beats the base", "table 2", _POINTS, _FEW,
          "dispatch", gain(UNSEEN, CEM, "base"), low=0),
    Claim(
        "The classification expert names the task better than the prompt", "dispatch analysis",
        "difference in questions of the trained skills named rightly, points",
        "six categories; the base was trained to name them and misses some.",
        "dispatch", lambda row: _dispatched("classifier", row) - _dispatched("prompt", row), low=0,
    ),
    Claim(
        "Three shots suffice to beat the base", "few-shot scaling",
        "difference in greedy accuracy on the unseen tasks, 3 shots less base, points",
        f"{_TASKS} The paper has ARC-Challenge: 82.18 against 80.63.",
        "shots", by_shots(3, 0), low=0,
    ),
    Claim(
        "Accuracy is flat from five shots on", "few-shot scaling",
        "greedy accuracy on the unseen tasks, 20 shots less 5, points",
        f"{_TASKS} The paper has +0.23 on ARC-Challenge; flat means within two points here.",
        "shots", by_shots(20, 5), low=-_FLAT, high=_FLAT,
    ),
    Claim(
        "Mixtures found for unseen tasks are spread over experts", "contribution analysis",
        "effective number of experts of a mixture, (Σα)² / Σα², of four",
        "the paper shows weights and gives no number; here spread means more than 1.5.",
        "dispatch", _spread, low=_SPREAD,
    ),
    Claim(
        "Pass 1 costs less than half of pass 2", "two-pass times",
        "seconds of pass 1 over pass 2, prompt dispatch, a whole set as one batch",
        "the paper has 0.13 (MATH), 0.19 and 0.47 (ARC-Challenge), the bound; answers of at most 8 "
        "tokens here, which no pass 1 is cheap against; other work on the machine.",
        "dispatch", _ratio, high=_PAPER_RATIO,
    ),
)  # fmt: skip


def section(rows: Rows) -> list[str]:
    """Accuracy of every strategy by task, and by the number of shots."""
    lines: list[str] = []
    found, by_count = rows.get("dispatch", ()), rows.get("shots", ())
    for name in (TRAINED, UNSEEN) if len(found) > 1 else ():
        lines += [f"## {name.capitalize()} tasks by strategy", "", _counts(found, name), ""]
        lines += [_examples(), ""] if name == UNSEEN else []
        lines += [*_table([(row[name]["accuracy"]) for row in found], "strategy"), ""]
    if len(by_count) > 1:
        lines += ["## Unseen tasks by shots (CEM, one weight per expert)", ""]
        lines += [*_table([row["accuracy"] for row in by_count], "shots"), ""]
    return lines


def _examples() -> str:
    """One question of each unseen task."""
    said = [f"{name} `{source(1, 'test', 0)[0].prompt}`" for name, source in UNSEEN_TASKS.items()]
    return (
        f"The tasks: {', '.join(said)}. How they were chosen: `python/t2runtime/claims/unseen.py`."
    )


def _counts(found: Sequence[Row], name: str) -> str:
    problems = [sum(row[name]["problems"].values()) for row in found]
    least, most = min(problems), max(problems)
    many = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"Greedy accuracy in % over {len(found)} seeds, {many} mixed problems each, with the 95 % "
        "interval of the mean over tasks."
    )


def _table(found: Sequence[Mapping[str, Mapping[str, float]]], head: str) -> list[str]:
    tasks = list(next(iter(found[0].values())))
    lines = [
        f"| {head} | all | 95 % | {' | '.join(tasks)} |",
        "|---" * (3 + len(tasks)) + "|",
    ]
    for key in found[0]:
        mean, low, high = interval([statistics.fmean(one[key].values()) for one in found])
        each = " | ".join(f"{statistics.fmean(one[key][t] for one in found):.1f}" for t in tasks)
        lines.append(f"| {key} | {mean:.1f} | {low:.1f} to {high:.1f} | {each} |")
    return lines


def draw(rows: Rows, folder: Path) -> dict[str, str]:
    """claims-shots.png, claims-alpha.png and claims-alpha-layers.png, as far as there are rows."""
    from t2runtime.claims import pictures

    made: dict[str, str] = {}
    found, by_count = rows.get("dispatch", ()), rows.get("shots", ())
    if len(by_count) > 1:
        made |= pictures.shots(folder / "claims-shots.png", _curve(by_count))
    if found:
        table = {
            task: alpha for name in (TRAINED, UNSEEN) for task, alpha in _mean(found, name, CEM)
        }
        made |= pictures.alpha(folder / "claims-alpha.png", table, _experts(found))
        layers = {
            task: alpha for name in (TRAINED, UNSEEN) for task, alpha in _mean(found, name, LAYERS)
        }
        made |= pictures.alpha_layers(folder / "claims-alpha-layers.png", layers, _experts(found))
    return made


def _curve(rows: Sequence[Row]) -> dict[int, tuple[float, float, float]]:
    return {
        int(count): interval([_with_shots(row, count) for row in rows])
        for count in rows[0]["accuracy"]
    }


def _experts(rows: Sequence[Row]) -> list[str]:
    return [key.removeprefix("expert ") for key in rows[0][TRAINED]["accuracy"] if "expert " in key]


def _mean(rows: Sequence[Row], name: str, strategy: str) -> list[tuple[str, Any]]:
    """[(task, mean over seeds of alpha, (K,) or (L, K))]."""
    import torch

    return [
        (task, torch.tensor([row[name]["alpha"][strategy][task] for row in rows]).mean(0).tolist())
        for task in rows[0][name]["alpha"][strategy]
    ]
