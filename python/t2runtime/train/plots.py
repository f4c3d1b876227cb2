"""The picture of a run, where matplotlib is installed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
_BLUE, _GREY, _RED = "#2f6fab", "#9aa5b1", "#b5482f"


def _pyplot() -> Any:
    """matplotlib's pyplot without a window, None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        logger.info("no plots: pip install 't2kernels[plot]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_run(metrics: Path, path: Path) -> bool:
    """Reward, KL, accuracy and the change of each layer over the steps of a metrics.jsonl, as a
    PNG; False without matplotlib.
    """
    pyplot = _pyplot()
    if pyplot is None:
        return False
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if not lines:
        raise ValueError(f"{metrics} holds no steps to draw")
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    (first, divergence), (accuracy, layers) = axes
    name = "reward" if "reward" in lines[0] else "loss"
    steps = [line["step"] for line in lines]
    for axis, key in ((first, name), (divergence, "kl")):
        axis.plot(steps, [line[key] for line in lines], color=_BLUE)
        axis.set_xlabel("step")
    first.set_title(f"mean {name}")
    divergence.set_title("KL to the base, per answer" if name == "reward" else "KL to the base")
    _accuracies(accuracy, lines)
    _changes(figure, layers, lines)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _accuracies(axis: Any, lines: list[dict[str, Any]]) -> None:
    sampled = [(n["step"], n["sampled_accuracy"]) for n in lines if "sampled_accuracy" in n]
    checked = [(n["step"], n["validation"]) for n in lines if "validation" in n]
    if sampled:
        axis.plot(*zip(*sampled, strict=True), color=_GREY, label="of samples, training")
    if checked:
        axis.plot(*zip(*checked, strict=True), "o-", color=_BLUE, label="greedy, validation")
        base = next(n["base_validation"] for n in lines if "validation" in n)
        axis.axhline(base, color=_RED, linestyle="--", label="greedy, base")
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("step")
    axis.set_title("accuracy")
    axis.legend(fontsize="small")


def _changes(figure: Any, axis: Any, lines: list[dict[str, Any]]) -> None:
    """How far each layer has moved at each validation, as a map."""
    moved = [line for line in lines if "moved" in line]
    axis.set_title("change of each layer (root mean square)")
    if not moved:
        axis.set_axis_off()
        return
    names = list(moved[0]["moved"])
    table = [[line["moved"][name] for line in moved] for name in names]
    image = axis.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=axis)
    every = max(1, len(moved) // 6)
    axis.set_xticks(range(0, len(moved), every), [m["step"] for m in moved][::every])
    axis.set_xlabel("step")
    _label_layers(axis, names)


def _label_layers(axis: Any, names: list[str]) -> None:
    """The layers' names, without what all begin with; not more than fit."""
    common = 0
    while len(names) > 1 and len({name[: common + 1] for name in names}) == 1:
        common += 1
    every = max(1, -(-len(names) // 40))
    axis.set_yticks(range(0, len(names), every), [name[common:] for name in names][::every])
    axis.tick_params(axis="y", labelsize=6)
