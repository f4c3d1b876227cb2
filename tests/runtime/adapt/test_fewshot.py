"""Few-shot search on a model: one batch or many, every method, budgets, layers, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.adapt import fewshot
from t2runtime.adapt.fewshot import METHODS, Space, score_members, search
from t2runtime.adapt.gradient import _starts
from t2runtime.adapt.mixtures import load_mixture, save_mixture
from t2runtime.adapt.shots import Batches, log_likelihood
from t2runtime.tasks import Problem

NEW = 3
QUICK: dict[str, Any] = {"population": 8, "elites": 3, "generations": 3}


@pytest.mark.parametrize("per", ["expert", "layer"])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_batches_of_any_size_score_alike(
    bank: t2k.ExpertBank, tokenizer: Any, shots: list[Problem], per: Any, rows: int
) -> None:
    space = Space(bank, ("b", "a"), per)
    members = torch.rand(3, space.size, generator=torch.Generator().manual_seed(1))
    whole, parts = (
        score_members(
            bank.model, tokenizer, bank, ["b", "a"], shots, members, NEW, per=per, batches=batches
        )
        for batches in (None, Batches(rows))
    )
    assert torch.equal(whole[:, 0], parts[:, 0])
    assert torch.allclose(whole[:, 1], parts[:, 1], atol=1e-4)
    with bank.use(space.alpha(members[1:2])), torch.no_grad():
        alone = log_likelihood(bank.model, tokenizer, shots).mean()
    assert whole[1, 1].item() == pytest.approx(float(alone), abs=1e-4)


def test_memory_that_runs_out_makes_smaller_batches(caplog: pytest.LogCaptureFixture) -> None:
    sizes = []

    def work(part: slice, few: slice) -> torch.Tensor:
        members = range(6)[part]
        sizes.append(len(members) * len(range(4)[few]))
        if sizes[-1] > 5:
            raise torch.OutOfMemoryError("too many")
        return torch.tensor([[[m + 10.0 * s] for s in range(4)[few]] for m in members])

    batches = Batches()
    found = batches.run(6, 4, work)
    assert found[:, :, 0].tolist() == [[m + 10.0 * s for s in range(4)] for m in range(6)]
    assert sizes[:3] == [24, 12, 4] and batches.rows == 6 and len(caplog.records) == 2


@pytest.mark.parametrize("per", ["expert", "layer"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_both_experts_within_its_budget(
    bank: t2k.ExpertBank, tokenizer: Any, shots: list[Problem], method: str, per: Any,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """All ones answers every shot; it is a landmark of each method."""
    rows = []
    whole = fewshot.answer_and_score

    def counted(m: Any, t: Any, given: Any, new: int, members: int) -> Any:
        rows.append(len(given.ids) * members)
        return whole(m, t, given, new, members)

    monkeypatch.setattr(fewshot, "answer_and_score", counted)
    found = search(
        bank.model, tokenizer, bank, ["a", "b"], shots, NEW, method=method, per=per,
        budget=400, **QUICK,
    )  # fmt: skip
    assert found.search.score[0] == 1.0
    assert found.forwards <= found.budget == 400
    if method != "gradient":
        assert found.forwards == 2 * sum(rows) == 384, "six generations of 8 x 4 x 2"
    with bank.use(found.alpha[None]), torch.no_grad():
        likely = log_likelihood(bank.model, tokenizer, shots).mean()
    assert float(likely) == pytest.approx(found.search.score[1], abs=1e-3)

    path = save_mixture(tmp_path, found.saved("both", shots=4))
    again = load_mixture(tmp_path, "both")
    assert path.name == "both.json" and again.budget == found.forwards
    assert torch.equal(again.alpha(bank), found.alpha)


def test_the_gradient_climbs(bank: t2k.ExpertBank, tokenizer: Any, shots: list[Problem]) -> None:
    """It reaches at least what its best start has, and a penalty draws it towards the base."""
    go = lambda **more: search(  # noqa: E731
        bank.model, tokenizer, bank, ["a", "b"], shots, NEW, method="gradient", budget=900,
        high=2.0, **more,
    )  # fmt: skip
    free, again, drawn = go(), go(rows_per_batch=5), go(l1=1.0, l2=3.0)
    start = score_members(
        bank.model, tokenizer, bank, ["a", "b"], shots, free.space.landmarks(), NEW
    )
    assert free.search.score[1] > start[:, 1].max()
    assert torch.allclose(again.search.best, free.search.best, atol=0.02)
    assert drawn.search.best.abs().sum() < free.search.best.abs().sum()
    assert all(p.grad is None for p in bank.model.parameters())


def test_same_seed_same_mixture(bank: t2k.ExpertBank, tokenizer: Any, shots: list[Problem]) -> None:
    a, b = (
        search(bank.model, tokenizer, bank, ["a", "b"], shots, NEW, seed=5, **QUICK)
        for _ in range(2)
    )
    assert a.mixture == b.mixture and a.search.history == b.search.history


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shots": []}, "at least one labelled problem"),
        ({"shots": [Problem("q", "", "x")]}, "must have right answers"),
        ({"names": ["c"]}, "experts of the bank"),
        ({"names": []}, "got none"),
        ({"names": ["a", "a"]}, "distinct"),
        ({"method": "luck"}, "method must be one of cem"),
        ({"per": "token"}, "per must be"),
        ({"high": 0.9}, "must hold 0 .* and 1"),
        ({"low": 0.1}, "must hold 0 .* and 1"),
        ({"budget": 63}, "at least 64 forwards"),
        ({"budget": 63, "method": "gradient"}, "one step of 8 starts"),
        ({"l1": 0.1}, "for method='gradient'"),
        ({"l2": float("nan"), "method": "gradient"}, "l2 must be a finite number"),
        ({"rows_per_batch": 0}, "rows_per_batch must be at least 1"),
    ],
)
def test_bad_input(
    bank: t2k.ExpertBank, tokenizer: Any, shots: list[Problem], change: dict[str, Any], words: str
) -> None:
    given = {"names": ["a", "b"], "shots": shots, **QUICK, **change}
    with pytest.raises(ValueError, match=words):
        search(bank.model, tokenizer, bank, max_new_tokens=NEW, **given)


def test_an_empty_bank(tiny: Any, tokenizer: Any, shots: list[Problem]) -> None:
    with pytest.raises(ValueError, match="the bank is empty"):
        search(tiny, tokenizer, t2k.ExpertBank(tiny), ["a"], shots, NEW)


def test_members_of_another_shape_or_not_finite(bank: t2k.ExpertBank) -> None:
    space = Space(bank, ("a", "b"), "layer")
    for wrong in (torch.zeros(1, 2), torch.zeros(space.size), torch.zeros(1, 2 * space.size)):
        with pytest.raises(ValueError, match=f"shape .members, {space.size}., got"):
            space.alpha(wrong)
    with pytest.raises(ValueError, match="members must be finite"):
        space.alpha(torch.full((1, space.size), float("nan")))


def _bank_of(tiny: Any, count: int) -> t2k.ExpertBank:
    bank = t2k.ExpertBank(tiny)
    here = t2k.Expert.from_model(tiny)
    for index in range(count):
        bank.add(f"e{index}", t2k.Expert({n: v + index for n, v in here.z.items()}))
    return bank


@pytest.mark.parametrize("per", ["expert", "layer"])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 6, 9, 30])
def test_the_gradient_starts_from_its_seed_whatever_the_number_of_experts(
    tiny: Any, count: int, per: Any
) -> None:
    """1/K, the base, all at once, experts alone, at least one drawn point; eight in all."""
    bank = _bank_of(tiny, count)
    space = Space(bank, tuple(bank.names), per)
    made = [_starts(space, 8, 0.0, 1.0, seed) for seed in range(12)]
    assert torch.equal(made[0], _starts(space, 8, 0.0, 1.0, 0))
    assert len({starts.numpy().tobytes() for starts in made}) == 12
    alone = {tuple(row.tolist()): index for index, row in enumerate(space.landmarks()[2:])}
    met = set()
    for starts in made:
        assert starts.shape == (8, space.size)
        assert torch.equal(starts[0], torch.full((space.size,), 1 / count))
        assert torch.equal(starts[1:3], space.landmarks()[:2])
        own = [alone[tuple(row.tolist())] for row in starts[3:] if tuple(row.tolist()) in alone]
        assert own == sorted(own) and len(set(own)) == min(count, 4)
        met |= set(own)
        assert ((starts[-1] > 0) & (starts[-1] < 1)).all(), "the last is drawn"
    assert len(met) == count or count == 30, "every expert starts alone under some seed"
    for few in (1, 2, 3, 4):
        assert _starts(space, few, 0.0, 1.0, 0).shape == (few, space.size)


def test_more_landmarks_than_members_are_chosen_by_the_seed(tiny: Any) -> None:
    bank = _bank_of(tiny, 9)
    space = Space(bank, tuple(bank.names))
    assert torch.equal(space.landmarks(11, 5), space.landmarks())
    for most in (0, 1, 2):
        assert torch.equal(space.landmarks(most, 5), space.landmarks()[:most])
    some = [space.landmarks(5, seed) for seed in (0, 1, 0)]
    assert torch.equal(some[0], some[2]) and not torch.equal(some[0], some[1])
    assert all(row.sum() == 1 for row in some[0][2:]) and some[0].shape == (5, 9)


def test_the_gradient_keeps_its_budget_with_many_experts(
    tiny: Any, tokenizer: Any, shots: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that went through the model, forward and back, are those that were stated."""
    bank = _bank_of(tiny, 7)
    rows: list[int] = []
    hook = tiny.register_forward_pre_hook(
        lambda _, given, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    found = [
        search(tiny, tokenizer, bank, bank.names, shots, NEW, method="gradient", budget=280,
               seed=seed)
        for seed in (0, 1, 0)
    ]  # fmt: skip
    hook.remove()
    steps = (280 - 2 * 4 * 9) // (2 * 4 * 8)
    assert {one.forwards for one in found} == {2 * 4 * 9 + steps * 2 * 4 * 8}
    climbing = [count for count in rows if count == 8 * 4]
    assert len(climbing) == 3 * steps, "one forward of 8 starts x 4 shots a step"
    assert torch.equal(found[0].search.best, found[2].search.best)
