"""The goals for an H200, each with what the result files of a GPU say about it.

    python benchmarks/gpu_goals.py out/*.json              # met, missed or not measured
    python benchmarks/gpu_goals.py --markdown out/*.json   # the tables of GOALS.md

A goal names the points (layers, dtypes, tokens) that it wants measured: with fewer it is partly
measured, never met, and one point beyond its limit is enough to miss it. What counts as ours:
``gpu_measures.py``. Files of another device count only with --any-device, to rehearse.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))

from goals import NOTHING, Outcome, Row, worst
from gpu_measures import (
    LORA,
    Lines,
    Measure,
    Rows,
    against,
    best_field,
    delta,
    field,
    floor,
    invariant,
    keeps,
    many_against_one,
    training,
)
from results import read

MLP = ("4096x14336", "14336x4096")
SQUARE = ("4096x4096",)
NARROW = ("4096x1024",)
LAYERS = (*MLP, *SQUARE, *NARROW)
EIGHT_BIT = ("int8", "fp8")
DTYPES = ("bf16", *EIGHT_BIT)
# What the phases measure (a test holds the two together).
SMALL, UP_TO_64, UP_TO_128 = (1, 8, 32), (1, 8, 32, 64), (1, 8, 32, 64, 128)
PREFILL = (512, 2048, 8192, 32768)
TRAINING = (2048, 8192)
CALLS = ("own z", "uniform", "rows", "rows, all base")  # of bench_overhead.py
DECODE, THROUGHPUT = "Decode", "Prefill, training, merging, whole models"
_SHOWN = 3  # missing points and wrong rows that a line names


@dataclass(frozen=True)
class Goal:
    """One line of a table; all of its measures must be within the limit."""

    table: str
    phase: str
    text: str
    limit: float
    measures: Measure | tuple[Measure, ...]
    at_least: bool = False
    percent: bool = False

    @property
    def every(self) -> tuple[Measure, ...]:
        return self.measures if isinstance(self.measures, tuple) else (self.measures,)


def model(factors: tuple[str, ...], targets: str) -> Measure:
    """Of the dense model's speed, both as one graph and by a kernel asked for by name."""
    return best_field(
        "model", "of_dense", factors=factors, targets=(targets,), requests=(32,),
        stage=("decode",), size=("8B",), setting=("graph",), backend=("cuda", "triton"),
    )  # fmt: skip


GOALS = (
    Goal(DECODE, "decode", "bf16, T ≤ 32, 4096↔14336: share of the floor", 90,
         floor(Lines(MLP, SMALL)), True, True),
    Goal(DECODE, "decode", "bf16, T ≤ 32, 4096²: share of the floor", 80,
         floor(Lines(SQUARE, SMALL)), True, True),
    Goal(DECODE, "decode", "three torch ops in a graph, T ≤ 32, 4096↔14336: speed-up", 1.1,
         against(("three-op",), Lines(MLP, SMALL), speedup=True), True),
    Goal(DECODE, "decode", "three torch ops in a graph, T ≤ 32, 4096²: speed-up", 1.25,
         against(("three-op",), Lines(SQUARE, SMALL), speedup=True), True),
    Goal(DECODE, "decode,prefill", "time against eager three torch ops, any T", 1.0,
         (against(("three-op eager",), Lines(LAYERS, UP_TO_128, DTYPES, ("fp16",))),
          against(("three-op eager",), Lines(LAYERS, PREFILL)))),
    Goal(DECODE, "decode", "8-bit factors against dense bf16, T ≤ 64, 4096↔14336", 0.75,
         against(("dense",), Lines(MLP, UP_TO_64, EIGHT_BIT))),
    Goal(DECODE, "decode", "8-bit factors against dense bf16, T ≤ 64, 4096²", 1.05,
         against(("dense",), Lines(SQUARE, UP_TO_64, EIGHT_BIT))),
    Goal(DECODE, "decode", "128 different slots against one, 4096↔14336", 1.03,
         many_against_one(128, Lines(MLP, (128,), DTYPES, ("fp16",)))),
    Goal(DECODE, "decode", "128 different slots against one, 4096²", 1.05,
         many_against_one(128, Lines(SQUARE, (128,), DTYPES, ("fp16",)))),
    Goal(DECODE, "decode", "rank-16 LoRA, 128 different adapters, T = 128: bf16 against it", 1.0,
         against(LORA, Lines(LAYERS, (128,)), slots=128, other_slots=128)),
    Goal(DECODE, "decode", "the same, 8-bit factors against it", 0.75,
         against(LORA, Lines(LAYERS, (128,), EIGHT_BIT), slots=128, other_slots=128)),
    Goal(DECODE, "parts", "q, k, v as a group against three calls", 0.85,
         field("parts", "ratio", itertools.product(DTYPES, (1, 8, 32, 128)), ("dtype", "tokens"),
               {"part": ("group",), "group": ("qkv",)}, part=("group",), judged=(True,))),
    Goal(DECODE, "decode", "batch-invariant mode against the default", 1.15,
         invariant(Lines(LAYERS, UP_TO_128, DTYPES, ("fp16",)), (1, 128))),
    Goal(DECODE, "parts", "Python per layer without a graph, µs", 5.0,
         field("overhead", "python_us", ((name,) for name in CALLS), ("name",))),
    Goal(THROUGHPUT, "prefill", "T = 8192 against two library GEMMs and a scale, 4096↔14336", 1.0,
         against(("three-op",), Lines(MLP, (8192,)))),
    Goal(THROUGHPUT, "prefill", "T = 8192 against two library GEMMs and a scale, 4096²", 0.98,
         against(("three-op",), Lines(SQUARE, (8192,)))),
    Goal(THROUGHPUT, "train", "training step, MLP, T = 2048, against a rebuilt W′: speed-up", 2.2,
         training("rebuilt W' autograd", Lines(MLP, (2048,))), True),
    Goal(THROUGHPUT, "train", "training step, MLP, T = 8192, against a rebuilt W′: speed-up", 1.4,
         training("rebuilt W' autograd", Lines(MLP, (8192,))), True),
    Goal(THROUGHPUT, "train", "training step, MLP: time against autograd through three ops", 1.0,
         training("three-op autograd", Lines(MLP, TRAINING), speedup=False)),
    Goal(THROUGHPUT, "train", "with recomputation: steps that keep a T×r buffer for backward", 0,
         keeps(Lines((*MLP, *SQUARE), TRAINING))),
    Goal(THROUGHPUT, "prefill", "64 slots in a ragged batch of 8192 tokens against one", 1.03,
         many_against_one(64, Lines(LAYERS, (8192,)))),
    Goal(THROUGHPUT, "decode,prefill", "delta k = 256 against dense, any T", 1.2,
         delta(256, Lines((*MLP, *SQUARE), (*UP_TO_128, *PREFILL)))),
    Goal(THROUGHPUT, "decode,prefill", "delta k = 256 against dense, any T, 4096→1024", 1.4,
         delta(256, Lines(NARROW, (*UP_TO_128, *PREFILL)))),
    Goal(THROUGHPUT, "model", "whole model in a graph, 32 requests, bf16, all linears: of dense",
         0.70, model(("bf16",), "all-linear"), True),
    Goal(THROUGHPUT, "model", "whole model in a graph, 32 requests, bf16, MLP only: of dense",
         0.78, model(("bf16",), "mlp"), True),
    Goal(THROUGHPUT, "model", "whole model in a graph, 32 requests, 8-bit, all linears: of dense",
         1.2, model(EIGHT_BIT, "all-linear"), True),
    Goal(THROUGHPUT, "model", "merge of all MLP matrices of the 8B shape, ms", 85,
         field("model", "merge_ms", size=("8B",))),
    Goal(THROUGHPUT, "decompose", "decomposition of all linears of the 8B shape, minutes", 10,
         field("decompose", "total_minutes", size=("8B",), whole_run=True)),
)  # fmt: skip


def evaluate(results: Iterable[dict[str, Any]], any_device: bool = False) -> list[Outcome]:
    """Every goal, in order; ``met`` is None where points that it names were not measured."""
    rows: Rows = {"svf": [], "training": []}
    for run, result in enumerate(results):
        if not any_device and result["environment"]["device"] != "cuda":
            continue
        kind = result["benchmark"]
        rows.setdefault(kind, []).extend({**row, "run": run} for row in result["rows"])
        rows["training"] += [{**row, "run": run} for row in result.get("training", ())]
    return [judge(goal, rows) for goal in GOALS]


def judge(goal: Goal, rows: Rows) -> Outcome:
    """The worst value, how much of what the goal names was measured, and what was wrong."""
    pairs, missing, wanted = [], [], 0
    for measure in goal.every:
        own = list(measure.pairs(rows))
        pairs += own
        wanted += len(measure.points)
        missing += sorted(measure.points - {measure.of(row) for _, row in own})
    wrong = [row for measure in goal.every for row in measure.wrong(rows)]
    found = worst(goal.text, goal.limit, pairs, at_least=goal.at_least, percent=goal.percent)
    met = None if found.met and missing else found.met
    if wrong and any(measure.wrong_decides for measure in goal.every):
        met = False
    measured = found.measured
    if pairs and missing:
        measured += f"; missing: {_some(' '.join(map(str, point)) for point in missing)}"
    if wrong:
        measured += f"; WRONG, no time: {_some(_named(row) for row in wrong)}"
    return replace(
        found, measured=measured, met=met, table=goal.table, phase=goal.phase,
        covered=wanted - len(missing), wanted=wanted,
    )  # fmt: skip


def _named(row: Row) -> str:
    why = row.get("refused") or row.get("failed")
    return f"{row.get('where') or row.get('shape') or row.get('name')} ({why})"


def _some(texts: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    every = list(texts)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def mark(outcome: Outcome) -> str:
    """One word; how much was measured where that is not all."""
    if outcome.met is not None:
        return "met" if outcome.met else "MISSED"
    if outcome.covered:
        return f"partly measured ({outcome.covered} of {outcome.wanted})"
    return "not measured"


def render(outcomes: Iterable[Outcome]) -> str:
    """Two lines a goal."""
    lines = []
    for o in outcomes:
        lines.append(f"{mark(o):13}{' ' if len(mark(o)) > 12 else ''}{o.goal}: {o.limit}"
                     f"  [{o.phase}]")  # fmt: skip
        if o.met is not None or o.measured != NOTHING:
            lines.append(f"{'':13}{o.measured}")
    return "\n".join(lines)


def markdown(outcomes: Iterable[Outcome]) -> str:
    """One table a group of goals."""
    lines: list[str] = []
    table = ""
    for o in outcomes:
        if o.table != table:
            table = o.table
            lines += ["", f"## {table}", "", "| goal | limit | phase | measured | |",
                      "|---|---|---|---|---|"]  # fmt: skip
        nothing = o.met is None and o.measured == NOTHING
        measured, short = ("not measured", "") if nothing else (o.measured, mark(o).lower())
        lines.append(f"| {o.goal} | {o.limit} | {o.phase} | {measured} | {short} |")
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
