"""The CUDA kernels of csrc/cuda: decode sizes, no host synchronisation.

``cuda_forms`` says which of four forms a call takes. With plain multiply-adds h·d stays in fp32
between the two products; the tensor-core forms round it once, to x.dtype. The bits of a row depend
on the row, the factors and the form alone, and in batch-invariant mode the form does not depend on
the number of tokens. Backward uses torch's matrix products and sums in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from . import cuda_forms
from .cuda_forms import MAX_TOKENS
from .layout import TYPE_CODES, unfit, unfit_group
from .torch_backend import backward

__all__ = [
    "MAX_TOKENS",
    "NAME",
    "backward",
    "forward",
    "forward_group",
    "group_unavailable",
    "unavailable",
]

NAME = "cuda"

# The oldest machine code that T2_CUDA_ARCHS asks for by default.
MIN_CAPABILITY = (8, 0)

# The kinds of 8-bit factors that they read.
KINDS = ("int8", "fp8")


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


# Where torch has it, without a torch.cuda.Stream around the number: inductor's own way.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream(x: Tensor) -> int:
    if _raw_stream is not None:
        return int(_raw_stream(x.get_device()))
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _capture(x: Tensor) -> int:
    """A number for the capture of a graph that is under way on x's stream, 0 for none.

    Of every capture its own; without our native module, which alone knows, the same for all.
    """
    if _native is None:
        return int(_capturing())
    return int(_native.cuda_capture(x.get_device(), _stream(x)))


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
    reason = _elsewhere(x) or unfit(x, U, V, d, base, slot, bias, scale, kinds=KINDS)
    return reason or _too_many(x.shape[0])


def group_unavailable(
    x: Tensor,
    Us: Sequence[Tensor],
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
) -> str | None:
    """None if ``forward_group`` can run the call, else the reason; looks at metadata only.

    A form asked for by name that these layers cannot take together is a reason, too.
    """
    reason = _elsewhere(x) or unfit_group(x, Us, V, d, base, slot, biases, scale, kinds=KINDS)
    return reason or _too_many(x.shape[0]) or cuda_forms.refused(x, Us, V)


def _elsewhere(x: Tensor) -> str | None:
    if _missing is not None:
        return _missing
    if x.device.type != "cuda":
        return f"x is on {x.device.type}"
    return _device_reason(_index(x))


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
    form, tile = cuda_forms.choose(x, U, V, batch_invariant)
    index, stream = _index(x), _stream(x)
    if form != "fma":
        x = _on_16_bytes(x)
    T, n = x.shape
    m, r = U.shape
    y = torch.empty((T, m), dtype=x.dtype, device=x.device)
    h = torch.empty((T, r), dtype=x.dtype, device=x.device) if save_h else None
    work = _work(x, r, form)
    # fmt: off
    _native.cuda_svf_decode(
        x.data_ptr(), x.stride(0), U.data_ptr(), V.data_ptr(),
        d.data_ptr(), d.stride(0) if slot is not None else 0, d.shape[0],
        _address(slot), base.data_ptr(), _address(bias), _address(scale),
        y.data_ptr(), _address(h), work.data_ptr(), _barrier(x, form, index, stream),
        T, n, r, m, TYPE_CODES[x.dtype], TYPE_CODES[U.dtype], cuda_forms.CODES[form],
        cuda_forms.TILE_CODES[tile], index, stream,
    )
    # fmt: on
    return y, h


def forward_group(
    x: Tensor,
    Us: Sequence[Tensor],
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
    *,
    batch_invariant: bool = False,
) -> list[Tensor]:
    """See ``reference.forward_group``. A member's bits are those of ``forward`` in the same form.

    Launches: for the first products one; for the second ones as many as there are members in form
    fma, one in mma and mma-pdl. mma-coop does it all in one.
    """
    if _native is None:
        raise RuntimeError(f"backend 'cuda': {_missing}")
    form, tile = cuda_forms.choose_group(x, Us, V, batch_invariant)
    index, stream = _index(x), _stream(x)
    if form != "fma":
        x = _on_16_bytes(x)
    T, n = x.shape
    ys = [torch.empty((T, U.shape[0]), dtype=x.dtype, device=x.device) for U in Us]
    work = _work(x, V.shape[1], form)
    # fmt: off
    _native.cuda_svf_group(
        x.data_ptr(), x.stride(0), [U.data_ptr() for U in Us], V.data_ptr(),
        d.data_ptr(), d.stride(0) if slot is not None else 0, d.shape[0],
        _address(slot), base.data_ptr(), [_address(bias) for bias in biases], _address(scale),
        [y.data_ptr() for y in ys], work.data_ptr(), _barrier(x, form, index, stream),
        T, n, [U.shape[1] for U in Us], [U.shape[0] for U in Us],
        TYPE_CODES[x.dtype], TYPE_CODES[V.dtype], cuda_forms.CODES[form],
        cuda_forms.TILE_CODES[tile], index, stream,
    )
    # fmt: on
    return ys


def _work(x: Tensor, rank: int, form: str) -> Tensor:
    """What lies between the two products."""
    dtype = torch.float32 if form == "fma" else x.dtype
    return torch.empty((x.shape[0], rank), dtype=dtype, device=x.device)


def _barrier(x: Tensor, form: str, index: int, stream: int) -> int:
    """Address of the counters of the cooperative form; 0 for the others."""
    if form != "mma-coop":
        return 0
    return cuda_forms.barriers.address(x.device, index, stream, _capturing())


def _on_16_bytes(x: Tensor) -> Tensor:
    """x, or a copy whose rows the 16-byte copies of the tensor-core kernel can read."""
    fits = x.data_ptr() % 16 == 0 and (x.shape[0] == 1 or x.stride(0) * x.element_size() % 16 == 0)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
