"""What an SVF layer holds: a weight, its factors and z, through moves, copies and state dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..diagonal import effective_multiplier
from ..ops.functional import layout
from ..quantized import QuantizedFactors, dequantize
from ..svd import SVDFactors, check_factors, fingerprint, reconstruct
from .group import Group
from .settled import Settled, Watch

Factors = SVDFactors | QuantizedFactors


class Factored(nn.Module):
    """The memory of ``SVFLinear``, which sets all of these attributes."""

    weight: Tensor | None
    bias: Tensor | None
    z: nn.Parameter
    in_features: int
    out_features: int
    parametrisation: str
    transposed: bool
    _dtype: torch.dtype
    _fingerprint: str | None
    _merged: bool
    _base_copy: Tensor | None
    _drop_on_unmerge: bool
    _z_seen: Watch | None
    _z_identity: bool
    _rests_when_compiled: bool
    _settled: Settled | None
    _group: tuple[Group, int] | None = None  # layers that get the same x, place among them

    def _set_factors(self, factors: Factors) -> None:
        U, Vh = layout(factors)
        if isinstance(factors, SVDFactors):
            check_factors(SVDFactors(U, factors.S, Vh.t()))
            U, Vh = U.to(self._dtype), Vh.to(self._dtype)
        self._U, self._Vh, self._S = U, Vh, factors.S.float()
        self._settled = None
        self._scale = factors.scale if isinstance(factors, QuantizedFactors) else None
        self._column_scales = (
            (factors.u_scale, factors.v_scale) if isinstance(factors, QuantizedFactors) else None
        )
        self._tell_group()

    def _tell_group(self) -> None:
        """The factors lie elsewhere now."""
        if self._group is not None:
            self._group[0].moved(self._group[1])

    @property
    def factors(self) -> Factors:
        """U (m, r), S (r,), V (n, r) as they are stored."""
        if self._column_scales is not None:
            u_scale, v_scale = self._column_scales
            return QuantizedFactors(self._U, self._S, self._Vh.t(), u_scale, v_scale, self._dtype)
        return SVDFactors(self._U, self._S, self._Vh.t())

    @property
    def multiplier(self) -> Tensor:
        """z_eff (r,): the layer's own effective multiplier, differentiable in z."""
        return effective_multiplier(self._S, self.z, self.parametrisation)

    @property
    def fingerprint(self) -> str:
        """Hash of the base weight (also while merged), from values rounded to bf16."""
        if self._fingerprint is None:
            base = self._base_copy if self._base_copy is not None else self.weight
            if base is None:
                raise RuntimeError("SVFLinear: the base weight is gone and was never hashed")
            self._fingerprint = self._weight_fingerprint(base)
        return self._fingerprint

    def _weight_fingerprint(self, weight: Tensor) -> str:
        w = weight.detach()
        return fingerprint(w.t() if self.transposed else w)

    @torch.no_grad()
    def stored_weight(self) -> Tensor:
        """The base weight in its stored orientation; rebuilt from the factors if it was dropped."""
        if self._base_copy is not None:
            return self._base_copy.to(self._U.device)  # it may wait in host memory
        if self.weight is not None and not self._drop_on_unmerge:
            return self.weight.detach()
        f = self.factors
        f = dequantize(f) if isinstance(f, QuantizedFactors) else f
        w = reconstruct(f).to(self._dtype)
        return w.t().contiguous() if self.transposed else w

    def rests(self) -> bool:
        """Whether the layer's own z is the identity and wants no gradient: W is used then.

        On a CPU the values are looked at; elsewhere they are looked at again only when z was
        written to (in place, as optimisers and ``copy_`` do), so that no call waits for the GPU.
        A compiler cannot look at values: it goes by the last look, and takes a z that can be
        trained for one that is not the identity. Where z was written by hand, call ``rests()``.
        """
        z = self.z
        if z.requires_grad and torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling():
            return self._rests_when_compiled and not z.requires_grad
        if self._z_seen is None or not self._z_seen.holds(z):
            first = z[:1] if self.parametrisation == "sigmoid-normalised" else z.new_ones(1)
            self._z_identity = torch.equal(z.detach(), first.detach().expand_as(z))
            self._z_seen = Watch(z)
        compiled = self._z_identity and not z.requires_grad
        if compiled is not self._rests_when_compiled:  # nn.Module is slow to set an attribute
            self._rests_when_compiled = compiled
        return self._z_identity

    # -- nn.Module's manners -------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """A copy, here or in another process, has settled nothing: its tensors lie elsewhere."""
        return {**self.__dict__, "_settled": None, "_z_seen": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factored:
        """Move the factors with the module; z and σ change device, never dtype."""
        z = self._parameters.pop("z")  # out of reach of a cast
        self._apply_base(fn, recurse)
        if z is not None:
            grad, z.grad = z.grad, None
            z.data = _keep_dtype(fn, z.data)
            z.grad = None if grad is None else _keep_dtype(fn, grad)
        self._parameters["z"] = z
        self._z_seen = self._settled = None
        self._S = _keep_dtype(fn, self._S)
        if self._scale is not None:
            self._scale = _keep_dtype(fn, self._scale)
        if self._column_scales is not None:
            u, v = self._column_scales
            self._column_scales = (_keep_dtype(fn, u), _keep_dtype(fn, v))
        if self._scale is None:
            self._U, self._Vh = fn(self._U), fn(self._Vh)
        else:  # fp8 is a float, which a cast of the model would reach
            self._U, self._Vh = _keep_dtype(fn, self._U), _keep_dtype(fn, self._Vh)
        if self._base_copy is not None:
            self._base_copy = fn(self._base_copy)
        # Of an empty tensor, since 8-bit factors without a weight have no tensor of that dtype.
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self._U.device)).dtype
        self._tell_group()
        return self

    def _apply_base(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight is None:  # the base's keys, whatever is kept in memory
            destination[prefix + "weight"] = self.stored_weight()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        key = prefix + "weight"
        given = state_dict.get(key)
        if given is not None and self._merged:
            errors.append(f"{key}: an expert is merged; call bank.unmerge() before loading weights")
            return
        m, n = self.out_features, self.in_features
        fits = given is not None and given.shape == ((n, m) if self.transposed else (m, n))
        if fits and not self._is_base(given):
            errors.append(
                f"{key}: the weight differs from the one that the factors belong to; load the "
                "checkpoint before t2kernels.convert"
            )
            return
        if self.weight is None and given is not None:
            state_dict = {k: v for k, v in state_dict.items() if k != key}
        z = state_dict.get(prefix + "z")
        if isinstance(z, Tensor) and z.is_floating_point() and z.dtype != torch.float32:
            state_dict = {**state_dict, prefix + "z": z.float()}  # assigning would keep its dtype
        super()._load_from_state_dict(state_dict, prefix, *args)
        if args[0].get("assign_to_params_buffers") and fits and given.is_floating_point():
            self.to(given.device, given.dtype)  # the factors follow what was assigned
        self._z_seen = self._settled = None
        self.rests()

    @torch.no_grad()
    def _is_base(self, given: Tensor) -> bool:
        """Whether ``given`` is the base weight, or what this layer itself saves in its place: the
        weight after a cast, or rebuilt from the factors (a fraction of an ulp apart at most)."""
        if self._weight_fingerprint(given) == self.fingerprint:
            return True
        own = self.stored_weight().float()
        apart = (given.detach().to(own) - own).norm()
        return bool(apart <= 0.25 * torch.finfo(self._dtype).eps * own.norm())


def _keep_dtype(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """fn(t) for its device alone: the values keep their dtype and every bit."""
    moved = fn(t)
    return moved if moved.dtype == t.dtype else t.to(moved.device)
