"""What the result files of a GPU say about a goal: values, and at which of the wanted points.

Rows of a line-up are compared with rows of the same line-up of the same run only. "Ours" is the
fastest of our kernels there (cuda, triton, native), since the table of defaults is filled from
these very measurements; the row says which. Our forms of plain torch operations do not count: they
are the library's products, which a goal compares with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from goals import Row

KERNELS = ("cuda", "triton", "native")
LORA = ("LoRA bmm", "LoRA gathered")
_NOT_PLAIN = ("invariant", "eager", "delta", "recompute")
_WRONG = ("refused", "failed")

Pairs = Iterator[tuple[float, Row]]
Rows = dict[str, list[Row]]  # by benchmark; "training" of bench_svf apart
Point = tuple[Any, ...]


@dataclass(frozen=True)
class Measure:
    """``pairs``: values with the rows that they come from. ``points``: where the goal wants a
    value. ``wrong``: rows of ours without a value, since the result was refused or the call failed.
    """

    pairs: Callable[[Rows], Pairs]
    points: frozenset[Point]
    wrong: Callable[[Rows], list[Row]]
    # Whether a wrong row decides: where the value itself says nothing about being right.
    wrong_decides: bool = False
    of: Callable[[Row], Point] = lambda row: (row["shape"], row["dtype"], row["tokens"])


@dataclass(frozen=True)
class Lines:
    """Which line-ups a goal is about: those that must be there, and up to which T all others are
    judged that are."""

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...] = ("bf16",)
    others: tuple[str, ...] = ()  # dtypes that are judged where they are

    @property
    def points(self) -> frozenset[Point]:
        return frozenset(itertools.product(self.shapes, self.dtypes, self.tokens))

    def of(self, rows: Iterable[Row]) -> list[Row]:
        """One T means this T; several mean all between the smallest and the largest."""
        low, high = min(self.tokens), max(self.tokens)
        return [
            r for r in rows
            if r["shape"] in self.shapes and r["dtype"] in (*self.dtypes, *self.others)
            and low <= r["tokens"] <= high
        ]  # fmt: skip


def _plain(name: str) -> bool:
    """Our forward or training step as it is by default, by whichever backend."""
    return name.split()[0] == "ours" and not any(word in name for word in _NOT_PLAIN)


def _kernel(name: str) -> bool:
    """By one of our kernels, asked for by name: what the policy takes may be plain torch."""
    return any(word in KERNELS for word in name.split())


def _ours(name: str) -> bool:
    return _plain(name) and _kernel(name)


def _key(row: Row) -> Point:
    return (row["run"], row["shape"], row["dtype"], row["tokens"])


def _where(row: Row) -> str:
    return f"{row['dtype']} {row['shape']} T={row['tokens']}, {row['name']}"


def _fastest(rows: Iterable[Row], wanted: Callable[[str], bool], slots: int) -> dict[Point, Row]:
    """Of every line-up the fastest row of these contestants."""
    found: dict[Point, Row] = {}
    for row in rows:
        if "time_us" in row and row.get("slots", 1) == slots and wanted(row["name"]):
            best = found.get(_key(row))
            if best is None or row["time_us"] < best["time_us"]:
                found[_key(row)] = row
    return found


def _over(top: dict[Point, Row], bottom: dict[Point, Row]) -> Pairs:
    """Time of one over time of the other, for line-ups that have both.

    What ran as a graph is not held against what could not be captured.
    """
    for key, row in top.items():
        uneven = row.get("timing") == "graph" and bottom.get(key, {}).get("timing") == "events"
        if key in bottom and not uneven:
            where = f"{_where(row)} against {bottom[key]['name']}"
            yield row["time_us"] / bottom[key]["time_us"], {**row, "where": where}


def _wrong(
    lines: Lines, wanted: Callable[[str], bool], kind: str = "svf"
) -> Callable[[Rows], list[Row]]:
    return lambda rows: [
        {**row, "where": _where(row)}
        for row in lines.of(rows[kind])
        if any(word in row for word in _WRONG) and wanted(row["name"])
    ]


def floor(lines: Lines) -> Measure:
    def pairs(rows: Rows) -> Pairs:
        for row in _fastest(lines.of(rows["svf"]), _ours, 1).values():
            yield row["percent_of_floor"], {**row, "where": _where(row)}

    return Measure(pairs, lines.points, _wrong(lines, _plain))


def against(
    other: Sequence[str], lines: Lines, *, slots: int = 1, other_slots: int = 1,
    speedup: bool = False, kind: str = "svf",
) -> Measure:  # fmt: skip
    """Time of ours over the fastest of others; their time over ours as a speed-up."""

    def pairs(rows: Rows) -> Pairs:
        chosen = lines.of(rows[kind])
        ours = _fastest(chosen, _ours, slots)
        theirs = _fastest(chosen, lambda name: name in other, other_slots)
        for value, row in _over(ours, theirs):
            yield (1 / value if speedup else value), row

    return Measure(pairs, lines.points, _wrong(lines, _plain, kind))


def training(baseline: str, lines: Lines, *, speedup: bool = True) -> Measure:
    """The same of a training step."""
    return against((baseline,), lines, speedup=speedup, kind="training")


def many_against_one(slots: int, lines: Lines) -> Measure:
    def pairs(rows: Rows) -> Pairs:
        chosen = lines.of(rows["svf"])
        yield from _over(_fastest(chosen, _ours, slots), _fastest(chosen, _ours, 1))

    return Measure(pairs, lines.points, _wrong(lines, _plain))


def invariant(lines: Lines, slots: Sequence[int]) -> Measure:
    """The fastest batch-invariant form against the fastest of all, for one slot and for many."""

    def pairs(rows: Rows) -> Pairs:
        chosen = lines.of(rows["svf"])
        for count in sorted({row["slots"] for row in chosen}):
            own = _fastest(chosen, lambda n: n.endswith("invariant") and _kernel(n), count)
            yield from _over(own, _fastest(chosen, _ours, count))

    points = frozenset((*p, count) for p in lines.points for count in slots)
    wrong = _wrong(lines, lambda name: name.startswith("ours") and name.endswith("invariant"))
    return Measure(
        pairs, points, wrong,
        of=lambda row: (row["shape"], row["dtype"], row["tokens"], row["slots"]),
    )  # fmt: skip


def delta(k: int, lines: Lines) -> Measure:
    def pairs(rows: Rows) -> Pairs:
        chosen = lines.of(rows["svf"])
        own = _fastest(chosen, lambda name: named(name) and _kernel(name), 1)
        yield from _over(own, _fastest(chosen, lambda name: name == "dense", 1))

    def named(name: str) -> bool:
        return name.split()[:3] == ["ours", "delta", f"k={k}"]

    return Measure(pairs, lines.points, _wrong(lines, named))


def keeps(lines: Lines) -> Measure:
    """1 where a step with recomputation keeps a buffer of T×r for backward, 0 where none."""

    def recomputes(name: str) -> bool:
        return name.startswith("ours") and name.endswith("recompute")

    def pairs(rows: Rows) -> Pairs:
        for row in lines.of(rows["training"]):
            if recomputes(row["name"]) and "keeps_tokens_by_rank" in row:
                yield float(row["keeps_tokens_by_rank"]), {**row, "where": _where(row)}

    return Measure(pairs, lines.points, _wrong(lines, recomputes, "training"))


def _those(rows: Iterable[Row], wanted: dict[str, Any]) -> list[Row]:
    return [row for row in rows if all(row.get(k) in v for k, v in wanted.items())]


def field(
    benchmark: str, key: str, points: Iterable[Point] = ((),), by: Sequence[str] = (),
    wrong: dict[str, Any] | None = None, whole_run: bool = False, **wanted: Any,
) -> Measure:  # fmt: skip
    """A column of another benchmark's rows, as it stands there; a point is what the columns ``by``
    say. ``wrong``: which refused rows belong to it, if not those of ``wanted``; with ``whole_run``
    all of the same run do, and one is enough to miss the goal."""

    def pairs(rows: Rows) -> Pairs:
        for row in _those(rows.get(benchmark, ()), wanted):
            if row.get(key) is not None:
                yield row[key], row

    def refused(rows: Rows) -> list[Row]:
        every = rows.get(benchmark, ())
        runs = {row["run"] for row in _those(every, wanted)}
        chosen = _those(every, wanted if wrong is None else wrong)
        if whole_run:
            chosen = [row for row in every if row["run"] in runs]
        return [row for row in chosen if any(word in row for word in _WRONG)]

    return Measure(
        pairs, frozenset(points), refused, whole_run, lambda row: tuple(row[k] for k in by)
    )


def best_field(benchmark: str, key: str, **wanted: Any) -> Measure:
    """Of every run the highest: a form that someone may choose."""
    every = field(benchmark, key, **wanted)

    def pairs(rows: Rows) -> Pairs:
        best: dict[Any, tuple[float, Row]] = {}
        for value, row in every.pairs(rows):
            if row["run"] not in best or value > best[row["run"]][0]:
                best[row["run"]] = (value, row)
        yield from best.values()

    return Measure(pairs, every.points, every.wrong, of=every.of)
