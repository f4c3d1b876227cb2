"""Slots for continuous batching: mixtures and routing at addresses that never change.

A request is admitted into a slot once, by one launch that touches no other slot; which slot each
row of the batch uses is a tensor written in place. So a captured CUDA graph, or a compiled model,
serves every later mixture, expert and routing as it is (``graphs.StepGraphs``).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .diagonal import MIXTURES
from .mixtures import Mixture, check_defined, shown
from .nn.routing import Plan
from .streams import OwnLock, StreamOrder, ThreadOrder, sent

if TYPE_CHECKING:
    from .bank import ExpertBank

_NUMBERS = itertools.count()
BASE = -1


class Slots:
    """Places for mixtures of one bank; made by ``ExpertBank.slots``.

    Attributes:
        arena: (slots, R) fp32, σ⊙z of all layers side by side; NaN where nobody was admitted.
        rows: (batch,) int32, the slot of each row of a batch, -1 = base. Both stay where they are.

    The key/value cache belongs to the caller, row by row. Elsewhere a cache is tied to the routing
    that made it; here the routing changes under one cache by design, so all that is checked is that
    it was made under these slots. A row given to another request, or a slot admitted anew, must
    begin with an empty row of the cache.

    A row without an expert is computed with d = σ, which is the base up to rounding. Gradients do
    not reach a mixture in a slot: use ``bank.use(alpha)`` to train one.

    ``admit``, ``release`` and ``assign`` enqueue on the current CUDA stream and wait, on the
    device, for what runs in ``use`` blocks and in replays of ``StepGraphs`` on other streams; these
    wait for the last of them. Two streams may read at once. Several threads may call them: a call
    waits, on the host, until no other thread is inside a ``use`` block or a replay, so that a step
    is computed under one routing; after ``ThreadOrder.PATIENCE`` seconds it raises RuntimeError.
    The thread that is inside may call them at once. Experts are added to the bank by one thread.

    >>> import torch, t2kernels as t2k
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> report = t2k.convert(model)
    >>> bank = t2k.ExpertBank(model)
    >>> bank.add("loud", t2k.Expert({"0": torch.full((4,), 3.0)}))
    >>> slots = bank.slots(8)
    >>> slots.admit(5, "loud")
    >>> slots.assign([5, None])
    >>> x = torch.randn(2, 1, 4)
    >>> with torch.no_grad(), slots.use(2):
    ...     y = model(x)
    >>> W, b = model[0].weight, model[0].bias
    >>> torch.allclose(y[0], 3 * x[0] @ W.T + b, atol=1e-5)
    True
    """

    def __init__(self, bank: ExpertBank, count: int, batch: int) -> None:
        for name, value in (("count", count), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                got = shown(value)
                raise ValueError(f"ExpertBank.slots: {name} must be an int ≥ 1, got {got}.")
        self._bank, self._mixer = bank, bank._mixer
        # The streams', the threads', and the plans'.
        self._order, self._threads, self._lock = StreamOrder(), ThreadOrder(), OwnLock()
        device = self._mixer.device
        with torch.inference_mode(False):
            self.arena = torch.full((count, self._mixer.width), float("nan"), device=device)
            self.rows = torch.full((batch,), BASE, dtype=torch.int32, device=device)
        self._admitted: set[int] = set()
        self._assigned = [BASE] * batch
        self._plans: dict[int, Plan] = {}
        self._key = ("slots", next(_NUMBERS))

    def __len__(self) -> int:
        return self.arena.shape[0]

    @property
    def batch(self) -> int:
        """Rows of the largest batch."""
        return self.rows.shape[0]

    @property
    def free(self) -> list[int]:
        """The slots that nobody was admitted to, in order."""
        return [slot for slot in range(len(self)) if slot not in self._admitted]

    @property
    def assigned(self) -> list[int]:
        """The slot of each row as ``assign`` left it, -1 = base; no wait for the device."""
        return list(self._assigned)

    # -- writing -------------------------------------------------------------------------------

    def admit(self, slot: int, routing: Mixture | Tensor, *, mixture: str = "deviation") -> None:
        """Write a mixture into a slot, free or not; with mixture="deviation" one launch.

        Args:
            routing: a name, a {name: weight}, None (the base), or weights (K,) or (L, K) over
                ``bank.names`` (and ``bank.layers``).
            mixture: as in ``ExpertBank.use``.

        The slot keeps its values when an expert is replaced in or removed from the bank later.
        Raises for a slot that does not exist, as ``ExpertBank.use`` does for a routing, and when
        the model was moved.
        """
        (slot,) = self._checked([slot], "admit", mixture)
        if not isinstance(routing, Tensor):
            self.admit_all({slot: routing}, mixture=mixture)
            return
        with self._writing("admit"):
            alpha = self._alpha(routing, mixture)
            with self._order.writing(self.arena.device):
                self._mixer.write_alpha(self.arena[slot : slot + 1], alpha, mixture)
            self._admitted.add(slot)
            self._note_writing()

    def admit_all(self, routings: Mapping[int, Mixture], *, mixture: str = "deviation") -> None:
        """Write one mixture into each of several slots, {slot: routing}: with
        mixture="deviation" one launch for all. Otherwise as ``admit``; all or none."""
        if not isinstance(routings, Mapping):
            got = type(routings).__name__
            raise TypeError(f"Slots.admit_all: expected {{slot: routing}}, got {got}.")
        slots = self._checked(routings, "admit", mixture)
        with self._writing("admit"):
            weights = [self._bank._weights(r, mixture, "Slots.admit") for r in routings.values()]
            with self._order.writing(self.arena.device):
                # No expert is the base in every form. What can be refused comes first.
                forms = [mixture if w else "deviation" for w in weights]
                for form in dict.fromkeys([mixture, "deviation"]):
                    mine = [i for i, f in enumerate(forms) if f == form]
                    if not mine:
                        continue
                    places = [slots[i] for i in mine]
                    self._mixer.write(
                        self.arena, [weights[i] for i in mine], form, op="Slots.admit",
                        requests=places, rows=sent(places, torch.int32, self.arena.device),
                    )  # fmt: skip
            self._admitted.update(slots)
            self._note_writing()

    def release(self, slot: int) -> None:
        """Free a slot. Its values are gone at once; no row may be assigned to it."""
        (slot,) = self._checked([slot], "release")
        with self._writing("release"):
            if slot not in self._admitted:
                raise ValueError(f"Slots.release: nobody was admitted to slot {slot}.")
            if slot in self._assigned:
                raise ValueError(
                    f"Slots.release: row {self._assigned.index(slot)} is assigned to slot {slot}. "
                    "Assign the rows anew first."
                )
            with self._order.writing(self.arena.device):
                self.arena[slot].fill_(float("nan"))
            self._admitted.discard(slot)
            self._note_writing()

    def assign(self, slots: Sequence[int | None]) -> None:
        """Say which slot each row of the batch uses; None or -1 is the base, as are rows beyond.

        Written in place, in order with what reads it on any stream and in any thread. Raises for a
        slot that nobody was admitted to, and as ``admit`` does.
        """
        if isinstance(slots, (str, Tensor)) or not isinstance(slots, Sequence):
            raise TypeError(
                "Slots.assign: expected a list with a slot (int) or None for each row, got "
                f"{type(slots).__name__}."
            )
        if len(slots) > self.batch:
            raise ValueError(
                f"Slots.assign: {len(slots)} rows, but the batch has at most {self.batch}. "
                "Make the slots with a larger batch=."
            )
        self._check_model("assign")
        new = []
        for row, entry in enumerate(slots):
            number = BASE if entry is None else _index(entry)
            if number is None:
                raise TypeError(f"Slots.assign: row {row} must be an int or None, got {entry!r}.")
            new.append(number)
        with self._writing("assign"):
            for row, slot in enumerate(new):
                if slot != BASE and slot not in self._admitted:
                    raise ValueError(
                        f"Slots.assign: row {row} names slot {shown(slot)}, to which nobody was "
                        "admitted. Call admit first."
                    )
            new += [BASE] * (self.batch - len(new))
            with self._order.writing(self.rows.device):
                self.rows.copy_(sent(new, torch.int32, self.rows.device))
                for plan in self._plans.values():
                    plan.refresh()
            self._assigned = new

    # -- reading -------------------------------------------------------------------------------

    @contextmanager
    def use(self, batch: int | None = None) -> Iterator[None]:
        """Inside, row i of a batch of ``batch`` rows (default: all) uses the slot assigned to it.

        The routing may be assigned anew inside, by the thread that is inside; others wait until the
        block is left. The block belongs to the stream and the thread that entered it. May be nested
        with ``bank.use``; the inner decides.
        """
        plan = self.plan(self.batch if batch is None else batch)
        self.check_ready()
        with self.reading(), self._bank._route.using(plan):
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, the current stream may enqueue work that reads the slots, such as a replay."""
        with self._threads.reading("Slots.use"), self._order.reading(self.arena.device):
            yield

    def check_ready(self) -> None:
        """Raise where a batch would not be computed under these slots: the model was reverted or
        moved, or an expert is merged."""
        self._check_model("use")
        if self._bank._route.merged is not None:
            raise RuntimeError("Slots.use: an expert is merged; call bank.unmerge() first.")

    def plan(self, batch: int) -> Plan:
        """The plan of batches of this size: one object for ever, its rows a view of ``rows``."""
        if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= self.batch:
            raise ValueError(
                f"Slots.use: batch must be an int from 1 to {self.batch}, got {shown(batch)}."
            )
        with self._lock, torch.inference_mode(False):
            if batch not in self._plans:
                self._plans[batch] = Plan(
                    "rows", self._key, batch, self.arena, self.rows[:batch],
                    row_order=self._bank.row_order,
                )  # fmt: skip
            return self._plans[batch]

    # -- helpers -------------------------------------------------------------------------------

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Inside, this thread alone changes what the slots hold, or reads it."""
        # The lock second: the thread that is waited for may make a plan.
        with (
            self._threads.writing(f"Slots.{what}"), self._lock,
            torch.inference_mode(False), torch.no_grad(),
        ):  # fmt: skip
            yield

    def _note_writing(self) -> None:
        """A result that a layer keeps for its neighbour is none of the new mixture."""
        for plan in self._plans.values():
            plan.written += 1

    def _alpha(self, alpha: Tensor, mixture: str) -> Tensor:
        """(1, K) or (1, L, K) fp32 on the device, checked."""
        K, L = len(self._bank), len(self._bank.layers)
        if alpha.shape not in ((K,), (L, K)) or not alpha.is_floating_point() or K == 0:
            raise ValueError(
                f"Slots.admit: weights must be a float tensor (K,) = ({K},) or (L, K) = ({L}, {K}) "
                f"over bank.names and bank.layers, got {tuple(alpha.shape)} {alpha.dtype}."
            )
        alpha = alpha.detach().float()
        if not bool(torch.isfinite(alpha).all()):  # a wait where they are on the GPU
            raise ValueError("Slots.admit: weights must be finite.")
        alpha = alpha.to(self.arena.device).unsqueeze(0)
        if mixture != "deviation":
            Z = self._mixer.vectors(self._bank.names)
            check_defined("Slots.admit", self._bank._layers, Z, alpha, mixture, [0])
        return alpha

    def _checked(self, slots: Iterable[object], what: str, mixture: str = "deviation") -> list[int]:
        """The numbers of existing slots."""
        numbers = []
        for slot in slots:
            number = _index(slot)
            if number is None:
                raise TypeError(f"Slots.{what}: slot must be an int, got {type(slot).__name__}.")
            if not 0 <= number < len(self):
                got = shown(number)
                raise ValueError(f"Slots.{what}: slot must lie in [0, {len(self)}), got {got}.")
            numbers.append(number)
        if mixture not in MIXTURES:
            raise ValueError(f"Slots.{what}: mixture must be one of {MIXTURES}, got {mixture!r}.")
        self._check_model(what)
        return numbers

    def _check_model(self, what: str) -> None:
        self._bank._check_model()
        if self._mixer.device != self.arena.device:
            raise RuntimeError(
                f"Slots.{what}: the model is on {self._mixer.device}, these slots are on "
                f"{self.arena.device}. Make new ones with bank.slots(...)."
            )

    def __repr__(self) -> str:
        return f"Slots({len(self._admitted)} of {len(self)} taken, batches up to {self.batch})"


def _index(value: Any) -> int | None:
    """An int of any kind, such as numpy's; None for all else. A tensor may cost a wait."""
    if isinstance(value, (bool, Tensor)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
