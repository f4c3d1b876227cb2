"""The thin SVD itself: the faster orientation, a check of the result, fp64 where fp32 is short.

Two things LAPACK's gesdd leaves open are settled here: how accurate a result is (fp32 loses about
a factor 1.3 with every doubling of the size) and the signs of its columns.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

__all__ = ["FP32_ORTHOGONALITY", "FP32_RELATIVE_ERROR", "measuring_dtype", "residual", "thin_svd"]

logger = logging.getLogger(__name__)

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


def thin_svd(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r,), Vh (r, n) of a finite 2-D weight, signs fixed.

    Computed in ``dtype``, fp32 or fp64. An fp32 result outside the bounds above is computed again
    and returned in fp64. Raises RuntimeError where fp64 does not converge.
    """
    try:
        U, S, Vh = _gesdd(weight.to(dtype))
    except torch.linalg.LinAlgError as error:
        if dtype == torch.float64:
            raise RuntimeError(
                f"decompose: the SVD of a {tuple(weight.shape)} weight did not converge: {error}"
            ) from error
        logger.info("fp32 SVD of %s did not converge, repeating in fp64", tuple(weight.shape))
        return thin_svd(weight, torch.float64)
    if dtype == torch.float32:
        measure = measuring_dtype(weight.device, dtype)
        error_ = residual(weight, U, S, Vh, measure)
        skew = max(_skew(U), _skew(Vh.t()))
        if error_ > _MARGIN * FP32_RELATIVE_ERROR or skew > _MARGIN * FP32_ORTHOGONALITY:
            logger.info(
                "fp32 SVD of %s has relative error %.1e, orthogonality %.1e: repeating in fp64",
                tuple(weight.shape),
                error_,
                skew,
            )
            return thin_svd(weight, torch.float64)
    # U diag(S) Vh stays what it is when a column of U and its row of Vh flip together.
    signs = _signs(U)
    return U.mul_(signs), S, Vh.mul_(signs[:, None])


def _gesdd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD by the tall orientation: gesdd takes 2.5 x longer on the wide one (1024 x 4096)."""
    tall = A.shape[0] >= A.shape[1]
    U, S, Vh = torch.linalg.svd(A if tall else A.t(), full_matrices=False)
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
