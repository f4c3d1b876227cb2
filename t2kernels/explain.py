"""What a layer would do with an input, and why: the policy in words."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .nn.group import PATIENCE, Group
from .nn.linear import SVFLinear
from .ops import dispatch
from .quantized import QuantizedFactors

_FORMS = {
    "merged": "an expert is merged into the stored weight (bank.merge)",
    "base": "no row has an expert, so the stored weight is used, bit-exact",
    "base, factorised": "no row has an expert, but batch-invariant mode fixes the form",
    "own z": "no bank is in use and the layer's own z is not the base, or wants a gradient",
    "uniform": "the bank gives all rows one mixture",
    "rows": "the bank gives each row its own mixture",
    "rows, base rows stored": "each row has its own mixture; base rows use the stored weight",
}


@dataclass(frozen=True)
class Explanation:
    """form: base, merged, factorised or delta. backend: who computes it. why: in words."""

    form: str
    backend: str
    why: str

    def __str__(self) -> str:
        return f"{self.form} on {self.backend}: {self.why}"


def explain(layer: SVFLinear, x: Tensor) -> Explanation:
    """The form and the backend that ``layer(x)`` would use now, and why.

    >>> import torch, t2kernels as t2k
    >>> layer = t2k.SVFLinear.from_linear(torch.nn.Linear(4, 4))
    >>> with torch.no_grad():
    ...     explain(layer, torch.randn(1, 4)).form
    'base'
    """
    if not isinstance(layer, SVFLinear):
        raise TypeError(f"explain: layer must be an SVFLinear, got {type(layer).__name__}.")
    if not isinstance(x, Tensor):
        raise TypeError(f"explain: x must be a torch.Tensor, got {type(x).__name__}.")
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        raise ValueError(
            f"explain: x must have shape (..., {layer.in_features}), got {tuple(x.shape)}."
        )
    state, d, slot = layer.decide(x)
    why = _FORMS[state]
    if d is None:
        return Explanation("merged" if state == "merged" else "base", "torch", why)
    f = layer.factors
    delta = not layer.full_rank
    scale = f.scale if isinstance(f, QuantizedFactors) else None
    x2 = x.reshape(-1, layer.in_features)
    if delta and layer.weight is not None and layer.quantized_base is None:
        W = layer.weight.t() if layer.transposed else layer.weight
        choice = dispatch.choose_delta(x2, W, f.U, f.V, d.detach(), f.S, slot, layer.bias, scale)
    else:
        choice = dispatch.choose(x2, f.U, f.V, d.detach(), f.S, slot, layer.bias, scale)
    if delta:
        why += f"; {layer.rank} components ride on the {layer.quantized_base or 'stored weight'}"
    if isinstance(f, QuantizedFactors):
        why += f"; U and V are held in {f.kind}"
    why = f"{why}; {choice.why}"
    if layer._group is not None and state in ("uniform", "rows") and not delta:
        why += "; " + _company(*layer._group, choice.module.NAME, x)
    return Explanation("delta" if delta else "factorised", choice.module.NAME, why)


def _company(group: Group, index: int, backend: str, x: Tensor) -> str:
    """Whether the members of the layer's group are computed in the same call."""
    others = " and ".join(n.rpartition(".")[2] for i, n in enumerate(group.names) if i != index)
    reason = group.unfit() or _apart(group, backend, x)
    if reason is not None:
        return f"computed apart from {others}: {reason}"
    return f"without gradients one call with {others}, where they get the same x"


def _apart(group: Group, backend: str, x: Tensor) -> str | None:
    limit, tokens = dispatch.GROUP_TOKENS.get(backend, 0), x.shape[:-1].numel()
    if not limit:
        return f"{backend} does not gain by one call"
    if backend == "cuda" and dispatch.is_batch_invariant():
        return "in batch-invariant mode the form must not depend on the company"
    if x.is_inference():
        return (
            "x is an inference tensor, which has no version to tell a write to it by; use "
            "torch.no_grad() in place of torch.inference_mode()"
        )
    if tokens > limit:
        return f"{tokens} tokens, one call is for at most {limit}"
    if not group.shares:
        return (
            f"in {PATIENCE} calls running not all of them were called, or one was called with "
            "another x; they share again after a pass with one x"
        )
    return None
