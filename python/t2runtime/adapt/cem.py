"""The cross-entropy method: a search over vectors of [low, high]^K that asks only for scores and
knows no models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SearchResult:
    """The best vector ever scored (size,), its score, and the best score after each generation."""

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
    mean: float | None = None,
    start: Tensor | None = None,
    seed: int = 0,
) -> SearchResult:
    """Maximise `score`: (members, size) -> (members,) or (members, keys), compared key by key.

    Each generation samples from a Gaussian, clamps to [low, high] and refits mean and deviation
    to the elites; the best member is kept from generation to generation. The mean starts at
    `mean`, by default 1/size as in the authors' code. NOTE(paper): `start` (members, size) puts
    chosen vectors into the first generation.

    >>> target = torch.tensor([0.2, 0.9])
    >>> found = cross_entropy_method(lambda a: -((a - target) ** 2).sum(1), 2)
    >>> bool((found.best - target).abs().max() < 0.05)
    True
    """
    kept = check(size, population, generations, low, high, start)
    check_elites(elites, population)
    generator = torch.Generator().manual_seed(seed)
    centre = torch.full((size,), 1.0 / size if mean is None else mean).clamp(low, high)
    deviation = torch.full((size,), std)
    best = Best()
    for _ in range(generations):
        fresh = centre + deviation * torch.randn(population - len(kept), size, generator=generator)
        members = torch.cat([kept, fresh.clamp(low, high)])
        elite = members[best.rank(members, score(members))[:elites]]
        centre, deviation = elite.mean(0), elite.std(0).clamp(min=std_floor)
        kept = best.member[None]
    return best.result()


def check_elites(elites: int, population: int) -> None:
    """ValueError unless a deviation can be had from the elites."""
    if not 2 <= elites <= population:
        raise ValueError(f"elites must be in 2..population = {population}, got {elites}")


def check(
    size: int, population: int, generations: int, low: float, high: float, start: Tensor | None
) -> Tensor:
    """`start` within the range, (0, size) where it is None; ValueError for bad settings."""
    if size < 1 or generations < 1 or population < 1:
        raise ValueError(
            "size, population and generations must be at least 1, "
            f"got {size}, {population} and {generations}"
        )
    if not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    kept = torch.empty(0, size) if start is None else start.float().clamp(low, high)
    if kept.dim() != 2 or kept.shape[1] != size or kept.shape[0] >= population:
        raise ValueError(
            f"start must have shape (fewer than {population}, {size}), got {tuple(kept.shape)}"
        )
    return kept


class Best:
    """The best member that a search has met; of equal ones the first."""

    def __init__(self) -> None:
        self.member, self.key = torch.empty(0), (-float("inf"),)
        self.history: list[tuple[float, ...]] = []

    def rank(self, members: Tensor, scores: Tensor) -> list[int]:
        """The members' indices, best first; RuntimeError for scores that are not finite rows."""
        scores = scores.cpu().double()
        scores = scores[:, None] if scores.dim() == 1 else scores
        if scores.shape[0] != len(members) or not bool(torch.isfinite(scores).all()):
            raise RuntimeError(
                f"score must give {len(members)} finite rows, got shape {tuple(scores.shape)} "
                "or a value that is not finite"
            )
        keys = [tuple(row) for row in scores.tolist()]
        order = sorted(range(len(keys)), key=lambda i: keys[i], reverse=True)
        if keys[order[0]] > self.key:
            self.member, self.key = members[order[0]].clone(), keys[order[0]]
        self.history.append(self.key)
        return order

    def result(self) -> SearchResult:
        """What was found."""
        return SearchResult(self.member, self.key, self.history)
