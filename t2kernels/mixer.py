"""From mixtures to the diagonals that the layers of a model read, and the arenas of these."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .diagonal import mix
from .expert import Expert
from .mixtures import check_defined
from .nn.linear import SVFLinear
from .ops.mixing import mix_rows
from .streams import OwnLock, StreamOrder, replaced, sent
from .table import ExpertTable

#: ((name, weight), ...) in the bank's order; () is the base.
Weights = tuple[tuple[str, float], ...]

_SERIALS = itertools.count()


@dataclass(eq=False)
class Entry:
    """One expert of a bank.

    expert: as it was added; without z where the table's rounded rows are all that is kept.
    row: of the table. position: in the order of the bank, kept when the expert is replaced.
    serial: unlike id(), never given to a later expert again.
    """

    expert: Expert
    layers: tuple[str, ...]
    row: int
    position: int
    serial: int = field(default_factory=lambda: next(_SERIALS))


def without_z(expert: Expert, like: Entry | None) -> Expert:
    """All of an expert that a table of rounded rows does not hold. Experts of one base share its
    fingerprints: ``like`` is one that may have the same."""
    kept = copy.copy(expert)
    if like is not None and like.expert.fingerprints == kept.fingerprints:
        kept.fingerprints = like.expert.fingerprints
    kept.z = {}
    return kept


class Mixer:
    """Writes σ⊙z of all layers side by side, (R,) each, into rows of an arena.

    The form "deviation" is one launch of ``ops.mixing.mix_rows``. The others are computed by
    ``diagonal.mix`` as they are defined. ("paper-normalised" is a deviation of weights α/Σα up to
    rounding, "paper" the same as a deviation plus (Σα − 1)·σ; "authors" is not linear in z.)
    """

    def __init__(
        self, layers: Mapping[str, SVFLinear], entries: Mapping[str, Entry], table: ExpertTable
    ) -> None:
        self._layers, self._entries, self._table = layers, entries, table
        ranks = [layer.rank for layer in layers.values()]
        self.width, self._longest = sum(ranks), max(ranks)
        self._offsets = torch.tensor([0, *itertools.accumulate(ranks)], device="cpu")
        self._seen: list[tuple[Tensor, int]] = []
        self._S = torch.empty(0, device="cpu")
        self._order, self._lock = StreamOrder(), OwnLock()

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(iter(self._layers.values())).z.device

    @contextmanager
    def sigma(self) -> Iterator[Tensor]:
        """σ (R,) of all layers, for reads that the block enqueues on the current stream."""
        S = self._current_sigma()
        with self._order.reading(S.device):
            yield S

    @torch.no_grad()
    def _current_sigma(self) -> Tensor:
        """Put together again only when a layer's has changed, at the same address."""
        with self._lock:
            if self._seen and not self._sigma_changed():
                return self._S
            now = [layer._S for layer in self._layers.values()]
            with torch.inference_mode(False):
                if self._S.shape[0] != self.width or self._S.device != now[0].device:
                    self._order = replaced(self._S, self._order)
                    self._S = torch.empty(self.width, device=now[0].device)
                with self._order.writing(self._S.device):
                    torch.cat(now, out=self._S)
            self._seen = [(s, -1 if s.is_inference() else s._version) for s in now]
            return self._S

    def _sigma_changed(self) -> bool:
        for layer, (sigma, version) in zip(self._layers.values(), self._seen):
            if layer._S is not sigma or version < 0 or sigma._version != version:
                return True
        return False

    def vectors(self, names: Sequence[str]) -> Tensor:
        """Multipliers (K, R) in fp32 of these experts, on the model's device."""
        return self._table.vectors([self._entries[n].row for n in names], self.device)

    def rebuilt(self, entry: Entry) -> Expert:
        """The expert with z as the table holds it."""
        vector = self._table.vectors([entry.row], torch.device("cpu"))[0]
        parts = dict(zip(self._layers, vector.split([m.rank for m in self._layers.values()])))
        whole = copy.copy(entry.expert)
        whole.fingerprints = dict(whole.fingerprints)
        whole.z = {name: parts[name].clone() for name in self._layers if name in entry.layers}
        return whole

    @torch.no_grad()
    def write(
        self,
        out: Tensor,
        mixtures: Sequence[Weights],
        form: str,
        *,
        op: str,
        requests: Sequence[int],
        rows: Tensor | None = None,
    ) -> None:
        """Write mixture i into row i of ``out``, or row rows[i]; ``rows`` (B,) int32 is distinct.

        op, requests: for messages, the request to which each mixture belongs.
        """
        if form == "deviation":
            self._launch(out, mixtures, rows)
            return
        named = {name for weights in mixtures for name, _ in weights}
        involved = sorted(named, key=lambda n: self._entries[n].position)
        dense = [[dict(weights).get(n, 0.0) for n in involved] for weights in mixtures]
        alpha = sent(dense, torch.float32, out.device)
        Z = self.vectors(involved)
        check_defined(op, self._layers, Z, alpha, form, requests)
        d = self._diagonals(Z, alpha, form)
        out[slice(len(d)) if rows is None else rows.long()] = d

    @torch.no_grad()
    def write_alpha(self, out: Tensor, alpha: Tensor, form: str) -> None:
        """The same for alpha (B, K) or (B, L, K) over all experts in the bank's order.

        Whether the form is defined is the caller's to check (``check_defined``).
        """
        if form != "deviation":
            out[: len(alpha)] = self._diagonals(self.vectors(list(self._entries)), alpha, form)
            return
        table_rows = [entry.row for entry in self._entries.values()]
        if self._table.host:  # those that count must fit the cache
            used = (alpha != 0).flatten(0, -2).any(0)
            alpha = alpha[..., used]
            table_rows = [row for row, u in zip(table_rows, used.tolist()) if u]
        layered = alpha.dim() == 3
        with self._table.resident(table_rows, out.device) as (Z, places), self.sigma() as S:
            given = None
            if places != list(range(Z.shape[0])):
                given = sent(places, torch.int32, out.device).expand(alpha.shape[0], -1)
            mix_rows(
                out, S, Z, alpha, indices=given,
                offsets=self._offsets.to(out.device) if layered else None,
                longest=self._longest if layered else None,
            )  # fmt: skip

    def _launch(self, out: Tensor, mixtures: Sequence[Weights], rows: Tensor | None) -> None:
        """One launch for all mixtures; shorter ones are filled up with index -1."""
        K = max(map(len, mixtures), default=0)
        table_rows = [self._entries[name].row for weights in mixtures for name, _ in weights]
        with self._table.resident(table_rows, out.device) as (Z, found), self.sigma() as S:
            places = iter(found)
            indices = [[next(places) for _ in w] + [-1] * (K - len(w)) for w in mixtures]
            alpha = [[a for _, a in w] + [0.0] * (K - len(w)) for w in mixtures]
            shape = (len(mixtures), K)
            mix_rows(
                out, S, Z, sent(alpha, torch.float32, out.device).view(shape),
                indices=sent(indices, torch.int32, out.device).view(shape), rows=rows,
            )  # fmt: skip

    @torch.no_grad()
    def _diagonals(self, Z: Tensor, alpha: Tensor, form: str) -> Tensor:
        """σ⊙z (B, R) for alpha (B, K) or (B, L, K), in torch."""
        with self.sigma() as S:
            if alpha.dim() == 2 and form != "authors":
                return S * mix(Z, alpha, form)
            parts, offset = [], 0
            for index, layer in enumerate(self._layers.values()):
                columns = slice(offset, offset + layer.rank)
                a = alpha if alpha.dim() == 2 else alpha[:, index]
                parts.append(S[columns] * mix(Z[:, columns], a, form, S[columns]))
                offset += layer.rank
            return torch.cat(parts, dim=1)


class Arenas:
    """One arena (slots, R) fp32 for each depth of nested ``use`` blocks. The address is kept, so
    that a captured or compiled model sees a new routing without being captured again.

    A block of one stream may write where a block of another has just read: the device keeps order.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._arenas: list[Tensor] = []
        self._orders: list[StreamOrder] = []
        self._busy: set[int] = set()  # those of the blocks that are open
        self._lock = OwnLock()

    @contextmanager
    def held(self) -> Iterator[int]:
        """Inside, the arena of the depth that this yields belongs to the block: the first that no
        open block uses, so as a rule how deep blocks are nested."""
        with self._lock:
            depth = next(i for i in itertools.count() if i not in self._busy)
            self._busy.add(depth)
            if depth == len(self._arenas):
                self._arenas.append(torch.empty(0, self._width, device="cpu"))
                self._orders.append(StreamOrder())
        try:
            yield depth
        finally:
            self._busy.discard(depth)

    @contextmanager
    def writing(self, depth: int, slots: int, device: torch.device) -> Iterator[Tensor]:
        """The arena, with room for ``slots``, for writes that the block enqueues."""
        arena = self._arenas[depth]
        grows = arena.shape[0] < slots or arena.device != device
        if grows:
            self._orders[depth] = replaced(arena, self._orders[depth])
        with self._orders[depth].writing(device):
            if grows:
                # A larger arena is another shape to a compiler, so there is room for most batches.
                room = max(64, 1 << (slots - 1).bit_length())
                # An inference tensor could not be written to again outside inference mode.
                with torch.inference_mode(False):
                    arena = torch.zeros(room, self._width, device=device)
                self._arenas[depth] = arena
            yield arena

    @contextmanager
    def reading(self, depth: int) -> Iterator[None]:
        """Inside, the current stream may enqueue work that reads the arena."""
        with self._orders[depth].reading(self._arenas[depth].device):
            yield
