"""y = ((x V) ⊙ d_row) Uᵀ + bias in two launches: ``project`` and ``expand``.

The first product's epilogue applies the diagonal, so that h = x V is rounded once and passes
through memory once. See README.md for the derivation and for what each grid means.
"""

# Kernel arguments are typed by Triton, at the launch.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from .common import config
from .common.tiles import (
    diagonal_tile,
    halves,
    own_tiles,
    product_tile,
    store_output,
    store_tile,
    tile_index,
)


@triton.jit
def project_epilogue(
    acc,
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
    stride_h,
    hd_ptr,
    stride_hd,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Store h and h ⊙ d_row, CHUNK columns at a time: gathered in one piece, the diagonal of a
    128 x 256 tile needs as many registers as the tile and spills 568 bytes a thread."""
    if COLS > CHUNK:
        left, right = halves(acc, ROWS, COLS)
        HALF: tl.constexpr = COLS // 2
        project_epilogue(
            left, t, T, r_first, R, d_ptr, stride_d, base_ptr, slot_ptr, scale_ptr,
            h_ptr, stride_h, hd_ptr, stride_hd, ROWS, HALF, CHUNK, OFFSET,
        )  # fmt: skip
        project_epilogue(
            right, t, T, r_first + HALF, R, d_ptr, stride_d, base_ptr, slot_ptr, scale_ptr,
            h_ptr, stride_h, hd_ptr, stride_hd, ROWS, HALF, CHUNK, OFFSET,
        )  # fmt: skip
    else:
        r = r_first + tl.arange(0, COLS)
        if h_ptr is not None:
            store_tile(h_ptr, stride_h, t, T, r, R, acc)
        if hd_ptr is not None:
            rows = diagonal_tile(d_ptr, stride_d, base_ptr, slot_ptr, scale_ptr, t, T, r, R, OFFSET)
            store_tile(hd_ptr, stride_hd, t, T, r, R, acc * rows)


@triton.jit(do_not_specialize=["T"])
def project_kernel(
    x,  # (T, IN), row stride stride_x: pointer, or with DESCRIPTORS a tensor descriptor
    stride_x,
    vh,  # (R, IN) contiguous, likewise
    d_ptr,  # (R,) or (slots, R), row stride stride_d
    stride_d,
    base_ptr,  # (R,)
    slot_ptr,  # (T,) int32 or None
    scale_ptr,  # (R,) or None
    h_ptr,  # (T, R) or None, row stride stride_h: x V without diagonal and scale
    stride_h,
    hd_ptr,  # (T, R) or None, row stride stride_hd: x V times d_row (and scale)
    stride_hd,
    T,
    IN,
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
    OFFSET: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """h = x V, hd = h ⊙ d_row (OFFSET: h ⊙ (d_row - base)), in tiles of (BLOCK_T tokens, BLOCK_OUT
    columns of h). Any tile may mix requests, and the grid depends on T alone. OVERLAP: the next
    kernel may begin as soon as all programs of this one have."""
    if OVERLAP:
        gdc_launch_dependents()
    tiles_t, tiles_r = tl.cdiv(T, BLOCK_T), tl.cdiv(R, BLOCK_OUT)
    first, last, step = own_tiles(tiles_t * tiles_r, PERSISTENT)
    for tile in tl.range(first, last, step, flatten=PERSISTENT):
        tile_t, tile_r = tile_index(tile, tiles_t, tiles_r, GROUP)
        acc = product_tile(
            x, stride_x, tile_t * BLOCK_T, T, vh, 1, IN, tile_r * BLOCK_OUT, R, IN,
            ACC, BLOCK_T, BLOCK_OUT, BLOCK_INNER, EVEN_INNER, WEIGHTS_FIRST, UPCAST, BLOCKWISE,
            DESCRIPTORS, False,
        )  # fmt: skip
        t = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        project_epilogue(
            acc, t, T, tile_r.to(tl.int64) * BLOCK_OUT, R,
            d_ptr, stride_d, base_ptr, slot_ptr, scale_ptr,
            h_ptr, stride_h, hd_ptr, stride_hd, BLOCK_T, BLOCK_OUT, CHUNK, OFFSET,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def expand_kernel(
    a,  # (T, INNER), row stride stride_a: pointer, or with DESCRIPTORS a tensor descriptor
    stride_a,
    b,  # (INNER, OUT) with strides as below, likewise
    stride_b_inner,
    stride_b_out,
    bias_ptr,  # (OUT,) or None
    y_ptr,  # (T, OUT) contiguous
    T,
    INNER,
    OUT,
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
    INNER_FIRST: tl.constexpr,
):
    """y = A B + bias: (h ⊙ d) Uᵀ in the forward pass, (gu ⊙ d) Vᵀ in the backward pass, in tiles of
    (BLOCK_T tokens, BLOCK_OUT outputs)."""
    tiles_t, tiles_o = tl.cdiv(T, BLOCK_T), tl.cdiv(OUT, BLOCK_OUT)
    first, last, step = own_tiles(tiles_t * tiles_o, PERSISTENT)
    for tile in tl.range(first, last, step, flatten=PERSISTENT):
        tile_t, tile_o = tile_index(tile, tiles_t, tiles_o, GROUP)
        acc = product_tile(
            a, stride_a, tile_t * BLOCK_T, T,
            b, stride_b_inner, stride_b_out, tile_o * BLOCK_OUT, OUT, INNER,
            ACC, BLOCK_T, BLOCK_OUT, BLOCK_INNER, EVEN_INNER, WEIGHTS_FIRST, UPCAST, BLOCKWISE,
            DESCRIPTORS, INNER_FIRST,
        )  # fmt: skip
        store_output(
            acc, y_ptr, bias_ptr, tile_t * BLOCK_T, T, tile_o * BLOCK_OUT, OUT,
            BLOCK_T, BLOCK_OUT, CHUNK,
        )  # fmt: skip


def project(
    x: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    scale: Tensor | None,
    *,
    h: Tensor | None,
    hd: Tensor | None,
    batch_invariant: bool = False,
    offset: bool = False,
    overlap: bool = False,
) -> None:
    """Write h = x V and hd = h ⊙ d_row into the given (T, r) arrays of x.dtype, whose rows may lie
    apart; with ``offset`` hd = h ⊙ (d_row - base). ``overlap``: the next kernel is launched as a
    programmatic dependent and waits for this one itself."""
    T, IN = x.shape
    R = V.shape[1]
    if T == 0 or R == 0:
        return
    tile = config.choose("project", T, R, IN, x, V, batch_invariant=batch_invariant)
    tile = config.with_descriptors(tile, x, V.t())
    a, b = config.operands(tile, x, V.t(), inner_first=False)
    with config.on_device(x):
        project_kernel[config.grid(tile, T, R, x.device)](
            a, x.stride(0), b, d, d.stride(0) if d.dim() == 2 else 0, base, slot, scale,
            h, R if h is None else h.stride(0), hd, R if hd is None else hd.stride(0), T, IN, R,
            **config.constants(tile, x, IN), OFFSET=offset, OVERLAP=overlap,
            **config.options(tile),
        )  # fmt: skip


def expand(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    transposed: bool,
    batch_invariant: bool = False,
) -> Tensor:
    """a @ weightᵀ + bias for a contiguous ``weight`` (OUT, INNER); ``transposed``: a @ weight
    for a contiguous ``weight`` (INNER, OUT). The rows of ``a`` may lie apart."""
    T, INNER = a.shape
    OUT = weight.shape[1] if transposed else weight.shape[0]
    y = torch.empty((T, OUT), dtype=a.dtype, device=a.device)
    if T == 0 or OUT == 0:
        return y
    strides = (OUT, 1) if transposed else (1, INNER)
    kernel = "expand_t" if transposed else "expand"
    tile = config.choose(kernel, T, OUT, INNER, a, weight, batch_invariant=batch_invariant)
    tile = config.with_descriptors(tile, a, weight)
    left, right = config.operands(tile, a, weight, inner_first=transposed)
    with config.on_device(a):
        expand_kernel[config.grid(tile, T, OUT, a.device)](
            left, a.stride(0), right, *strides, bias, y, T, INNER, OUT,
            **config.constants(tile, a, INNER), INNER_FIRST=transposed, **config.options(tile),
        )  # fmt: skip
    return y


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
    """y = ((x V) ⊙ d_row ⊙ scale) Uᵀ + bias, (T, m); and h = x V, (T, r), with ``save_h``.

    The backend contract of ``ops/reference.py``. Two launches, no reduction across programs.
    """
    shape = (x.shape[0], V.shape[1])
    hd = torch.empty(shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(hd) if save_h else None
    project(x, V, d, base, slot, scale, h=h, hd=hd, batch_invariant=batch_invariant)
    y = expand(hd, U, bias, transposed=False, batch_invariant=batch_invariant)
    return y, h
