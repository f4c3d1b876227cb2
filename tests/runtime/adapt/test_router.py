"""The router network: it learns which expert a question wants, and belongs to its experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.adapt.router import Router, RouterConfig, features, train_router
from t2runtime.adapt.shots import question_mark
from t2runtime.generation import complete
from t2runtime.tasks import ByAnswer, Problem

NEW = 3
QUICK = RouterConfig(hidden=8, steps=40, rows=8, lr=3e-2)


class Taught(ByAnswer):
    """Questions whose right answers are what expert "a" says to sums and "b" to anything else."""

    name, max_new_tokens = "taught", NEW

    def __init__(self, bank: t2k.ExpertBank, tokenizer: Any) -> None:
        super().__init__()
        prompts = [f"{n}+{n + 3}=" for n in (12, 34, 51, 77)] + ["flip 12=", "flip 98=", "flip 4="]
        wanted = ["a" if "+" in prompt else "b" for prompt in prompts]
        with bank.use(wanted):
            texts = complete(bank.model, tokenizer, prompts, NEW).texts
        self.problems = [
            Problem(p, t.strip() or "7", w) for p, t, w in zip(prompts, texts, wanted, strict=True)
        ]
        self.asked: list[str] = []

    def __call__(self, count: int, split: Any, seed: int) -> list[Problem]:
        self.asked.append(split)
        return (self.problems * (count // len(self.problems) + 1))[:count]


@pytest.fixture
def taught(bank: t2k.ExpertBank, tokenizer: Any) -> Taught:
    return Taught(bank, tokenizer)


def test_learns_reads_training_splits_only_and_is_reloaded(
    bank: t2k.ExpertBank, tokenizer: Any, taught: Taught, tmp_path: Path
) -> None:
    lines: list[dict[str, float]] = []
    model = bank.model
    router = train_router(model, tokenizer, bank, ["b", "a"], [taught], QUICK, lines.append)
    assert set(taught.asked) == {"train"} and len(lines) == QUICK.steps
    likely = [line["log_likelihood"] for line in lines]
    assert sum(likely[-5:]) > sum(likely[:5])
    assert all(p.grad is None for p in model.parameters())

    questions = [p.prompt for p in taught.problems]
    alpha = router.alpha(model, tokenizer, questions)
    sums = torch.tensor([p.category == "a" for p in taught.problems])
    assert alpha.shape == (7, 2) and alpha.min() >= 0 and alpha.max() <= 1
    assert alpha[sums, 1].mean() > alpha[~sums, 1].mean(), "sums want a, the second of names"
    assert alpha[~sums, 0].mean() > alpha[sums, 0].mean()

    router.save(tmp_path / "router.safetensors")
    again = Router.load(tmp_path / "router.safetensors")
    assert again.names == ["b", "a"]
    assert again.questions == router.questions and again.trained["questions"] == 7
    assert set(again.questions or ()) == {question_mark(p) for p in taught.problems}
    assert torch.equal(again.alpha(model, tokenizer, questions), alpha)
    with bank.use("a"):  # pass 1 runs on the base, whatever is in force
        inside = again.alpha(model, tokenizer, questions, bank=bank)
    assert torch.equal(inside, alpha.flip(1)), "in the order of the bank"
    with bank.use(inside):
        complete(model, tokenizer, questions, NEW)


def test_features_do_not_depend_on_padding(bank: t2k.ExpertBank, tokenizer: Any) -> None:
    alone = features(bank.model, tokenizer, ["1+1="])
    beside = features(bank.model, tokenizer, ["1+1=", "flip 1234567="])
    assert torch.allclose(alone[0], beside[0], atol=1e-5)


def test_same_seed_same_router(bank: t2k.ExpertBank, tokenizer: Any, taught: Taught) -> None:
    cfg = RouterConfig(hidden=4, steps=2, rows=4)
    a, b = (
        train_router(bank.model, tokenizer, bank, ["a"], [taught], cfg).state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bad_input(bank: t2k.ExpertBank, tokenizer: Any, taught: Taught, tmp_path: Path) -> None:
    model = bank.model
    with pytest.raises(ValueError, match="sources must hold at least one"):
        train_router(model, tokenizer, bank, ["a"], [])
    with pytest.raises(ValueError, match="experts of the bank"):
        train_router(model, tokenizer, bank, ["z"], [taught])
    for change in ({"steps": 0}, {"lr": 0.0}, {"high": 0.5}, {"l1": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            RouterConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one expert"):
        Router({}, 4)

    path = tmp_path / "router.safetensors"
    Router({"a": "other"}, 32).save(path)
    assert Router.load(path).questions is None, "a file of before marks were kept"
    odd = Router({"a": "other"}, 32)
    odd.questions = (7,)  # type: ignore[assignment]
    odd.save(tmp_path / "odd.safetensors")
    with pytest.raises(t2k.CorruptFileError, match="questions must be a list of texts"):
        Router.load(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="trained for another expert 'a'"):
        Router.load(path).alpha(model, tokenizer, ["1="], bank=bank)
    with pytest.raises(ValueError, match="needs expert 'z'"):
        Router({"z": ""}, 32).check(bank)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(t2k.CorruptFileError, match="truncated"):
        Router.load(path)
    broken = Router({"a": ""}, 32)
    broken.mean.fill_(float("nan"))
    broken.save(path)
    with pytest.raises(t2k.CorruptFileError, match="not finite"):
        Router.load(path)
    with pytest.raises(t2k.CorruptFileError, match="kind 'router'"):
        bank["a"].save(path)
        Router.load(path)
