"""decompose and relatives: accuracy, layout, signs, awkward matrices, fingerprints, bad input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2kernels import lapack, svd
from t2kernels.svd import (
    SVDFactors,
    accuracy,
    check_factors,
    decompose,
    fingerprint,
    reconstruct,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are small here: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _random(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * 0.02


def _check(weight: torch.Tensor, factors: SVDFactors, bound: float = 5e-6) -> None:
    check_factors(factors)
    reached = accuracy(weight, factors)
    assert reached.relative_error <= bound
    assert reached.orthogonality_u <= 1e-5 and reached.orthogonality_v <= 1e-5
    assert bool((factors.S[:-1] >= factors.S[1:]).all())
    lead = factors.U.abs().double()
    first = (lead >= lead.amax(0) * (1 - 1e-3)).int().argmax(0)
    assert bool((factors.U.gather(0, first[None]) >= 0).all())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    deficit=st.integers(0, 40),
    exponent=st.integers(-18, 18),
    seed=st.integers(0, 2**31),
)
def test_properties(m: int, n: int, deficit: int, exponent: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    inner = max(1, min(m, n) - deficit)
    weight = torch.randn(m, inner, generator=g) @ torch.randn(inner, n, generator=g)
    weight = weight * 10.0**exponent
    factors = decompose(weight)
    r = min(m, n)
    assert factors.U.shape == (m, r) and factors.S.shape == (r,) and factors.V.shape == (n, r)
    _check(weight, factors)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(5, 7),
        torch.zeros(7, 5),
        torch.ones(6, 9),
        torch.full((9, 6), -3.0),
        torch.eye(8),
        -torch.eye(8),
        torch.ones(1, 1),
        torch.tensor([[-2.0]]),
        torch.ones(1, 50),
        torch.ones(50, 1),
        torch.randn(1, 333, generator=torch.Generator().manual_seed(1)),
        torch.randn(333, 1, generator=torch.Generator().manual_seed(1)),
        torch.tensor([[1.0, 1.0], [1.0, -1.0]]).repeat(4, 3),
        torch.diag(torch.logspace(0, -30, 12)),
        _random(300, 17),
        _random(17, 300),
        _random(64, 64).t(),
        _random(64, 64)[::2, ::3],
    ],
)
def test_awkward_matrices(weight: torch.Tensor) -> None:
    _check(weight, decompose(weight))
    _check(weight, decompose(weight, precision="fp64", dtype=torch.float32), 1.2e-7)


@pytest.mark.parametrize(("m", "n"), [(512, 512), (256, 1024), (1024, 256)])
def test_accuracy_bounds(m: int, n: int) -> None:
    weight = _random(m, n)
    _check(weight, decompose(weight))
    exact = decompose(weight, precision="fp64")
    assert exact.U.dtype == torch.float32 and exact.S.dtype == torch.float32
    _check(weight, exact, 1e-7)
    measured = accuracy(weight, decompose(weight)).relative_error
    assert accuracy(weight, decompose(weight), precision="fp32").relative_error == pytest.approx(
        measured, rel=0.2
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype: torch.dtype) -> None:
    weight = _random(48, 32).to(dtype)
    factors = decompose(weight)
    check_factors(factors)
    assert factors.U.dtype == factors.V.dtype == dtype
    assert factors.S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = {torch.float64: 1e-14, torch.float32: 5e-6, torch.float16: 1e-3}.get(dtype, 6e-3)
    assert accuracy(weight, factors).relative_error <= bound
    for other in FLOATS:
        cast = decompose(weight, dtype=other)
        check_factors(cast)
        assert cast.U.dtype == other and factors.to(dtype=other).U.dtype == other
        check_factors(factors.to(dtype=other))


def test_rank() -> None:
    weight = _random(20, 30)
    full, cut = decompose(weight), decompose(weight, rank=5)
    check_factors(cut)
    assert (cut.rank, cut.in_features, cut.out_features) == (5, 30, 20)
    assert torch.equal(cut.U, full.U[:, :5]) and torch.equal(cut.V, full.V[:, :5])
    want = float(full.S[5:].norm() / full.S.norm())
    assert accuracy(weight, cut).relative_error == pytest.approx(want, rel=1e-4)


def test_signs_do_not_depend_on_the_route() -> None:
    weight = _random(40, 24)
    a, b = decompose(weight), decompose(weight.double(), dtype=torch.float32)
    assert torch.allclose(a.U, b.U, atol=1e-4) and torch.allclose(a.V, b.V, atol=1e-4)
    negated = decompose(-weight)
    assert torch.allclose(a.U, negated.U, atol=1e-4) and torch.allclose(a.V, -negated.V, atol=1e-4)
    for again in (decompose(weight), decompose(weight.t().contiguous().t())):
        assert torch.equal(a.U, again.U) and torch.equal(a.V, again.V)


def test_random_state_and_gradients_are_left_alone() -> None:
    weight = _random(12, 8).requires_grad_()
    before = torch.get_rng_state()
    factors = decompose(weight)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(t.requires_grad for t in factors)
    fingerprint(weight)
    accuracy(weight, factors)


def _spectrum(sigma: torch.Tensor, m: int, n: int) -> torch.Tensor:
    r = sigma.shape[0]
    Q, P = (torch.linalg.qr(_random(k, r, seed).double())[0] for seed, k in ((1, m), (2, n)))
    return (Q * sigma.double()) @ P.t()


GRAM = {
    "random": lambda: _random(96, 160).double(),
    "tall": lambda: _random(200, 40).double(),
    "down to 1e-4": lambda: _spectrum(torch.logspace(0, -4, 80), 120, 80),
    "down to 1e-8": lambda: _spectrum(torch.logspace(0, -8, 80), 80, 120),
    "down to 1e-14": lambda: _spectrum(torch.logspace(0, -14, 80, dtype=torch.float64), 100, 100),
    "rank 7": lambda: _spectrum(torch.linspace(2, 1, 7), 60, 90),
    "two values": lambda: _spectrum(torch.tensor([3.0] * 30 + [1.0] * 30), 64, 60),
    "one large": lambda: _spectrum(torch.tensor([1e6] + [1.0] * 59), 60, 60),
    "zeros": lambda: torch.zeros(20, 30, dtype=torch.float64),
    "equal": lambda: torch.ones(30, 20, dtype=torch.float64),
    "identity": lambda: torch.eye(32, dtype=torch.float64),
    "one row": lambda: _random(1, 50).double(),
    "one column": lambda: _random(50, 1).double(),
    "huge": lambda: _random(40, 30).double() * 1e200,
    "tiny": lambda: _random(40, 30).double() * 1e-200,
}


@pytest.mark.parametrize("name", GRAM)
def test_the_gram_matrix_is_as_accurate_as_lapack_in_fp32(name: str) -> None:
    """In fp64, before anything is cast: residual, orthogonality, and every σ."""
    weight = GRAM[name]()
    U, S, Vh = lapack._gram(weight)
    S_true = torch.linalg.svdvals(weight)
    assert lapack.residual(weight, U, S, Vh, torch.float64) <= 1e-7
    for Q in (U, Vh.t()):
        assert float((Q.t() @ Q - torch.eye(Q.shape[1])).abs().max()) <= 1e-13
    assert bool((S[:-1] >= S[1:]).all() and (S >= 0).all())
    assert float((S - S_true).abs().max()) <= 2e-8 * float(S_true[0])
    if name in ("random", "tall", "down to 1e-4", "two values"):  # well conditioned
        assert lapack.residual(weight, U, S, Vh, torch.float64) <= 1e-11
        assert float((S - S_true).abs().max()) <= 1e-13 * float(S_true[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 96), (1, 8), (33, 33)])
def test_gram_keeps_what_decompose_promises(m: int, n: int, dtype: torch.dtype) -> None:
    weight = _random(m, n).to(dtype)
    factors = decompose(weight, method="gram", dtype=torch.float32)
    _check(weight, factors, 2e-7)
    exact = decompose(weight, precision="fp64", dtype=torch.float32)
    assert torch.allclose(factors.S, exact.S, rtol=1e-6)
    assert torch.allclose(factors.U[:, :8], exact.U[:, :8], atol=1e-4)  # the same signs
    stored = decompose(weight, method="gram", rank=1)
    assert stored.U.dtype == dtype and stored.rank == 1


@pytest.mark.parametrize("fault", ["residual", "orthogonality", "nan", "no convergence"])
def test_a_bad_gram_result_is_repeated_and_said(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight, gram = _random(32, 20), lapack._gram

    def sloppy(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if fault == "no convergence":
            raise torch.linalg.LinAlgError("no")
        U, S, Vh = gram(A)
        if fault == "residual":
            return U, S * (1 + 1e-5), Vh
        if fault == "nan":
            return U, S * float("nan"), Vh
        Vh[11] += 2e-5 * Vh[9]
        return U, S, Vh

    monkeypatch.setattr(lapack, "_gram", sloppy)
    with caplog.at_level("INFO"):
        factors, how = svd.decompose_and_tell(weight, None, None, "fp32", None, "gram")
    assert how == "svd fp64" and "repeating in fp64" in caplog.text and "gram" in caplog.text
    _check(weight, factors, 1e-7)


def test_which_method() -> None:
    weight = _random(8, 6)
    assert svd.decompose_and_tell(weight, None, None, "fp32", None, None)[1] == "svd fp32"
    assert svd.decompose_and_tell(weight, None, None, "fp32", None, "gram")[1] == "gram"
    assert svd._method(None, torch.float32, torch.device("cuda")) == "gram"
    assert svd._method(None, torch.float64, torch.device("cuda")) == "svd"
    with pytest.raises(ValueError, match="method must be one of .*got 'qdwh'"):
        decompose(weight, method="qdwh")
    for options in ({"precision": "fp64"}, {"dtype": torch.float64}):
        with pytest.raises(ValueError, match="errs by up to 2e-8.*Use method='svd'"):
            decompose(weight, method="gram", **options)  # type: ignore[arg-type]


def test_a_bad_fp32_result_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gesdd, seen = _random(32, 20), lapack._gesdd, []

    def sloppy(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seen.append(A.dtype)
        U, S, Vh = gesdd(A)
        if A.dtype == torch.float64:
            return U, S, Vh
        # Orthogonal, but W is missed by 1e-5.
        return U, S * (1 + 1e-5), Vh

    monkeypatch.setattr(lapack, "_gesdd", sloppy)
    _check(weight, decompose(weight), 1e-7)
    assert seen == [torch.float32, torch.float64]


def test_lost_orthogonality_is_seen() -> None:
    Q = torch.linalg.qr(_random(50, 30))[0]
    assert lapack._skew(Q) <= 1e-6
    assert lapack._skew(Q * (1 + 1e-5)) == pytest.approx(2e-5, rel=0.1)
    Q[:, 11] += 2e-5 * Q[:, 9]
    assert lapack._skew(Q) == pytest.approx(2e-5, rel=0.1)


def test_no_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(A: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(lapack, "_gesdd", fails)
    with pytest.raises(RuntimeError, match=r"\(4, 3\) weight did not converge"):
        decompose(torch.ones(4, 3))


def test_reconstruct() -> None:
    weight = _random(10, 6)
    factors = decompose(weight)
    d = (factors.S * 2).requires_grad_()
    assert torch.allclose(reconstruct(factors, d), weight * 2, atol=1e-6)
    reconstruct(factors, d).sum().backward()
    assert d.grad is not None and d.grad.shape == d.shape
    assert reconstruct(factors.to(dtype=torch.bfloat16)).dtype == torch.float32
    assert reconstruct(decompose(weight.double())).dtype == torch.float64
    with pytest.raises(ValueError, match=r"d must have shape \(r,\) = \(6,\), got \(5,\)"):
        reconstruct(factors, d[:5])


def test_fingerprint() -> None:
    bf16 = _random(70, 50).bfloat16()
    mark = fingerprint(bf16)
    assert len(mark) == 32 and int(mark, 16) >= 0
    assert mark == fingerprint(bf16.float()) == fingerprint(bf16.double())
    assert mark == fingerprint(bf16.t().contiguous().t())
    assert mark != fingerprint(bf16.t()) and mark != fingerprint(bf16.view(50, 70))
    other = bf16.clone()
    other[69, 49] *= 1.01
    assert mark != fingerprint(other)
    assert fingerprint(bf16[0]) != fingerprint(bf16[0, None])
    with pytest.raises(TypeError, match="floating-point"):
        fingerprint(torch.ones(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="meta"):
        fingerprint(torch.ones(2, device="meta"))


def test_fingerprint_is_pinned() -> None:
    """Experts in the field carry it: it must never change."""
    assert fingerprint(torch.arange(6.0).view(2, 3)) == "90320e24f3c9d8c306476ae08020aa13"


def test_fingerprint_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _random(33, 7)
    mark = fingerprint(weight)
    factors = decompose(weight)
    reached = accuracy(weight, factors)
    monkeypatch.setattr(svd, "_CHUNK_ELEMENTS", 20)
    monkeypatch.setattr(lapack, "_CHUNK_ELEMENTS", 20)
    assert fingerprint(weight) == mark
    assert accuracy(weight, factors).relative_error == pytest.approx(reached.relative_error)
    assert torch.equal(decompose(weight).U, factors.U)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(3), ValueError, "2-D"),
        (torch.ones(2, 3, 4), ValueError, "one matrix at a time"),
        (torch.ones(0, 4), ValueError, "empty"),
        (torch.ones(4, 0), ValueError, "empty"),
        (torch.ones(4, 4, dtype=torch.int8), TypeError, "int8"),
        (torch.ones(4, 4, dtype=torch.complex64), TypeError, "complex64"),
        (torch.eye(4).to_sparse(), TypeError, "sparse"),
        (torch.ones(4, 4, device="meta"), ValueError, "meta device"),
        (torch.tensor([[1.0, float("nan")]]), ValueError, "inf or NaN"),
        (torch.tensor([[1.0, float("inf")]]), ValueError, "inf or NaN"),
        (torch.full((4, 4), 3e38), ValueError, "overflow fp32"),
        ([[1.0]], TypeError, "list"),
    ],
)
def test_bad_weights(weight: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decompose(weight)


def test_bad_arguments() -> None:
    weight = torch.ones(4, 6)
    for rank in (0, -1, 5):
        with pytest.raises(ValueError, match=rf"rank must be in 1 .. min.* = 4 .*got {rank}"):
            decompose(weight, rank=rank)
    for wrong in (2.0, True, "4"):
        with pytest.raises(TypeError, match="rank must be an int"):
            decompose(weight, rank=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype must be one of"):
        decompose(weight, dtype=torch.int8)
    with pytest.raises(ValueError, match="'fp32' or 'fp64', got 'bf16'"):
        decompose(weight, precision="bf16")
    factors = decompose(weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(m, n\) = \(4, 6\)"):
        accuracy(weight.t(), factors)


def test_check_factors() -> None:
    good = decompose(_random(6, 4), rank=3)
    U, S, V = good
    nan = S.clone()
    nan[1] = float("nan")
    cases = [
        (SVDFactors(U, S[:2], V), ValueError, "expected U"),
        (SVDFactors(U, S, V.t()), ValueError, "not Vh"),
        (SVDFactors(U, nan, V), ValueError, "inf or NaN"),
        (SVDFactors(U, -S, V), ValueError, ">= 0"),
        (SVDFactors(U.half(), S, V), TypeError, "share one dtype"),
        (SVDFactors(U.int(), S, V.int()), TypeError, "share one dtype"),
        (SVDFactors(U, S.half(), V), TypeError, "S must be torch.float32"),
        (SVDFactors(U, S, V.contiguous()), ValueError, "contiguous"),
        (SVDFactors(U.t().contiguous().t(), S, V), ValueError, "contiguous"),
        (SVDFactors(U.to("meta"), S, V), ValueError, "one device"),
        (SVDFactors(U, None, V), TypeError, "S must be a tensor"),  # type: ignore[arg-type]
        ((U, S), TypeError, "expected SVDFactors"),
        (SVDFactors(U[:2], S, V), ValueError, "r must be in 1 .. min"),
    ]
    for factors, error, message in cases:
        with pytest.raises(error, match=message):
            check_factors(factors)  # type: ignore[arg-type]
    check_factors(good)
    check_factors(SVDFactors(*(t.to("meta") for t in (U, S)), V.t().to("meta").t()))


def test_a_steep_spectrum_is_measured_whole() -> None:
    """The error sits in the few directions of the large σ, where random probes miss it."""
    Q, P = (torch.linalg.qr(_random(200, 100, seed).double())[0] for seed in (1, 2))
    weight = (Q * torch.logspace(0, -8, 100) @ P.t()).float()
    U, S, Vh, how = lapack.thin_svd(weight, torch.float32)
    assert how == "svd fp32"
    want = accuracy(weight, decompose(weight)).relative_error
    assert lapack.residual(weight, U, S, Vh, torch.float64) == pytest.approx(want, rel=1e-3)
    S[0] *= 1 + 1e-5
    assert lapack.residual(weight, U, S, Vh, torch.float32) == pytest.approx(4e-6, rel=0.5)
    _check(weight, decompose(weight))


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n"), [(1536, 1536)])
def test_accuracy_of_a_real_size(m: int, n: int) -> None:
    weight = _random(m, n)
    _check(weight, decompose(weight))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("m", "n"), [(512, 512), (256, 1024), (1024, 256), (4096, 4096)])
def test_gpu(m: int, n: int) -> None:
    weight = _random(m, n)
    factors, how = svd.decompose_and_tell(weight.cuda(), None, None, "fp32", None, None)
    assert how == "gram"
    assert all(t.is_cuda for t in factors)
    _check(weight, factors.to("cpu"))
    assert fingerprint(weight.cuda()) == fingerprint(weight)
    assert decompose(weight, device="cuda").U.is_cuda
    exact = decompose(weight.cuda(), precision="fp64").to("cpu")
    _check(weight, exact, 1e-7)
    assert torch.allclose(factors.S.cpu(), exact.S, rtol=1e-6)
    # Same signs as on the CPU, where neighbouring singular values are apart.
    same = decompose(weight, precision="fp64")
    assert torch.allclose(exact.U[:, :8], same.U[:, :8], atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", GRAM)
def test_gpu_awkward(name: str) -> None:
    weight = GRAM[name]()
    U, S, Vh = lapack._gram(weight.cuda())
    S_true = torch.linalg.svdvals(weight)
    assert lapack.residual(weight, U.cpu(), S.cpu(), Vh.cpu(), torch.float64) <= 1e-7
    assert float((S.cpu() - S_true).abs().max()) <= 2e-8 * float(S_true[0])
