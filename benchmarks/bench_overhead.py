"""What a call of a layer costs before and after its kernel: microseconds, one number a case.

    python benchmarks/bench_overhead.py
    python benchmarks/bench_overhead.py --device cuda --json out.json

The matrices are 16 x 16 and there is one token a request, so that the kernel itself takes some
tenths of a microsecond (the row "bare kernel": the native call with its addresses ready) and the
rest of a row is overhead: Python, argument parsing, torch.empty. On a GPU the host's time is
measured, with the CUDA backend asked for by name; a round is short enough to fit into the launch
queue, and the GPU is idle when it begins. Cases run in turns, many short rounds each; the median
over the rounds is printed with their quartiles. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    import torch
    from torch import Tensor, nn

    import t2kernels as t2k
    from t2kernels.ops import cuda, native
except ImportError as error:
    sys.exit(f"bench_overhead: {error}. Run it with the Python that t2kernels is installed in.")

from command import add_shared, begin
from results import SCHEMA, write

SIZE = 16
REQUESTS = 4
CALLS = {"cpu": 200, "cuda": 100}  # of a round
BARE = "bare kernel"
# What a converted layer does; its overhead is what lies beyond the bare kernel.
LAYERS = ("own z", "uniform", "rows", "rows, all base")


class Model(nn.Module):
    """One converted layer under a model, as every layer is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(SIZE, SIZE)


def cases(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, one call) of every line; a call that needs a routing stands inside its own block."""
    x = torch.randn(REQUESTS, 1, SIZE, dtype=dtype, device=device)
    dense = nn.Linear(SIZE, SIZE, dtype=dtype, device=device)
    yield "nn.Linear", lambda: dense(x)
    at_rest, own = (
        t2k.SVFLinear.from_linear(nn.Linear(SIZE, SIZE, dtype=dtype, device=device)) for _ in "ab"
    )
    yield "at rest (base)", lambda: at_rest(x)
    with torch.no_grad():
        own.z.mul_(1.5)
    yield "own z", lambda: own(x)
    routings = {"uniform": "a", "rows": ["a", "b", None, "a"], "rows, all base": None}
    for name, routing in routings.items():
        yield name, routed(dtype, routing, x)
    f = own.factors
    yield "svf_linear (no layer)", lambda: t2k.svf_linear(x, f, f.S)
    module, name = (native, "svf_forward") if device.type == "cpu" else (cuda, "cuda_svf_decode")
    yield BARE, bare(module, name, lambda: t2k.svf_linear(x, f, f.S))


def routed(dtype: torch.dtype, routing: object, x: Tensor) -> Callable[[], object]:
    """A call inside ``bank.use(routing)``, which stays open as long as the call is kept."""
    model = Model().to(x.device, dtype)
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for name, scale in (("a", 1.5), ("b", 0.5)):
        bank.add(name, t2k.Expert({"proj": torch.full((SIZE,), scale)}))
    layer, block = model.proj, bank.use(routing)
    block.__enter__()
    return lambda: block and layer(x)


def bare(module: Any, name: str, call: Callable[[], object]) -> Callable[[], object]:
    """The native function ``name`` that ``call`` ends in, on the very addresses that it got.

    The outputs and workspaces of that call are kept: the function writes to them again.
    """
    plain, kept, seen = torch.empty, [], []

    def empty(*args: Any, **more: Any) -> Tensor:
        kept.append(plain(*args, **more))
        return kept[-1]

    class Listening:
        def __getattr__(self, attribute: str) -> Any:
            found = getattr(library, attribute)
            if attribute != name:
                return found

            def listen(*args: Any) -> Any:
                seen.append(args)
                return found(*args)

            return listen

    library = module._native
    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(module, "_native", Listening()),
    ):
        call()
    (arguments,), function = seen, getattr(library, name)
    return lambda: kept and function(*arguments)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    dtype: torch.dtype, device: torch.device, seconds: float
) -> dict[str, tuple[float, float, float]]:
    """(quartile, median, quartile) in microseconds a call, by case."""
    calls, number = dict(cases(dtype, device)), CALLS[device.type]
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timeit.timeit(call, number=number)
    while sum(map(sum, samples.values())) < seconds * len(calls) or len(samples[BARE]) < 4:
        for name, call in calls.items():
            samples[name].append(timeit.timeit(call, setup=wait, number=number))
    result = {}
    for name, times in samples.items():
        low, middle, high = statistics.quantiles(times, n=4)
        result[name] = (low / number * 1e6, middle / number * 1e6, high / number * 1e6)
    return result


def rows_of(found: dict[str, tuple[float, float, float]]) -> list[dict[str, Any]]:
    """A row a case; ``python_us`` of a layer is what lies beyond the bare kernel."""
    rows = []
    for name, (low, middle, high) in found.items():
        row = {"part": "overhead", "name": name, "us": middle, "q1_us": low, "q3_us": high}
        if name in LAYERS:
            row.update(python_us=middle - found[BARE][1], where=name)
        rows.append(row)
    return rows


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench_overhead", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    add_shared(parser, device=True)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.5, help="a case (default 0.5)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 for a wrong command line or where the kernels are missing."""
    parser = build_parser()
    args = parser.parse_args(argv)
    on_cpu = args.device == "cpu"
    missing = native._MISSING if on_cpu else cuda._missing
    if missing is not None:
        parser.error(missing)
    record = begin(parser, args)
    torch.manual_seed(0)
    with one_thread(), torch.no_grad(), nullcontext() if on_cpu else t2k.backend("cuda"):
        rows = rows_of(measure(getattr(torch, args.dtype), torch.device(args.device), args.seconds))
    print(f"{'microseconds a call':24s} {'median':>7s}   quartiles")
    for row in rows:
        beyond = f"   {row['python_us']:.2f} beyond the kernel" if "python_us" in row else ""
        print(f"{row['name']:24s} {row['us']:7.2f}   {row['q1_us']:.2f}-{row['q3_us']:.2f}{beyond}")
    if args.json:
        write(args.json, {"schema": SCHEMA, "benchmark": "overhead", "environment": record,
                          "settings": {"dtype": args.dtype}, "rows": rows})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
