"""Make a table of tile sizes for the GPU at hand: ``python -m t2kernels.tune --out FILE``.

For every kernel, shape, dtype and number of tokens, each candidate tile is compiled, checked
against fp64 and timed; the fastest right one is written down. The file is whole after every entry,
and a second call with the same ``--out`` goes on where the first stopped. Use it by setting
``T2_TUNING=FILE``; tables that come with the package lie in ``ops/triton/tables``.

Nothing of this runs when a kernel is used: tuning is this command and nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .quantized import FACTOR_KINDS
from .testing import error_floor, poisoned_empty, relative_error

if TYPE_CHECKING:
    from .ops.triton.common.tables import Tile

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES = (*FLOATS, *FACTOR_KINDS)
# The linears of Llama-3-8B: (out, in).
SHAPES = ("4096x4096", "1024x4096", "14336x4096", "4096x14336")
TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
# Components of the delta form while it is timed; slots of a batch.
RANK, SLOTS = 256, 64
# Rows that are compared with fp64, and memory that successive calls go through: more than an L2.
CHECKED_ROWS, COLD_BYTES, MOST_SETS = 32, 256 << 20, 128

Call = Callable[[], Tensor]
# Seconds per call of calls that do the same on different memory.
Timer = Callable[[Sequence[Call]], float]


class Case(NamedTuple):
    """One entry to be: ``outputs`` and ``inner`` are the sizes of the kernel's product."""

    kernel: str
    dtype: str
    outputs: int
    inner: int
    tokens: int


@dataclass
class Work:
    """A case's calls on several sets of memory, and what its checked rows should be."""

    calls: list[Call]
    rows: Tensor
    truth: Tensor
    plain: Tensor


def cases(shapes: Sequence[str], dtypes: Sequence[str], tokens: Sequence[int]) -> list[Case]:
    """Every product of layers (out, in) of full rank, each once; fewest tokens first."""
    found: dict[Case, None] = {}
    for count in sorted(tokens):
        for dtype in dtypes:
            for shape in shapes:
                m, n = map(int, shape.split("x"))
                r = min(m, n)
                products = [("project", r, n), ("expand", m, r), ("delta", m, n)]
                if count > 16:  # of backward
                    products += [("gradient", r, m), ("expand_t", n, r)]
                found |= dict.fromkeys(Case(k, dtype, o, i, count) for k, o, i in products)
    return list(found)


def candidates(case: Case, shared: int, descriptors: bool) -> list[Tile]:
    """Tiles worth timing: those of the rules, and their neighbours, that fit the GPU."""
    from .ops.triton.common import config, tables
    from .ops.triton.common.tables import Tile

    if case.dtype == "fp32":
        found = [config.DECODE_FP32, config.FP32, config.FP32_LARGE, Tile(32, 64, 32, 4, 3)]
    else:
        found = []
        if case.tokens <= 128:
            rows = max(16, tables.bucket(case.tokens))
            shapes = ((32, 128, 5), (32, 256, 3), (64, 64, 5), (64, 128, 4), (128, 64, 4))
            found += [Tile(rows, *shape[:2], 4, shape[2], weights_first=True) for shape in shapes]
        if case.tokens >= 64:
            found += [config.MEDIUM_8BIT, config.MEDIUM, Tile(128, 128, 64, 4, 4, chunk=32)]
            found += [config.LARGE_8BIT, config.LARGE_SM80]
        if case.tokens >= 128 and case.dtype not in FACTOR_KINDS:
            large = [config.LARGE, Tile(128, 256, 64, 8, 3, chunk=64)]
            large += [Tile(128, 128, 64, 8, 4), Tile(256, 128, 64, 8, 4, chunk=32)]
            engine = [t._replace(descriptors=True) for t in large if descriptors]
            found += [*large, *engine, *(t._replace(persistent=True) for t in engine)]
    return [tile for tile in dict.fromkeys(found) if config.tile_bytes(tile) <= shared]


class Operands(NamedTuple):
    """What a case's product is made of; W, Vh and U as the kernel wants them, or None."""

    W: Tensor | None
    Vh: Tensor | None
    U: Tensor | None


class _Random:
    """Random operands, made where they are used: 32768 rows would take a CPU minutes."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.kind = case.dtype if case.dtype in FACTOR_KINDS else None
        self.dtype = FLOATS.get(case.dtype, torch.bfloat16)
        self.device = device
        self.gen = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, size: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.gen, device=self.device)
        return values.mul_(size).to(self.dtype)

    def factor(self, *shape: int) -> Tensor:
        """8-bit values of about 73 in the mean square, or numbers of about 1/16."""
        if self.kind is None:
            return self.normal(*shape, size=1 / 16)
        values = torch.randn(shape, generator=self.gen, device=self.device).mul_(73)
        return values.clamp_(-127, 127).to(FACTOR_KINDS[self.kind])

    def operands(self, case: Case) -> Operands:
        o, i = case.outputs, case.inner
        if case.kernel == "project":
            return Operands(None, self.factor(o, i), None)
        if case.kernel == "expand":
            return Operands(None, None, self.factor(o, i))
        if case.kernel == "expand_t":
            return Operands(None, self.factor(i, o), None)
        if case.kernel == "gradient":
            return Operands(None, None, self.factor(i, o))
        return Operands(self.normal(o, i), self.factor(RANK, i), self.factor(o, RANK))


def copies(size: int) -> int:
    """Sets of ``size`` bytes through which successive calls go, so that each meets cold weights."""
    return min(MOST_SETS, -(-COLD_BYTES // size))


def prepare(case: Case, device: torch.device) -> Work:
    """Random operands for the case, in as many copies as keep an L2 cold."""
    from .ops import triton as backend
    from .ops.triton import _backward, _forward

    T, random = case.tokens, _Random(case, device)
    r = RANK if case.kernel == "delta" else case.outputs  # columns of h or gu, where there are any
    sets = [random.operands(case)]
    size = sum(w.numel() * w.element_size() for w in sets[0] if w is not None)
    more = copies(size) - 1 if device.type == "cuda" else 0
    sets += [random.operands(case) for _ in range(more)]
    left = random.normal(T, case.inner)
    h = random.normal(T, r) if case.kernel == "gradient" else None
    base = random.normal(r).float()
    d = base * (1 + 0.3 * random.normal(min(SLOTS, T), r).float())
    slot = (torch.arange(T, device=device) * len(d) // T).int()  # requests one after another
    scale = None
    if random.kind is not None:
        scale = torch.rand(r, generator=random.gen, device=device).add_(0.5).div_(73)
    rows = torch.linspace(0, T - 1, min(T, CHECKED_ROWS), device=device).long()

    def call(w: Operands) -> Tensor:
        W, Vh, U = (None if t is None else backend._patterns(t) for t in w)
        if case.kernel == "delta" and W is not None and Vh is not None and U is not None:
            return backend.delta(left, W, U, Vh.t(), d, base, slot, None, scale)
        if case.kernel == "expand" and U is not None:
            return _forward.expand(left, U, None, transposed=False)
        if case.kernel == "expand_t" and Vh is not None:
            return _forward.expand(left, Vh, None, transposed=True)
        out = torch.empty((T, r), dtype=left.dtype, device=device)
        if Vh is not None:
            _forward.project(left, Vh.t(), d, base, slot, scale, h=None, hd=out)
        elif U is not None:
            _backward.gradient(left, U, d, base, slot, scale, h=h, gud=out)
        return out

    def formula(dtype: torch.dtype) -> Tensor:
        """The checked rows, in fp64 or in what plain torch would be given."""
        W, Vh, U = (None if t is None else t.to(dtype) for t in sets[0])
        x = left[rows].to(dtype)
        diagonal = d[slot[rows].long()] - (base if case.kernel == "delta" else 0)
        diagonal = diagonal if scale is None else diagonal * scale
        if W is not None and Vh is not None and U is not None:
            return x @ W.t() + ((x @ Vh.t()) * diagonal).to(dtype) @ U.t()
        if case.kernel == "project" and Vh is not None:
            return ((x @ Vh.t()) * diagonal).to(dtype)
        if case.kernel == "gradient" and U is not None:
            return ((x @ U) * diagonal).to(dtype)
        return x @ U.t() if U is not None else x @ Vh  # type: ignore[operator]

    calls: list[Call] = [functools.partial(call, w) for w in sets]
    return Work(calls, rows, formula(torch.float64), formula(left.dtype))


def right(work: Work) -> bool:
    """Whether the first call, into poisoned memory, errs at most twice as much as plain torch."""
    with poisoned_empty():
        y = work.calls[0]()
    # The interpreter truncates to bf16 where a GPU rounds.
    truncates = y.device.type == "cpu" and y.dtype == torch.bfloat16
    limit = (4 if truncates else 2) * relative_error(work.plain, work.truth)
    limit += error_floor(work.plain.dtype, work.plain.numel())
    return bool(y.isfinite().all()) and relative_error(y[work.rows], work.truth) <= limit


def graph_timer(seconds: float) -> Timer:
    """Median of graph replays, each of which goes through all calls once."""

    def measure(calls: Sequence[Call]) -> float:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 7 or (time.perf_counter() - begin < seconds and len(times) < 200):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
        return sorted(times[2:])[len(times[2:]) // 2]

    return measure


def wall_timer(calls: Sequence[Call]) -> float:
    """One call by the clock: for the rehearsal, where speed means nothing."""
    begin = time.perf_counter()
    calls[0]()
    return time.perf_counter() - begin


def best(
    case: Case, tiles: Sequence[Tile], device: torch.device, timer: Timer
) -> tuple[Tile | None, float, float, list[str]]:
    """(tile, its seconds, seconds by the rules, what was refused); no tile: none was right."""
    from .ops.triton.common import tables

    work, times, refused = prepare(case, device), {}, []
    with tables.forced(case.kernel, None):
        if not right(work):
            raise RuntimeError(f"tune: {case} is wrong with the tile of the rules; run the tests.")
        rules = timer(work.calls)
    for tile in tiles:
        with tables.forced(case.kernel, tile):
            try:
                if right(work):
                    times[tile] = timer(work.calls)
                else:
                    refused.append(f"wrong result with {tile}")
            except Exception as error:  # the compiler's and the launcher's have many types
                refused.append(f"{type(error).__name__} with {tile}")
                if device.type == "cuda":
                    torch.cuda.synchronize()  # a broken context ends the command here
    if not times:
        return None, rules, rules, refused
    fastest = min(times, key=lambda tile: times[tile])
    return fastest, times[fastest], rules, refused


def tune(
    wanted: Sequence[Case], out: Path, device: torch.device, timer: Timer, minutes: float
) -> Iterator[str]:
    """Fill the table ``out`` with the cases it lacks; one line of text for each."""
    from .ops.triton.common import config, tables

    gpu = tables.gpu_name(device)
    tiles = dict(tables.read(out, gpu).tiles) if out.exists() else {}
    shared, descriptors = config.shared_limit(device), config.has_descriptors(device)
    begin = time.monotonic()
    for done, case in enumerate(wanted):
        dtype = FLOATS.get(case.dtype, torch.bfloat16)
        weight = {"int8": torch.int8, "fp8": torch.uint8}.get(case.dtype, dtype)
        name = tables.key(
            case.kernel, case.tokens, case.outputs, case.inner,
            torch.empty(0, dtype=dtype), torch.empty(0, dtype=weight),
        )  # fmt: skip
        if name in tiles:
            continue
        if time.monotonic() - begin > 60 * minutes:
            yield f"stopped after {minutes:g} minutes, {len(wanted) - done} cases to go: call again"
            return
        found = best(case, candidates(case, shared, descriptors), device, timer)
        tile, seconds, rules, refused = found
        if tile is None:
            yield f"{name}: no candidate was right; the rules decide"
        else:
            tiles[name] = tile
            today = datetime.date.today().isoformat()
            tables.write(out, gpu, tiles, torch=torch.__version__, date=today)
            yield f"{name}: {1e6 * seconds:.1f} us, by the rules {1e6 * rules:.1f} us, {tile}"
        yield from (f"  refused: {reason}" for reason in refused)


def _shape(text: str) -> str:
    m, _, n = text.partition("x")
    if not all(size.isascii() and size.isdigit() and int(size) for size in (m, n)):
        raise argparse.ArgumentTypeError(f"expected OUTxIN, like 4096x14336, got {text!r}")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m t2kernels.tune", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="the table, new or to go on with")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, help="layers, OUTxIN")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=_count, default=TOKENS)
    parser.add_argument("--seconds", type=_positive, default=0.05, help="per candidate")
    parser.add_argument("--minutes", type=_positive, default=60.0, help="stop after that")
    parser.add_argument(
        "--rehearse", action="store_true",
        help="on a CPU, in Triton's interpreter; no GPU accepts what comes out",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.out.is_dir():
        parser.error(f"--out: {options.out} is a folder; name the table in it")
    if not options.out.parent.is_dir():
        parser.error(f"--out: the folder {options.out.parent} does not exist; make it")
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not torch.cuda.is_available():
        print(
            "tune: there is no CUDA GPU here; a table can only be made on the GPU that it is for "
            "(--rehearse goes through the motions).",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    timer = wall_timer if options.rehearse else graph_timer(options.seconds)
    wanted = cases(options.shapes, options.dtypes, options.tokens)
    for line in tune(wanted, options.out, device, timer, options.minutes):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
