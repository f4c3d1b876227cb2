"""The goals for an H200, each with what the result files of a GPU say about it.

    python benchmarks/gpu_goals.py out/*.json              # met, missed or not measured
    python benchmarks/gpu_goals.py --markdown out/*.json   # the tables of GOALS.md

Rows of a line-up are compared with rows of the same line-up of the same run only. "Ours" is the
fastest of our forms there, since the table of defaults is filled from these very measurements; the
row says which. Files of another device count only with --any-device, to rehearse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))

from goals import Outcome, Row, worst
from results import read

MLP = ("4096x14336", "14336x4096")
SQUARE = ("4096x4096",)
NARROW = ("4096x1024",)
EIGHT_BIT = ("int8", "fp8")
DECODE, THROUGHPUT = "Decode", "Prefill, training, merging, whole models"
_NOT_PLAIN = ("invariant", "eager", "delta")
_LORA = ("LoRA bmm", "LoRA gathered")

Pairs = Iterator[tuple[float, Row]]
Rows = dict[str, list[Row]]  # by benchmark; "training" of bench_svf apart


def _key(row: Row) -> tuple[Any, ...]:
    return (row["run"], row["shape"], row["dtype"], row["tokens"])


def _plain(name: str) -> bool:
    return name.split()[0] == "ours" and not any(word in name for word in _NOT_PLAIN)


def _fastest(
    rows: Iterable[Row], wanted: Callable[[str], bool], slots: int
) -> dict[tuple[Any, ...], Row]:
    """Of every line-up the fastest row of these contestants."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if "time_us" in row and row.get("slots", 1) == slots and wanted(row["name"]):
            best = found.get(_key(row))
            if best is None or row["time_us"] < best["time_us"]:
                found[_key(row)] = row
    return found


def _over(top: dict[tuple[Any, ...], Row], bottom: dict[tuple[Any, ...], Row]) -> Pairs:
    """Time of one over time of the other, for line-ups that have both.

    What ran as a graph is not held against what could not be captured.
    """
    for key, row in top.items():
        uneven = row.get("timing") == "graph" and bottom.get(key, {}).get("timing") == "events"
        if key in bottom and not uneven:
            value = row["time_us"] / bottom[key]["time_us"]
            name = f"{row['name']} against {bottom[key]['name']}"
            yield (
                value,
                {**row, "where": f"{row['dtype']} {row['shape']} T={row['tokens']}, {name}"},
            )


@dataclass(frozen=True)
class Lines:
    """Which line-ups a goal is about."""

    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bf16",)
    tokens: tuple[int, int] = (1, 1 << 30)

    def of(self, rows: Iterable[Row]) -> list[Row]:
        low, high = self.tokens
        return [
            r for r in rows
            if (not self.shapes or r["shape"] in self.shapes)
            and r["dtype"] in self.dtypes and low <= r["tokens"] <= high
        ]  # fmt: skip


def floor(lines: Lines) -> Callable[[Rows], Pairs]:
    def pairs(rows: Rows) -> Pairs:
        for row in _fastest(lines.of(rows["svf"]), _plain, 1).values():
            yield row["percent_of_floor"], {**row, "where": _named(row)}

    return pairs


def _named(row: Row) -> str:
    return f"{row['dtype']} {row['shape']} T={row['tokens']}, {row['name']}"


def against(
    other: Sequence[str], lines: Lines, *, slots: int = 1, other_slots: int = 1,
    speedup: bool = False,
) -> Callable[[Rows], Pairs]:  # fmt: skip
    """Time of ours over the fastest of others; their time over ours as a speed-up."""

    def pairs(rows: Rows) -> Pairs:
        chosen = lines.of(rows["svf"])
        ours = _fastest(chosen, _plain, slots)
        theirs = _fastest(chosen, lambda name: name in other, other_slots)
        for value, row in _over(ours, theirs):
            yield (1 / value if speedup else value), row

    return pairs


def many_against_one(slots: int, lines: Lines) -> Callable[[Rows], Pairs]:
    def pairs(rows: Rows) -> Pairs:
        chosen = lines.of(rows["svf"])
        yield from _over(_fastest(chosen, _plain, slots), _fastest(chosen, _plain, 1))

    return pairs


def invariant(rows: Rows) -> Pairs:
    """The fastest batch-invariant form against the fastest of all, for one slot and for many."""
    chosen = Lines(dtypes=("bf16", "fp16", *EIGHT_BIT), tokens=(1, 128)).of(rows["svf"])
    for slots in {row["slots"] for row in chosen}:
        own = _fastest(chosen, lambda name: name.endswith("invariant"), slots)
        yield from _over(own, _fastest(chosen, _plain, slots))


def delta(shapes: tuple[str, ...]) -> Callable[[Rows], Pairs]:
    def pairs(rows: Rows) -> Pairs:
        chosen = Lines(shapes).of(rows["svf"])
        own = _fastest(chosen, lambda name: name.startswith("ours delta"), 1)
        yield from _over(own, _fastest(chosen, lambda name: name == "dense", 1))

    return pairs


def training(baseline: str, tokens: tuple[int, int], speedup: bool) -> Callable[[Rows], Pairs]:
    def pairs(rows: Rows) -> Pairs:
        chosen = Lines(MLP, tokens=tokens).of(rows["training"])
        ours = _fastest(chosen, _plain, 1)
        theirs = _fastest(chosen, lambda name: name == baseline, 1)
        for value, row in _over(ours, theirs):
            yield (1 / value if speedup else value), row

    return pairs


def keeps(rows: Rows) -> Pairs:
    """1 where a step with recomputation keeps a buffer of T×r for backward, 0 where none."""
    for row in rows["training"]:
        ours = row["name"].startswith("ours") and row["name"].endswith("recompute")
        if ours and "keeps_tokens_by_rank" in row:
            yield float(row["keeps_tokens_by_rank"]), row


def field(benchmark: str, key: str, **wanted: Any) -> Callable[[Rows], Pairs]:
    """A column of another benchmark's rows, as it stands there."""

    def pairs(rows: Rows) -> Pairs:
        for row in rows.get(benchmark, ()):
            if row.get(key) is not None and all(row.get(k) in v for k, v in wanted.items()):
                yield row[key], row

    return pairs


def best_field(benchmark: str, key: str, **wanted: Any) -> Callable[[Rows], Pairs]:
    """Of every run the highest: a form that someone may choose."""

    def pairs(rows: Rows) -> Pairs:
        best: dict[Any, tuple[float, Row]] = {}
        for value, row in field(benchmark, key, **wanted)(rows):
            if row["run"] not in best or value > best[row["run"]][0]:
                best[row["run"]] = (value, row)
        yield from best.values()

    return pairs


@dataclass(frozen=True)
class Goal:
    """One line of a table."""

    table: str
    phase: str
    text: str
    limit: float
    pairs: Callable[[Rows], Pairs]
    at_least: bool = False
    percent: bool = False


_SMALL, _UP_TO_64 = (1, 32), (1, 64)
_WIDE = Lines(MLP, EIGHT_BIT, _UP_TO_64)
_ALL = ("bf16", "fp16", *EIGHT_BIT)
GOALS = (
    Goal(DECODE, "decode", "bf16, T ≤ 32, 4096↔14336: share of the floor", 90,
         floor(Lines(MLP, tokens=_SMALL)), True, True),
    Goal(DECODE, "decode", "bf16, T ≤ 32, 4096²: share of the floor", 80,
         floor(Lines(SQUARE, tokens=_SMALL)), True, True),
    Goal(DECODE, "decode", "three torch ops in a graph, T ≤ 32, 4096↔14336: speed-up", 1.1,
         against(("three-op",), Lines(MLP, tokens=_SMALL), speedup=True), True),
    Goal(DECODE, "decode", "three torch ops in a graph, T ≤ 32, 4096²: speed-up", 1.25,
         against(("three-op",), Lines(SQUARE, tokens=_SMALL), speedup=True), True),
    Goal(DECODE, "decode,prefill", "time against eager three torch ops, any T", 1.0,
         against(("three-op eager",), Lines(dtypes=_ALL))),
    Goal(DECODE, "decode", "8-bit factors against dense bf16, T ≤ 64, 4096↔14336", 0.75,
         against(("dense",), _WIDE)),
    Goal(DECODE, "decode", "8-bit factors against dense bf16, T ≤ 64, 4096²", 1.05,
         against(("dense",), replace(_WIDE, shapes=SQUARE))),
    Goal(DECODE, "decode", "128 different slots against one, 4096↔14336", 1.03,
         many_against_one(128, Lines(MLP, _ALL, (128, 128)))),
    Goal(DECODE, "decode", "128 different slots against one, 4096²", 1.05,
         many_against_one(128, Lines(SQUARE, _ALL, (128, 128)))),
    Goal(DECODE, "decode", "rank-16 LoRA, 128 different adapters, T = 128: bf16 against it", 1.0,
         against(_LORA, Lines(tokens=(128, 128)), slots=128, other_slots=128)),
    Goal(DECODE, "decode", "the same, 8-bit factors against it", 0.75,
         against(_LORA, Lines(dtypes=EIGHT_BIT, tokens=(128, 128)), slots=128, other_slots=128)),
    Goal(DECODE, "parts", "q, k, v as a group against three calls", 0.85,
         field("parts", "ratio", part=("group",), judged=(True,))),
    Goal(DECODE, "decode", "batch-invariant mode against the default", 1.15, invariant),
    Goal(DECODE, "parts", "Python per layer without a graph, µs", 5.0,
         field("overhead", "python_us")),
    Goal(THROUGHPUT, "prefill", "T = 8192 against two library GEMMs and a scale, 4096↔14336", 1.0,
         against(("three-op",), Lines(MLP, tokens=(8192, 8192)))),
    Goal(THROUGHPUT, "prefill", "T = 8192 against two library GEMMs and a scale, 4096²", 0.98,
         against(("three-op",), Lines(SQUARE, tokens=(8192, 8192)))),
    Goal(THROUGHPUT, "train", "training step, MLP, T = 2048, against a rebuilt W′: speed-up", 2.2,
         training("rebuilt W' autograd", (2048, 2048), True), True),
    Goal(THROUGHPUT, "train", "training step, MLP, T = 8192, against a rebuilt W′: speed-up", 1.4,
         training("rebuilt W' autograd", (8192, 8192), True), True),
    Goal(THROUGHPUT, "train", "training step, MLP: time against autograd through three ops", 1.0,
         training("three-op autograd", (1, 1 << 30), False)),
    Goal(THROUGHPUT, "train", "with recomputation: steps that keep a T×r buffer for backward", 0,
         keeps),
    Goal(THROUGHPUT, "prefill", "64 slots in a ragged batch of 8192 tokens against one", 1.03,
         many_against_one(64, Lines(dtypes=("bf16",), tokens=(8192, 8192)))),
    Goal(THROUGHPUT, "decode,prefill", "delta k = 256 against dense, any T", 1.2,
         delta((*MLP, *SQUARE))),
    Goal(THROUGHPUT, "decode,prefill", "delta k = 256 against dense, any T, 4096→1024", 1.4,
         delta(NARROW)),
    Goal(THROUGHPUT, "model", "whole model, 32 requests, bf16, all linears: of dense", 0.70,
         best_field("model", "of_dense", factors=("bf16",), targets=("all-linear",),
                    requests=(32,), stage=("decode",), size=("8B",)), True),
    Goal(THROUGHPUT, "model", "whole model, 32 requests, bf16, MLP only: of dense", 0.78,
         best_field("model", "of_dense", factors=("bf16",), targets=("mlp",), requests=(32,),
                    stage=("decode",), size=("8B",)), True),
    Goal(THROUGHPUT, "model", "whole model, 32 requests, 8-bit, all linears: of dense", 1.2,
         best_field("model", "of_dense", factors=EIGHT_BIT, targets=("all-linear",),
                    requests=(32,), stage=("decode",), size=("8B",)), True),
    Goal(THROUGHPUT, "model", "merge of all MLP matrices of the 8B shape, ms", 85,
         field("model", "merge_ms", size=("8B",))),
    Goal(THROUGHPUT, "decompose", "decomposition of all linears of the 8B shape, minutes", 10,
         field("decompose", "total_minutes", size=("8B",))),
)  # fmt: skip


def evaluate(results: Iterable[dict[str, Any]], any_device: bool = False) -> list[Outcome]:
    """Every goal, in order; ``met`` is None where no file bears on it."""
    rows: Rows = {"svf": [], "training": []}
    for run, result in enumerate(results):
        if not any_device and result["environment"]["device"] != "cuda":
            continue
        kind = result["benchmark"]
        rows.setdefault(kind, []).extend({**row, "run": run} for row in result["rows"])
        rows["training"] += [{**row, "run": run} for row in result.get("training", ())]
    return [
        replace(
            worst(g.text, g.limit, g.pairs(rows), at_least=g.at_least, percent=g.percent),
            table=g.table, phase=g.phase,
        )
        for g in GOALS
    ]  # fmt: skip


def render(outcomes: Iterable[Outcome]) -> str:
    """Two lines a goal."""
    marks = {True: "met", False: "MISSED", None: "not measured"}
    lines = []
    for o in outcomes:
        lines.append(f"{marks[o.met]:13}{o.goal}: {o.limit}  [{o.phase}]")
        if o.met is not None:
            lines.append(f"{'':13}{o.measured}")
    return "\n".join(lines)


def markdown(outcomes: Iterable[Outcome]) -> str:
    """One table a group of goals."""
    lines: list[str] = []
    table = ""
    marks = {True: "met", False: "missed", None: ""}
    for o in outcomes:
        if o.table != table:
            table = o.table
            lines += ["", f"## {table}", "", "| goal | limit | phase | measured | |",
                      "|---|---|---|---|---|"]  # fmt: skip
        measured = "not measured" if o.met is None else o.measured
        lines.append(f"| {o.goal} | {o.limit} | {o.phase} | {measured} | {marks[o.met]} |")
    return "\n".join(lines[1:])


def files(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The results among these files; others (demo, claims, summaries) are passed over."""
    found = []
    for path in paths:
        try:
            result = read(path)
        except ValueError:
            continue
        if "benchmark" in result:
            found.append(result)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """0; a goal that is missed is no error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", help="results of the benchmarks")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--any-device", action="store_true", help="a CPU's too: to rehearse")
    args = parser.parse_args(argv)
    outcomes = evaluate(files(args.files), args.any_device)
    if args.markdown:
        print(markdown(outcomes))
        return 0
    print(render(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
