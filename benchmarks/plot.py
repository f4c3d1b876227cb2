"""Draw a result file of bench_svf.py (time against tokens, one panel per dtype and shape), of
bench_model.py (tokens per second against those of the dense model, one panel per stage), of
bench_parts.py (time of a group against tokens) or of bench_overhead.py (time of a call).

    python benchmarks/plot.py benchmarks/results/cpu-decode.json out.png
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))

from results import read

# What is drawn: (contestant, one or many slots) -> (label, colour, line style). Colour-blind safe.
_LINES = {
    ("dense", False): ("dense (= merged)", "#000000", ":"),
    ("three-op", False): ("three-op torch", "#999999", "-"),
    ("rebuilt W'", False): ("rebuilt W'", "#cc79a7", "--"),
    ("PEFT LoRA", True): ("PEFT LoRA, up to {} adapters", "#e69f00", "--"),
    ("LoRA bmm", True): ("LoRA bmm, up to {} adapters", "#56b4e9", "--"),
    ("ours delta k=256", False): ("ours, delta k=256", "#009e73", "-."),
    ("ours", False): ("ours, one diagonal", "#0072b2", "-"),
    ("ours", True): ("ours, up to {} diagonals", "#d55e00", "-"),
    ("ours cuda", False): ("ours cuda, one diagonal", "#0072b2", "--"),
    ("ours cuda", True): ("ours cuda, up to {} diagonals", "#d55e00", "--"),
    ("ours triton", False): ("ours triton, one diagonal", "#0072b2", ":"),
    ("ours triton", True): ("ours triton, up to {} diagonals", "#d55e00", ":"),
}
# How the members of a group are called -> (label, line style).
_FORMS = {"group": ("one call", "-"), "calls": ("one a member", "--")}
_STYLES = {"bf16": "-", "int8": "--", "fp8": ":"}
_COLOURS = {"all-linear": "#0072b2", "mlp": "#d55e00"}


def draw(result: dict[str, Any], path: Path) -> None:
    """A PNG of what the benchmark is about; ValueError where nothing of it is drawn."""
    # bench_svf.py writes no name, and alone has a list of training steps.
    name = result.get("benchmark", "svf" if "training" in result else None)
    kinds = {"svf": draw_layers, "model": draw_model, "parts": draw_parts,
             "overhead": draw_overhead}  # fmt: skip
    if name not in kinds:
        raise ValueError(
            "only results of bench_svf.py, bench_model.py, bench_parts.py and bench_overhead.py "
            f"can be drawn; this is one of {name or 'another benchmark'}"
        )
    kinds[name](result, path)


def draw_model(result: dict[str, Any], path: Path) -> None:
    """A PNG with the speed of the fastest form of each kind, as a share of the dense model's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in result["rows"] if r.get("targets") and "of_dense" in r]
    if not rows:
        raise ValueError("the result holds no speeds")
    stages = list(dict.fromkeys(r["stage"] for r in rows))
    figure, axes = pyplot.subplots(
        1, len(stages), figsize=(4.6 * len(stages) + 2, 3.6), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for axis, stage in zip(axes[0], stages):
        here = [r for r in rows if r["stage"] == stage]
        for targets, kind in dict.fromkeys((r["targets"], r["factors"]) for r in here):
            own = [r for r in here if (r["targets"], r["factors"]) == (targets, kind)]
            best = {b: max(r["of_dense"] for r in own if r["requests"] == b)
                    for b in sorted({r["requests"] for r in own})}  # fmt: skip
            label = f"{targets}, {kind}"
            (handles[label],) = axis.plot(
                list(best), list(best.values()), _STYLES[kind], color=_COLOURS[targets],
                marker="o", markersize=3, label=label,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="requests, a mixture each", title=stage)
        axis.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.grid(True, which="major", alpha=0.3)
    axes[0, 0].set_ylabel("tokens/s / dense model")
    _finish(figure, handles, result, path)


def draw_parts(result: dict[str, Any], path: Path) -> None:
    """A PNG with the times of groups as one call and as one call a member, by backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in result["rows"] if r["part"] == "group" and "time_us" in r]
    if not rows:
        raise ValueError("the result holds no times of groups")
    groups, dtypes = (list(dict.fromkeys(r[key] for r in rows)) for key in ("group", "dtype"))
    names = list(dict.fromkeys(r["name"] for r in rows))
    figure, axes = pyplot.subplots(
        len(dtypes), len(groups), figsize=(4.2 * len(groups) + 2.6, 3 * len(dtypes) + 0.6),
        squeeze=False, sharex=True, layout="constrained",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for (i, dtype), (j, group) in product(enumerate(dtypes), enumerate(groups)):
        for (k, name), form in product(enumerate(names), _FORMS):
            own = sorted(
                (r["tokens"], r["time_us"])
                for r in rows
                if (r["dtype"], r["group"], r["name"], r["form"]) == (dtype, group, name, form)
            )
            if own:
                label = f"{name}, {_FORMS[form][0]}"
                (handles[label],) = axes[i, j].plot(
                    *zip(*own), _FORMS[form][1], color=f"C{k}", marker="o", markersize=3
                )
        axes[i, j].set(xscale="log", yscale="log", title=f"{dtype}, {group}")
        axes[i, j].grid(True, which="major", alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    for axis in axes[:, 0]:
        axis.set_ylabel("microseconds")
    _finish(figure, handles, result, path)


def draw_overhead(result: dict[str, Any], path: Path) -> None:
    """A PNG with a bar for every kind of call, and the quartiles of its time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"][::-1]  # the first at the top
    if not rows:
        raise ValueError("the result holds no times")
    figure, axis = pyplot.subplots(figsize=(7, 0.4 * len(rows) + 1.2), layout="constrained")
    middle = [r["us"] for r in rows]
    spread = [[r["us"] - r["q1_us"] for r in rows], [r["q3_us"] - r["us"] for r in rows]]
    bars = axis.barh([r["name"] for r in rows], middle, xerr=spread, color="#0072b2", capsize=2)
    axis.bar_label(bars, fmt="%.1f", padding=6, fontsize=8)
    axis.set_xlabel("microseconds a call")
    axis.margins(x=0.15)
    _finish(figure, {}, result, path)


def _finish(figure: Any, handles: dict[str, Any], result: dict[str, Any], path: Path) -> None:
    """Title, legend and file."""
    from matplotlib import pyplot

    environment = result["environment"]
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    title = f"{where}, torch {environment['torch']}, {environment['commit']}"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_layers(result: dict[str, Any], path: Path) -> None:
    """A PNG with the time of every drawn contestant, relative to the three-op form."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in result["rows"] if "time_us" in r]
    if not rows:
        raise ValueError("the result holds no times")
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    figure, axes = pyplot.subplots(
        len(dtypes), len(shapes), figsize=(4.2 * len(shapes) + 2.6, 3.2 * len(dtypes) + 0.6),
        squeeze=False, sharex=True, layout="constrained",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for line, dtype in zip(axes, dtypes):
        for axis, shape in zip(line, shapes):
            here = [r for r in rows if r["shape"] == shape and r["dtype"] == dtype]
            most = max(r["slots"] for r in here) if here else 1
            for (name, many), (label, colour, style) in _LINES.items():
                slots, label = most if many else 1, label.format(most)
                own = sorted(
                    (r["tokens"], r["ratio_three_op"], r["interval_three_op"])
                    for r in here
                    if (r["name"], r["slots"]) == (name, slots) and "ratio_three_op" in r
                )
                if not own:
                    continue
                tokens, ratios, spread = zip(*own)
                (handles[label],) = axis.plot(
                    tokens, ratios, style, color=colour, marker="o", markersize=3, label=label
                )
                low, high = zip(*spread)
                axis.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set(xscale="log", yscale="log", title=f"{dtype}, {shape}")
            axis.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
            axis.grid(True, which="major", alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    for axis in axes[:, 0]:
        axis.set_ylabel("time / three-op")
    _finish(figure, handles, result, path)


def main(argv: list[str] | None = None) -> int:
    """Draw one file; 1 where it cannot be drawn."""
    parser = argparse.ArgumentParser(prog="plot", description="Draw results of benchmarks.")
    parser.add_argument("result", type=Path, help="JSON file")
    parser.add_argument("png", type=Path, nargs="?", help="default: beside the file")
    args = parser.parse_args(argv)
    try:
        draw(read(args.result), args.png or args.result.with_suffix(".png"))
    except (OSError, ValueError, ImportError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
