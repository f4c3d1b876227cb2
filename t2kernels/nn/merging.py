"""One expert written into the stored weights, in place, and the base weights back, bit for bit.

    W′ = W + U·diag(d − σ)·Vᵀ        or, where W was dropped,        W′ = U·diag(d)·Vᵀ

The diagonal goes into U (of 16 bits, the smaller of U and V), then one product per block of W′:

    dtype of W        where                                     product
    bf16, fp16        CUDA                                      16 bits, added to W by the same call
    bf16              CPU with AVX-512 for bf16                 the same
    bf16, fp16        elsewhere, or where ‖d − σ‖ > 1.5·‖d‖     fp32, plus W
    fp32, fp64        anywhere                                  fp32, fp64, plus W

Sums are of fp32 (fp64) and W′ is rounded once. (fp32 is not added by the call: MKL then rounds W′
once per slice of the sum, which errs three to five times as much as what stands above. TF32 only
where torch was told to use it, autocast nowhere.)

A 16-bit product rounds U·diag(d − σ), or V's, by as much in relation to the change as rounding W′
errs in relation to W′. As the columns of U and V are orthonormal, the change measures ‖d − σ‖ and
W′ at least ‖d‖: up to that ratio of 1.5 the two errors together stay below 1.81 times the second
alone. Experts beyond it (all z below 0.4, or negative) take the slow way; trained ones are far from
it.

Memory: one copy of each base weight that is changed, on its device or, ``keep="host"``, in host
memory (page-locked beside a GPU), from the first merge until ``unmerge``; weights that were dropped
need none. Beside it a block of the factor with the diagonal, one of the other where it has to be
converted, of 32 MiB each for 16 bits; with fp32, blocks of U, V and W′ of 16 MiB each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..lapack import no_autocast
from ..ops import native
from ..quantized import is_eight_bit

if TYPE_CHECKING:
    from .linear import SVFLinear

KEEP = ("device", "host")

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# ‖d − σ‖ / ‖d‖ up to which rounding U·diag(d − σ) to 16 bits is allowed: √(1 + 1.5²) = 1.81.
_LARGEST_CHANGE = 1.5
# Elements of a block of U or V in the product's dtype, 16 bits and wider.
_NARROW_BLOCK, _WIDE_BLOCK = 1 << 24, 1 << 22


class _Change(NamedTuple):
    """What stands between U and Vᵀ of one layer, (r,) fp32, and numbers about it."""

    factor: Tensor  # d − σ, or d where W was dropped; times the scales of 8-bit factors
    top: float = 1.0  # max |factor|
    largest: float = 1.0  # max |d − σ|
    size: float = 1.0  # ‖d − σ‖
    after: float = 1.0  # ‖d‖


@torch.no_grad()
def merge(layers: Sequence[SVFLinear], ds: Sequence[Tensor], keep: str = "device") -> None:
    """Write d = σ⊙z_eff (r,) of each layer into its weight; merging again starts from the base.

    The weights' addresses stay what they are. Waits for the GPU once, for the sizes of all
    changes. ``keep``: where the copies of the base weights wait, "device" or "host". After an
    exception the caller calls ``unmerge`` for all layers.

    Raises:
        ValueError: a d that is not (r,), an unknown ``keep``. RuntimeError: a quantised weight.
    """
    if keep not in KEEP:
        raise ValueError(f"merge: keep must be one of {KEEP}, got {keep!r}.")
    for layer in layers:
        if layer.quantized_base is not None:
            raise RuntimeError(
                f"merge: the weight is quantised ({layer.quantized_base}) and cannot take an "
                "expert. Use it unmerged (bank.use), or merge it into the unquantised checkpoint "
                "(t2 export) and quantise that."
            )
    changes = _changes(layers, ds)
    with _sums_in_fp32():
        for layer, change in zip(layers, changes):
            with no_autocast(layer._U.device):
                _merge_one(layer, change, keep)


@torch.no_grad()
def unmerge(layer: SVFLinear) -> None:
    """Bring the base weight back, bit-exact; a weight that had been dropped goes again."""
    if not layer._merged:
        return
    if layer._drop_on_unmerge:
        layer.weight = None
        layer._drop_on_unmerge = False
    elif layer._base_copy is not None and layer.weight is not None:
        layer.weight.copy_(layer._base_copy)
    layer._base_copy = None
    layer._merged = False


def _changes(layers: Sequence[SVFLinear], ds: Sequence[Tensor]) -> list[_Change]:
    sigmas = [layer.factors.S for layer in layers]
    for layer, d, S in zip(layers, ds, sigmas):
        if d.shape != S.shape:
            raise ValueError(
                f"merge: d must have shape (r,) = {tuple(S.shape)} for a layer of rank "
                f"{layer.rank}, got {tuple(d.shape)}."
            )
    ds = [d.detach().to(S) for d, S in zip(ds, sigmas)]
    deltas = [d - S for d, S in zip(ds, sigmas)]
    factors = [
        (d if _is_dropped(layer) else delta) * (1 if layer._scale is None else layer._scale)
        for layer, d, delta in zip(layers, ds, deltas)
    ]
    if not ds or ds[0].device.type == "meta":  # no values: a plan of what will be allocated
        return [_Change(factor) for factor in factors]
    norms = [
        torch._foreach_norm(factors, math.inf),
        torch._foreach_norm(deltas, math.inf),
        torch._foreach_norm(deltas),
        torch._foreach_norm(ds),
    ]
    place = ds[0].device
    numbers = torch.stack([torch.stack([t.to(place) for t in row]) for row in norms], dim=1)
    # The one wait for the device.
    return [_Change(factor, *row) for factor, row in zip(factors, numbers.tolist())]


def _is_dropped(layer: SVFLinear) -> bool:
    """Whether there is no W: the layer was made without, whatever is merged into it now."""
    return layer.weight is None or layer._drop_on_unmerge


def _merge_one(layer: SVFLinear, change: _Change, keep: str) -> None:
    dropped = _is_dropped(layer)
    if change.largest == 0 and (dropped or layer._base_copy is None):
        if dropped:
            layer.weight = None  # what an expert before this one wrote
            layer._drop_on_unmerge = False
        layer._merged = True
        return
    if dropped:
        _make_room(layer)
        base = None
    else:
        base = layer._base_copy = _base_copy(layer, keep)
    layer._merged = True
    weight = layer.weight
    if weight is None:
        raise RuntimeError("merge: the layer has no weight to write to")
    # Views of (out, in), whatever the order in memory.
    target = weight.detach().t() if layer.transposed else weight.detach()
    if base is not None and layer.transposed:
        base = base.t()
    if change.largest == 0 and base is not None:
        target.copy_(base)
        return
    dtype = _product_dtype(target, change, dropped)
    _write(target, base, layer, change, dtype)


def _make_room(layer: SVFLinear) -> None:
    """A buffer for W′ beside factors whose W was dropped; it goes with ``unmerge``."""
    if layer.weight is None:
        m, n = layer.out_features, layer.in_features
        shape = (n, m) if layer.transposed else (m, n)
        buffer = torch.empty(shape, dtype=layer._dtype, device=layer._U.device)
        layer._drop_on_unmerge = True
        layer.weight = nn.Parameter(buffer, requires_grad=False)


def _base_copy(layer: SVFLinear, keep: str) -> Tensor:
    """The copy of the base weight, made at the first merge, where ``keep`` wants it."""
    base = layer._base_copy
    weight = layer.weight
    if weight is None:
        raise RuntimeError("merge: the layer has no weight to copy")
    source = weight.detach() if base is None else base
    place = torch.device("cpu") if keep == "host" else weight.device
    if base is not None and base.device == place:
        return base
    copy = torch.empty_like(source, device=place, pin_memory=keep == "host" and weight.is_cuda)
    return copy.copy_(source)


def _product_dtype(target: Tensor, change: _Change, dropped: bool) -> torch.dtype:
    """What is multiplied; see the table above."""
    if target.dtype not in _SIXTEEN_BITS:
        return target.dtype
    # U·diag(d)·Vᵀ errs in relation to W′ itself: nothing can cancel.
    strong = not dropped and change.size > _LARGEST_CHANGE * change.after
    return target.dtype if _multiplies_fast(target) and not strong else torch.float32


def _multiplies_fast(target: Tensor) -> bool:
    """Whether 16-bit products are summed in fp32 and faster than fp32 ones on this device."""
    if target.device.type != "cpu":
        return target.device.type == "cuda"
    try:
        return target.dtype == torch.bfloat16 and native.isa() == "avx512bf16"
    except RuntimeError:  # built without the native module, which knows the CPU
        return False


def _write(
    target: Tensor,
    base: Tensor | None,
    layer: SVFLinear,
    change: _Change,
    dtype: torch.dtype,
) -> None:
    """target (m, n) = base + U·diag(factor)·Vᵀ by blocks, multiplied in ``dtype``."""
    U, Vh, factor, unit = layer._U, layer._Vh, change.factor, 1.0
    added = dtype in _SIXTEEN_BITS  # by the product's own call
    if dtype == torch.float16:
        # Into the middle of fp16's range by a power of two; |U|, |V| ≤ 1, of 8 bits ≤ 448.
        unit = 2.0 ** (math.frexp(change.top)[1] - (7 if is_eight_bit(U.dtype) else 15))
        factor = factor / unit
    m, n = target.shape
    # The smaller of the two takes the factor; in fp32 always U, as ``reconstruct`` has it.
    on_v = added and n <= m
    step = (_NARROW_BLOCK if added else _WIDE_BLOCK) // U.shape[1]
    as_it_is = added and U.dtype == dtype  # the other one is read where it lies, whole
    for columns in _blocks(n, n if as_it_is and not on_v else step):
        right = _times(Vh[:, columns], factor[:, None] if on_v else None, dtype)
        for rows in _blocks(m, m if as_it_is and on_v else step):
            left = _times(U[rows], None if on_v else factor, dtype)
            block = target[rows, columns]
            if added:
                if base is not None:
                    block.copy_(base[rows, columns], non_blocking=True)
                block.addmm_(left, right, beta=0 if base is None else 1, alpha=unit)
                continue
            total = torch.mm(left, right)
            if base is not None:
                total += base[rows, columns].to(total.device)
            block.copy_(total)


def _times(part: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A block of U or V in ``dtype``, itself where it is; times fp32 ``factor``, rounded once."""
    if factor is None:
        return part.to(dtype)
    if part.dtype == torch.float8_e4m3fn:  # no arithmetic of torch takes it
        part = part.to(torch.bfloat16)  # exact
    out = torch.empty(part.shape, dtype=dtype, device=part.device)
    return torch.mul(part, factor, out=out)  # on a GPU without a wide buffer


def _blocks(size: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    for start in range(0, size, step):
        yield slice(start, min(size, start + step))


@contextmanager
def _sums_in_fp32() -> Iterator[None]:
    """cuBLAS may add parts of a long 16-bit sum in 16 bits unless it is told not to."""
    matmul = torch.backends.cuda.matmul
    names = (
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    )
    before = {name: _setting(name) for name in names if hasattr(matmul, name)}
    try:
        for name, value in before.items():
            setattr(matmul, name, (False, value[1]) if isinstance(value, tuple) else False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def _setting(name: str) -> bool | tuple[bool, bool]:
    """Newer torch sets two things by one name: the sums, and whether they may be split at all."""
    matmul = torch.backends.cuda.matmul
    value, split = getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)
    return value if split is None else (value, split)
