"""The goals for a CPU, and what a run says about each of them; for a GPU: ``gpu_goals.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

Row = dict[str, Any]
NOTHING = "not in this run"


@dataclass(frozen=True)
class Outcome:
    """One goal: the worst of what was measured, where, and whether that is within the goal."""

    goal: str
    limit: str
    measured: str
    met: bool | None  # None: the run holds no row that bears on it
    table: str = ""  # of the goals for a GPU, and the phase of gpu.py that measures this one
    phase: str = ""
    # Of the points that the goal names, how many were measured. Both 0: it names none.
    covered: int = 0
    wanted: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _where(row: Row) -> str:
    if "where" in row:
        return str(row["where"])
    slots = f" slots={row['slots']}" if row.get("slots", 1) > 1 else ""
    return f"{row['dtype']} {row['shape']} T={row['tokens']}{slots}"


def worst(
    goal: str,
    limit: float,
    pairs: Iterable[tuple[float, Row]],
    *,
    at_least: bool = False,
    percent: bool = False,
    interval: str | None = None,
) -> Outcome:
    """The pair farthest on the wrong side decides; how many miss is said too."""
    values = list(pairs)
    unit = " %" if percent else ""
    shown_limit = f"{'≥' if at_least else '≤'} {limit:g}{unit}"
    if not values:
        return Outcome(goal, shown_limit, NOTHING, None)
    sign = -1 if at_least else 1
    value, row = max(values, key=lambda pair: sign * pair[0])
    missed = sum(sign * v > sign * limit for v, _ in values)
    text = f"worst {value:.{2 if percent else 3}f}{unit} at {_where(row)}"
    low_high = row.get(interval) if interval else None
    if low_high:
        text += f" (95 %: {low_high[0]:.2f}–{low_high[1]:.2f})"
    text += f"; {len(values) - missed} of {len(values)} rows within"
    return Outcome(goal, shown_limit, text, missed == 0)


def _select(
    rows: Iterable[Row], name: str, key: str, where: Callable[[Row], bool]
) -> Iterator[tuple[float, Row]]:
    for row in rows:
        if row["name"] == name and row.get(key) is not None and where(row):
            yield row[key], row


def _relative(rows: list[Row], name: str, to: Callable[[Row], tuple[str, int]]) -> Iterator[Any]:
    """Times of rows called ``name`` over the time of another contestant in the same line-up."""
    times = {
        (r["name"], r["slots"], r["shape"], r["dtype"], r["tokens"]): r["time_us"]
        for r in rows
        if "time_us" in r
    }
    for row in rows:
        if row["name"] != name or "time_us" not in row:
            continue
        other = times.get((*to(row), row["shape"], row["dtype"], row["tokens"]))
        if other is not None:
            yield row["time_us"] / other, row


def _bits(goal: str, rows: list[Row], key: str, names: tuple[str, ...]) -> Outcome:
    found = [r for r in rows if r.get(key) is not None and r["name"].startswith(names)]
    if not found:
        return Outcome(goal, "equal", NOTHING, None)
    bad = [r for r in found if not r[key]]
    text = f"equal in {len(found) - len(bad)} of {len(found)} rows"
    if bad:
        text += f"; first difference: {bad[0]['name']}, {_where(bad[0])}"
    return Outcome(goal, "equal", text, not bad)


def evaluate(rows: list[Row], training: list[Row]) -> list[Outcome]:
    """Every goal against the rows of a run."""

    def square(r: Row) -> bool:
        first, _, second = r["shape"].partition("x")
        return first == second

    def within(dtype: str, low: int, high: int) -> Callable[[Row], bool]:
        return lambda r: r["dtype"] == dtype and low <= r["tokens"] <= high

    three, spread = "ratio_three_op", "interval_three_op"
    ours = ("ours",)
    factorised = [r for r in training if r["name"].startswith(ours) and "weight_sized_buffer" in r]
    held = sum(bool(r["weight_sized_buffer"]) for r in factorised)
    largest = max((r["largest_mem_mib"] for r in factorised), default=0.0)
    return [
        worst(
            "bf16 native, T 1–8, time against three-op", 0.75,
            _select(rows, "ours native", three, within("bf16", 1, 8)), interval=spread,
        ),
        worst(
            "bf16 native, T 1–4, share of the read bandwidth", 85,
            _select(rows, "ours native", "percent_of_bandwidth", within("bf16", 1, 4)),
            at_least=True, percent=True,
        ),
        worst(
            "fp32 native, T 2–4, time against three-op", 0.40,
            _select(rows, "ours native", three, within("fp32", 2, 4)), interval=spread,
        ),
        worst(
            "fp32 native, T 5–16, time against three-op", 0.60,
            _select(rows, "ours native", three, within("fp32", 5, 16)), interval=spread,
        ),
        worst(
            "int8 factors, T 1–4, time against three-op bf16", 0.45,
            _select(rows, "ours native", three, within("int8", 1, 4)), interval=spread,
        ),
        worst(
            "int8 factors, T 1–4, square, time against dense bf16", 1.0,
            _select(
                rows, "ours native", "ratio_dense",
                lambda r: within("int8", 1, 4)(r) and square(r),
            ),
        ),
        *(
            worst(
                f"{kind} factors, relative output error", limit,
                (
                    (100 * v, r)
                    for v, r in _select(rows, "ours", "factor_error", within(kind, 1, 1 << 30))
                ),
                percent=True,
            )
            for kind, limit in (("int8", 1.5), ("fp8", 4.0))
        ),
        worst(
            "the policy's choice, any T and dtype, time against three-op", 1.03,
            _select(rows, "ours", three, lambda r: True), interval=spread,
        ),
        worst(
            "64 different slots, time against one", 1.05,
            ((v, r) for v, r in _relative(rows, "ours", lambda r: ("ours", 1)) if r["slots"] == 64),
        ),
        _bits("batch-invariant: a row alone and in a batch", rows, "same_bits_alone", ours),
        worst(
            "batch-invariant: time against the policy's choice, decode", 1.2,
            _relative(rows, "ours invariant", lambda r: ("ours", r["slots"])),
        ),
        _bits("run to run: the same bits", rows, "same_bits_again", ours),
        Outcome(
            "training step, factorised: buffers of the weight's size", "none",
            f"{held} of {len(factorised)} rows hold one; largest buffer {largest:.1f} MiB",
            not held,
        ) if factorised else Outcome(
            "training step, factorised: buffers of the weight's size", "none",
            NOTHING, None,
        ),
    ]  # fmt: skip


def render(outcomes: Iterable[Outcome]) -> str:
    """The summary at the end of a run."""
    marks = {True: "met", False: "NOT MET", None: "no data"}
    lines = ["goals"]
    for o in outcomes:
        lines.append(f"  {marks[o.met]:8} {o.goal}: {o.limit}")
        lines.append(f"           {o.measured}")
    return "\n".join(lines)
