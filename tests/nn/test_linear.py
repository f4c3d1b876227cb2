"""SVFLinear by itself: a drop-in for nn.Linear."""

import copy

import pytest
import torch
from torch import nn

import t2kernels as t2k
from t2kernels import SVFLinear


def pair(n=12, m=9, dtype=torch.float32, **options):
    torch.manual_seed(0)
    linear = nn.Linear(n, m, dtype=dtype)
    return linear, SVFLinear.from_linear(linear, **options)


def rebuilt(layer, z):
    f = layer.factors
    return f.U.double() @ torch.diag(f.S.double() * z.double()) @ f.V.double().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"parametrisation": "sigmoid-normalised"}])
def test_the_base_is_bit_exact(dtype, options):
    linear, layer = pair(dtype=dtype, **options)
    x = torch.randn(2, 3, 12, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), linear(x))


def write_data(z, value):
    z.data = value.clone()


def write_data_in_place(z, value):
    z.data.copy_(value)


def write_no_grad(z, value):
    with torch.no_grad():
        z.copy_(value)


@pytest.mark.parametrize("write", [write_data, write_data_in_place, write_no_grad])
@pytest.mark.parametrize("grad", [False, True])
def test_z_counts_however_it_was_written(write, grad):
    _, layer = pair()
    layer.z.requires_grad_(grad)
    x, z = torch.randn(5, 12), torch.rand(9) + 0.5
    layer(x)
    write(layer.z, z)
    expected = x.double() @ rebuilt(layer, z).T + layer.bias.double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_z_is_that_of_the_rebuilt_weight(recompute):
    _, layer = pair(recompute=recompute)
    x = torch.randn(5, 12)
    layer(x).square().sum().backward()
    z = torch.ones(9, dtype=torch.float64, requires_grad=True)
    y = x.double() @ rebuilt(layer, z).T + layer.bias.detach().double()
    y.square().sum().backward()
    torch.testing.assert_close(layer.z.grad.double(), z.grad, atol=1e-4, rtol=1e-4)
    assert layer.weight.grad is None


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_rank_k_is_exact_for_k_components(rank):
    linear, layer = pair(rank=rank)
    assert layer.z.shape == (rank,)
    z = torch.rand(rank) + 0.5
    with torch.no_grad():
        layer.z.copy_(z)
    f = layer.factors
    W = linear.weight + f.U @ torch.diag(f.S * (z - 1)) @ f.V.T
    x = torch.randn(3, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ W.T + linear.bias, atol=1e-5, rtol=1e-5)


def test_dropped_weight_is_the_base_to_rounding():
    linear, layer = pair(keep_weight=False)
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), linear(x), atol=1e-5, rtol=1e-5)
    assert layer.weight is None
    torch.testing.assert_close(layer.state_dict()["weight"], linear.weight.detach())
    with pytest.raises(ValueError, match="keep_weight=False needs all 9 components"):
        pair(keep_weight=False, rank=4)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casts_leave_z_and_sigma_alone(cast):
    _, layer = pair()
    with torch.no_grad():
        layer.z.add_(1e-4)
    layer.z.grad = torch.full_like(layer.z, 1e-5)
    z, S = layer.z.detach().clone(), layer.factors.S.clone()
    getattr(layer, cast)()
    assert torch.equal(layer.z, z)
    assert torch.equal(layer.factors.S, S)
    assert layer.z.grad.dtype == torch.float32
    assert layer.factors.U.dtype == layer.weight.dtype
    layer.float()
    assert torch.equal(layer.z, z)


def test_factors_are_neither_parameters_nor_buffers_nor_state():
    _, layer = pair()
    assert set(layer.state_dict()) == {"weight", "bias", "z"}
    assert {n for n, _ in layer.named_parameters()} == {"weight", "bias", "z"}
    assert not list(layer.named_buffers())


def test_deepcopy_is_independent():
    _, layer = pair()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.z.mul_(2)
    x = torch.randn(3, 12)
    with torch.no_grad():
        assert not torch.equal(other(x), layer(x))
        assert float(layer.z.max()) == 1.0


def test_int8_factors_with_the_stored_weight():
    linear, _ = pair()
    q = t2k.quantize(t2k.decompose(linear.weight.detach()))
    layer = SVFLinear.from_linear(linear, factors=q)
    x = torch.randn(3, 12)
    with torch.no_grad():
        assert torch.equal(layer(x), linear(x))
        layer.z.mul_(2.0)
        expected = 2 * x @ linear.weight.T + linear.bias
        torch.testing.assert_close(layer(x), expected, atol=0.1, rtol=0.1)


def test_loading_another_weight_under_the_factors_is_refused():
    _, layer = pair()
    state = layer.state_dict()
    layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"load the checkpoint before t2kernels\.convert"):
        layer.load_state_dict({**state, "weight": state["weight"] + 1})


@pytest.mark.parametrize(
    "options", [{}, {"keep_weight": False}, {"kind": "int8"}, {"kind": "fp8"}], ids=str
)
def test_assigned_weights_take_their_factors_along(options):
    """load_state_dict(assign=True) takes tensors as they come: z stays fp32, factors follow."""
    options = dict(options)
    kind = options.pop("kind", None)
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    layer = t2k.SVFLinear.from_linear(linear, **options)
    if kind:
        factors = t2k.quantize(layer.factors, kind)
        layer = t2k.SVFLinear.from_linear(linear, factors=factors)
    state = {key: value.bfloat16() for key, value in layer.state_dict().items()}
    state["z"] = torch.linspace(0.5, 1.5, 6).bfloat16()
    layer.load_state_dict(state, assign=True)
    assert layer.z.dtype == torch.float32 and isinstance(layer.z, nn.Parameter)
    assert torch.equal(layer.z, state["z"].float())
    assert layer.factors.S.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert layer.weight is None or layer.weight.dtype == torch.bfloat16
    x = torch.randn(3, 8).bfloat16()
    with torch.no_grad():
        y = layer(x)
        layer.z.fill_(1.0)
        base = layer(x)
    rebuilt = torch.nn.functional.linear(x, state["weight"], state["bias"])
    torch.testing.assert_close(base, rebuilt, rtol=0.03, atol=0.03)
    assert y.dtype == torch.bfloat16 and not torch.equal(y, base)


def test_loading_z_takes_effect():
    linear, layer = pair()
    layer.load_state_dict({**layer.state_dict(), "z": torch.full((9,), 2.0)})
    x = torch.randn(3, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), 2 * x @ linear.weight.T + linear.bias)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SVFLinear.from_linear(nn.Conv1d(1, 1, 1)), TypeError, "expected nn.Linear"),
        (lambda: pair(parametrisation="sigmoid"), ValueError, "parametrisation must be one of"),
        (lambda: pair(rank=10), ValueError, "rank"),
        (lambda: pair(rank=0), ValueError, "rank"),
        (lambda: pair(factors=t2k.decompose(torch.ones(3, 3))), ValueError, "do not fit"),
        (lambda: pair()[1](torch.ones(2, 11)), ValueError, r"\(\.\.\., 12\), got \(2, 11\)"),
        (
            lambda: pair()[1](torch.ones(2, 12).bfloat16()),
            TypeError,
            "torch.float32 like the layer",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_factorised_training_step_has_no_buffer_of_the_weights_size():
    layer = SVFLinear.from_linear(nn.Linear(96, 80))
    layer.weight.requires_grad_(False)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            known = {t.untyped_storage().data_ptr() for t in (layer._U, layer._Vh, layer.weight)}
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                    sizes.append(t.untyped_storage().nbytes() // t.element_size())
            return out

    x = torch.randn(4, 96, requires_grad=True)
    with Watch():
        layer(x).sum().backward()
    assert sizes
    assert max(sizes) < 80 * 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", ["base", "delta", "merged", "grad", "autocast"])
def test_batch_invariant_rows_in_every_form(dtype, state):
    _, layer = pair(n=96, m=80, dtype=dtype, rank=16 if state == "delta" else None)
    if state == "delta":
        with torch.no_grad():
            layer.z.mul_(1.5)
    if state == "merged":
        layer.merge_diagonal(layer.factors.S * 1.5)
    layer.z.requires_grad_(False)
    x = torch.randn(11, 3, 96, dtype=dtype, requires_grad=state == "grad")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=state == "autocast")
    with t2k.batch_invariant(), torch.set_grad_enabled(state == "grad"), autocast:
        whole = layer(x)
        for row in (0, 10):
            assert torch.equal(layer(x[row : row + 1])[0], whole[row])
        assert whole.requires_grad == (state == "grad")
        assert whole.dtype == (torch.bfloat16 if state == "autocast" else dtype)
    with autocast:
        torch.testing.assert_close(whole, layer(x), atol=0.05, rtol=0.05)


def test_factors_of_another_weight_are_refused():
    linear, _ = pair()
    with pytest.raises(ValueError, match="were not made from this weight"):
        SVFLinear.from_linear(linear, factors=t2k.decompose(torch.randn(9, 12)))
