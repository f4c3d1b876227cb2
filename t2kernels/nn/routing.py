"""Which rows of a batch use which diagonal: the state that the layers of one model share.

A ``Plan`` is one routing decision, made when ``ExpertBank.use`` is entered and never changed; the
plans of ``Slots`` keep their tensors and have new values written into them.
The ``Route`` of a model holds the plan in force; every SVF layer of the model points to it. The
hook at the end guards what a layer cannot see: key/value caches and recomputation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from ..diagonal import mix

if TYPE_CHECKING:
    from .linear import SVFLinear

ROW_ORDERS = (None, "batch", "flat")

# The key of the base weights, and of a cache that no converted model has marked.
BASE_KEY = ("own", ())


@dataclass(eq=False)
class Plan:
    """One routing decision.

    form: "base" (no row has an expert), "uniform" (one mixture for all rows) or "rows".
    key: content of the decision, equal for equal decisions; key/value caches are tied to it.
    arena: (slots, R) fp32, the diagonals σ⊙z of all layers side by side; layer l owns columns
        [offset_l, offset_l + r_l). None when ``alpha`` carries gradients.
    rows: (B,) int32, the slot of each request, -1 for the base.
    slot: (tokens,) int32, an explicit slot of every token instead of ``rows``.
    alpha: (B, K) or (B, L, K) mixing weights that want gradients; mixed inside the layers.
    experts: (K, R) effective multipliers, with ``alpha``.
    """

    form: str
    key: object
    requests: int = 1
    arena: Tensor | None = None
    rows: Tensor | None = None
    slot: Tensor | None = None
    row_order: str | None = None
    alpha: Tensor | None = None
    experts: Tensor | None = None
    mixture: str = "deviation"
    stored_base_rows: bool = False
    ran: bool = False  # a forward was made under this plan
    written: int = 0  # how often arena or rows were written to after it was made
    _cache: dict[int, Tensor] = field(default_factory=dict)
    _columns: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def refresh(self) -> None:
        """Follow ``rows``, which were written in place, at the addresses that are in use."""
        self.written += 1
        if self.rows is not None:
            for times, slots in self._cache.items():
                if times > 1:  # one row per request is ``rows`` itself
                    slots.copy_(_repeat_rows(self.rows, times))

    def diagonal(self, index: int, offset: int, S: Tensor) -> Tensor:
        """The diagonals (slots, r) of layer ``index``; (r,) when uniform."""
        r = S.shape[0]
        if self.alpha is not None and self.experts is not None:
            alpha = self.alpha if self.alpha.dim() == 2 else self.alpha[:, index]
            d = S * mix(self.experts[:, offset : offset + r], alpha, self.mixture, S)
            return d[0] if self.form == "uniform" else d
        return self.columns(offset, r)

    def columns(self, offset: int, r: int) -> Tensor:
        """``arena[:, offset : offset + r]``, of its first slot alone when uniform."""
        compiling = torch.compiler.is_compiling()
        if not compiling and (offset, r) in self._columns:
            return self._columns[offset, r]
        if self.arena is None:
            raise RuntimeError(f"a plan of form {self.form!r} has no diagonals")
        arena = self.arena[0] if self.form == "uniform" else self.arena
        columns = arena[..., offset : offset + r]
        if not compiling:
            self._columns[offset, r] = columns
        return columns

    def token_slots(self, x: Tensor, batch: Tensor | None) -> Tensor:
        """The slot (tokens,) of every token of x (..., n), flattened.

        batch: the input of the model's call that is running; None outside of one.
        """
        tokens = x.shape[:-1].numel()
        if self.slot is not None:
            if self.slot.shape[0] != tokens:
                raise ValueError(
                    f"ExpertBank.use: slot names {self.slot.shape[0]} tokens, but a layer got an "
                    f"input of shape {tuple(x.shape)} with {tokens} tokens."
                )
            return self.slot
        if self.rows is None:
            raise RuntimeError(f"a plan of form {self.form!r} has no rows")
        rows = x.shape[0] if x.dim() > 2 else self._declared_rows(x, batch)
        if x.dim() > 2 and batch is not None and self.row_order != "batch" and rows != len(batch):
            raise ValueError(
                f"ExpertBank.use: a layer got an input of shape {tuple(x.shape)} while the model "
                f"was called with a batch of {len(batch)}; its first axis is not the batch "
                "(images of several requests, windows, tokens first). Exclude the layer from "
                "convert, pass slot=, or say row_order='batch' if each request owns equally many "
                "rows, in order."
            )
        # To a compiler the number is a constant of the graph, the size of a tensor a variable.
        requests = self.rows.shape[0] if torch.compiler.is_compiling() else self.requests
        if rows % requests:
            raise ValueError(
                f"ExpertBank.use: the routing names {self.requests} requests, but a layer got an "
                f"input of shape {tuple(x.shape)}, whose {rows} rows are not a multiple of that. "
                "Name one entry per row of the batch (beams and return sequences repeat rows)."
            )
        per_request = tokens // requests
        if torch.compiler.is_compiling():
            # Its size must be seen to be that of x: requests * per_request would not be.
            return self.rows[torch.arange(tokens, device=x.device) // per_request]
        if per_request not in self._cache:
            with torch.inference_mode(False):  # it may serve a call with gradients next
                self._cache[per_request] = _repeat_rows(self.rows, per_request)
        return self._cache[per_request]

    def _declared_rows(self, x: Tensor, batch: Tensor | None) -> int:
        """Rows of a 2-D input, whose first axis may be the batch or flattened tokens."""
        if x.dim() == 2 and self.row_order == "batch":
            return x.shape[0]
        if x.dim() == 2 and self.row_order == "flat":
            if batch is None or batch.dim() < 2:
                raise ValueError(
                    "ExpertBank.use: row_order='flat' needs the model's own input (input_ids, "
                    "inputs_embeds or pixel_values) to know the batch; call the model itself."
                )
            if x.shape[0] != batch.shape[0] * batch.shape[1]:
                raise ValueError(
                    f"ExpertBank.use: row_order='flat' expects batch x length = {batch.shape[0]} x "
                    f"{batch.shape[1]} rows in order, got an input of shape {tuple(x.shape)}. "
                    "Pass slot= with one entry per token."
                )
            return batch.shape[0]
        raise ValueError(
            f"ExpertBank.use: a layer got an input of shape {tuple(x.shape)}, which does not show "
            "which row belongs to which request. Say row_order='batch' (one row per row of the "
            "batch, like a pooler), row_order='flat' (tokens of the whole batch in order), or pass "
            "slot= with one entry per token."
        )


def _repeat_rows(rows: Tensor, times: int) -> Tensor:
    """Each entry ``times`` times, in order."""
    return rows.unsqueeze(1).expand(rows.shape[0], times).reshape(-1)


class Route:
    """The plan in force for one model, and where each layer's columns lie in an arena."""

    def __init__(self, model: nn.Module) -> None:
        self.plan: Plan | None = None
        self.merged: object = None
        # The input of the call that is running. The tensor, not its shape: to a compiler a size of
        # a tensor is a variable, a number that it finds in an object a constant.
        self.batch: Tensor | None = None
        self.layers: tuple[SVFLinear, ...] = ()
        self.frozen: list[Tensor] = []  # what `trainable` froze, for `revert`
        self.merged_by: int | None = None  # the number of the bank that did
        self._open: list[Plan] = []  # of the blocks that were entered and not left, in order
        self._owner: int | None = None
        self._ran_without_plan = False
        self.parted = False  # layers that share x were moved, and may lie apart
        model.register_forward_pre_hook(_watch_model_call, with_kwargs=True)
        model.register_forward_hook(_watch_model_result)

    def __getstate__(self) -> dict[str, Any]:
        """A model that is copied or sent to another process starts with no plan; its hooks come
        along with the model."""
        none = dict.fromkeys(("plan", "merged_by", "_owner", "batch"))
        return {**self.__dict__, **none, "_open": [], "parted": True}

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Take the model-level hooks away (by identity: a handle would not survive deepcopy)."""
        for key, hook in list(model._forward_pre_hooks.items()):
            if hook is _watch_model_call:
                del model._forward_pre_hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(model._forward_hooks.items()):
            if hook is _watch_model_result:
                del model._forward_hooks[key]

    @contextmanager
    def using(self, plan: Plan) -> Iterator[None]:
        """Put ``plan`` in force; afterwards the block inside which this one stands decides again.

        Blocks that interleave (generators that are closed in another order) leave nothing behind,
        but calls in the outer one were made under the inner one's plan: an error says so.
        """
        me = threading.get_ident()
        if self.plan is not None and self._owner != me:
            raise RuntimeError(
                "ExpertBank.use: another thread is inside `use` on this model. A model has one "
                "routing at a time; give each thread its own copy, or one batch for all requests."
            )
        if self.parted:
            self._tie()
        self.plan, self._owner, self.batch = plan, me, None
        self._open.append(plan)
        failed = False
        try:
            yield
        except Exception:
            failed = True
            raise
        finally:
            innermost = self._open[-1] is plan
            self._open.remove(plan)
            self.plan = self._open[-1] if self._open else None
            if not innermost and not failed:
                raise RuntimeError(_OTHER_ORDER)

    def _tie(self) -> None:
        """Bring the V of layers that share x together again, before a call reads them."""
        groups = {layer._group[0]: None for layer in self.layers if layer._group is not None}
        for group in groups:
            group.tie()
        self.parted = any(group.loose for group in groups)

    def guard(self, y: Tensor) -> None:
        """Make backward through y fail under another plan than the one in force now."""
        plan = self.plan

        def check(grad: Tensor) -> None:
            if self.plan is not plan:
                raise RuntimeError(_OTHER_ROUTING)

        y.register_hook(check)

    def note_layer_call(self) -> None:
        """Remember that a forward ran under the plan in force; inside backward, where
        checkpointing calls a layer again, raise if none did. (What the model as a whole returns is
        guarded besides: this is for layers that are called without their model.)"""
        plan = self.plan
        if not _inside_backward():
            if plan is None:
                self._ran_without_plan = True
            else:
                plan.ran = True
        elif not (self._ran_without_plan if plan is None else plan.ran):
            raise RuntimeError(_OTHER_ROUTING)


_OTHER_ORDER = (
    "ExpertBank.use: this block was left before one that was entered inside it, so calls made in "
    "both may have run under the other's experts. Leave blocks in reverse order: do not let two "
    "generators each hold one open on the same model."
)

_OTHER_ROUTING = (
    "backward, or a recomputation by gradient checkpointing, runs under another routing than the "
    "forward did. Call backward inside the same `with bank.use(...)` block."
)


def _is_cache(item: object) -> TypeGuard[Any]:
    """transformers' Cache, or what behaves like one."""
    return hasattr(item, "get_seq_length") and not isinstance(item, nn.Module)


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _cache_key(route: Route) -> object:
    """What the keys and values written now depend on: the plan, the merge, the layers' own z.

    Own z are known by their place and their version, which every write in place raises but one
    through ``.data``: after ``layer.z.data.fill_(...)`` a cache passes for what it was. Write to z
    under ``torch.no_grad()``, or start a new cache. Values would cost a wait for the GPU a call.
    """
    if route.merged is not None:
        return ("merged", route.merged)
    if route.plan is not None:
        return route.plan.key
    moved = [layer.z for layer in route.layers if not layer.rests()]
    return ("own", tuple((z.data_ptr(), z._version) for z in moved))


def _watch_model_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before each call of the model: note its input, guard caches and recomputation."""
    route: Route = model._t2_route  # type: ignore[assignment]
    for name in ("input_ids", "inputs_embeds", "pixel_values"):
        if isinstance(kwargs.get(name), Tensor):
            batch = kwargs[name]
            break
    else:
        batch = args[0] if args and isinstance(args[0], Tensor) else None
    route.batch = batch if batch is not None and batch.dim() > 0 else None
    if torch.compiler.is_compiling():
        return
    plan = route.plan
    rows = 0 if route.batch is None else len(route.batch)
    if plan is not None and plan.slot is None and rows % plan.requests:
        raise ValueError(
            f"ExpertBank.use: the routing names {plan.requests} requests, but the model was "
            f"called with a batch of {rows}. Name one entry per row of the batch "
            "(beams and return sequences repeat rows in order)."
        )
    caches = [item for item in (*args, *kwargs.values()) if _is_cache(item)]
    if not caches:
        return
    key = _cache_key(route)
    for cache in caches:
        _mark_cache(cache, key)


def _holds_tokens(cache: Any) -> bool:
    """Whether the cache remembers anything."""
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # states only (Mamba): there is no attention layer to count tokens
        return bool(cache.has_previous_state())


def _mark_cache(cache: Any, key: object) -> None:
    """Tie the cache to what its keys and values depend on; raise if it is tied to another."""
    if getattr(cache, "_t2_key", BASE_KEY) != key and _holds_tokens(cache):
        raise RuntimeError(
            "this key/value cache was made under other experts than those in force now, so its "
            "keys and values belong to another model. Start a new cache (past_key_values=None), or "
            "go on under the routing that made it."
        )
    cache._t2_key = key


def _watch_model_result(model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
    """After each call of the model: its result belongs to the routing of the call.

    A cache that the model made itself is marked, and backward through an output is guarded: the
    gradient passes here before any checkpointed block is computed again.
    """
    route: Route = model._t2_route  # type: ignore[assignment]
    route.batch = None
    if torch.compiler.is_compiling():
        return
    pending = [result]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            if item.requires_grad and item.grad_fn is not None:
                route.guard(item)
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif _is_cache(item):
            item._t2_key = _cache_key(route)
