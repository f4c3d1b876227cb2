import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import t2kernels as t2k
from t2runtime.generation import Completions, answer_log_probs, complete, token_log_probs
from t2runtime.train import SVF, Config, Interrupted, train
from t2runtime.train.reinforce import (
    advantages,
    exact_kl,
    gradient,
    sampled_kl,
    token_shares,
)


def changed(cfg: Config, **changes: Any) -> Config:
    return Config(**{**vars(cfg), **changes})


@pytest.mark.parametrize("rollout", ["merged", "factorised"])
def test_a_trivial_reward_is_learnt(
    tiny: Any, tokenizer: Any, letter: Any, chance: Any, quick: Config, rollout: str
) -> None:
    before = chance(tiny, letter.letter)
    state = {name: value.clone() for name, value in tiny.state_dict().items()}
    expert = train(tiny, tokenizer, letter, changed(quick, rollout=rollout))
    assert chance(tiny, letter.letter) == before, "the model comes back as the base"
    for name, value in tiny.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} changed"
    assert not any(p.requires_grad for p in tiny.parameters())
    bank = t2k.ExpertBank(tiny)
    bank.add("letter", expert)
    with bank.use("letter"):
        after = chance(tiny, letter.letter)
    assert after > 2 * before and after > 0.5


@pytest.mark.parametrize("estimator", ["exact", "k3"])
def test_same_seed_same_expert(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, estimator: str
) -> None:
    cfg = changed(quick, steps=3, kl=0.1, kl_estimator=estimator)
    a, b = (train(tiny, tokenizer, letter, cfg) for _ in range(2))
    assert all(torch.equal(a.z[name], b.z[name]) for name in a.z)


def test_the_papers_recipe_learns(tiny: Any, tokenizer: Any, letter: Any, chance: Any) -> None:
    before = chance(tiny, letter.letter)
    cfg = Config(steps=6, lr=0.2, max_new_tokens=1, validate_every=3, validation_problems=4)
    bank = t2k.ExpertBank(tiny)
    bank.add("letter", train(tiny, tokenizer, letter, cfg))
    with bank.use("letter"):
        assert chance(tiny, letter.letter) > before


@pytest.mark.parametrize(
    "changes",
    [{"recompute": True}, {"gradient_checkpointing": True}, {"rows_per_backward": 24},
     {"optimiser": "adamw"}],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_memory_options_give_the_same_step(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, changes: dict[str, Any]
) -> None:
    cfg = changed(quick, steps=2, kl=0.1)
    plain, other = (train(tiny, tokenizer, letter, c) for c in (cfg, changed(cfg, **changes)))
    for name in plain.z:
        assert torch.allclose(plain.z[name], other.z[name], atol=2e-3)
    assert not tiny.training and not any(m.training for m in tiny.modules())
    assert not any(layer.recompute for layer in t2k.svf_layers(tiny).values())


def test_checkpointing_keeps_less_and_leaves_dropout_off(tiny: Any, tokenizer: Any) -> None:
    """Blocks are computed again in backward, in eval mode inside."""
    layer = tiny.model.layers[0]
    modes = []
    layer.mlp.register_forward_pre_hook(lambda m, i: modes.append(m.training))
    done = complete(tiny, tokenizer, ["1+1="], 2)
    modes.clear()
    t2k.trainable(tiny)
    cfg = Config(gradient_checkpointing=True, kl=0.0)
    share = token_shares(done, False)
    gradient(tiny, SVF(tiny), done, share, share, cfg)
    assert modes == [False, False], "once forward, once again in backward"


def test_checkpointed_blocks_that_drop_out_by_themselves(tokenizer: Any) -> None:
    """OPT's blocks drop out by a function that their own mode decides."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, ffn_dim=24, num_hidden_layers=2, dropout=0.5,
        num_attention_heads=2, max_position_embeddings=32, word_embed_proj_dim=16, init_std=0.3,
        layerdrop=0.9, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    t2k.convert(model, progress=False)
    layers = t2k.trainable(model)
    done = complete(model, tokenizer, ["1+1=", "2+2="], 2)
    share = token_shares(done, False)
    found = []
    for wanted in (False, True):
        cfg = Config(gradient_checkpointing=wanted, kl=0.1)
        gradient(model, SVF(model), done, share, share, cfg)
        found.append([z.grad.clone() for z in layers])  # type: ignore[union-attr]
        for z in layers:
            z.grad = None
    assert all(bool(g.any()) for g in found[0])
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(again, kept)
    assert not any(m.training for m in model.modules())


def test_sigmoid_normalised_layers_learn(
    tokenizer: Any, tiny: Any, letter: Any, quick: Any
) -> None:
    t2k.revert(tiny)
    t2k.convert(tiny, parametrisation="sigmoid-normalised", progress=False)
    expert = train(tiny, tokenizer, letter, changed(quick, steps=8, lr=0.5))
    assert expert.metadata["validation"] >= expert.metadata["base_validation"]
    assert any(bool((z != 1).any()) for z in expert.z.values())


def test_a_run_leaves_settings_and_metrics(
    tiny: Any, tokenizer: Any, letters: Any, quick: Config, tmp_path: Path
) -> None:
    cfg = changed(quick, steps=3, kl=0.1, max_new_tokens=None)
    train(tiny, tokenizer, letters("a"), cfg, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5), "at z = 1 the two models are one"
    for line in lines:
        assert {"reward", "loss", "grad_norm", "lr", "empty", "new_tokens", "seconds"} <= set(line)
        parts = sum(v for k, v in line.items() if k.endswith("_seconds"))
        assert parts <= line["seconds"]
    assert "validation" in lines[-1] and lines[-1]["moved"].keys() == t2k.svf_layers(tiny).keys()
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["kl"] == 0.1 and settings["versions"]["torch"] == torch.__version__
    assert settings["max_new_tokens"] == 1 and settings["chat"] == "off", "resolved"
    assert settings["run"]["task"] == "letter"


def test_no_better_than_the_base_is_said(
    tiny: Any, tokenizer: Any, letters: Any, quick: Any, tmp_path: Path, caplog: Any
) -> None:
    expert = train(tiny, tokenizer, letters("never"), changed(quick, steps=1), tmp_path)
    assert "not better than the base" in caplog.text
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["base_validation"] == 0 and line["better_than_base"] is False
    assert expert.metadata == {"validation": 0.0, "base_validation": 0.0}


def test_patience_ends_a_run(tiny: Any, tokenizer: Any, letters: Any, quick: Any) -> None:
    lines: list[Any] = []
    cfg = changed(quick, steps=40, validate_every=2, patience=3)
    train(tiny, tokenizer, letters("never"), cfg, log=lines.append)
    assert len(lines) == 8, "the first validation is the best one, three more are waited for"


@pytest.mark.parametrize("at", [3, 6])
def test_an_interrupt_keeps_the_best(
    tiny: Any, tokenizer: Any, letter: Any, quick: Any, at: int
) -> None:
    def log(line: dict[str, Any]) -> None:
        if line["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stop:
        train(tiny, tokenizer, letter, quick, log=log)
    assert stop.value.validated == (at > 4) and stop.value.step == at - 1
    assert any(bool((z != 1).any()) for z in stop.value.expert.z.values())
    assert all(bool((z == 1).all()) for z in t2k.Expert.from_model(tiny).z.values())


def by_hand() -> tuple[Any, Any, Completions]:
    """Two rows, two tokens, vocabulary of three; the second row ends after its first token."""
    torch.manual_seed(0)
    log_probs = torch.randn(2, 2, 3).log_softmax(-1)
    reference = torch.randn(2, 2, 3).log_softmax(-1)
    ids = torch.tensor([[9, 0, 1], [9, 2, 0]])
    sampled = torch.tensor([[True, True], [True, False]])
    return log_probs, reference, Completions(ids, torch.ones_like(ids), sampled, ["", ""])


def test_exact_kl_by_hand() -> None:
    log_probs, reference, _ = by_hand()
    by_torch = F.kl_div(reference, log_probs, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(exact_kl(log_probs, reference), by_torch, rtol=1e-5)


def test_token_shares() -> None:
    rolled = by_hand()[2]
    assert token_shares(rolled, False).tolist() == [[1, 1], [1, 0]]
    assert token_shares(rolled, True).tolist() == [[0.5, 0.5], [1, 0]]


def test_rows_leave_common_padding_out() -> None:
    """Prompts of 1 and 3 tokens, answers of 2 and 1."""
    ids = torch.tensor([[0, 0, 5, 6, 7, 0], [3, 4, 5, 8, 0, 0]])
    attention = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    sampled = torch.tensor([[True, True, False], [True, False, False]])
    both = Completions(ids, attention, sampled, ["a", "b"])
    first, second = both.rows(slice(0, 1)), both.rows(slice(1, 2))
    assert first.ids.tolist() == [[5, 6, 7]] and first.prompt_length == 1
    assert second.ids.tolist() == [[3, 4, 5, 8]] and second.prompt_length == 3
    assert both.rows(slice(0, 2)).ids.shape == (2, 5)


@pytest.mark.parametrize("rows", [16, 40])
def test_rollouts_in_parts(tiny: Any, tokenizer: Any, letter: Any, quick: Any, rows: int) -> None:
    """64 answers, so many at once: other samples, the same kind of step."""
    lines: list[Any] = []
    cfg = changed(quick, steps=2, rows_per_rollout=rows, rows_per_backward=24)
    train(tiny, tokenizer, letter, cfg, log=lines.append)
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["new_tokens"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_k3_is_unbiased_in_value_and_gradient(seed: int) -> None:
    """The mean over all tokens of a vocabulary of seven is the KL, and so for the gradient."""
    torch.manual_seed(seed)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    chance = log_probs.exp().detach()
    each = sampled_kl(log_probs, reference)
    exact = exact_kl(log_probs, reference)
    assert bool((each >= 0).all())
    assert (chance * each).sum().item() == pytest.approx(exact.item(), rel=1e-12)
    (ours,) = torch.autograd.grad((chance * each).sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(exact, logits)
    assert torch.allclose(ours, wanted, rtol=1e-10, atol=1e-13)


def test_advantages() -> None:
    scores = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    gains = advantages(scores, "leave-one-out")
    others = (scores.sum(1, keepdim=True) - scores) / 3
    assert torch.allclose(gains, scores - others)
    assert torch.equal(advantages(scores, "none"), scores)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_gradient_by_differences(tiny: Any, tokenizer: Any, kl: float) -> None:
    """The gradient of the whole objective, by central differences of it in fp64."""
    torch.manual_seed(1)
    done = complete(tiny, tokenizer, ["1+1=", "flip 12345="], 4, samples=2, temperature=1.0)
    gain = torch.tensor([1.0, -1.0, 0.5, 2.0])[:, None]
    share = token_shares(done, False) / 4
    t2k.trainable(tiny)
    layer = next(iter(t2k.svf_layers(tiny).values()))
    with torch.no_grad():
        for other in t2k.svf_layers(tiny).values():
            other.z.add_(0.05 * torch.randn_like(other.z))
    cfg = Config(kl=kl, rows_per_backward=3)
    gradient(tiny, SVF(tiny), done, gain * share, share, cfg)
    assert layer.z.grad is not None
    ours = layer.z.grad.clone()

    @torch.no_grad()
    def objective() -> float:
        log_probs = answer_log_probs(tiny, done).double()
        with t2k.ExpertBank(tiny).use(None):
            reference = answer_log_probs(tiny, done).double()
        chosen = log_probs.gather(-1, done.new_ids[..., None])[..., 0]
        value = -(gain * share * chosen).sum() + kl * (share * exact_kl(log_probs, reference)).sum()
        return float(value)

    for index in (0, 3, 17):
        at, h = layer.z.data[index].item(), 0.02
        values = []
        for sign in (1, -1):
            layer.z.data[index] = at + sign * h
            values.append(objective())
        layer.z.data[index] = at
        wanted = (values[0] - values[1]) / (2 * h)
        assert ours[index].item() == pytest.approx(wanted, rel=0.02, abs=2e-5)


def test_merged_and_factorised_log_probs_agree(tiny: Any, tokenizer: Any) -> None:
    """Answers are sampled from merged weights and trained through the factorised form."""
    torch.manual_seed(2)
    for layer in t2k.svf_layers(tiny).values():
        layer.z.data += 0.2 * torch.randn_like(layer.z)
    adapter = SVF(tiny)
    with torch.no_grad(), adapter.rollout("merged"):
        done = complete(tiny, tokenizer, ["1+1=", "flip 12345="], 6, samples=4, temperature=1.0)
        merged = answer_log_probs(tiny, done)
    with torch.no_grad(), adapter.rollout("factorised"):
        factorised = answer_log_probs(tiny, done)
        chosen = token_log_probs(tiny, done)
    assert torch.allclose(merged, factorised, atol=2e-4)
    picked = factorised.gather(-1, done.new_ids[..., None])[..., 0]
    assert torch.allclose(chosen, picked, atol=1e-6)
