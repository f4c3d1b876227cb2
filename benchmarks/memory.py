"""How much memory a whole-model benchmark will take, by arithmetic, before it takes any."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from llama import Size

_BF16 = 2
# What the sums below do not know of: libraries, fragments, scales, the small models of the gates.
_MARGIN = 1.15


def needed(
    size: Size,
    factors: Sequence[str],
    targets: Sequence[str],
    stages: Sequence[str],
    requests: int,
    prompt: int,
    backends: int = 2,
) -> int:
    """Bytes at the worst moment of bench_model.py. An estimate.

    The weights; factors of full rank in bf16, which the others are made from, and in each further
    kind; copies of the MLP's weights for merging; for the largest stage a cache of keys and values
    for each model, and the activations that every captured graph keeps.
    """
    shapes = size.linears()
    weights = sum(s.in_features * s.out_features for s in shapes.values()) * size.layers
    held = sum(s.rank * (s.in_features + s.out_features) for s in shapes.values()) * size.layers
    mlp = 3 * size.hidden * size.intermediate * size.layers
    total = _BF16 * (weights + 2 * size.vocabulary * size.hidden)
    total += held * (_BF16 + sum(kind != "bf16" for kind in factors))
    total += _BF16 * mlp if "merge" in stages else 0
    if {"decode", "prefill"} & set(stages):
        models = 1 + len(targets) * len(factors)
        head = size.hidden // size.heads
        cache = 2 * _BF16 * size.layers * size.kv_heads * head * requests * (prompt + 80)
        width = 4 * size.intermediate + 8 * size.hidden
        tokens = requests * (prompt if "prefill" in stages else 1)
        graphs = 1 + backends * (models - 1)
        total += models * cache + graphs * _BF16 * tokens * width
    return int(_MARGIN * total)


def fitting(
    free: int,
    size: Size,
    factors: Sequence[str],
    targets: Sequence[str],
    stages: Sequence[str],
    requests: int,
    prompt: int,
) -> list[str]:
    """The first kinds of factors, as many as fit into so many bytes together.

    Raises:
        ValueError: not even the first fits; says what is needed and what to leave out.
    """
    for count in range(len(factors), 0, -1):
        if needed(size, factors[:count], targets, stages, requests, prompt) <= free:
            return list(factors[:count])
    least = needed(size, factors[:1], targets, stages, requests, prompt)
    raise ValueError(
        f"this takes about {least / 1e9:.0f} GB with factors in {factors[0]} alone, and "
        f"{free / 1e9:.0f} GB are free. Ask for fewer --requests, a shorter --prompt, one of "
        "--targets, --only some stages, or fewer --layers."
    )


def choose_factors(
    parser: argparse.ArgumentParser, args: argparse.Namespace, size: Size, stages: Sequence[str]
) -> list[str]:
    """Leaves in ``args`` the kinds of factors that fit the GPU's free memory; returns the others.

    Where none fits, the command line is refused before anything is made.
    """
    if not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    wanted, (free, _) = list(args.factors), torch.cuda.mem_get_info()
    try:
        args.factors = fitting(
            free, size, wanted, args.targets, args.only or stages, max(args.requests), args.prompt
        )
    except ValueError as error:
        parser.error(str(error))
    left_out = wanted[len(args.factors) :]
    if left_out:
        print(f"left out, {free / 1e9:.0f} GB are free: factors in {', '.join(left_out)}")
    return left_out
