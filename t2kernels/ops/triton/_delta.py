"""y = x Wᵀ + (x V_k ⊙ (d_row - σ)) U_kᵀ + bias in two launches: k components on a stored weight.

The first launch is ``project`` with k columns. The second walks the n columns of W and then the k
columns of U_k into one accumulator, so that the sum is rounded once. From compute capability 9.0 on
it begins while the first still runs, which alone would leave most of a GPU idle at k columns. See
README.md.
"""

# Kernel arguments are typed by Triton, at the launch.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ._forward import project
from .common import config
from .common.tiles import empty_tile, own_tiles, store_output, tile_index, walk, walk_descriptors


@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    x,  # (T, IN), row stride stride_x: pointer, or with DESCRIPTORS a tensor descriptor
    stride_x,
    w,  # (IN, OUT) with strides as below, likewise: the stored weight
    stride_w_inner,
    stride_w_out,
    hd,  # (T, R) contiguous, likewise: x V times (d_row - σ) (and scale)
    u,  # (OUT, R) contiguous, likewise
    bias_ptr,  # (OUT,) or None
    y_ptr,  # (T, OUT) contiguous
    T,
    IN,
    R,
    OUT,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_RANK: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCKWISE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    INNER_FIRST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """y = x Wᵀ + hd Uᵀ + bias, in tiles of (BLOCK_T tokens, BLOCK_OUT outputs). OVERLAP: launched
    while ``project_kernel`` runs, this one walks W and only then waits for hd."""
    tiles_t, tiles_o = tl.cdiv(T, BLOCK_T), tl.cdiv(OUT, BLOCK_OUT)
    first, last, step = own_tiles(tiles_t * tiles_o, PERSISTENT)
    for tile in tl.range(first, last, step, flatten=PERSISTENT):
        tile_t, tile_o = tile_index(tile, tiles_t, tiles_o, GROUP)
        acc = empty_tile(ACC, BLOCK_T, BLOCK_OUT, WEIGHTS_FIRST)
        if DESCRIPTORS:
            t, o = tile_t * BLOCK_T, tile_o * BLOCK_OUT
            acc = walk_descriptors(acc, x, t, w, o, IN, ACC, BLOCK_INNER, INNER_FIRST, UPCAST)
            if OVERLAP:
                gdc_wait()
            acc = walk_descriptors(acc, hd, t, u, o, R, ACC, BLOCK_INNER, False, UPCAST)
        else:
            t = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
            o = tile_o.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
            acc = walk(
                acc, x, stride_x, t, T, w, stride_w_inner, stride_w_out, o, OUT, IN,
                ACC, BLOCK_INNER, EVEN_INNER, WEIGHTS_FIRST, UPCAST, BLOCKWISE,
            )  # fmt: skip
            if OVERLAP:
                gdc_wait()
            acc = walk(
                acc, hd, R, t, T, u, 1, R, o, OUT, R,
                ACC, BLOCK_INNER, EVEN_RANK, WEIGHTS_FIRST, UPCAST, BLOCKWISE,
            )  # fmt: skip
        if WEIGHTS_FIRST:
            acc = tl.trans(acc)
        store_output(
            acc, y_ptr, bias_ptr, tile_t * BLOCK_T, T, tile_o * BLOCK_OUT, OUT,
            BLOCK_T, BLOCK_OUT, CHUNK,
        )  # fmt: skip


def delta(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """y (T, m) = x·Wᵀ + ((x V) ⊙ (d_row - base) ⊙ scale) Uᵀ + bias; W (m, n) in x.dtype with
    either axis contiguous; U (m, k), V (n, k), d (k,) or (slots, k), base = σ (k,). Slot -1: the
    second term is 0."""
    (T, IN), (OUT, R) = x.shape, U.shape
    y = torch.empty((T, OUT), dtype=x.dtype, device=x.device)
    if T == 0 or OUT == 0:
        return y
    hd = torch.empty((T, R), dtype=x.dtype, device=x.device)
    # Only behind ``project`` itself: whatever ran before it must be done before x is read.
    overlap = R > 0 and config.can_overlap(x.device)
    project(
        x, V, d, base, slot, scale, h=None, hd=hd, batch_invariant=batch_invariant, offset=True,
        overlap=overlap,
    )  # fmt: skip
    stored_as_inner_first = weight.stride(0) == 1 and weight.stride(1) != 1
    rows = weight.t() if stored_as_inner_first else weight
    tile = config.choose("delta", T, OUT, IN, x, U, batch_invariant=batch_invariant)
    tile = config.with_descriptors(tile, x, rows, hd, U)
    a, w = config.operands(tile, x, rows, inner_first=stored_as_inner_first)
    left, right = config.operands(tile, hd, U, inner_first=False)
    with config.on_device(x):
        delta_kernel[config.grid(tile, T, OUT, x.device)](
            a, x.stride(0), w, weight.stride(1), weight.stride(0), left, right, bias, y,
            T, IN, R, OUT, **config.constants(tile, x, IN), EVEN_RANK=R % tile.inner == 0,
            INNER_FIRST=stored_as_inner_first, OVERLAP=overlap,
            **config.options(tile), **config.dependent(overlap),
        )  # fmt: skip
    return y
