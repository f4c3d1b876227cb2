"""Few-shot search on a model: one batch or many, every method, budgets, layers, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.adapt import fewshot
from t2runtime.adapt.fewshot import METHODS, Space, score_members, search
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
