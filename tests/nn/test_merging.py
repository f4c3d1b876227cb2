"""Merging into kept buffers: rounding, memory, and the base weights back whatever happens."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import t2kernels as t2k
from t2kernels import SVFLinear
from t2kernels.nn import linear, merging

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


class Conv1D(nn.Module):
    """What transformers' Conv1D is: a weight (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), None


def made(m=48, n=72, dtype=torch.float32, transposed=False, factors=None, **options) -> SVFLinear:
    torch.manual_seed(0)
    module = Conv1D(m, n) if transposed else nn.Linear(n, m, bias=False)
    module.to(dtype)
    w = module.weight.detach()
    f = t2k.decompose(w.t() if transposed else w, rank=options.get("rank"))
    given = f if factors is None else t2k.quantize(f, factors)
    layer = SVFLinear.from_linear(module, factors=given, **options)
    layer.z.requires_grad_(False)
    return layer


def out_in(layer: SVFLinear, weight: torch.Tensor) -> torch.Tensor:
    return (weight.t() if layer.transposed else weight).detach().double()


def truth_of(layer: SVFLinear, d: torch.Tensor) -> torch.Tensor:
    """W′ (out, in) in fp64 of the rounded W, U and V."""
    f = layer.factors
    if isinstance(f, t2k.QuantizedFactors):
        f = t2k.dequantize(f, torch.float64)
    U, S, V = (t.double() for t in f)
    if layer.weight is None:
        return (U * d.double()) @ V.t()
    return out_in(layer, layer.weight) + (U * (d.double() - S)) @ V.t()


def force_narrow(monkeypatch) -> None:
    """The 16-bit product that CUDA takes, wherever these tests run."""
    monkeypatch.setattr(merging, "_multiplies_fast", lambda target: True)


# What is done to z, by name; from hardly anything to far beyond what is trained.
STRENGTHS = {
    "0.1 %": lambda r: 1 + 0.001 * torch.randn(r),
    "5 %": lambda r: 1 + 0.05 * torch.randn(r),
    "half": lambda r: torch.rand(r) + 0.5,
    "0.45": lambda r: torch.full((r,), 0.45),
    "3": lambda r: torch.full((r,), 3.0),
    "0.02": lambda r: torch.full((r,), 0.02),
    "-1": lambda r: torch.full((r,), -1.0),
}


@pytest.mark.parametrize("narrow", [False, True], ids=["as here", "16-bit product"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"transposed": True}, {"m": 72, "n": 48, "keep_weight": False}, {"rank": 16},
     {"m": 80, "n": 40, "transposed": True, "rank": 24}, {"m": 80, "n": 40, "factors": "fp8"},
     {"factors": "int8"}, {"factors": "fp8", "keep_weight": False, "transposed": True}],
    ids=str,
)  # fmt: skip
def test_the_error_is_at_most_twice_that_of_rounding(monkeypatch, options, dtype, narrow):
    if narrow:
        force_narrow(monkeypatch)
    layer = made(dtype=dtype, **options)
    for name, strength in STRENGTHS.items():
        d = layer.factors.S * strength(layer.rank)
        truth = truth_of(layer, d)
        layer.merge_diagonal(d)
        error = (out_in(layer, layer.weight) - truth).norm()
        f = t2k.dequantize(layer.factors) if options.get("factors") else layer.factors
        if dtype == torch.float32:  # no sum of r products is exact to one rounding
            wide = layer.factors.S if options.get("keep_weight", True) else 0
            plain = (f.U * (d - wide)) @ f.V.t()
            plain += 0 if isinstance(wide, int) else out_in(layer, layer.stored_weight()).float()
        else:
            plain = truth.to(dtype)
        limit = 2 * (plain.double() - truth).norm()
        layer.unmerge()
        assert error <= limit, f"z {name}: {error:.2e}, limit {limit:.2e}"


def test_what_is_multiplied_follows_the_strength(monkeypatch):
    """Without the fp32 product, z of 0.02 errs 24 times as much as rounding: the rule is needed."""
    force_narrow(monkeypatch)
    layer = made(128, 128, torch.bfloat16)
    S = layer.factors.S
    errors = {}
    for rule in (merging._LARGEST_CHANGE, float("inf")):
        monkeypatch.setattr(merging, "_LARGEST_CHANGE", rule)
        truth = truth_of(layer, S * 0.02)
        layer.merge_diagonal(S * 0.02)
        plain = (truth.bfloat16().double() - truth).norm()
        errors[rule] = float((out_in(layer, layer.weight) - truth).norm() / plain)
        layer.unmerge()
    assert errors[1.5] < 1.1
    assert errors[float("inf")] > 10


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_fp16_stays_in_range(monkeypatch, scale):
    force_narrow(monkeypatch)
    for factors in (None, "int8", "fp8"):
        torch.manual_seed(0)
        weight = (torch.randn(40, 32) * scale).half()
        f = t2k.decompose(weight)
        layer = SVFLinear(weight, None, f if factors is None else t2k.quantize(f, factors))
        d = layer.factors.S * (torch.rand(32) + 0.5)
        truth = truth_of(layer, d)
        layer.merge_diagonal(d)
        error, plain = out_in(layer, layer.weight) - truth, truth.half().double() - truth
        assert error.norm() <= 2 * plain.norm()


@pytest.mark.parametrize("keep", ["device", "host"])
@pytest.mark.parametrize("options", [{}, {"transposed": True}, {"rank": 16}], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_addresses_stay_and_the_base_comes_back(dtype, options, keep):
    layer = made(dtype=dtype, **options)
    base, address = layer.weight.clone(), layer.weight.data_ptr()
    S, first = layer.factors.S, None
    for z in (1.3, 0.9, 1.0, 1.3):  # 1.0 in between: an expert that leaves this layer alone
        merging.merge([layer], [S * z], keep)
        assert layer.weight.data_ptr() == address
        assert layer.decide(torch.randn(1, 72))[0] == "merged"
        if z == 1.0:
            assert torch.equal(layer.weight, base)
        if z == 1.3:
            first = layer.weight.clone() if first is None else first
            assert torch.equal(layer.weight, first)  # from the base, whatever was merged before
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer.weight, base)
    assert layer.weight.data_ptr() == address
    assert layer._base_copy is None


def test_a_layer_that_the_expert_leaves_alone_is_not_copied():
    for options in ({}, {"keep_weight": False}):
        layer = made(**options)
        before = layer.weight
        layer.merge_diagonal(layer.factors.S.clone())
        assert layer._base_copy is None
        assert layer.weight is before
        layer.merge_diagonal(layer.factors.S * 2)
        layer.merge_diagonal(layer.factors.S.clone())
        layer.unmerge()
        assert (layer.weight is None) == (before is None)


def test_a_dropped_weight_stays_the_base_while_merged():
    layer = made(keep_weight=False)
    base = layer.stored_weight()
    layer.merge_diagonal(layer.factors.S * 2)
    torch.testing.assert_close(layer.weight.detach(), 2 * base)
    assert torch.equal(layer.stored_weight(), base)


@pytest.mark.parametrize("keep", ["device", "host"])
def test_a_cast_while_merged_is_a_cast_of_the_base(keep):
    layer = made(dtype=torch.float32)
    base = layer.weight.clone()
    merging.merge([layer], [layer.factors.S * 1.5], keep)
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.weight, base.bfloat16())


class Sizes(TorchDispatchMode):
    """Bytes of the largest storage that any operator makes."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "16-bit product"])
@pytest.mark.parametrize("shape", [(48, 400), (400, 48)], ids=["wide", "tall"])
def test_no_temporary_of_the_weights_size(monkeypatch, shape, factors, narrow):
    monkeypatch.setattr(merging, "_multiplies_fast", lambda target: narrow)
    monkeypatch.setattr(merging, "_NARROW_BLOCK", 40 * 48)
    monkeypatch.setattr(merging, "_WIDE_BLOCK", 20 * 48)
    layer = made(*shape, torch.bfloat16, factors=factors)
    d = layer.factors.S * 1.1
    truth = truth_of(layer, d)
    layer.merge_diagonal(layer.factors.S * 1.2)  # the copy of the base, once
    kept = {layer.weight.data_ptr(), layer._base_copy.data_ptr()}
    with Sizes([layer.weight, layer._base_copy, layer._U, layer._Vh]) as sizes:
        layer.merge_diagonal(d)
    assert 0 < sizes.largest <= 4 * 40 * 48 < layer.weight.numel() * 2 / 4
    assert {layer.weight.data_ptr(), layer._base_copy.data_ptr()} == kept
    plain = (truth.bfloat16().double() - truth).norm()
    assert (out_in(layer, layer.weight) - truth).norm() <= 2 * plain


def model_and_bank(**options):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    t2k.convert(model, progress=False, **options)
    bank = t2k.ExpertBank(model)
    for i, name in enumerate(("a", "b")):
        z = {n: torch.full((16,), 1.2 + i) for n in bank.layers}
        bank.add(name, t2k.Expert(z))
    return model, bank


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"keep_weight": False}], ids=str)
def test_a_merge_that_is_broken_off_leaves_the_base(monkeypatch, when, error, options):
    """From the base and from another expert, at each layer, and in the middle of one."""
    model, bank = model_and_bank(**options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    write, calls = merging._write, []

    def broken(target, *args):
        calls.append(target)
        if len(calls) == when:
            target[:8] = float("nan")
            raise error
        write(target, *args)

    for first in (None, "a"):
        bank.merge(first)
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(merging, "_write", broken)
            bank.merge("b")
        assert len(calls) == when
        after = model.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())
        with torch.no_grad(), bank.use("a"):  # nothing is merged
            model(torch.randn(1, 1, 16))


def test_where_the_copy_waits():
    model, bank = model_and_bank()
    base = [layer.weight.clone() for layer in model]
    for keep in ("host", "device", "host"):
        bank.merge("a", keep=keep)
        assert all(layer._base_copy.device.type == "cpu" for layer in model)
    bank.unmerge()
    assert all(torch.equal(layer.weight, w) for layer, w in zip(model, base))
    with pytest.raises(ValueError, match="keep must be one of .*device.*got 'disk'"):
        bank.merge("a", keep="disk")
    assert not any(layer._merged for layer in model)


def test_a_diagonal_of_another_rank_is_refused():
    layer = made()
    with pytest.raises(ValueError, match=r"d must have shape \(r,\) = \(48,\).*got \(47,\)"):
        layer.merge_diagonal(torch.ones(47))
    assert not layer._merged


def test_settings_of_the_library_are_put_back(monkeypatch):
    matmul = torch.backends.cuda.matmul
    seen = []
    write = merging._write
    monkeypatch.setattr(
        merging,
        "_write",
        lambda *a: (seen.append(getattr(matmul, name)), write(*a)),
    )
    name = "allow_bf16_reduced_precision_reduction"
    layer = made()
    two = hasattr(matmul, f"{name}_split_k")
    settings = [(True, True), (False, True), (False, False)] if two else [True, False]
    try:
        for before in settings:  # the last of a pair: whether a sum may be split at all
            setattr(matmul, name, before)
            layer.merge_diagonal(layer.factors.S * 2)
            after = getattr(matmul, name)
            assert before == ((after, getattr(matmul, f"{name}_split_k")) if two else after)
    finally:
        setattr(matmul, name, True)  # as torch starts
    assert seen and not any(seen)


def test_is_conv1d_knows_this_files_layer():
    assert linear.is_conv1d(Conv1D(3, 4))
