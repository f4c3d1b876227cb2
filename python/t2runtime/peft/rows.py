"""Which row of a batch uses which adapter: ``adapter_names`` of one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import SVFTunerLinear

#: PEFT's name for the model without an adapter.
BASE = "__base__"


class AdapterRows:
    """One adapter name per row of the batch, and what the layers make of it, made once.

    Args:
        names: one per request; ``BASE`` for the base model.
        repeats: beams and return sequences repeat every row so many times, in order.
    """

    def __init__(self, names: Sequence[str], repeats: int = 1) -> None:
        self.names = tuple(names)
        self.repeats = repeats
        self.distinct = tuple(dict.fromkeys(n for n in self.names if n != BASE))
        self._slots: dict[object, Tensor] = {}
        self._diagonals: dict[object, Tensor] = {}

    def uniform(self, present: Sequence[str]) -> bool:
        """Whether all rows use one and the same of the adapters that a layer has."""
        return len(present) == 1 and all(name == present[0] for name in self.names)

    def with_base(self, present: Sequence[str]) -> bool:
        """Whether some row uses none of the adapters that a layer has."""
        return any(name not in present for name in self.names)

    def slots(self, x: Tensor, present: tuple[str, ...]) -> Tensor:
        """(tokens,) int32: the place in ``present`` of every token of x (rows, ..., n); -1: none.

        Raises ValueError where the rows of x are not those that were named.
        """
        rows, requests = x.shape[0], len(self.names)
        if rows not in (requests, requests * self.repeats):
            raise ValueError(
                f"adapter_names has {requests} entries, but a layer got an input of shape "
                f"{tuple(x.shape)} with {rows} rows. Name one adapter (or {BASE!r}) per row."
            )
        tokens = x.shape[:-1].numel()
        key = (present, rows, tokens, x.device)
        if key not in self._slots:
            order = {name: slot for slot, name in enumerate(present)}
            with torch.inference_mode(False):
                slot = torch.tensor([order.get(n, -1) for n in self.names], dtype=torch.int32)
                per_request = tokens // requests if requests else 0
                self._slots[key] = slot.repeat_interleave(per_request).to(x.device)
        return self._slots[key]

    def diagonals(self, layer: SVFTunerLinear, present: tuple[str, ...]) -> Tensor:
        """(adapters, r) fp32: σ⊙z of each; kept for the call's other steps where nothing trains."""
        keep = not torch.is_grad_enabled()
        d = self._diagonals.get(id(layer)) if keep else None
        if d is None:
            d = torch.stack([layer.diagonal([name]) for name in present])
            if keep:
                self._diagonals[id(layer)] = d
        return d
