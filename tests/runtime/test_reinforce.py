import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.generation import Completions, answer_log_probs, complete
from t2runtime.tasks import ByAnswer, Problem, Split
from t2runtime.train import Config, Interrupted, reinforce, train
from t2runtime.train.reinforce import advantages, losses

QUICK = Config(
    steps=12, prompts=4, samples=16, max_new_tokens=1, lr=0.1, validate_every=4,
    validation_problems=8, kl=0.0,
)  # fmt: skip


def favourite_letter(tiny: Any, tokenizer: Any) -> str:
    """A letter that the model says with a small but not hopeless probability."""
    with torch.no_grad():
        done = complete(tiny, tokenizer, ["1+1="], 1)
        chance = answer_log_probs(tiny, done)[0, 0].exp()
    order = [i for i in chance.argsort(descending=True).tolist() if i > 3]
    letter: str = tokenizer.decode([order[5]])
    return letter


class Letter(ByAnswer):
    """Always the same question; the letter is right."""

    name, max_new_tokens, letter = "letter", 1, ""

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        return [Problem("1+1=", self.letter, "letter")] * count


def source_of(letter: str) -> Any:
    return type("Letter", (Letter,), {"letter": letter})()


def chance_of(model: Any, tokenizer: Any, letter: str) -> float:
    with torch.no_grad():
        done = complete(model, tokenizer, ["1+1="], 1)
        log_probs = answer_log_probs(model, done)[0, 0]
    return float(log_probs[tokenizer.convert_tokens_to_ids(letter)].exp())


@pytest.mark.parametrize("rollout", ["merged", "factorised"])
def test_a_trivial_reward_is_learnt(tiny: Any, tokenizer: Any, rollout: Any) -> None:
    letter = favourite_letter(tiny, tokenizer)
    before = chance_of(tiny, tokenizer, letter)
    state = {name: value.clone() for name, value in tiny.state_dict().items()}
    cfg = Config(**{**vars(QUICK), "rollout": rollout})
    expert = train(tiny, tokenizer, source_of(letter), cfg)
    assert chance_of(tiny, tokenizer, letter) == before, "the model comes back as the base"
    for name, value in tiny.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} changed"
    bank = t2k.ExpertBank(tiny)
    bank.add("letter", expert)
    with bank.use("letter"):
        after = chance_of(tiny, tokenizer, letter)
    assert after > 2 * before and after > 0.5


def test_same_seed_same_expert(tiny: Any, tokenizer: Any) -> None:
    cfg = Config(**{**vars(QUICK), "steps": 3})
    source = source_of(favourite_letter(tiny, tokenizer))
    a, b = (train(tiny, tokenizer, source, cfg) for _ in range(2))
    assert all(torch.equal(a.z[name], b.z[name]) for name in a.z)


def test_a_run_leaves_config_and_metrics(tiny: Any, tokenizer: Any, tmp_path: Path) -> None:
    cfg = Config(**{**vars(QUICK), "steps": 3, "kl": 0.1})
    train(tiny, tokenizer, source_of("a"), cfg, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "validation" in lines[-1]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5), "at z = 1 the two models are one"
    assert json.loads((tmp_path / "config.json").read_text())["kl"] == 0.1


def test_parts_of_the_rows_give_the_same_step(tiny: Any, tokenizer: Any) -> None:
    source = source_of(favourite_letter(tiny, tokenizer))
    whole, parts = (
        train(
            tiny, tokenizer, source, Config(**{**vars(QUICK), "steps": 2, "rows_per_backward": n})
        )
        for n in (256, 24)
    )
    for name in whole.z:
        assert torch.allclose(whole.z[name], parts.z[name], atol=2e-3)


def test_divergence_is_said(tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforce, "reward_of", lambda *_: math.nan)
    with pytest.raises(RuntimeError, match="diverged at step 0"):
        train(tiny, tokenizer, source_of("a"), QUICK)
    assert all(bool((z == 1).all()) for z in t2k.Expert.from_model(tiny).z.values())


def test_no_better_than_the_base_is_said(
    tiny: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = Config(**{**vars(QUICK), "steps": 1})
    expert = train(tiny, tokenizer, source_of("never"), cfg, tmp_path)
    assert "not better than the base" in caplog.text
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["base_validation"] == 0 and line["better_than_base"] is False
    assert expert.metadata == {"validation": 0.0, "base_validation": 0.0}


@pytest.mark.parametrize("at", [3, 6])
def test_an_interrupt_keeps_the_best(tiny: Any, tokenizer: Any, at: int) -> None:
    def log(line: dict[str, Any]) -> None:
        if line["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stop:
        train(tiny, tokenizer, source_of(favourite_letter(tiny, tokenizer)), QUICK, log=log)
    assert stop.value.validated == (at > 4) and stop.value.step == at - 1
    assert any(bool((z != 1).any()) for z in stop.value.expert.z.values())
    assert all(bool((z == 1).all()) for z in t2k.Expert.from_model(tiny).z.values())


def test_losses_by_hand() -> None:
    """Two rows, two tokens, vocabulary of three; the second row ends after its first token."""
    torch.manual_seed(0)
    log_probs = torch.randn(2, 2, 3).log_softmax(-1)
    reference = torch.randn(2, 2, 3).log_softmax(-1)
    ids = torch.tensor([[9, 0, 1], [9, 2, 0]])
    sampled = torch.tensor([[True, True], [True, False]])
    rolled = Completions(ids, torch.ones_like(ids), sampled, ["", ""])
    policy, kl = losses(log_probs, reference, rolled, torch.tensor([2.0, -1.0]))
    chosen = 2 * (log_probs[0, 0, 0] + log_probs[0, 1, 1]) - log_probs[1, 0, 2]
    assert policy.item() == pytest.approx(-chosen.item(), rel=1e-6)
    by_torch = torch.nn.functional.kl_div(
        reference, log_probs, reduction="none", log_target=True
    ).sum(-1)
    assert kl.item() == pytest.approx((by_torch[0].sum() + by_torch[1, 0]).item(), rel=1e-5)


def test_advantages() -> None:
    scores = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    gains = advantages(scores, "leave-one-out")
    others = (scores.sum(1, keepdim=True) - scores) / 3
    assert torch.allclose(gains, scores - others)
    assert torch.equal(advantages(scores, "none"), scores)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"samples": 1}, {"temperature": 0.0}, {"baseline": "mean"},
        {"rollout": "rebuilt"}, {"extract": "letters"},
        {"kl": -0.1}, {"kl": math.nan}, {"temperature": math.inf}, {"lr": 0.0}, {"lr": math.nan},
        {"clip": 0.0}, {"seed": -1},
    ],
)  # fmt: skip
def test_config_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)
