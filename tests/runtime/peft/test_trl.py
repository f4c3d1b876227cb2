"""GRPOTrainer, RLOOTrainer and SFTTrainer on an SVF adapter: two steps, checkpoints, resuming."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

import t2runtime.peft as svf
from t2runtime.base_model import build_tokenizer

# What these libraries warn about while they are imported and run is theirs.
pytestmark = pytest.mark.filterwarnings("default")

REASON = "TRL is not installed (pip install 't2kernels[rl]')"


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL with the data set library that it needs."""
    pytest.importorskip("datasets", reason=REASON)
    return pytest.importorskip("trl", reason=REASON)


def _reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def _trainer(trl: Any, method: str, model: Any, tokenizer: Any, folder: Any, **more: Any) -> Any:
    """A trainer of two steps that saves each; ``model`` is a base model or a PeftModel."""
    import datasets

    if not isinstance(model, peft.PeftModel):
        more["peft_config"] = svf.SVFConfig(task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 2, "save_steps": 1, "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "bf16": False, "learning_rate": 2e-2,
        "per_device_train_batch_size": 2, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    prompts = ["1+2=", "3+4=", "5+6=", "7+8="]
    if method == "SFT":
        data = datasets.Dataset.from_dict({"text": [f"{p}9" for p in prompts]})
        args = trl.SFTConfig(max_length=16, **settings)
    else:
        data = datasets.Dataset.from_dict({"prompt": prompts})
        args = getattr(trl, f"{method}Config")(
            num_generations=2, max_completion_length=4, beta=0.1, **settings
        )
        more["reward_funcs"] = _reward
    trainer = getattr(trl, f"{method}Trainer")
    return trainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, **more
    )  # fmt: skip


def _base(kit: Any, tokenizer: Any) -> Any:
    assert len(tokenizer) <= kit.VOCAB
    return kit.base()


def _z(model: Any, adapter: str = "default") -> dict[str, torch.Tensor]:
    layers = svf.tuner_layers(model)
    return {n: m.svf_z[adapter].weight.detach().clone() for n, m in layers.items()}


@pytest.mark.parametrize("method", ["GRPO", "RLOO", "SFT"])
def test_two_steps_checkpoint_and_resume(trl, kit, tmp_path, method):
    tokenizer = build_tokenizer()
    base = _base(kit, tokenizer)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    trainer = _trainer(trl, method, base, tokenizer, tmp_path / "run")
    trainer.train()
    model = trainer.model
    z = _z(model)
    assert all(not torch.equal(v, torch.ones_like(v)) for v in z.values())
    if method != "SFT":
        kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
        assert len(kl) == 2 and abs(kl[0]) < 1e-4 < abs(kl[1]), "the reference is the base model"
    for key, value in model.get_base_model().state_dict().items():
        if ".svf_z." not in key:
            assert torch.equal(value, weights[key.replace(".base_layer.", ".")]), key

    again = peft.PeftModel.from_pretrained(_base(kit, tokenizer), tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(v, z[n]) for n, v in _z(again).items())
    assert kit.close(kit.logits(again.eval()), kit.logits(model.eval()), 1e-6)

    resumed = _trainer(trl, method, _base(kit, tokenizer), tokenizer, tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.state.global_step == 2
    for name, value in _z(resumed.model).items():
        assert kit.close(value, z[name], 1e-6), name


def test_a_trained_adapter_is_its_own_reference(trl, kit, tmp_path):
    tokenizer = build_tokenizer()
    model = kit.model(_base(kit, tokenizer))
    before = _z(model)
    trainer = _trainer(trl, "GRPO", model, tokenizer, tmp_path / "run")
    assert all(torch.equal(v, before[n]) for n, v in _z(trainer.model, "ref").items())
    trainer.train()
    assert all(torch.equal(v, before[n]) for n, v in _z(trainer.model, "ref").items())
    assert all(not torch.equal(v, before[n]) for n, v in _z(trainer.model).items())
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert abs(kl[0]) < 1e-4, "at the first step policy and reference are one"
    trainer.save_model(str(tmp_path / "final"))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(_base(kit, tokenizer)), tmp_path / "final")
    assert all(torch.equal(v, _z(trainer.model)[n]) for n, v in _z(again).items())
