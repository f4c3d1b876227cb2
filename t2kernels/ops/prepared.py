"""A product of which everything but x is settled: what a layer calls again and again.

Choosing a backend and looking at nine tensors costs more than a small kernel does. A ``Prepared``
looked once and keeps the answer for as long as all that it went by is still there: the switches,
and every tensor at its address. No value is kept. Where anything differs, or somebody watches the
call (autograd, a mode, a transform, a tracer, autocast), it returns None: the ordinary path of
``functional.run`` decides, and says what is wrong if something is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cuda_forms, dispatch, native
from .host import environment
from .layout import TYPE_CODES

# A model meets few shapes at a time: one a batch size, and that of the prompt.
_SHAPES = 64

_native = native._native
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
_autocast = torch._C._is_any_autocast_enabled
_grad = torch.is_grad_enabled
_threads = torch.get_num_threads
_switches = dispatch.switches


class Prepared:
    """y (..., m) = ((x·V)⊙d)·Uᵀ + b for x (..., n); made by ``prepare`` for one backend.

    Args:
        dtype: that of x.
        U (m, r), Vh (r, n), d, base (r,), bias, scale: as for ``library.product``.
        limit: the most tokens that the backend's own kernel takes.
    """

    __slots__ = (
        "_U", "_Vh", "_addresses", "_base", "_bias", "_dtype", "_environment", "_index", "_limit",
        "_on_cpu", "_scale", "_shapes", "invariant", "module", "named",
    )  # fmt: skip

    def __init__(
        self,
        module: Any,
        dtype: torch.dtype,
        U: Tensor,
        Vh: Tensor,
        base: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        limit: int,
    ) -> None:
        self._U, self._Vh, self._base, self._bias, self._scale = U, Vh, base, bias, scale
        self.module, self._dtype, self._limit = module, dtype, limit
        self._on_cpu, self._index = U.is_cpu, U.get_device()
        self.named, self.invariant = _switches.backend, _switches.batch_invariant
        self._environment = environment("T2_BACKEND")
        self._shapes: dict[torch.Size, tuple[int, tuple[int, ...]]] = {}
        self._addresses = self._where()

    def _where(self) -> tuple[int, int, int, int]:
        bias = self._bias
        return (
            self._U.data_ptr(), self._Vh.data_ptr(), self._base.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )  # fmt: skip

    def still(self) -> bool:
        """Whether the factors, σ and the bias lie where they lay."""
        return self._where() == self._addresses

    def accepts(self, x: Tensor) -> tuple[int, tuple[int, ...]] | None:
        """(tokens, shape of y) where nobody watches, no switch was thrown and x fits."""
        if (
            _grad()
            or type(x) is not Tensor
            or x.dtype is not self._dtype
            or x.is_cpu is not self._on_cpu
            or _modes()
            or _transforms() is not None
            or _autocast()
            or _tracing()
            or _switches.backend != self.named
            or _switches.batch_invariant is not self.invariant
            or (self.named is None and environment("T2_BACKEND") != self._environment)
        ):
            return None
        return self._shapes.get(x.shape) or self._look(x)

    def _look(self, x: Tensor) -> tuple[int, tuple[int, ...]] | None:
        """``accepts`` for a shape that was not met before."""
        if x.dim() == 0 or x.shape[-1] != self._Vh.shape[1] or x.device != self._U.device:
            return None
        tokens = x.shape[:-1].numel()
        if not 0 < tokens <= self._limit:
            return None
        if len(self._shapes) == _SHAPES:
            self._shapes.clear()
        known = self._shapes[x.shape] = tokens, (*x.shape[:-1], self._U.shape[0])
        return known

    def __call__(self, x: Tensor, slot: Tensor | None, d: Tensor) -> Tensor | None:
        """y, or None where the ordinary path has to decide.

        slot: None or (tokens,), d: (r,) or (slots, r), as ``prepare`` had them.
        """
        raise NotImplementedError


class PreparedNative(Prepared):
    """By the CPU's kernels: all numbers but a few are kept where C++ finds them."""

    __slots__ = ("_call",)

    def __init__(self, *args: Any, d: Tensor, rows: bool) -> None:
        super().__init__(native, *args)
        (m, r), n = self._U.shape, self._Vh.shape[1]
        U, Vh, base, bias = self._addresses
        self._call = _native.prepared_forward(
            U, Vh, d.data_ptr(), d.stride(0), d.shape[0] if rows else 1, base, bias,
            0 if self._scale is None else self._scale.data_ptr(), n, r, m,
            TYPE_CODES[self._dtype], TYPE_CODES[self._U.dtype],
        )  # fmt: skip

    def __call__(self, x: Tensor, slot: Tensor | None, d: Tensor) -> Tensor | None:
        known = self.accepts(x)
        if known is None:
            return None
        tokens, shape = known
        if not x.is_contiguous():
            x = x.contiguous()
        bias = self._bias
        y = x.new_empty(*shape)
        ran = self._call(
            x.data_ptr(), y.data_ptr(), tokens, 0 if slot is None else slot.data_ptr(),
            self._U.data_ptr(), self._Vh.data_ptr(), d.data_ptr(), self._base.data_ptr(),
            0 if bias is None else bias.data_ptr(), _threads(),
        )  # fmt: skip
        return y if ran else None


class PreparedCuda(Prepared):
    """By the CUDA kernels: what ``cuda.forward`` enqueues, its form chosen once per T."""

    __slots__ = ("_asked", "_codes", "_d_stride", "_forms", "_scale_address", "_slots")

    def __init__(self, *args: Any, d: Tensor, rows: bool) -> None:
        super().__init__(*args)
        self._d_stride, self._slots = d.stride(0) if rows else 0, d.shape[0]
        self._scale_address = 0 if self._scale is None else self._scale.data_ptr()
        self._codes = TYPE_CODES[self._dtype], TYPE_CODES[self._U.dtype]
        self._asked: cuda_forms.Form | None = None  # the form that the choices below obeyed
        self._forms: dict[int, tuple[str, int, int]] = {}

    def _form(self, tokens: int, x: Tensor) -> tuple[str, int, int]:
        """(name, its code, the tile's) of a call with so many tokens."""
        asked = cuda_forms.asked()
        if asked != self._asked:
            self._asked = asked
            self._forms.clear()
        form = self._forms.get(tokens)
        if form is None:
            x2 = x.reshape(tokens, -1)
            name, tile = cuda_forms.choose(x2, self._U, self._Vh.t(), self.invariant)
            form = name, cuda_forms.CODES[name], cuda_forms.TILE_CODES[tile]
            self._forms[tokens] = form
        return form

    def accepts(self, x: Tensor) -> tuple[int, tuple[int, ...]] | None:
        return super().accepts(x) if x.get_device() == self._index else None

    def __call__(self, x: Tensor, slot: Tensor | None, d: Tensor) -> Tensor | None:
        known = self.accepts(x)
        if known is None or not self.still():
            return None
        tokens, shape = known
        name, code, tile = self._form(tokens, x)
        plain = name == "fma"
        if not x.is_contiguous() or not (plain or x.data_ptr() % 16 == 0):
            x = x.clone(memory_format=torch.contiguous_format)
        cuda, index = self.module, self._index
        stream = cuda._stream(x)
        n, r = self._Vh.shape[1], self._Vh.shape[0]
        y = x.new_empty(*shape)
        work = x.new_empty(tokens, r, dtype=torch.float32) if plain else x.new_empty(tokens, r)
        U, Vh, base, bias = self._addresses
        barrier = cuda._barrier(x, name, index, stream) if name == "mma-coop" else 0
        # fmt: off
        cuda._native.cuda_svf_decode(
            x.data_ptr(), n, U, Vh, d.data_ptr(), self._d_stride, self._slots,
            0 if slot is None else slot.data_ptr(), base, bias, self._scale_address,
            y.data_ptr(), 0, work.data_ptr(), barrier, tokens, n, r, shape[-1], *self._codes,
            code, tile, index, stream,
        )
        # fmt: on
        return y


def prepare(
    dtype: torch.dtype,
    tokens: int,
    U: Tensor,
    Vh: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Prepared | None:
    """The product by the backend that the policy chooses, or None where it has no prepared form.

    Args:
        dtype, tokens: of x, a call that the ordinary path took; more tokens than the backend's own
            kernel takes have no prepared form.
        U (m, r), Vh (r, n), d, base (r,), slot, bias, scale: as for ``library.product``.
    """
    device = U.device.type
    if (dispatch.forced_backend() or dispatch.DEFAULTS.get(device)) not in ("native", "cuda"):
        return None
    if device not in ("cpu", "cuda") or not U.numel() or not tokens:
        return None
    if device == "cpu" and tokens > native.decode_tokens(dtype, U.dtype, _switches.batch_invariant):
        return None
    x = torch.empty((1, Vh.shape[1]), dtype=dtype, device=U.device)
    module = dispatch.choose(x, U, Vh.t(), d, base, slot, bias, scale).module
    args = dtype, U, Vh, base, bias, scale
    if module is native:
        limit = native.decode_tokens(dtype, U.dtype, _switches.batch_invariant)
        return PreparedNative(*args, limit, d=d, rows=slot is not None)
    if module.NAME == "cuda":
        return PreparedCuda(module, *args, module.MAX_TOKENS, d=d, rows=slot is not None)
    return None
