"""What stands around a product: layers that share x as one call, and mixing into the arena.

    python benchmarks/bench_parts.py --device cuda --json out.json
    python benchmarks/bench_parts.py --quick

A group (q, k, v; gate, up) is one call that reads x once and starts all members' first products
together, against one call a member, on every backend that has both. Each member's output is
compared with the formula in fp64 first: at most twice what plain torch errs. Mixing: one request
admitted into one of 64 slots, and 64 requests at once, out of 6 and of 10,000 resident experts; no
other slot may change a bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    import torch

    import t2kernels as t2k
except ImportError as error:
    sys.exit(f"bench_parts: {error}. Run it with the Python that t2kernels is installed in.")

from ceilings import Bandwidth, matmul_gflops
from command import add_shared, begin
from harness import Contestant, Refused, Samples, make_timer, measure, ratio
from layers import cache_bytes
from mixing import measure_mixing
from results import SCHEMA, write
from torch import Tensor

from t2kernels.ops import dispatch
from t2kernels.testing import Group, assert_accurate, make_group, plain_forward

# in_features, and (out_features, rank) of every member: Llama-3-8B's, and a rehearsal's.
GROUPS = {
    "qkv": (4096, ((4096, 4096), (1024, 1024), (1024, 1024))),
    "gate-up": (4096, ((14336, 4096), (14336, 4096))),
}
QUICK = {"qkv": (64, ((64, 64), (32, 32), (32, 32))), "gate-up": (64, ((160, 64), (160, 64)))}
JUDGED = "qkv"  # the group that the goal is about
DTYPES = ("bf16", *t2k.FACTOR_KINDS)
_CACHES, _SLOTS = 4, 8


def sets_of(group: Group, device: torch.device) -> list[Group]:
    """The group at so many addresses that none of its weights waits in a cache."""
    size = sum(t.nbytes for t in (*group.Us, group.V))
    count = min(max(2, -(-_CACHES * cache_bytes(device) // size)), 64)
    more = [
        replace(group, Us=tuple(U.clone() for U in group.Us), V=group.V.t().clone().t())
        for _ in range(count - 1)
    ]
    return [group, *more]


def together(module: Any, group: Group) -> list[Tensor]:
    found: list[Tensor] = module.forward_group(*group.args())
    return found


def apart(module: Any, group: Group) -> list[Tensor]:
    return [module.forward(*member.args())[0] for member in group.members()]


def gate(name: str, found: list[Tensor], group: Group) -> None:
    """Refused unless every member is as accurate as plain torch, within a factor of two."""
    reference = dispatch.load("reference")
    for index, (y, member) in enumerate(zip(found, group.members(), strict=True)):
        truth, _ = reference.forward(*member.double().args())
        try:
            assert_accurate(y, truth, plain_forward(member), f"member {index}")
        except AssertionError as error:
            raise Refused(f"{name}: {error}") from error


def measure_group(
    name: str, dtype: str, tokens: int, device: torch.device, quick: bool, seconds: float
) -> list[dict[str, Any]]:
    """A row for every backend, then one for the fastest group over the fastest single calls."""
    n, members = (QUICK if quick else GROUPS)[name]
    kind = dtype if dtype in t2k.FACTOR_KINDS else None
    group = make_group(
        tokens, n, [m for m, _ in members], [r for _, r in members], slots=_SLOTS,
        bias=[False] * len(members), dtype=torch.bfloat16, device=device, factors=kind,
    )  # fmt: skip
    sets = sets_of(group, device)
    rows: list[dict[str, Any]] = []
    entered: list[tuple[dict[str, Any], Contestant]] = []
    for backend in t2k.BACKENDS:
        if backend == "reference":
            continue
        row = {"part": "group", "group": name, "dtype": dtype, "tokens": tokens, "name": backend}
        reason = _unavailable(backend, group)
        if reason is not None:
            rows.append({**row, "absent": reason})
            continue
        module = dispatch.load(backend)
        for form, call in (("group", together), ("calls", apart)):
            own = {**row, "form": form}
            rows.append(own)
            try:
                gate(f"{backend}, {form}", call(module, group), group)
            except Refused as refusal:
                own["refused"] = str(refusal)
                continue
            entered.append((own, _contestant(f"{backend} {form}", partial(call, module), sets)))
    samples = measure([c for _, c in entered], make_timer(device, len(sets)), seconds=seconds)
    for index, (row, _) in enumerate(entered):
        own = samples[index]
        row.update(time_us=own.median * 1e6, p20_us=own.quantile(0.2) * 1e6)
        row.update(p80_us=own.quantile(0.8) * 1e6, timing=own.timing)
    summary = _summary(name, dtype, tokens, [row for row, _ in entered], samples)
    return rows if summary is None else [*rows, summary]


def _summary(
    name: str, dtype: str, tokens: int, rows: list[dict[str, Any]], samples: dict[int, Samples]
) -> dict[str, Any] | None:
    """The fastest group against the fastest single calls, whoever makes them."""
    best: dict[str, int] = {}
    for index, row in enumerate(rows):
        form = row["form"]
        if form not in best or row["time_us"] < rows[best[form]]["time_us"]:
            best[form] = index
    if len(best) < 2:
        return None
    value, low, high = ratio(samples[best["group"]], samples[best["calls"]])
    where = f"{dtype} {name} T={tokens}, {rows[best['group']]['name']}"
    return {
        "part": "group", "group": name, "dtype": dtype, "tokens": tokens, "name": "fastest",
        "judged": name == JUDGED, "ratio": value, "interval": (low, high),
        "where": f"{where} against {rows[best['calls']]['name']}",
    }  # fmt: skip


def _unavailable(backend: str, group: Group) -> str | None:
    """Why a backend lacks the group or one of its members."""
    try:
        module = dispatch.load(backend)
    except ImportError as error:
        return f"cannot be imported ({error})"
    if not hasattr(module, "forward_group"):
        return "has no call for a group"
    reasons = [module.unavailable(*member.args()) for member in group.members()]
    reason: str | None = next(filter(None, reasons), None)
    return reason or module.group_unavailable(*group.args())


def _contestant(name: str, call: Any, sets: list[Group]) -> Contestant:
    return Contestant(name, _SLOTS, lambda i: call(sets[i]), _no_formula, 0, 0)


def _no_formula(rows: Tensor, double: bool) -> Tensor:
    raise Refused("a group is checked member by member")


def _format(row: dict[str, Any]) -> str:
    if row["part"] == "mix":
        table = f"{row['experts']} experts in {row['table']}"
        head = f"  mix {row['each']} of {table}, {row['requests']} requests  {row['name']:8}"
    else:
        head = f"  {row['dtype']:5}{row['group']:8} T={row['tokens']:<4} {row['name']:8}"
    for word in ("refused", "absent"):
        if word in row:
            return f"{head}{word.upper()}: {row[word]}"
    if "ratio" in row:
        low, high = row["interval"]
        return f"{head}group / calls {row['ratio']:.3f} ({low:.3f}–{high:.3f})"
    share = f"  {row['percent_of_floor']:.0f} % of the floor" if row["part"] == "mix" else ""
    spread = f"({row['p20_us']:.1f}–{row['p80_us']:.1f})"
    return f"{head}{row.get('form', ''):6}{row['time_us']:10.1f} us {spread}{share}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench_parts", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add_shared(parser, device=True)
    add = parser.add_argument
    add("--quick", action="store_true", help="small layers, to rehearse on a CPU")
    add("--groups", choices=tuple(GROUPS), nargs="+", default=list(GROUPS))
    add("--no-mix", dest="mix", action="store_false", help="leave mixing out")
    add("--tokens", type=int, nargs="+", default=[1, 8, 32, 128], metavar="T")
    add("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES))
    add("--seconds", type=float, default=0.05, metavar="S", help="for each contestant (0.05)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a result of ours was refused; 2 for a wrong command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.tokens) < 1 or not args.seconds > 0:
        parser.error("--tokens and --seconds must be positive")
    record, device = begin(parser, args), torch.device(args.device)
    print(json.dumps(record, ensure_ascii=False, indent=1), flush=True)
    probe = torch.ones(1 << 22, device=device)
    bandwidth = Bandwidth(device, torch.get_num_threads())
    ceilings = {
        "gbs": sorted(bandwidth.sample((probe,)) for _ in range(5))[2],
        "matmul_gflops": matmul_gflops(torch.bfloat16, device),
        "bandwidth_method": bandwidth.method,
    }
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        if args.mix:
            rows += measure_mixing(device, args.quick, args.seconds)
            print(*map(_format, rows), sep="\n", flush=True)
        for name in args.groups:
            for dtype in args.dtypes:
                for tokens in args.tokens:
                    found = measure_group(name, dtype, tokens, device, args.quick, args.seconds)
                    print(*map(_format, found), sep="\n", flush=True)
                    rows += found
    if args.json is not None:
        head = {"schema": SCHEMA, "benchmark": "parts", "environment": record}
        write(args.json, {**head, "ceilings": ceilings, "rows": rows})
    return int(any("refused" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
