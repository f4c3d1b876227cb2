"""int8 factors: error bounds, layout, the identity they are used in, bad input."""

from __future__ import annotations

import pytest
import torch

from t2kernels.quantized import QuantizedFactors, dequantize, quantize
from t2kernels.svd import SVDFactors, check_factors, decompose


def _orthonormal(m: int, n: int, r: int, dtype: torch.dtype = torch.float32) -> SVDFactors:
    """Random factors without the cost of an SVD."""
    g = torch.Generator().manual_seed(0)
    U = torch.randn(m, r, generator=g) / m**0.5
    V = torch.randn(r, n, generator=g) / n**0.5
    S = torch.linspace(2.0, 0.01, r)
    return SVDFactors(U.to(dtype), S, V.to(dtype).t())


@pytest.mark.parametrize(("m", "n"), [(2048, 2048), (512, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_error(m: int, n: int, dtype: torch.dtype) -> None:
    f = _orthonormal(m, n, min(m, n), dtype)
    q = quantize(f)
    x = torch.randn(8, n, generator=torch.Generator().manual_seed(1))
    want = (x @ f.V.float() * f.S) @ f.U.float().t()
    got = (x @ q.V.float() * (q.S * q.scale)) @ q.U.float().t()
    assert float((got - want).norm() / want.norm()) <= 0.015


def test_real_factors_and_layout() -> None:
    f = decompose(torch.randn(70, 200, generator=torch.Generator().manual_seed(3)))
    q = quantize(f)
    assert (
        q.U.dtype == q.V.dtype == torch.int8 and q.U.shape == f.U.shape and q.V.shape == f.V.shape
    )
    assert q.U.is_contiguous() and q.V.t().is_contiguous()
    assert q.scale.dtype == torch.float32 and torch.equal(q.scale, q.u_scale * q.v_scale)
    assert (q.rank, q.in_features, q.out_features) == (70, 200, 70)
    back = dequantize(q)
    check_factors(back)
    assert float((back.U - f.U).norm() / f.U.norm()) < 0.01
    assert float((back.V - f.V).norm() / f.V.norm()) < 0.01
    moved = q.to("cpu", torch.bfloat16)
    assert moved.V.t().is_contiguous() and moved.dtype == torch.bfloat16
    assert dequantize(moved).U.dtype == torch.bfloat16
    assert dequantize(q, torch.float64).S.dtype == torch.float64


def test_clip_beats_the_largest_entry() -> None:
    f = _orthonormal(4096, 64, 32)
    f.U[0] = 2.0  # an outlier in every column, 128 standard deviations away
    f.U[1] = -1.0
    q = quantize(f)
    plain_scale = f.U.abs().amax(0) / 127
    plain = (f.U / plain_scale).round() * plain_scale
    assert (dequantize(q).U - f.U).square().sum() <= (plain - f.U).square().sum()


def test_zero_and_constant_columns() -> None:
    f = SVDFactors(torch.zeros(6, 2), torch.zeros(2), torch.full((2, 5), 0.3).t())
    q = quantize(f)
    assert bool(torch.isfinite(q.scale).all()) and not bool(q.U.any())
    assert torch.allclose(dequantize(q).V, f.V, rtol=1e-6)


def test_deterministic() -> None:
    f = _orthonormal(300, 200, 100)
    for a, b in zip(quantize(f)[:5], quantize(f)[:5], strict=True):
        assert torch.equal(a, b)


def test_bad_input() -> None:
    f = _orthonormal(8, 6, 4)
    with pytest.raises(ValueError, match="bits must be 8, got 4"):
        quantize(f, bits=4)
    with pytest.raises(ValueError, match="inf or NaN"):
        quantize(f._replace(U=torch.full_like(f.U, float("nan"))))
    with pytest.raises(TypeError, match="QuantizedFactors"):
        dequantize(f)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a float"):
        dequantize(quantize(f), torch.int32)
    assert isinstance(quantize(f), QuantizedFactors)
