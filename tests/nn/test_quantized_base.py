"""The delta form on quantised layers: torchao's and bitsandbytes' where they are installed, and a
stand-in of the same make that is always there."""

import copy
import importlib.util
import logging
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import t2kernels as t2k
from t2kernels.nn.quantized_base import QuantizedBaseLinear
from t2kernels.nn.quantized_layers import dequantized, quantized_kind


class Linear8bitLt(nn.Linear):
    """A stand-in for the class of that name: int8 weight, SCB, a forward of its own."""

    __module__ = "bitsandbytes.stand_in"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        SCB = linear.weight.detach().abs().amax(1)
        rounded = (linear.weight.detach() / SCB[:, None] * 127).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("SCB", SCB)
        self.weight.SCB = SCB

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        W = self.weight.to(x.dtype) * (self.SCB / 127)[:, None].to(x.dtype)
        return nn.functional.linear(x, W, self.bias)

    def __deepcopy__(self, memo):  # nn.Parameter's own deepcopy drops attributes
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        new.weight.SCB = new.SCB
        return new


def stand_in(model: nn.Module) -> nn.Module:
    for i, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            model[i] = Linear8bitLt(layer)
    return model


def torchao(config: str):
    def make(model: nn.Module) -> nn.Module:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return make


def bitsandbytes(kind: str):
    def make(model: nn.Module) -> nn.Module:
        import bitsandbytes as bnb

        for i, old in enumerate(model):
            if isinstance(old, nn.Linear):
                size = (old.in_features, old.out_features)
                options = {"Linear4bit": {"compute_dtype": torch.float32, "quant_type": "nf4"}}
                options["Linear8bitLt"] = {"has_fp16_weights": False}
                new = getattr(bnb.nn, kind)(*size, old.bias is not None, **options[kind])
                new.load_state_dict(old.state_dict())
                model[i] = new.to("cpu")
        return model

    return make


def needs(module: str):
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed (extra 'quantized')")


KINDS = [
    pytest.param(stand_in, id="stand-in"),
    *(
        pytest.param(torchao(c), marks=needs("torchao"), id=c)
        for c in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig")
    ),
    *(
        pytest.param(bitsandbytes(c), marks=needs("bitsandbytes"), id=c)
        for c in ("Linear8bitLt", "Linear4bit")
    ),
]


@pytest.fixture(scope="module", autouse=True)
def quiet_imports():
    """Both libraries deprecate their own imports and log what they cannot load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        for name in ("torchao.quantization", "bitsandbytes"):
            if importlib.util.find_spec(name.split(".")[0]) is not None:
                importlib.import_module(name)
        logging.disable(logging.NOTSET)
        yield


def model_of(make) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64, bias=False), nn.Linear(64, 64)]
    return make(nn.Sequential(*layers)).eval()


def expert(seed: int, k: int = 8) -> t2k.Expert:
    gen = torch.Generator().manual_seed(seed)
    return t2k.Expert({n: 0.5 + torch.rand(k, generator=gen) for n in ("0", "2", "3")})


def converted(make, rank=8, **options):
    base = model_of(make)
    model = copy.deepcopy(base)
    t2k.convert(model, rank=rank, progress=False, **options)
    bank = t2k.ExpertBank(model)
    if rank == 8:
        bank.add("a", expert(1))
        bank.add("b", expert(2))
    return base, model, bank


def x_of(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 3, 64, generator=torch.Generator().manual_seed(3))


def by_hand(base: nn.Module, model: nn.Module, z: dict, x: torch.Tensor) -> torch.Tensor:
    for name, layer in base.named_children():
        y = layer(x)
        if isinstance(layer, nn.Linear):
            f = model.get_submodule(name).factors
            f = t2k.dequantize(f) if isinstance(f, t2k.QuantizedFactors) else f
            U, S, V = (t.float() for t in f)
            y = y + (((x.float() @ V) * (S * (z[name] - 1))) @ U.t()).to(y.dtype)
        x = y
    return x


@pytest.mark.parametrize("make", KINDS)
def test_without_an_expert_it_is_the_base_to_the_bit(make):
    base, model, bank = converted(make)
    x = x_of()
    with torch.no_grad():
        expected = base(x)
        assert torch.equal(model(x), expected)
        with bank.use(None):
            assert torch.equal(model(x), expected)
        with bank.use(["a", None, "b", None, "a"]):
            mixed = model(x)
        assert torch.equal(mixed[[1, 3]], base(x)[[1, 3]])
        assert not torch.equal(mixed[0], expected[0])
    assert isinstance(model[0], t2k.SVFLinear) and quantized_kind(base[0]) in repr(model[0])


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("factors", [None, "int8"])
def test_every_request_has_its_own_mixture(make, factors):
    base, model, bank = converted(make, factors=factors)
    x = x_of()
    requests = ["a", {"a": 0.5, "b": 0.25}, None, "b", {"b": -0.5}]
    with torch.no_grad(), bank.use(requests):
        y = model(x)
    for i, weights in enumerate(({"a": 1.0}, {"a": 0.5, "b": 0.25}, {}, {"b": 1.0}, {"b": -0.5})):
        z = {n: 1 + sum(w * (bank[e].z[n] - 1) for e, w in weights.items()) for n in bank.layers}
        with torch.no_grad():
            expected = by_hand(base, model, {n: torch.as_tensor(v) for n, v in z.items()}, x)[i]
        # The 8-bit kernel of bitsandbytes rounds activations by the row's largest.
        torch.testing.assert_close(y[i], expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("make", KINDS)
def test_factors_are_those_of_the_weight_that_is_stood_for(make):
    base, model, _ = converted(make, rank=64)
    for name in ("0", "2", "3"):
        W, layer = dequantized(base[int(name)]).float(), model[int(name)]
        exact = torch.linalg.svdvals(W)
        torch.testing.assert_close(layer.factors.S, exact, rtol=1e-4, atol=1e-5)
        assert layer.fingerprint == t2k.fingerprint(dequantized(base[int(name)]))
        # What the layer stands for is what it computes, but for its activations' rounding.
        eye = torch.eye(W.shape[1])
        with torch.no_grad():
            y = base[int(name)](eye)
        bias = base[int(name)].bias
        y = y if bias is None else y - bias.detach()
        assert (y.float().t() - W).norm() <= 0.01 * W.norm()
    # All components ride: z = 0 takes the weight away.
    with torch.no_grad():
        layer = model[3]
        layer.z.zero_()
        y = layer(x_of())
        rest = (y - layer.bias).norm()
        assert rest <= 0.03 * (base[3](x_of()) - base[3].bias).norm()


@pytest.mark.parametrize("make", KINDS)
def test_gradients_reach_z_and_x(make):
    base, model, _ = converted(make)
    parameters = t2k.trainable(model)
    x = x_of().requires_grad_()
    loss = model(x).square().sum()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in parameters)
    z = {n: torch.ones(8, requires_grad=True) for n in ("0", "2", "3")}
    x2 = x_of().requires_grad_()
    by_hand(base, model, z, x2).square().sum().backward()
    for name, p in zip(z, parameters):
        torch.testing.assert_close(p.grad, z[name].grad, rtol=0.1, atol=0.05 * p.grad.abs().max())
    assert (x.grad - x2.grad).norm() <= 0.05 * x2.grad.norm()
    optimiser = torch.optim.Adam(parameters, 0.05)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = model(x_of()).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("make", KINDS)
def test_state_dict_save_load_copy_and_revert(make, tmp_path):
    base, model, bank = converted(make)
    x = x_of()
    keys = set(base.state_dict())
    assert set(model.state_dict()) == keys | {f"{n}.z" for n in ("0", "2", "3")}
    four = "Linear4bit" in (quantized_kind(base[0]) or "")

    def same(a, b):
        """To the bit; bitsandbytes rounds 4-bit scales anew when it saves them on a CPU."""
        return torch.allclose(a, b, atol=2e-2) if four else torch.equal(a, b)

    with torch.no_grad():
        model[3].z.mul_(1.25)
        own = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), own)
        fresh = copy.deepcopy(base)
        t2k.convert(fresh, rank=8, progress=False)
        fresh.load_state_dict(model.state_dict())
        assert same(fresh(x), own)
        with bank.use(["b"]):
            under = model(x)
    bank.save(tmp_path)
    again = t2k.ExpertBank(fresh)
    assert again.load(tmp_path) == ["a", "b"]
    with torch.no_grad(), again.use(["b"]):
        assert same(fresh(x), under)
    t2k.Expert.from_model(model).save(tmp_path / "own.safetensors")
    t2k.revert(model)
    assert set(model.state_dict()) == keys
    assert [type(m) for m in model] == [type(m) for m in base]
    with torch.no_grad():
        assert same(model(x), base(x))


@pytest.mark.parametrize("make", KINDS)
def test_what_is_refused(make):
    base, model, bank = converted(make)
    with pytest.raises(RuntimeError, match="merge: the weight is quantised.*t2 export"):
        bank.merge("a")
    with pytest.raises(ValueError, match="3 layers are quantised.*Pass rank=k"):
        t2k.convert(copy.deepcopy(base), progress=False)
    with pytest.raises(ValueError, match="keep_weight"):
        t2k.convert(copy.deepcopy(base), rank=8, keep_weight=False, progress=False)
    alone = pytest.raises(RuntimeError, match="batch_invariant: .* kernel of its own")
    with alone, torch.no_grad(), t2k.batch_invariant():
        model(x_of())
    torch.manual_seed(7)
    layers = [nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64, bias=False), nn.Linear(64, 64)]
    other = make(nn.Sequential(*layers))
    before = model.state_dict()
    with pytest.raises(RuntimeError, match="not the quantised weight that the factors belong to"):
        model.load_state_dict(other.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(model(x_of()), base(x_of()))
    with pytest.raises(RuntimeError, match="Missing key.*0.weight"):
        model.load_state_dict({k: v for k, v in before.items() if k != "0.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key.*0.more"):
        model.load_state_dict({**before, "0.more": torch.ones(1)})
    with pytest.raises(ValueError, match="x must have shape"), torch.no_grad(), bank.use("a"):
        model(torch.randn(2, 3, 63))


@pytest.mark.parametrize("make", KINDS)
def test_a_store_of_the_original_carries_its_experts(make, tmp_path):
    """Names decide, and experts of the original fit without allow_mismatch."""
    original = model_of(lambda model: model)
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    store = t2k.decompose_checkpoint(
        tmp_path / "model.safetensors", tmp_path / "factors", targets=["0", "2", "3"], device="cpu"
    )
    plain = copy.deepcopy(original)
    t2k.convert(plain, rank=8, decomposition=store, progress=False)
    with torch.no_grad():
        for layer in t2k.svf_layers(plain).values():
            layer.z.copy_(torch.rand(8, generator=torch.Generator().manual_seed(4)) + 0.5)
    trained = t2k.Expert.from_model(plain)
    model = model_of(make)
    t2k.convert(model, rank=8, decomposition=store, progress=False)
    for name in ("0", "2", "3"):
        assert torch.equal(model[int(name)].factors.S, plain[int(name)].factors.S)
    bank = t2k.ExpertBank(model)
    bank.add("own", trained)  # raises where fingerprints differ
    with torch.no_grad(), bank.use("own"):
        far = (model(x_of()) - plain(x_of())).norm() / plain(x_of()).norm()
    assert far <= 0.2  # 4 bits; 1 to 3 % for 8

    other = {"0": t2k.decompose(torch.randn(128, 64), rank=8)}
    with pytest.raises(ValueError, match="layer '0': .*not made from this weight"):
        t2k.convert(model_of(make), ["0"], rank=8, decomposition=other, progress=False)


def test_a_failed_conversion_leaves_the_layers_alone(monkeypatch):
    base = model_of(stand_in)
    made = QuantizedBaseLinear.from_linear.__func__

    def fails(cls, linear, **options):
        if linear is base[3]:
            raise ValueError("no")
        return made(cls, linear, **options)

    monkeypatch.setattr(QuantizedBaseLinear, "from_linear", classmethod(fails))
    keys = set(base.state_dict())
    with pytest.raises(ValueError, match="layer '3': no"):
        t2k.convert(base, rank=8, progress=False)
    assert set(base.state_dict()) == keys and not t2k.svf_layers(base)


@needs("bitsandbytes")
def test_four_bits_rearranged_for_the_cpu_are_refused():
    base = model_of(bitsandbytes("Linear4bit"))
    with torch.no_grad():
        base(x_of())
    if not getattr(base[0].weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no such kernel")
    with pytest.raises(ValueError, match="layer '0': .*before it is first called"):
        t2k.convert(base, rank=8, progress=False)


def test_a_base_without_a_gradient_is_an_error(monkeypatch):
    model = model_of(stand_in)
    t2k.convert(model, rank=8, progress=False)
    t2k.trainable(model)
    plain = Linear8bitLt.forward
    monkeypatch.setattr(Linear8bitLt, "forward", lambda self, x: plain(self, x).detach())
    model[0](x_of())  # x wants none
    with pytest.raises(RuntimeError, match="gives no gradient to its input"):
        model(x_of())
    with torch.no_grad():
        model(x_of())


def test_hooks_and_explain():
    base = model_of(stand_in)
    seen = []
    base[0].register_forward_hook(lambda *a: seen.append("hook"))
    t2k.convert(base, rank=8, progress=False)
    bank = t2k.ExpertBank(base)
    bank.add("a", expert(1))
    with torch.no_grad():
        base(x_of())
        with bank.use("a"):
            base(x_of())
            told = t2k.explain(base[0], x_of())
    assert seen == ["hook", "hook"]
    assert told.form == "delta" and "ride on the bitsandbytes Linear8bitLt" in told.why


def test_plain_layers_beside_quantised_ones():
    model = model_of(stand_in)
    model.append(nn.Linear(64, 16))
    report = t2k.convert(model, rank=8, progress=False)
    kinds = {c.name: type(model[int(c.name)]) for c in report.converted}
    assert kinds["4"] is t2k.SVFLinear and kinds["0"] is QuantizedBaseLinear
    assert quantized_kind(model[4]) is None
    with pytest.raises(TypeError, match=r"layer is quantised \(bitsandbytes.*rank=k"):
        t2k.SVFLinear.from_linear(model_of(stand_in)[0])
    with pytest.raises(ValueError, match="no known quantised layer"):
        dequantized(nn.Linear(2, 2))


def test_a_cast_leaves_z_and_the_quantised_weight():
    base, model, _ = converted(stand_in)
    model.double()
    layer = model[0]
    assert layer.z.dtype == torch.float32 and layer.weight.dtype == torch.int8
    assert layer.weight is layer.base_layer.weight and layer.factors.U.dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(model(x_of().double()), base.double()(x_of().double()))


@needs("torchao")
def test_the_example_of_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "quantised-bases.md").read_text()
    exec(text.split("```python")[1].split("```")[0], {})
