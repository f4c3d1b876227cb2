"""`t2 decompose CHECKPOINT --out DIR`: a safetensors checkpoint to a folder of factors, weight by
weight.
"""

from __future__ import annotations

import argparse
from typing import Any

import t2kernels as t2k
from t2runtime.commands.train import targets
from t2runtime.loading import SMALL_MODEL, device_of


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Stream through the checkpoint; what an earlier, killed run finished is kept."""
    device = device_of(args.device)
    store = t2k.decompose_checkpoint(
        SMALL_MODEL if args.checkpoint == "small" else args.checkpoint,
        args.out,
        targets=targets(args.targets),
        rank=args.rank,
        precision="fp64" if args.float64 else "fp32",
        device=device,
        overwrite=args.overwrite,
    )
    infos = {name: store.info(name) for name in store.names}
    return {
        "out": args.out,
        "weights": len(store),
        "made": len(store.made),
        "bytes": sum(info["bytes"] for info in infos.values()),
        "seconds": sum(infos[name]["seconds"] for name in store.made),
        "accuracy": {name: info["accuracy"] for name, info in infos.items()},
        "skipped": store.manifest["skipped"],
    }


def show(result: dict[str, Any]) -> str:
    """Totals, and what was left out."""
    total = f"{result['weights']} weights, {result['bytes'] / 2**20:.1f} MiB of factors"
    earlier = result["weights"] - result["made"]
    if not result["made"]:
        lines = [f"nothing to do: {total} are in {result['out']} already"]
    else:
        kept = f"; {earlier} of them made earlier" if earlier else ""
        lines = [f"{total} in {result['out']}, {result['seconds']:.1f} s of decomposition{kept}"]
    lines += [f"  left out {name}: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)
