"""The weights of a local checkpoint under the names that the model gives its layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import t2kernels as t2k
from t2kernels.checkpoint import Checkpoint, Weight
from t2kernels.targets import same_layer


class Weights:
    """Weights (out, in) and their factors by layer name, read one at a time.

    A checkpoint may call a layer otherwise than the model (`t2kernels.targets.same_layer`). Where
    names do not tell which weight is meant, ``fingerprints``, {layer: that of its weight}, decide.
    """

    def __init__(
        self,
        folder: Path,
        layers: Iterable[str],
        factors: str | None = None,
        device: str = "cpu",
        *,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        self.checkpoint = Checkpoint(folder)
        self.device = torch.device(device)
        self._store = None if factors is None else t2k.FactorStore(factors)
        stored = [
            name.removesuffix(".weight")
            for name in self.checkpoint.tensors
            if name.endswith(".weight")
        ]
        wanted, marks = list(layers), fingerprints or {}
        found = {layer: self._find(layer, stored, marks.get(layer)) for layer in wanted}
        missing = [layer for layer, name in found.items() if name is None]
        if missing:
            near = difflib.get_close_matches(missing[0], stored, n=2)
            raise ValueError(
                f"the checkpoint {folder} lacks {len(missing)} of {len(wanted)} layers of the "
                f"expert, first {missing[0]!r} (near: {', '.join(near) or 'nothing'}). It was "
                "made for another model."
            )
        by_name = {w.name: w for w in self.checkpoint.named(n for n in found.values() if n)}
        #: layer of the model -> its weight in the checkpoint
        self.by_layer: dict[str, Weight] = {}
        for layer, name in found.items():
            if name not in by_name:
                raise ValueError(f"{folder}: {name}.weight is no matrix, so no expert can use it")
            self.by_layer[layer] = by_name[name]

    def read(self, layer: str) -> Tensor:
        """The weight (out, in) in its own dtype, in memory of its own."""
        return self.by_layer[layer].read().to(self.device, copy=True)

    def factors(
        self, layer: str, weight: Tensor, rank: int | None = None, dtype: torch.dtype | None = None
    ) -> t2k.SVDFactors:
        """U, S, V of ``weight``, from the folder of `t2 decompose` where one was given.

        ``rank`` keeps that many components; ``dtype`` is that of U and V, None the weight's.
        """
        full = min(weight.shape)
        kept = full if rank is None else min(rank, full)
        if self._store is None:
            return t2k.decompose(weight, rank=kept, dtype=dtype)
        key = self._store.find(layer, weight)
        if key is None:
            raise ValueError(
                f"the factors at {self._store.path} have none for layer {layer!r}. "
                "Decompose the same checkpoint with the same targets."
            )
        self._store.verify(key, weight)
        f = self._store.load(key, device=self.device, dtype=dtype or weight.dtype)
        if f.rank < kept:
            raise ValueError(
                f"the factors at {self._store.path} have rank {f.rank} for layer {layer!r}, the "
                f"expert needs {kept}. Decompose with a larger rank."
            )
        return t2k.SVDFactors(f.U[:, :kept].contiguous(), f.S[:kept], f.V[:, :kept])

    def _find(self, layer: str, stored: list[str], mark: str | None) -> str | None:
        """The checkpoint's name for a layer whose weight has the fingerprint ``mark``."""
        if mark is None:
            return same_layer(layer, stored)

        def has(name: str) -> bool:
            values = (weight.read() for weight in self.checkpoint.named([name]))
            return any(v.is_floating_point() and t2k.fingerprint(v) == mark for v in values)

        return same_layer(layer, stored, has)
