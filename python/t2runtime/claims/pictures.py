"""Pictures of the claims: accuracy against shots, and alpha as heat maps. Without matplotlib there
are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_DPI = 90


def _figure(width: float, height: float) -> Any:
    """None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def shots(path: Path, curve: Mapping[int, tuple[float, float, float]]) -> dict[str, str]:
    """{shots: (mean, low, high)}; 0 shots, the base, is a dashed line."""
    figure = _figure(4.6, 3.2)
    if figure is None:
        return {}
    panel = figure.subplots()
    counts = [n for n in curve if n]
    means = [curve[n][0] for n in counts]
    halves = [curve[n][2] - curve[n][0] for n in counts]
    panel.errorbar(counts, means, yerr=halves, fmt="o-", capsize=3, label="few-shot, CEM")
    if 0 in curve:
        panel.axhline(curve[0][0], color="grey", linestyle="--", label="base")
    panel.set(title="unseen tasks", xlabel="shots", xticks=counts, ylabel="greedy accuracy, %")
    panel.legend()
    figure.savefig(path, dpi=_DPI)
    return {path.name: "accuracy against the number of shots, with 95 % intervals over seeds"}


def alpha(path: Path, table: Mapping[str, Sequence[float]], names: Sequence[str]) -> dict[str, str]:
    """{task: weight of each expert} as one heat map with its numbers."""
    figure = _figure(1.5 + 0.9 * len(names), 1.0 + 0.32 * len(table))
    if figure is None:
        return {}
    panel = figure.subplots()
    values = [list(row) for row in table.values()]
    panel.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            dark = "white" if value > 0.6 else "black"
            panel.text(x, y, f"{value:.2f}", ha="center", va="center", color=dark)
    panel.set_xticks(range(len(names)), list(names))
    panel.set_yticks(range(len(table)), list(table))
    figure.savefig(path, dpi=_DPI)
    return {path.name: "weight of each expert found by CEM for each task, mean over seeds"}


def alpha_layers(
    path: Path, table: Mapping[str, Sequence[Sequence[float]]], names: Sequence[str]
) -> dict[str, str]:
    """{task: weights (L, K)} as a narrow heat map a task, layers from top to bottom."""
    layers = max(len(rows) for rows in table.values())
    figure = _figure(1.2 * len(table), 1.4 + 0.12 * layers)
    if figure is None:
        return {}
    panels = figure.subplots(1, len(table), squeeze=False, sharey=True)[0]
    for panel, (task, rows) in zip(panels, table.items(), strict=True):
        shown = panel.imshow(
            [list(row) for row in rows], vmin=0, vmax=1, cmap="Blues", aspect="auto"
        )
        panel.set_title(task.replace(", ", ",\n"), fontsize=8)
        panel.set_xticks(range(len(names)), list(names), rotation=90, fontsize=8)
    panels[0].set_ylabel("layer (matrix), from the input on")
    figure.colorbar(shown, ax=list(panels), label="α")
    figure.savefig(path, dpi=_DPI)
    return {path.name: "weights per layer found by CEM for each task, mean over seeds"}
