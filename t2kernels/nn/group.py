"""Layers that get the same x (q, k, v; gate, up) computed in one call of the backend.

``convert`` finds them by their names and ties their V into one (R, n) buffer, σ and 8-bit scales
likewise; nothing of the model's code changes. The first member that is called with an x computes
all of them and keeps the others' results; a member that is called with this very x takes its own.
The bits are those of a call by itself.

A member is computed alone, by the ordinary way, wherever this is not certain:

- x is another tensor, or was written to since (its version);
- x is an inference tensor, which has no version, or is not what the short way takes
  (``settled.Settled``: gradients, a compiler, autocast, modes, transforms, tracers, subclasses);
- the plan has no arena (``alpha`` with gradients), is the base, or keeps base rows stored; there is
  no plan; an expert is merged; the layers keep k components (delta form);
- a member has not been called under this plan, or its bias or factors changed;
- there are more tokens than the policy says (``dispatch.GROUP_TOKENS``), another backend, or, on a
  GPU, batch-invariant mode, in which a form must not depend on the company;
- results were left lying twice running: these layers do not share x after all (cross-attention).

Results that nobody takes go with x, or with the next call, whichever comes first.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.prepared import Prepared

if TYPE_CHECKING:
    from .linear import SVFLinear
    from .routing import Plan

# So many calls in a row whose results were not all taken end the sharing.
_PATIENCE = 2


class Group:
    """Neighbours in the order of the model's layers that get the same x."""

    def __init__(self, names: Sequence[str], layers: Sequence[SVFLinear]) -> None:
        self.names, self.layers = tuple(names), tuple(layers)
        self._left = 0  # calls in a row whose results were not all taken
        self._memo: _Memo | None = None
        self._ready: _Ready | None = None
        for index, layer in enumerate(self.layers):
            layer._group = (self, index)
        self.tie()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has computed nothing yet."""
        return {**self.__dict__, "_memo": None, "_ready": None}

    @property
    def shares(self) -> bool:
        """Whether the members' calls so far speak for sharing."""
        return self._left < _PATIENCE

    def renew(self) -> None:
        """A member settled anew: what was made of the old state, results too, is void."""
        self._memo = self._ready = None

    # -- memory --------------------------------------------------------------------------------

    def tie(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(Vh (R, n), σ (R,), scale (R,) or None), the members' own being parts of them.

        Copies where a move or a load has parted them; the old ones are freed one by one.
        """
        with torch.no_grad(), torch.inference_mode(False):
            Vh, S = self._tied("_Vh"), self._tied("_S")
            scale = None if self.layers[0]._scale is None else self._tied("_scale")
        return Vh, S, scale

    def _tied(self, name: str) -> Tensor:
        parts: list[Tensor] = [getattr(layer, name) for layer in self.layers]
        if _adjacent(parts):
            first, rows = parts[0], sum(p.shape[0] for p in parts)
            return first.as_strided((rows, *first.shape[1:]), first.stride())
        whole, at = torch.cat(parts), 0
        for layer, part in zip(self.layers, parts):
            setattr(layer, name, whole[at : at + part.shape[0]])
            layer._settled = None  # it knows the old address
            at += part.shape[0]
        return whole

    # -- the call ------------------------------------------------------------------------------

    def unfit(self) -> str | None:
        """Why the members cannot be one call, or None: they may have been moved apart."""
        first = self.layers[0]
        alike = {(m._U.dtype, m._U.device, m._dtype, m._scale is None) for m in self.layers}
        if len(alike) > 1:
            return "its layers differ in dtype or device"
        if any(not m.full_rank for m in self.layers):
            return "its layers keep k components"
        route = first._route
        following = [m._route is not None and m._route[0] is (route and route[0])
                     for m in self.layers]  # fmt: skip
        return None if all(following) else "its layers belong to different models"

    def take(self, index: int, x: Tensor, plan: Plan) -> Tensor | None:
        """What the call of another member with this x left for this one."""
        memo = self._memo
        if (
            memo is None
            or memo.x() is not x
            or memo.version != x._version
            or memo.plan() is not plan
            or memo.written != plan.written
            or (not x.is_cpu and memo.stream != _stream(x))
        ):
            return None
        return memo.results.pop(index, None)

    def compute(
        self, index: int, x: Tensor, tokens: int, slot: Tensor | None, plan: Plan
    ) -> Tensor | None:
        """The member's y (tokens, m), with those of the others kept for them; None: go alone."""
        memo = self._memo
        if memo is not None:  # what the last call left
            self._left = self._left + 1 if memo.results or memo.expired else 0
            self._memo = None
        if self._left >= _PATIENCE:
            return None
        ready = self._ready
        if ready is None or ready.plan() is not plan:
            ready = self._ready = self._prepare(x, slot, plan)
        if ready is None or tokens > ready.limit or not ready.still():
            return None
        ys = ready.run(x, slot, plan)
        self._memo = _Memo(self, x, plan, {i: y for i, y in enumerate(ys) if i != index})
        return ys[index]

    def forget(self, x: weakref.ref[Tensor]) -> None:
        """x is gone, and with it whoever might have asked for the other results."""
        memo = self._memo
        if memo is not None and memo.x is x:
            memo.expired = memo.expired or bool(memo.results)
            memo.results.clear()

    def _prepare(self, x: Tensor, slot: Tensor | None, plan: Plan) -> _Ready | None:
        """What the members settled, as one call; None where they have not, or it cannot run."""
        settled = [m._settled for m in self.layers]
        alone = [s.alone(plan) for s in settled if s is not None]
        if len(alone) < len(self.layers) or any(p is None for p in alone) or self.unfit():
            return None
        parts: list[Prepared] = [p for p in alone if p is not None]
        first = parts[0]
        if any((p.module, p.named, p.invariant) != (first.module, first.named, first.invariant)
               for p in parts):  # fmt: skip
            return None
        limit = dispatch.GROUP_TOKENS.get(first.module.NAME, 0)
        if first.module.NAME == "cuda" and first.invariant:
            return None
        Vh, S, scale = self.tie()
        if any(m._settled is None for m in self.layers):  # they were parted: once more, alone
            return None
        ready = _Ready(self.layers, parts, plan, Vh, S, scale, limit)
        reason = first.module.group_unavailable(*ready.arguments(x, slot, plan))
        return None if reason is not None else ready


class _Memo:
    """Results of one call that wait for their owners, no longer than x lives."""

    __slots__ = ("expired", "plan", "results", "stream", "version", "written", "x")

    def __init__(self, group: Group, x: Tensor, plan: Plan, results: dict[int, Tensor]) -> None:
        self.results, self.plan, self.expired = results, weakref.ref(plan), False
        self.version, self.written = x._version, plan.written
        self.stream = 0 if x.is_cpu else _stream(x)
        self.x = weakref.ref(x, group.forget)


class _Ready:
    """One call of the backend for all members, and what it was made of."""

    __slots__ = ("_S", "_Us", "_V", "_biases", "_parts", "_place", "_scale", "limit", "plan")

    def __init__(
        self,
        layers: Sequence[SVFLinear],
        parts: list[Prepared],
        plan: Plan,
        Vh: Tensor,
        S: Tensor,
        scale: Tensor | None,
        limit: int,
    ) -> None:
        self.plan, self.limit = weakref.ref(plan), limit
        self._parts = parts
        self._Us, self._biases = [m._U for m in layers], [m.bias for m in layers]
        self._V, self._S, self._scale = Vh.t(), S, scale
        route = layers[0]._route
        self._place = (0 if route is None else route[2], S.shape[0])

    def still(self) -> bool:
        """Whether every tensor that the call reads lies where it lay."""
        return all(part.still() for part in self._parts)

    def arguments(self, x: Tensor, slot: Tensor | None, plan: Plan) -> tuple[Any, ...]:
        x2 = x if x.dim() == 2 else x.reshape(-1, self._V.shape[0])
        if x2.stride(-1) != 1:
            x2 = x2.contiguous()
        d = plan.columns(*self._place)
        return x2, self._Us, self._V, d, self._S, slot, self._biases, self._scale

    def run(self, x: Tensor, slot: Tensor | None, plan: Plan) -> list[Tensor]:
        first = self._parts[0]
        return first.module.forward_group(  # type: ignore[no-any-return]
            *self.arguments(x, slot, plan), batch_invariant=first.invariant
        )


class Member:
    """A layer's product under a plan: with its group where that is certain, else alone."""

    __slots__ = ("_group", "_index", "_plan", "alone")

    def __init__(self, group: Group, index: int, plan: Plan, alone: Prepared) -> None:
        self._group, self._index, self.alone = group, index, alone
        self._plan = weakref.ref(plan)

    def __call__(self, x: Tensor, slot: Tensor | None, d: Tensor) -> Tensor | None:
        known = self.alone.accepts(x)
        plan = self._plan()
        if known is None or plan is None:
            return None
        if not x.is_inference():
            y = self._group.take(self._index, x, plan)
            if y is None:
                y = self._group.compute(self._index, x, known[0], slot, plan)
            elif not self.alone.still():
                return None
            if y is not None:
                return y.view(known[1])
        return self.alone(x, slot, d)


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors lie one behind another in one piece of memory."""
    first = parts[0]
    end, memory = first.data_ptr(), first.untyped_storage().data_ptr()
    for part in parts:
        if (
            part.data_ptr() != end
            or part.dtype != first.dtype
            or part.shape[1:] != first.shape[1:]
            or not part.is_contiguous()
            or part.untyped_storage().data_ptr() != memory
        ):
            return False
        end += part.numel() * part.element_size()
    return True


def _stream(x: Tensor) -> int:
    """The stream on which results of x come to be; a CPU has but one."""
    return 0 if x.is_cpu else int(dispatch.load("cuda")._stream(x))
