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
from .common.tiles import diagonal_tile, halves, own_tiles, product_tile, store_tile, tile_index

# Rows per step and columns per program of the two reductions.
REDUCE_ROWS = 32
REDUCE_COLS = 128
# Consecutive tokens whose h ⊙ gu is summed in registers where they share a slot: the rows of the
# tensor-core instruction that lie within one warp.
RUN = tl.constexpr(16)


@triton.jit
def run_slots(slot_ptr, t, T, RUNS: tl.constexpr):
    """For RUNS · RUN consecutive tokens ``t``: each run's slots (RUNS, RUN), its lowest slot, and
    whether all its tokens have that one. Tokens from T on belong to any slot."""
    slot = tl.reshape(tl.load(slot_ptr + t, mask=t < T, other=-1), (RUNS, RUN))
    inside = tl.reshape(t < T, (RUNS, RUN))
    lowest = tl.min(tl.where(inside, slot, 2147483647), axis=1)
    highest = tl.max(tl.where(inside, slot, -1), axis=1)
    return slot, lowest, lowest >= highest


@triton.jit
def store_runs(product, product_ptr, slot_ptr, t_first, t, T, r, R, ROWS: tl.constexpr,
               COLS: tl.constexpr):  # fmt: skip
    """h ⊙ gu for dd per slot: the sum over each run of tokens of one slot, at the row of its first
    token; the tokens of a mixed run each at its own row. All other rows stay unwritten."""
    RUNS: tl.constexpr = ROWS // RUN
    _, _, uniform = run_slots(slot_ptr, t, T, RUNS)
    first = t_first + tl.arange(0, RUNS) * RUN
    total = tl.sum(tl.reshape(product, (RUNS, RUN, COLS)), axis=1)
    tl.store(
        product_ptr + first[:, None] * R + r[None, :],
        total,
        mask=(uniform & (first < T))[:, None] & (r < R)[None, :],
    )
    if tl.min(uniform.to(tl.int32), axis=0) == 0:
        alone = tl.broadcast_to((uniform == 0)[:, None], (RUNS, RUN))
        alone = tl.reshape(alone, (ROWS,)) & (t < T)
        mask = alone[:, None] & (r < R)[None, :]
        tl.store(product_ptr + t[:, None] * R + r[None, :], product, mask=mask)


@triton.jit
def gradient_epilogue(
    acc,
    tile_t,
    t_first,
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
    """From gu: gu ⊙ d_row, and h ⊙ gu summed over tokens as far as the tile can."""
    if COLS > CHUNK:
        left, right = halves(acc, ROWS, COLS)
        HALF: tl.constexpr = COLS // 2
        gradient_epilogue(
            left, tile_t, t_first, T, r_first, R, d_ptr, stride_d, base_ptr, slot_ptr, scale_ptr,
            h_ptr, gud_ptr, product_ptr, partial_ptr, ROWS, HALF, CHUNK,
        )  # fmt: skip
        gradient_epilogue(
            right, tile_t, t_first, T, r_first + HALF, R, d_ptr, stride_d, base_ptr, slot_ptr,
            scale_ptr, h_ptr, gud_ptr, product_ptr, partial_ptr, ROWS, HALF, CHUNK,
        )  # fmt: skip
    else:
        t = t_first + tl.arange(0, ROWS)
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
                store_runs(product, product_ptr, slot_ptr, t_first, t, T, r, R, ROWS, COLS)
            if partial_ptr is not None:
                total = tl.sum(product, axis=0)
                tl.store(partial_ptr + tile_t.to(tl.int64) * R + r, total, mask=r < R)


@triton.jit(do_not_specialize=["T"])
def gradient_kernel(
    g,  # (T, OUT), row stride stride_g: pointer, or with DESCRIPTORS a tensor descriptor
    stride_g,
    u,  # (OUT, R) contiguous, likewise
    d_ptr,  # (R,) or (slots, R), row stride stride_d
    stride_d,
    base_ptr,  # (R,)
    slot_ptr,  # (T,) int32 or None
    scale_ptr,  # (R,) or None
    h_ptr,  # (T, R) or None: x V, needed for dd
    gud_ptr,  # (T, R) or None: gu times d_row (and scale), for dx
    product_ptr,  # (T, R) or None: h times gu in ACC, see ``store_runs``, for dd per slot
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
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """gu = g U and what follows from it, in tiles of (BLOCK_T tokens, BLOCK_OUT columns of gu)."""
    tiles_t, tiles_r = tl.cdiv(T, BLOCK_T), tl.cdiv(R, BLOCK_OUT)
    first, last, step = own_tiles(tiles_t * tiles_r, PERSISTENT)
    for tile in tl.range(first, last, step, flatten=PERSISTENT):
        tile_t, tile_r = tile_index(tile, tiles_t, tiles_r, GROUP)
        acc = product_tile(
            g, stride_g, tile_t * BLOCK_T, T, u, R, 1, tile_r * BLOCK_OUT, R, OUT,
            ACC, BLOCK_T, BLOCK_OUT, BLOCK_INNER, EVEN_INNER, WEIGHTS_FIRST, UPCAST, BLOCKWISE,
            DESCRIPTORS, True,
        )  # fmt: skip
        gradient_epilogue(
            acc, tile_t, tile_t.to(tl.int64) * BLOCK_T, T, tile_r.to(tl.int64) * BLOCK_OUT, R,
            d_ptr, stride_d, base_ptr, slot_ptr, scale_ptr,
            h_ptr, gud_ptr, product_ptr, partial_ptr, BLOCK_T, BLOCK_OUT, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["ROWS"])
def finalise_kernel(
    partial_ptr,  # (ROWS, COLS), row stride stride_partial
    stride_partial,
    scale_ptr,  # (COLS,) or None
    out_ptr,  # (COLS,)
    ROWS,
    COLS,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """out = scale ⊙ Σ_i partial[i], from the first row to the last. One program per BLOCK_COLS
    columns."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_cols = c < COLS
    total = tl.zeros((BLOCK_COLS,), dtype=out_ptr.dtype.element_ty)
    for first in range(0, ROWS, BLOCK_ROWS):
        i = first + tl.arange(0, BLOCK_ROWS)
        rows = tl.load(
            partial_ptr + i.to(tl.int64)[:, None] * stride_partial + c[None, :],
            mask=(i < ROWS)[:, None] & in_cols[None, :],
            other=0,
        )
        total += tl.sum(rows, axis=0)
    if scale_ptr is not None:
        total = total * tl.load(scale_ptr + c, mask=in_cols, other=0)
    tl.store(out_ptr + c, total, mask=in_cols)


@triton.jit(do_not_specialize=["T"])
def finalise_slots_kernel(
    product_ptr,  # (T, COLS): what ``store_runs`` wrote
    slot_ptr,  # (T,) int32
    scale_ptr,  # (COLS,) or None
    out_ptr,  # (slots, COLS), row stride stride_out
    stride_out,
    T,
    COLS,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """out[s] = scale ⊙ Σ_{t: slot[t]=s} product[t], in one fixed order. One program per (BLOCK_COLS
    columns, slot): it looks at every slot number, BLOCK_RUNS · RUN in a step, but reads only rows
    of its own, so all slots together read what was written once."""
    c = tl.program_id(1).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    own = tl.program_id(0)
    in_cols = c < COLS
    total = tl.zeros((BLOCK_COLS,), dtype=out_ptr.dtype.element_ty)
    for first in range(0, T, BLOCK_RUNS * RUN):
        t = first + tl.arange(0, BLOCK_RUNS * RUN)
        slot, lowest, uniform = run_slots(slot_ptr, t, T, BLOCK_RUNS)
        head = first + tl.arange(0, BLOCK_RUNS)[:, None].to(tl.int64) * RUN
        whole = uniform & (lowest == own)
        if tl.max(whole.to(tl.int32), axis=0) > 0:
            mask = whole[:, None] & in_cols[None, :]
            rows = tl.load(product_ptr + head * COLS + c[None, :], mask=mask, other=0)
            total += tl.sum(rows, axis=0)
        mine = (slot == own) & (uniform == 0)[:, None]
        if tl.max(tl.max(mine.to(tl.int32), axis=1), axis=0) > 0:
            for j in range(RUN):
                token = head + j
                at = tl.load(slot_ptr + token, mask=token < T, other=-1) == own
                mask = at & (uniform == 0)[:, None] & in_cols[None, :]
                rows = tl.load(product_ptr + token * COLS + c[None, :], mask=mask, other=0)
                total += tl.sum(rows, axis=0)
    if scale_ptr is not None:
        total = total * tl.load(scale_ptr + c, mask=in_cols, other=0)
    tl.store(out_ptr + own.to(tl.int64) * stride_out + c, total, mask=in_cols)


def finalise(partial: Tensor, out: Tensor, slot: Tensor | None, scale: Tensor | None) -> None:
    """Sum ``partial`` (rows, cols) into ``out`` (cols,); with ``slot`` (rows,) what ``store_runs``
    made of it into (slots, cols)."""
    rows, cols = partial.shape
    if out.numel() == 0:
        return
    columns = triton.cdiv(cols, REDUCE_COLS)
    with config.on_device(partial):
        if slot is None:
            finalise_kernel[(columns,)](
                partial, partial.stride(0), scale, out, rows, cols,
                BLOCK_ROWS=REDUCE_ROWS, BLOCK_COLS=REDUCE_COLS, **config.SMALL,
            )  # fmt: skip
        else:
            finalise_slots_kernel[(out.shape[0], columns)](  # axis 1 ends at 65,535
                partial, slot, scale, out, out.stride(0), rows, cols,
                BLOCK_RUNS=REDUCE_ROWS, BLOCK_COLS=REDUCE_COLS, **config.SMALL,
            )  # fmt: skip


def gradient(
    g: Tensor,
    U: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    scale: Tensor | None,
    *,
    h: Tensor | None,
    gud: Tensor | None,
) -> Tensor | None:
    """Write gu ⊙ d_row into ``gud`` (T, r); with ``h`` return what ``finalise`` makes dd of."""
    (T, OUT), R = g.shape, U.shape[1]
    tile = config.choose("gradient", T, R, OUT, g, U)
    tile = config.with_descriptors(tile, g, U)
    summands = None
    if h is not None:
        tile = tile if slot is None else config.for_slots(tile)
        # One row per token tile; room for one per token where those of a tile differ in slot.
        rows = T if slot is not None else triton.cdiv(T, tile.tokens)
        summands = torch.empty((rows, R), dtype=d.dtype, device=d.device)
    left, right = config.operands(tile, g, U, inner_first=True)
    with config.on_device(g):
        gradient_kernel[config.grid(tile, T, R, g.device)](
            left, g.stride(0), right, d, d.stride(0) if d.dim() == 2 else 0, base, slot, scale,
            h, gud, None if slot is None else summands, summands if slot is None else None,
            T, OUT, R, **config.constants(tile, g, OUT), **config.options(tile),
        )  # fmt: skip
    return summands


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
    x.dtype for dx; for dd one (r,) row per token tile, or with slots (T, r) in fp32, of which only
    a row per run of 16 tokens is touched where the run has one slot.
    """
    T, R = g.shape[0], U.shape[1]
    if not (need_dx or need_dd):
        return None, None
    if g.stride(-1) != 1 and g.shape[-1] > 1:
        g = g.contiguous()
    dd = torch.empty(d.shape, dtype=d.dtype, device=d.device) if need_dd else None
    if dd is not None and (T == 0 or R == 0):
        dd.zero_()
    if T == 0 or R == 0:
        return (torch.zeros_like(x) if need_dx else None), dd

    gud = torch.empty((T, R), dtype=x.dtype, device=x.device) if need_dx else None
    if need_dd:
        # Without its scale, x times 8-bit factors leaves fp16's range, also as it was saved.
        wide = scale is not None and x.dtype == torch.float16
        if h is None or wide:
            h = torch.empty((T, R), dtype=d.dtype if wide else x.dtype, device=x.device)
            project(x, V, d, base, slot, scale, h=h, hd=None)
    summands = gradient(g, U, d, base, slot, scale, h=h if need_dd else None, gud=gud)
    if dd is not None and summands is not None:
        finalise(summands, dd, slot, scale)
    dx = None if gud is None else expand(gud, V.t(), None, transposed=True)
    return dx, dd
