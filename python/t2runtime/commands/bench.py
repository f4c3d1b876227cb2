"""`t2 bench`: a quick look at one layer, factorised against plain torch. `benchmarks/` in the
source has the real ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import t2kernels as t2k
from t2kernels.testing import make_inputs, relative_error
from t2runtime.loading import DTYPES, device_of

TOKENS = (1, 4, 16, 64, 256)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time F.linear, three torch operations, one diagonal, and one diagonal per token."""
    device = device_of(args.device)
    if args.size < 1:
        raise ValueError(f"--size must be at least 1, got {args.size}")
    rows = [_measure(tokens, args.size, DTYPES[args.dtype], device) for tokens in TOKENS]
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "size": args.size,
        "dtype": args.dtype,
        "rows": rows,
    }


@torch.no_grad()
def _measure(tokens: int, size: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    i = make_inputs(tokens, size, size, size, dtype=dtype, device=device, bias=False)
    factors = t2k.SVDFactors(i.U, i.base, i.V)
    weight = ((i.U.float() * i.d) @ i.V.float().t()).to(dtype)
    many = i.d.repeat(tokens, 1)
    slot = torch.arange(tokens, dtype=torch.int32, device=device)
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: torch.nn.functional.linear(i.x, weight),
        "torch_three_op": lambda: ((i.x @ i.V) * i.d).to(dtype) @ i.U.t(),
        "svf_one": lambda: t2k.svf_linear(i.x, factors, i.d),
        "svf_each": lambda: t2k.svf_linear(i.x, factors, many, slot=slot),
    }
    truth = ((i.x.double() @ i.V.double()) * i.d.double()) @ i.U.double().t()
    plain = relative_error(forms["torch_three_op"](), truth)
    for name in ("svf_one", "svf_each"):
        error = relative_error(forms[name](), truth)
        if error > 2 * plain + 4 * torch.finfo(dtype).eps:
            raise RuntimeError(
                f"{name} is wrong at T = {tokens}: relative error {error:.2e}, "
                f"torch has {plain:.2e}"
            )
    return {
        "tokens": tokens,
        **{f"{k}_us": round(v, 1) for k, v in _interleaved(forms, device).items()},
    }


def _interleaved(
    forms: dict[str, Callable[[], Any]], device: str, repeats: int = 15
) -> dict[str, float]:
    """Median microseconds of each form, the forms taking turns so that noise hits all alike."""
    seen: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 2):
        for name, call in forms.items():
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn >= 2:
                seen[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in seen.items()}


def show(result: dict[str, Any]) -> str:
    """One line per number of tokens, microseconds and the ratio to three torch operations."""
    lines = [
        f"one {result['size']}x{result['size']} layer, {result['dtype']}, {result['device']}, "
        f"{result['threads']} threads; microseconds, median; weights stay in the cache if they fit",
        f"{'tokens':>7}{'dense':>11}{'three-op':>11}{'svf, one':>11}{'svf, each':>11}{'ratio':>8}",
    ]
    for row in result["rows"]:
        ratio = row["svf_one_us"] / row["torch_three_op_us"]
        lines.append(
            f"{row['tokens']:>7}{row['dense_us']:>11.1f}{row['torch_three_op_us']:>11.1f}"
            f"{row['svf_one_us']:>11.1f}{row['svf_each_us']:>11.1f}{ratio:>8.2f}"
        )
    return "\n".join(lines)
