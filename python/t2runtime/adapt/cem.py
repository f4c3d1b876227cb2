"""The cross-entropy method: a search over vectors of [low, high]^K that asks only for scores and
knows no models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CEMResult:
    """The best vector ever scored, its score, and the best score after each generation."""

    best: Tensor
    score: tuple[float, ...]
    history: list[tuple[float, ...]]


def cross_entropy_method(
    score: Callable[[Tensor], Tensor],
    size: int,
    *,
    population: int = 32,
    elites: int = 6,
    generations: int = 20,
    low: float = 0.0,
    high: float = 1.0,
    std: float = 0.5,
    std_floor: float = 0.05,
    start: Tensor | None = None,
    seed: int = 0,
) -> CEMResult:
    """Maximise `score`: (members, size) -> (members,) or (members, keys), compared key by key.

    Each generation samples from a Gaussian, clamps to [low, high] and refits mean and deviation
    to the elites; the best member is kept from generation to generation. The mean starts at
    1/size as in the authors' code. NOTE(paper): `start` (members, size) puts chosen vectors into
    the first generation.

    >>> target = torch.tensor([0.2, 0.9])
    >>> found = cross_entropy_method(lambda a: -((a - target) ** 2).sum(1), 2)
    >>> bool((found.best - target).abs().max() < 0.05)
    True
    """
    if size < 1 or generations < 1:
        raise ValueError(f"size and generations must be at least 1, got {size} and {generations}")
    if not 2 <= elites <= population:
        raise ValueError(f"elites must be in 2..population = {population}, got {elites}")
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    generator = torch.Generator().manual_seed(seed)
    mean = torch.full((size,), 1.0 / size).clamp(low, high)
    deviation = torch.full((size,), std)
    kept = torch.empty(0, size) if start is None else start.float().clamp(low, high)
    if kept.dim() != 2 or kept.shape[1] != size or kept.shape[0] >= population:
        raise ValueError(
            f"start must have shape (fewer than {population}, {size}), got {tuple(kept.shape)}"
        )
    history: list[tuple[float, ...]] = []
    best, best_key = mean, (-float("inf"),)
    for _ in range(generations):
        fresh = mean + deviation * torch.randn(population - len(kept), size, generator=generator)
        members = torch.cat([kept, fresh.clamp(low, high)])
        scores = score(members).cpu().double()
        scores = scores[:, None] if scores.dim() == 1 else scores
        if scores.shape[0] != population or not bool(torch.isfinite(scores).all()):
            raise RuntimeError(
                f"score must give {population} finite rows, got shape {tuple(scores.shape)} "
                "or a value that is not finite"
            )
        keys = [tuple(row) for row in scores.tolist()]
        order = sorted(range(population), key=lambda i: keys[i], reverse=True)
        if keys[order[0]] > best_key:
            best, best_key = members[order[0]].clone(), keys[order[0]]
        history.append(best_key)
        elite = members[order[:elites]]
        mean, deviation = elite.mean(0), elite.std(0).clamp(min=std_floor)
        kept = best[None]
    return CEMResult(best, best_key, history)
