"""Random search and CMA-ES beside the cross-entropy method: one signature, no models.

    search(score, size, population=, generations=, low=, high=, mean=, start=, seed=)

`score` is (members, size) -> (members, keys), compared key by key; each generation asks for
`population` members at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t2runtime.adapt.cem import Best, SearchResult, check, cross_entropy_method

Score = Callable[[Tensor], Tensor]


def random_search(
    score: Score,
    size: int,
    *,
    population: int = 32,
    generations: int = 20,
    low: float = 0.0,
    high: float = 1.0,
    mean: float | None = None,
    start: Tensor | None = None,
    seed: int = 0,
) -> SearchResult:
    """Uniform draws from [low, high]^size; the least that another method has to beat.

    `mean` is of no use here; the signature is that of all searches.
    """
    kept = check(size, population, generations, low, high, start)
    generator = torch.Generator().manual_seed(seed)
    best = Best()
    for _ in range(generations):
        fresh = torch.rand(population - len(kept), size, generator=generator)
        members = torch.cat([kept, low + (high - low) * fresh])
        best.rank(members, score(members))
        kept = members[:0]
    return best.result()


def cma_es(
    score: Score,
    size: int,
    *,
    population: int = 32,
    generations: int = 20,
    low: float = 0.0,
    high: float = 1.0,
    mean: float | None = None,
    start: Tensor | None = None,
    seed: int = 0,
) -> SearchResult:
    """CMA-ES within [low, high]^size, of the package `cmaes` (Hansen's tutorial, arXiv 1604.00772).

    The first generation is `start` and uniform draws; the strategy then sets out half-way between
    the best of them and the middle of the range (or `mean`), with a deviation of 0.3 of the range.
    Only the order of scores matters to it, so several keys do no harm.

    Raises ImportError without the package: pip install 't2kernels[search]'.
    """
    CMA = check_cma_es(size, population)
    kept = check(size, population, generations, low, high, start)
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.rand(population - len(kept), size, generator=generator)
    members = torch.cat([kept, low + (high - low) * fresh])
    best = Best()
    best.rank(members, score(members))
    middle = (low + high) / 2 if mean is None else mean
    strategy = CMA(
        mean=(0.5 * best.member.double() + 0.5 * middle).numpy(),
        sigma=0.3 * (high - low),
        bounds=torch.tensor([[low, high]] * size, dtype=torch.float64).numpy(),
        seed=seed,
        population_size=population,
    )
    for _ in range(generations - 1):
        asked = [strategy.ask() for _ in range(population)]
        members = torch.stack([torch.from_numpy(x) for x in asked]).float().clamp(low, high)
        order = best.rank(members, score(members))
        strategy.tell([(asked[index], float(place)) for place, index in enumerate(order)])
    return best.result()


def check_cma_es(size: int, population: int) -> Any:
    """The class of the package; ImportError without it, ValueError for what it cannot search."""
    try:
        from cmaes import CMA
    except ImportError as error:
        raise ImportError(
            f"method 'cma-es' needs the package cmaes: pip install 't2kernels[search]' ({error})"
        ) from error
    if size < 2 or population < 2:
        raise ValueError(
            f"CMA-ES needs at least 2 dimensions and a population of 2, got {size} and "
            f"{population}. Use method='cem' or 'random'."
        )
    return CMA


#: The searches that ask for scores only, by name.
SEARCHES: dict[str, Callable[..., SearchResult]] = {
    "cem": cross_entropy_method,
    "cma-es": cma_es,
    "random": random_search,
}


def black_box(method: str, score: Score, size: int, **settings: Any) -> SearchResult:
    """Search by the name of the method; ValueError for a name that is none of `SEARCHES`."""
    if method not in SEARCHES:
        raise ValueError(f"method must be one of {', '.join(SEARCHES)}, got {method!r}")
    return SEARCHES[method](score, size, **settings)
