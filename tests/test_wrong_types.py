"""Arguments of a wrong kind: every error names the argument, what was expected and what came."""

import pytest
import torch
from torch import nn

import t2kernels as t2k

torch.manual_seed(0)
W, X = torch.randn(6, 4), torch.randn(3, 4)
F = t2k.decompose(W)
D = torch.stack([F.S, F.S])


def _fresh():
    return t2k.decompose(W)  # not seen before: no memory of it


@pytest.fixture(scope="module")
def bank():
    model = nn.Sequential(nn.Linear(4, 6))
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    bank.add("a", t2k.Expert({"0": torch.full((4,), 2.0)}))
    return bank


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: t2k.svf_linear(X, F, F.S, bias=[0.0] * 6),
            "svf_linear: bias must be a .*got list",
        ),
        (lambda: t2k.svf_linear(X, _fresh(), F.S, bias=[0.0]), "bias must be a .*got list"),
        (lambda: t2k.svf_linear(X, F, D, [0, 1, 0]), "slot must be a torch.Tensor, got list"),
        (lambda: t2k.svf_linear(X, F, F.S, [0]), "slot must be a torch.Tensor, got list"),
        (lambda: t2k.svf_linear(X, F._replace(U=[1.0]), F.S), "U must be a torch.Tensor, got list"),
        (
            lambda: t2k.svf_linear(X.long(), F, F.S),
            r"floating point, got torch.int64. Use x.to\(torch.f",
        ),
        (lambda: t2k.svf_linear(X.long(), t2k.quantize(F), F.S), r"Use x.to\(torch.float32\)"),
        (lambda: t2k.svf_linear(X.to("meta"), F, F.S), "x's device meta, U is on cpu"),
        (lambda: t2k.svf_delta_linear(X, None, F, F.S), "weight must be a .*got NoneType"),
        (lambda: t2k.svf_delta_linear(X, W.to("meta"), F, F.S), "weight is on meta"),
        (lambda: t2k.effective_diagonal([1.0], torch.ones(1)), "S must be a .*got list"),
        (lambda: t2k.effective_diagonal(torch.ones(1), [1.0]), "z must be a .*got list"),
        (lambda: t2k.effective_multiplier([1.0], torch.ones(1)), "S must be a .*got list"),
        (lambda: t2k.mix([[1.0]], torch.ones(1, 1)), "mix: Z must be a .*got list"),
        (lambda: t2k.mix(torch.ones(2, 3), torch.ones(1, 3)), r"alpha must be \(B, K\) = \(B, 2\)"),
    ],
)
def test_functions(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert "int64)" not in str(caught.value)  # no advice to decompose into integers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (t2k.convert, r"model must be an nn.Module, got str.*from_pretrained"),
        (t2k.revert, "model must be an nn.Module"),
        (t2k.trainable, "model must be an nn.Module"),
        (t2k.ExpertBank, "model must be an nn.Module"),
        (t2k.Expert.from_model, "model must be an nn.Module"),
    ],
)
def test_a_path_is_not_a_model(call, message):
    with pytest.raises(TypeError, match=message):
        call("llama")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": None}, "targets must be a str or a list of str, got NoneType"),
        ({"targets": 3}, "targets must be a str or a list of str, got int"),
        ({"exclude": 3}, "exclude must be a str or a list of str, got int"),
        ({"decomposition": 3}, "decomposition must be a folder.*got int"),
    ],
)
def test_conversion(options, message):
    with pytest.raises(TypeError, match=message):
        t2k.convert(nn.Sequential(nn.Linear(4, 4)), progress=False, **options)


def test_slots_of_a_routing(bank):
    for routing in ("a", ["a", None]):
        with pytest.raises(TypeError, match=r"slot must be \(tokens,\) int32, got list"):
            bank.use(routing, slot=[0, 1]).__enter__()


def test_explain(bank):
    with bank.use("a"):
        with pytest.raises(
            ValueError, match=r"explain: x must have shape \(\.\.\., 4\), got \(2, 5\)"
        ):
            t2k.explain(bank.model[0], torch.randn(2, 5))
        with pytest.raises(TypeError, match=r"explain: x must be a torch.Tensor, got list"):
            t2k.explain(bank.model[0], [1.0])


def test_the_meta_device_has_shapes_and_no_values(bank):
    """Factors, layer and x on it work as other layers do there; x alone is an error."""
    x, factors = X.to("meta"), t2k.SVDFactors(*(t.to("meta") for t in F))
    assert t2k.svf_linear(x, factors, factors.S).shape == (3, 6)
    assert t2k.svf_delta_linear(x, W.to("meta"), factors, factors.S).device.type == "meta"
    with torch.no_grad(), bank.use("a"), pytest.raises(ValueError, match="x is on meta.*on cpu"):
        bank.model[0](x)
