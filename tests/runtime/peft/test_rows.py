"""adapter_names: one adapter per row of a batch, in forward and in generate."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import t2runtime.peft as svf

NAMES = ["math", "__base__", "code"]


@pytest.mark.parametrize("rank", [None, 4])
def test_every_row_is_that_of_its_own_adapter(kit, base, rank):
    reference = copy.deepcopy(base)
    model = kit.model(base, "math", "code", rank=rank)
    mixed = kit.logits(model, adapter_names=NAMES)
    assert torch.equal(mixed[1], kit.logits(reference)[1]), "the base's own bits"
    for row, name in ((0, "math"), (2, "code")):
        model.set_adapter(name)
        assert kit.close(mixed[row], kit.logits(model)[row], 1e-5)
    assert torch.equal(kit.logits(model, adapter_names=["__base__"] * 3), kit.logits(reference))
    own = kit.logits(model, adapter_names=["code"] * 3)
    assert torch.equal(own, kit.logits(model))
    # Nothing is left behind.
    assert torch.equal(kit.logits(model), own)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_adapters_on_different_layers(kit, base):
    model = kit.model(base, "math", target_modules=["q_proj"])
    model.add_adapter("code", svf.SVFConfig(target_modules=["up_proj", "q_proj"]))
    kit.move(model, "code", 3)
    mixed = kit.logits(model, adapter_names=NAMES)
    for row, name in ((0, "math"), (2, "code")):
        model.set_adapter(name)
        assert kit.close(mixed[row], kit.logits(model)[row], 1e-5)


def test_generate(kit, base):
    model = kit.model(base, "math", "code")
    ids = kit.inputs()
    options = {"max_new_tokens": 6, "do_sample": False}
    mixed = model.generate(**ids, adapter_names=NAMES, **options)
    for row, name in ((0, "math"), (2, "code")):
        model.set_adapter(name)
        alone = model.generate(**ids, **options)
        assert mixed[row].tolist()[: alone.shape[1]] == alone[row].tolist()
    with model.disable_adapter():
        alone = model.generate(**ids, **options)
    assert mixed[1].tolist()[: alone.shape[1]] == alone[1].tolist()


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_generate_with_repeated_rows(kit, base, more):
    model = kit.model(base, "math", "code")
    ids = kit.inputs()
    torch.manual_seed(0)
    out = model.generate(**ids, adapter_names=NAMES, max_new_tokens=3, **more)
    assert out.shape[0] == 3 * more.get("num_return_sequences", 1)


def test_rows_with_saved_modules(kit, base):
    model = kit.model(base, "math", modules_to_save=["lm_head"], target_modules=["q_proj"])
    own = kit.logits(model)
    mixed = kit.logits(model, adapter_names=["math", "__base__", "math"])
    assert kit.close(mixed[0], own[0], 1e-5)


def test_gradients_reach_each_adapter(kit, base):
    model = kit.model(base, "math", "code")
    for p in (p for n, p in model.named_parameters() if ".svf_z." in n):
        p.requires_grad_(True)
    model(**kit.inputs(), adapter_names=["math", "math", "code"]).logits.square().sum().backward()
    layer = next(iter(svf.tuner_layers(model).values()))
    assert all(layer.svf_z[name].weight.grad.abs().sum() > 0 for name in ("math", "code"))


def test_bad_names(kit, base):
    model = kit.model(base, "math")
    with pytest.raises(ValueError, match=r"no adapter 'maths'; there are \['math'\]"):
        kit.logits(model, adapter_names=["maths"] * 3)
    with pytest.raises(ValueError, match="2 entries, but a layer got an input .* 3 rows"):
        kit.logits(model, adapter_names=["math", "__base__"])
    with pytest.raises(TypeError, match="must be a list"):
        kit.logits(model, adapter_names="math")
    with pytest.raises(ValueError, match="training mode"):
        kit.logits(model.train(), adapter_names=["math"] * 3)
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        kit.logits(model, adapter_names=["math"] * 3)
    model.unmerge_adapter()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_takes_plain_names(kit):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = peft.get_peft_model(net, svf.SVFConfig(target_modules=["0"], init_weights=False))
    layer = svf.tuner_layers(model)["0"]
    x = torch.randn(2, 3, 4)
    y = layer(x, adapter_names=["default", "__base__"])
    assert kit.close(y[0], layer(x)[0], 1e-5)
    assert torch.equal(y[1], layer.base_layer(x)[1])
