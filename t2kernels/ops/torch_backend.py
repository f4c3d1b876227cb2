"""The three-operation form in plain torch: runs on every device torch knows (cpu, cuda, mps, xpu).

Two library matrix products with the diagonal between them. Batch-invariant mode computes each row
by itself, which is slow and right by construction: a library may pick another kernel, and so
another order of summation, for every number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantized import is_eight_bit
from .layout import columns, member_calls
from .reference import accumulate_dtype, diagonal_rows
from .reference import group_unavailable as group_unavailable

NAME = "torch"


def unavailable(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> str | None:
    """Plain torch runs every call."""
    return None


def _wide(factor: Tensor, x: Tensor) -> Tensor:
    """An 8-bit factor is widened for the call; others are used as they are."""
    return factor.to(x.dtype) if is_eight_bit(factor.dtype) else factor


def _leaves_range(x: Tensor, factors: Tensor) -> bool:
    """Products of fp16 with unscaled 8-bit factors: all of it must be done in fp32."""
    return is_eight_bit(factors.dtype) and x.dtype == torch.float16


def _expand(hd: Tensor, U: Tensor, bias: Tensor | None) -> Tensor:
    """hd Uᵀ + bias."""
    return hd @ U.t() if bias is None else torch.addmm(bias, hd, U.t())


def _scaled(h: Tensor, rows: Tensor, *, keep: bool) -> Tensor:
    """h * rows in the wider dtype, rounded once to h.dtype; in place unless ``keep``."""
    return torch.mul(h, rows, out=torch.empty_like(h)) if keep else h.mul_(rows)


def forward(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    save_h: bool = False,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See ``reference.forward``; h is rounded to x.dtype by the first product as well."""
    if _leaves_range(x, U):
        wide = None if bias is None else bias.float()
        y, h = forward(
            x.float(), U, V, d, base, slot, wide, scale,
            save_h=save_h, batch_invariant=batch_invariant,
        )  # fmt: skip
        return y.to(x.dtype), h
    U, V = _wide(U, x), _wide(V, x)
    rows = diagonal_rows(d, base, slot, scale)  # (r,) or (T, r)
    if batch_invariant:
        return _forward_by_row(x, U, V, rows, bias, save_h)
    h = x @ V
    hd = _scaled(h, rows, keep=save_h)
    return _expand(hd, U, bias), h if save_h else None


def forward_group(
    x: Tensor,
    Us: Sequence[Tensor],
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
    *,
    batch_invariant: bool = False,
) -> list[Tensor]:
    """See ``reference.forward_group``; one first product for all members. A library's sums may
    depend on the width of a product: a member equals its own ``forward`` to rounding."""
    if batch_invariant:
        calls = member_calls(x, Us, V, d, base, slot, biases, scale)
        return [forward(*call, batch_invariant=True)[0] for call in calls]
    if _leaves_range(x, V):
        wide = [None if b is None else b.float() for b in biases]
        return [y.to(x.dtype) for y in forward_group(x.float(), Us, V, d, base, slot, wide, scale)]
    hd = _scaled(x @ _wide(V, x), diagonal_rows(d, base, slot, scale), keep=False)
    members = zip(Us, biases, columns(Us))
    return [_expand(hd[:, c], _wide(U, x), bias) for U, bias, c in members]


def _forward_by_row(
    x: Tensor, U: Tensor, V: Tensor, rows: Tensor, bias: Tensor | None, save_h: bool
) -> tuple[Tensor, Tensor | None]:
    y, h = x.new_empty(x.shape[0], U.shape[0]), x.new_empty(x.shape[0], U.shape[1])
    for t in range(x.shape[0]):
        # .contiguous(): the layout of the row may choose the kernel, and with it the bits.
        h[t] = (x[t : t + 1].contiguous() @ V)[0]
        hd = (h[t] * (rows if rows.dim() == 1 else rows[t])).to(x.dtype)
        y[t] = (hd.unsqueeze(0) @ U.t())[0]
    if bias is not None:
        y += bias
    return y, h if save_h else None


def backward(
    g: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None = None,
    h: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    need_dx: bool = True,
    need_dd: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """See ``reference.backward``. Per-slot sums are a product with the membership matrix: a fixed
    order of summation, where index_add would use atomics on a GPU."""
    acc = accumulate_dtype(x)
    if _leaves_range(x, U):
        # h is computed again: as it was kept, rounded to fp16, it may have left the range.
        dx, dd = backward(
            g.float(), x.float(), U, V, d, base, slot, None, scale, need_dx=need_dx, need_dd=need_dd
        )
        return None if dx is None else dx.to(x.dtype), dd
    U, V = _wide(U, x), _wide(V, x)
    gu = g @ U  # (T, r)
    dx = dd = None
    if need_dd:
        h = x @ V if h is None else h
        if slot is None:
            dd = torch.mul(h.to(acc), gu).sum(0)
        else:
            member = slot.unsqueeze(0) == torch.arange(d.shape[0], device=d.device).unsqueeze(1)
            dd = member.to(acc) @ torch.mul(h.to(acc), gu)  # (slots, r)
        if scale is not None:
            dd = dd * scale
    if need_dx:
        dx = _scaled(gu, diagonal_rows(d, base, slot, scale), keep=False) @ V.t()
    return dx, dd
