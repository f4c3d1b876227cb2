"""Which layers, and settings that make no sense."""

from __future__ import annotations

import peft
import pytest
import torch

import t2kernels as t2k
import t2runtime.peft as svf


def _targets(kit, **settings):
    model = peft.get_peft_model(kit.base(), svf.SVFConfig(**settings))
    return {name.removeprefix("model.layers.") for name in svf.tuner_layers(model)}


def test_targets(kit):
    everything = _targets(kit)
    assert len(everything) == 14 and everything == _targets(kit, target_modules="all-linear")
    assert _targets(kit, target_modules=["q_proj", "mlp.up_proj"]) == {
        f"{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert _targets(kit, target_modules=["q_proj"], layers_to_transform=1) == {"1.self_attn.q_proj"}
    assert _targets(kit, target_modules=r".*\.0\.mlp\..*_proj") == {
        f"0.mlp.{n}_proj" for n in ("gate", "up", "down")
    }
    attention = _targets(kit, target_modules="all-linear", exclude_modules=r".*mlp.*")
    assert attention == {n for n in everything if "self_attn" in n}


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 0}, "rank must be a positive integer or None, got 0"),
    ({"rank": True}, "rank must be"),
    ({"parametrisation": "sigmoid"}, "parametrisation must be one of"),
    ({"precision": "fp16"}, "precision must be one of"),
    ({"target_modules": "all-linear", "layers_to_transform": [0]}, "needs target_modules as"),
    ({"layers_pattern": "layers"}, "without layers_to_transform"),
    ({"task_type": "NONSENSE"}, "Invalid task type"),
], ids=str)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        svf.SVFConfig(**settings)


def test_layers_that_cannot_have_an_adapter(kit):
    base = kit.base()
    with pytest.raises(TypeError, match="'model.layers.0.*is a .*; SVF adapts nn.Linear"):
        peft.get_peft_model(base, svf.SVFConfig(target_modules=["input_layernorm"]))
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.get_peft_model(base, svf.SVFConfig(target_modules=["q_prj"]))
    attention = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match="without being called; name it in exclude_modules"):
        peft.get_peft_model(attention, svf.SVFConfig(target_modules=["out_proj"]))
    converted = kit.base()
    t2k.convert(converted, ["q_proj"], progress=False)
    with pytest.raises(TypeError, match="SVF layer already; call t2kernels.revert"):
        peft.get_peft_model(converted, svf.SVFConfig(target_modules=["q_proj"]))
    broken = kit.base()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 'model.layers.1.mlp.up_proj'.*NaN"):
        peft.get_peft_model(broken, svf.SVFConfig())
    assert not svf.tuner_layers(broken), "nothing stays behind"


def test_an_adapter_of_another_method(kit):
    lora = peft.get_peft_model(kit.base(), peft.LoraConfig(target_modules=["q_proj"]))
    with (
        pytest.warns(UserWarning, match="Already found"),
        pytest.raises(TypeError, match="adapter of another method; call merge_and_unload"),
    ):
        svf.SVFModel(lora.base_model.model, {"a": svf.SVFConfig(target_modules=["q_proj"])}, "a")
    with pytest.raises(ValueError, match="peft types"):
        lora.add_adapter("b", svf.SVFConfig())
    # First merged, then decomposed: SVF upon a LoRA-tuned model.
    model = kit.model(lora.merge_and_unload())
    assert len(svf.tuner_layers(model)) == 14
