"""A bank of experts on one model: which request gets which mixture, and merging."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .convert import converted_layers
from .diagonal import MIXTURES
from .expert import Expert
from .files import check_name
from .mixer import Arenas, Entry, Mixer, Weights, without_z
from .mixtures import Mixture, Routing, check_defined, weights_of
from .nn.merging import merge as merge_layers
from .nn.routing import BASE_KEY, ROW_ORDERS, Plan, Route
from .ops.library import check_slot_values
from .serving import Slots
from .table import ExpertTable

_SERIALS = itertools.count()
_SHOWN = 40  # names in a message


class ExpertBank:
    """Named experts of one converted model, all resident, mixed per request.

    A mixture is z = 1 + Σ_k α_k (z_k − 1), so {"math": 0.5} is half-way from the base to math.

    Attributes:
        names: the experts, in the order of the K axis of alpha.
        layers: the layers' names, in the order of the L axis of alpha.
        row_order: of each ``use`` that does not say its own; see there.

    Args:
        dtype: torch.float32 keeps experts exact. torch.bfloat16 keeps z − 1 in half the memory and
            no other copy: d is off by at most σ Σ_k |α_k| |z_k − 1| / 256, and what ``bank[name]``
            and ``save`` give back is rounded so.
        host: keep the experts in the host's memory (pinned beside a GPU) and the ``cache`` that
            were used last on the model's device; see ``prefetch``.
        capacity: experts to make room for at first; the room doubles whenever it is full.

    >>> import torch, t2kernels as t2k
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> report = t2k.convert(model)
    >>> bank = ExpertBank(model)
    >>> bank.add("loud", Expert({"0": torch.full((4,), 3.0)}))
    >>> x = torch.randn(2, 1, 4)
    >>> with torch.no_grad(), bank.use(["loud", None]):
    ...     y = model(x)
    >>> W, b = model[0].weight, model[0].bias
    >>> torch.allclose(y[0], 3 * x[0] @ W.T + b, atol=1e-5)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        row_order: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        host: bool = False,
        cache: int = 64,
        capacity: int = 0,
    ) -> None:
        self._layers = converted_layers(model)
        self.model, self.row_order = model, row_order
        self._route: Route = model._t2_route  # type: ignore[assignment]
        self._entries: dict[str, Entry] = {}
        width = sum(layer.rank for layer in self._layers.values())
        self._table = ExpertTable(width, dtype=dtype, host=host, cache=cache, capacity=capacity)
        self._mixer = Mixer(self._layers, self._entries, self._table)
        self._arenas = Arenas(width)
        self._positions = itertools.count()
        self._number = next(_SERIALS)

    # -- members -------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    @property
    def layers(self) -> list[str]:
        return list(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the table that holds the experts, with the room it has for more."""
        return self._table.nbytes

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> Expert:
        self._known(name)
        entry = self._entries[name]
        return entry.expert if entry.expert.z else self._mixer.rebuilt(entry)

    @torch.inference_mode(mode=False)  # inference tensors could not be used with gradients
    def add(
        self, name: str, expert: Expert, *, overwrite: bool = False, allow_mismatch: bool = False
    ) -> None:
        """Make ``expert`` available as ``name``.

        Raises when the name is taken (``overwrite``), or when the expert belongs to another model
        or another base weight (``allow_mismatch``).
        """
        check_name(name, "expert name")
        if not isinstance(expert, Expert):
            raise TypeError(
                f"ExpertBank.add: expert must be an Expert, got {type(expert).__name__}. "
                "Load a file with Expert.load(path)."
            )
        if name in self._entries and not overwrite:
            raise ValueError(
                f"ExpertBank.add: there is an expert {name!r} already. Choose another name or pass "
                "overwrite=True."
            )
        fitted = expert.fitted(self._layers, allow_mismatch=allow_mismatch)
        ranks = {n: layer.rank for n, layer in self._layers.items()}
        z = torch.cat([fitted.get(n, torch.ones(r, device="cpu")) for n, r in ranks.items()])
        before = self._entries.get(name)
        row = self._table.put(z, self._mixer.device, None if before is None else before.row)
        position = next(self._positions) if before is None else before.position
        if self._table.dtype != torch.float32:
            expert = without_z(expert, next(reversed(self._entries.values()), None))
        self._entries[name] = Entry(expert, tuple(fitted), row, position)

    def remove(self, name: str) -> None:
        """Forget the expert ``name``."""
        self._known(name)
        self._table.remove(self._entries.pop(name).row)

    def save(self, folder: str | Path) -> None:
        """One safetensors file per expert, named after it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in self._entries:
            self[name].save(folder / f"{name}.safetensors")

    def load(self, folder: str | Path, *, allow_mismatch: bool = False) -> list[str]:
        """Add every expert file of ``folder``, in order of their names; returns the names."""
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"ExpertBank.load: no *.safetensors in {folder}.")
        added: list[str] = []
        try:
            for path in paths:
                self.add(path.stem, Expert.load(path), allow_mismatch=allow_mismatch)
                added.append(path.stem)
        except BaseException:  # all of the folder or nothing
            for name in added:
                self.remove(name)
            raise
        return added

    def prefetch(self, names: Iterable[str]) -> None:
        """Bring experts of a bank with ``host=True`` to the device, ahead of the ``use`` or
        ``admit`` that names them; on a GPU beside what runs there. Without ``host`` all are there.
        """
        if not isinstance(names, Iterable):
            raise TypeError(f"ExpertBank.prefetch: names must be a list, got {names!r}.")
        wanted = [names] if isinstance(names, str) else list(names)
        for name in wanted:
            self._known(name)
        self._table.prefetch([self._entries[name].row for name in wanted], self._mixer.device)

    # -- routing -------------------------------------------------------------------------------

    def slots(self, count: int, batch: int | None = None) -> Slots:
        """``count`` places for mixtures at addresses that never change: for continuous batching and
        CUDA graphs. ``batch``: rows of the largest batch, by default ``count``. See ``Slots``."""
        self._check_model()
        return Slots(self, count, count if batch is None else batch)

    @contextmanager
    def use(
        self,
        routing: Routing,
        *,
        slot: Tensor | None = None,
        row_order: str | None = None,
        mixture: str = "deviation",
        base_rows: str = "factorised",
    ) -> Iterator[None]:
        """Inside, the bank decides which expert each row uses; the layers' own z rest.

        Args:
            routing: a name, a {name: weight}, or None (the base) for all rows; a list of these,
                one per request; or alpha, a (B, K) or (B, L, K) tensor of mixing weights over
                ``names`` (and ``layers``). Gradients reach alpha.
            slot: (tokens,) int32, the request of every token (-1 = base) of a flattened input. Else
                rows follow the batch axis; beams and return sequences repeat them in order.
            row_order: what the first axis of 2-D inputs is: "batch" (one row per row of the
                batch, like a pooler) or "flat" (all tokens of it in order). Never guessed.
            mixture: "deviation", "paper", "paper-normalised" or "authors"; see ``mix``.
            base_rows: in a mixed batch a None row is computed with d = σ, exact to rounding
                ("factorised"), or with the stored W at the cost of a dense product ("stored").

        Where no row has an expert, the stored W is used and the output is bit-exact. Backward must
        run inside the same block. May be nested; the inner block decides.
        """
        self._check_model()
        row_order = row_order or self.row_order
        if self._route.merged is not None:
            raise RuntimeError("ExpertBank.use: an expert is merged; call bank.unmerge() first.")
        for what, value, allowed in (
            ("row_order", row_order, ROW_ORDERS),
            ("mixture", mixture, MIXTURES),
            ("base_rows", base_rows, ("factorised", "stored")),
        ):
            if value not in allowed:
                raise ValueError(f"ExpertBank.use: {what} must be one of {allowed}, got {value!r}.")
        if base_rows == "stored" and any(m.weight is None for m in self._layers.values()):
            raise ValueError("ExpertBank.use: base_rows='stored' needs convert(keep_weight=True).")
        if slot is not None and not isinstance(slot, Tensor):
            raise TypeError(
                f"ExpertBank.use: slot must be (tokens,) int32, got {type(slot).__name__}."
            )
        with self._arenas.held() as depth:
            with torch.inference_mode(False):  # the plan may serve calls with gradients, too
                plan = self._plan(routing, slot, mixture, depth)
            plan.row_order, plan.stored_base_rows = row_order, base_rows == "stored"
            with self._arenas.reading(depth), self._route.using(plan):
                yield

    def _plan(self, routing: Routing, slot: Tensor | None, mixture: str, depth: int) -> Plan:
        if isinstance(routing, Tensor):
            return self._plan_alpha(routing, slot, mixture, depth)
        single = routing is None or isinstance(routing, (str, Mapping))
        if not single and not isinstance(routing, Sequence):
            raise TypeError(
                "ExpertBank.use: routing must be a name, a {name: weight}, None, a list of these, "
                f"or an alpha tensor, got {type(routing).__name__}."
            )
        requests: list[Any] = [routing] if single else list(routing)  # type: ignore[arg-type]
        if not requests:
            raise ValueError("ExpertBank.use: routing is an empty list; name one entry per row.")
        weights = [self._weights(entry, mixture, "ExpertBank.use") for entry in requests]
        distinct = list(dict.fromkeys(w for w in weights if w))
        key = (mixture, tuple(self._content(w) for w in weights))
        if not distinct:
            return Plan("base", BASE_KEY, len(requests))
        first = [weights.index(w) for w in distinct]
        with self._arenas.writing(depth, len(distinct), self._mixer.device) as arena:
            self._mixer.write(arena, distinct, mixture, op="ExpertBank.use", requests=first)
        if slot is None and (single or len(requests) == 1):
            return Plan("uniform", (mixture, (self._content(weights[0]),)), 1, arena)
        places = [distinct.index(w) if w else -1 for w in weights]
        rows = torch.tensor(places, dtype=torch.int32, device="cpu")
        return self._rows_plan(key, arena, rows, slot)

    def _plan_alpha(self, alpha: Tensor, slot: Tensor | None, mixture: str, depth: int) -> Plan:
        K, L = len(self._entries), len(self._layers)
        if K == 0:
            raise ValueError("ExpertBank.use: the bank is empty; add an expert first.")
        if alpha.shape[-1] != K or alpha.dim() not in (2, 3) or (
            alpha.dim() == 3 and alpha.shape[1] != L
        ):  # fmt: skip
            raise ValueError(
                f"ExpertBank.use: alpha must have shape (B, K) = (B, {K}) or (B, L, K) = "
                f"(B, {L}, {K}), got {tuple(alpha.shape)}. The order is bank.names, bank.layers."
            )
        if alpha.shape[0] == 0 or not alpha.is_floating_point():
            what = f"a float tensor with at least one row, got {tuple(alpha.shape)} {alpha.dtype}."
            raise ValueError(f"ExpertBank.use: alpha must be {what}")
        if not bool(torch.isfinite(alpha.detach()).all()):
            raise ValueError("ExpertBank.use: alpha must be finite.")
        alpha = alpha.to(self._mixer.device, torch.float32)
        B, Z = alpha.shape[0], None
        if alpha.requires_grad or mixture != "deviation":
            Z = self._mixer.vectors(self.names)
            check_defined("ExpertBank.use", self._layers, Z, alpha, mixture, range(B))
        rows = torch.arange(B, dtype=torch.int32, device="cpu")
        uniform = B == 1 and slot is None  # one request: nothing to tell apart
        if alpha.requires_grad:
            key = object()
            plan = Plan("uniform", key) if uniform else self._rows_plan(key, None, rows, slot)
            plan.alpha, plan.experts, plan.mixture = alpha, Z, mixture
            return plan
        # Row by row, the content that decides: for caches, and for rows that are the base.
        content = tuple(row.cpu().numpy().tobytes() for row in alpha)
        serials = tuple(entry.serial for entry in self._entries.values())
        key = ("alpha", mixture, serials, content)
        if mixture == "deviation":
            zero = (alpha.flatten(1) == 0).all(1).cpu()
            if bool(zero.all()):
                return Plan("base", BASE_KEY, B)
            rows[zero] = -1
        with self._arenas.writing(depth, B, self._mixer.device) as arena:
            self._mixer.write_alpha(arena, alpha, mixture)
        if uniform:
            return Plan("uniform", key, 1, arena)
        return self._rows_plan(key, arena, rows, slot)

    def _rows_plan(
        self, key: object, arena: Tensor | None, rows: Tensor, slot: Tensor | None
    ) -> Plan:
        rows = rows.to(self._mixer.device)
        if slot is None:
            return Plan("rows", key, rows.shape[0], arena, rows)
        if slot.dtype != torch.int32 or slot.dim() != 1:
            got = f"{tuple(slot.shape)} {slot.dtype}"
            raise TypeError(f"ExpertBank.use: slot must be (tokens,) int32, got {got}.")
        check_slot_values(slot, rows.shape[0])
        slot = slot.to(self._mixer.device)
        with_base = torch.cat([rows, rows.new_full((1,), -1)])  # index -1 is the base
        key = (key, slot.cpu().numpy().tobytes())
        return Plan("rows", key, rows.shape[0], arena, rows, with_base[slot.long()])

    def _weights(self, entry: Mixture, mixture: str, op: str) -> Weights:
        """A request's mixture as ((name, weight), ...) in the bank's order; () is the base."""
        given = weights_of(entry, self._known, op)
        if mixture == "deviation":
            given = {n: w for n, w in given.items() if w != 0}
        return tuple(sorted(given.items(), key=lambda item: self._entries[item[0]].position))

    def _content(self, weights: Weights) -> object:
        return tuple((self._entries[n].serial, w) for n, w in weights)

    # -- merging -------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, routing: Mixture, *, mixture: str = "deviation", keep: str = "device") -> None:
        """Write one mixture into the stored weights: the fastest form for a single static expert.

        W′ = W + U·diag(σ⊙(z − 1))·Vᵀ in the weights' own memory, summed in fp32 and rounded once
        (on a GPU the products are of 16 bits; see ``nn/merging.py`` for the bound). The base
        weights are copied aside and ``unmerge`` brings them back bit-exact, after any number of
        cycles; merging another mixture starts from them. Captured graphs see what is merged.

        Args:
            keep: where the copies wait: "device", one more copy of the weights that the mixture
                changes, or "host", page-locked host memory: none of the GPU's, but every merge
                and ``unmerge`` then reads them over the bus.
        """
        self._check_model()
        if self._route.plan is not None:
            raise RuntimeError("ExpertBank.merge: leave the `with bank.use(...)` block first.")
        if self._route.merged is not None and self._route.merged_by != self._number:
            raise RuntimeError("ExpertBank.merge: another bank has merged here; unmerge() first.")
        if not (routing is None or isinstance(routing, (str, Mapping))):
            raise TypeError(
                "ExpertBank.merge: one name or {name: weight}; a merged model has one expert for "
                f"all rows. Got {type(routing).__name__}."
            )
        weights = self._weights(routing, mixture, "ExpertBank.merge")
        if not weights:
            self.unmerge()
            return
        out = torch.empty(1, self._mixer.width, device=self._mixer.device)
        self._mixer.write(out, [weights], mixture, op="ExpertBank.merge", requests=[0])
        d, layers = out[0], list(self._layers.values())
        try:
            merge_layers(layers, d.split([layer.rank for layer in layers]), keep)
        except BaseException:
            self.unmerge()
            raise
        self._route.merged, self._route.merged_by = (mixture, self._content(weights)), self._number

    def unmerge(self) -> None:
        """Bring the base weights back, bit-exact; nothing happens when nothing is merged."""
        self._check_model()
        for layer in self._layers.values():
            layer.unmerge()
        self._route.merged = None

    # -- helpers -------------------------------------------------------------------------------

    def _known(self, name: object) -> None:
        if name in self._entries:
            return
        close = difflib.get_close_matches(str(name), self.names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        shown = self.names if len(self) <= _SHOWN else f"{len(self)} experts"
        raise KeyError(f"no expert named {name!r}; the bank has {shown}.{hint}")

    def _check_model(self) -> None:
        if getattr(self.model, "_t2_route", None) is not self._route:
            raise RuntimeError(
                "this bank's model was reverted (or converted again); make a new ExpertBank."
            )

    def __repr__(self) -> str:
        shown = self.names if len(self) <= _SHOWN else f"{len(self)} experts"
        return f"ExpertBank({shown}, {len(self._layers)} layers)"
