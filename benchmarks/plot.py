"""Draw a result file of bench_svf.py (time against tokens, one panel per dtype and shape) or of
bench_model.py (tokens per second against those of the dense model, one panel per stage).

python benchmarks/plot.py benchmarks/results/cpu-quick.json out.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

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
_STYLES = {"bf16": "-", "int8": "--", "fp8": ":"}
_COLOURS = {"all-linear": "#0072b2", "mlp": "#d55e00"}


def draw(result: dict[str, Any], path: Path) -> None:
    """A PNG of what the benchmark is about."""
    (draw_model if result.get("benchmark") == "model" else draw_layers)(result, path)


def draw_model(result: dict[str, Any], path: Path) -> None:
    """A PNG with the speed of the fastest form of each kind, as a share of the dense model's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in result["rows"] if r.get("targets") and "of_dense" in r]
    if not rows:
        raise ValueError("plot: the result holds no speeds")
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


def _finish(figure: Any, handles: dict[str, Any], result: dict[str, Any], path: Path) -> None:
    """Title, legend and file."""
    from matplotlib import pyplot

    environment = result["environment"]
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    title = f"{where}, torch {environment['torch']}, {environment['commit']}"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
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
        raise ValueError("plot: the result holds no times")
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
    """Draw one file."""
    parser = argparse.ArgumentParser(
        prog="plot", description="Draw a result of bench_svf.py or bench_model.py."
    )
    parser.add_argument("result", type=Path, help="JSON file")
    parser.add_argument("png", type=Path)
    args = parser.parse_args(argv)
    try:
        draw(read(args.result), args.png)
    except (OSError, ValueError, ImportError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
