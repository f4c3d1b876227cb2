"""Which form of the CUDA kernels wins where, from what ``bench_svf.py --forms`` wrote.

    python benchmarks/forms.py out/forms.json

Prints the times and, in the end, the rules for ``t2kernels/ops/cuda_forms.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))

from results import read

Row = dict[str, Any]
PREFIX = "ours cuda "


def times(rows: list[Row]) -> dict[tuple[str, str, int], dict[str, Row]]:
    """Rows with one diagonal, by (dtype, shape, tokens) and "form tile"."""
    found: dict[tuple[str, str, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["name"].startswith(PREFIX) and row["slots"] == 1 and "time_us" in row:
            form = row["name"].removeprefix(PREFIX)
            found[row["dtype"], row["shape"], row["tokens"]][form] = row
    return dict(found)


def elements(shape: str) -> int:
    """Of U and V together."""
    n, m = map(int, shape.split("x"))
    return min(n, m) * (n + m)


def winners(found: dict[tuple[str, str, int], dict[str, Row]]) -> dict[tuple[int, int], str]:
    """By (elements, tokens): the form with the least time, as a mean of ratios over dtypes and
    over shapes of one size."""
    ratios: dict[tuple[int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (_, shape, tokens), row_of in found.items():
        best = min(row["time_us"] for row in row_of.values())
        for form, row in row_of.items():
            ratios[elements(shape), tokens][form].append(row["time_us"] / best)
    chosen = {}
    for place, by_form in ratios.items():
        most = max(map(len, by_form.values()))
        # A form that cannot run every dtype is no rule for all of them.
        complete = {form: values for form, values in by_form.items() if len(values) == most}
        chosen[place] = min(complete, key=lambda form: statistics.geometric_mean(complete[form]))
    return chosen


def rules(chosen: dict[tuple[int, int], str]) -> list[tuple[int, float, str]]:
    """(tokens, elements, "form tile"), the first that holds decides; what is larger than any size
    measured counts as the largest."""
    out: list[tuple[int, float, str]] = []
    sizes = sorted({size for size, _ in chosen})
    for size in sizes:
        limit = float("inf") if size == sizes[-1] else float(size)
        own = sorted((tokens, form) for (at, tokens), form in chosen.items() if at == size)
        for position, (tokens, form) in enumerate(own):
            if position + 1 == len(own) or own[position + 1][1] != form:
                out.append((tokens, limit, form))
    return out


def render(found: dict[tuple[str, str, int], dict[str, Row]]) -> str:
    """The table and the rules."""
    forms = sorted({form for row_of in found.values() for form in row_of})
    lines = ["us per call; * wins; in brackets % of the floor, time over three-op and over dense"]
    for (dtype, shape, tokens), row_of in found.items():
        best = min(row_of, key=lambda form: row_of[form]["time_us"])
        cells = [
            f"{form}{'*' if form == best else ''} {row_of[form]['time_us']:.1f}"
            for form in forms
            if form in row_of
        ]
        row = row_of[best]
        ratios = [row.get("ratio_three_op"), row.get("ratio_dense")]
        shown = [f"{row['percent_of_floor']:.0f} %"]
        shown += ["–" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"{dtype:5}{shape:>12} T={tokens:<4} {'  '.join(cells)}  [{', '.join(shown)}]")
    lines.append("RULES = (")
    for tokens, limit, form in rules(winners(found)):
        size = 'float("inf")' if limit == float("inf") else f"{limit:.0f}"
        name, tile = form.split()
        lines.append(f'    Rule({tokens}, {size}, "{name}", "{tile}"),')
    return "\n".join([*lines, ")"])


def main() -> int:
    """0; prints that nothing was measured where no form was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="written by bench_svf.py --forms --json")
    found = times(read(parser.parse_args().file)["rows"])
    print(render(found) if found else "no form of the CUDA kernels was measured: no GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
