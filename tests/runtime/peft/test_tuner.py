"""What an SVF adapter computes, and PEFT's verbs on one model."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

import t2kernels as t2k
import t2runtime.peft as svf


def test_a_new_adapter_is_the_base_bit_for_bit(kit, base):
    expected = kit.logits(base)
    for settings in ({}, {"rank": 3}, {"parametrisation": "sigmoid-normalised"}):
        config = svf.SVFConfig(task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
        assert torch.equal(kit.logits(model), expected)
        # Where z is trained the factorised form runs, whose factors round.
        assert kit.close(model(**kit.inputs()).logits.detach(), expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"rank": 5}, {"parametrisation": "sigmoid-normalised"}, {"recompute": True},
     {"target_modules": ["q_proj", "mlp.up_proj"]}],
    ids=str,
)  # fmt: skip
def test_forward_is_that_of_the_rebuilt_weights(kit, base, settings):
    reference = copy.deepcopy(base)
    model = kit.model(base, **settings)
    dense = kit.rebuilt(reference, model)
    assert kit.close(kit.logits(model), kit.logits(dense))
    assert not kit.close(kit.logits(model), kit.logits(reference), 1e-2)


def test_conv1d(kit):
    reference = kit.gpt2()
    for rank in (None, 4):
        model = kit.model(copy.deepcopy(reference), rank=rank)
        assert any(layer.transposed for layer in svf.tuner_layers(model).values())
        dense = kit.rebuilt(reference, model)
        assert kit.close(kit.logits(model), kit.logits(dense))
        with model.disable_adapter():
            assert torch.equal(kit.logits(model), kit.logits(reference))
        assert kit.close(kit.logits(model.merge_and_unload(safe_merge=True)), kit.logits(dense))


@pytest.mark.parametrize("parametrisation", ["direct", "sigmoid-normalised"])
def test_gradients_are_those_of_t2kernels(kit, base, parametrisation):
    twin = copy.deepcopy(base)
    model = kit.model(base, parametrisation=parametrisation)
    t2k.convert(twin, progress=False, parametrisation=parametrisation)
    t2k.trainable(twin)
    layers = t2k.svf_layers(twin)
    with torch.no_grad():
        for name, layer in svf.tuner_layers(model).items():
            layers[name].z.copy_(layer.svf_z["default"].weight)
    ids = kit.inputs()
    model(**ids, labels=ids["input_ids"]).loss.backward()
    twin(**ids, labels=ids["input_ids"]).loss.backward()
    for name, layer in svf.tuner_layers(model).items():
        assert torch.equal(layer.svf_z["default"].weight.grad, layers[name].z.grad), name


def test_training_moves_z_alone(kit, base):
    model = kit.model(base.bfloat16())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    z = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in z} == {torch.float32}
    assert len(z) == len(svf.tuner_layers(model))
    optimiser = torch.optim.AdamW(z, 2e-3, weight_decay=0.0)
    ids = kit.inputs()
    losses = []
    for _ in range(4):
        loss = model(**ids, labels=ids["input_ids"]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != (".svf_z." in key), key


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(kit, base, use_reentrant):
    model = kit.model(base).train()
    ids = kit.inputs()

    def gradients():
        model.zero_grad()
        model(**ids, labels=ids["input_ids"]).loss.backward()
        return torch.cat([p.grad for p in model.parameters() if p.requires_grad])

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert torch.equal(gradients(), plain)
    assert plain.abs().min() > 0


def test_disabling_is_bit_exact_and_restores_training(kit, base):
    expected = kit.logits(base)
    model = kit.model(base)
    own = kit.logits(model)
    with model.disable_adapter():
        assert torch.equal(kit.logits(model), expected)
        assert torch.equal(model(**kit.inputs()).logits, expected)
    assert torch.equal(kit.logits(model), own)
    assert any(p.requires_grad for p in model.parameters())


def test_several_adapters(kit, base):
    reference = copy.deepcopy(base)
    model = kit.model(base, "math", "code")
    out = {}
    for name in ("math", "code"):
        model.set_adapter(name)
        out[name] = kit.logits(model)
        assert kit.close(out[name], kit.logits(kit.rebuilt(reference, model, name)))
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained and all(f".svf_z.{name}." in n for n in trained)
    assert not kit.close(out["math"], out["code"], 1e-2)
    # Both at once: their changes of the weights are added.
    model.base_model.set_adapter(["math", "code"])
    both = kit.rebuilt(kit.rebuilt(reference, model, "math"), model, "code")
    assert kit.close(kit.logits(model), kit.logits(both))
    model.set_adapter("math")
    model.delete_adapter("code")
    assert torch.equal(kit.logits(model), out["math"])
    with pytest.warns(UserWarning, match="no adapter|was active|deleted|None"):
        # PEFT says so when the last active adapter goes.
        model.add_adapter("third", svf.SVFConfig(target_modules=["q_proj"]))
        model.delete_adapter("math")
    assert list(model.peft_config) == ["third"]


def test_one_factorisation_for_adapters_of_different_rank(kit, base):
    reference = copy.deepcopy(base)
    model = kit.model(base, "few", rank=3)
    few = kit.logits(model)
    layer = next(iter(svf.tuner_layers(model).values()))
    assert layer.rank == 3
    model.add_adapter("all", svf.SVFConfig(target_modules="all-linear"))
    kit.move(model, "all", 5)
    assert layer.rank == layer.full and layer.svf_z["few"].weight.shape == (3,)
    assert kit.close(kit.logits(model), few)
    model.set_adapter("all")
    assert kit.close(kit.logits(model), kit.logits(kit.rebuilt(reference, model, "all")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [None, 4])
def test_merging_is_undone_to_the_bit(kit, base, dtype, rank):
    base = base.to(dtype)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    reference = copy.deepcopy(base)
    model = kit.model(base, "math", "code", rank=rank)
    own = kit.logits(model)
    for _ in range(2):
        model.merge_adapter()
        merged = kit.logits(model)
        assert kit.close(merged, own, 1e-4 if dtype == torch.float32 else 5e-2)
        rebuilt = kit.rebuilt(reference, model, "math")
        if dtype == torch.float32:
            assert kit.close(merged, kit.logits(rebuilt), 1e-6)
        for name, layer in svf.tuner_layers(model).items():
            # W + get_delta_weight() is multiplied in fp32, a merge where it pays in 16 bits.
            rounding = torch.finfo(dtype).eps / 2
            expected = rebuilt.get_submodule(name).weight
            assert kit.close(layer.base_layer.weight.double(), expected.double(), rounding)
        with pytest.warns(UserWarning, match="Already following adapters were merged"):
            model.merge_adapter(["code"])
        model.unmerge_adapter()
        after = model.get_base_model().state_dict()
        for key, value in weights.items():
            inside = key.replace(".weight", ".base_layer.weight")
            assert torch.equal(after[inside if inside in after else key], value)
    assert torch.equal(kit.logits(model), own)
    model.merge_adapter(["math"])
    with model.disable_adapter():  # unmerges
        assert torch.equal(kit.logits(model), kit.logits(reference))


def test_merge_and_unload_gives_the_plain_model(kit, base):
    kinds = [type(m) for m in base.modules()]
    reference = copy.deepcopy(base)
    model = kit.model(base)
    dense = kit.rebuilt(reference, model)
    merged = model.merge_and_unload(safe_merge=True)
    assert [type(m) for m in merged.modules()] == kinds
    for key, value in dense.state_dict().items():
        assert torch.equal(merged.state_dict()[key], value), key
    unloaded = kit.model(copy.deepcopy(reference)).unload()
    for key, value in reference.state_dict().items():
        assert torch.equal(unloaded.state_dict()[key], value), key


def test_safe_merge_refuses_a_broken_adapter(kit, base):
    reference = copy.deepcopy(base)
    model = kit.model(base)
    layer = next(iter(svf.tuner_layers(model).values()))
    with torch.no_grad():
        layer.svf_z["default"].weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(kit.logits(model), kit.logits(reference))


def test_parameters_are_counted(kit, base, capsys):
    model = kit.model(base, target_modules=["q_proj", "k_proj"])
    model.print_trainable_parameters()
    assert f"trainable params: {2 * (32 + 16):,d} ||" in capsys.readouterr().out
    names = dict(model.named_parameters()) | dict(model.named_buffers())
    held = {t.data_ptr() for t in names.values()}
    for layer in svf.tuner_layers(model).values():
        assert all(t.data_ptr() not in held for t in layer.factors)


def test_casts_keep_z_and_sigma_in_fp32(kit, base):
    reference = copy.deepcopy(base)
    model = kit.model(base)
    z = {n: p.clone() for n, p in model.named_parameters() if ".svf_z." in n}
    model.merge_adapter()
    model.bfloat16()
    model.unmerge_adapter()
    layer = next(iter(svf.tuner_layers(model).values()))
    assert layer.factors.U.dtype == torch.bfloat16 and layer.factors.S.dtype == torch.float32
    assert all(torch.equal(p, z[n]) for n, p in model.named_parameters() if n in z)
    assert kit.logits(model).dtype == torch.bfloat16
    with model.disable_adapter():
        assert torch.equal(kit.logits(model), kit.logits(reference.bfloat16()))


def test_z_is_fp32_whatever_peft_is_asked_for(base):
    config = svf.SVFConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(base.bfloat16(), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_double_precision_and_autocast(kit, base):
    reference = copy.deepcopy(base)
    model = kit.model(base.double(), precision="fp64")
    dense = kit.rebuilt(reference.double(), model)
    assert kit.close(kit.logits(model), kit.logits(dense), 1e-6)
    model = kit.model(kit.base())
    with torch.autocast("cpu", torch.bfloat16):
        low = kit.logits(model)
    assert low.dtype == torch.bfloat16 and kit.close(low.float(), kit.logits(model), 8e-2)


def test_modules_to_save(kit, base, tmp_path):
    model = kit.model(base, modules_to_save=["lm_head"], target_modules=["q_proj"])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head" in n for n in trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.1)
    own = kit.logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(kit.base(), tmp_path).eval()
    assert torch.equal(kit.logits(again), own)


def test_a_compiled_model_is_one_graph(kit, base):
    model = kit.model(base, target_modules=["q_proj", "up_proj"])
    eager = kit.logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    assert kit.close(kit.logits(compiled), eager)
    with model.disable_adapter():
        expected = kit.logits(model)
        assert kit.close(kit.logits(compiled), expected, 1e-6)
    torch._dynamo.reset()


def test_deepcopy(kit, base):
    expected = kit.logits(base)
    model = kit.model(base)
    twin = copy.deepcopy(model)
    kit.move(twin, seed=9)
    assert not torch.equal(kit.logits(twin), kit.logits(model))
    with twin.disable_adapter():
        assert torch.equal(kit.logits(twin), expected)
