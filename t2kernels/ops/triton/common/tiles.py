"""Device functions: the walk over a product's inner axis, the diagonal of a tile, tile order.

Nothing here is launched by itself; the kernels in ``_forward.py``, ``_delta.py`` and
``_backward.py`` are these pieces plus an epilogue.
"""

# Kernel arguments are typed by Triton, at the launch.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_index(pid, tile_rows, tile_cols, GROUP: tl.constexpr):
    """Program number -> (token tile, output tile).

    GROUP token tiles are finished for one output tile before the next output tile starts, so
    that a strip of the weights is read from L2 rather than from memory by the programs that run
    together.
    """
    per_group = GROUP * tile_cols
    first = (pid // per_group) * GROUP
    rows_here = tl.minimum(tile_rows - first, GROUP)
    within = pid % per_group
    return first + within % rows_here, within // rows_here


@triton.jit
def own_tiles(tiles, PERSISTENT: tl.constexpr):
    """First, last and step of the tiles of this program; without PERSISTENT one, in a loop that the
    compiler takes away (left standing, it costs registers)."""
    first = tl.program_id(0)
    if PERSISTENT:
        last = tiles
        step = tl.num_programs(0)
    else:
        last = first + 1
        step = 1
    return first, last, step


@triton.jit
def widened(b, dtype: tl.constexpr):
    """Weights in the activations' dtype: 8-bit integers, floats of any kind, or uint8 patterns of
    fp8 (e4m3fn, read as finite), whose bits as fp16 say 2^-8 of the value, subnormals too."""
    if b.dtype == tl.uint8:
        bits = b.to(tl.int16)
        half = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
        b = half.to(tl.float16, bitcast=True) * 256.0
    return b.to(dtype)


@triton.jit
def empty_tile(
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, WEIGHTS_FIRST: tl.constexpr
):
    """Zeros to walk into, in the orientation of the instruction."""
    if WEIGHTS_FIRST:
        acc = tl.zeros((BLOCK_OUT, BLOCK_T), dtype=ACC)
    else:
        acc = tl.zeros((BLOCK_T, BLOCK_OUT), dtype=ACC)
    return acc


@triton.jit
def walk(
    acc,  # from ``empty_tile`` or another walk
    a_ptr,  # (T, INNER), last axis contiguous
    stride_a,
    t,  # (BLOCK_T,) int64 token numbers of this tile
    T,
    b_ptr,  # (INNER, OUT) with any two strides, one of them the literal 1
    stride_b_inner,
    stride_b_out,
    o,  # (BLOCK_OUT,) int64 output columns of this tile
    OUT,
    INNER,
    ACC: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCKWISE: tl.constexpr,
):
    """acc + (A B)[t, o] in ACC, summed in one fixed order.

    WEIGHTS_FIRST computes Bᵀ Aᵀ, the transpose: the weights then fill the long side of the
    tensor-core instruction and a handful of tokens its short side. The inner axis is walked in
    the same order in both cases. 8-bit weights are converted to A's dtype on the way. UPCAST
    multiplies in ACC (for the interpreter, whose bf16 product is wrong). BLOCKWISE sums each
    inner block by itself before it joins the total: in fp32 one chain of a thousand additions
    loses a digit to what libraries reach.
    """
    k = tl.arange(0, BLOCK_INNER)
    if WEIGHTS_FIRST:
        a_ptrs = a_ptr + t[None, :] * stride_a + k[:, None]
        b_ptrs = b_ptr + o[:, None] * stride_b_out + k[None, :] * stride_b_inner
        a_mask = t[None, :] < T
        b_mask = o[:, None] < OUT
    else:
        a_ptrs = a_ptr + t[:, None] * stride_a + k[None, :]
        b_ptrs = b_ptr + k[:, None] * stride_b_inner + o[None, :] * stride_b_out
        a_mask = t[:, None] < T
        b_mask = o[None, :] < OUT

    for k0 in range(0, INNER, BLOCK_INNER):
        if EVEN_INNER:
            a = tl.load(a_ptrs, mask=a_mask, other=0)
            b = tl.load(b_ptrs, mask=b_mask, other=0)
        elif WEIGHTS_FIRST:
            a = tl.load(a_ptrs, mask=a_mask & (k[:, None] < INNER - k0), other=0)
            b = tl.load(b_ptrs, mask=b_mask & (k[None, :] < INNER - k0), other=0)
        else:
            a = tl.load(a_ptrs, mask=a_mask & (k[None, :] < INNER - k0), other=0)
            b = tl.load(b_ptrs, mask=b_mask & (k[:, None] < INNER - k0), other=0)
        if UPCAST:
            a = a.to(ACC)
        b = widened(b, a.dtype)
        # "ieee": fp32 is multiplied in fp32, never in tf32; 16-bit types are not affected.
        if WEIGHTS_FIRST:
            left, right = b, a
        else:
            left, right = a, b
        if BLOCKWISE:
            block = tl.dot(left, right, input_precision="ieee", out_dtype=ACC)
            # A plain addition would be merged into the product's own chain.
            acc = tl.fma(block, tl.full(block.shape, 1, ACC), acc)
        else:
            acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=ACC)
        a_ptrs += BLOCK_INNER
        # A row-major weight moves by whole rows: in 64 bits, for rows of any length.
        b_ptrs += tl.full((), BLOCK_INNER, tl.int64) * stride_b_inner
    return acc


@triton.jit
def walk_descriptors(
    acc,
    a,  # tensor descriptor of (T, INNER), blocks (BLOCK_T, BLOCK_INNER)
    t_first,
    b,  # of (INNER, OUT), blocks (BLOCK_INNER, BLOCK_OUT); without INNER_FIRST of its transpose
    o_first,
    INNER,
    ACC: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    INNER_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``walk`` with tiles that the memory engine (TMA) brings: no address and no mask is computed
    by a thread, and what lies outside an array arrives as zeros. 16-bit operands, tokens first."""
    for k0 in range(0, INNER, BLOCK_INNER):
        left = a.load([t_first, k0])
        if INNER_FIRST:
            right = b.load([k0, o_first])
        else:
            right = tl.trans(b.load([o_first, k0]))
        if UPCAST:
            left = left.to(ACC)
            right = right.to(ACC)
        acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=ACC)
    return acc


@triton.jit
def product_tile(
    a,  # pointer or tensor descriptor: see ``walk`` and ``walk_descriptors``
    stride_a,
    t_first,
    T,
    b,
    stride_b_inner,
    stride_b_out,
    o_first,
    OUT,
    INNER,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCKWISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INNER_FIRST: tl.constexpr,
):
    """(A B)[t, o] as a (BLOCK_T, BLOCK_OUT) tile in ACC: one walk from zero."""
    acc = empty_tile(ACC, BLOCK_T, BLOCK_OUT, WEIGHTS_FIRST)
    if DESCRIPTORS:
        acc = walk_descriptors(
            acc, a, t_first, b, o_first, INNER, ACC, BLOCK_INNER, INNER_FIRST, UPCAST
        )
    else:
        acc = walk(
            acc, a, stride_a, t_first.to(tl.int64) + tl.arange(0, BLOCK_T), T,
            b, stride_b_inner, stride_b_out, o_first.to(tl.int64) + tl.arange(0, BLOCK_OUT), OUT,
            INNER, ACC, BLOCK_INNER, EVEN_INNER, WEIGHTS_FIRST, UPCAST, BLOCKWISE,
        )  # fmt: skip
    if WEIGHTS_FIRST:
        acc = tl.trans(acc)
    return acc


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile's left and right half. In a tensor-core layout each thread owns columns of both,
    so this moves no data."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def diagonal_tile(
    d_ptr,  # (R,) or, with slot_ptr, (slots, R): row stride stride_d
    stride_d,
    base_ptr,  # (R,)
    slot_ptr,  # (T,) int32 or None
    scale_ptr,  # (R,) or None
    t,
    T,
    r,
    R,
    OFFSET: tl.constexpr = False,
):
    """d_row[t, r], broadcast (1, cols) for one d or gathered (rows, cols) per slot; -1 -> base.
    OFFSET: d_row - base, which is 0, exactly, where the slot is -1."""
    if slot_ptr is None:
        rows = tl.load(d_ptr + r, mask=r < R, other=0)[None, :]
    else:
        slot = tl.load(slot_ptr + t, mask=t < T, other=-1)
        has_slot = slot >= 0
        offset = tl.where(has_slot, slot, 0).to(tl.int64) * stride_d
        in_rank = (r < R)[None, :]
        own = tl.load(
            d_ptr + offset[:, None] + r[None, :], mask=has_slot[:, None] & in_rank, other=0
        )
        base = tl.load(base_ptr + r, mask=r < R, other=0)[None, :]
        rows = tl.where(has_slot[:, None], own, base)
    if OFFSET:
        rows -= tl.load(base_ptr + r, mask=r < R, other=0)[None, :]
    if scale_ptr is not None:
        rows = rows * tl.load(scale_ptr + r, mask=r < R, other=0)[None, :]
    return rows


@triton.jit
def store_tile(ptr, stride, t, T, c, COLS, tile):
    """Write a tile of a (T, COLS) row-major array, rounding to the array's dtype."""
    mask = (t < T)[:, None] & (c < COLS)[None, :]
    tl.store(ptr + t[:, None] * stride + c[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_output(
    acc,
    y_ptr,  # (T, OUT) contiguous
    bias_ptr,  # (OUT,) or None
    t_first,
    T,
    o_first,
    OUT,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write acc + bias, CHUNK columns at a time: on its way out a tile passes through shared
    memory, and beside the buffers of the next tile there is no room for all of it."""
    if COLS > CHUNK:
        left, right = halves(acc, ROWS, COLS)
        HALF: tl.constexpr = COLS // 2
        store_output(left, y_ptr, bias_ptr, t_first, T, o_first, OUT, ROWS, HALF, CHUNK)
        store_output(right, y_ptr, bias_ptr, t_first, T, o_first + HALF, OUT, ROWS, HALF, CHUNK)
    else:
        t = t_first.to(tl.int64) + tl.arange(0, ROWS)
        o = o_first.to(tl.int64) + tl.arange(0, COLS)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + o, mask=o < OUT, other=0).to(acc.dtype)[None, :]
        store_tile(y_ptr, OUT, t, T, o, OUT, acc)
