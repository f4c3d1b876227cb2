"""8-bit factors: error bounds, layout, the identity they are used in, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import t2kernels as t2k
from t2kernels.quantized import FACTOR_KINDS, QuantizedFactors, dequantize, quantize
from t2kernels.svd import SVDFactors, check_factors, decompose
from t2kernels.testing import assert_accurate, relative_error

ROOT = Path(__file__).parents[1]
#: Relative error of an output against that of the factors before they were rounded.
LIMIT = {"int8": 0.015, "fp8": 0.04}

kinds = pytest.mark.parametrize("kind", FACTOR_KINDS)


def _orthonormal(m: int, n: int, r: int, dtype: torch.dtype = torch.float32) -> SVDFactors:
    """Random factors without the cost of an SVD."""
    g = torch.Generator().manual_seed(0)
    U = torch.randn(m, r, generator=g) / m**0.5
    V = torch.randn(r, n, generator=g) / n**0.5
    S = torch.linspace(2.0, 0.01, r)
    return SVDFactors(U.to(dtype), S, V.to(dtype).t())


def _output_error(f: SVDFactors, kind: str, tokens: int = 8) -> float:
    """Relative error of the quantised product on Gaussian x, everything else in fp64."""
    q = quantize(f, kind)
    n = f.V.shape[0]
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(1)).double()
    want = (x @ f.V.double() * f.S) @ f.U.double().t()
    got = (x @ q.V.double() * (q.S * q.scale)) @ q.U.double().t()
    return relative_error(got, want)


@kinds
@pytest.mark.parametrize(("m", "n"), [(2048, 2048), (512, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factor_error(m: int, n: int, dtype: torch.dtype, kind: str) -> None:
    assert _output_error(_orthonormal(m, n, min(m, n), dtype), kind) <= LIMIT[kind]


@pytest.mark.parametrize("df", [1.5, 2.0, 3.0, 5.0])
def test_factor_error_of_heavy_tails(df: float) -> None:
    """Student's t with few degrees of freedom: single weights, and so single entries of the
    singular vectors, stand far out. Steps of one size cannot hold them, fp8's octaves can."""
    torch.manual_seed(0)
    f = decompose(torch.distributions.StudentT(df).sample((192, 256)))
    error = {kind: _output_error(f, kind, tokens=64) for kind in FACTOR_KINDS}
    assert error["fp8"] <= LIMIT["fp8"]
    assert (error["int8"] > error["fp8"]) == (df <= 2), error
    assert error["int8"] <= (LIMIT["int8"] if df > 3 else 0.05)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        pytest.skip(f"{path} is not here")
    tensors = {k: v.float() for k, v in load_file(path).items() if v.dim() == 2}
    return {k: v for k, v in tensors.items() if "embed" not in k and "lm_head" not in k}


@kinds
@pytest.mark.parametrize(
    "path",
    [
        ROOT / "python/t2runtime/models/small/model.safetensors",
        ROOT.parent / "shared/models/stories260K/model.safetensors",
    ],
    ids=["small", "stories260K"],
)
def test_factor_error_of_trained_weights(path: Path, kind: str) -> None:
    errors = {k: _output_error(decompose(w), kind, tokens=64) for k, w in _weights(path).items()}
    assert len(errors) > 20 and max(errors.values()) <= LIMIT[kind], errors


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_error_is_told_apart(kind: str, dtype: torch.dtype) -> None:
    """Against fp64 of the same rounded factors no more than plain torch errs: the error that is
    left is that of the factors."""
    f = _orthonormal(512, 384, 384, dtype)
    q = quantize(f, kind)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = t2k.svf_linear(x, q, q.S)
    truth = (x.double() @ q.V.double() * (q.S * q.scale)) @ q.U.double().t()
    plain = (x @ q.V.to(dtype) * (q.S * q.scale)).to(dtype) @ q.U.to(dtype).t()
    assert_accurate(y, truth, plain)
    exact = (x.double() @ f.V.double() * f.S) @ f.U.double().t()
    assert relative_error(y, truth) < 0.01 < relative_error(truth, exact) * 2 <= 2 * LIMIT[kind]


def test_scales_use_the_range_without_saturating() -> None:
    """The largest entry of an fp8 column lies in the top octave, and none beyond what rounds to
    448; int8 may clip."""
    f = _orthonormal(300, 200, 100)
    q = quantize(f, "fp8")
    for part, scale in ((f.U, q.u_scale), (f.V, q.v_scale)):
        top = (part / scale).abs().amax(0)
        assert top.min() >= 224 and top.max() <= 464


@kinds
def test_the_scale_found_beats_the_plain_one(kind: str) -> None:
    f = _orthonormal(700, 64, 32)
    dtype = FACTOR_KINDS[kind]
    scale = f.U.abs().amax(0) / (127 if kind == "int8" else 448)
    plain = f.U / scale
    plain = (plain.round() if kind == "int8" else plain).to(dtype).float() * scale
    assert relative_error(dequantize(quantize(f, kind)).U, f.U) < relative_error(plain, f.U)


@kinds
def test_real_factors_and_layout(kind: str) -> None:
    f = decompose(torch.randn(70, 200, generator=torch.Generator().manual_seed(3)))
    q = quantize(f, kind)
    assert q.U.dtype == q.V.dtype == FACTOR_KINDS[kind] and q.kind == kind
    assert q.U.shape == f.U.shape and q.V.shape == f.V.shape
    assert q.U.is_contiguous() and q.V.t().is_contiguous()
    assert q.scale.dtype == torch.float32 and torch.equal(q.scale, q.u_scale * q.v_scale)
    assert (q.rank, q.in_features, q.out_features) == (70, 200, 70)
    back = dequantize(q)
    check_factors(back)
    assert relative_error(back.U, f.U) < LIMIT[kind] / 1.4
    assert relative_error(back.V, f.V) < LIMIT[kind] / 1.4
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


@kinds
def test_zero_and_constant_columns(kind: str) -> None:
    f = SVDFactors(torch.zeros(6, 2), torch.zeros(2), torch.full((2, 5), 0.3).t())
    q = quantize(f, kind)
    assert bool(torch.isfinite(q.scale).all()) and not bool(q.U.float().any())
    assert torch.allclose(dequantize(q).V, f.V, rtol=1e-6)


@kinds
def test_entries_of_any_size_are_finite(kind: str) -> None:
    """fp32's own range: squares that overflow or vanish leave factors that can be used."""
    for size in (1e-38, 1e-20, 1e20, 1e38):
        f = _orthonormal(40, 30, 20)
        q = quantize(f._replace(U=f.U * size), kind)
        assert bool(torch.isfinite(q.U.float()).all()) and bool(torch.isfinite(q.u_scale).all())


@kinds
def test_deterministic(kind: str) -> None:
    f = _orthonormal(300, 200, 100)
    for a, b in zip(quantize(f, kind)[:5], quantize(f, kind)[:5], strict=True):
        assert torch.equal(a.double(), b.double())


def test_bad_input() -> None:
    f = _orthonormal(8, 6, 4)
    for kind in ("int4", None, 8):
        with pytest.raises(ValueError, match='kind must be "int8" or "fp8", got'):
            quantize(f, kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inf or NaN"):
        quantize(f._replace(U=torch.full_like(f.U, float("nan"))))
    with pytest.raises(TypeError, match="QuantizedFactors"):
        dequantize(f)  # type: ignore[arg-type]
    for dtype in (torch.int32, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="must be a float of 16 bits"):
            dequantize(quantize(f), dtype)
    assert isinstance(quantize(f), QuantizedFactors)
