"""What an expert has learnt, in numbers: by layer, by kind of layer, and between experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import t2kernels as t2k
from t2kernels.targets import classify


def summary(z: Tensor) -> dict[str, Any]:
    """rank, mean, std, min, max of z (r,), and the norm of its deviation z − 1.

    >>> import torch
    >>> summary(torch.tensor([1.0, 4.0]))["moved"]
    3.0
    """
    return {
        "rank": z.numel(),
        "mean": float(z.mean()),
        "std": float(z.std(unbiased=False)),
        "min": float(z.min()),
        "max": float(z.max()),
        "moved": float((z - 1).norm()),
    }


def kind_of(layer: str) -> str:
    """What a layer is: its group and its own name, "mlp up_proj".

    >>> kind_of("model.layers.3.mlp.up_proj")
    'mlp up_proj'
    """
    return f"{classify(layer)} {layer.rpartition('.')[2]}"


def in_order(layers: Iterable[str]) -> list[str]:
    """Layer names as a reader expects them: numbers by value, not by their digits.

    >>> in_order(["h.10.up", "h.2.up", "h.2.down"])
    ['h.2.down', 'h.2.up', 'h.10.up']
    """

    def key(name: str) -> list[tuple[bool, int, str]]:
        return [
            (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
            for part in name.split(".")
        ]

    return sorted(layers, key=key)


def by_kind(expert: t2k.Expert) -> dict[str, dict[str, Any]]:
    """{kind of layer: statistics over all its layers}, with the share of all movement.

    share: Σ(z − 1)² of the kind over that of the whole expert.
    """
    groups: dict[str, list[Tensor]] = {}
    for layer in in_order(expert.z):
        groups.setdefault(kind_of(layer), []).append(expert.z[layer])
    whole = sum(float((z - 1).square().sum()) for z in expert.z.values())
    found: dict[str, dict[str, Any]] = {}
    for kind, members in groups.items():
        values = torch.cat(members)
        facts = {"layers": len(members), **summary(values)}
        facts["values"] = facts.pop("rank")
        facts["share"] = facts["moved"] ** 2 / whole if whole else 0.0
        found[kind] = facts
    return found


def most_moved(expert: t2k.Expert, count: int = 5) -> dict[str, float]:
    """{layer: √mean((z − 1)²)} of the layers that moved most, the first the most."""
    moved = {layer: float((z - 1).square().mean().sqrt()) for layer, z in expert.z.items()}
    return dict(sorted(moved.items(), key=lambda item: -item[1])[:count])


def cosines(experts: Mapping[str, t2k.Expert]) -> list[list[float | None]]:
    """The cosine of the deviations z − 1 of every two experts; a layer that one lacks counts as 0.

    None where an expert does not move at all. Raises ValueError for different ranks of one layer.

    >>> import torch
    >>> a, b = (t2k.Expert({"up": torch.tensor(z)}) for z in ([2.0, 1.0], [1.0, 3.0]))
    >>> cosines({"a": a, "b": b})
    [[1.0, 0.0], [0.0, 1.0]]
    """
    names = list(experts)

    def dot(a: t2k.Expert, b: t2k.Expert) -> float:
        total = 0.0
        for layer in a.z.keys() & b.z.keys():
            if a.z[layer].shape != b.z[layer].shape:
                raise ValueError(
                    f"the experts have {a.z[layer].numel()} and {b.z[layer].numel()} values for "
                    f"layer {layer!r}: they belong to different models or ranks"
                )
            total += float(((a.z[layer] - 1).double() * (b.z[layer] - 1).double()).sum())
        return total

    dots = [[dot(experts[a], experts[b]) for b in names] for a in names]
    norms = [dots[i][i] ** 0.5 for i in range(len(names))]
    return [
        [round(v / (p * q), 6) if p and q else None for v, q in zip(row, norms, strict=True)]
        for row, p in zip(dots, norms, strict=True)
    ]
