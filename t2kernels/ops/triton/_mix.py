"""D[s] = S ⊙ (1 + Σ_k α[s, k] (Z[k] − 1)): K experts into slots, for all layers in one launch.

The columns of all layers lie side by side (R = Σ r). A mixture touches the rows of D that it is
given and no others, so admitting a request to a running batch is one small launch.
"""

# Kernel arguments are typed by Triton, at the launch.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._backward import finalise
from .common import config

# Columns per program.
MIX_COLS = 1024


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


@triton.jit(do_not_specialize=["K"])
def mix_kernel(
    s_ptr,  # (R,)
    z_ptr,  # (experts, R), row stride stride_z
    stride_z,
    alpha_ptr,  # (rows, L, K) contiguous
    index_ptr,  # (rows, K) int32, -1 = none; or None: column k of alpha is expert k
    row_ptr,  # (rows,) int32, -1 = skip; or None: row i of alpha is row i of D
    offsets_ptr,  # (L + 1,) first column of every layer, or None: one layer
    out_ptr,  # D (slots, R), row stride stride_out
    stride_out,
    K,
    R,
    BLOCK: tl.constexpr,
):
    """One program per (row of alpha, BLOCK columns, layer); experts are added in the order of
    their columns in alpha. An expert of weight 0 is not read."""
    i = tl.program_id(0).to(tl.int64)
    row = i
    if row_ptr is not None:
        row = tl.load(row_ptr + i).to(tl.int64)
    c, stop = columns(offsets_ptr, row, R, BLOCK)
    inside = c < stop
    z = tl.full((BLOCK,), 1, dtype=out_ptr.dtype.element_ty)
    line = (i * tl.num_programs(2) + tl.program_id(2)) * K
    for k in range(K):
        expert = tl.full((), 0, tl.int64) + k
        if index_ptr is not None:
            expert = tl.load(index_ptr + i * K + k).to(tl.int64)
        alpha = tl.load(alpha_ptr + line + k)
        if (alpha != 0) & (expert >= 0):
            z += alpha * (tl.load(z_ptr + expert * stride_z + c, mask=inside, other=1) - 1)
    s = tl.load(s_ptr + c, mask=inside, other=0)
    tl.store(out_ptr + row * stride_out + c, s * z, mask=inside)


@triton.jit(do_not_specialize=["K"])
def mix_gradient_kernel(
    grad_ptr,  # dD (slots, R), row stride stride_grad
    stride_grad,
    s_ptr,  # (R,)
    z_ptr,  # (experts, R), row stride stride_z
    stride_z,
    index_ptr,  # (rows, K) int32 or None
    row_ptr,  # (rows,) int32 or None
    offsets_ptr,  # (L + 1,) or None
    partial_ptr,  # (column blocks, rows, L, K)
    K,
    R,
    BLOCK: tl.constexpr,
):
    """partial[b, i, l, k] = Σ_{columns of block b} dD ⊙ S ⊙ (Z[k] − 1). Grid as in
    ``mix_kernel``; a block beyond its layer's end writes 0."""
    i = tl.program_id(0).to(tl.int64)
    row = i
    if row_ptr is not None:
        row = tl.load(row_ptr + i).to(tl.int64)
    c, stop = columns(offsets_ptr, row, R, BLOCK)
    inside = c < stop
    weight = tl.load(grad_ptr + row * stride_grad + c, mask=inside, other=0)
    weight *= tl.load(s_ptr + c, mask=inside, other=0)
    line = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + i
    line = (line * tl.num_programs(2) + tl.program_id(2)) * K
    for k in range(K):
        expert = tl.full((), 0, tl.int64) + k
        if index_ptr is not None:
            expert = tl.load(index_ptr + i * K + k).to(tl.int64)
        here = c < tl.where(expert >= 0, stop, 0)
        z = tl.load(z_ptr + expert * stride_z + c, mask=here, other=1)
        tl.store(partial_ptr + line + k, tl.sum(weight * (z - 1), axis=0))


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))


def _check(
    name: str,
    S: Tensor,
    Z: Tensor,
    alpha: Tensor,
    indices: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    longest: int | None,
) -> None:
    """Shapes only: values of ``indices`` and ``rows`` would cost a wait for the GPU."""
    if S.dim() != 1 or not S.is_contiguous():
        raise ValueError(f"{name}: S must be a contiguous (R,) tensor, got {_shape(S)}")
    if Z.dim() != 2 or Z.shape[1] != S.shape[0] or (Z.shape[1] > 1 and Z.stride(1) != 1):
        raise ValueError(
            f"{name}: Z must have shape (experts, R) = (experts, {S.shape[0]}) with contiguous "
            f"rows, got {_shape(Z)}"
        )
    if {Z.dtype, alpha.dtype} != {S.dtype}:
        raise TypeError(
            f"{name}: S, Z and alpha must have one dtype, got {S.dtype}, {Z.dtype}, {alpha.dtype}"
        )
    if (offsets is None) != (longest is None):
        raise ValueError(f"{name}: offsets and longest (columns of the longest layer) go together")
    layered = offsets is not None
    if alpha.dim() != 2 + layered:
        expected = "(rows, layers, K)" if layered else "(rows, K)"
        raise ValueError(f"{name}: alpha must have shape {expected}, got {_shape(alpha)}")
    if offsets is not None and offsets.shape != (alpha.shape[1] + 1,):
        raise ValueError(
            f"{name}: offsets must have shape (layers + 1,) = ({alpha.shape[1] + 1},), "
            f"got {_shape(offsets)}"
        )
    if indices is None and alpha.shape[-1] != Z.shape[0]:
        raise ValueError(
            f"{name}: alpha must have one column per expert, {Z.shape[0]}, got "
            f"{alpha.shape[-1]}. For a few experts per row pass their numbers as indices"
        )
    if indices is not None and (
        indices.shape != (alpha.shape[0], alpha.shape[-1]) or indices.dtype != torch.int32
    ):
        raise ValueError(
            f"{name}: indices must be int32 of shape (rows, K) = "
            f"({alpha.shape[0]}, {alpha.shape[-1]}), got {indices.dtype} {_shape(indices)}"
        )
    if rows is not None and (rows.shape != (alpha.shape[0],) or rows.dtype != torch.int32):
        raise ValueError(
            f"{name}: rows must be int32 of shape ({alpha.shape[0]},), "
            f"got {rows.dtype} {_shape(rows)}"
        )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def mix(
    S: Tensor,
    Z: Tensor,
    alpha: Tensor,
    *,
    indices: Tensor | None = None,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    longest: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """D[s] = S ⊙ (1 + Σ_k α[s, k] (Z[k] − 1)), equivalent to ``S * (1 + alpha @ (Z - 1))``.

    Args:
        S: (R,), the base diagonals of all layers side by side, fp32.
        Z: (experts, R), the experts' multipliers (1 = base), fp32; row stride free.
        alpha: (rows, K), or (rows, layers, K) with ``offsets``. K = experts, column k belonging
            to expert k, unless ``indices`` says otherwise.
        indices: (rows, K) int32, the sparse form: column k of row i belongs to expert
            indices[i, k]; -1 belongs to none.
        rows: (rows,) int32, which rows of ``out`` to write; -1 writes none. Default: row i.
        offsets: (layers + 1,) int32 or int64, where each layer's columns begin; the last is R.
        longest: columns of the longest layer (an int, so that nothing waits for the GPU).
        out: (slots, R) arena written in place, rows not named are not touched. Default: new.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit. Index values are not read here.
    """
    _check("mix", S, Z, alpha, indices, rows, offsets, longest)
    count, K, R = alpha.shape[0], alpha.shape[-1], S.shape[0]
    if out is None:
        if rows is not None:
            raise ValueError("mix: rows names rows of an arena; pass the arena as out")
        out = torch.empty((count, R), dtype=S.dtype, device=S.device)
    elif out.dim() != 2 or out.shape[1] != R or (R > 1 and out.stride(1) != 1):
        raise ValueError(
            f"mix: out must have shape (slots, R) = (slots, {R}) with contiguous rows, "
            f"got {_shape(out)}"
        )
    elif out.dtype != S.dtype or (rows is None and out.shape[0] < count):
        raise ValueError(
            f"mix: out must be {S.dtype} with at least {count} rows, got {out.dtype} {_shape(out)}"
        )
    layers = 1 if offsets is None else alpha.shape[1]
    if count == 0 or R == 0 or layers == 0:
        return out
    grid = (count, triton.cdiv(R if longest is None else longest, MIX_COLS), layers)
    with config.on_device(S):
        mix_kernel[grid](
            S, Z, Z.stride(0), alpha.contiguous(), _contiguous(indices), _contiguous(rows),
            offsets, out, out.stride(0), K, R, BLOCK=MIX_COLS, **config.SMALL,
        )  # fmt: skip
    return out


def mix_backward(
    dD: Tensor,
    S: Tensor,
    Z: Tensor,
    alpha: Tensor,
    *,
    indices: Tensor | None = None,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """dα[s, k] = Σ_r dD[s, r] S[r] (Z[k, r] − 1), in alpha's shape; per layer with ``offsets``.

    Arguments as in ``mix``; ``alpha`` is used for its shape and dtype only. dD (slots, R); a row
    or index of -1 has gradient 0. Two launches, summed in a fixed order.
    """
    _check("mix_backward", S, Z, alpha, indices, rows, offsets, longest)
    count, K, R = alpha.shape[0], alpha.shape[-1], S.shape[0]
    if dD.dim() != 2 or dD.shape[1] != R or (rows is None and dD.shape[0] < count):
        raise ValueError(
            f"mix_backward: dD must have shape (slots, R) = ({count}, {R}), got {_shape(dD)}"
        )
    layers = 1 if offsets is None else alpha.shape[1]
    if alpha.numel() == 0 or R == 0:
        return torch.zeros_like(alpha)
    if dD.stride(1) != 1 and R > 1:
        dD = dD.contiguous()
    blocks = triton.cdiv(R if longest is None else longest, MIX_COLS)
    partial = torch.empty((blocks, count * layers * K), dtype=S.dtype, device=S.device)
    dalpha = torch.empty(alpha.shape, dtype=alpha.dtype, device=alpha.device)
    with config.on_device(S):
        mix_gradient_kernel[(count, blocks, layers)](
            dD, dD.stride(0), S, Z, Z.stride(0), _contiguous(indices), _contiguous(rows),
            offsets, partial, K, R, BLOCK=MIX_COLS, **config.SMALL,
        )  # fmt: skip
    finalise(partial, dalpha.view(-1), None, None)
    return dalpha
