"""The thin SVD itself: the faster method, a check of the result, another method where it is short.

Two ways of computing W = U diag(S) Vᵀ, for the tall one of W and Wᵀ, A (m, n) with m ≥ n:

  "svd"   the library's: LAPACK's gesdd on a CPU, cuSOLVER's gesvd (QR iteration) on a GPU;
  "gram"  in fp64: V from the eigenvectors of AᵀA, then A·V = Q·R by Householder QR; U = Q with the
          signs of R's diagonal, S = |diag R|.

The second is meant for GPUs: three products, one symmetric eigenproblem by divide and conquer and
one QR, where the first is QR iteration in small steps. Forming AᵀA squares the condition number;
textbooks warn of that, and it is why the QR is there: A·V = Q·R holds to rounding whatever V is,
V and Q are orthonormal to rounding, and only what R has beside its diagonal is lost. That is about
ε·σ₁²/σᵢ in row i and never more than A·V itself has there, so at most some √ε·σ₁: 1e-8 in fp64. On
matrices with σ from 1 down to 1e-12, of low rank and with ties the residual was at most 2e-8, and σ
erred by 4e-9·σ₁, where gesdd in fp32 errs by 7e-7·σ₁; with σ down to 1e-4 it was 4e-13 and 3e-15.

Every result is measured. Two things libraries leave open are settled here: how accurate a result is
(gesdd in fp32 loses about a factor 1.3 with every doubling of the size) and the signs of columns.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FP32_ORTHOGONALITY", "FP32_RELATIVE_ERROR", "METHODS", "ThinSVD", "measuring_dtype",
    "no_autocast", "residual", "thin_svd",
]  # fmt: skip

logger = logging.getLogger(__name__)

#: ways to compute; see the top of this file
METHODS = ("gram", "svd")
#: bounds of an fp32 decomposition: ‖UΣVᵀ−W‖_F/‖W‖_F and max|UᵀU−I|, max|VᵀV−I|
FP32_RELATIVE_ERROR = 5e-6
FP32_ORTHOGONALITY = 1e-5
# The fp32 measurement itself errs by 3e-7 at 4096²; a result near a bound is redone.
_MARGIN = 0.95
# Columns whose σ are nearly equal lose orthogonality first; they stand side by side. On random
# matrices from 1024² to 2048² the worst 12 pairs are at most 2 apart.
_NEIGHBOURS = 4
_CHUNK_ELEMENTS = 1 << 22
# Entries this close to the largest of a column count as tied, so that structured matrices, whose
# entries tie exactly, get the same sign on every machine.
_TIE = 1e-3


class ThinSVD(NamedTuple):
    """U (m, r), S (r,), Vh (r, n), and by what they were made: "gram", "svd fp32", "svd fp64"."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    how: str


def thin_svd(weight: Tensor, dtype: torch.dtype, method: str = "svd") -> ThinSVD:
    """The thin SVD of a finite 2-D weight, signs fixed.

    "svd" computes in ``dtype``, fp32 or fp64. An fp32 or "gram" result outside the bounds above is
    computed again by "svd" and returned in fp64. Raises RuntimeError where that does not converge.
    """
    with no_autocast(weight.device):
        return _thin_svd(weight, dtype, method)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products on ``device`` in the dtype of their operands, whatever torch.autocast was told: what
    is made once of the weights stays. A device without values (meta) has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _thin_svd(weight: Tensor, dtype: torch.dtype, method: str) -> ThinSVD:
    how = "gram" if method == "gram" else f"svd {'fp64' if dtype == torch.float64 else 'fp32'}"
    try:
        U, S, Vh = _gram(weight) if method == "gram" else _gesdd(weight.to(dtype))
    except torch.linalg.LinAlgError as error:
        if how == "svd fp64":
            raise RuntimeError(
                f"decompose: the SVD of a {tuple(weight.shape)} weight did not converge: {error}"
            ) from error
        logger.info("%s of %s did not converge, repeating in fp64", how, tuple(weight.shape))
        return _thin_svd(weight, torch.float64, "svd")
    if how != "svd fp64":
        measure = measuring_dtype(weight.device, U.dtype)
        error_ = residual(weight, U, S, Vh, measure)
        skew = max(_skew(U), _skew(Vh.t()))
        # NaN is no success, so what is asked is whether both are within.
        if not (error_ <= _MARGIN * FP32_RELATIVE_ERROR and skew <= _MARGIN * FP32_ORTHOGONALITY):
            logger.info(
                "%s of %s has relative error %.1e, orthogonality %.1e: repeating in fp64",
                how,
                tuple(weight.shape),
                error_,
                skew,
            )
            return _thin_svd(weight, torch.float64, "svd")
    # U diag(S) Vh stays what it is when a column of U and its row of Vh flip together.
    signs = _signs(U)
    return ThinSVD(U.mul_(signs), S, Vh.mul_(signs[:, None]), how)


def _gram(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in fp64 by the eigenvectors of the Gram matrix and a QR; see the top."""
    A = weight.double()
    # Squares of fp64 weights could leave the range; a power of two changes no bit.
    largest = float(A.abs().max())
    unit = 2.0 ** math.frexp(largest)[1] if largest > 0 else 1.0
    A = A / unit
    tall = A.shape[0] >= A.shape[1]
    A = A if tall else A.t()
    # Eigenvalues come in ascending order.
    V = torch.linalg.eigh(A.t() @ A)[1].flip(1)
    Q, R = torch.linalg.qr(A @ V)
    diagonal = R.diagonal()
    S, order = (diagonal.abs() * unit).sort(descending=True, stable=True)
    Q = (Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q))[:, order]
    V = V[:, order]
    return (Q, S, V.t().contiguous()) if tall else (V.contiguous(), S, Q.t().contiguous())


def _gesdd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD by the tall orientation: gesdd takes 2.5 x longer on the wide one (1024 x 4096).

    On a GPU by gesvd: torch's first choice there, the Jacobi method gesvdj, is meant for small
    matrices and converges to a tolerance.
    """
    tall = A.shape[0] >= A.shape[1]
    driver = "gesvd" if A.is_cuda else None
    U, S, Vh = torch.linalg.svd(A if tall else A.t(), full_matrices=False, driver=driver)
    return (U, S, Vh) if tall else (Vh.t(), S, U.t())


def residual(weight: Tensor, U: Tensor, S: Tensor, Vh: Tensor, dtype: torch.dtype) -> float:
    """‖UΣVᵀ−W‖_F/‖W‖_F with products in ``dtype``; the absolute error for a weight of zeros.

    The whole product, by chunks of rows: a twentieth of the SVD's time. Random probes would be
    cheaper, but where σ decays the residual sits in a few directions and they miss it by 15 %.
    """
    # Scaled by the largest entry, so that squares neither overflow nor vanish.
    unit = float(weight.abs().max()) or 1.0
    right, d = Vh.to(dtype), (S.double() / unit).to(dtype)
    error = norm = 0.0
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for i in range(0, weight.shape[0], step):
        rows = weight[i : i + step].to(dtype) / unit
        norm += float(rows.square().sum())
        rows = torch.addmm(rows, U[i : i + step].to(dtype) * d, right, beta=-1)
        error += float(rows.square().sum())
    return (error / norm) ** 0.5 if norm > 0 else error**0.5


def measuring_dtype(device: torch.device, wanted: torch.dtype) -> torch.dtype:
    """On a GPU always fp64: fp32 products may be TF32 there, which sees nothing below 1e-3."""
    return torch.float64 if device.type == "cuda" else wanted


def _skew(Q: Tensor) -> float:
    """max |qᵢᵀqⱼ − δᵢⱼ| over columns at most ``_NEIGHBOURS`` apart."""
    worst = 0.0
    step = max(_NEIGHBOURS, _CHUNK_ELEMENTS // Q.shape[0])
    for start in range(0, Q.shape[1], step):
        block = Q[:, start : start + step + _NEIGHBOURS]
        for apart in range(min(_NEIGHBOURS + 1, block.shape[1])):
            dots = (block[:, apart:] * block[:, : block.shape[1] - apart]).sum(dim=0)
            worst = max(worst, float((dots - float(apart == 0)).abs().max()))
    return worst


def _signs(U: Tensor) -> Tensor:
    """(r,) of ±1 that make the first (nearly) largest entry of each column of U positive."""
    size = U.abs()
    # argmax gives the first of equal values.
    row = (size >= size.amax(dim=0) * (1 - _TIE)).to(torch.uint8).argmax(dim=0)
    lead = U.gather(0, row[None]).squeeze(0)
    return torch.where(lead < 0, -1.0, 1.0).to(U.dtype)
