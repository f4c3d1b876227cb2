"""`t2 plan MODEL`: what training an expert will need, from config.json alone."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from t2runtime.commands.train import targets
from t2runtime.options import at_least_one
from t2runtime.plan import Settings, plan
from t2runtime.skeleton import local_folder

_GIB = 2**30


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan one step of prompts × samples rows; time only by the rate given."""
    if args.tflops is not None and not args.tflops > 0:
        raise ValueError(f"--tflops must be a positive number, got {args.tflops}")
    at_least_one(args, "prompts", "samples")
    settings = Settings(
        targets(args.targets),
        args.rank,
        args.dtype,
        args.prompts * args.samples,
        args.rows_per_rollout,
        args.rows_per_backward,
        args.tokens,
        args.max_new_tokens,
        args.objective,
        args.kl_estimator,
    )
    result = plan(local_folder(args.model), settings)
    result["seconds"] = None
    if args.tflops is not None:
        result["seconds"] = {k: v / (args.tflops * 1e12) for k, v in result["flops"].items()}
    answer = settings.new
    facts = {**dataclasses.asdict(settings), "max_new_tokens": answer, "tflops": args.tflops}
    return {"model": args.model, **facts, **result}


def show(result: dict[str, Any]) -> str:
    """Memory, then arithmetic."""
    of = result["bytes"]
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters; {result['layers']} matrices "
        f"adapted, {result['values']:,} values of z",
        f"{result['objective']}, KL {result['kl']}, {result['rows']} rows a step of "
        f"{result['tokens']} tokens, {result['max_new_tokens']} of them the answer; at once "
        f"{result['rows_per_rollout']} in a rollout, {result['rows_per_backward']} in a gradient",
        "memory, GiB",
        *(_row(name, of[name]) for name in ("weights", "factors", "z and optimiser")),
        *(_row(f"activations, {how}", size) for how, size in of["activations"].items()),
        *(_row(f"rollout, {name}", size) for name, size in of["rollout"].items()),
        "peak of each phase, GiB (without fragmentation and what CUDA itself takes)",
        *(_row(name, size) for name, size in result["peak"].items()),
        *([result["no_checkpointing"]] if result["no_checkpointing"] else []),
        "arithmetic of a step, TFLOP",
    ]
    seconds = result["seconds"]
    for name, flops in result["flops"].items():
        time = "" if seconds is None else f"   {seconds[name]:10.3f} s"
        lines.append(f"  {name:28s}{flops / 1e12:10.3f}{time}")
    if seconds is None:
        lines.append("time: not measured; give --tflops, a rate that you have measured")
    else:
        lines.append(
            f"time at {result['tflops']:g} TFLOP/s, the rate you gave; a rollout decodes token by "
            "token, is bound by memory and takes longer"
        )
    return "\n".join(lines)


def _row(name: str, size: int) -> str:
    return f"  {name:28s}{size / _GIB:10.3f}"
