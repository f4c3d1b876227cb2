import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.adapt.classifier import CategorySource
from t2runtime.adapt.fewshot import score_members, search, without_shots
from t2runtime.adapt.prompt import SMALL, Categories, name_categories
from t2runtime.engine import TwoPass
from t2runtime.generation import complete
from t2runtime.tasks import ByAnswer, Problem

STORIES = Path(os.environ.get("T2_MODELS", Path(__file__).parents[3] / "shared" / "models"))


def random_bank(model: Any, names: tuple[str, ...], size: float = 0.3) -> t2k.ExpertBank:
    generator = torch.Generator().manual_seed(0)
    here = t2k.Expert.from_model(model).z
    bank = t2k.ExpertBank(model)
    for name in names:
        z = {n: 1 + size * torch.randn(v.shape, generator=generator) for n, v in here.items()}
        bank.add(name, t2k.Expert(z))
    return bank


def test_each_request_gets_its_own_mixture(small: Any) -> None:
    """The answers of a mixed batch are those of each request alone under its mixture."""
    model, tokenizer = small
    bank = random_bank(model, tuple(tasks.SKILLS))
    mixtures = {"add": {"add": 0.5, "max": 0.2}, "count": None}
    engine = TwoPass(model, tokenizer, bank, SMALL, None, mixtures)
    questions = [tasks.problems(name, 1, "test")[0].prompt for name in tasks.CATEGORIES]
    outputs = engine.generate(questions, 8)
    base = name_categories(model, tokenizer, bank, SMALL, questions)
    assert [output.category for output in outputs] == base
    for question, output in zip(questions, outputs, strict=True):
        assert output.mixture == engine.mixture_of(output.category)
        with bank.use(output.mixture):
            assert complete(model, tokenizer, [question], 8).texts == [output.text]
        assert output.pass1_seconds > 0 and output.pass2_seconds > 0


def test_pass_one_runs_on_stated_weights(small: Any) -> None:
    """Whatever is in force outside, pass 1 runs on the base, or on the classifier."""
    model, tokenizer = small
    bank = random_bank(model, ("far",), size=3.0)
    questions = [p.prompt for p in tasks.problems("add", 4, "test")]
    base = name_categories(model, tokenizer, bank, SMALL, questions)
    with bank.use("far"):
        assert name_categories(model, tokenizer, bank, SMALL, questions) == base
        nonsense = name_categories(model, tokenizer, bank, SMALL, questions, "far")
    assert base == ["add"] * 4
    assert nonsense != base


def test_a_reply_outside_the_list_means_the_base() -> None:
    categories = Categories(("math", "code"))
    assert categories.read("I think CODE, or math") == "code"
    assert categories.read("mathematics") == "other"
    assert categories.read("") == "other"
    bank = SimpleNamespace(names=["math", "code"])
    engine = TwoPass(None, None, bank, categories, None, {"other": "math"})
    assert engine.mixture_of("other") is None, "nothing can redirect the base"
    assert engine.mixture_of("math") == "math"


def test_a_missing_expert_is_no_silent_base() -> None:
    categories, bank = Categories(("math", "code")), SimpleNamespace(names=["math"])
    with pytest.raises(ValueError, match="category 'code' needs expert 'code'"):
        TwoPass(None, None, bank, categories)
    with pytest.raises(ValueError, match="the classifier needs expert 'sorter'"):
        TwoPass(None, None, bank, categories, "sorter", {"code": None})


def test_the_prompt_names_every_category() -> None:
    prompt = Categories(("math", "code")).prompt("Why {names}?")
    assert "math, code, other" in prompt and "Why {names}?" in prompt
    with pytest.raises(ValueError, match="template"):
        Categories(("a",), template="no place for it")


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


@pytest.mark.skipif(
    not (STORIES / "stories260K").exists(), reason="stories260K is not beside the checkout"
)
def test_any_local_model_in_two_passes() -> None:
    """A model of another kind: subword tokenizer, no chat template, never asked for categories."""
    from t2runtime.loading import load

    model, tokenizer = load(str(STORIES / "stories260K"))
    t2k.convert(model, progress=False)
    bank = random_bank(model, ("one", "two"), size=0.1)
    engine = TwoPass(model, tokenizer, bank, Categories(("one", "two")))
    outputs = engine.generate(["Once upon a time", "The dog"], 6)
    assert all(output.category in {"one", "two", "other"} for output in outputs)
    assert all(output.text for output in outputs)
