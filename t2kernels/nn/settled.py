"""What a layer settled at its last call and need not decide again: the short way through it.

A call of a layer asks which plan is in force, whether z rests, which form that makes, where the
diagonal lies, which backend runs it. Between two tokens of an answer nothing of it changes. A
``Settled`` keeps the outcome beside all that it went by, compares, and says None where anything is
not what it was: the layer then decides anew, with every check.

What undoes it: another plan, or none (``bank.use``); a merge; z, or σ where d was made of it
(address, version, and on a CPU every value); another bias; factors, bias or diagonal that moved;
the backend, T2_BACKEND, batch-invariant mode; gradients, autocast, a compiler, a mode, a transform,
a tracer, a tensor subclass; another dtype or width of x. ``_apply``, copies and pickles start
without one.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import dispatch
from ..ops.functional import unobserved
from ..ops.host import same_bytes
from ..ops.prepared import Prepared, prepare
from .group import Member

if TYPE_CHECKING:
    from .linear import SVFLinear
    from .routing import Plan


class Watch:
    """Whether a tensor still holds what it held.

    On a CPU its values are compared, since a write through ``.data`` raises no version. Elsewhere
    address and version decide, so that no call waits for a GPU.
    """

    __slots__ = ("_address", "_bytes", "_values", "_version", "_was")

    def __init__(self, t: Tensor) -> None:
        self._address = t.data_ptr()
        self._version = None if t.is_inference() else t._version
        on_cpu = t.device.type == "cpu" and t.is_contiguous()
        self._values = t.detach().clone() if on_cpu else None
        self._was = 0 if self._values is None else self._values.data_ptr()
        self._bytes = t.numel() * t.element_size()

    def holds(self, t: Tensor) -> bool:
        """Whether ``t``, the tensor of before or one in its place, is as it was."""
        address = t.data_ptr()
        if address != self._address or (self._version is not None and t._version != self._version):
            return False
        return self._values is None or same_bytes(address, self._was, self._bytes)


class Settled:
    """The outcome of one call of a layer; see above. Made by ``settle``."""

    __slots__ = (
        "_U", "_bias", "_d", "_place", "_plan", "_product", "_rows", "_sigma", "_slots_of", "_z",
    )  # fmt: skip

    def __init__(
        self,
        layer: SVFLinear,
        plan: Plan | None,
        product: Prepared | Member | None = None,
        d: Tensor | None = None,
        rows: bool = False,
    ) -> None:
        """product: None where the stored weight is used as it is; d: its diagonal."""
        # A bank that is dropped takes its plans and its arena along.
        self._plan = None if plan is None else weakref.ref(plan)
        in_arena = plan is not None and d is not None and d is not layer._S
        self._d = None if in_arena else d
        self._place = (layer._route[2], layer.rank) if in_arena and layer._route else (0, 0)
        self._product, self._rows = product, rows
        self._U, self._bias = layer._U, layer._parameters["bias"]
        self._z: Any = layer._z_seen  # a Watch where the layer's own z decides
        self._sigma = Watch(layer._S) if plan is None and d is not None else None
        # (shapes of x and of the model's input, slots): one object, for threads that call at once.
        self._slots_of: tuple[object, Tensor | None] = None, None

    def __call__(self, layer: SVFLinear, x: Tensor) -> Tensor | None:
        """y, or None where the layer has to decide."""
        held = layer.__dict__
        route, parameters = held["_route"], held["_parameters"]
        plan: Any = None if route is None else route[0].plan
        if held["_merged"] or held["_U"] is not self._U or parameters["bias"] is not self._bias:
            return None
        if plan is None:
            if self._plan is not None or not self._own_holds(parameters["z"], held["_S"]):
                return None
        elif self._plan is None or self._plan() is not plan:
            return None
        if self._product is None:
            weight = parameters["weight"]
            if weight is None or dispatch.switches.batch_invariant:
                return None
            return F.linear(x, weight, self._bias)
        d = plan.columns(*self._place) if self._d is None else self._d
        slot = self._slots(x, plan, route[0].batch) if self._rows else None
        return self._product(x, slot, d)

    def alone(self, plan: Plan) -> Prepared | None:
        """The product of the layer by itself under this plan, for a member of a group."""
        member = self._product
        if type(member) is not Member or self._plan is None or self._plan() is not plan:
            return None
        return member.alone

    def _own_holds(self, z: Tensor, S: Tensor) -> bool:
        """Whether the layer's own z, which decides without a plan, is as it was."""
        if (z.requires_grad and torch.is_grad_enabled()) or not self._z.holds(z):
            return False
        return self._sigma is None or self._sigma.holds(S)

    def _slots(self, x: Tensor, plan: Plan, batch: Tensor | None) -> Tensor:
        """The slot of every token, which follows from the plan and two shapes."""
        shapes = x.shape, None if batch is None else batch.shape
        known, slot = self._slots_of
        if slot is None or known != shapes:
            slot = plan.token_slots(x, batch)
            self._slots_of = shapes, slot
        return slot


def settle(
    layer: SVFLinear, x: Tensor, form: str, d: Tensor | None, slot: Tensor | None
) -> Settled | None:
    """What a call with x that came to (form, d, slot) settles for the next; None where nothing."""
    plan = None if layer._route is None else layer._route[0].plan
    if layer._group is not None and (d is not None or layer.weight is None):
        layer._group[0].read()
    if form in ("merged", "rows, base rows stored"):
        return None
    if d is None and layer.weight is not None:
        return None if layer.transposed else Settled(layer, plan)
    if torch.is_grad_enabled() or not layer.full_rank or not unobserved(x):
        return None
    if plan is not None and plan.alpha is not None:  # d is computed at every call
        return None
    d = layer._S if d is None else d
    tokens = x.shape[:-1].numel()
    alone = prepare(
        layer._dtype, tokens, layer._U, layer._Vh, d, layer._S, slot, layer.bias, layer._scale
    )
    if alone is None:
        return None
    product: Prepared | Member = alone
    if layer._group is not None:
        group, index = layer._group
        group.settled(index, x)
        shares = dispatch.GROUP_TOKENS.get(alone.module.NAME, 0) > 0 and d is not layer._S
        if plan is not None and shares:
            product = Member(group, index, plan, alone)
    return Settled(layer, plan, product, d, slot is not None)
