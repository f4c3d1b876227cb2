"""Draw a result file of bench_svf.py: time against tokens, one panel per dtype and shape.

python benchmarks/plot.py benchmarks/results/cpu-quick.json out.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from results import read

# What is drawn: (contestant, slots) -> (label, colour, line style). Colour-blind safe.
_LINES = {
    ("dense", 1): ("dense (= merged)", "#000000", ":"),
    ("three-op", 1): ("three-op torch", "#999999", "-"),
    ("rebuilt W'", 1): ("rebuilt W'", "#cc79a7", "--"),
    ("PEFT LoRA", 64): ("PEFT LoRA, up to 64 adapters", "#e69f00", "--"),
    ("LoRA bmm", 64): ("LoRA bmm, up to 64 adapters", "#56b4e9", "--"),
    ("ours delta k=256", 1): ("ours, delta k=256", "#009e73", "-."),
    ("ours", 1): ("ours, one diagonal", "#0072b2", "-"),
    ("ours", 64): ("ours, up to 64 diagonals", "#d55e00", "-"),
}


def draw(result: dict[str, Any], path: Path) -> None:
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
            for (name, slots), (label, colour, style) in _LINES.items():
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
    environment = result["environment"]
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    title = f"{where}, torch {environment['torch']}, {environment['commit']}"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draw one file."""
    parser = argparse.ArgumentParser(prog="plot", description="Draw a result of bench_svf.py.")
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
