"""SVFLinear: a linear layer whose singular values can be scaled, per model or per request."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diagonal import PARAMETRISATIONS
from ..ops import dispatch
from ..ops.functional import dense, run, run_delta, under_autocast
from ..svd import decompose
from . import merging
from .factored import Factored, Factors
from .quantized_layers import quantized_kind
from .replaced import check_belongs, is_conv1d, shell, weight_of
from .routing import Route
from .settled import Settled, Watch, settle


class SVFLinear(Factored):
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
            check_belongs(weight.detach().t() if transposed else weight.detach(), factors)
        layer = cls(
            weight, cast("Tensor | None", linear.bias), factors, keep_weight=keep_weight,
            parametrisation=parametrisation, transposed=transposed, recompute=recompute,
        )  # fmt: skip
        layer._original = (linear if keep_weight else shell(linear),)
        layer.train(linear.training)
        return layer

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
        outcome = settle(self, x, form, d, slot)
        if outcome is not self._settled:  # nn.Module is slow to set an attribute
            self._settled = outcome
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

    def extra_repr(self) -> str:
        kept = "" if self.weight is not None else ", weight dropped"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, {self.parametrisation}, {self._U.dtype} factors{kept}"
        )
