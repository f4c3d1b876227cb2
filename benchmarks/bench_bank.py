"""Measure a bank of many experts: memory, adding, admitting one request into a serving slot.

    python benchmarks/bench_bank.py                                   # 1,000 experts of R = 16,384
    python benchmarks/bench_bank.py --experts 10000 --layers 256      # 10,000 of R = 65,536: 1.3 GB
    python benchmarks/bench_bank.py --host --cache 64 --device cuda   # experts in pinned memory

Admission is one mixing launch over all layers. Every request names experts that it has not named
before, so that their rows come from memory, or, with --host, from the host. Before anything is
timed the result of one admission is compared with the equation in fp64. Times on a GPU end with a
wait for it: what a request waits, not what a stream does.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from statistics import median

try:
    import torch
    from torch import nn

    import t2kernels as t2k
except ImportError as error:
    sys.exit(f"bench_bank: {error}. Run it with the Python that t2kernels is installed in.")

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MADE = 16  # experts of different values; more would only measure the random numbers


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=64, help="of 256 x 256, rank 256 each")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--host", action="store_true", help="keep the experts in host memory")
    parser.add_argument("--cache", type=int, default=64, help="rows on the device with --host")
    parser.add_argument("--backends", nargs="+", default=["native", "torch"])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    return parser


def peak_gb() -> float:
    """Largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def experts_of(bank: t2k.ExpertBank, width: int) -> list[t2k.Expert]:
    made = []
    for seed in range(MADE):
        gen = torch.Generator().manual_seed(seed)
        z = {name: 1 + 0.1 * torch.randn(width, generator=gen) for name in bank.layers}
        made.append(t2k.Expert(z))
    return made


def check(bank: t2k.ExpertBank, slots: t2k.Slots, made: list[t2k.Expert], exact: bool) -> None:
    """One mixture of three experts against fp64, or nothing is timed."""
    slots.admit(0, {"e1": 0.5, "e2": -0.25, "e3": 1.0})
    z = torch.stack([torch.cat(list(made[i].z.values())) for i in (1, 2, 3)]).double()
    sigma = torch.cat([m.factors.S for m in t2k.svf_layers(bank.model).values()]).double().cpu()
    weights = torch.tensor([[0.5], [-0.25], [1.0]], dtype=torch.float64)
    truth = sigma * (1 + (weights * (z - 1)).sum(0))
    bound = sigma * (weights.abs() * (z - 1).abs()).sum(0) / (1e9 if exact else 256)
    error = (slots.arena[0].double().cpu() - truth).abs()
    if not bool((error <= bound + 1e-6 * truth.abs()).all()):
        sys.exit("bench_bank: an admission is wrong; nothing was timed.")


def timed(call: Callable[[int], None], rounds: int, device: str) -> list[float]:
    """Seconds of call(0), call(1), ..., the first three left out."""
    seconds = []
    for i in range(rounds + 3):
        start = time.perf_counter()
        call(i)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[3:])


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(args.width, args.width) for _ in range(args.layers)))
    t2k.convert(model, progress=False)
    model.to(args.device)
    bank = t2k.ExpertBank(
        model, dtype=DTYPES[args.dtype], host=args.host, cache=args.cache, capacity=args.experts
    )
    made, before = experts_of(bank, args.width), peak_gb()
    start = time.perf_counter()
    for i in range(args.experts):
        bank.add(f"e{i}", made[i % MADE])
    added = (time.perf_counter() - start) / args.experts
    R, grown = args.layers * args.width, peak_gb() - before
    where = f"{args.device}, torch {torch.__version__}"
    print(f"{args.experts} experts of R = {R} in {args.dtype}, {where}")
    print(
        f"table {bank.nbytes / 1e9:.3f} GB; process {grown:+.3f} GB; add {added * 1e3:.2f} ms each"
    )
    slots = bank.slots(64)
    kinds: dict[str, Callable[[int], object]] = {
        "one expert": lambda i: f"e{7 * i % args.experts}",
        "three": lambda i: {f"e{(7 * i + j * 1009) % args.experts}": 0.3 for j in range(3)},
    }
    for backend in args.backends:
        with t2k.backend(backend):
            check(bank, slots, made, exact=args.dtype == "fp32")
            for kind, mixture in kinds.items():
                found = timed(
                    lambda i, m=mixture: slots.admit(i % 64, m(i)),  # type: ignore[misc]
                    args.rounds,
                    args.device,
                )
                print(
                    f"admit {kind:10s} {backend:7s} median {median(found) * 1e6:8.0f} µs, "
                    f"least {found[0] * 1e6:8.0f} µs"
                )
    if args.host:
        names = [f"e{i}" for i in range(min(args.cache, args.experts))]
        found = timed(lambda i: bank.prefetch(names[:1]), 3, args.device)
        start = time.perf_counter()
        bank.prefetch(names)
        took = time.perf_counter() - start
        print(f"prefetch of {len(names)}: {took * 1e3:.2f} ms on the host; of a resident one: "
              f"{found[0] * 1e6:.0f} µs")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
