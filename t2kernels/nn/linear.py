"""SVFLinear: a linear layer whose singular values can be scaled, per model or per request."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diagonal import PARAMETRISATIONS, effective_multiplier
from ..ops import dispatch
from ..ops.functional import dense, layout, run, run_delta, under_autocast
from ..quantized import QuantizedFactors, dequantize
from ..svd import SVDFactors, check_factors, decompose, fingerprint, reconstruct
from . import merging
from .group import Group
from .quantized_layers import quantized_kind
from .routing import Route
from .settled import Settled, Watch, settle

Factors = SVDFactors | QuantizedFactors


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


class SVFLinear(nn.Module):
    """y = x·V·diag(σ⊙z)·Uᵀ + b in place of y = x·Wᵀ + b (paper, section 3.1).

    Three forms of one function, chosen at each call:
      base        z is 1 and wants no gradient: the stored W, bit-exact;
      factorised  all r = min(m, n) components: no m×n matrix is built, not in backward either;
      delta       k < r components on top of the stored W, exact for experts trained on them.

    Attributes:
        weight, bias: the base parameters under their old names, frozen in all forms but base.
        z: (rank,) fp32 parameter, 1 = base; with parametrisation "sigmoid-normalised" its sigmoid
            is used and any constant is the base. Stays fp32 under ``.to(dtype)``.
        factors: SVDFactors or QuantizedFactors in the weight's dtype; in no state dict and not a
            buffer (DDP does not broadcast it), but moved by ``.to(device)``.

    Make it with ``from_linear`` or, for a whole model, with ``t2kernels.convert``.
    """

    weight: Tensor | None
    bias: Tensor | None
    z: nn.Parameter
    quantized_base: str | None = None  # what holds W where it is quantised

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        factors: Factors,
        *,
        keep_weight: bool = True,
        parametrisation: str = "direct",
        transposed: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if parametrisation not in PARAMETRISATIONS:
            raise ValueError(
                f"SVFLinear: parametrisation must be one of {PARAMETRISATIONS}, "
                f"got {parametrisation!r}."
            )
        m, n = reversed(weight.shape) if transposed else weight.shape
        if factors.U.shape[0] != m or factors.V.shape[0] != n:
            raise ValueError(
                f"SVFLinear: factors of a ({factors.U.shape[0]}, {factors.V.shape[0]}) matrix do "
                f"not fit a weight of ({m}, {n}) = (out_features, in_features)."
            )
        self.in_features, self.out_features = int(n), int(m)
        self.rank = factors.S.shape[0]
        self.full_rank = self.rank == min(self.in_features, self.out_features)
        if not keep_weight and not self.full_rank:
            raise ValueError(
                f"SVFLinear: keep_weight=False needs all {min(m, n)} components, got rank "
                f"{self.rank}: U_k·Σ_k·V_kᵀ is not W. Keep the weight or use the full rank."
            )
        self.parametrisation = parametrisation
        self.transposed = transposed
        self.recompute = recompute
        self._fingerprint: str | None = None
        self._original: tuple[nn.Module] | None = None  # a tuple hides it from nn.Module
        self._merged = False
        self._base_copy: Tensor | None = None  # the base weight while ``weight`` differs from it
        self._drop_on_unmerge = False  # ``weight`` is there for a merged expert only
        self._dtype = weight.dtype
        self._set_factors(factors)
        if keep_weight:
            self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        else:
            self._fingerprint = self._weight_fingerprint(weight)
            self.register_parameter("weight", None)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        self.z = nn.Parameter(torch.ones(self.rank, dtype=torch.float32, device=weight.device))
        self._z_seen: Watch | None = None
        self._z_identity = True
        self._rests_when_compiled = True
        self._route: tuple[Route, int, int] | None = None  # (route, layer index, arena offset)
        self._settled: Settled | None = None  # what the last call leaves to the next
        self._group: tuple[Group, int] | None = None  # layers that get the same x, place among them

    @classmethod
    @torch.inference_mode(mode=False)  # inference tensors could never be trained on
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
        """An SVFLinear that computes what ``linear`` (nn.Linear or Conv1D) does.

        Args:
            rank: keep k components and use the delta form; None keeps all.
            factors: use these instead of decomposing the weight here.
            keep_weight: False drops W to save memory; the base is then exact to rounding only.
            recompute: compute xV again in backward instead of keeping it.

        >>> import torch
        >>> linear = torch.nn.Linear(4, 3)
        >>> layer = SVFLinear.from_linear(linear)
        >>> x = torch.randn(2, 4)
        >>> with torch.no_grad():
        ...     torch.equal(layer(x), linear(x))
        True
        """
        transposed = is_conv1d(linear)
        if not (isinstance(linear, nn.Linear) or transposed):
            raise TypeError(
                f"SVFLinear.from_linear: expected nn.Linear or transformers' Conv1D, got "
                f"{type(linear).__name__}."
            )
        if (kind := quantized_kind(linear)) is not None:
            raise TypeError(
                f"SVFLinear.from_linear: the layer is quantised ({kind}). Use "
                "t2kernels.convert(model, rank=k): components ride on the quantised weight."
            )
        weight = weight_of(linear)
        if factors is None:
            w = weight.detach()
            factors = decompose(w.t() if transposed else w, rank=rank, precision=precision)
        elif rank is not None and factors.S.shape[0] != rank:
            raise ValueError(
                f"SVFLinear.from_linear: rank={rank} but the factors have {factors.S.shape[0]}."
            )
        else:
            _check_belongs(weight.detach().t() if transposed else weight.detach(), factors)
        layer = cls(
            weight, cast("Tensor | None", linear.bias), factors, keep_weight=keep_weight,
            parametrisation=parametrisation, transposed=transposed, recompute=recompute,
        )  # fmt: skip
        layer._original = (linear if keep_weight else _shell(linear),)
        layer.train(linear.training)
        return layer

    # -- state ---------------------------------------------------------------------------------

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

    @torch.no_grad()
    def original(self) -> nn.Module:
        """The layer that this one replaced, with the base weight and the bias as they are now."""
        if self._original is None:  # made around a weight: nobody knows of what layer
            linear: nn.Module = nn.Linear(self.in_features, self.out_features, device="meta")
            weight = self.stored_weight()
            linear.weight = nn.Parameter(weight.t().contiguous() if self.transposed else weight)
        elif self.weight is None:
            linear = self._original[0]
            wants_grad = weight_of(linear).requires_grad
            linear.weight = nn.Parameter(self.stored_weight(), requires_grad=wants_grad)
        else:
            linear = self._original[0]
            linear.weight = self.weight
        linear.bias = self.bias  # type: ignore[assignment]
        return linear

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

    # -- the call ------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out_features) for x (..., in_features)."""
        if torch.compiler.is_compiling():
            return self._computed(x, *self.decide(x))
        if self._settled is not None:
            settled = self._settled(self, x)
            if settled is not None:
                return settled
        form, d, slot = self.decide(x)
        if self._route is not None:
            self._route[0].note_layer_call()
        y = self._computed(x, form, d, slot)
        self._settled = settle(self, x, form, d, slot)
        if d is not None and y.requires_grad and self._route is not None:
            self._route[0].guard(y)
        return y

    def _computed(self, x: Tensor, form: str, d: Tensor | None, slot: Tensor | None) -> Tensor:
        if d is None:
            return self._dense(x)
        y = self._scaled(x, d, slot)
        if form == "rows, base rows stored" and slot is not None:
            y = torch.where((slot < 0).view(*x.shape[:-1], 1), self._dense(x), y)
        return y

    def decide(self, x: Tensor) -> tuple[str, Tensor | None, Tensor | None]:
        """(form, d, slot) of the call with x: what the routing, or the layer's own z, asks for.

        d is None where the stored weight is used as it is.
        """
        if self._merged:
            return "merged", None, None
        plan = None if self._route is None else self._route[0].plan
        if self._route is None or plan is None:
            if self.rests():
                return "base", None, None
            return "own z", self._S * self.multiplier, None
        route, index, offset = self._route
        if plan.form == "base":
            # Batch-invariant mode fixes the form, so that a base row is computed alike everywhere.
            if dispatch.is_batch_invariant() and self.full_rank and not plan.stored_base_rows:
                return "base, factorised", self._S, None
            return "base", None, None
        d = plan.diagonal(index, offset, self._S)
        if plan.form == "uniform":
            return "uniform", d, None
        form = "rows, base rows stored" if plan.stored_base_rows and self.full_rank else "rows"
        return form, d, plan.token_slots(x, route.batch)

    def _dense(self, x: Tensor) -> Tensor:
        """x·Wᵀ + b with the stored W, the very call of the layer that was replaced."""
        if self.weight is None:
            return self._scaled(x, self._S, None)
        if dispatch.is_batch_invariant():
            return dense(x, self.weight.t() if self.transposed else self.weight, self.bias)
        if not self.transposed:
            return F.linear(x, self.weight, self.bias)
        y = x.reshape(-1, self.in_features)
        y = y @ self.weight if self.bias is None else torch.addmm(self.bias, y, self.weight)
        return y.view(*x.shape[:-1], self.out_features)

    def _scaled(self, x: Tensor, d: Tensor, slot: Tensor | None) -> Tensor:
        """The factorised form, or the delta form when there are fewer than r components."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"SVFLinear: x must have shape (..., {self.in_features}), got {tuple(x.shape)}."
            )
        if x.dtype != self._dtype and not under_autocast(x):
            raise TypeError(
                f"SVFLinear: x must be {self._dtype} like the layer, got {x.dtype}. "
                f"Use x.to({self._dtype}) or layer.to(dtype)."
            )
        S = self._S
        x2 = x.reshape(-1, self.in_features)
        if self.full_rank:
            y = run(x2, self._U, self._Vh, d, S, slot, self.bias, self._scale, self.recompute)
            return y.view(*x.shape[:-1], self.out_features)
        if self.weight is not None:  # always kept where components are missing
            W = self.weight.t() if self.transposed else self.weight
            fused = run_delta(x2, W, self._U, self._Vh, d, S, slot, self.bias, self._scale)
            if fused is not None:
                return fused.view(*x.shape[:-1], self.out_features)
        delta = run(
            x2, self._U, self._Vh, d - S, torch.zeros_like(S), slot, None, self._scale,
            self.recompute,
        )  # fmt: skip
        return self._dense(x) + delta.view(*x.shape[:-1], self.out_features)

    # -- merging -------------------------------------------------------------------------------

    def merge_diagonal(self, d: Tensor) -> None:
        """Replace W by W′ = W + U·diag(d − σ)·Vᵀ in place; the base weight is kept aside.

        d (r,) is σ⊙z_eff. See ``nn/merging.py`` for its rounding and memory. Merging again starts
        from the base weight, not from the merged one.
        """
        merging.merge([self], [d])

    def unmerge(self) -> None:
        """Bring the base weight back, bit-exact."""
        merging.unmerge(self)

    # -- nn.Module's manners -------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """A copy, here or in another process, has settled nothing: its tensors lie elsewhere."""
        return {**self.__dict__, "_settled": None, "_z_seen": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SVFLinear:
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

    def extra_repr(self) -> str:
        kept = "" if self.weight is not None else ", weight dropped"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, {self.parametrisation}, {self._U.dtype} factors{kept}"
        )


def _shell(linear: nn.Module) -> nn.Module:
    """A copy of the layer without the memory of its weight and bias: its class, its attributes,
    its very hooks. The empty weight remembers whether it was trained."""
    shell = copy.copy(linear)
    wants_grad = weight_of(linear).requires_grad
    empty = nn.Parameter(weight_of(linear).new_empty(0), requires_grad=wants_grad)
    shell._parameters = {**linear._parameters, "weight": empty, "bias": None}
    shell._buffers, shell._modules = dict(linear._buffers), dict(linear._modules)
    return shell


@torch.no_grad()
def _check_belongs(weight: Tensor, factors: Factors, room: float = 0.05) -> None:
    """Raise unless Wᵀ·U = V·diag(σ) on one random combination of columns: one pass over W.

    Holds for the leading k components too. ``room`` of 5 % is for bf16 factors; an entry of fp8
    ones errs by up to 6.25 %.
    """
    if factors.U.shape[0] != weight.shape[0] or factors.V.shape[0] != weight.shape[1]:
        return  # the constructor names the shapes
    room = max(room, 0.1) if isinstance(factors, QuantizedFactors) else room
    f = dequantize(factors) if isinstance(factors, QuantizedFactors) else factors
    mix = torch.randn(f.S.shape[0], generator=torch.Generator().manual_seed(0)).to(f.S)
    W = weight.to(f.S.device, torch.float32)
    left = W.t() @ (f.U.float() @ mix.float())
    right = f.V.float() @ (f.S.float() * mix.float())
    if not bool((left - right).norm() <= room * right.norm() + 1e-6 * W.norm()):
        raise ValueError(
            "SVFLinear: these factors were not made from this weight: Wᵀ·U differs from "
            "V·diag(σ). Decompose the weight that the layer has."
        )


def _keep_dtype(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """fn(t) for its device alone: the values keep their dtype and every bit."""
    moved = fn(t)
    return moved if moved.dtype == t.dtype else t.to(moved.device)
