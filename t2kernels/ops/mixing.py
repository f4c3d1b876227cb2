"""K experts into rows of an arena, all layers at once: the diagonals that a product takes.

    D[rows[i]] = S ⊙ (1 + Σ_k α[i, k] (Z[indices[i, k]] − 1))

One function, four backends, chosen like those of the product (``dispatch``): native on a CPU,
torch elsewhere, CUDA and Triton kernels when asked for by name. Experts are added in the order of
their columns and an expert of weight 0 adds nothing, so a row's bits depend on no other row; every
backend rounds every step to fp32, and all agree in every bit. There is no gradient here: mixing
weights that want one are mixed inside the layers (``diagonal.mix``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import cuda, dispatch, native
from .layout import TYPE_CODES

__all__ = ["DEVIATION_DTYPE", "mix_rows"]

#: A table of this dtype holds z − 1: near 1 a bf16 z would have no room for the deviation.
DEVIATION_DTYPE = torch.bfloat16


class Mixing(NamedTuple):
    """The arguments of ``mix_rows``: what every backend gets, checked and contiguous."""

    out: Tensor
    S: Tensor
    Z: Tensor
    alpha: Tensor
    indices: Tensor | None
    rows: Tensor | None
    offsets: Tensor | None
    longest: int | None


@torch.no_grad()
def mix_rows(
    out: Tensor,
    S: Tensor,
    Z: Tensor,
    alpha: Tensor,
    *,
    indices: Tensor | None = None,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    longest: int | None = None,
) -> None:
    """Write B mixtures into rows of ``out`` in one launch; no other row is touched.

    Equivalent to ``out[rows[i]] = S * (1 + Σ_k alpha[i, k] * (Z[indices[i, k]] - 1))``.

    Args:
        out: (slots, R) fp32, contiguous rows.
        S: (R,) fp32, the base diagonals of all layers side by side.
        Z: (experts, R) multipliers, fp32; or bf16, which holds z − 1, so that the error of d is
            at most σ Σ_k |α_k| |z_k − 1| / 256. Contiguous rows, row stride free.
        alpha: (B, K) fp32, or (B, L, K) with ``offsets``.
        indices: (B, K) int32, the expert of each column, -1 = none. Default: column k is expert k.
        rows: (B,) int32, the row of ``out`` to write, -1 = none; distinct. Default: row i.
        offsets: (L + 1,) int64, the column at which each layer begins; the last is R.
        longest: columns of the longest layer, with ``offsets``.

    An index outside [-1, experts) gives a row of NaN, never another expert. A row outside
    [-1, slots) is an error on a CPU and is not written on a GPU.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        RuntimeError: a backend was asked for by name and cannot mix here.
    """
    call = Mixing(out, S, Z, alpha, indices, rows, offsets, longest)
    _check(call)
    if alpha.shape[0] == 0 or S.shape[0] == 0:
        return
    _choose(out)(
        call._replace(
            alpha=alpha.contiguous(),
            indices=_contiguous(indices),
            rows=_contiguous(rows),
            offsets=_contiguous(offsets),
        )
    )


_Backend = Callable[[Mixing], None]


def _choose(out: Tensor) -> _Backend:
    """The backend: the one asked for by name, else native on a CPU and torch elsewhere."""
    name = dispatch.forced_backend()
    if name is None:
        name = "native" if out.device.type == "cpu" and native._MISSING is None else "torch"
        return _BACKENDS[name]
    dispatch.load(name)  # an unknown name is an error
    reason = _unavailable(name, out)
    if reason is not None:
        raise RuntimeError(
            f"backend {name!r} was asked for (t2kernels.backend or T2_BACKEND) and cannot mix "
            f"experts: {reason}. Unset it to let the policy choose."
        )
    return _BACKENDS[name]


def _unavailable(name: str, out: Tensor) -> str | None:
    if name == "native":
        if native._MISSING is not None:
            return native._MISSING
        return None if out.device.type == "cpu" else f"the arena is on {out.device}, not the cpu"
    if name == "cuda":
        if cuda._missing is not None:
            return cuda._missing
        on_cpu = out.device.type != "cuda"
        return f"the arena is on {out.device}" if on_cpu else cuda._device_reason(cuda._index(out))
    if name == "triton":
        reason: str | None = dispatch.load("triton").mix_unavailable(out)
        return reason
    return None


def _native_mix(call: Mixing) -> None:
    native._native.mix(*_addresses(call), torch.get_num_threads())


def _cuda_mix(call: Mixing) -> None:
    if cuda._native is None:
        raise RuntimeError(f"backend 'cuda': {cuda._missing}")
    cuda._native.cuda_mix(*_addresses(call), cuda._index(call.out), cuda._stream(call.out))


def _addresses(call: Mixing) -> tuple[int, ...]:
    """The arguments that csrc/cpu/mix.h and csrc/cuda/mix.h have in common."""
    out, S, Z, alpha, indices, rows, offsets, _ = call
    layers = 1 if offsets is None else alpha.shape[1]
    # fmt: off
    return (
        S.data_ptr(), Z.data_ptr(), Z.stride(0), Z.shape[0], TYPE_CODES[Z.dtype],
        alpha.data_ptr(), *(0 if t is None else t.data_ptr() for t in (indices, rows, offsets)),
        layers, out.data_ptr(), out.stride(0), out.shape[0],
        alpha.shape[0], alpha.shape[-1], S.shape[0],
    )
    # fmt: on


def _torch_mix(call: Mixing) -> None:
    """Any device."""
    out, S, Z, alpha, indices, rows, offsets, _ = call
    (B, K), experts, R = (alpha.shape[0], alpha.shape[-1]), Z.shape[0], S.shape[0]
    weights = alpha
    if offsets is not None:
        sizes = offsets.diff()
        weights = alpha.repeat_interleave(sizes, dim=1, output_size=R)  # (B, R, K)
    total = S.new_ones(B, R)
    foreign = torch.zeros(B, 1, dtype=torch.bool, device=S.device)
    for k in range(K):
        if indices is None:
            z = Z[k].expand(B, R)
            there = torch.ones(B, 1, dtype=torch.bool, device=S.device)
        else:
            expert = indices[:, k].long()
            foreign |= ((expert < -1) | (expert >= experts)).unsqueeze(1)
            there = ((expert >= 0) & (expert < experts)).unsqueeze(1)
            z = Z.index_select(0, expert.clamp(0, experts - 1)) if experts else S.expand(B, R)
        deviation = z.float() if Z.dtype == DEVIATION_DTYPE else z - 1
        a = weights[..., k] if offsets is not None else weights[:, k : k + 1]
        total = torch.where(there & (a != 0), total + a * deviation, total)
    d = torch.where(foreign, float("nan"), S * total)
    if rows is None:
        out[:B] = d
        return
    place = rows.long()
    if rows.device.type == "cpu":
        if bool(((place < -1) | (place >= out.shape[0])).any()):
            raise ValueError(f"mix_rows: rows must lie in [-1, {out.shape[0]}), got {rows}.")
        out[place[place >= 0]] = d[place >= 0]
        return
    # One after another and without a wait: an entry of -1 writes some row back as it was.
    for i in range(B):
        at = place[i : i + 1].clamp(0, out.shape[0] - 1)
        there = (place[i] >= 0) & (place[i] < out.shape[0])
        out.index_copy_(0, at, torch.where(there, d[i : i + 1], out.index_select(0, at)))


def _triton_mix(call: Mixing) -> None:
    dispatch.load("triton").mix(call)


_BACKENDS: dict[str, _Backend] = {
    "reference": _torch_mix,
    "torch": _torch_mix,
    "native": _native_mix,
    "triton": _triton_mix,
    "cuda": _cuda_mix,
}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _check(call: Mixing) -> None:
    """Metadata only: values of ``indices`` and ``rows`` would cost a wait for the GPU."""
    out, S, Z, alpha, indices, rows, offsets, longest = call
    _check_tensors(out, S, Z)
    if alpha.dtype is not torch.float32:
        raise TypeError(f"mix_rows: alpha must be float32, got {alpha.dtype}.")
    layered = offsets is not None
    if layered != (longest is not None):
        raise ValueError("mix_rows: offsets and longest (columns of the longest layer) go together")
    if alpha.dim() != 2 + layered:
        expected = "(B, L, K)" if layered else "(B, K)"
        raise ValueError(f"mix_rows: alpha must be {expected}, got {tuple(alpha.shape)}.")
    B, K = alpha.shape[0], alpha.shape[-1]
    if offsets is not None and (
        offsets.shape != (alpha.shape[1] + 1,) or offsets.dtype is not torch.int64
    ):
        got = f"{offsets.dtype} {tuple(offsets.shape)}"
        raise ValueError(
            f"mix_rows: offsets must be int64 (L + 1,) = ({alpha.shape[1] + 1},), got {got}."
        )
    if indices is None and Z.shape[0] < K:
        raise ValueError(
            f"mix_rows: alpha has {K} columns for {Z.shape[0]} experts. For a few experts of many "
            "pass their numbers as indices."
        )
    for name, tensor, shape in (("indices", indices, (B, K)), ("rows", rows, (B,))):
        if tensor is not None and (tensor.shape != shape or tensor.dtype is not torch.int32):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"mix_rows: {name} must be int32 {shape}, got {got}.")
    if rows is None and out.shape[0] < B:
        raise ValueError(f"mix_rows: out has {out.shape[0]} rows for {B} mixtures.")
    for name, tensor in (("alpha", alpha), ("indices", indices), ("rows", rows)):
        if tensor is not None and tensor.device != out.device:
            raise ValueError(f"mix_rows: {name} is on {tensor.device}, out on {out.device}.")


def _check_tensors(out: Tensor, S: Tensor, Z: Tensor) -> None:
    if S.dim() != 1 or S.dtype is not torch.float32 or not S.is_contiguous():
        raise ValueError(
            f"mix_rows: S must be contiguous fp32 (R,), got {S.dtype} {tuple(S.shape)}."
        )
    R = S.shape[0]
    for name, matrix, dtypes in (
        ("Z", Z, (torch.float32, DEVIATION_DTYPE)),
        ("out", out, (torch.float32,)),
    ):
        if matrix.dim() != 2 or matrix.shape[1] != R or (R > 1 and matrix.stride(1) != 1):
            raise ValueError(
                f"mix_rows: {name} must be (·, R) = (·, {R}) with contiguous rows, got "
                f"{tuple(matrix.shape)}, strides {matrix.stride()}."
            )
        if matrix.dtype not in dtypes:
            raise TypeError(f"mix_rows: {name} must be one of {dtypes}, got {matrix.dtype}.")
        if matrix.device != S.device:
            raise ValueError(f"mix_rows: {name} is on {matrix.device}, S on {S.device}.")
