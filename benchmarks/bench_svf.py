"""Measure the SVF layer against everything a user could run instead.

    python benchmarks/bench_svf.py --quick
    python benchmarks/bench_svf.py --json out.json --plot out.png
    python benchmarks/bench_svf.py --device cuda --shapes 4096x14336 --dtypes bf16 --tokens 1 32

Every line-up runs its contestants in turns in one process; a contestant with a wrong result gets
no time. README.md beside this file says how to read the table.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))
# The profiler, which the training step uses, would write a line at every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

try:
    import torch

    import t2kernels
except ImportError as error:
    sys.exit(f"bench_svf: {error}. Run it with the Python that t2kernels is installed in.")

import goals
import report
from ceilings import Bandwidth, matmul_gflops
from command import add_shared, begin
from contestants import LineUp, Options, Skipped
from failures import Broken, describe
from harness import Contestant, Refused, Samples, Verdict, check, make_timer, measure, ratio
from layers import Layer
from plot import draw
from results import SCHEMA, write
from shapes import ALL_DTYPES, Case, Shape, grid, parse_shape, parse_tokens
from training import measure_training

from t2kernels.testing import relative_error

# Seconds a contestant gets in one line-up and for a training step; minutes a run may take before
# it stops measuring, writes what it has and says what is missing.
_SECONDS = {"cpu": 0.15, "cuda": 0.05, "quick": 0.12}
_TRAINING_SECONDS = {"cpu": 2.0, "cuda": 0.5, "quick": 1.0}
_MINUTES = {"cpu": 25.0, "cuda": 8.0, "quick": 2.0}
_TRAINING_TOKENS = 512


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench_svf",
        description="Time the SVF layer against dense, three-op, rebuilt and LoRA layers.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_shared(parser, device=True)
    add("--quick", action="store_true", help="one shape, few token counts, under two minutes")
    add("--plot", type=Path, metavar="FILE", help="draw the result as a PNG (needs matplotlib)")
    add("--shapes", type=parse_shape, nargs="+", metavar="INxOUT")
    add("--dtypes", choices=ALL_DTYPES, nargs="+")
    add("--tokens", type=parse_tokens, nargs="+", metavar="T")
    add("--slots", type=parse_tokens, nargs="+", metavar="S", help="diagonals; 1 comes first")
    add("--training-tokens", type=parse_tokens, nargs="+", metavar="T", help="of a step (512)")
    add("--seconds", type=float, metavar="S", help="for a contestant in a line-up (cpu 0.15)")
    add("--minutes", type=float, metavar="M", help="start no line-up after this (cpu 25, cuda 8)")
    add("--forms", action="store_true", help="every form of the CUDA kernels by name, too")
    add("--no-compile", action="store_true", help="leave the compiled three-op form out")
    add("--no-peft", action="store_true", help="leave PEFT out")
    add("--no-training", action="store_true", help="leave the training step out")
    add("--dry-run", action="store_true", help="list the line-ups and stop")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, checked before anything is measured."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.slots is not None and (args.slots != sorted(set(args.slots)) or args.slots[0] != 1):
        parser.error(f"--slots must begin with 1 and grow, got {args.slots}")
    if args.seconds is not None and not 0 < args.seconds < 60:
        parser.error(f"--seconds must lie between 0 and 60, got {args.seconds}")
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes must be positive, got {args.minutes}")
    if args.plot is not None:
        if not args.plot.absolute().parent.is_dir():
            parser.error(f"the folder of {args.plot} does not exist")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plot needs matplotlib (pip install matplotlib)")
    args.record = None if args.dry_run else begin(parser, args)
    return args


def _row(
    case: Case,
    contestant: Contestant,
    verdict: Verdict,
    own: Samples,
    ceilings: tuple[float, float],
) -> dict[str, Any]:
    """Everything about one contestant but its ratios."""
    gbs, gflops = ceilings
    time_s = own.median
    memory_s, compute_s = contestant.bytes / gbs / 1e9, contestant.flops / gflops / 1e9
    return {
        "shape": str(case.shape), "dtype": case.dtype, "tokens": case.tokens,
        "name": contestant.name, "slots": contestant.slots,
        "time_us": time_s * 1e6, "p20_us": own.quantile(0.2) * 1e6,
        "p80_us": own.quantile(0.8) * 1e6,
        "repetitions": len(own.seconds), "timing": own.timing,
        "bytes": contestant.bytes, "gbs": contestant.bytes / time_s / 1e9,
        "gflops": contestant.flops / time_s / 1e9,
        "percent_of_bandwidth": 100 * memory_s / time_s,
        "bound": "memory" if memory_s >= compute_s else "matmul",
        "percent_of_floor": 100 * max(memory_s, compute_s) / time_s,
        "error": verdict.error, "error_limit": verdict.limit,
        "same_bits_again": verdict.same_bits_again, "same_bits_alone": verdict.same_bits_alone,
    }  # fmt: skip


def _without_time(case: Case, name: str, slots: int, **why: str) -> dict[str, Any]:
    """The row of a contestant that was refused or failed."""
    where = {"shape": str(case.shape), "dtype": case.dtype, "tokens": case.tokens}
    return {**where, "name": name, "slots": slots, **why}


def run_case(
    case: Case,
    layer: Layer,
    options: Options,
    bandwidth: Bandwidth,
    gflops: float,
    seconds: float,
) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """One line-up: its rows, and who did not take part or was refused."""
    line_up = LineUp(case, layer, options)
    accepted: list[tuple[Contestant, Verdict]] = []
    absent: list[Skipped] = []
    rows = []
    for entry in line_up.build():
        if isinstance(entry, Skipped):
            absent.append(entry)
            continue
        begin = time.perf_counter()
        try:
            verdict = check(entry, case.tokens)
            if not entry.ours and time.perf_counter() - begin > 5 * options.longest_call_s:
                # Some library paths have no fast kernel at all (fp16 on a CPU without it).
                options.too_slow.add((str(case.shape), case.dtype, entry.name))
                absent.append(Skipped(entry.name, "one call takes more than a second"))
                continue
            accepted.append((entry, verdict))
        except Refused as refusal:
            rows.append(_without_time(case, entry.name, entry.slots, refused=str(refusal)))
        except Exception as error:  # of a kernel, a compiler or the device: the others go on
            text = describe(error, layer.device)
            rows.append(_without_time(case, entry.name, entry.slots, failed=text))
    contestants = [contestant for contestant, _ in accepted]
    turns = itertools.cycle(layer.sets)
    rates = [bandwidth.sample(next(turns).read)]

    def failed(index: int, error: Exception) -> None:
        contestant, text = contestants[index], describe(error, layer.device)
        rows.append(_without_time(case, contestant.name, contestant.slots, failed=text))

    samples = measure(
        contestants, make_timer(layer.device, len(layer.sets)), seconds=seconds,
        beside=lambda: rates.append(bandwidth.sample(next(turns).read)), failed=failed,
    )  # fmt: skip
    gbs = statistics.median(rates)
    # What a contestant reached is possible: a large product is not always the fastest one.
    reached = [contestants[i].flops / own.quantile(0.2) / 1e9 for i, own in samples.items()]
    gflops = max(gflops, *reached, 0.0)

    place = {(contestants[i].name, contestants[i].slots): i for i in samples}
    for index in samples:
        contestant, verdict = accepted[index]
        row = _row(case, contestant, verdict, samples[index], (gbs, gflops))
        row["read_gbs"], row["matmul_gflops"] = gbs, gflops
        # The three-op form that does the same work: with a gather where there are slots.
        slots = line_up.many if contestant.slots > 1 else 1
        for key, other in (("three_op", ("three-op", slots)), ("dense", ("dense", 1))):
            if other in place:
                value, low, high = ratio(samples[index], samples[place[other]])
                row[f"ratio_{key}"], row[f"interval_{key}"] = value, (low, high)
        if contestant.name == "ours" and case.dtype in t2kernels.FACTOR_KINDS:
            row["factor_error"] = _factor_error(line_up, contestant)
        rows.append(row)
    return rows, absent


def _factor_error(line_up: LineUp, contestant: Contestant) -> float:
    """Error of the 8-bit output against the unquantised factors in fp64."""
    every = torch.arange(min(line_up.T, 16))
    y = contestant.call(0)[every.to(line_up.x.device)]
    return relative_error(y, line_up.truth.svf(contestant.slots, every, True))


def _default(table: dict[str, float], args: argparse.Namespace) -> float:
    return table["quick" if args.quick else args.device]


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The line-ups that the command line asks for."""
    named = (tuple(v) if v else None for v in (args.shapes, args.dtypes, args.tokens))
    return grid(args.device, args.quick, *named)


def run(
    args: argparse.Namespace, save: Callable[[dict[str, Any]], object] = lambda result: None
) -> dict[str, Any]:
    """The whole run; prints as it goes and saves after every line-up."""
    device = torch.device(args.device)
    began, record = time.perf_counter(), args.record
    bandwidth = Bandwidth(device, torch.get_num_threads())
    record["bandwidth_method"] = bandwidth.method
    print(json.dumps(record, ensure_ascii=False, indent=1), flush=True)
    deadline = began + 60 * (args.minutes or _default(_MINUTES, args))
    result: dict[str, Any] = {
        "schema": SCHEMA, "benchmark": "svf", "environment": record, "goals": [], "absent": [],
        "not_measured": [], "training": [], "rows": [],
    }  # fmt: skip
    matmul: dict[torch.dtype, float] = {}
    absent: Counter[Skipped] = Counter()

    def done() -> None:
        record["matmul_gflops"] = {str(d).removeprefix("torch."): v for d, v in matmul.items()}
        record["seconds"] = round(time.perf_counter() - began, 1)
        found = sorted(absent.items(), key=lambda item: (item[0].name, item[0].reason))
        result["absent"] = [{"name": s.name, "reason": s.reason, "line_ups": n} for s, n in found]
        if device.type == "cpu":  # those for a GPU: gpu_goals.py
            outcomes = goals.evaluate(result["rows"], result["training"])
            result["goals"] = [o.as_dict() for o in outcomes]
        save(result)

    cases = chosen_cases(args)
    try:
        # Before the line-ups: a run that reaches its time limit has it all the same.
        if not args.no_training:
            _training(args, cases, result, deadline, done)
        _line_ups(args, cases, bandwidth, matmul, absent, result, deadline, done)
    except Broken as error:
        result["stopped"] = f"the device is lost after {error}"
    done()
    _report(result)
    return result


def _report(result: dict[str, Any]) -> None:
    """What took no part, what is missing, and on a CPU the goals."""
    if result["absent"]:
        print("\nabsent")
    for entry in result["absent"]:
        print(f"  {entry['name']} in {entry['line_ups']} line-ups: {entry['reason']}")
    if result["not_measured"]:
        print(f"\nout of time, not measured: {', '.join(result['not_measured'])}")
    if "stopped" in result:
        print(f"\nSTOPPED: {result['stopped']}; nothing after it was measured")
    if result["goals"]:
        outcomes = goals.evaluate(result["rows"], result["training"])
        print(f"\n{goals.render(outcomes)}")
    print(f"{result['environment']['seconds']:.0f} s", flush=True)


def _line_ups(
    args: argparse.Namespace,
    cases: list[Case],
    bandwidth: Bandwidth,
    matmul: dict[torch.dtype, float],
    absent: Counter[Skipped],
    result: dict[str, Any],
    deadline: float,
    done: Callable[[], None],
) -> None:
    """Rows, who was absent and why, and the cases that there was no time for."""
    wanted = Options(compile=not args.no_compile, peft=not args.no_peft, forms=args.forms)
    seconds, device = args.seconds or _default(_SECONDS, args), torch.device(args.device)
    slots = None if args.slots is None else tuple(args.slots)
    for (shape, dtype), group in itertools.groupby(cases, key=lambda c: (c.shape, c.dtype)):
        layer = None
        for case in group:
            if time.perf_counter() > deadline:
                result["not_measured"].append(str(case))
                continue
            with torch.inference_mode():
                try:
                    if layer is None:
                        layer = Layer(shape, dtype, device, slots=slots)
                        # Measured again for every layer: the best so far is the ceiling.
                        rate = matmul_gflops(layer.activations, device)
                        matmul[layer.activations] = max(rate, matmul.get(layer.activations, 0.0))
                    gflops = matmul[case.activations]
                    options = replace(wanted, gflops=gflops)
                    found, skipped = run_case(case, layer, options, bandwidth, gflops, seconds)
                except Broken:
                    raise
                except Exception as error:  # the layer itself, or who would take part
                    text = describe(error, device)
                    found, skipped = [_without_time(case, "the line-up", 1, failed=text)], []
            result["rows"] += found
            absent.update(skipped)
            for row in found:
                if "read_gbs" in row:
                    matmul[case.activations] = row["matmul_gflops"]
            rates = [f"{r['read_gbs']:.1f} GB/s, {r['matmul_gflops']:.0f} GFLOP/s"
                     for r in found if "read_gbs" in r]  # fmt: skip
            print(f"\n{case}   ceilings: {rates[0] if rates else 'none'}")
            print(report.HEADER, *map(report.line, found), sep="\n", flush=True)
            done()
        del layer
        gc.collect()


def _training(
    args: argparse.Namespace,
    cases: list[Case],
    result: dict[str, Any],
    deadline: float,
    done: Callable[[], None],
) -> None:
    """The training step of every shape and float dtype of the run, at one number of tokens."""
    pairs: list[tuple[Shape, str]] = list(dict.fromkeys((c.shape, c.dtype) for c in cases))
    seconds, device = args.seconds or _default(_TRAINING_SECONDS, args), torch.device(args.device)
    print("\ntraining step, forward and backward to x and z")
    for shape, dtype in pairs:
        if dtype in t2kernels.FACTOR_KINDS or (dtype == "fp16" and device.type == "cpu"):
            continue
        default = min(_TRAINING_TOKENS, max(1, shape.rank // 4))
        for tokens in args.training_tokens or [default]:
            case = Case(shape, dtype, tokens)
            if time.perf_counter() > deadline:
                result["not_measured"].append(f"training step, {case}")
                continue
            try:
                found = measure_training(shape, dtype, tokens, device, seconds=seconds)
            except Broken:
                raise
            except Exception as error:  # the layer itself, or the truth of its gradients
                text = describe(error, device)
                found = [_without_time(case, "all forms", 1, failed=text)]
            print(*map(report.training_line, found), sep="\n", flush=True)
            result["training"] += found
            done()


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a result of ours was refused or a contestant failed; 2 for a wrong command line."""
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING)
    if args.dry_run:
        print(*chosen_cases(args), sep="\n")
        return 0

    def save(result: dict[str, Any]) -> None:
        if args.json is not None:
            write(args.json, result)

    result = run(args, save)
    if args.plot is not None:
        draw(result, args.plot)
    rows = result["rows"] + result["training"]
    refused = any("refused" in r and r["name"].startswith("ours") for r in rows)
    return int(refused or "stopped" in result or any("failed" in r for r in rows))


if __name__ == "__main__":
    sys.exit(main())
