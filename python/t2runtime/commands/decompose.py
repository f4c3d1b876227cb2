"""`t2 decompose CHECKPOINT --out DIR`: a safetensors checkpoint to a folder of factors, weight by
weight.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2kernels.checkpoint import Checkpoint
from t2runtime.commands.train import targets
from t2runtime.loading import SMALL_MODEL, device_of
from t2runtime.skeleton import skeleton

#: One matrix of one expert of a mixture-of-experts block.
EXPERTS = r".*\.experts\.\d+\..+"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Stream through the checkpoint; what an earlier, killed run finished is kept."""
    device = device_of(args.device)
    path = SMALL_MODEL if args.checkpoint == "small" else Path(args.checkpoint)
    wanted = targets(args.targets)
    weights, _ = Checkpoint(path).weights(wanted, None)
    experts = sum(re.fullmatch(EXPERTS, weight.name) is not None for weight in weights)
    stacked = _stacks_experts(path) if experts and not args.with_experts else False
    store = t2k.decompose_checkpoint(
        path,
        args.out,
        targets=wanted,
        exclude=EXPERTS if stacked else None,
        rank=args.rank,
        precision="fp64" if args.float64 else "fp32",
        device=device,
        method=None if args.method == "auto" else args.method,
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
        "methods": {name: infos[name]["method"] for name in store.made},
        "repeated": [name for name in store.made if infos[name]["repeated"]],
        "skipped": store.manifest["skipped"],
        "experts": {"matrices": experts, "left_out": stacked is True, "known": stacked is not None},
    }


def _stacks_experts(path: Path) -> bool | None:
    """Whether the model in memory has no layer for an expert's matrix, but one tensor for all, as
    transformers 5 builds it. None where the model cannot be built from the folder's config.json.
    """
    try:
        model = skeleton(path)
    except (ImportError, ValueError):
        return None
    return not any(re.fullmatch(EXPERTS, name) for name, _ in model.named_modules())


def _methods(methods: dict[str, str], repeated: list[str]) -> str:
    """How many weights each way of computing made, and those whose first result would not do."""
    told = ", ".join(f"{how} ({count})" for how, count in Counter(methods.values()).most_common())
    return told + (f"; missed the bounds at first: {', '.join(repeated)}" if repeated else "")


def show(result: dict[str, Any]) -> str:
    """Totals, and what was left out."""
    total = f"{result['weights']} weights, {result['bytes'] / 2**20:.1f} MiB of factors"
    earlier = result["weights"] - result["made"]
    if not result["made"]:
        lines = [f"nothing to do: {total} are in {result['out']} already"]
    else:
        kept = f"; {earlier} of them made earlier" if earlier else ""
        lines = [f"{total} in {result['out']}, {result['seconds']:.1f} s of decomposition{kept}"]
    if result["made"]:
        lines.append("  made by " + _methods(result["methods"], result["repeated"]))
    experts = result["experts"]
    if experts["left_out"]:
        lines.append(
            f"  left out {experts['matrices']} matrices of experts: in memory those of a block are "
            "one tensor, which is no layer that could be converted; --with-experts takes them"
        )
    elif not experts["known"]:
        lines.append(
            f"  {experts['matrices']} of them are matrices of experts; whether the model in memory "
            "has layers that can use them is not known: its config.json makes no causal model here"
        )
    lines += [f"  left out {name}: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)
