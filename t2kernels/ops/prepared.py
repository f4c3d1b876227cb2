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

from . import dispatch, native
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
        "_U", "_Vh", "_addresses", "_base", "_bias", "_dtype", "_environment", "_limit", "_on_cpu",
        "_scale", "_shapes", "invariant", "module", "named",
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
        self._on_cpu = U.is_cpu
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

    def run(
        self, tokens: int, shape: tuple[int, ...], x: Tensor, slot: Tensor | None, d: Tensor
    ) -> Tensor | None:
        """y of a call that ``accepts`` took, or None where a tensor has moved.

        slot: None or (tokens,), d: (r,) or (slots, r), as ``prepare`` had them.
        """
        if not self.still():
            return None
        x2 = x.reshape(-1, self._Vh.shape[1])
        y, _ = self.module.forward(
            x2, self._U, self._Vh.t(), d, self._base, slot, self._bias, self._scale,
            batch_invariant=self.invariant,
        )  # fmt: skip
        return y.view(shape)  # type: ignore[no-any-return]

    def __call__(self, x: Tensor, slot: Tensor | None, d: Tensor) -> Tensor | None:
        known = self.accepts(x)
        return None if known is None else self.run(*known, x, slot, d)


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

    def run(
        self, tokens: int, shape: tuple[int, ...], x: Tensor, slot: Tensor | None, d: Tensor
    ) -> Tensor | None:
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


def prepare(
    dtype: torch.dtype,
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
        dtype: that of x, which the call need not have yet.
        U (m, r), Vh (r, n), d, base (r,), slot, bias, scale: as for ``library.product``.
    """
    if U.device.type not in ("cpu", "cuda") or not U.numel():
        return None
    x = torch.empty((1, Vh.shape[1]), dtype=dtype, device=U.device)
    module = dispatch.choose(x, U, Vh.t(), d, base, slot, bias, scale).module
    args = dtype, U, Vh, base, bias, scale
    if module is native:
        limit = native.decode_tokens(dtype, U.dtype, _switches.batch_invariant)
        return PreparedNative(*args, limit, d=d, rows=slot is not None)
    if module.NAME == "cuda":
        return Prepared(module, *args, module.MAX_TOKENS)
    return None
