"""A task of one letter, which a random model learns in seconds, and settings to match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from t2runtime.generation import answer_log_probs, complete
from t2runtime.tasks import Problem, Split
from t2runtime.train import Config, small_model


@dataclass
class Letter:
    """The right answer is always the same letter."""

    letter: str
    grade_one: Callable[[Problem, str], Any] = field(default=lambda p, text: text == p.answer)
    name: str = "letter"
    max_new_tokens: int = 1
    prompt: str = "1+1="

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        return [Problem(self.prompt, self.letter, self.name)] * count

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        return [self.grade_one(p, c) for p, c in zip(problems, completions, strict=True)]


@pytest.fixture(scope="session")
def letters() -> type[Letter]:
    return Letter


@pytest.fixture
def letter(tiny: Any, tokenizer: Any) -> Letter:
    """A letter that the model says with a small but not hopeless probability."""
    with torch.no_grad():
        done = complete(tiny, tokenizer, ["1+1="], 1)
        chance = answer_log_probs(tiny, done)[0, 0].exp()
    order = [i for i in chance.argsort(descending=True).tolist() if i > 3]
    return Letter(tokenizer.decode([order[5]]))


@pytest.fixture
def chance(tokenizer: Any) -> Callable[[Any, str], float]:
    """How likely a model says a letter."""

    def chance_of(model: Any, letter: str) -> float:
        with torch.no_grad():
            done = complete(model, tokenizer, ["1+1="], 1)
            log_probs = answer_log_probs(model, done)[0, 0]
        return float(log_probs[tokenizer.convert_tokens_to_ids(letter)].exp())

    return chance_of


@pytest.fixture
def quick() -> Config:
    return small_model(
        steps=12, prompts=4, samples=16, max_new_tokens=1, lr=0.1, validate_every=4,
        validation_problems=8, kl=0.0,
    )  # fmt: skip
