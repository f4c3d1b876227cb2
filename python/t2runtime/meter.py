"""Memory and arithmetic of torch code, counted as it runs; on the meta device without any."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class Meter(TorchDispatchMode):
    """Counts what runs while it is on: the bytes of the storages that are made, ``now`` and at
    their ``peak``, and the ``flops`` of products and attention.

    Storages of ``known`` tensors count nothing, whatever views of them are made. What an operator
    allocates inside and frees before it returns is not seen.

    >>> import torch
    >>> with Meter() as meter:
    ...     x = torch.zeros(256, device="meta")
    ...     y = x.view(16, 16) @ x.view(16, 16)
    ...     del x
    >>> meter.peak, meter.now, meter.flops
    (2048, 1024, 8192)
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        # Kept alive, so that no new storage can get the address of one of these.
        self._known = [t.untyped_storage() for t in known]
        self._live = {s._cdata for s in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _run(func, args, kwargs)
        packet = func._overloadpacket
        if packet in _OURS:
            self.flops += _OURS[packet](*(_shape(a) for a in args))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or size == 0:
            return
        self._live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operator's outcome. Without memory torch groups products in bf16 only, though it computes
    them in other types as well: there the outcome is that in bf16, in their type.
    """
    first = args[0] if args else None
    if func._overloadpacket is not _aten._grouped_mm or not (
        isinstance(first, Tensor) and first.is_meta and first.dtype != torch.bfloat16
    ):
        return func(*args, **kwargs)
    lowered = [a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    return torch.empty_like(func(*lowered, **kwargs), dtype=first.dtype)


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _product(x: Any, U: Any, Vh: Any, *rest: Any) -> int:
    """2r(n + m) a token."""
    return 2 * int(x[0]) * int(Vh[0]) * (int(Vh[1]) + int(U[0]))


def _product_backward(g: Any, x: Any, U: Any, Vh: Any, d: Any, base: Any, slot: Any, h: Any,
                      *rest: Any) -> int:  # fmt: skip
    """g·U and (·)·Vᵀ, and x·V once more where it was not kept."""
    again = 0 if h is not None else 2 * int(x[0]) * int(Vh[0]) * int(Vh[1])
    return _product(x, U, Vh) + again


def _attention(q: Any, k: Any, v: Any, *rest: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(g: Any, q: Any, k: Any, v: Any, *rest: Any) -> int:
    return int(sdpa_backward_flop_count(g, q, k, v))


def _grouped(a: Any, b: Any, *rest: Any) -> int:
    """A product of each row (2-D) or matrix (3-D) of `a` with one matrix."""
    return 2 * math.prod(a) * int(b[-1]) // (int(a[0]) if len(a) > len(b) else 1)


_aten, _t2 = torch.ops.aten, torch.ops.t2kernels
#: Operators that torch has no formula for; each takes the shapes of the arguments.
_OURS: dict[Any, Any] = {
    _t2.svf_product: _product,
    _t2.svf_product_backward: _product_backward,
    _aten._grouped_mm: _grouped,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
