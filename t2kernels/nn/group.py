"""Layers that get the same x (q, k, v; gate, up) computed in one call of the backend.

``convert`` finds them by their names and ties their V into one (R, n) buffer, σ and 8-bit scales
likewise; nothing of the model's code changes. The first member that is called with an x computes
all of them and keeps the others' results; a member that is called with this very x takes its own.
The bits are those of a call by itself.

A member is computed alone, by the ordinary way, wherever this is not certain:

- x is another tensor, lies elsewhere, or was written to since (its version), and so its arena, bias
  and factors; another stream or another capture of a CUDA graph is under way;
- x is an inference tensor, which has no version (work under ``torch.no_grad()`` instead), or is
  not what the short way takes (``settled.Settled``: gradients, a compiler, autocast, modes,
  transforms, tracers, subclasses);
- the plan has no arena (``alpha`` with gradients), is the base, or keeps base rows stored; there is
  no plan; an expert is merged; the layers keep k components (delta form);
- a member has not been called under this plan, or its bias or factors changed; or another member
  was computed alone with this x: nothing is computed twice in one pass;
- there are more tokens than the policy says (``dispatch.GROUP_TOKENS``), another backend, or, on a
  GPU, batch-invariant mode, in which a form must not depend on the company;
- results were left lying several times running: these layers do not share x after all
  (cross-attention). Once a pass gives all of them one x, they share again.

What cannot be seen: between the calls of two members, a write to x, to the arena or to a weight
that raises no version. That is one through ``.data``, through numpy or by a kernel that was given
an address, and any write to a weight that is an inference tensor. Results that nobody takes go with
x, or with the next call, whichever comes first.

Memory is tied when the model has been moved (``_apply`` of the last member) and when a routing is
entered (``bank.use``), never in a call and never while a graph is captured.
"""

from __future__ import annotations

import logging
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

_log = logging.getLogger(__name__)

# So many calls in a row whose results were not all taken end the sharing.
PATIENCE = 4


class Group:
    """Neighbours in the order of the model's layers that get the same x."""

    def __init__(self, names: Sequence[str], layers: Sequence[SVFLinear]) -> None:
        self.names, self.layers = tuple(names), tuple(layers)
        self._left = 0  # calls in a row whose results were not all taken
        self._told = False  # that they share no more
        self._memo: _Memo | None = None
        self._ready: _Ready | None = None
        self._alone: _Alone | None = None
        self._parted = True  # the members' V may lie apart
        self._read = False  # and was read where it lies
        for index, layer in enumerate(self.layers):
            layer._group = (self, index)
        self.tie()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has computed nothing yet, and its tensors lie elsewhere."""
        anew = {"_left": 0, "_told": False, "_parted": True, "_read": False}
        return {**self.__dict__, **anew, "_memo": None, "_ready": None, "_alone": None}

    @property
    def shares(self) -> bool:
        """Whether the members' calls so far speak for sharing."""
        return self._left < PATIENCE

    def renew(self) -> None:
        """What was made of the members' old state, results too, is void."""
        self._memo = self._ready = self._alone = None

    def settled(self, index: int, x: Tensor) -> None:
        """A member decided anew, and was computed alone with x."""
        self.note(index, x)
        self._ready = None

    # -- memory --------------------------------------------------------------------------------

    @property
    def tied(self) -> bool:
        """Whether the members' V, σ and scales are parts of one buffer each."""
        return all(_whole(parts) is not None for parts in self._parts().values())

    @property
    def loose(self) -> bool:
        """Whether they lie apart and are to be tied when that may be done."""
        return self._parted and not self._read and not self._differ()

    def _parts(self) -> dict[str, list[Tensor]]:
        names = ["_Vh", "_S"] + ["_scale"] * any(m._scale is not None for m in self.layers)
        return {name: [getattr(m, name) for m in self.layers] for name in names}

    def moved(self, index: int) -> None:
        """A member's factors lie elsewhere now; with the last one all are tied again."""
        self.renew()
        self._parted, self._read = True, False
        route = self.layers[index]._route
        if route is not None:
            route[0].parted = True
        if index == len(self.layers) - 1:
            self.tie()

    def read(self) -> None:
        """V was read by an ordinary call. Where it lies apart it stays so until it is moved: a
        CUDA graph may have been captured that reads it there."""
        if self._parted:
            self._parted = self._read = not self.tied

    def tie(self) -> None:
        """Make V, σ and scales parts of one buffer where a move or a load has parted them.

        Copies; the old ones are freed one by one. Nothing is done while a graph is captured, which
        would repeat the copy from memory that is free by then, and where members differ.
        """
        if not self._parted or self._read or self._differ() or _capture(self.layers[0]._Vh):
            return
        parts = self._parts()
        if any(type(p) is not Tensor or p.is_meta for some in parts.values() for p in some):
            return
        self._parted = False
        if self.tied:
            return
        self.renew()
        with torch.no_grad(), torch.inference_mode(False):
            for name, some in parts.items():
                whole, at = torch.cat(some), 0
                for layer, part in zip(self.layers, some):
                    setattr(layer, name, whole[at : at + part.shape[0]])
                    layer._settled = None  # it knows the old address
                    at += part.shape[0]

    def _differ(self) -> bool:
        return len({(m._U.dtype, m._U.device, m._dtype, m._scale is None)
                    for m in self.layers}) > 1  # fmt: skip

    # -- the call ------------------------------------------------------------------------------

    def unfit(self) -> str | None:
        """Why the members cannot be one call, or None: they may have been moved apart."""
        if self._differ():
            return "the layers differ in dtype or device"
        if any(not m.full_rank for m in self.layers):
            return "the layers keep k components"
        route = self.layers[0]._route
        following = [m._route is not None and m._route[0] is (route and route[0])
                     for m in self.layers]  # fmt: skip
        if not all(following):
            return "the layers belong to different models"
        return None if self.tied else "their V lie apart; move the model as a whole to tie them"

    def take(self, index: int, x: Tensor, plan: Plan) -> Tensor | None:
        """What the call of another member with this x left for this one."""
        memo = self._memo
        if memo is None or memo.x() is not x or not memo.holds(index, x, plan):
            return None
        return memo.results.pop(index, None)

    def compute(
        self, index: int, x: Tensor, tokens: int, slot: Tensor | None, plan: Plan
    ) -> Tensor | None:
        """The member's y (tokens, m), with those of the others kept for them; None: go alone."""
        memo, alone = self._memo, self._alone
        if memo is not None and memo.x() is x:
            fits = index not in memo.results  # which ``take`` refused
        else:
            fits = alone is None or alone.x() is not x or index in alone.done
        if memo is not None and (fits or memo.x() is not x):
            self._count(memo)
            self._memo = None
        ready = self._ready
        fits = fits and self.shares
        if fits and (ready is None or ready.plan() is not plan):
            ready = self._ready = self._prepare(x, slot, plan)
        if not fits or ready is None or tokens > ready.limit or not ready.still():
            self.note(index, x)
            return None
        self._alone = None
        ys = ready.run(x, slot, plan)
        results = {i: y for i, y in enumerate(ys) if i != index}
        self._memo = _Memo(self, x, plan, ready, results)
        return ys[index]

    def note(self, index: int, x: Tensor) -> None:
        """A member is computed alone with x, and so will be those that follow in this pass."""
        memo, alone = self._memo, self._alone
        everyone = set(range(len(self.layers)))
        if memo is not None and memo.x() is x and index in memo.results:
            memo.results.pop(index, None)  # the others may take theirs
            alone = _Alone(x, everyone - memo.results.keys())
        elif alone is None or alone.x() is not x or index in alone.done:
            self._memo, alone = None, _Alone(x, {index})
        else:
            alone.done.add(index)
        self._alone = alone
        if alone.done == everyone:  # they got the same x
            self._left = 0

    def _count(self, memo: _Memo) -> None:
        """Whether the results of a call were all taken, before the next one."""
        self._left = self._left + 1 if memo.results or memo.expired else 0
        if self._left == PATIENCE and not self._told:
            self._told = True
            _log.info(
                "%s: computed apart until they are called with one x again: in %d calls running "
                "not all of them were", ", ".join(self.names), PATIENCE,
            )  # fmt: skip

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
        whole = {name: _whole(some) for name, some in self._parts().items()}
        Vh, S = whole["_Vh"], whole["_S"]
        if Vh is None or S is None:
            return None
        ready = _Ready(self.layers, parts, plan, Vh, S, whole.get("_scale"), limit)
        reason = first.module.group_unavailable(*ready.arguments(x, slot, plan))
        return None if reason is not None else ready


class _Alone:
    """The members that were computed one by one with this x."""

    __slots__ = ("done", "x")

    def __init__(self, x: Tensor, done: set[int]) -> None:
        self.x, self.done = weakref.ref(x), done


class _Memo:
    """Results of one call that wait for their owners, no longer than x lives."""

    __slots__ = (
        "_address", "_place", "_ready", "_version", "_weights", "_written", "expired", "plan",
        "results", "x",
    )  # fmt: skip

    def __init__(
        self, group: Group, x: Tensor, plan: Plan, ready: _Ready, results: dict[int, Tensor]
    ) -> None:
        self.results, self.plan, self.expired = results, weakref.ref(plan), False
        self._address, self._version, self._place = x.data_ptr(), x._version, _place(x)
        self._ready, self._written = ready, _writes(plan)
        self._weights = {i: ready.versions(i) for i in results}
        self.x = weakref.ref(x, group.forget)

    def holds(self, index: int, x: Tensor, plan: Plan) -> bool:
        """Whether a call of this member, now, would compute what is kept for it."""
        return (
            index in self.results
            and self._address == x.data_ptr()
            and self._version == x._version
            and self.plan() is plan
            and self._written == _writes(plan)
            and self._weights[index] == self._ready.versions(index)
            and self._place == _place(x)
        )


class _Ready:
    """One call of the backend for all members, and what it was made of."""

    __slots__ = ("_S", "_Us", "_V", "_biases", "_parts", "_place", "_scale", "_watched",
                 "limit", "plan")  # fmt: skip

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
        read = [(m._U, m._Vh, m._S, m.bias, m._scale) for m in layers]
        # An inference tensor has no version.
        self._watched = [[t for t in some if t is not None and not t.is_inference()]
                         for some in read]  # fmt: skip
        route = layers[0]._route
        self._place = (0 if route is None else route[2], S.shape[0])

    def still(self) -> bool:
        """Whether every tensor that the call reads lies where it lay."""
        return all(part.still() for part in self._parts)

    def versions(self, index: int) -> list[int]:
        """What writes to a member's weights raise; their addresses are looked at beside."""
        return [t._version for t in self._watched[index]]

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


def _whole(parts: Sequence[Tensor]) -> Tensor | None:
    """The one tensor that contiguous tensors are parts of, in order; None where they are not."""
    first = parts[0]
    end, memory = first.data_ptr(), first.untyped_storage().data_ptr()
    for part in parts:
        if (
            part.data_ptr() != end
            or part.dtype != first.dtype
            or part.device != first.device
            or part.shape[1:] != first.shape[1:]
            or not part.is_contiguous()
            or part.untyped_storage().data_ptr() != memory
        ):
            return None
        end += part.numel() * part.element_size()
    return first.as_strided((sum(p.shape[0] for p in parts), *first.shape[1:]), first.stride())


def _writes(plan: Plan) -> int:
    """How often the arena or the routing was written to: two numbers that only rise."""
    arena = plan.arena
    return plan.written + (0 if arena is None or arena.is_inference() else arena._version)


def _place(x: Tensor) -> tuple[int, int]:
    """The stream on which results of x come to be, and the CUDA graph they become part of."""
    return 0 if x.is_cpu else int(dispatch.load("cuda")._stream(x)), _capture(x)


def _capture(x: Tensor) -> int:
    """A number for the capture of a CUDA graph that is under way, 0 for none."""
    return int(dispatch.load("cuda")._capture(x)) if x.is_cuda else 0
