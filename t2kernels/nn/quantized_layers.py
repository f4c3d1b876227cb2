"""Linear layers that torchao or bitsandbytes has quantised: which they are, what they stand for.

Neither library is imported before one of its layers is met.
"""

from __future__ import annotations

import importlib
from typing import cast

import torch
from torch import Tensor, nn

_BITSANDBYTES = ("Linear8bitLt", "Linear4bit")


def quantized_kind(module: nn.Module) -> str | None:
    """What holds the weight of a linear layer, "bitsandbytes Linear4bit" say; None if it is plain.

    >>> quantized_kind(nn.Linear(2, 2)) is None
    True
    """
    if not isinstance(module, nn.Linear) or not isinstance(module.weight, Tensor):
        return None
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] == "bitsandbytes" and cls.__name__ in _BITSANDBYTES:
            # With has_fp16_weights the weight is a plain one that is quantised at every call.
            return None if module.weight.is_floating_point() else f"bitsandbytes {cls.__name__}"
    for cls in type(module.weight).__mro__:
        if cls.__module__.split(".")[0] == "torchao":
            plain = type(module).forward is nn.Linear.forward
            return f"torchao {type(module.weight).__name__}" if plain else None
    return None


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """The weight (out, in) that a quantised layer stands for, a new plain tensor.

    In the dtype that the library gives it: torchao the one the weight had, bitsandbytes the one it
    had (4 bits) or fp32 (8 bits).

    Raises:
        ValueError: not a quantised layer, or one that its library has not quantised yet.
    """
    kind, weight = quantized_kind(module), cast(Tensor, module.weight)
    if kind is None:
        raise ValueError(f"dequantized: {type(module).__name__} is no known quantised layer.")
    if kind.startswith("torchao"):
        return weight.dequantize().detach()
    if kind.endswith("Linear4bit"):
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError(
                f"{kind} has not quantised its weight yet. Move the model to its device first."
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{kind} has rearranged its weight for its CPU kernel, at a call in eval mode, and "
                "rounded its scales. Convert the model before it is first called."
            )
        library = importlib.import_module("bitsandbytes").functional
        return cast(Tensor, library.dequantize_4bit(weight.data, state)).detach()
    # Before the first call the scales hang on the weight, from then on in the layer's state.
    state = getattr(module, "state", None)
    CB = _first(getattr(weight, "CB", None), getattr(state, "CB", None), weight.data)
    SCB = _first(getattr(weight, "SCB", None), getattr(state, "SCB", None))
    if CB is None or SCB is None or CB.dtype != torch.int8:
        raise ValueError(
            f"{kind} has not quantised its weight yet. Move the model to its device first."
        )
    return CB.float() * (SCB.float() / 127)[:, None]


def _first(*tensors: Tensor | None) -> Tensor | None:
    return next((t for t in tensors if t is not None), None)


def delta_dtype(module: nn.Module, weight: Tensor) -> torch.dtype:
    """Of U and V: the bias's, else what the library multiplies in, else the weight's."""
    if isinstance(module.bias, Tensor):
        return module.bias.dtype
    compute = getattr(module, "compute_dtype", None)  # of Linear4bit
    if isinstance(compute, torch.dtype):
        return compute
    return torch.float16 if type(module).__name__ == "Linear8bitLt" else weight.dtype
