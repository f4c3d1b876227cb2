"""What a converted model keeps, saves, loads, copies and casts; merging; dropped weights; rank."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch.nn.utils import prune

import t2kernels as t2k


def _model(zoo, family="llama", dtype=torch.float32, **options):
    model = zoo.build(family, dtype)
    t2k.convert(model, progress=False, **options)
    return model


def _logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def inputs(zoo):
    return zoo.inputs("llama")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fifty_merges_leave_no_trace(zoo, name, dtype):
    base = zoo.build(name, dtype)
    inputs = zoo.inputs(name)
    model = copy.deepcopy(base)
    t2k.convert(model, progress=False)
    bank = zoo.bank(model, "math", "code")
    with torch.no_grad(), bank.use("math"):
        routed = model(**inputs).logits
    for i in range(50):
        bank.merge(("math", "code", {"math": 0.3, "code": 0.9})[i % 3])
        if i % 2:
            bank.unmerge()
    bank.merge("math")
    merged = _logits(model, inputs)
    assert zoo.close(merged.float(), routed.float(), 1e-4 if dtype == torch.float32 else 5e-2)
    assert not torch.equal(merged, _logits(base, inputs))
    bank.unmerge()
    assert torch.equal(_logits(model, inputs), _logits(base, inputs))
    for key, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    bank.merge("code")
    t2k.revert(model)  # takes the merged expert out first
    for key, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_copy_is_independent(zoo, inputs):
    model = _model(zoo)
    bank = zoo.bank(model, "math")
    with bank.use("math"):
        twin = copy.deepcopy(model)  # even from inside `use`
    base = _logits(model, inputs)
    assert torch.equal(_logits(twin, inputs), base)
    twin_bank = zoo.bank(twin, "math")
    with bank.use("math"):
        assert torch.equal(_logits(twin, inputs), base), "the copy follows its original's routing"
        with twin_bank.use("math"):
            assert zoo.close(_logits(twin, inputs), _logits(model, inputs))
    zoo.expert(twin, 5).apply_to(twin)
    assert torch.equal(_logits(model, inputs), base)
    twin_bank.merge("math")
    assert torch.equal(_logits(model, inputs), base)
    t2k.revert(twin)
    assert torch.equal(_logits(twin, inputs), base)
    assert t2k.svf_layers(model)


def test_a_model_can_be_sent_to_another_process(zoo, inputs):
    model = _model(zoo)
    bank = zoo.bank(model, "math")
    with bank.use("math"):
        expected = _logits(model, inputs)
        sent = pickle.loads(pickle.dumps(model))
    assert torch.equal(_logits(sent, inputs), _logits(model, inputs))
    with zoo.bank(sent, "math").use("math"):
        assert zoo.close(_logits(sent, inputs), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_save_pretrained_and_back(zoo, name, tmp_path):
    base = zoo.build(name)
    inputs = zoo.inputs(name)
    model = copy.deepcopy(base)
    t2k.convert(model, progress=False)
    zoo.expert(model, 3).apply_to(model)
    own = _logits(model, inputs)
    model.save_pretrained(tmp_path)

    # Knows nothing of z.
    fresh = type(base).from_pretrained(tmp_path, attn_implementation="eager").eval()
    for key, value in base.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    assert torch.equal(_logits(fresh, inputs), _logits(base, inputs))

    from safetensors.torch import load_file

    t2k.convert(fresh, progress=False)
    missing, unexpected = fresh.load_state_dict(
        load_file(tmp_path / "model.safetensors"), strict=False
    )
    assert not unexpected
    assert all(key == "lm_head.weight" for key in missing)  # tied: saved once
    assert zoo.close(_logits(fresh, inputs), own)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casts_leave_z_and_sigma_alone(zoo, inputs, cast):
    model = _model(zoo)
    z = t2k.trainable(model)
    zoo.expert(model, 3, 0.1).apply_to(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    layers = t2k.svf_layers(model).values()
    before = [(m.z.clone(), m.z.grad.clone(), m.factors.S.clone()) for m in layers]
    getattr(model, cast)()
    dtype = getattr(torch, cast)
    assert model.lm_head.weight.dtype == dtype
    for layer, old in zip(layers, before):
        assert layer.weight.dtype == layer.factors.U.dtype == dtype
        for new, kept in zip((layer.z, layer.z.grad, layer.factors.S), old):
            assert new.dtype == torch.float32
            assert torch.equal(new, kept)
    assert all(a is b.z for a, b in zip(z, layers)), "the optimiser would hold other parameters"
    out = model(**inputs, labels=inputs["input_ids"])
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in z)


def test_there_and_back_keeps_the_base_exact(zoo, inputs):
    base = zoo.build("llama").bfloat16().float()
    model = _model(zoo).bfloat16().float()
    assert torch.equal(_logits(model, inputs), _logits(base, inputs))
    assert {m.z.dtype for m in t2k.svf_layers(model).values()} == {torch.float32}
    with zoo.bank(model, "math").use("math"):  # the factors have been rounded to bf16 too
        rounded = _logits(model, inputs)
    exact = _model(zoo)
    with zoo.bank(exact, "math").use("math"):
        assert zoo.close(rounded, _logits(exact, inputs), 5e-2)


def test_one_checkpoint_in_two_dtypes_has_one_fingerprint(zoo):
    wide, narrow = _model(zoo), _model(zoo, dtype=torch.bfloat16)
    expert = zoo.expert(wide, 0)
    t2k.ExpertBank(narrow).add("math", expert)
    for a, b in zip(t2k.svf_layers(wide).values(), t2k.svf_layers(narrow).values()):
        assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropped_weights(zoo, name, dtype):
    base = zoo.build(name, dtype)
    inputs = zoo.inputs(name)
    model = copy.deepcopy(base)
    t2k.convert(model, progress=False, keep_weight=False)
    held = sum(p.numel() for p in model.parameters())
    assert held < sum(p.numel() for p in base.parameters())
    tolerance = 2e-5 if dtype == torch.float32 else 6e-2
    assert zoo.close(_logits(model, inputs), _logits(base, inputs), tolerance)

    keys = set(base.state_dict()) | {f"{n}.z" for n in t2k.svf_layers(model)}
    assert set(model.state_dict()) == keys
    assert model.load_state_dict(model.state_dict()).missing_keys == []
    model.load_state_dict(base.state_dict(), strict=False)  # the base it was made from
    bank = zoo.bank(model, "math")
    with bank.use("math"):
        routed = _logits(model, inputs)
    bank.merge("math")
    assert zoo.close(_logits(model, inputs).float(), routed.float(), 2.5 * tolerance)
    bank.unmerge()
    assert all(m.weight is None for m in t2k.svf_layers(model).values())
    with pytest.raises(ValueError, match=r"base_rows='stored' needs convert\(keep_weight=True\)"):
        bank.use("math", base_rows="stored").__enter__()
    t2k.revert(model)
    assert zoo.close(_logits(model, inputs), _logits(base, inputs), tolerance)


@pytest.mark.parametrize("targets", ["all-linear", ["attn.c_proj"]], ids=["all", "square"])
@pytest.mark.parametrize("copied", [False, True], ids=["", "deepcopy"])
def test_dropped_weights_come_back_as_the_layers_they_were(zoo, tmp_path, targets, copied):
    """GPT-2's Conv1D stores (in, out): a square weight the wrong way round loads without error."""
    base = zoo.build("gpt2")
    inputs = zoo.inputs("gpt2")
    model = copy.deepcopy(base)
    model.transformer.h[0].attn.c_proj.weight.requires_grad_(False)
    calls = []
    handle = model.transformer.h[0].attn.c_proj.register_forward_hook(lambda *_: calls.append(1))
    t2k.convert(model, targets, keep_weight=False, progress=False)
    held = sum(p.numel() for p in model.parameters())
    assert held < sum(p.numel() for p in base.parameters())  # nothing else holds the weights
    if copied:
        model = copy.deepcopy(model)
    t2k.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert not model.transformer.h[0].attn.c_proj.weight.requires_grad
    assert model.transformer.h[1].attn.c_proj.weight.requires_grad
    assert zoo.close(_logits(model, inputs), _logits(base, inputs))
    if not copied:
        assert calls == [1]
        handle.remove()
        _logits(model, inputs)
        assert calls == [1]
    model.save_pretrained(tmp_path)
    fresh = type(base).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(_logits(fresh, inputs), _logits(model, inputs))


def test_dropping_the_weight_needs_the_full_rank(zoo):
    model = zoo.build("llama")
    with pytest.raises(ValueError, match="keep_weight=False needs the full rank"):
        t2k.convert(model, rank=4, keep_weight=False)
    assert not t2k.svf_layers(model)


@pytest.mark.parametrize("kind", t2k.FACTOR_KINDS)
def test_eight_bit_factors_without_a_weight_follow_a_cast(zoo, inputs, kind):
    model = _model(zoo, factors=kind, keep_weight=False)
    layers = t2k.svf_layers(model).values()
    before = [layer.factors for layer in layers]
    exact = _logits(model, inputs)
    for dtype in (torch.bfloat16, torch.float32):
        model = model.to("cpu", dtype)
        assert _logits(model, inputs).dtype == dtype
    for layer, f in zip(layers, before, strict=True):
        assert layer.factors.kind == kind and layer.factors.dtype == torch.float32
        for name in ("U", "S", "V", "u_scale", "v_scale"):
            assert getattr(layer.factors, name) is getattr(f, name) or torch.equal(
                getattr(layer.factors, name).double(), getattr(f, name).double()
            )
    # Norms and embeddings went through bf16.
    torch.testing.assert_close(_logits(model, inputs), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_leading_components_ride_on_the_stored_weight(zoo, name):
    base = zoo.build(name)
    inputs = zoo.inputs(name)
    model = copy.deepcopy(base)
    report = t2k.convert(model, rank=5, progress=False)
    assert {c.rank for c in report.converted} == {5}
    assert torch.equal(_logits(model, inputs), _logits(base, inputs))
    bank = zoo.bank(model, "math", "code")
    with bank.use("math"):
        actual = _logits(model, inputs)
    zoo.assert_like_rebuilt(actual, base, model, bank["math"].z, lambda m: m(**inputs).logits)
    with bank.use(["math", None, "code"]):
        mixed = _logits(model, inputs)
    assert zoo.close(mixed[0], actual[0])
    assert zoo.close(mixed[1], _logits(base, inputs)[1])

    # The same expert on a full-rank conversion: the other components stay 1.
    full = copy.deepcopy(base)
    t2k.convert(full, progress=False)
    full_bank = t2k.ExpertBank(full)
    full_bank.add("math", bank["math"])
    with full_bank.use("math"):
        assert zoo.close(_logits(full, inputs), actual, 1e-4)


def test_conversion_inside_inference_mode(zoo, inputs):
    model = zoo.build("llama")
    with torch.inference_mode():
        t2k.convert(model, progress=False)
        bank = zoo.bank(model, "math")
        with bank.use("math"):
            inside = model(**inputs).logits.clone()
    with bank.use("math"):
        assert torch.equal(_logits(model, inputs), inside)
    alpha = torch.ones(3, 1, requires_grad=True)
    with bank.use(alpha):
        model(**inputs).logits.sum().backward()
    assert alpha.grad.abs().sum() > 0
    z = t2k.trainable(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.Adam(z).step()
    assert not torch.equal(z[0], torch.ones_like(z[0]))


def test_another_thread_cannot_route_the_same_model(zoo, inputs):
    model = _model(zoo)
    bank, said = zoo.bank(model, "math"), []

    def other():
        try:
            with bank.use(None):
                said.append("entered")
        except RuntimeError as error:
            said.append(str(error))

    with bank.use("math"):
        before = _logits(model, inputs)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.equal(_logits(model, inputs), before)
    assert "another thread" in said[0]
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert said[1] == "entered"


def test_autocast(zoo, inputs):
    base = zoo.build("llama")
    model = _model(zoo)
    bank = zoo.bank(model, "math", "code")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_logits(model, inputs), _logits(base, inputs))
        with bank.use(["math", None, "code"]):
            low = _logits(model, inputs)
    assert low.dtype == torch.bfloat16
    with bank.use(["math", None, "code"]):
        assert zoo.close(low.float(), _logits(model, inputs), 8e-2)


def test_hooks_on_a_layer_survive(zoo, inputs):
    model = zoo.build("llama")
    seen = []
    target = model.model.layers[0].mlp.up_proj
    handle = target.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    t2k.convert(model, progress=False)
    _logits(model, inputs)
    handle.remove()
    _logits(model, inputs)
    assert seen == ["SVFLinear"]
    later = model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda m, args, out: seen.append(type(m).__name__)
    )
    t2k.revert(model)
    _logits(model, inputs)
    later.remove()
    assert seen == ["SVFLinear", "Linear"]


def test_layers_that_cannot_be_replaced_are_reported(zoo):
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    torch.nn.utils.parametrizations.weight_norm(model[1])
    prune.l1_unstructured(model[2], "weight", 0.5)
    model[3].forward = lambda x: x
    report = t2k.convert(model, progress=False)
    assert [c.name for c in report.converted] == ["0"]
    assert "computed" in report.skipped["1"]
    assert "computed" in report.skipped["2"]
    assert "replaced" in report.skipped["3"]


def test_a_lora_adapter_stays_as_it_is(zoo, inputs):
    peft = pytest.importorskip("peft")
    model = zoo.build("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    before = _logits(model, inputs)
    report = t2k.convert(model, progress=False)
    assert not any("lora_" in c.name for c in report.converted)
    assert any(c.name.endswith("q_proj.base_layer") for c in report.converted)
    assert torch.equal(_logits(model, inputs), before)
    bank = zoo.bank(model, "math")
    with bank.use("math"):
        assert not zoo.close(_logits(model, inputs), before, 1e-2)
