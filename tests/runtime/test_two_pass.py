from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.adapt.classifier import CategorySource
from t2runtime.adapt.fewshot import score_members, search, without_shots
from t2runtime.adapt.prompt import SMALL
from t2runtime.generation import complete
from t2runtime.tasks import ByAnswer, Problem


def random_bank(model: Any, names: tuple[str, ...], size: float = 0.3) -> t2k.ExpertBank:
    generator = torch.Generator().manual_seed(0)
    here = t2k.Expert.from_model(model).z
    bank = t2k.ExpertBank(model)
    for name in names:
        z = {n: 1 + size * torch.randn(v.shape, generator=generator) for n, v in here.items()}
        bank.add(name, t2k.Expert(z))
    return bank


def test_a_population_is_one_batch(small: Any) -> None:
    """Scores of all members at once equal those of each member alone."""
    model, tokenizer = small
    bank = random_bank(model, ("a", "b"), size=0.1)
    shots = tasks.problems("add", 3, "validation")
    members = torch.tensor([[0.0, 0.0], [1.0, 0.5], [0.3, 1.0]])
    scores = score_members(model, tokenizer, bank, ["b", "a"], shots, members, 8)
    for member, row in zip(members, scores, strict=True):
        mixture = {"b": float(member[0]), "a": float(member[1])}
        with bank.use(mixture):
            texts = complete(model, tokenizer, [s.prompt for s in shots], 8).texts
        right = sum(t == s.answer for t, s in zip(texts, shots, strict=True)) / 3
        assert row[0].item() == pytest.approx(right)
        alone = score_members(model, tokenizer, bank, ["b", "a"], shots, member[None], 8)
        assert alone[0, 1].item() == pytest.approx(row[1].item(), abs=1e-3)


def test_search_returns_the_best_it_saw(small: Any) -> None:
    model, tokenizer = small
    bank = random_bank(model, ("bad",), size=2.0)
    shots = tasks.problems("other", 3, "validation")
    found = search(model, tokenizer, bank, ["bad"], shots, 8, population=6, elites=2, generations=2)
    assert found.search.score[0] == 1.0, "the base knows this task and is in the first generation"
    with pytest.raises(ValueError, match="at least one"):
        search(model, tokenizer, bank, ["bad"], [], 8)
    with pytest.raises(ValueError, match="experts of the bank"):
        search(model, tokenizer, bank, ["bda"], shots, 8)


def test_shots_are_not_in_the_score() -> None:
    problems = tasks.problems("add", 20, "test")
    rest = without_shots(problems, problems[:5])
    assert not {p.prompt for p in problems[:5]} & {p.prompt for p in rest}


def test_the_classifier_sees_training_splits_only() -> None:
    asked = []

    class Fixed(ByAnswer):
        name, max_new_tokens = "fixed", 1

        def __call__(self, count: int, split: Any, seed: int) -> list[Problem]:
            asked.append(split)
            return [Problem("q", "a", "add")] * count

    mixed = CategorySource({"add": Fixed(), "other": Fixed()}, SMALL)
    drawn = mixed(10, "train", 0)
    assert set(asked) == {"train"} and len(drawn) == 10
    assert {p.answer for p in drawn} == {"add", "other"}
    add, other = (Problem("q", name, "category") for name in ("add", "other"))
    assert mixed.grade([add, add, other, other], ["Add.", "max", "other", "junk"]) == [
        True, False, True, False,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="keyed by category"):
        CategorySource({"addition": Fixed()}, SMALL)
