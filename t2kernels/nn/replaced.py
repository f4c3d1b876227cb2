"""The layer that an SVF layer replaces: what it is, what stays of it, which factors are its own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..lapack import no_autocast
from ..quantized import QuantizedFactors, dequantize

if TYPE_CHECKING:
    from .factored import Factors


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored (in, out)."""
    return (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight_of(module).dim() == 2
    )


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer, checked: an attribute of nn.Module may be anything."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor.")
    return weight


def shell(linear: nn.Module) -> nn.Module:
    """A copy of the layer without the memory of its weight and bias: its class, its attributes,
    its very hooks. The empty weight remembers whether it was trained."""
    shell = copy.copy(linear)
    wants_grad = weight_of(linear).requires_grad
    empty = nn.Parameter(weight_of(linear).new_empty(0), requires_grad=wants_grad)
    shell._parameters = {**linear._parameters, "weight": empty, "bias": None}
    shell._buffers, shell._modules = dict(linear._buffers), dict(linear._modules)
    return shell


@torch.no_grad()
def check_belongs(weight: Tensor, factors: Factors, room: float = 0.05) -> None:
    """Raise unless Wᵀ·U = V·diag(σ) on one random combination of columns: one pass over W.

    Holds for the leading k components too. ``room`` of 5 % is for bf16 factors; an entry of fp8
    ones errs by up to 6.25 %.
    """
    if factors.U.shape[0] != weight.shape[0] or factors.V.shape[0] != weight.shape[1]:
        return  # the constructor names the shapes
    room = max(room, 0.1) if isinstance(factors, QuantizedFactors) else room
    f = dequantize(factors) if isinstance(factors, QuantizedFactors) else factors
    mix = torch.randn(
        f.S.shape[0], generator=torch.Generator("cpu").manual_seed(0), device="cpu"
    ).to(f.S)
    W = weight.to(f.S.device, torch.float32)
    with no_autocast(W.device):
        left = W.t() @ (f.U.float() @ mix.float())
        right = f.V.float() @ (f.S.float() * mix.float())
    if not bool((left - right).norm() <= room * right.norm() + 1e-6 * W.norm()):
        raise ValueError(
            "SVFLinear: these factors were not made from this weight: Wᵀ·U differs from "
            "V·diag(σ). Decompose the weight that the layer has."
        )
