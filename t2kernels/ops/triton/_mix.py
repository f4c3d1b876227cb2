"""The Triton backend of ``ops/mixing.py``: experts into rows of an arena, in one launch."""

# Kernel arguments are typed by Triton, at the launch.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .common import config

if TYPE_CHECKING:
    from ..mixing import Mixing

# Columns per program.
MIX_COLS = 1024

# Products are rounded before they are added, as the other backends do: same bits.
LAUNCH = {**config.SMALL, "enable_fp_fusion": False}


@triton.jit
def columns(offsets_ptr, row, R, BLOCK: tl.constexpr):
    """The columns of this program, (BLOCK,), and the end of its layer; for row -1 an end that
    leaves no column."""
    if offsets_ptr is None:
        first = tl.full((), 0, tl.int64)
        stop = first + R
    else:
        first = tl.load(offsets_ptr + tl.program_id(2)).to(tl.int64)
        stop = tl.load(offsets_ptr + tl.program_id(2) + 1).to(tl.int64)
    c = first + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return c, tl.where(row >= 0, stop, 0)


@triton.jit(do_not_specialize=["K", "experts", "slots"])
def mix_kernel(
    s_ptr,  # (R,)
    z_ptr,  # (experts, R), row stride stride_z: z, or z - 1 where DEVIATION
    stride_z,
    alpha_ptr,  # (rows, L, K) contiguous
    index_ptr,  # (rows, K) int32, -1 = none; or None: column k of alpha is expert k
    row_ptr,  # (rows,) int32, outside [0, slots) = skip; or None: row i of alpha is row i of D
    offsets_ptr,  # (L + 1,) first column of every layer, or None: one layer
    out_ptr,  # D (slots, R), row stride stride_out
    stride_out,
    K,
    R,
    experts,
    slots,
    DEVIATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (row of alpha, BLOCK columns, layer); experts are added in the order of
    their columns in alpha. An expert of weight 0 is not read; one that does not exist gives NaN."""
    i = tl.program_id(0).to(tl.int64)
    row = i
    if row_ptr is not None:
        row = tl.load(row_ptr + i).to(tl.int64)
        row = tl.where(row < slots, row, -1)
    c, stop = columns(offsets_ptr, row, R, BLOCK)
    inside = c < stop
    z = tl.full((BLOCK,), 1, dtype=tl.float32)
    line = (i * tl.num_programs(2) + tl.program_id(2)) * K
    for k in range(K):
        expert = tl.full((), 0, tl.int64) + k
        if index_ptr is not None:
            expert = tl.load(index_ptr + i * K + k).to(tl.int64)
        alpha = tl.load(alpha_ptr + line + k)
        if (alpha != 0) & (expert >= 0) & (expert < experts):
            stored = tl.load(z_ptr + expert * stride_z + c, mask=inside, other=1).to(tl.float32)
            z += alpha * (stored if DEVIATION else stored - 1)
        if (expert < -1) | (expert >= experts):
            z += float("nan")
    s = tl.load(s_ptr + c, mask=inside, other=0)
    tl.store(out_ptr + row * stride_out + c, s * z, mask=inside)


def mix(call: Mixing) -> None:
    """See ``ops/mixing.mix_rows``, which checks the arguments."""
    out, S, Z, alpha, indices, rows, offsets, longest = call
    count, K, R = alpha.shape[0], alpha.shape[-1], S.shape[0]
    layers = 1 if offsets is None else alpha.shape[1]
    grid = (count, triton.cdiv(R if longest is None else longest, MIX_COLS), layers)
    with config.on_device(S):
        mix_kernel[grid](
            S, Z, Z.stride(0), alpha, indices, rows, offsets, out, out.stride(0), K, R,
            Z.shape[0], out.shape[0], DEVIATION=Z.dtype == torch.bfloat16, BLOCK=MIX_COLS,
            **LAUNCH,
        )  # fmt: skip
