"""svf_linear and svf_delta_linear: numerics on each backend of a CPU, gradients, torch's checks."""

import pytest
import torch
import torch.nn.functional as F

import t2kernels as t2k
from t2kernels.ops import dispatch, functional, reference
from t2kernels.quantized import FACTOR_KINDS
from t2kernels.testing import (
    AWKWARD_SIZES,
    assert_accurate,
    make_inputs,
    plain_forward,
    poisoned_empty,
    relative_error,
)

CPU_BACKENDS = ["reference", "torch", "native"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factors_of(inputs):
    if inputs.scale is None:
        return t2k.SVDFactors(inputs.U, inputs.base, inputs.V)
    one = torch.ones_like(inputs.scale)
    return t2k.QuantizedFactors(inputs.U, inputs.base, inputs.V, inputs.scale, one, inputs.x.dtype)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize("factors", [None, *FACTOR_KINDS])
def test_forward_is_accurate_at_awkward_sizes(backend, dtype, slots, factors):
    for seed, tokens in enumerate((0, *AWKWARD_SIZES)):
        n, m = AWKWARD_SIZES[seed % 6], AWKWARD_SIZES[(seed + 2) % 6]
        r = min(n, m)
        i = make_inputs(tokens, n, m, r, slots=slots, dtype=dtype, seed=seed, factors=factors)
        with t2k.backend(backend), poisoned_empty():
            y = t2k.svf_linear(i.x, factors_of(i), i.d, i.slot, i.bias)
        truth, _ = reference.forward(*i.double().args())
        assert y.dtype == dtype
        assert_accurate(y, truth, plain_forward(i), f"T={tokens} n={n} m={m}")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_accurate(backend, dtype, slots, recompute):
    for seed, (tokens, n, m) in enumerate([(1, 17, 5), (33, 63, 64), (200, 40, 130)]):
        i = make_inputs(tokens, n, m, min(n, m), slots=slots, dtype=dtype, seed=seed)
        g = torch.randn(tokens, m, generator=torch.Generator().manual_seed(1)).to(dtype)

        def grads(x, d, bias, f, grad, name=backend, slot=i.slot):
            x, d, bias = (t.clone().requires_grad_() for t in (x, d, bias))
            with t2k.backend(name):
                y = t2k.svf_linear(x, f, d, slot, bias, recompute=recompute)
                return torch.autograd.grad(y, (x, d, bias), grad)

        dbl = i.double()
        truth = grads(dbl.x, dbl.d, dbl.bias, factors_of(dbl), g.double(), "reference")
        plain = grads(i.x, i.d, i.bias, factors_of(i), g, "torch")
        for name, a, b, p in zip(
            ("dx", "dd", "dbias"), grads(i.x, i.d, i.bias, factors_of(i), g), truth, plain
        ):
            assert_accurate(a, b, p, f"{name} T={tokens}")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(backend, slots, recompute):
    i = make_inputs(5, 4, 6, 3, slots=slots, dtype=torch.float64)
    x, d, b = (t.requires_grad_() for t in (i.x, i.d, i.bias))
    with t2k.backend(backend):
        assert torch.autograd.gradcheck(
            lambda x, d, b: t2k.svf_linear(x, factors_of(i), d, i.slot, b, recompute=recompute),
            (x, d, b),
        )


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradgradcheck(backend, slots, recompute):
    i = make_inputs(5, 4, 6, 3, slots=slots, dtype=torch.float64)
    x, d, b = (t.requires_grad_() for t in (i.x, i.d, i.bias))

    def product(x, d, b):
        # Squared, so that the second derivative with respect to each alone is not zero.
        return t2k.svf_linear(x, factors_of(i), d, i.slot, b, recompute=recompute) ** 2

    with t2k.backend(backend):
        assert torch.autograd.gradgradcheck(product, (x, d, b))


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_product_with_the_hessian_is_that_of_the_dense_layer(backend):
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 80)
    layer = t2k.SVFLinear.from_linear(linear)
    layer.z.requires_grad_(True)  # the factorised form
    x = torch.randn(3, 48, requires_grad=True)

    def product(module):
        (first,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        (first * torch.linspace(-1, 1, 48)).sum().backward()
        found, x.grad = x.grad, None
        return found

    with t2k.backend(backend):
        torch.testing.assert_close(product(layer), product(linear), rtol=1e-4, atol=1e-4)


def test_third_derivatives():
    i = make_inputs(5, 4, 6, 3, slots=2, dtype=torch.float64)
    f, x, d = factors_of(i), i.x.requires_grad_(), i.d.requires_grad_()

    def second(x, d):
        y = t2k.svf_linear(x, f, d, i.slot).pow(4).sum()
        first = torch.autograd.grad(y, (x, d), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, d), create_graph=True)

    assert torch.autograd.gradcheck(second, (x, d))


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("wants_grad", [False, True])
@pytest.mark.parametrize("factors", [None, *FACTOR_KINDS])
def test_opcheck(slots, wants_grad, factors):
    i = make_inputs(7, 8, 9, 8, slots=slots, factors=factors)
    x, d, b = (t.requires_grad_(wants_grad) for t in (i.x, i.d, i.bias))
    args = (x, i.U, i.V.t(), d, i.base, i.slot, b, i.scale, wants_grad, False)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor",
             "test_aot_dispatch_dynamic"]  # fmt: skip
    if factors == "fp8":  # torch's own comparison of arguments has no kernel for fp8
        tests.remove("test_schema")
    torch.library.opcheck(torch.ops.t2kernels.svf_product.default, args, test_utils=tests)
    g, h = torch.randn(7, 9), torch.randn(7, 8)
    detached = [t if t is None else t.detach() for t in (i.x, i.U, i.V.t(), i.d, i.base)]
    torch.library.opcheck(
        torch.ops.t2kernels.svf_product_backward.default,
        (g.requires_grad_(wants_grad), *detached, i.slot, h, i.scale, True, True),
        test_utils=tests,
    )


@pytest.mark.parametrize("kind", FACTOR_KINDS)
@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_with_eight_bit_factors_are_those_of_their_values(backend, slots, kind):
    """d keeps its meaning: the scales stand beside it, they are no part of it."""
    i = make_inputs(33, 63, 64, 63, slots=slots, factors=kind)
    wide = t2k.SVDFactors(i.U.double() * i.scale, i.base.double(), i.V.double())
    g = torch.randn(33, 64, generator=torch.Generator().manual_seed(1))

    def grads(f, x, d, bias, g):
        leaves = [t.clone().requires_grad_() for t in (x, d, bias)]
        y = t2k.svf_linear(leaves[0], f, leaves[1], i.slot, leaves[2])
        return (y.detach(), *torch.autograd.grad(y, leaves, g))

    with t2k.backend(backend):
        found = grads(factors_of(i), i.x, i.d, i.bias, g)
    with t2k.backend("reference"):
        truth = grads(wide, i.x.double(), i.d.double(), i.bias.double(), g.double())
    for name, a, b in zip(("y", "dx", "dd", "dbias"), found, truth):
        assert relative_error(a, b) < 1e-6, name


@pytest.mark.parametrize("kind", FACTOR_KINDS)
@pytest.mark.parametrize("slots", [0, 2])
def test_gradcheck_with_eight_bit_factors(slots, kind):
    i = make_inputs(5, 4, 6, 3, slots=slots, dtype=torch.float64)
    q = t2k.quantize(factors_of(i), kind)
    x, d = i.x.requires_grad_(), i.d.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, d: t2k.svf_linear(x, q, d, i.slot), (x, d))


@pytest.mark.parametrize("factors", [None, *FACTOR_KINDS])
def test_compile_makes_one_graph_for_any_diagonal_and_slot(factors):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    i = make_inputs(6, 16, 16, 16, slots=4, factors=factors)
    f = factors_of(i)
    compiled = torch.compile(
        lambda x, d, s: t2k.svf_linear(x, f, d, s, i.bias), fullgraph=True, backend=count
    )
    for seed in range(4):
        d = i.d + seed
        slot = (i.slot + seed) % 4
        expected = t2k.svf_linear(i.x, f, d, slot, i.bias)
        assert torch.equal(compiled(i.x, d, slot), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("factors", [None, *FACTOR_KINDS])
def test_autocast_lowers_x_and_factors_and_leaves_d(factors, monkeypatch):
    i = make_inputs(8, 32, 32, 32, factors=factors)
    low = make_inputs(8, 32, 32, 32, dtype=torch.bfloat16, factors=factors)
    seen, native = set(), dispatch.load("native")
    forward = native.forward

    def noted(x, U, *rest, **named):
        seen.add((x.dtype, U.dtype))
        return forward(x, U, *rest, **named)

    monkeypatch.setattr(native, "forward", noted)
    with torch.autocast("cpu", torch.bfloat16):
        y = t2k.svf_linear(i.x, factors_of(i), i.d, bias=i.bias)
        d = i.d.clone().requires_grad_()
        t2k.svf_linear(i.x, factors_of(i), d, bias=i.bias).float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert d.grad.dtype == torch.float32
    # 8-bit factors stay what they are: widened, they would be no smaller than W.
    assert seen == {(torch.bfloat16, FACTOR_KINDS.get(factors, torch.bfloat16))}
    truth, _ = reference.forward(*i.double().args())
    assert relative_error(y, truth) < 3 * relative_error(plain_forward(low), truth) + 1e-2


def test_forward_mode_is_refused_not_silently_zero():
    i = make_inputs(4, 8, 8, 8)
    with pytest.raises(RuntimeError, match="reverse mode"):
        torch.func.jvp(lambda d: t2k.svf_linear(i.x, factors_of(i), d), (i.d,), (i.d,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [0, 4])
def test_batch_invariant_rows_have_the_same_bits_alone_and_inside_any_batch(dtype, slots):
    i = make_inputs(40, 96, 130, 96, slots=slots, dtype=dtype)
    f = factors_of(i)
    for name in ("torch", "native"):
        with t2k.backend(name), t2k.batch_invariant():
            whole = t2k.svf_linear(i.x, f, i.d, i.slot, i.bias)
            for t in (0, 1, 17, 39):
                s = None if i.slot is None else i.slot[t : t + 1]
                alone = t2k.svf_linear(i.x[t : t + 1], f, i.d, s, i.bias)
                assert torch.equal(alone[0], whole[t]), (name, t)
            part = slice(3, 29)
            s = None if i.slot is None else i.slot[part]
            assert torch.equal(t2k.svf_linear(i.x[part], f, i.d, s, i.bias), whole[part])


def test_strided_inputs_and_leading_axes():
    i = make_inputs(24, 10, 12, 10)
    wide = torch.randn(24, 30)
    wide[:, 5:15] = i.x
    expected = t2k.svf_linear(i.x, factors_of(i), i.d)
    torch.testing.assert_close(t2k.svf_linear(wide[:, 5:15], factors_of(i), i.d), expected)
    y = t2k.svf_linear(i.x.view(2, 3, 4, 10), factors_of(i), i.d)
    assert torch.equal(y, expected.view(2, 3, 4, 12))
    transposed = i.x.t().contiguous().t()
    torch.testing.assert_close(t2k.svf_linear(transposed, factors_of(i), i.d), expected)
    table = torch.randn(4, 25)[:, 7:17]  # an arena's columns: rows far apart
    slot = torch.arange(24, dtype=torch.int32) % 4
    torch.testing.assert_close(
        t2k.svf_linear(i.x, factors_of(i), table, slot),
        t2k.svf_linear(i.x, factors_of(i), table.contiguous(), slot),
    )
    assert t2k.svf_linear(i.x[0], factors_of(i), i.d).shape == (12,)


def test_delta_is_the_updated_weight():
    w, x = torch.randn(12, 10), torch.randn(3, 7, 10)
    fk = t2k.decompose(w, rank=4)
    dk = fk.S * torch.tensor([1.5, 0.5, 1.0, -1.0])
    bias = torch.randn(12)
    expected = F.linear(x, w + fk.U @ torch.diag(dk - fk.S) @ fk.V.T, bias)
    torch.testing.assert_close(t2k.svf_delta_linear(x, w, fk, dk, bias=bias), expected)
    slot = torch.tensor([0, -1, 1] * 7, dtype=torch.int32)
    y = t2k.svf_delta_linear(x, w, fk, torch.stack([dk, fk.S]), slot, bias)
    rows = slot.view(3, 7)
    torch.testing.assert_close(y[rows == 0], expected[rows == 0])
    assert torch.equal(y[rows == -1], F.linear(x, w, bias)[rows == -1])


def test_delta_gradcheck():
    w = torch.randn(5, 4, dtype=torch.float64)
    fk = t2k.decompose(w, rank=2)
    args = (
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        w.clone().requires_grad_(),
        torch.randn(2, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda x, w, d: t2k.svf_delta_linear(x, w, fk, d), args)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.015), ("fp8", 0.04)])
def test_eight_bit_factors_are_close_to_the_product(kind, error):
    w, x = torch.randn(256, 192), torch.randn(9, 192)
    f = t2k.decompose(w)
    q = t2k.quantize(f, kind)
    exact = t2k.svf_linear(x, f, f.S)
    for name in CPU_BACKENDS:
        with t2k.backend(name):
            assert relative_error(t2k.svf_linear(x, q, f.S), exact) < error


GOOD = make_inputs(6, 8, 9, 8)
SLOTTED = make_inputs(6, 8, 9, 8, slots=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(6, 7)}, ValueError, r"x must have shape \(\.\.\., n\) with n = 8"),
        ({"x": GOOD.x.double()}, TypeError, "torch.float64 \\(for x in torch.float64\\)"),
        ({"x": GOOD.x.bfloat16()}, TypeError, "x must have the factors' dtype torch.float32"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"f": (1, 2, 3)}, TypeError, "factors must be SVDFactors"),
        ({"d": torch.ones(7)}, ValueError, r"d must have shape \(r,\) = \(8,\).*another layer"),
        ({"d": GOOD.d.bfloat16()}, TypeError, "d must be torch.float32"),
        ({"d": SLOTTED.d}, ValueError, "slot .* must say which token"),
        ({"d": GOOD.d.to("meta")}, ValueError, "on x's device cpu, d is on meta"),
        ({"bias": torch.ones(8)}, ValueError, r"bias must have shape \(m,\) = \(9,\)"),
        ({"slot": SLOTTED.slot}, ValueError, r"with slot, d must be \(slots, r\)"),
        ({"d": SLOTTED.d, "slot": SLOTTED.slot.long()}, TypeError, "slot must be torch.int32"),
        ({"d": SLOTTED.d, "slot": SLOTTED.slot[:5]}, ValueError, r"shape \(tokens,\) = \(6,\)"),
        ({"d": SLOTTED.d, "slot": SLOTTED.slot + 2}, ValueError, r"slot must lie in \[-1, 2\)"),
        ({"d": SLOTTED.d, "slot": SLOTTED.slot - 1}, ValueError, r"slot must lie in \[-1, 2\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, message):
    arguments = {"x": GOOD.x, "f": factors_of(GOOD), "d": GOOD.d, "slot": None, "bias": None}
    with pytest.raises(error, match=message):
        t2k.svf_linear(**(arguments | change))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.S.neg_(),
        lambda f: f.S.fill_(float("nan")),
        lambda f: setattr(f.U, "data", f.U[:, :4].clone()),
        lambda f: setattr(f.V, "data", f.V.t()[:, :4].contiguous().t()),
    ],
    ids=["negative", "nan", "U", "V"],
)
def test_factors_that_change_after_a_call_are_checked_again(spoil):
    f = t2k.SVDFactors(*(t.clone() for t in t2k.decompose(torch.randn(9, 8))))
    f = f._replace(V=f.V.t().contiguous().t())
    x = torch.randn(3, 8)
    t2k.svf_linear(x, f, f.S.clone())
    spoil(f)
    with pytest.raises(ValueError, match="S must hold finite|factors must be|x must have"):
        t2k.svf_linear(x, f, torch.ones(8))


def test_nothing_keeps_factors_alive():
    f = t2k.decompose(torch.randn(9, 8))
    before = len(functional._known)
    t2k.svf_linear(torch.randn(3, 8), f, f.S)
    assert len(functional._known) == before + 1
    del f
    assert len(functional._known) == before


def test_factors_that_want_gradients_are_refused():
    f = factors_of(GOOD)._replace(U=GOOD.U.clone().requires_grad_())
    with pytest.raises(ValueError, match="frozen"):
        t2k.svf_linear(GOOD.x, f, GOOD.d)


def test_forcing_a_backend(monkeypatch):
    i = GOOD
    monkeypatch.setenv("T2_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="T2_BACKEND"):
        t2k.svf_linear(i.x, factors_of(i), i.d)
    with t2k.backend("torch"):  # the context manager wins over the variable
        t2k.svf_linear(i.x, factors_of(i), i.d)
    monkeypatch.setenv("T2_BACKEND", "cdua")
    with pytest.raises(ValueError, match="backend must be one of"):
        t2k.svf_linear(i.x, factors_of(i), i.d)


def test_the_native_kernels_are_the_default_on_a_cpu():
    i = GOOD
    choice = dispatch.choose(i.x, i.U, i.V, i.d, i.base, None, None, None)
    assert choice.module.NAME == "native"


F_GOOD = factors_of(GOOD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"S": F_GOOD.S[:2]}, r"factors must be U \(m, r\), S \(r,\), V \(n, r\)"),
        ({"V": F_GOOD.V[:, :1]}, r"factors must be U \(m, r\)"),
        ({"V": F_GOOD.V.bfloat16()}, "share a dtype"),
        ({"S": F_GOOD.S.bfloat16()}, "S be torch.float32"),
        ({"S": -F_GOOD.S}, "finite singular values ≥ 0"),
        ({"S": F_GOOD.S * float("nan")}, "finite singular values ≥ 0"),
        ({"S": F_GOOD.S.to("meta")}, "S is on meta"),
    ],
)
def test_malformed_factors_are_named_not_read(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        t2k.svf_linear(GOOD.x, F_GOOD._replace(**change), GOOD.d)


@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_malformed_eight_bit_factors_are_named_not_read(kind):
    q = t2k.quantize(t2k.decompose(torch.randn(9, 8)), kind)
    d = torch.ones(8)
    for change in ({"u_scale": q.u_scale[:3]}, {"v_scale": q.v_scale.half()}):
        with pytest.raises(ValueError, match=f"{kind} factors need u_scale and v_scale"):
            t2k.svf_linear(GOOD.x, q._replace(**change), d)
    with pytest.raises(TypeError, match="must be torch.int8 or torch.float8_e4m3fn, got torch.f"):
        t2k.svf_linear(GOOD.x, q._replace(U=q.U.float()), d)
    with pytest.raises(TypeError, match="share a dtype"):
        other = (set(FACTOR_KINDS.values()) - {q.U.dtype}).pop()
        t2k.svf_linear(GOOD.x, q._replace(V=q.V.view(other)), d)
    with pytest.raises(TypeError, match="must have the factors' dtype"):
        t2k.svf_linear(GOOD.x, t2k.SVDFactors(q.U, q.S, q.V), d)


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("fp8", 0.05)])
def test_eight_bit_factors_stay_in_the_range_of_fp16(backend, tokens, kind, error):
    f = t2k.decompose(torch.randn(64, 4096))
    q = t2k.quantize(f, kind)
    x = (torch.randn(tokens, 4096) * 16).half()
    exact = t2k.svf_linear(x.float(), f, f.S)
    d = f.S.clone().requires_grad_()
    with t2k.backend(backend):
        y = t2k.svf_linear(x, q, d)
        assert relative_error(y, exact) < error
        (dd,) = torch.autograd.grad(y.float().sum(), d)
    assert torch.isfinite(dd).all()


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_batch_invariance_does_not_depend_on_the_layout_of_x(backend, monkeypatch):
    if backend is not None:
        monkeypatch.setenv("T2_BACKEND", backend)
    i = make_inputs(9, 64, 48, 48)
    wide = i.x.t().contiguous().t()
    with t2k.batch_invariant():
        whole = t2k.svf_linear(wide, F64 := factors_of(i), i.d)
        for t in (0, 8):
            assert torch.equal(t2k.svf_linear(i.x[t : t + 1], F64, i.d)[0], whole[t])
