from typing import Any

import pytest
import torch
import torch.nn.functional as F

import t2kernels as t2k
from t2runtime.tasks import Generated
from t2runtime.train import SVF, Config, small_model, train
from t2runtime.train.next_token import next_token


def test_the_loss_is_that_of_answer_and_end(tiny: Any, tokenizer: Any) -> None:
    """Row by row, without padding, by torch's own loss."""
    source = Generated("add")
    cfg = small_model(objective="next-token", prompts=6, kl=0.0, rows_per_backward=4)
    t2k.trainable(tiny)
    facts = next_token(tiny, tokenizer, SVF(tiny), source, cfg, 3)
    total, count = 0.0, 0
    for problem in source(6, "train", 3):
        prompt = tokenizer(problem.prompt)["input_ids"]
        answer = [*tokenizer(problem.answer, add_special_tokens=False)["input_ids"], 2]
        with torch.no_grad():
            logits = tiny(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert facts["loss"] == pytest.approx(total / count, rel=1e-5)
    assert facts["new_tokens"] == pytest.approx(count / 6) and facts["kl"] == 0
    assert all(layer.z.grad is not None for layer in t2k.svf_layers(tiny).values())


def test_it_learns(tiny: Any, tokenizer: Any, letter: Any, chance: Any) -> None:
    before = chance(tiny, letter.letter)
    cfg = small_model(
        objective="next-token", steps=8, prompts=4, lr=0.1, validate_every=4,
        validation_problems=4, kl=0.01,
    )  # fmt: skip
    lines: list[dict[str, Any]] = []
    expert = train(tiny, tokenizer, letter, cfg, log=lines.append)
    bank = t2k.ExpertBank(tiny)
    bank.add("letter", expert)
    with bank.use("letter"):
        assert chance(tiny, letter.letter) > 2 * before
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "sampled_accuracy" not in lines[0], "nothing was sampled"


def test_both_objectives_improve_the_small_model(small: Any) -> None:
    """A few steps from the shipped model's 0.2 on reversal."""
    model, tokenizer = small
    for objective, changes in (
        ("reinforce", {"steps": 8, "prompts": 16}),
        ("next-token", {"steps": 8, "prompts": 64, "kl": 0.0}),
    ):
        cfg: Config = small_model(
            objective=objective, validate_every=4, validation_problems=64, **changes
        )
        expert = train(model, tokenizer, Generated("reverse"), cfg)
        gain = expert.metadata["validation"] - expert.metadata["base_validation"]
        assert gain > 0.05, objective
