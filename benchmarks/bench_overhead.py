"""What a call of a layer costs before and after its kernel: microseconds, one number a case.

    python benchmarks/bench_overhead.py
    python benchmarks/bench_overhead.py --json out.json --seconds 0.3

The matrices are 16 x 16 and there is one token a request, so that the kernel itself takes some
tenths of a microsecond (the row "bare kernel": the native call with its addresses ready) and the
rest of a row is overhead: Python, argument parsing, torch.empty. Cases run in turns, many short
rounds each; the median over the rounds is printed with their quartiles. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import torch
    from torch import Tensor, nn

    import t2kernels as t2k
    from t2kernels.ops import native
    from t2kernels.ops.layout import TYPE_CODES
except ImportError as error:
    sys.exit(f"bench_overhead: {error}. Run it with the Python that t2kernels is installed in.")

SIZE = 16
REQUESTS = 4
CALLS = 200  # a round


class Model(nn.Module):
    """One converted layer under a model, as every layer is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(SIZE, SIZE)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, one call) of every line; a call that needs a routing stands inside its own block."""
    x = torch.randn(REQUESTS, 1, SIZE, dtype=dtype)
    dense = nn.Linear(SIZE, SIZE, dtype=dtype)
    yield "nn.Linear", lambda: dense(x)
    at_rest, own = (t2k.SVFLinear.from_linear(nn.Linear(SIZE, SIZE, dtype=dtype)) for _ in "ab")
    yield "at rest (base)", lambda: at_rest(x)
    with torch.no_grad():
        own.z.mul_(1.5)
    yield "own z", lambda: own(x)
    routings = {"uniform": "a", "rows": ["a", "b", None, "a"], "rows, all base": None}
    for name, routing in routings.items():
        yield name, routed(dtype, routing, x)
    f = own.factors
    yield "svf_linear (no layer)", lambda: t2k.svf_linear(x, f, f.S)
    yield "bare kernel", bare(x, f)


def routed(dtype: torch.dtype, routing: object, x: Tensor) -> Callable[[], object]:
    """A call inside ``bank.use(routing)``, which stays open as long as the call is kept."""
    model = Model().to(dtype)
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for name, scale in (("a", 1.5), ("b", 0.5)):
        bank.add(name, t2k.Expert({"proj": torch.full((SIZE,), scale)}))
    layer, block = model.proj, bank.use(routing)
    block.__enter__()
    return lambda: block and layer(x)


def bare(x: Tensor, f: t2k.SVDFactors) -> Callable[[], object]:
    """The native function by itself, on addresses that are there already."""
    U, Vh = f.U.contiguous(), f.V.t().contiguous()
    y = torch.empty_like(x)
    code = TYPE_CODES[x.dtype]
    arguments = (
        x.data_ptr(), SIZE, U.data_ptr(), Vh.data_ptr(), f.S.data_ptr(), 0, 1, 0, f.S.data_ptr(),
        0, 0, y.data_ptr(), 0, REQUESTS, SIZE, SIZE, SIZE, code, code, 1, -1,
    )  # fmt: skip
    kept = (x, U, Vh, f, y)
    return lambda: kept and native._native.svf_forward(*arguments)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(dtype: torch.dtype, seconds: float) -> dict[str, tuple[float, float, float]]:
    """(quartile, median, quartile) in microseconds a call, by case."""
    calls = dict(cases(dtype))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timeit.timeit(call, number=CALLS)
    while sum(map(sum, samples.values())) < seconds * len(calls):
        for name, call in calls.items():
            samples[name].append(timeit.timeit(call, number=CALLS))
    result = {}
    for name, times in samples.items():
        low, middle, high = statistics.quantiles(times, n=4)
        result[name] = (low / CALLS * 1e6, middle / CALLS * 1e6, high / CALLS * 1e6)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.5, help="a case (default 0.5)")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    args = parser.parse_args(argv)
    if native._MISSING is not None:
        sys.exit(f"bench_overhead: {native._MISSING}")
    torch.manual_seed(0)
    with one_thread(), torch.no_grad():
        rows = measure(getattr(torch, args.dtype), args.seconds)
    print(f"{'microseconds a call':24s} {'median':>7s}   quartiles")
    for name, (low, middle, high) in rows.items():
        print(f"{name:24s} {middle:7.2f}   {low:.2f}-{high:.2f}")
    if args.json:
        args.json.write_text(json.dumps({"dtype": args.dtype, "us": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
