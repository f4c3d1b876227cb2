"""The demo's plot: base against expert with intervals, learning curves, cost of each form."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save(results: dict[str, Any], path: Path) -> bool:
    """Draw to `path`; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bars, curves, cost) = pyplot.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    skills = results["skills"]
    for shift, name, colour in ((-0.2, "base", "#9aa5b1"), (0.2, "expert", "#2f6fab")):
        values = [100 * skill[name]["accuracy"] for skill in skills.values()]
        low = [
            v - 100 * s[name]["interval"][0] for v, s in zip(values, skills.values(), strict=True)
        ]
        high = [
            100 * s[name]["interval"][1] - v for v, s in zip(values, skills.values(), strict=True)
        ]
        at = [i + shift for i in range(len(skills))]
        bars.bar(at, values, 0.4, yerr=[low, high], label=name, color=colour, capsize=3)
    bars.set_xticks(range(len(skills)), list(skills))
    bars.set_ylabel("greedy accuracy, %")
    bars.set_title("held-out problems, 95 % intervals")
    bars.set_ylim(0, 100)
    # Below the axes: inside, it would lie on the bars.
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
    for name, curve in results["curves"].items():
        (line,) = curves.plot(range(1, len(curve) + 1), [100 * v for v in curve], label=name)
        if name in results["stopped_early"]:
            curves.plot(len(curve), 100 * curve[-1], "o", color=line.get_color(), clip_on=False)
    if results["stopped_early"]:
        curves.plot([], [], "o", color="black", label="stopped early")
    curves.set_xlabel("REINFORCE step")
    curves.set_ylabel("sampled accuracy, %")
    curves.set_title("training of z")
    curves.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)
    forms = results["cost"]
    medians = [form["median"] for form in forms.values()]
    spread = [
        [form["median"] - form["low"] for form in forms.values()],
        [form["high"] - form["median"] for form in forms.values()],
    ]
    cost.barh(list(forms), medians, xerr=spread, capsize=3, color="#2f6fab")
    cost.invert_yaxis()
    cost.set_xlabel("tokens per second, median and range")
    cost.set_title("cost of each form")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
