"""Several experts to one, by the rule that a bank applies when it merges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import t2kernels as t2k

FORMS = ("deviation", "paper", "paper-normalised", "authors")


def combine(
    experts: Sequence[t2k.Expert],
    weights: Sequence[float],
    form: str = "deviation",
    sigma: Callable[[str, int], Tensor] | None = None,
) -> t2k.Expert:
    """One expert out of several, layer by layer as ``t2kernels.mix`` has it.

    A layer that an expert lacks, and components beyond its rank, count as the base there.

    Args:
        experts: at least one, all of the same base weights.
        weights: one finite number for each.
        form: "deviation", "paper", "paper-normalised" or "authors".
        sigma: (layer, r) -> its leading r singular values (r,); "authors" needs them.

    Raises ValueError for other lengths, forms and base weights.

    >>> import torch
    >>> a = t2k.Expert({"up": torch.tensor([3.0, 1.0])})
    >>> combine([a], [0.5]).z["up"]
    tensor([2., 1.])
    """
    _check(experts, weights, form)
    if form == "authors" and sigma is None:
        raise ValueError("combine: the form 'authors' needs sigma, the singular values")
    alpha = torch.tensor([list(weights)], dtype=torch.float32)
    prints: dict[str, str] = {}
    z: dict[str, Tensor] = {}
    for layer in dict.fromkeys(name for expert in experts for name in expert.z):
        marks = {e.fingerprints[layer] for e in experts if layer in e.fingerprints}
        if len(marks) > 1:
            raise ValueError(
                f"these experts belong to different base weights: layer {layer!r} has the "
                f"fingerprints {', '.join(sorted(marks))}. Only experts of one model can be mixed."
            )
        prints |= dict.fromkeys([layer] if marks else [], next(iter(marks), ""))
        own = [e.z.get(layer, torch.ones(0)) for e in experts]
        rank = max(v.shape[0] for v in own)
        if len({v.shape[0] for v in own if v.shape[0]}) > 1 and not marks:
            raise ValueError(
                f"these experts have different ranks for layer {layer!r} and carry no "
                "fingerprint that says they belong to one weight"
            )
        Z = torch.stack([torch.cat([v, torch.ones(rank - v.shape[0])]) for v in own])
        S = sigma(layer, rank).float().cpu() if form == "authors" and sigma is not None else None
        z[layer] = t2k.mix(Z, alpha, form, S)[0]
    base = next((e.base_model for e in experts if e.base_model), None)
    return t2k.Expert(z, prints, base)


def _check(experts: Sequence[t2k.Expert], weights: Sequence[float], form: str) -> None:
    if not experts or len(experts) != len(weights):
        raise ValueError(
            f"as many weights as experts are needed, at least one; got {len(experts)} experts and "
            f"{len(weights)} weights"
        )
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    if not all(abs(w) < float("inf") for w in weights):
        raise ValueError(f"weights must be finite numbers, got {list(weights)}")
    if form == "paper-normalised" and sum(weights) == 0:
        raise ValueError("form 'paper-normalised' divides by the sum of the weights, which is 0")
