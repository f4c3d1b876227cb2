import pytest
import torch

from t2runtime.adapt.cem import cross_entropy_method


def bowl(members: torch.Tensor) -> torch.Tensor:
    return -((members - torch.tensor([0.1, 0.6, 1.0])) ** 2).sum(1)


def test_finds_the_top_of_a_bowl_with_its_corner_on_the_border() -> None:
    found = cross_entropy_method(bowl, 3, generations=25)
    assert torch.allclose(found.best, torch.tensor([0.1, 0.6, 1.0]), atol=0.03)


def test_the_best_never_gets_lost() -> None:
    found = cross_entropy_method(bowl, 3, generations=15)
    assert found.history == sorted(found.history)
    assert bowl(found.best[None]).item() == pytest.approx(found.score[0])


def test_ties_are_broken_by_the_second_key() -> None:
    def flat_then_sum(members: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.ones(len(members)), members.sum(1)], 1)

    found = cross_entropy_method(flat_then_sum, 4, generations=15)
    assert found.best.sum() > 3.9


def test_all_ones_is_within_the_range() -> None:
    found = cross_entropy_method(lambda m: m.sum(1), 5, generations=20)
    assert found.best.tolist() == pytest.approx([1.0] * 5, abs=1e-3)


def test_start_is_scored_first() -> None:
    start = torch.tensor([[0.1, 0.6, 1.0]])
    found = cross_entropy_method(bowl, 3, generations=1, start=start)
    assert torch.equal(found.best, start[0])


def test_same_seed_same_result() -> None:
    a, b = (cross_entropy_method(bowl, 3, generations=3, seed=7) for _ in range(2))
    assert torch.equal(a.best, b.best)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="elites must be"):
        cross_entropy_method(bowl, 3, elites=40)
    with pytest.raises(ValueError, match="start must have shape"):
        cross_entropy_method(bowl, 3, start=torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="finite"):
        cross_entropy_method(lambda m: m.sum(1) * float("nan"), 3)
