"""y = x Wᵀ + (x V_k ⊙ (d_row - σ)) U_kᵀ + bias in two launches: k components on a stored weight.

The first launch is ``project`` with k columns. The second walks the n columns of W and then the k
columns of U_k into one accumulator, so that the sum is rounded once. See README.md.
"""

# Kernel arguments are typed by Triton, at the launch.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._forward import project
from .common import config
from .common.tiles import empty_tile, store_tile, tile_index, walk


@triton.jit(do_not_specialize=["T"])
def delta_kernel(
    x_ptr,  # (T, IN), row stride stride_x
    stride_x,
    w_ptr,  # (IN, OUT) with strides as below: the stored weight
    stride_w_inner,
    stride_w_out,
    hd_ptr,  # (T, R) contiguous: x V times (d_row - σ) (and scale)
    u_ptr,  # (OUT, R) contiguous
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
    EVEN_INNER: tl.constexpr,
    EVEN_RANK: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCKWISE: tl.constexpr,
):
    """y = x Wᵀ + hd Uᵀ + bias. One program per (BLOCK_T tokens, BLOCK_OUT outputs)."""
    tile_t, tile_o = tile_index(
        tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(OUT, BLOCK_OUT), GROUP
    )
    t = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tile_o.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    acc = walk(
        empty_tile(ACC, BLOCK_T, BLOCK_OUT, WEIGHTS_FIRST), x_ptr, stride_x, t, T,
        w_ptr, stride_w_inner, stride_w_out, o, OUT, IN,
        ACC, BLOCK_INNER, EVEN_INNER, WEIGHTS_FIRST, UPCAST, BLOCKWISE,
    )  # fmt: skip
    acc = walk(
        acc, hd_ptr, R, t, T, u_ptr, 1, R, o, OUT, R,
        ACC, BLOCK_INNER, EVEN_RANK, WEIGHTS_FIRST, UPCAST, BLOCKWISE,
    )  # fmt: skip
    if WEIGHTS_FIRST:
        acc = tl.trans(acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < OUT, other=0).to(ACC)[None, :]
    store_tile(y_ptr, OUT, t, T, o, OUT, acc)


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
    project(x, V, d, base, slot, scale, h=None, hd=hd, batch_invariant=batch_invariant, offset=True)
    tile = config.choose(T, OUT, x, U, batch_invariant=batch_invariant)
    with config.on_device(x):
        delta_kernel[config.grid(tile, T, OUT)](
            x, x.stride(0), weight, weight.stride(1), weight.stride(0), hd, U, bias, y,
            T, IN, R, OUT, **config.constants(tile, x, IN), EVEN_RANK=R % tile.inner == 0,
            **config.options(tile),
        )  # fmt: skip
    return y
