"""`t2 demo`: the main demonstration; exit code 1 unless it shows what it promises."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run, write results.json (and the plot of the small model) to --out."""
    from t2runtime.demo import local_model, plot, small

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    if args.expert and not args.model:
        raise ValueError(
            "--expert goes with --model; the small model's demo trains its own experts"
        )
    if args.row_order and not args.model:
        raise ValueError("--row-order goes with --model; the small model needs none")
    if args.model:
        results = local_model.run(args.model, args.expert, args.seed, say, args.row_order)
    else:
        results = small.run(out, args.seed, say)
        results["plot"] = str(out / "demo.png") if plot.save(results, out / "demo.png") else None
    results["versions"] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return {**results, "out": str(out), "exit_code": 0 if results["passed"] else 1}


def show(result: dict[str, Any]) -> str:
    """The verdict."""
    plot = f", plot in {result['plot']}" if result.get("plot") else ""
    verdict = "passed" if result["passed"] else "FAILED"
    return f"\ndemo {verdict} in {result['seconds']:.0f} s; results in {result['out']}{plot}"
