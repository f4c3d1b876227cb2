"""The map from experts to the diagonal: parametrisations, their gradients, mixing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import t2kernels as t2k


def test_direct_is_the_product():
    S, z = torch.tensor([3.0, 2.0]), torch.tensor([0.5, 2.0])
    assert torch.equal(t2k.effective_diagonal(S, z), torch.tensor([1.5, 4.0]))


@pytest.mark.parametrize("start", [0.1, -3.0, 7.0])
def test_sigmoid_normalised_is_the_base_at_any_constant(start):
    S = torch.rand(50).sort(descending=True).values
    d = t2k.effective_diagonal(S, torch.full((50,), start), "sigmoid-normalised")
    torch.testing.assert_close(d, S)


def test_sigmoid_normalised_keeps_the_nuclear_norm():
    S, z = torch.rand(50), torch.randn(3, 50)
    d = t2k.effective_diagonal(S, z, "sigmoid-normalised")
    torch.testing.assert_close(d.sum(-1), S.sum().expand(3))


def test_sigmoid_normalised_gradient_is_the_closed_form():
    # dz_i = c σ_i dd_i − σ_i (Σ_j d_j dd_j) / Σ_j σ_j s_j, in terms of s = sigmoid(p).
    S = torch.rand(20, dtype=torch.float64)
    p = torch.randn(20, dtype=torch.float64, requires_grad=True)
    dd = torch.randn(20, dtype=torch.float64)
    d = t2k.effective_diagonal(S, p, "sigmoid-normalised")
    d.backward(dd)
    s = torch.sigmoid(p.detach())
    c = S.sum() / (S * s).sum()
    ds = c * S * dd - S * (d.detach() * dd).sum() / (S * s).sum()
    torch.testing.assert_close(p.grad, ds * s * (1 - s))


@pytest.mark.parametrize("parametrisation", ["direct", "sigmoid-normalised"])
def test_gradcheck(parametrisation):
    S = torch.rand(7, dtype=torch.float64)
    z = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: t2k.effective_diagonal(S, z, parametrisation), z)


def test_low_precision_z_gives_a_full_precision_diagonal():
    assert t2k.effective_diagonal(torch.ones(3), torch.ones(3).bfloat16()).dtype == torch.float32


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 4), st.integers(0, 1000))
def test_mixture_forms_agree_where_the_weights_sum_to_one(K, r, B, seed):
    gen = torch.Generator().manual_seed(seed)
    Z = torch.rand(K, r, generator=gen, dtype=torch.float64) + 0.5
    alpha = torch.rand(B, K, generator=gen, dtype=torch.float64) + 0.1
    alpha = alpha / alpha.sum(-1, keepdim=True)
    ours = t2k.mix(Z, alpha)
    torch.testing.assert_close(ours, 1 + alpha @ (Z - 1))
    torch.testing.assert_close(ours, t2k.mix(Z, alpha, "paper"))
    torch.testing.assert_close(ours, t2k.mix(Z, alpha, "paper-normalised"))


def test_authors_form_keeps_the_nuclear_norm():
    S, Z = torch.rand(9), torch.rand(2, 9) + 0.5
    z = t2k.mix(Z, torch.tensor([[0.3, 0.9]]), "authors", S)
    torch.testing.assert_close((S * z).sum(-1), S.sum().unsqueeze(0))


def test_a_row_of_a_mixture_does_not_depend_on_other_rows_or_unused_experts():
    Z, alpha = torch.randn(3, 100), torch.rand(4, 3)
    alone = t2k.mix(Z[:2], alpha[1:2, :2])
    padded = torch.cat([alpha[:, :2], torch.zeros(4, 1)], 1)
    assert torch.equal(alone[0], t2k.mix(Z, padded)[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: t2k.effective_diagonal(torch.ones(3), torch.ones(4)), r"\(\.\.\., r\) with r = 3"),
        (lambda: t2k.effective_diagonal(torch.ones(3), torch.ones(3), "sigmoid"), "'direct'"),
        (lambda: t2k.effective_diagonal(torch.ones(3), torch.ones(3).int()), "floating"),
        (lambda: t2k.mix(torch.ones(1, 3), torch.ones(1, 1), "mean"), "'paper'"),
        (lambda: t2k.mix(torch.ones(1, 3), torch.ones(1, 1), "authors"), "needs S"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
