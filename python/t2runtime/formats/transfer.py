"""An expert of one model on another model of the same shapes (paper, section 4.5).

z says how much each singular component counts. Two models trained apart share no singular vectors;
what they may share is the order: z of the k-th largest singular value goes to the k-th largest of
the other model ("sigma"). A random order ("shuffled") is what that must beat to mean anything.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

import t2kernels as t2k
from t2runtime.adapt.asking import KEY

ORDERS = ("sigma", "shuffled")


class Base(NamedTuple):
    """What a layer's weight has to say: its rank min(out, in) and its fingerprint."""

    rank: int
    fingerprint: str


def transfer(expert: t2k.Expert, model: Any, order: str = "sigma", *, seed: int = 0) -> t2k.Expert:
    """The expert for `model`, a converted model, with the fingerprints of its weights.

    order: "sigma", the k-th z to the k-th singular value; or "shuffled", to a random one, another
    permutation per layer, which follows from `seed` and the layer's name alone.

    Layers of the model that the expert lacks stay at the base. Of the metadata the task is kept,
    and what a classification expert is asked; what was measured on the other model is not. Raises
    ValueError for another order, a layer that the model lacks and a rank that differs, by name;
    `convert` the model with the targets and the rank of the expert's own.
    """
    layers = t2k.svf_layers(model)
    if not layers:
        raise ValueError(
            f"model must be a converted one, got {type(model).__name__} without SVF layers. Call "
            "t2kernels.convert(model) first"
        )
    bases = {name: Base(layer.rank, layer.fingerprint) for name, layer in layers.items()}
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return transfer_to(expert, bases, name, order, seed=seed)


def transfer_to(
    expert: t2k.Expert,
    bases: Mapping[str, Base],
    base_model: str | None,
    order: str = "sigma",
    *,
    seed: int = 0,
) -> t2k.Expert:
    """As `transfer`, for a model that is known by its layers' ranks and fingerprints only.

    >>> expert = t2k.Expert({"up": torch.tensor([3.0, 1.0, 0.5])})
    >>> moved = transfer_to(expert, {"up": Base(3, "of another weight")}, "other")
    >>> moved.z["up"], moved.fingerprints, moved.base_model
    (tensor([3.0000, 1.0000, 0.5000]), {'up': 'of another weight'}, 'other')
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number, at least 0, got {seed!r}")
    _check_shapes(expert, bases)
    z: dict[str, torch.Tensor] = {}
    for layer, values in expert.z.items():
        shuffle = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{layer}".encode()))
        mixed = torch.randperm(len(values), generator=shuffle)
        z[layer] = values[mixed] if order == "shuffled" else values
    origin = {"from": expert.base_model, "order": order}
    facts: dict[str, Any] = {"transfer": origin | ({"seed": seed} if order == "shuffled" else {})}
    facts |= {key: expert.metadata[key] for key in ("task", KEY) if key in expert.metadata}
    prints = {layer: bases[layer].fingerprint for layer in z}
    return t2k.Expert(z, prints, base_model, expert.description, facts)


def _check_shapes(expert: t2k.Expert, bases: Mapping[str, Base]) -> None:
    missing = [layer for layer in expert.z if layer not in bases]
    if missing:
        raise ValueError(
            f"the expert has {len(missing)} of {len(expert.z)} layers that the model lacks, first "
            f"{missing[0]!r}. Transfer needs a model of the same shapes, converted with the same "
            "targets"
        )
    other = [layer for layer, z in expert.z.items() if len(z) != bases[layer].rank]
    if other:
        raise ValueError(
            f"the expert has {len(expert.z[other[0]])} values for layer {other[0]!r}, the model "
            f"rank {bases[other[0]].rank} ({len(other)} of {len(expert.z)} layers differ). "
            "Transfer needs a model of the same shapes and the rank of the expert"
        )
