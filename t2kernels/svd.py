"""Weight -> factors: W = U diag(S) Vᵀ, once per weight, checked and reproducible.

A layer of Transformer² keeps U, S and V of its weight and never forms W again, so the error made
here is in everything that follows. The decomposition is therefore checked where it is made: a
result that misses its bound is redone in fp64 (``lapack.py``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .lapack import METHODS, measuring_dtype, no_autocast, residual, thin_svd

__all__ = [
    "Accuracy",
    "SVDFactors",
    "accuracy",
    "check_factors",
    "decompose",
    "fingerprint",
    "reconstruct",
]

# Elements handled at a time by fingerprint: a few tens of MiB for the widest layers.
_CHUNK_ELEMENTS = 1 << 22
_PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SVDFactors(NamedTuple):
    """Thin singular value decomposition of one weight: W (m, n) = U diag(S) Vᵀ, r = min(m, n).

    ``U`` (m, r) contiguous; ``S`` (r,) fp32, descending, >= 0 (fp64 beside fp64 factors);
    ``V`` (n, r), a view of a contiguous (r, n) matrix, because that is the layout in which the
    first product x V reads rows: ``V.t().is_contiguous()``.
    """

    U: Tensor
    S: Tensor
    V: Tensor

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
    ) -> SVDFactors:
        """The same factors elsewhere; ``dtype`` is that of U and V, S stays in fp32 or fp64."""
        dtype = self.U.dtype if dtype is None else dtype
        # Vh, not V, is moved: .to() of the view is free to give another layout.
        return SVDFactors(
            self.U.to(device=device, dtype=dtype),
            self.S.to(device=device, dtype=_sigma_dtype(dtype)),
            self.V.t().to(device=device, dtype=dtype).t(),
        )


@dataclass(frozen=True)
class Accuracy:
    """How well factors stand for a weight: ‖UΣVᵀ−W‖_F/‖W‖_F, max|UᵀU−I|, max|VᵀV−I|."""

    relative_error: float
    orthogonality_u: float
    orthogonality_v: float


def decompose(
    weight: Tensor,
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    precision: str = "fp32",
    device: str | torch.device | None = None,
    method: str | None = None,
) -> SVDFactors:
    """Thin SVD W = U diag(S) Vᵀ with fixed signs (paper, section 3.1).

    Equivalent to ``U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)`` followed by
    the sign rule below and a cast of U and V.

    Signs: in every column of U the first entry whose magnitude is within 0.1 % of the largest of
    that column is positive. Singular values are descending and never negative. Columns that share
    one singular value (or σ = 0) are fixed only up to a rotation: experts carry a fingerprint of
    the weight for that reason.

    Args:
        weight: (m, n) = (out_features, in_features), fp32, bf16, fp16 or fp64, any strides. Pass
            ``weight.t()`` for GPT-2's Conv1D.
        rank: keep the ``rank`` largest singular values, 1 .. min(m, n); None keeps all.
        dtype: of U and V; None is the dtype of ``weight``. bf16 factors alone differ from W by
            about 3e-3, fp32 ones by less than 5e-6.
        precision: "fp32" computes in fp32 and, where the result would miss
            ``‖UΣVᵀ−W‖/‖W‖ ≤ 5e-6`` or ``max|UᵀU−I| ≤ 1e-5``, once more in fp64.
            "fp64" computes in fp64: with fp32 factors the error is then that of rounding, below
            1e-7. fp64 factors are always computed in fp64.
        device: where to compute and leave the result; None is the weight's. Devices without an
            SVD of their own (mps, xpu) compute on the CPU.
        method: "svd" is the library's routine; "gram" goes by the eigenvectors of WᵀW and a QR,
            in fp64, to the bounds of "fp32" (not with precision="fp64" or fp64 factors); see
            ``lapack.py``. None: "gram" on a GPU where it may be, else "svd".

    Returns:
        ``SVDFactors(U (m, r), S (r,), V (n, r))``; S is fp32 (fp64 if U and V are fp64).

    Gradients: none, the weight is detached.

    Raises:
        TypeError: ``weight`` is no dense floating-point tensor, or a dtype that is not a float.
        ValueError: not 2-D, empty, on the meta device, inf or NaN inside; rank out of range;
            unknown precision.
        RuntimeError: LAPACK did not converge even in fp64.

    Cost: LAPACK's gesdd on a CPU; memory at its peak: see ``decompose_checkpoint``.

    >>> import torch
    >>> f = decompose(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]))
    >>> f.S
    tensor([4., 3.])
    >>> torch.allclose(reconstruct(f), torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]))
    True
    """
    return decompose_and_tell(weight, rank, dtype, precision, device, method)[0]


def decompose_and_tell(
    weight: Tensor,
    rank: int | None,
    dtype: torch.dtype | None,
    precision: str,
    device: str | torch.device | None,
    method: str | None,
) -> tuple[SVDFactors, str]:
    """``decompose``, and what made the result: "gram", "svd fp32" or "svd fp64"."""
    _check_weight(weight)
    m, n = weight.shape
    full = min(m, n)
    if rank is None:
        rank = full
    elif isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"decompose: rank must be an int or None, got {rank!r}.")
    elif not 1 <= rank <= full:
        raise ValueError(
            f"decompose: rank must be in 1 .. min(out, in) = {full} for a weight of shape "
            f"{(m, n)}, got {rank}. Leave it out to keep all."
        )
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in _FLOATS:
        raise TypeError(f"decompose: dtype must be one of {_dtype_names()}, got {dtype}.")
    if precision not in _PRECISIONS:
        raise ValueError(f"decompose: precision must be 'fp32' or 'fp64', got {precision!r}.")

    target = weight.device if device is None else torch.device(device)
    place = target if target.type in ("cpu", "cuda") else torch.device("cpu")
    source = weight.detach().to(place)
    if not bool(torch.isfinite(source).all()):
        raise ValueError(
            f"decompose: weight of shape {(m, n)} holds inf or NaN. "
            "Is the checkpoint damaged, or was it cast to fp16 out of range?"
        )
    compute = torch.float64 if dtype == torch.float64 else _PRECISIONS[precision]
    U, S, Vh, how = thin_svd(source, compute, _method(method, compute, place))
    factors = SVDFactors(
        U[:, :rank].to(dtype).contiguous(),
        S[:rank].to(_sigma_dtype(dtype)).contiguous(),
        Vh[:rank].to(dtype).contiguous().t(),
    )
    if not bool(torch.isfinite(factors.S).all()):
        raise ValueError(
            f"decompose: the singular values of a weight of shape {(m, n)} overflow fp32 "
            f"(entries up to {float(source.abs().max()):.1e}). Scale the weight, or use "
            "dtype=torch.float64."
        )
    return factors if place == target else factors.to(target), how


def _method(method: str | None, compute: torch.dtype, place: torch.device) -> str:
    """A name of ``lapack.METHODS``."""
    if method is None:
        return "gram" if place.type == "cuda" and compute == torch.float32 else "svd"
    if method not in METHODS:
        raise ValueError(f"decompose: method must be one of {METHODS} or None, got {method!r}.")
    if method == "gram" and compute == torch.float64:
        raise ValueError(
            "decompose: method='gram' errs by up to 2e-8, which is too much for precision='fp64' "
            "and fp64 factors. Use method='svd' or precision='fp32'."
        )
    return method


def reconstruct(factors: SVDFactors, d: Tensor | None = None) -> Tensor:
    """W' = U diag(d) Vᵀ (m, n), d = S where None; in fp32 (fp64 for fp64 factors), also
    under autocast.

    Equivalent to ``(U.float() * d) @ V.float().t()``. ``d`` (r,) takes gradients.

    >>> import torch
    >>> f = decompose(torch.eye(3) * 2)
    >>> bool((reconstruct(f, f.S * 3) == torch.eye(3) * 6).all())
    True
    """
    U, S, V = factors
    if d is None:
        d = S
    elif d.shape != S.shape:
        raise ValueError(
            f"reconstruct: d must have shape (r,) = {tuple(S.shape)}, got {tuple(d.shape)}. "
            "Was it made for another layer or another rank?"
        )
    dtype = _sigma_dtype(U.dtype)
    with no_autocast(U.device):
        return (U.to(dtype) * d.to(dtype)) @ V.to(dtype).t()


def accuracy(weight: Tensor, factors: SVDFactors, *, precision: str = "fp64") -> Accuracy:
    """Measures ‖UΣVᵀ−W‖_F/‖W‖_F, max|UᵀU−I| and max|VᵀV−I| of ``factors`` against ``weight``.

    ``precision`` is that of the measurement: "fp32" is faster and good down to about
    5e-7 (on a GPU it is fp64 too), "fp64" resolves everything. A weight of zeros has the absolute
    error instead. Memory: Vh in that precision and one r x r matrix beside the arguments.
    """
    _check_weight(weight)
    check_factors(factors)
    if precision not in _PRECISIONS:
        raise ValueError(f"accuracy: precision must be 'fp32' or 'fp64', got {precision!r}.")
    U, S, V = factors
    if weight.shape != (U.shape[0], V.shape[0]):
        raise ValueError(
            f"accuracy: weight must have shape (m, n) = {(U.shape[0], V.shape[0])} as the factors "
            f"say, got {tuple(weight.shape)}."
        )
    # A device without fp64 (mps) is left for the CPU.
    place = U.device if U.device.type in ("cpu", "cuda") else torch.device("cpu")
    U, S, V = (t.to(place) for t in factors)
    dtype = measuring_dtype(place, _PRECISIONS[precision])
    with no_autocast(place):
        relative = residual(weight.detach().to(place), U, S, V.t(), dtype)
        return Accuracy(relative, _orthogonality(U.to(dtype)), _orthogonality(V.to(dtype)))


def check_factors(factors: SVDFactors, *, what: str = "factors") -> None:
    """Raises unless shapes, dtypes, devices and layout agree and σ is finite and >= 0.

    Reads S once (a sync on a GPU): meant for the door, not for every call.
    """
    if not isinstance(factors, tuple) or len(factors) != 3:
        raise TypeError(f"{what}: expected SVDFactors(U, S, V), got {type(factors).__name__}.")
    U, S, V = factors
    for name, t in (("U", U), ("S", S), ("V", V)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{what}: {name} must be a tensor, got {type(t).__name__}.")
    if U.ndim != 2 or V.ndim != 2 or S.ndim != 1 or not (U.shape[1] == V.shape[1] == S.shape[0]):
        raise ValueError(
            f"{what}: expected U (m, r), S (r,), V (n, r), got {tuple(U.shape)}, "
            f"{tuple(S.shape)}, {tuple(V.shape)}. V is (n, r), not Vh (r, n)."
        )
    if S.shape[0] > min(U.shape[0], V.shape[0]) or S.shape[0] < 1:
        raise ValueError(
            f"{what}: r must be in 1 .. min(m, n) = {min(U.shape[0], V.shape[0])}, "
            f"got {S.shape[0]}."
        )
    if U.dtype != V.dtype or U.dtype not in _FLOATS:
        raise TypeError(
            f"{what}: U and V must share one dtype of {_dtype_names()}, "
            f"got {U.dtype} and {V.dtype}."
        )
    if S.dtype != _sigma_dtype(U.dtype):
        raise TypeError(
            f"{what}: S must be {_sigma_dtype(U.dtype)} beside {U.dtype} factors, got {S.dtype}. "
            "σ stays in fp32 whatever the dtype of the model."
        )
    if not (U.device == S.device == V.device):
        raise ValueError(
            f"{what}: U, S and V must be on one device, got {U.device}, {S.device}, {V.device}."
        )
    if not (U.is_contiguous() and V.t().is_contiguous()):
        raise ValueError(
            f"{what}: U must be contiguous and V a view of a contiguous (r, n) matrix, got strides "
            f"{U.stride()} and {V.stride()}. Use V = V.t().contiguous().t()."
        )
    if S.device.type == "meta":
        return
    if not bool(torch.isfinite(S).all()):
        raise ValueError(f"{what}: S holds inf or NaN. Decompose the weight again.")
    if bool((S < 0).any()):
        raise ValueError(
            f"{what}: S must be >= 0, got {float(S.min())}. Move the sign into U: "
            "decompose() never makes negative singular values."
        )


def fingerprint(weight: Tensor) -> str:
    """32 hex digits of sha256 over the shape and the values rounded to bf16, row-major.

    One bf16 checkpoint loaded as fp32 or as bf16 has one fingerprint, on any device and with any
    strides; so an expert can say which base weight it belongs to. A Conv1D weight is taken as
    (out, in), i.e. transposed by the caller. Reads the weight in chunks.

    >>> import torch
    >>> w = torch.arange(6.0).view(2, 3)
    >>> fingerprint(w) == fingerprint(w.bfloat16()), fingerprint(w) == fingerprint(w.t())
    (True, False)
    """
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"fingerprint: weight must be a floating-point tensor, got {got}.")
    if weight.device.type == "meta":
        raise ValueError(
            "fingerprint: weight is on the meta device and has no values. Load it first."
        )
    weight = weight.detach()
    digest = hashlib.sha256(("x".join(str(s) for s in weight.shape) + ":bf16:").encode())
    rows = weight.reshape(1, -1) if weight.ndim < 2 else weight
    step = max(1, _CHUNK_ELEMENTS // max(1, rows[:1].numel()))
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step].to(torch.bfloat16).contiguous().cpu()
        digest.update(chunk.view(torch.int16).numpy().astype("<i2", copy=False).data)
    return digest.hexdigest()[:32]


def _orthogonality(Q: Tensor) -> float:
    gram = Q.t() @ Q
    gram.diagonal().sub_(1)
    return float(gram.abs().max())


def _sigma_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dtype_names() -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in _FLOATS)


def _check_weight(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}.")
    if weight.layout != torch.strided or weight.dtype not in _FLOATS:
        raise TypeError(
            f"weight must be a dense tensor of {_dtype_names()}, got {weight.dtype} "
            f"({str(weight.layout).removeprefix('torch.')}). Dequantise or densify it first."
        )
    if weight.ndim != 2:
        raise ValueError(
            f"weight must be 2-D (out_features, in_features), got shape {tuple(weight.shape)}. "
            "Stacked experts are decomposed one matrix at a time."
        )
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}.")
    if weight.device.type == "meta":
        raise ValueError(
            "weight is on the meta device and has no values. Load the checkpoint first."
        )
