"""dx = (gu ⊙ d_row) Vᵀ and dd[s] = Σ_{t: slot[t]=s} scale ⊙ h_t ⊙ gu_t, with gu = g U.

The epilogue of g U meets the saved h while gu is still in registers, so gu itself never passes
through memory. Every sum over tokens is taken in a fixed order; there are no atomics.
"""

# Kernel arguments are typed by Triton, at the launch.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._forward import expand, project
from .common import config
from .common.tiles import diagonal_tile, halves, product_tile, store_tile, tile_index

# Tokens per step and columns per program of the two reductions.
REDUCE_ROWS = 32
REDUCE_COLS = 128


@triton.jit
def gradient_epilogue(
    acc,
    tile_t,
    t,
    T,
    r_first,
    R,
    d_ptr,
    stride_d,
    base_ptr,
    slot_ptr,
    scale_ptr,
    h_ptr,
    gud_ptr,
    product_ptr,
    partial_ptr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """From gu: gu ⊙ d_row, and h ⊙ gu either stored or summed over the tile's tokens."""
    if COLS > CHUNK:
        left, right = halves(acc, ROWS, COLS)
        HALF: tl.constexpr = COLS // 2
        gradient_epilogue(
            left, tile_t, t, T, r_first, R, d_ptr, stride_d, base_ptr, slot_ptr, scale_ptr,
            h_ptr, gud_ptr, product_ptr, partial_ptr, ROWS, HALF, CHUNK,
        )  # fmt: skip
        gradient_epilogue(
            right, tile_t, t, T, r_first + HALF, R, d_ptr, stride_d, base_ptr, slot_ptr,
            scale_ptr, h_ptr, gud_ptr, product_ptr, partial_ptr, ROWS, HALF, CHUNK,
        )  # fmt: skip
    else:
        r = r_first + tl.arange(0, COLS)
        if gud_ptr is not None:
            rows = diagonal_tile(d_ptr, stride_d, base_ptr, slot_ptr, scale_ptr, t, T, r, R)
            store_tile(gud_ptr, R, t, T, r, R, acc * rows)
        if h_ptr is not None:
            inside = (t < T)[:, None] & (r < R)[None, :]
            h = tl.load(h_ptr + t[:, None] * R + r[None, :], mask=inside, other=0)
            # Rows beyond T are zero in both factors: they add nothing to the sum.
            product = acc * h.to(acc.dtype)
            if product_ptr is not None:
                store_tile(product_ptr, R, t, T, r, R, product)
            if partial_ptr is not None:
                total = tl.sum(product, axis=0)
                tl.store(partial_ptr + tile_t.to(tl.int64) * R + r, total, mask=r < R)


@triton.jit(do_not_specialize=["T"])
def gradient_kernel(
    g_ptr,  # (T, OUT), row stride stride_g
    stride_g,
    u_ptr,  # (OUT, R) contiguous
    d_ptr,  # (R,) or (slots, R), row stride stride_d
    stride_d,
    base_ptr,  # (R,)
    slot_ptr,  # (T,) int32 or None
    scale_ptr,  # (R,) or None
    h_ptr,  # (T, R) or None: x V, needed for dd
    gud_ptr,  # (T, R) or None: gu times d_row (and scale), for dx
    product_ptr,  # (T, R) or None: h times gu in ACC, for dd per slot
    partial_ptr,  # (token tiles, R) or None: its sum over each tile's tokens, for one dd
    T,
    OUT,
    R,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCKWISE: tl.constexpr,
):
    """gu = g U and what follows from it. One program per (BLOCK_T tokens, BLOCK_OUT columns of
    gu)."""
    tile_t, tile_r = tile_index(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(R, BLOCK_OUT), GROUP)
    t = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r_first = tile_r.to(tl.int64) * BLOCK_OUT
    acc = product_tile(
        g_ptr, stride_g, t, T, u_ptr, R, 1, r_first + tl.arange(0, BLOCK_OUT), R, OUT,
        ACC, BLOCK_T, BLOCK_OUT, BLOCK_INNER, EVEN_INNER, WEIGHTS_FIRST, UPCAST, BLOCKWISE,
    )  # fmt: skip
    gradient_epilogue(
        acc, tile_t, t, T, r_first, R, d_ptr, stride_d, base_ptr, slot_ptr, scale_ptr,
        h_ptr, gud_ptr, product_ptr, partial_ptr, BLOCK_T, BLOCK_OUT, CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ROWS"])
def finalise_kernel(
    partial_ptr,  # (ROWS, COLS), row stride stride_partial
    stride_partial,
    slot_ptr,  # (ROWS,) int32 or None
    scale_ptr,  # (COLS,) or None
    out_ptr,  # (COLS,), or (slots, COLS) with slot_ptr: row stride stride_out
    stride_out,
    ROWS,
    COLS,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """out[s] = scale ⊙ Σ_i partial[i], over all rows i or over those with slot[i] = s, from the
    first row to the last. One program per (BLOCK_COLS columns, slot): it walks every row number
    but reads only the rows that are its own, so all slots together read ``partial`` once."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    own = tl.program_id(1)
    in_cols = c < COLS
    total = tl.zeros((BLOCK_COLS,), dtype=out_ptr.dtype.element_ty)
    for first in range(0, ROWS, BLOCK_ROWS):
        i = first + tl.arange(0, BLOCK_ROWS)
        wanted = i < ROWS
        if slot_ptr is not None:
            wanted = wanted & (tl.load(slot_ptr + i, mask=wanted, other=-1) == own)
        if tl.max(wanted.to(tl.int32), axis=0) > 0:
            rows = tl.load(
                partial_ptr + i.to(tl.int64)[:, None] * stride_partial + c[None, :],
                mask=wanted[:, None] & in_cols[None, :],
                other=0,
            )
            total += tl.sum(rows, axis=0)
    if scale_ptr is not None:
        total = total * tl.load(scale_ptr + c, mask=in_cols, other=0)
    tl.store(out_ptr + own.to(tl.int64) * stride_out + c, total, mask=in_cols)


def finalise(partial: Tensor, out: Tensor, slot: Tensor | None, scale: Tensor | None) -> None:
    """Sum ``partial`` (rows, cols) into ``out`` (cols,), or per slot into (slots, cols)."""
    rows, cols = partial.shape
    per_slot = slot is not None
    slots = out.shape[0] if per_slot else 1
    if cols == 0 or slots == 0:
        return
    with config.on_device(partial):
        finalise_kernel[(triton.cdiv(cols, REDUCE_COLS), slots)](
            partial, partial.stride(0), slot, scale, out, out.stride(0) if per_slot else 0,
            rows, cols, BLOCK_ROWS=REDUCE_ROWS, BLOCK_COLS=REDUCE_COLS, **config.SMALL,
        )  # fmt: skip


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
    """(dx (T, n) in x.dtype, dd like d): the backend contract of ``ops/reference.py``.

    ``h`` is recomputed where it was not saved. Memory beyond the results: gu ⊙ d_row (T, r) in
    x.dtype for dx; for dd one (r,) row per token tile, or h ⊙ gu (T, r) in fp32 with slots.
    """
    (T, OUT), R = g.shape, U.shape[1]
    if not (need_dx or need_dd):
        return None, None
    if g.stride(-1) != 1 and g.shape[-1] > 1:
        g = g.contiguous()
    dd = torch.empty(d.shape, dtype=d.dtype, device=d.device) if need_dd else None
    if dd is not None and (T == 0 or R == 0):
        dd.zero_()
    if T == 0 or R == 0:
        return (torch.zeros_like(x) if need_dx else None), dd

    tile = config.choose(T, R, g, U)
    gud = torch.empty((T, R), dtype=x.dtype, device=x.device) if need_dx else None
    summands = None
    if need_dd:
        # Without its scale, x times 8-bit factors leaves fp16's range, also as it was saved.
        wide = scale is not None and x.dtype == torch.float16
        if h is None or wide:
            h = torch.empty((T, R), dtype=d.dtype if wide else x.dtype, device=x.device)
            project(x, V, d, base, slot, scale, h=h, hd=None)
        # One row per token tile, or per token where tokens of a tile may differ in their slot.
        rows = T if slot is not None else triton.cdiv(T, tile.tokens)
        summands = torch.empty((rows, R), dtype=d.dtype, device=d.device)
    with config.on_device(g):
        gradient_kernel[config.grid(tile, T, R)](
            g, g.stride(0), U, d, d.stride(0) if d.dim() == 2 else 0, base, slot, scale,
            h if need_dd else None, gud,
            None if slot is None else summands, summands if slot is None else None,
            T, OUT, R, **config.constants(tile, g, OUT), CHUNK=tile.chunk, **config.options(tile),
        )  # fmt: skip
    if dd is not None and summands is not None:
        finalise(summands, dd, slot, scale)
    dx = None if gud is None else expand(gud, V.t(), None, transposed=True)
    return dx, dd
