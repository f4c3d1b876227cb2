"""From rows to a table, answers and a picture. Intervals are Student's, over seeds and tasks."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2runtime.evidence.grid import QUESTIONS, Question
from t2runtime.evidence.intervals import interval
from t2runtime.evidence.ledger import Row


def accuracy(row: Row) -> float:
    """Share of right answers after training, in percent."""
    return float(100 * row["trained"] / row["problems"])


def answer(question: Question, rows: Sequence[Row]) -> dict[str, Any]:
    """The difference first − second in points, paired by task and seed, and what it says."""

    def by_pair(arm: str) -> dict[tuple[str, int], float]:
        return {(r["task"], r["seed"]): accuracy(r) for r in rows if r["arm"] == arm}

    first, second = by_pair(question.first), by_pair(question.second)
    mean, low, high = interval([first[pair] - second[pair] for pair in first if pair in second])
    verdict = "first is better" if low > 0 else "second is better" if high < 0 else "undecided"
    return {
        "question": question.text, "first": question.first, "second": question.second,
        "paper": question.paper, "difference": mean, "interval": (low, high), "outcome": verdict,
    }  # fmt: skip


def arms(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line an arm and task: accuracy over seeds, size, time, memory."""
    lines = []
    for arm, task in dict.fromkeys((row["arm"], row["task"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["task"]) == (arm, task)]
        mean, low, high = interval([accuracy(row) for row in own])
        lines.append({
            "arm": arm, "task": task, "seeds": len(own), "lr": own[0]["lr"],
            "base": statistics.fmean(100 * row["base"] / row["problems"] for row in own),
            "accuracy": mean, "interval": (low, high), "values": own[0]["values"],
            "seconds": statistics.median(row["seconds"] for row in own),
            "peak_mib": statistics.median(row["peak_mib"] for row in own),
            "training_mib": _median([row["training_mib"] for row in own if "training_mib" in row]),
        })  # fmt: skip
    return lines


def _median(values: Sequence[float]) -> float | None:
    """None where no row has the value: rows of an earlier version stay good."""
    return statistics.median(values) if values else None


def write(
    out: Path,
    environment: dict[str, Any],
    rates: dict[str, float],
    compared: Sequence[Row],
    told: Sequence[Row],
) -> None:
    """evidence.json, evidence.md and, where matplotlib is installed, evidence.png."""
    answers = [answer(question, compared) for question in QUESTIONS]
    lines, stories = arms(compared), arms(told)
    runs = [{k: v for k, v in row.items() if k != "key"} for row in (*compared, *told)]
    result = {
        "environment": environment, "rates": rates, "answers": answers, "arms": lines,
        "stories": stories, "runs": runs,
    }  # fmt: skip
    (out / "evidence.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = _markdown(environment, answers, lines, stories)
    (out / "evidence.md").write_text(text, encoding="utf-8")
    _draw(out / "evidence.png", lines)


def _markdown(
    environment: dict[str, Any], answers: list[Any], lines: list[Any], stories: list[Any]
) -> str:
    seeds = min(line["seeds"] for line in lines)
    facts = ", ".join(f"{name} {value}" for name, value in environment.items())
    parts = [
        "# Evidence", "",
        f"Small base model of the package, {seeds} seeds, equal budgets of answers, learning",
        "rates chosen on validation with another seed, greedy accuracy on held-out problems, 95 %",
        f"Student intervals. One thread; {facts}.", "",
        "training MiB: tensors at the peak of a step beyond the base model, those that the method",
        "adds to it included. process peak MiB: resident memory, with torch and its libraries.", "",
        "| question | difference, points | 95 % | outcome | the paper |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for found in answers:
        low, high = found["interval"]
        parts.append(
            f"| {found['question']} | {found['difference']:+.1f} | {low:+.1f} to {high:+.1f} | "
            f"{found['outcome']} | {found['paper']} |"
        )
    parts += ["", *_table(lines)]
    if stories:
        parts += ["", "Stories (share of sampled continuations with the property):", ""]
        parts += _table(stories)
    return "\n".join(parts) + "\n"


def _table(lines: list[Any]) -> list[str]:
    head = (
        "| arm | task | lr | values | base | trained, % | 95 % | CPU s | training MiB "
        "| process peak MiB |"
    )
    rows = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for line in lines:
        low, high = line["interval"]
        training = line["training_mib"]
        rows.append(
            f"| {line['arm']} | {line['task']} | {line['lr']:g} | {line['values']:,} | "
            f"{line['base']:.1f} | {line['accuracy']:.1f} | {low:.1f} to {high:.1f} | "
            f"{line['seconds']:.0f} | {'–' if training is None else f'{training:.1f}'} | "
            f"{line['peak_mib']:.0f} |"
        )
    return rows


def _draw(path: Path, lines: list[Any]) -> None:
    """Accuracy of every arm, a panel a task."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(5.5 * len(tasks), 4.5), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        own = [line for line in lines if line["task"] == task][::-1]
        means = [line["accuracy"] for line in own]
        halves = [line["interval"][1] - line["accuracy"] for line in own]
        panel.errorbar(means, [line["arm"] for line in own], xerr=halves, fmt="o", capsize=3)
        panel.axvline(own[0]["base"], color="grey", linestyle="--", label="base")
        panel.set(title=task, xlabel="greedy accuracy, %, 95 % interval over seeds", xlim=(0, 102))
        panel.legend()
    figure.savefig(path, dpi=120)
