"""What a request may ask for, and whether the form of mixing makes sense of it."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .diagonal import DIVISORS, undefined
from .nn.linear import SVFLinear

#: A name, {name: weight}, or None for the base.
Mixture = str | Mapping[str, float] | None

#: One mixture for all rows, one for each request, or alpha (B, K) or (B, L, K).
Routing = Mixture | Sequence[Mixture] | Tensor

_LARGEST = torch.finfo(torch.float32).max


def shown(value: object) -> str:
    """``value`` in a message: no int of a thousand digits."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    return repr(value)


def weights_of(entry: Mixture, known: Callable[[object], None], op: str) -> dict[str, float]:
    """{name: weight} of one request; {} is the base. ``known`` raises for unknown names.

    op: the caller, for messages.
    """
    if entry is None:
        return {}
    if isinstance(entry, str):
        entry = {entry: 1.0}
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"{op}: a request's entry must be a name, a {{name: weight}} or None, got "
            f"{type(entry).__name__}."
        )
    for name, weight in entry.items():
        known(name)
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"{op}: the weight of {name!r} must be a number, got {weight!r}.")
        if not abs(weight) <= _LARGEST:
            raise ValueError(
                f"{op}: the weight of {name!r} is {shown(weight)}; give a finite number that fp32 "
                "can hold."
            )
    return {name: float(weight) for name, weight in entry.items()}


def check_defined(
    op: str,
    layers: Mapping[str, SVFLinear],
    Z: Tensor,
    alpha: Tensor,
    mixture: str,
    requests: Sequence[int],
) -> None:
    """Raise where a form divides by 0; the device is waited for once, for all layers.

    Args:
        Z: (K, R) multipliers of all layers side by side. alpha: (B, K) or (B, L, K).
        requests: the request that each row of alpha belongs to, for the message.
    """
    if mixture not in DIVISORS:
        return
    weights, masks, offset = alpha.detach(), [], 0
    for index, layer in enumerate(layers.values()):
        columns = slice(offset, offset + layer.rank)
        given = weights if weights.dim() == 2 else weights[:, index]
        masks.append(undefined(Z[:, columns], given, mixture, layer.factors.S))
        offset += layer.rank
    bad = torch.stack(masks, dim=1).nonzero()  # (·, 2): row of alpha, layer
    if len(bad) == 0:
        return
    row, index = bad[0].tolist()
    given = weights[row] if weights.dim() == 2 else weights[row, index]
    raise ValueError(
        f"{op}: mixture={mixture!r} divides by {DIVISORS[mixture]}, which is 0 for request "
        f"{requests[row]}, layer {list(layers)[index]!r}, of weights {given.tolist()}. Give "
        "weights that do not cancel, or use mixture='deviation', in which weights of 0 are the "
        "base."
    )
