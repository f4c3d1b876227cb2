"""Searches that know no models: all meet the same bowl, by one signature."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from t2runtime.adapt.search import SEARCHES, black_box, cma_es


def bowl(members: torch.Tensor) -> torch.Tensor:
    return -((members - torch.tensor([0.1, 0.6, 1.0])) ** 2).sum(1)


def found(method: str, **settings: Any) -> Any:
    return black_box(method, bowl, 3, **{"population": 16, "generations": 15, **settings})


@pytest.mark.parametrize("method", SEARCHES)
def test_finds_the_bowl_stays_in_range_and_never_loses_the_best(method: str) -> None:
    result = found(method)
    near = 0.3 if method == "random" else 0.05
    assert torch.allclose(result.best, torch.tensor([0.1, 0.6, 1.0]), atol=near)
    assert result.best.min() >= 0 and result.best.max() <= 1
    assert result.history == sorted(result.history) and len(result.history) == 15
    assert bowl(result.best[None]).item() == pytest.approx(result.score[0])


@pytest.mark.parametrize("method", SEARCHES)
def test_same_seed_same_result(method: str) -> None:
    a, b, c = (found(method, seed=seed, generations=4) for seed in (7, 7, 8))
    assert torch.equal(a.best, b.best) and not torch.equal(a.best, c.best)


@pytest.mark.parametrize("method", SEARCHES)
def test_asks_for_as_many_members_as_stated(method: str) -> None:
    asked = []

    def score(members: torch.Tensor) -> torch.Tensor:
        asked.append(len(members))
        return torch.stack([torch.ones(len(members)), bowl(members)], 1)

    start = torch.tensor([[0.1, 0.6, 1.0]])
    result = black_box(method, score, 3, population=8, generations=3, start=start)
    best = start[0] if method != "cem" else result.best
    assert asked == [8, 8, 8]
    assert torch.equal(result.best, best), "the second key decides between equal first ones"


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="method must be one of cem, cma-es, random"):
        black_box("annealing", bowl, 3)
    with pytest.raises(ValueError, match="low must be below high"):
        found("random", low=1.0)
    with pytest.raises(ValueError, match="start must have shape"):
        found("cma-es", start=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        cma_es(lambda m: m.sum(1), 1)
    with pytest.raises(RuntimeError, match="finite"):
        black_box("random", lambda m: m.sum(1) * float("nan"), 3)
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ImportError, match=r"t2kernels\[search\]"):
        found("cma-es")
