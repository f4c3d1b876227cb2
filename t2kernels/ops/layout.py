"""What the kernels of every compiled backend ask of their arguments: dtypes and memory layout."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..quantized import FACTOR_KINDS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The type codes of csrc/cpu/svf_cpu.h and csrc/cuda/svf_cuda.h.
TYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}


# Layers in one group, for every compiled backend: q, k, v and one more.
MAX_MEMBERS = 4


def columns(Us: Sequence[Tensor]) -> list[slice]:
    """Each member's columns of a group's V, d, base and scale: side by side, in order."""
    ends = accumulate(U.shape[1] for U in Us)
    return [slice(end - U.shape[1], end) for U, end in zip(Us, ends)]


def member_calls(
    x: Tensor,
    Us: Sequence[Tensor],
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
) -> Iterator[
    tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
]:
    """A group's members as calls of their own: what ``forward`` takes, for each."""
    for U, bias, c in zip(Us, biases, columns(Us)):
        yield x, U, V[:, c], d[..., c], base[c], slot, bias, None if scale is None else scale[c]


def unfit(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    floats: Container[torch.dtype] = FLOATS,
    kinds: Sequence[str] = ("int8",),
) -> str | None:
    """Why no kernel can run this call, or None. Metadata only: no sync, a few microseconds.

    ``floats``: the dtypes of x that the backend has; ``kinds``: the 8-bit factors it can read.
    """
    dtype = x.dtype
    if dtype not in floats:
        return f"x is {dtype}; float32, bfloat16 or float16 is needed"
    if U.dtype is not V.dtype or (
        U.dtype is not dtype and all(U.dtype is not FACTOR_KINDS[kind] for kind in kinds)
    ):
        readable = " or ".join(kinds)
        return f"U and V are {U.dtype} and {V.dtype}; expected {dtype} like x, or {readable}"
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    if d.dtype is not wide or base.dtype is not wide:
        return f"d and base are {d.dtype} and {base.dtype}; expected {wide}"
    if not U.is_contiguous():
        return "U must be a contiguous (m, r) matrix"
    if not V.t().is_contiguous():
        return "V must be stored as a contiguous (r, n) matrix"
    if x.stride(1) != 1 and x.shape[1] != 1:
        return "the last dimension of x must be contiguous"
    if d.stride(-1) != 1 and d.shape[-1] != 1:
        return "the last dimension of d must be contiguous"
    if not base.is_contiguous():
        return "base must be contiguous"
    if slot is not None and (slot.dtype is not torch.int32 or not slot.is_contiguous()):
        return f"slot is {slot.dtype}; expected a contiguous int32 vector"
    if bias is not None and (bias.dtype is not dtype or not bias.is_contiguous()):
        return f"bias is {bias.dtype}; expected a contiguous vector of {dtype}"
    if scale is not None and (scale.dtype is not torch.float32 or not scale.is_contiguous()):
        return f"scale is {scale.dtype}; expected a contiguous float32 vector"
    return None


def unfit_group(
    x: Tensor,
    Us: Sequence[Tensor],
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
    floats: Container[torch.dtype] = FLOATS,
    kinds: Sequence[str] = ("int8",),
) -> str | None:
    """``unfit`` for layers that share x: V and what goes with it hold all members' columns."""
    if not 1 <= len(Us) <= MAX_MEMBERS:
        return f"the group has {len(Us)} members; 1 to {MAX_MEMBERS} are needed"
    reason = unfit(x, Us[0], V, d, base, slot, biases[0], scale, floats, kinds)
    for i in range(1, len(Us)):
        if reason is not None:
            break
        reason = _unfit_member(x.dtype, V.dtype, Us[i], biases[i])
        reason = reason and f"member {i}: {reason}"
    return reason


def _unfit_member(
    dtype: torch.dtype, factors: torch.dtype, U: Tensor, bias: Tensor | None
) -> str | None:
    if U.dtype is not factors:
        return f"U is {U.dtype}; expected {factors} like the group's V"
    if not U.is_contiguous():
        return "U must be a contiguous (m, r) matrix"
    if bias is not None and (bias.dtype is not dtype or not bias.is_contiguous()):
        return f"bias is {bias.dtype}; expected a contiguous vector of {dtype}"
    return None
