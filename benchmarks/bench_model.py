"""A whole model under a mixture of its own per request, against the dense model.

    python benchmarks/bench_model.py --device cuda --json out.json      # Llama-3-8B's shape
    python benchmarks/bench_model.py --quick                            # tiny, on a CPU
    python benchmarks/bench_model.py --device cuda --only merge

Random weights with known orthonormal factors (`llama.py`) run through transformers with a static
cache: one decode step and one prefill of 1 to 64 requests. On a GPU a step is one graph; what
says "eager" is launched from Python, what says "compiled" went through torch.compile, and "served"
is a call of `t2kernels.StepGraphs` with all that it does. The dense model stands beside in each
setting, for "served" as a bare graph. Before anything is timed, the same configuration with few
layers is compared with W' rebuilt for single requests (fp32; fp64 on a CPU): an error above twice
that of the same model on plain torch operations is refused.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

try:
    import torch
    import transformers  # noqa: F401

    import t2kernels as t2k
except ImportError as error:
    sys.exit(f"bench_model: {error}. Run it with the Python that t2kernels[hf] is installed in.")

import llama
from ceilings import Bandwidth, matmul_gflops
from command import add_shared, begin
from harness import GATE_FLOOR, Contestant, Refused, make_timer, measure, ratio
from memory import choose_factors
from results import SCHEMA, write
from torch import Tensor
from whole_model import EXPERTS, SLACK, Form, Models, Stage, gate, routed, within

from t2kernels.testing import relative_error

FACTORS = ("bf16", *t2k.FACTOR_KINDS)
TARGETS = ("all-linear", "mlp")
GPU_BACKENDS = ("cuda", "triton")
SERVED = "served"  # through t2kernels.StepGraphs, its copies and its Python included
STAGES = ("merge", "decode", "admit", "prefill")
_GATE_LAYERS = 2


def forms_of(args: argparse.Namespace, stage: str) -> Iterator[Form]:
    """Dense and ours, in every setting that this device has."""
    cuda = args.device == "cuda"
    settings = ["graph"] if cuda else ["eager"]
    if cuda and args.eager:
        settings.append("eager")
    if args.compile:
        settings.append("compiled")
    for setting in settings:
        yield Form(None, setting=setting)
        for targets in args.targets:
            for kind in args.factors:
                for backend in backends_of(args, stage):
                    yield Form(targets, kind, backend, setting)
                    if (setting, stage) == ("graph", "decode"):
                        yield Form(targets, kind, backend, SERVED)


def backends_of(args: argparse.Namespace, stage: str) -> tuple[str | None, ...]:
    if args.device == "cpu":
        return (None,)
    return GPU_BACKENDS if stage == "decode" else ("triton", None)


def measure_stage(
    args: argparse.Namespace, models: Models, small: Models, requests: int, stage_name: str
) -> list[dict[str, Any]]:
    """A row for every form of one stage with so many requests."""
    start, new = (args.prompt, 1) if stage_name == "decode" else (0, args.prompt)
    rows: list[dict[str, Any]] = []
    entered: list[tuple[dict[str, Any], Contestant]] = []
    with ExitStack() as stack:
        # A captured step reads the slots of its model: they stay as long as the graphs.
        opened: dict[Any, Any] = {}
        for form in forms_of(args, stage_name):
            row: dict[str, Any] = {
                "stage": stage_name, "requests": requests, "prompt": args.prompt,
                "setting": form.setting, "name": form.name, "targets": form.targets,
                "factors": form.factors, "backend": form.backend,
            }  # fmt: skip
            row["where"] = f"{requests} requests, {form.name}, {form.setting}"
            rows.append(row)
            try:
                row["error"] = gate(small, form, requests, start, new)
                place = (form.targets, form.factors if form.targets else None)
                if place not in opened:
                    opened[place] = _open(stack, models, form, requests, start, new)
                stage = opened[place]
                entered.append((row, _contestant(form, requests, stage)))
            except Refused as refusal:
                row["refused"] = str(refusal)
            except RuntimeError as error:
                if "cannot run this call" not in str(error):
                    raise
                row["absent"] = str(error)
        samples = measure(
            [c for _, c in entered], make_timer(models.device, 1), seconds=args.seconds
        )
    _add_times(rows, entered, samples, requests * new)
    return rows


def _open(
    stack: ExitStack, models: Models, form: Form, requests: int, start: int, new: int
) -> Stage:
    """The stage of a model, inside its routing until the stack closes."""
    model = models.dense
    if form.targets is not None:
        bank = models.bank(form.targets, form.factors)
        slots = stack.enter_context(routed(bank, llama.mixtures(bank, requests)))
        model = bank.model
    stage = Stage(model, requests, start, new)
    if form.targets is not None:
        stage.slots = slots
    stage.fill()
    return stage


def _contestant(form: Form, requests: int, stage: Stage) -> Contestant:
    context: Callable[[], AbstractContextManager[object]] = partial(within, form.backend, stage)
    if form.setting == SERVED:
        with context():
            graphs = stage.graphs()
        return Contestant(
            form.name, requests, lambda i: graphs(**stage.inputs), _no_formula, 0, 0, context,
            capture=False,
        )  # fmt: skip
    model = torch.compile(stage.model) if form.setting == "compiled" else stage.model
    return Contestant(
        form.name, requests, lambda i: stage.run(model), _no_formula, 0, 0, context,
        capture=form.setting != "eager",
    )  # fmt: skip


def _no_formula(rows: Tensor, double: bool) -> Tensor:
    raise Refused("a model is checked by its logits")


def _add_times(
    rows: list[dict[str, Any]], entered: list[tuple[dict[str, Any], Contestant]], samples: Any,
    tokens: int,
) -> None:  # fmt: skip
    place = {(row["name"], row["setting"]): i for i, (row, _) in enumerate(entered)}
    for index, (row, _) in enumerate(entered):
        own = samples[index]
        row.update(ms=own.median * 1e3, p20_ms=own.quantile(0.2) * 1e3)
        row.update(p80_ms=own.quantile(0.8) * 1e3, timing=own.timing, repetitions=len(own.seconds))
        row["tokens_per_second"] = tokens / own.median
        served = row["setting"] == SERVED  # its own Python counts, the dense graph has none
        dense = place.get(("dense", "graph" if served else row["setting"]))
        # What could not be captured is not compared with what was.
        if dense is not None and (served or samples[dense].timing == own.timing):
            value, low, high = ratio(samples[dense], own)
            row["of_dense"], row["interval_of_dense"] = value, (low, high)
    for row in rows:
        print(_format(row), flush=True)


def _format(row: dict[str, Any]) -> str:
    head = f"  {row['stage']:8}{row['requests']:>4} requests  {row['setting']:9}{row['name']:28}"
    for word in ("refused", "absent"):
        if word in row:
            return f"{head}{word.upper()}: {row[word]}"
    share = f"{row['of_dense']:.3f}" if "of_dense" in row else "–"
    return (
        f"{head}{row['ms']:10.3f} ms ({row['p20_ms']:.3f}–{row['p80_ms']:.3f})"
        f"{row['tokens_per_second']:10.0f} tokens/s  of dense {share}"
        f"  error {row['error']:.1e}  {row['timing']}"
    )


def measure_merge(models: Models, turns: int) -> list[dict[str, Any]]:
    """Switching all MLP matrices from one merged expert to another, and back to the base."""
    bank = models.bank("mlp", "bf16")
    linears = [models.dense.get_submodule(name) for name in bank.layers]
    before = [_checksum(linear.weight) for linear in linears]

    def seconds(call: Callable[[], object]) -> float:
        _wait(models.device)
        begun = time.perf_counter()
        call()
        _wait(models.device)
        return time.perf_counter() - begun

    first = seconds(lambda: bank.merge("e0"))  # makes the copies of the base weights
    switches = [seconds(partial(bank.merge, f"e{1 + i % 2}")) for i in range(turns)]
    last = f"e{1 + (turns - 1) % 2}"
    errors = [_merge_error(models, bank, name, last) for name in (bank.layers[0], bank.layers[-1])]
    error, limit = max(errors, key=lambda pair: pair[0] / pair[1])
    back = seconds(bank.unmerge)
    if [_checksum(linear.weight) for linear in linears] != before:
        raise Refused("merge: a base weight is not what it was, bit for bit")
    if not error <= limit:
        raise Refused(f"merge: relative error of W' {error:.1e}, allowed {limit:.1e}")
    row = {
        "stage": "merge", "name": "MLP", "matrices": len(linears),
        "merge_ms": statistics.median(switches) * 1e3, "first_ms": first * 1e3,
        "unmerge_ms": back * 1e3, "error": error, "repetitions": turns,
        "where": f"{len(linears)} matrices",
    }  # fmt: skip
    print(
        f"  merge of {len(linears)} MLP matrices: {row['merge_ms']:.1f} ms (first, with copies of "
        f"the base, {row['first_ms']:.1f}; unmerge {row['unmerge_ms']:.1f}; error {error:.1e})"
    )
    return [row]


def measure_admission(models: Models) -> list[dict[str, Any]]:
    """One request after another into 64 slots: until the call returns, and until it is done."""
    bank = models.bank("all-linear", "bf16")
    slots = bank.slots(64)
    wanted = llama.mixtures(bank, len(slots))
    rows = []
    for backend in (None,) if models.device.type == "cpu" else (None, *GPU_BACKENDS):
        returned, done = [], []
        with nullcontext() if backend is None else t2k.backend(backend):
            for turn in range(2):  # the first warms up
                for slot, mixture in enumerate(wanted):
                    _wait(models.device)
                    begun = time.perf_counter()
                    slots.admit(slot, mixture)
                    middle = time.perf_counter()
                    _wait(models.device)
                    if turn:
                        returned.append(middle - begun)
                        done.append(time.perf_counter() - begun)
        row = {
            "stage": "admit", "name": backend or "policy", "requests": len(slots),
            "values": slots.arena.shape[1], "returned_us": statistics.median(returned) * 1e6,
            "done_us": statistics.median(done) * 1e6,
        }  # fmt: skip
        rows.append(row)
        print(
            f"  admit one of {len(slots)} requests, {row['values']:,} values, {row['name']}: "
            f"{row['returned_us']:.1f} us until the call returns, {row['done_us']:.1f} until done"
        )
    return rows


def _merge_error(
    models: Models, bank: t2k.ExpertBank, name: str, expert: str
) -> tuple[float, float]:
    """Of a merged weight against W + U·diag(σ⊙(z − 1))·Vᵀ in fp64, and what is allowed: twice
    that of plain torch in fp32, rounded once."""
    linear, f = models.dense.get_submodule(name), models.factors("bf16")[name]
    layer = bank.model.get_submodule(name)
    change = f.S.double() * (bank[expert].z[name].to(f.S).double() - 1)
    want = layer.stored_weight().double() + (f.U.double() * change) @ f.V.double().t()
    near = layer.stored_weight().float() + (f.U.float() * change.float()) @ f.V.float().t()
    limit = 2 * relative_error(near.to(linear.weight.dtype), want) + GATE_FLOOR
    return relative_error(linear.weight, want), limit


def _checksum(weight: Tensor) -> int:
    """Of all bits, with their places: an exact sum of integers."""
    bits = weight.detach().view(torch.int16).long()
    return int((bits * torch.arange(1, bits.shape[1] + 1, device=bits.device)).sum())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench_model", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add_shared(parser, device=True)
    llama.add_size(parser)
    add = parser.add_argument
    add("--requests", type=int, nargs="+", default=[32, 1, 8, 64], metavar="B")
    add("--prompt", type=int, default=128, metavar="T", help="tokens of a request before decode")
    add("--targets", choices=TARGETS, nargs="+", default=list(TARGETS))
    add("--factors", choices=FACTORS, nargs="+", default=list(FACTORS))
    add(
        "--only",
        choices=STAGES,
        nargs="+",
        help="some of the stages",
    )
    add("--compile", action="store_true", help="each form through torch.compile, too")
    add("--eager", action="store_true", help="on a GPU: each form without a graph, too")
    add("--seconds", type=float, default=0.5, metavar="S", help="for each form (0.5)")
    add("--minutes", type=float, default=7.0, help="start no further stage after this (7)")
    return parser


def run(
    args: argparse.Namespace, size: llama.Size, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All stages in the order of their weight for the goals; prints and saves as it goes."""
    began, device = time.perf_counter(), torch.device(args.device)
    rate = matmul_gflops(torch.bfloat16, device)
    bandwidth = Bandwidth(device, torch.get_num_threads())
    models = Models(size, device, args.prompt + 2 + SLACK)
    small = Models(replace(size, layers=min(_GATE_LAYERS, size.layers)), device,
                   args.prompt + 2 + SLACK)  # fmt: skip
    first = models.factors("bf16")["model.layers.0.self_attn.q_proj"]
    gbs = sorted(bandwidth.sample((first.U, first.V.t())) for _ in range(5))[2]
    parameters = sum(p.numel() for p in models.dense.parameters())
    print(f"{parameters / 1e9:.2f} G parameters; {gbs:.0f} GB/s, {rate:.0f} GFLOP/s", flush=True)
    stages = args.only or STAGES
    rows: list[dict[str, Any]] = []
    missed: list[str] = []
    result: dict[str, Any] = {
        "ceilings": {"gbs": gbs, "matmul_gflops": rate, "bandwidth_method": bandwidth.method},
        "parameters": parameters, "not_measured": missed, "rows": rows,
    }  # fmt: skip

    def add(found: list[dict[str, Any]]) -> None:
        rows.extend({**row, "size": size.label} for row in found)
        result["seconds"] = time.perf_counter() - began
        save(result)

    if "merge" in stages:
        add(measure_merge(models, 7))
    if "admit" in stages:
        add(measure_admission(models))
    for stage in ("decode", "prefill"):
        for requests in args.requests if stage in stages else ():
            if time.perf_counter() - began > 60 * args.minutes:
                missed.append(f"{stage} of {requests} requests")
                continue
            add(measure_stage(args, models, small, requests, stage))
            gc.collect()
    if missed:
        print(f"out of time, not measured: {', '.join(missed)}")
    save(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a result of ours was refused; 2 for a wrong command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    size = llama.size_of(parser, args)
    if min(*args.requests, args.prompt) < 1 or not args.seconds > 0:
        parser.error("--requests, --prompt and --seconds must be positive")
    left_out = choose_factors(parser, args, size, STAGES) if args.device == "cuda" else []
    record = begin(parser, args)
    print(json.dumps(record, ensure_ascii=False, indent=1), flush=True)
    settings = {**vars(size), "prompt": args.prompt, "experts": EXPERTS,
                "factors_left_out": left_out}  # fmt: skip
    head = {"schema": SCHEMA, "benchmark": "model", "environment": record, "settings": settings}

    def save(result: dict[str, Any]) -> None:
        if args.json is not None:
            write(args.json, {**head, **result})

    try:
        with torch.no_grad():  # layers that share x are no one call in inference mode
            result = run(args, size, save)
    except Refused as refusal:
        print(f"REFUSED: {refusal}", file=sys.stderr)
        return 1
    return int(any("refused" in row for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
