"""A product of which everything but x is settled: what a layer calls again and again.

Choosing a backend and looking at nine tensors costs more than a small kernel does. A ``Prepared``
looked once and keeps the answer for as long as all that it went by is still there: the switches,
and every tensor at its address. No value is kept. Where anything differs, or somebody watches the
call (autograd, a mode, a transform, a tracer, autocast), it returns None: the ordinary path of
``functional.run`` decides, and says what is wrong if something is.
"""

from __future__ import annotations

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
    if _native is None or U.device.type != "cpu" or not U.numel():
        return None
    x = torch.empty((1, Vh.shape[1]), dtype=dtype, device=U.device)
    if dispatch.choose(x, U, Vh.t(), d, base, slot, bias, scale).module is not native:
        return None
    return Prepared(dtype, U, Vh, d, base, bias, scale, slot is not None)


class Prepared:
    """y (..., m) = ((x·V)⊙d)·Uᵀ + b for x (..., n), by the CPU's kernels; see ``prepare``."""

    __slots__ = (
        "_U", "_Vh", "_base", "_bias", "_dtype", "_environment", "_invariant", "_limit", "_named",
        "_run", "_scale", "_shapes", "_width",
    )  # fmt: skip

    def __init__(
        self,
        dtype: torch.dtype,
        U: Tensor,
        Vh: Tensor,
        d: Tensor,
        base: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        rows: bool,
    ) -> None:
        (m, r), n = U.shape, Vh.shape[1]
        self._U, self._Vh, self._base, self._bias, self._scale = U, Vh, base, bias, scale
        self._dtype, self._width = dtype, m
        self._named, self._invariant = _switches.backend, _switches.batch_invariant
        self._environment = environment("T2_BACKEND")
        self._limit = native.decode_tokens(dtype, U.dtype, self._invariant)
        self._shapes: dict[torch.Size, tuple[int, tuple[int, ...]]] = {}
        self._run = _native.prepared_forward(
            U.data_ptr(), Vh.data_ptr(), d.data_ptr(), d.stride(0), d.shape[0] if rows else 1,
            base.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0 if scale is None else scale.data_ptr(), n, r, m, TYPE_CODES[dtype],
            TYPE_CODES[U.dtype],
        )  # fmt: skip

    def __call__(self, x: Tensor, slot: Tensor | None, d: int) -> Tensor | None:
        """y, or None where the ordinary path has to decide.

        slot: None or (tokens,), as ``prepare`` had it. d: the address of the diagonals now.
        """
        if (
            _grad()
            or type(x) is not Tensor
            or x.dtype is not self._dtype
            or not x.is_cpu
            or _modes()
            or _transforms() is not None
            or _autocast()
            or _tracing()
            or _switches.backend != self._named
            or _switches.batch_invariant is not self._invariant
            or (self._named is None and environment("T2_BACKEND") != self._environment)
        ):
            return None
        known = self._shapes.get(x.shape) or self._look(x)
        if known is None:
            return None
        tokens, shape = known
        if not x.is_contiguous():
            x = x.contiguous()
        bias = self._bias
        y = x.new_empty(*shape)
        ran = self._run(
            x.data_ptr(), y.data_ptr(), tokens, 0 if slot is None else slot.data_ptr(),
            self._U.data_ptr(), self._Vh.data_ptr(), d, self._base.data_ptr(),
            0 if bias is None else bias.data_ptr(), _threads(),
        )  # fmt: skip
        return y if ran else None

    def _look(self, x: Tensor) -> tuple[int, tuple[int, ...]] | None:
        """(tokens, shape of y) of a shape that was not met before, if the kernel is for it."""
        if x.dim() == 0 or x.shape[-1] != self._Vh.shape[1] or x.device != self._U.device:
            return None
        tokens = x.shape[:-1].numel()
        if not 0 < tokens <= self._limit:
            return None
        if len(self._shapes) == _SHAPES:
            self._shapes.clear()
        known = self._shapes[x.shape] = tokens, (*x.shape[:-1], self._width)
        return known
