import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.generation import answer_log_probs, forced
from t2runtime.train import SVF, Config, Peft, small_model, train
from t2runtime.train.adapters import restore, snapshot

peft = pytest.importorskip("peft")
METHODS = ["svf", "lora", "dora", "ia3"]


def make(model: Any, method: str) -> Any:
    if method == "svf":
        return SVF(model)
    t2k.revert(model)
    return Peft(model, method, rank=4)


@pytest.fixture
def asked(tiny: Any, tokenizer: Any) -> Any:
    return forced(tokenizer, ["1+1=", "flip 12345="], ["2", "54321"], tiny)


@torch.no_grad()
def logs(model: Any, asked: Any) -> torch.Tensor:
    return answer_log_probs(model, asked)


def shake(adapter: Any, size: float = 0.1) -> None:
    gen = torch.Generator().manual_seed(0)
    state = {
        n: p + size * torch.randn(p.shape, generator=gen) for n, p in snapshot(adapter).items()
    }
    restore(adapter, state)


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_base(tiny: Any, asked: Any, method: str) -> None:
    """Bit for bit, in the middle of training, without a second copy of the model."""
    before = logs(tiny, asked)
    adapter = make(tiny, method)
    adapter.start(False)
    tolerance = {} if method == "svf" else {"atol": 1e-5, "rtol": 1e-4}
    assert torch.allclose(logs(tiny, asked), before, **tolerance), "it starts at the base"
    shake(adapter)
    assert not torch.allclose(logs(tiny, asked), before, atol=1e-3)
    with adapter.base():
        assert torch.equal(logs(tiny, asked), before)
    assert all(p.requires_grad for p in adapter.parameters().values())
    adapter.stop()
    assert torch.allclose(logs(tiny, asked), before, **tolerance)
    assert not any(p.requires_grad for p in tiny.parameters())
    with adapter.base():
        assert torch.equal(logs(tiny, asked), before)
    assert not any(p.requires_grad for p in tiny.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_merging_leaves_no_trace(tiny: Any, asked: Any, method: str) -> None:
    adapter = make(tiny, method)
    adapter.start(False)
    shake(adapter)
    state = {name: p.clone() for name, p in tiny.state_dict().items()}
    plain = logs(tiny, asked)
    for _ in range(3):
        with adapter.rollout("merged"):
            assert torch.allclose(logs(tiny, asked), plain, atol=1e-4)
    for name, p in tiny.state_dict().items():
        assert torch.equal(p, state[name]), name
    assert torch.equal(logs(tiny, asked), plain)


@pytest.mark.parametrize("method", METHODS)
def test_snapshots_are_whole(tiny: Any, asked: Any, method: str) -> None:
    adapter = make(tiny, method)
    adapter.start(False)
    shake(adapter)
    state, plain = snapshot(adapter), logs(tiny, asked)
    assert all(value > 0 for value in adapter.moved().values())
    shake(adapter)
    assert not torch.equal(logs(tiny, asked), plain)
    restore(adapter, state)
    assert torch.equal(logs(tiny, asked), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", ["reinforce", "next-token"])
def test_all_methods_train(
    tiny: Any, tokenizer: Any, letter: Any, chance: Any, quick: Config, method: str, objective: str
) -> None:
    before = chance(tiny, letter.letter)
    adapter = make(tiny, method)
    cfg = Config(**{**vars(quick), "objective": objective, "kl": 0.01})
    trained = train(tiny, tokenizer, letter, cfg, adapter=adapter)
    assert chance(tiny, letter.letter) == pytest.approx(before, rel=1e-4)
    with adapter.using(trained):
        assert chance(tiny, letter.letter) > 1.5 * before
    assert chance(tiny, letter.letter) == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("method", METHODS[1:])
def test_peft_reads_what_is_saved(
    tiny: Any, tokenizer: Any, letter: Any, chance: Any, quick: Config, method: str, tmp_path: Path
) -> None:
    adapter = make(tiny, method)
    trained = train(tiny, tokenizer, letter, quick, adapter=adapter)
    trained.metadata["task"] = "letter"
    trained.save(tmp_path / "saved")
    with adapter.using(trained):
        after = chance(tiny, letter.letter)
    assert (tmp_path / "saved" / "training.json").exists()
    plain = adapter.peft_model.unload()
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path / "saved"))
    assert chance(loaded.get_base_model(), letter.letter) == pytest.approx(after, rel=1e-5)


def test_the_layers_are_those_of_svf(tiny: Any) -> None:
    wanted = set(t2k.svf_layers(tiny))
    t2k.revert(tiny)
    adapter = Peft(tiny, "lora", ["q_proj", "down_proj"], rank=2)
    layers = {name.split(".lora_")[0] for name in adapter.parameters()}
    assert layers == {
        f"base_model.model.{n}" for n in wanted if n.endswith(("q_proj", "down_proj"))
    }


def test_equal_seeds_start_alike_and_leave_the_generator(tiny: Any) -> None:
    t2k.revert(tiny)
    torch.manual_seed(7)
    first = Peft(tiny, "lora", rank=2, seed=3)
    one, drawn = snapshot(first), torch.rand(())
    torch.manual_seed(7)
    again = Peft(first.peft_model.unload(), "lora", rank=2, seed=3)
    two = snapshot(again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.rand(()), drawn)


@pytest.mark.parametrize(
    ("words", "said"),
    [({"method": "svd"}, "method must be one of lora"), ({"method": "lora", "rank": 0}, "rank")],
)
def test_bad_arguments(tiny: Any, words: dict[str, Any], said: str) -> None:
    t2k.revert(tiny)
    with pytest.raises(ValueError, match=said):
        Peft(tiny, **words)


def test_peft_that_is_missing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    t2k.revert(tiny)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"t2kernels\[peft\]"):
        Peft(tiny, "lora")


def test_two_methods_under_one_budget(small: Any) -> None:
    """LoRA on the shipped model, by the same loop: a few steps from 0.2 on reversal."""
    from t2runtime.loading import load
    from t2runtime.tasks import Generated

    model, tokenizer = load("small")
    adapter = Peft(model, "lora", rank=4)
    cfg = small_model(steps=8, prompts=16, validate_every=4, validation_problems=64, lr=1e-2)
    trained = train(model, tokenizer, Generated("reverse"), cfg, adapter=adapter)
    assert trained.metadata["validation"] > trained.metadata["base_validation"]


@pytest.mark.parametrize("method", METHODS[1:])
def test_no_warning_that_the_user_cannot_act_on(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, method: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", FutureWarning)
        adapter = make(tiny, method)
        cfg = Config(**{**vars(quick), "steps": 1})
        train(tiny, tokenizer, letter, cfg, adapter=adapter).save(tmp_path / "saved")
    assert not [str(one.message) for one in said if one.category is FutureWarning]
