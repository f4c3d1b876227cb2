"""PEFT adapters and t2kernels.Expert: both ways, and mixtures by both roads."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import t2kernels as t2k
import t2runtime.peft as svf


@pytest.mark.parametrize("settings", [{}, {"rank": 5}, {"parametrisation": "sigmoid-normalised"}],
                         ids=str)  # fmt: skip
def test_an_adapter_is_an_expert(kit, base, settings, tmp_path):
    plain = copy.deepcopy(base)
    model = kit.model(base, **settings)
    expert = svf.to_expert(model, description="sums", metadata={"task": "addition"})
    expert.save(tmp_path / "e.safetensors")
    expert = t2k.Expert.load(tmp_path / "e.safetensors")
    assert expert.description == "sums" and len(expert.z) == 14
    converted = copy.deepcopy(plain)
    t2k.convert(converted, progress=False, rank=settings.get("rank"))
    bank = t2k.ExpertBank(converted)
    bank.add("sums", expert)
    with bank.use("sums"):
        assert kit.close(kit.logits(converted), kit.logits(model), 1e-5)
    again = svf.from_expert(copy.deepcopy(plain), expert, task_type="CAUSAL_LM").eval()
    assert again.peft_config["default"].rank == settings.get("rank")
    assert kit.close(kit.logits(again), kit.logits(model), 1e-5)


def test_an_expert_beside_other_adapters(kit, base):
    expert = svf.to_expert(kit.model(copy.deepcopy(base), "a", target_modules=["up_proj"]), "a")
    model = kit.model(base, "mine")
    same = svf.from_expert(model, expert, "theirs")
    assert same is model and set(model.peft_config) == {"mine", "theirs"}
    assert len([n for n, m in svf.tuner_layers(model).items() if "theirs" in m.svf_z]) == 2
    for name, z in svf.to_expert(model, "theirs").z.items():
        assert torch.equal(z, expert.z[name])


def test_experts_of_other_models(kit, base):
    expert = svf.to_expert(kit.model(kit.base(seed=1)))
    with pytest.raises(ValueError, match="trained on another base model"):
        svf.from_expert(base, expert)
    assert not svf.tuner_layers(base)
    assert svf.tuner_layers(svf.from_expert(base, expert, allow_mismatch=True))
    with pytest.raises(ValueError, match="'model.layers.1.*lacks"):
        svf.from_expert(kit.base(num_hidden_layers=1), expert)
    with pytest.raises(ValueError, match="32 values for layer .* has 16 singular values"):
        svf.from_expert(kit.base(hidden_size=16), expert, allow_mismatch=True)
    with pytest.raises(ValueError, match="no SVF adapter named 'other'"):
        svf.to_expert(kit.model(kit.base()), "other")
    whole = kit.model(kit.base(), modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save"):
        svf.to_expert(whole)


@pytest.mark.parametrize("form", ["deviation", "paper", "paper-normalised", "authors"])
def test_weighted_adapters_are_our_mixtures(kit, base, form):
    twin = copy.deepcopy(base)
    model = kit.model(base, "math", "code")
    experts = {name: svf.to_expert(model, name) for name in ("math", "code")}
    model.add_weighted_adapter(["math", "code"], [0.7, 0.2], "both", combination_type=form)
    assert model.active_adapter == "math", "not active by itself"
    model.set_adapter("both")
    t2k.convert(twin, progress=False)
    bank = t2k.ExpertBank(twin)
    for name, expert in experts.items():
        bank.add(name, expert)
    with bank.use({"math": 0.7, "code": 0.2}, mixture=form):
        assert kit.close(kit.logits(model), kit.logits(twin), 1e-5)


def test_weighted_adapters_over_unequal_ones(kit, base, tmp_path):
    reference = copy.deepcopy(base)
    model = kit.model(base, "math", rank=4, target_modules=["up_proj", "q_proj"])
    other = svf.SVFConfig(target_modules=["up_proj"], parametrisation="sigmoid-normalised")
    model.add_adapter("code", other)
    kit.move(model, "code", 3)
    model.add_weighted_adapter(["math", "code"], [0.5, -0.25], "both", "linear")
    model.set_adapter("both")
    dense = copy.deepcopy(reference)
    with torch.no_grad():
        for name, layer in svf.tuner_layers(model).items():
            for adapter, weight in (("math", 0.5), ("code", -0.25)):
                if adapter in layer.svf_z:
                    change = layer.get_delta_weight(adapter)
                    dense.get_submodule(name).weight.add_(weight * change)
    assert kit.close(kit.logits(model), kit.logits(dense))
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "both")
    assert torch.equal(kit.logits(again.eval()), kit.logits(model))


def test_bad_mixtures(kit, base):
    model = kit.model(base, "math", "code")
    add = model.add_weighted_adapter
    for arguments, message in (
        ((["math"], [1.0], "code"), "already"),
        ((["math", "other"], [1.0, 1.0], "new"), "no adapter named 'other'"),
        ((["math", "code"], [1.0], "new"), "2 adapters and 1 weights"),
        (([], [], "new"), "at least one"),
        ((["math"], [1.0], "new", "svd"), "combination_type must be one of"),
        ((["math", "code"], [1.0, -1.0], "new", "paper-normalised"), "divides by Σα"),
        ((["math", "math"], [1.0, -1.0], "new", "authors"), "which is 0"),
        ((["math", "code"], [1.0, float("nan")], "new"), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            add(*arguments)
    assert set(model.peft_config) == {"math", "code"}
    assert all("new" not in layer.svf_z for layer in svf.tuner_layers(model).values())
    model.add_adapter("whole", svf.SVFConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        add(["whole"], [1.0], "new")


def test_peft_turns_an_adapter_into_lora(kit, base):
    reference = copy.deepcopy(base)
    model = kit.model(base, target_modules=["up_proj", "down_proj"])
    config, state = peft.convert_to_lora(model, rank=32)
    lora = peft.get_peft_model(copy.deepcopy(reference), config).eval()
    peft.set_peft_model_state_dict(lora, state)
    assert kit.close(kit.logits(lora), kit.logits(model), 1e-3)
