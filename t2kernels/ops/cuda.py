"""The CUDA kernels of csrc/cuda: decode sizes, two launches, no host synchronisation.

h·d stays in fp32 between the two products, so the only roundings to x.dtype are those of y and of
the returned h. The bits of a row depend on the row and the factors alone: every call is
batch-invariant. Backward uses torch's matrix products and sums in a fixed order.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from .layout import unfit
from .torch_backend import backward

__all__ = ["MAX_TOKENS", "NAME", "backward", "forward", "unavailable"]

NAME = "cuda"

# Above this the factors are read from L2 so often that library matrix products win.
MAX_TOKENS = 128

# The oldest machine code that T2_CUDA_ARCHS asks for by default.
MIN_CAPABILITY = (8, 0)

# The type codes of csrc/cuda/svf_cuda.h.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def _load() -> tuple[ModuleType | None, str | None]:
    """The native module and why its CUDA kernels cannot be used, if so."""
    try:
        module = import_module("t2kernels._native")
    except ImportError as error:
        return None, f"the native module is not built ({error})"
    if not hasattr(module, "cuda_svf_decode"):
        return module, "this build has no CUDA kernels (build where nvcc is: T2_REQUIRE_CUDA=1)"
    return module, None


_native, _missing = _load()


@cache
def _device_reason(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"cuda:{index} has compute capability {capability}, needed is {MIN_CAPABILITY}"
    return None


def _stream(x: Tensor) -> int:
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def _index(x: Tensor) -> int:
    return x.get_device()


def unavailable(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> str | None:
    """None if these kernels can run the call, else the reason; looks at metadata only."""
    if _missing is not None:
        return _missing
    if x.device.type != "cuda":
        return f"x is on {x.device.type}"
    reason = _device_reason(_index(x)) or unfit(x, U, V, d, base, slot, bias, scale)
    return reason or _too_many(x.shape[0])


def _too_many(tokens: int) -> str | None:
    if tokens > MAX_TOKENS:
        return f"{tokens} tokens; these kernels are for at most {MAX_TOKENS}"
    return None


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
    """See ``reference.forward``. Enqueued on torch's current stream; may be captured in a graph."""
    if _native is None:
        raise RuntimeError(f"backend 'cuda': {_missing}")
    T, n = x.shape
    m, r = U.shape
    y = torch.empty((T, m), dtype=x.dtype, device=x.device)
    h = torch.empty((T, r), dtype=x.dtype, device=x.device) if save_h else None
    work = torch.empty((T, r), dtype=torch.float32, device=x.device)
    # fmt: off
    _native.cuda_svf_decode(
        x.data_ptr(), x.stride(0), U.data_ptr(), V.data_ptr(),
        d.data_ptr(), d.stride(0) if slot is not None else 0, d.shape[0],
        _address(slot), base.data_ptr(), _address(bias), _address(scale),
        y.data_ptr(), _address(h), work.data_ptr(),
        T, n, r, m, _CODES[x.dtype], _CODES[U.dtype], _index(x), _stream(x),
    )
    # fmt: on
    return y, h


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
