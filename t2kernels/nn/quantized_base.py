"""The delta form on a linear layer whose weight is quantised and stays as it is.

    y = base_layer(x) + x V diag(d − σ) Uᵀ

U, σ and V are k components of the weight that the quantised one stands for, or of the weight that
was quantised, which carries over what its experts change; the base product is left to the library
that made it: its kernel, its rounding, its activations. Rows without an expert have d = σ; the
second term is then 0.

Known are torchao's tensor subclasses (``quantize_`` with weight-only int8, fp8 and others that can
``dequantize``) and bitsandbytes' Linear8bitLt and Linear4bit. Neither library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import dispatch
from ..ops.functional import run, under_autocast
from ..svd import decompose, fingerprint
from .factored import Factors
from .linear import SVFLinear
from .quantized_layers import delta_dtype, dequantized, quantized_kind
from .replaced import check_belongs

# Factors that are given may be those of the weight before it was quantised, from which one of 4
# bits is some 10 % away; another weight's are 100 % away or more.
_ROOM = 0.25


class QuantizedBaseLinear(SVFLinear):
    """SVFLinear around a quantised layer, always in the delta form; see the top of this file.

    The layer holds the parameters and buffers of ``base_layer``, so that the state dict has the
    base's keys, in the base's own format, and z. The weight is never written to: merging is
    refused, and loading accepts only the very weights that are there.

    Attributes beyond those of SVFLinear:
        base_layer: the quantised layer, unchanged.
        quantized_base: what it is, "torchao Int8Tensor" say.
    """

    def __init__(
        self,
        linear: nn.Module,
        weight: Tensor,
        factors: Factors,
        *,
        parametrisation: str = "direct",
        recompute: bool = False,
    ) -> None:
        dtype = delta_dtype(linear, weight)
        super().__init__(
            weight.to(dtype), None, factors, parametrisation=parametrisation, recompute=recompute
        )
        self.quantized_base = quantized_kind(linear)
        # W itself is quantised, so however many components there are, they ride on it.
        self.full_rank = False
        self._fingerprint = fingerprint(weight)
        self._original = (linear,)
        self._share()
        self.train(linear.training)

    def _share(self) -> None:
        """Hold what the base layer holds, beside z: the very objects, under the same names."""
        linear = self.base_layer
        z = {name: p for name, p in self._parameters.items() if name == "z"}
        self.__dict__["_parameters"] = {**linear._parameters, **z}
        self.__dict__["_buffers"], self.__dict__["_modules"] = linear._buffers, linear._modules

    @classmethod
    @torch.inference_mode(mode=False)
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        rank: int | None = None,
        factors: Factors | None = None,
        keep_weight: bool = True,
        parametrisation: str = "direct",
        precision: str = "fp32",
        recompute: bool = False,
    ) -> SVFLinear:
        """The delta form on a layer that ``quantized_kind`` knows; None for rank keeps all."""
        if not keep_weight:
            raise ValueError(
                "QuantizedBaseLinear: the quantised weight cannot be dropped; its factors ride on "
                "it. Use keep_weight=True."
            )
        weight = dequantized(linear)
        if factors is None:
            factors = decompose(
                weight, rank=rank, dtype=delta_dtype(linear, weight), precision=precision
            )
        elif rank is not None and factors.S.shape[0] != rank:
            raise ValueError(
                f"QuantizedBaseLinear.from_linear: rank={rank} but the factors have "
                f"{factors.S.shape[0]}."
            )
        else:
            check_belongs(weight, factors, _ROOM)
        return cls(linear, weight, factors, parametrisation=parametrisation, recompute=recompute)

    @property
    def base_layer(self) -> nn.Module:
        if self._original is None:
            raise RuntimeError("QuantizedBaseLinear: there is no base layer")
        return self._original[0]

    def stored_weight(self) -> Tensor:
        """The weight (out, in) that the quantised one stands for, made anew at every call."""
        return dequantized(self.base_layer).to(self._dtype)

    def original(self) -> nn.Module:
        """The quantised layer, which never changed."""
        return self.base_layer

    # -- the call ------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out_features) for x (..., in_features); nothing is settled for the next call."""
        form, d, slot = self.decide(x)
        watched = self._route is not None and not torch.compiler.is_compiling()
        if watched and self._route is not None:
            self._route[0].note_layer_call()
        y = self._computed(x, form, d, slot)
        if watched and self._route is not None and d is not None and y.requires_grad:
            self._route[0].guard(y)
        return y

    def _dense(self, x: Tensor) -> Tensor:
        if dispatch.is_batch_invariant():
            raise RuntimeError(
                f"batch_invariant: {self.quantized_base} multiplies by a kernel of its own, whose "
                "rows may depend on each other. Use the model unquantised, or without this mode."
            )
        # Not called as a module: its hooks are this layer's hooks and have run.
        y = cast(Tensor, self.base_layer.forward(x))
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            raise RuntimeError(
                f"{self.quantized_base} gives no gradient to its input here, so those of the "
                "layers before it would be wrong. bitsandbytes' 4-bit kernel for CPUs does so "
                "after a call in eval mode: train a model that has not been called in it."
            )
        return y

    def _scaled(self, x: Tensor, d: Tensor, slot: Tensor | None) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"SVFLinear: x must have shape (..., {self.in_features}), got {tuple(x.shape)}."
            )
        y, S = self._dense(x), self._S
        x2 = x.reshape(-1, self.in_features)
        if not under_autocast(x2):
            x2 = x2.to(self._dtype)
        none = torch.zeros_like(S)
        delta = run(x2, self._U, self._Vh, d - S, none, slot, None, self._scale, self.recompute)
        return y + delta.view(y.shape).to(y.dtype)

    # -- nn.Module's manners -------------------------------------------------------------------

    def _apply_base(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        # The caller has taken z out, beyond the reach of a cast, and puts it back.
        self.base_layer._apply(fn, recurse)
        self._share()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.base_layer._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "z"] = self.z if keep_vars else self.z.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Only z is loaded; everything else must be what is there.

        Of 4 bits the codes and the bias: bitsandbytes rounds its scales anew at calls in eval mode
        on a CPU, and again when it saves them.
        """
        moving = f"{self.quantized_base}".endswith("Linear4bit")
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", False)
        for key, value in own.items():
            given = state_dict.get(prefix + key)
            if given is None:
                missing.append(prefix + key)
            elif key == "z":
                self._load_z(prefix + key, given, errors)
            elif not (moving and key.startswith("weight.")) and not _same(value, given):
                errors.append(
                    f"{prefix}{key}: not the quantised weight that the factors belong to; load "
                    "the checkpoint before t2kernels.convert"
                )
        unexpected += [
            key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in own
        ]

    def _load_z(self, key: str, given: Tensor, errors: list[str]) -> None:
        if given.shape != self.z.shape:
            errors.append(f"{key}: expected shape {tuple(self.z.shape)}, got {tuple(given.shape)}")
            return
        with torch.no_grad():
            self.z.copy_(given)
        self._z_seen = self._settled = None
        self.rests()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()} on {self.quantized_base}"


def _same(a: Any, b: Any) -> bool:
    """Whether two entries of a state dict are equal: plain tensors, or subclasses of one type."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype or _plain(a) != _plain(b):
        return False
    if not _plain(a):
        a, b = a.dequantize(), b.dequantize()
    return torch.equal(a, b.to(a.device))


def _plain(t: Tensor) -> bool:
    """Whether the entries of t are what it holds."""
    return type(t) in (Tensor, nn.Parameter) or not hasattr(type(t), "__tensor_flatten__")
