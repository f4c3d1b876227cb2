"""The definition of truth: the SVF product and its gradients in eager torch, one line per step.

Every other backend is tested against this file run in fp64. It is written to be read, not to be
fast: each intermediate is kept in the accumulation dtype and rounded where the contract says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import member_calls

NAME = "reference"


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
    """The reference runs everywhere."""
    return None


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """fp32 for everything up to fp32, fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def diagonal_rows(d: Tensor, base: Tensor, slot: Tensor | None, scale: Tensor | None) -> Tensor:
    """The diagonal of every token: (r,) for one d, (T, r) with slots; slot -1 selects ``base``."""
    if slot is None:
        rows = d
    else:
        table = torch.cat([d, base.unsqueeze(0)])
        rows = table[torch.where(slot < 0, d.shape[0], slot.long())]
    return rows if scale is None else rows * scale


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
    """y = ((x V) * d_row) Uᵀ + bias, accumulated in fp32 (fp64), h*d rounded once to x.dtype."""
    if batch_invariant and x.shape[0] > 1:  # row by row: no product may know the others
        tokens = range(x.shape[0])
        at = [slice(t, t + 1) for t in tokens]
        slots = [None if slot is None else slot[s] for s in at]
        parts = [
            forward(x[s], U, V, d, base, own, bias, scale, save_h=save_h)
            for s, own in zip(at, slots)
        ]
        h_all = torch.cat([h for _, h in parts if h is not None]) if save_h else None
        return torch.cat([y for y, _ in parts]), h_all
    acc = accumulate_dtype(x)
    h = x.to(acc) @ V.to(acc)  # (T, r)
    hd = (h * diagonal_rows(d, base, slot, scale)).to(x.dtype)  # (T, r), the one rounding
    y = hd.to(acc) @ U.to(acc).t()  # (T, m)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype), h.to(x.dtype) if save_h else None


def group_unavailable(
    x: Tensor,
    Us: Sequence[Tensor],
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
) -> str | None:
    """The reference runs every group."""
    return None


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
    """Layers that share x: y_i = ((x V_i) * d_row_i) U_iᵀ + bias_i for every member i.

    V (n, R) holds the members' V side by side (stored one under another, as (R, n)), and so do d
    (R,) or (slots, R), base (R,) and scale (R,): R is the sum of the ranks. ``Us`` are (m_i, r_i),
    ``biases`` (m_i,) or None; returns the y_i (T, m_i). By definition each is the member's own
    ``forward``; what a backend may share is the reading of x and the launches.
    """
    calls = member_calls(x, Us, V, d, base, slot, biases, scale)
    return [forward(*call, batch_invariant=batch_invariant)[0] for call in calls]


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
    """dx = ((g U) * d_row) Vᵀ and dd[s] = Σ_{t: slot[t]=s} scale * h[t] * (g U)[t]."""
    acc = accumulate_dtype(x)
    gu = g.to(acc) @ U.to(acc)  # (T, r)
    dx = dd = None
    if need_dd:
        h = x.to(acc) @ V.to(acc) if h is None else h.to(acc)
        contribution = h * gu if scale is None else h * gu * scale  # (T, r)
        if slot is None:
            dd = contribution.sum(0)
        else:
            member = slot.unsqueeze(0) == torch.arange(d.shape[0], device=d.device).unsqueeze(1)
            dd = member.to(acc) @ contribution  # (slots, r)
    if need_dx:
        dx = ((gu * diagonal_rows(d, base, slot, scale)) @ V.to(acc).t()).to(x.dtype)
    return dx, dd
