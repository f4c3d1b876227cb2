"""How long it takes to decompose all linear layers of a model, one weight after another.

    python benchmarks/bench_decompose.py --device cuda --state .gpu/decompose.json --json out.json

Random weights of the shapes of Llama-3-8B, each made on the device right before its turn. What is
timed is `t2kernels.decompose` with factors in the weight's dtype, as `convert` calls it, with its
own checks of accuracy. A run that is out of time keeps what it has in --state and the next one
goes on from there; the total is a sum of measured times only when every weight has been done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    import torch
    import transformers  # noqa: F401

    import t2kernels as t2k
except ImportError as error:
    sys.exit(f"bench_decompose: {error}. Run it where t2kernels[hf] is installed.")

import llama
from ceilings import matmul_gflops
from command import add_shared, begin
from results import SCHEMA, write
from shapes import Shape

# Of fp32 factors against the weight: what `decompose` promises on any device.
ERROR, ORTHOGONALITY = 5e-6, 1e-5


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench_decompose", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add_shared(parser, device=True)
    llama.add_size(parser)
    parser.add_argument("--state", type=Path, metavar="FILE", help="what earlier runs have done")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no weight after this (8)")
    return parser


def weights(size: llama.Size) -> list[tuple[str, Shape]]:
    """Name and shape of every weight; one of each shape comes first, so that a run that is cut
    short has them all."""
    named = [
        (f"layers.{layer}.{name}", shape)
        for layer in range(size.layers)
        for name, shape in size.linears().items()
    ]
    firsts = {shape: name for name, shape in reversed(named)}
    return sorted(named, key=lambda pair: pair[0] != firsts[pair[1]])


class State:
    """Seconds by weight, kept in a file that another run on the same machine may go on with."""

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.seconds: dict[str, float] = {}
        self.errors: dict[str, list[float]] = {}  # by shape: relative, of UᵀU, of VᵀV
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if found["identity"] != identity:
                raise ValueError(
                    f"{path} was made for {found['identity']}, this run is {identity}. "
                    "Name another --state, or remove it."
                )
            self.seconds, self.errors = found["seconds"], found["errors"]

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = {"identity": self.identity, "seconds": self.seconds, "errors": self.errors}
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(text))
        os.replace(part, self.path)


def one(name: str, shape: Shape, device: torch.device, state: State, index: int) -> None:
    """Time one weight; the first of a shape is checked, in a decomposition of its own."""
    generator = torch.Generator(device).manual_seed(index)
    W = torch.randn(shape.out_features, shape.in_features, generator=generator, device=device)
    W = (W / shape.in_features**0.5).bfloat16()
    if str(shape) not in state.errors:
        found = t2k.accuracy(W, t2k.decompose(W, dtype=torch.float32))  # a warm-up as well
        state.errors[str(shape)] = [
            found.relative_error, found.orthogonality_u, found.orthogonality_v,
        ]  # fmt: skip
    _wait(device)
    begun = time.perf_counter()
    t2k.decompose(W)
    _wait(device)
    state.seconds[name] = time.perf_counter() - begun
    state.save()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rows_of(state: State, named: list[tuple[str, Shape]], label: str) -> list[dict[str, Any]]:
    """A row for each shape, then one for all."""
    rows: list[dict[str, Any]] = []
    expected = 0.0
    for shape in dict.fromkeys(shape for _, shape in named):
        own = [state.seconds[n] for n, s in named if s == shape and n in state.seconds]
        count = sum(s == shape for _, s in named)
        row: dict[str, Any] = {"shape": str(shape), "count": count, "done": len(own)}
        if own:
            expected += statistics.median(own) * count
            error, u, v = state.errors[str(shape)]
            row.update(median_seconds=statistics.median(own), seconds=sum(own))
            row.update(error=error, orthogonality_u=u, orthogonality_v=v)
            if not (error <= ERROR and max(u, v) <= ORTHOGONALITY):
                row["refused"] = f"error {error:.1e}, UᵀU {u:.1e}, VᵀV {v:.1e}"
        rows.append(row)
    last: dict[str, Any] = {"shape": "all", "count": len(named), "done": len(state.seconds)}
    last["size"] = label
    last["where"] = f"{len(state.seconds)} of {len(named)} weights"
    if len(state.seconds) == len(named):
        last["total_minutes"] = sum(state.seconds.values()) / 60
    elif all(row["done"] for row in rows):
        last["extrapolated_minutes"] = expected / 60
    return [*rows, last]


def _format(row: dict[str, Any]) -> str:
    head = f"  {row['shape']:14}{row['done']:4} of {row['count']:4}"
    if "total_minutes" in row:
        return f"{head}  {row['total_minutes']:.2f} minutes, all measured"
    if "extrapolated_minutes" in row:
        return f"{head}  {row['extrapolated_minutes']:.2f} minutes, extrapolated from medians"
    if "median_seconds" not in row:
        return head
    accuracy = f"error {row['error']:.1e}, UᵀU {row['orthogonality_u']:.1e}"
    return (
        f"{head}  {row['median_seconds']:.3f} s each  {accuracy}, VᵀV {row['orthogonality_v']:.1e}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when factors miss their accuracy; 2 for a wrong command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    size = llama.size_of(parser, args)
    record, device = begin(parser, args), torch.device(args.device)
    named = weights(size)
    where = record.get("gpu") or record["cpu"]
    identity = {"size": vars(size), "device": where, "torch": record["torch"],
                "commit": record["commit"]}  # fmt: skip
    try:
        state = State(args.state, identity)
    except ValueError as error:
        parser.error(str(error))
    rate = matmul_gflops(torch.float32, device)
    deadline = time.perf_counter() + 60 * args.minutes
    for index, (name, shape) in enumerate(named):
        if name not in state.seconds and time.perf_counter() < deadline:
            one(name, shape, device, state, index)
    rows = rows_of(state, named, size.label)
    print(f"fp32 matrix products: {rate:.0f} GFLOP/s", *map(_format, rows), sep="\n")
    if args.json is not None:
        write(args.json, {"schema": SCHEMA, "benchmark": "decompose", "environment": record,
                          "settings": vars(size), "matmul_gflops": rate, "rows": rows})  # fmt: skip
    return int(any("refused" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
