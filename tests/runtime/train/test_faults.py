"""What goes wrong in training is named, with the problem."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import t2kernels as t2k
from t2runtime.evaluate import evaluate
from t2runtime.train import Config, train


def changed(cfg: Config, **changes: Any) -> Config:
    return Config(**{**vars(cfg), **changes})


def test_a_reward_that_is_not_finite(tiny: Any, tokenizer: Any, letters: Any, quick: Any) -> None:
    with pytest.raises(ValueError, match="'letter' must grade .* got nan for prompt '1\\+1='"):
        train(tiny, tokenizer, letters("a", lambda p, c: math.nan), quick)
    assert all(bool((z == 1).all()) for z in t2k.Expert.from_model(tiny).z.values())


def test_a_reward_that_raises(tiny: Any, tokenizer: Any, letters: Any, quick: Any) -> None:
    def grade(problem: Any, text: str) -> bool:
        if text != "x":
            raise KeyError("no such unit")
        return True

    class Late(letters):  # type: ignore[misc]
        def grade(self, problems: Any, completions: Any) -> Any:
            if len(completions) == quick.validation_problems:
                return [False] * len(completions)
            return super().grade(problems, completions)

    with pytest.raises(RuntimeError, match="'letter' raised KeyError.*prompt '1\\+1=', completion"):
        train(tiny, tokenizer, Late("a", grade), quick)


@pytest.mark.parametrize(
    ("grade", "said"),
    [
        (lambda p, c: [1 / 0 for _ in c], "raised ZeroDivisionError.*prompt '1\\+1=', completion"),
        (lambda p, c: [None] * len(c), "must grade with True, .*got None for prompt"),
        (lambda p, c: ["yes"] * len(c), "must grade with True, .*got 'yes' for prompt"),
        (lambda p, c: [math.nan] * len(c), "must grade with True, .*got nan for prompt"),
        (lambda p, c: [torch.ones(1)] * len(c), "must grade with True, .*got tensor"),
        (lambda p, c: None, "must grade with a list, .*got None"),
        (lambda p, c: "yes" * len(c), "must grade with a list, .*got 'yes"),
    ],
)
@pytest.mark.parametrize("where", ["validation", "training", "evaluate"])
def test_a_reward_that_is_none(
    tiny: Any, tokenizer: Any, letters: Any, quick: Any, grade: Any, said: str, where: str
) -> None:
    """The same words at the base's validation, in a step, and in an evaluation by itself."""

    class Bad(letters):  # type: ignore[misc]
        def grade(self, problems: Any, completions: Any) -> Any:
            # 8 are asked at validation, 64 in a step.
            if where == "training" and len(completions) == quick.validation_problems:
                return [False] * len(completions)
            return grade(problems, completions)

    source = Bad("a")
    with pytest.raises((RuntimeError, ValueError), match=f"'letter' {said}"):
        if where == "evaluate":
            evaluate(tiny, tokenizer, source, source(4, "test", 0), 1)
        else:
            train(tiny, tokenizer, source, quick)


@pytest.mark.parametrize(
    "reward", [np.bool_(True), np.float32(1), np.int64(1), torch.tensor(1.0), torch.tensor(True)],
    ids=lambda r: f"{type(r).__module__}-{getattr(r, 'dtype', '')}",
)  # fmt: skip
def test_scalars_of_numpy_and_torch_are_rewards(
    tiny: Any, tokenizer: Any, letters: Any, quick: Any, reward: Any
) -> None:
    lines: list[Any] = []
    cfg = changed(quick, steps=1, kl=0.0)
    train(tiny, tokenizer, letters("a", lambda p, c: reward), cfg, log=lines.append)
    assert lines[0]["reward"] == lines[0]["sampled_accuracy"] == lines[0]["validation"] == 1


def test_an_array_of_verdicts(tiny: Any, tokenizer: Any, letters: Any, quick: Any) -> None:
    class Batched(letters):  # type: ignore[misc]
        def grade(self, problems: Any, completions: Any) -> Any:
            return torch.ones(len(completions)) if self.torch else np.ones(len(completions), bool)

    for kind in (True, False):
        source = Batched("a")
        source.torch = kind
        assert evaluate(tiny, tokenizer, source, source(4, "test", 0), 1).right == 4


def test_a_wrong_answer_is_wrong_whatever_its_reward(
    tiny: Any, tokenizer: Any, letters: Any, quick: Any
) -> None:
    lines: list[Any] = []
    cfg = changed(quick, steps=1, wrong_reward=0.1)
    train(tiny, tokenizer, letters("never"), cfg, log=lines.append)
    assert lines[0]["reward"] == pytest.approx(0.1) and lines[0]["sampled_accuracy"] == 0


def test_too_few_verdicts(tiny: Any, tokenizer: Any, letters: Any, quick: Any) -> None:
    class Short(letters):  # type: ignore[misc]
        def grade(self, problems: Any, completions: Any) -> Any:
            return [True] * (len(completions) - 1)

    with pytest.raises(ValueError, match="must grade (64|8) completions, it gave (63|7)"):
        train(tiny, tokenizer, Short("a"), quick)


def test_no_problems(tiny: Any, tokenizer: Any, letters: Any, quick: Any) -> None:
    class Bare(letters):  # type: ignore[misc]
        def __call__(self, count: int, split: str, seed: int) -> Any:
            return super().__call__(count, split, seed) if split == self.has else []

    for has, lacks in (("train", "validation"), ("validation", "training")):
        source = Bare("a")
        source.has = has
        with pytest.raises(ValueError, match=f"'letter' gave no {lacks} problems"):
            train(tiny, tokenizer, source, quick)


def test_plain_numbers_are_rewards(tiny: Any, tokenizer: Any, letters: Any, quick: Any) -> None:
    lines: list[Any] = []
    source = letters("a", lambda p, c: 0.25)
    train(tiny, tokenizer, source, changed(quick, steps=1), log=lines.append)
    assert lines[0]["reward"] == 0.25


def test_wrong_reward(tiny: Any, tokenizer: Any, letters: Any, quick: Any) -> None:
    lines: list[Any] = []
    cfg = changed(quick, steps=1, wrong_reward=-0.1)
    train(tiny, tokenizer, letters("never"), cfg, log=lines.append)
    assert lines[0]["reward"] == pytest.approx(-0.1)


def test_logits_that_are_not_finite(tiny: Any, tokenizer: Any, letter: Any, quick: Any) -> None:
    """Under the expert only: the base is evaluated before, greedily."""
    tiny.lm_head.weight.data[5] = math.inf
    with pytest.raises(RuntimeError, match="logits are not finite"):
        train(tiny, tokenizer, letter, quick)


def test_a_gradient_that_is_not_finite(
    tiny: Any, tokenizer: Any, letter: Any, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, layer = list(t2k.svf_layers(tiny).items())[2]
    layer.z.requires_grad_(True).register_hook(lambda g: g * math.nan)
    with pytest.raises(RuntimeError, match=f"diverged at step 0: 1 of 7 gradients .* {name}.*lr"):
        train(tiny, tokenizer, letter, quick)


def test_prompts_beyond_the_context(tiny: Any, tokenizer: Any, letters: Any, quick: Any) -> None:
    source = letters("a", prompt="1" * 63)
    with pytest.raises(ValueError, match="4 of 4 train .* prompt 0 has 64 .* 1 new .* holds 64"):
        train(tiny, tokenizer, source, changed(quick, validation_problems=4))
