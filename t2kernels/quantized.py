"""8-bit factors: half the bytes of bf16, so that decoding with both factors costs what W costs.

Weight-only: activations keep their dtype. Every column of U and of V has one fp32 scale,

    U ≈ U_q diag(u_scale),   V ≈ V_q diag(v_scale),

with U_q and V_q whole numbers from -127 to 127 ("int8") or 8-bit floats of four exponent and three
mantissa bits, up to ±448 ("fp8", torch.float8_e4m3fn).

and because the scales stand on the r axis, where d already stands, they cost nothing:

    y = ((x V_q) ⊙ (d ⊙ scale)) U_qᵀ,   scale = u_scale ⊙ v_scale.

The user's d and its gradient keep their meaning: d' = dL/dd is scaled inside the op.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .svd import SVDFactors, check_factors

__all__ = ["FACTOR_KINDS", "QuantizedFactors", "dequantize", "is_eight_bit", "quantize"]

#: The kinds of 8-bit factors by name. Whatever speaks of them reads this list.
FACTOR_KINDS: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_NAMES = {dtype: name for name, dtype in FACTOR_KINDS.items()}
# The largest magnitude of each kind.
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Fractions of a column's largest entry tried as clip. 4096 Gaussian numbers reach 3.9 standard
# deviations, near the best clip of 8 bits; columns with outliers want less.
_INT8_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.45, 0.3)
# A float's relative step is the same in every octave, so nothing is gained by clipping. What counts
# is where the entries fall within an octave: the largest lands on 448 or anywhere down to 244.
_CLIPS = {torch.int8: _INT8_CLIPS, torch.float8_e4m3fn: tuple(2 ** (i / 8) for i in range(8))}
# Elements quantised at a time: bounds the temporaries (five of 8 MiB).
_BLOCK = 1 << 21


class QuantizedFactors(NamedTuple):
    """8-bit factors of one weight: W ≈ U diag(u_scale ⊙ S ⊙ v_scale) Vᵀ.

    ``U`` (m, r) int8 or float8_e4m3fn, contiguous; ``S`` (r,) fp32; ``V`` (n, r) like U, a view of
    a contiguous (r, n) matrix; ``u_scale``, ``v_scale`` (r,) fp32, > 0; ``dtype``: of the
    activations, the dtype of the factors that were quantised. No entry is NaN (fp8 has one bit
    pattern for it, which kernels are free to read as ±480).
    """

    U: Tensor
    S: Tensor
    V: Tensor
    u_scale: Tensor
    v_scale: Tensor
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """A name of ``FACTOR_KINDS``."""
        return _NAMES[self.U.dtype]

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


def is_eight_bit(dtype: torch.dtype) -> bool:
    """Whether U and V in ``dtype`` are 8-bit factors, which a scale stands beside.

    >>> is_eight_bit(torch.int8), is_eight_bit(torch.bfloat16)
    (True, False)
    """
    return dtype in _NAMES


def check_kind(kind: str | None, what: str, hint: str = "") -> None:
    """Raises ValueError unless ``kind`` is a name of ``FACTOR_KINDS``."""
    if kind not in FACTOR_KINDS:
        names = " or ".join(f'"{name}"' for name in FACTOR_KINDS)
        raise ValueError(f"{what} must be {names}, got {kind!r}.{hint}")


def quantize(factors: SVDFactors, kind: str = "int8") -> QuantizedFactors:
    """8-bit factors with one symmetric scale for each column of U and of V.

    For every column a few scales s are tried, q = round(w / s) to the nearest value of the kind,
    never beyond its largest, and the one with the least ‖w − s q‖² is kept; s is then the
    least-squares scale of its q. "int8" tries to clip outliers, "fp8" where in an octave the
    column falls.

    Error: on random orthonormal factors each matrix errs by about 0.9 % (fp8: 2.6 %), the output by
    1.25 % (3.7 %; relative, 2048² and 4096²); the accumulated products themselves add nothing of
    that order. int8 spends its bits evenly, the better way for the columns of most weights; fp8
    keeps its relative error for entries of any size, the better way for weights with heavy tails
    (Student's t with two degrees of freedom: 2.6 to 2.9 %, int8 3.1 to 3.8 %).

    Args:
        factors: U (m, r), S (r,), V (n, r) in fp32, bf16 or fp16 (fp64 becomes fp32 first).
        kind: "int8" or "fp8", see ``FACTOR_KINDS``.

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
    check_kind(kind, "quantize: kind")
    check_factors(factors, what="quantize: factors")
    U, S, V = factors
    dtype = torch.float32 if U.dtype == torch.float64 else U.dtype
    for name, t in (("U", U), ("V", V)):
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"quantize: {name} holds inf or NaN. Decompose the weight again.")
    # Both go through as (rows, length) with one scale a row. U's columns are strided: the blocks
    # of rows of U.t() are copied one at a time.
    u_q = torch.empty_like(U, dtype=FACTOR_KINDS[kind])
    vh_q = torch.empty_like(V.t(), dtype=FACTOR_KINDS[kind])
    u_scale = _quantize_rows(U.t(), u_q.t())
    v_scale = _quantize_rows(V.t(), vh_q)
    return QuantizedFactors(u_q, S.float().clone(), vh_q.t(), u_scale, v_scale, dtype)


def dequantize(factors: QuantizedFactors, dtype: torch.dtype | None = None) -> SVDFactors:
    """SVDFactors whose U and V are the values the 8-bit ones stand for, in ``dtype`` (the tag's).

    Equivalent to ``SVDFactors(q.U * q.u_scale, q.S, q.V * q.v_scale)``.
    """
    if not isinstance(factors, QuantizedFactors):
        raise TypeError(
            f"dequantize: factors must be QuantizedFactors, got {type(factors).__name__}."
        )
    dtype = factors.dtype if dtype is None else dtype
    if not dtype.is_floating_point or is_eight_bit(dtype):
        raise TypeError(f"dequantize: dtype must be a float of 16 bits or more, got {dtype}.")
    vh = factors.V.t().float() * factors.v_scale[:, None]
    S = factors.S.double() if dtype == torch.float64 else factors.S.clone()
    return SVDFactors((factors.U.float() * factors.u_scale).to(dtype), S, vh.to(dtype).t())


def _quantize_rows(rows: Tensor, out: Tensor) -> Tensor:
    """Fills ``out`` (r, length) from ``rows``; returns the scale (r,) fp32 of each row."""
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].float().contiguous()
        largest = block.abs().amax(dim=1, keepdim=True)
        # A zero row has no scale; 1 keeps the product finite and the row zero.
        largest = torch.where(largest > 0, largest, 1)
        block = block / largest
        q = _best_of_clips(block, out.dtype)
        square = q.square().sum(dim=1, keepdim=True)
        fitted = largest * ((block * q).sum(dim=1, keepdim=True) / square)
        out[start : start + step] = q.to(out.dtype)
        scale[start : start + step] = torch.where(square > 0, fitted, largest).squeeze(1)
    return scale


def _best_of_clips(block: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values q of ``dtype`` with the least ‖block − s q‖² in every row over the scales s that
    are tried. ``block``: rows whose largest magnitude is 1, or zero."""
    top, best = _LARGEST[dtype], torch.zeros_like(block)
    least = torch.full_like(block[:, :1], float("inf"))
    for clip in _CLIPS[dtype]:
        s = clip / top
        q = _rounded((block / s).clamp_(-top, top), dtype)
        error = (block - q * s).square_().sum(dim=1, keepdim=True)
        best = torch.where(error < least, q, best)
        least = torch.minimum(error, least)
    return best


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``values`` within the range of ``dtype``, rounded to it, ties to even."""
    return values.round_() if dtype == torch.int8 else values.to(dtype).float()
