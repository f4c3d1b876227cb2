"""Tile sizes from a table made on such a GPU (``tables``), else by plain rule: dtype, tokens and
outputs in, one ``Tile`` out. Nothing is tuned at run time, so a first call costs one compilation
and a captured graph never sees a benchmark.

The sizes were chosen from the compiled code (shared memory, registers, instructions) and from
the floors of each regime; ``tests/ops/test_triton_compile.py`` holds them to those facts.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tables
from .tables import Tile as Tile
from .tiles import tile_index

# 16-bit activations. Decode reads weights at memory speed: many narrow tiles, several loads in
# flight, tokens on the short side of the instruction.
DECODE_16 = Tile(16, 32, 128, 4, 5, weights_first=True)
DECODE_32 = Tile(32, 64, 128, 4, 4, weights_first=True)
DECODE_64 = Tile(64, 64, 128, 4, 4, weights_first=True)
MEDIUM = Tile(64, 128, 64, 4, 4)
LARGE = Tile(128, 256, 64, 8, 4, chunk=32)
# LARGE from compute capability 9.0 on, where there is a memory engine that takes descriptors.
LARGE_SM90 = LARGE._replace(descriptors=True, persistent=True)
# LARGE where its buffers do not fit; half the inner step also keeps mma.sync from spilling.
LARGE_SM80 = Tile(128, 256, 32, 8, 4, chunk=32)
# 8-bit weights pass through registers on their way to the activations' dtype: smaller tiles.
MEDIUM_8BIT = Tile(64, 64, 64, 4, 4)
LARGE_8BIT = Tile(128, 128, 64, 8, 4, chunk=32)
# fp32 multiplies on the ordinary cores (IEEE, no tf32): the tile is bounded by registers.
DECODE_FP32 = Tile(16, 32, 64, 4, 3, weights_first=True)
FP32 = Tile(64, 64, 16, 8, 3)
FP32_LARGE = Tile(128, 64, 16, 8, 3)

# The one configuration of batch-invariant mode, for every T: a row's bits then depend on its own
# values alone, because the walk over the inner axis is the same wherever the row lies. A
# compromise between decode (64 outputs: enough programs to read memory) and prefill.
INVARIANT = DECODE_64
INVARIANT_FP32 = FP32

# Programs below which a large tile leaves a big GPU (108 to 148 multiprocessors) idle.
FEW_PROGRAMS = 96
# Token tiles that share a strip of weights in L2.
GROUP = 8

# Multiply-add in one rounding, said aloud: Triton 3.9 warns where it is left to the default,
# which a later version changes.
FUSION = {"enable_fp_fusion": True}
# Launch options of the kernels that are not products.
SMALL: dict[str, Any] = {"num_warps": 4, **FUSION}

TRITON = tables.triton_version()
# Decided by TRITON_INTERPRET when the kernels were first imported.
INTERPRETED = not isinstance(tile_index, triton.JITFunction)


def choose(
    kernel: str,
    tokens: int,
    outputs: int,
    inner: int,
    x: Tensor,
    weight: Tensor,
    *,
    batch_invariant: bool = False,
) -> Tile:
    """The tile for a product of ``tokens`` rows and ``outputs`` columns, summed over ``inner``.

    ``kernel``: one of ``tables.KERNELS``.
    """
    if not batch_invariant:
        known = tables.lookup(kernel, tokens, outputs, inner, x, weight)
        if known is not None:
            return known
    narrow = x.dtype.itemsize <= 2
    if not narrow:
        if batch_invariant:
            return INVARIANT_FP32
        if tokens <= 16:
            return DECODE_FP32
        return FP32_LARGE if _programs(FP32_LARGE, tokens, outputs) >= FEW_PROGRAMS else FP32
    shared = shared_limit(x.device)
    if batch_invariant:
        return fit(INVARIANT, shared)
    if tokens <= 16:
        return DECODE_16
    if tokens <= 32:
        return fit(DECODE_32, shared)
    if tokens <= 64:
        return fit(DECODE_64, shared)
    narrower = weight.dtype.itemsize == 1
    large, medium = (LARGE_8BIT, MEDIUM_8BIT) if narrower else (LARGE, MEDIUM)
    if large == LARGE and has_descriptors(x.device):
        large = LARGE_SM90
    return fit(large if _programs(large, tokens, outputs) >= FEW_PROGRAMS else medium, shared)


def fit(tile: Tile, shared: int) -> Tile:
    """``tile``, or a smaller relative where its buffers exceed ``shared`` bytes: sm_90 offers
    227 KiB a block, sm_80 163, consumer GPUs (sm_86, sm_89, sm_120) 99."""
    while tile_bytes(tile) > shared and tile.stages > 1:
        large = tile in (LARGE, LARGE_SM90)
        tile = LARGE_SM80 if large else tile._replace(stages=tile.stages - 1)
    return tile


def tile_bytes(tile: Tile) -> int:
    """Shared memory of the load buffers for 16-bit operands and, where these live on during the
    epilogue, of the chunk that passes through on its way out."""
    buffers = 2 * tile.stages * tile.inner * (tile.tokens + tile.outputs)
    return buffers + (4 * tile.tokens * tile.chunk if tile.persistent else 0)


@functools.cache
def _capability(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]


def has_descriptors(device: torch.device) -> bool:
    """Whether ``device`` has the memory engine; the interpreter has one, too."""
    return _capability(device.index) >= 9 if device.type == "cuda" else INTERPRETED


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can be launched as the programmatic dependent of the one before it."""
    return device.type == "cuda" and _capability(device.index) >= 9


def dependent(overlap: bool) -> dict[str, Any]:
    """The launch option of a kernel that waits for the one before it by itself."""
    return {"launch_pdl": True} if overlap else {}


def with_descriptors(tile: Tile, *operands: Tensor) -> Tile:
    """``tile``, or the same with pointers where an operand does not suit the memory engine: it
    wants 16-bit elements here, no empty axis, and rows that start at multiples of 16 bytes."""
    if not tile.descriptors or all(
        t.dtype.itemsize == 2
        and t.numel() > 0
        and t.stride(1) == 1
        and t.stride(0) % 8 == 0
        and t.stride(0) >= t.shape[1]
        and t.data_ptr() % 16 == 0
        for t in operands
    ):
        return tile
    return tile._replace(descriptors=False, persistent=False)


def for_slots(tile: Tile) -> Tile:
    """``tile`` for a gradient per slot. Its epilogue keeps more in registers, hence the narrower
    chunk; and it branches, on which the pass of Triton 3.6 fails that fuses the loop over tiles
    with the walk (no version before 3.9 is known to do better)."""
    return tile._replace(
        chunk=min(tile.outputs, tile.chunk) // 2,
        persistent=tile.persistent and TRITON >= (3, 9),
    )


def operands(tile: Tile, a: Tensor, b: Tensor, *, inner_first: bool) -> tuple[Any, Any]:
    """What a kernel takes for ``a`` (tokens, inner) and ``b``, both with contiguous rows: (inner,
    outputs) with ``inner_first``, else (outputs, inner). Descriptors, or the tensors."""
    if not tile.descriptors:
        return a, b
    block = (tile.inner, tile.outputs) if inner_first else (tile.outputs, tile.inner)
    return (
        TensorDescriptor.from_tensor(a, [tile.tokens, tile.inner]),
        TensorDescriptor.from_tensor(b, list(block)),
    )


@functools.cache
def _shared_of(index: int) -> int:
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory one program may use on ``device``."""
    if device.type != "cuda":
        return 1 << 30
    return _shared_of(torch.cuda.current_device() if device.index is None else device.index)


def _programs(tile: Tile, tokens: int, outputs: int) -> int:
    # Not triton.cdiv: 3.9 wraps it for use in kernels, at several microseconds a call.
    return -(-tokens // tile.tokens) * -(-outputs // tile.outputs)


def multiprocessors(device: torch.device) -> int:
    """How many programs a persistent grid has at most; few in the interpreter."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def grid(tile: Tile, tokens: int, outputs: int, device: torch.device) -> tuple[int]:
    """One program per tile, or per multiprocessor, on one axis: it may hold 2^31 - 1 of them."""
    programs = _programs(tile, tokens, outputs)
    return (min(programs, multiprocessors(device)) if tile.persistent else programs,)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """fp32 for everything up to fp32, fp64 for fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def constants(tile: Tile, x: Tensor, inner: int) -> dict[str, Any]:
    """The compile-time arguments that every product kernel takes."""
    return {
        "ACC": accumulator(x.dtype),
        "BLOCK_T": tile.tokens,
        "BLOCK_OUT": tile.outputs,
        "BLOCK_INNER": tile.inner,
        "CHUNK": tile.chunk,
        "EVEN_INNER": inner % tile.inner == 0,
        "WEIGHTS_FIRST": tile.weights_first,
        "GROUP": GROUP,
        # The interpreter multiplies bf16 bit patterns as integers.
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,
        "BLOCKWISE": x.dtype.itemsize > 2,
        "DESCRIPTORS": tile.descriptors,
        "PERSISTENT": tile.persistent,
    }


def options(tile: Tile) -> dict[str, Any]:
    """Launch options of Triton."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, **FUSION}


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current GPU: make it the one that holds ``x``."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
