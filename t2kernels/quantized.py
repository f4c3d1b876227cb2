"""int8 factors: half the bytes of bf16, so that decoding with both factors costs what W costs.

Weight-only: activations keep their dtype. Every column of U and of V has one fp32 scale,

    U ≈ U_q diag(u_scale),   V ≈ V_q diag(v_scale),   U_q, V_q in -127 .. 127,

and because the scales stand on the r axis, where d already stands, they cost nothing:

    y = ((x V_q) ⊙ (d ⊙ scale)) U_qᵀ,   scale = u_scale ⊙ v_scale.

The user's d and its gradient keep their meaning: d' = dL/dd is scaled inside the op.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .svd import SVDFactors, check_factors

__all__ = ["QuantizedFactors", "dequantize", "quantize"]

_LEVELS = 127
# Fractions of a column's largest entry tried as clip. 4096 Gaussian numbers reach 3.9 standard
# deviations, near the best clip of 8 bits; columns with outliers want less.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.45, 0.3)
# Elements quantised at a time: bounds the temporaries (five of 8 MiB).
_BLOCK = 1 << 21


class QuantizedFactors(NamedTuple):
    """int8 factors of one weight: W ≈ U diag(u_scale ⊙ S ⊙ v_scale) Vᵀ.

    ``U`` (m, r) int8 contiguous; ``S`` (r,) fp32; ``V`` (n, r) int8, a view of a contiguous
    (r, n) matrix; ``u_scale``, ``v_scale`` (r,) fp32, > 0; ``dtype``: of the activations, the
    dtype of the factors that were quantised.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    u_scale: Tensor
    v_scale: Tensor
    dtype: torch.dtype

    @property
    def scale(self) -> Tensor:
        """(r,) fp32: what stands beside d inside the op."""
        return self.u_scale * self.v_scale

    @property
    def rank(self) -> int:
        return self.S.shape[0]

    @property
    def in_features(self) -> int:
        return self.V.shape[0]

    @property
    def out_features(self) -> int:
        return self.U.shape[0]

    def to(
        self,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantizedFactors:
        """The same factors elsewhere; ``dtype`` changes only the tag."""
        return QuantizedFactors(
            self.U.to(device=device),
            self.S.to(device=device),
            self.V.t().to(device=device).t(),
            self.u_scale.to(device=device),
            self.v_scale.to(device=device),
            self.dtype if dtype is None else dtype,
        )


def quantize(factors: SVDFactors, bits: int = 8) -> QuantizedFactors:
    """int8 factors with one symmetric scale for each column of U and of V.

    For every column a few clips are tried, q = clamp(round(w / s), -127, 127) with s = clip / 127,
    and the one with the least ‖w − s q‖² is kept; s is then the least-squares scale of its q.

    Error: on random orthonormal factors each matrix errs by about 0.9 %, the output by 1.25 %
    (relative, 2048² and 4096²); the accumulated products themselves add nothing of that order.

    Args:
        factors: U (m, r), S (r,), V (n, r) in fp32, bf16 or fp16 (fp64 becomes fp32 first).
        bits: 8, the only width there is a kernel for.

    Gradients: none. Cost: a dozen passes over U and V.

    >>> import torch
    >>> from t2kernels.svd import decompose
    >>> f = decompose(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)))
    >>> q = quantize(f)
    >>> q.U.dtype, q.scale.shape
    (torch.int8, torch.Size([48]))
    >>> bool((dequantize(q).U - f.U).norm() < 0.01 * f.U.norm())
    True
    """
    if bits != 8:
        raise ValueError(f"quantize: bits must be 8, got {bits!r}. Kernels read int8 factors only.")
    check_factors(factors, what="quantize: factors")
    U, S, V = factors
    dtype = torch.float32 if U.dtype == torch.float64 else U.dtype
    for name, t in (("U", U), ("V", V)):
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"quantize: {name} holds inf or NaN. Decompose the weight again.")
    # Both go through as (rows, length) with one scale a row. U's columns are strided: the blocks
    # of rows of U.t() are copied one at a time.
    u_q = torch.empty_like(U, dtype=torch.int8)
    vh_q = torch.empty_like(V.t(), dtype=torch.int8)
    u_scale = _quantize_rows(U.t(), u_q.t())
    v_scale = _quantize_rows(V.t(), vh_q)
    return QuantizedFactors(u_q, S.float().clone(), vh_q.t(), u_scale, v_scale, dtype)


def dequantize(factors: QuantizedFactors, dtype: torch.dtype | None = None) -> SVDFactors:
    """SVDFactors whose U and V are the values the int8 ones stand for, in ``dtype`` (the tag's).

    Equivalent to ``SVDFactors(q.U * q.u_scale, q.S, q.V * q.v_scale)``.
    """
    if not isinstance(factors, QuantizedFactors):
        raise TypeError(
            f"dequantize: factors must be QuantizedFactors, got {type(factors).__name__}."
        )
    dtype = factors.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dequantize: dtype must be a float, got {dtype}.")
    vh = factors.V.t().float() * factors.v_scale[:, None]
    S = factors.S.double() if dtype == torch.float64 else factors.S.clone()
    return SVDFactors((factors.U.float() * factors.u_scale).to(dtype), S, vh.to(dtype).t())


def _quantize_rows(rows: Tensor, out: Tensor) -> Tensor:
    """Fills ``out`` (r, length) int8 from ``rows``; returns the scale (r,) fp32 of each row."""
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].float().contiguous()
        largest = block.abs().amax(dim=1, keepdim=True)
        # A zero row has no scale; 1 keeps the product finite and the row zero.
        largest = torch.where(largest > 0, largest, _LEVELS)
        best_error = best_scale = best_q = None
        for clip in _CLIPS:
            s = largest * (clip / _LEVELS)
            q = (block / s).round_().clamp_(-_LEVELS, _LEVELS)
            error = (block - q * s).square_().sum(dim=1, keepdim=True)
            if best_error is None or best_scale is None or best_q is None:
                best_error, best_scale, best_q = error, s, q
                continue
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, s, best_scale)
            best_q = torch.where(better, q, best_q)
        if best_q is None or best_scale is None:
            raise RuntimeError("quantize: no clip was tried.")
        square = best_q.square().sum(dim=1, keepdim=True)
        fitted = (block * best_q).sum(dim=1, keepdim=True) / square
        out[start : start + step] = best_q.to(torch.int8)
        scale[start : start + step] = torch.where(square > 0, fitted, best_scale).squeeze(1)
    return scale
