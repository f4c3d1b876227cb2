"""The tuner layer: a linear layer, one factorisation of its weight, and one z per adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import t2kernels as t2k

from .config import SVFConfig
from .rows import AdapterRows


class Multiplier(nn.Module):
    """z (r,) of one adapter on one layer: fp32, also when the model is cast.

    A module and not a bare parameter, so that names read ``svf_z.<adapter>.weight``: TRL looks for
    ``.<adapter>.`` when it copies an adapter.
    """

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(z)
        self._seen: tuple[int, int, int] | None = None
        self._identity = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Multiplier:
        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(move, recurse)
        return self

    def rests(self, parametrisation: str) -> bool:
        """Whether z is the identity and wants no gradient.

        Values are looked at on a CPU; elsewhere again only when z was written to (in place, as
        optimisers do), so that no call waits for the device. A compiler cannot look.
        """
        z = self.weight
        if torch.compiler.is_compiling() or (z.requires_grad and torch.is_grad_enabled()):
            return False
        seen = (id(z), z.data_ptr(), z._version)
        if z.device.type == "cpu" or self._seen != seen:
            values = z.detach()
            # Any constant is the base where z goes through a normalised sigmoid.
            first = values[:1] if parametrisation != "direct" else values.new_ones(1)
            self._identity, self._seen = torch.equal(values, first.expand_as(values)), seen
        return self._identity


class SVFTunerLinear(nn.Module, BaseTunerLayer):
    """y = x·V·diag(σ⊙z)·Uᵀ + b around a base layer that is kept as it is.

    Several active adapters add their deviations: z = 1 + Σ(z_a − 1), so that ΔW is the sum of
    theirs. Where no adapter is active, or all active ones are the identity and nothing is trained,
    the base layer itself is called: bit-exact.

    Attributes:
        svf_z: {adapter: Multiplier}; an adapter of k components has (k,), the others stay at 1.
        factors: of the weight, all components that any adapter needs; no parameter, no buffer, in
            no state dict, but moved by ``.to``.
        fingerprint: hash of the base weight.
    """

    # What BaseTunerLayer brings: the library has no types.
    active_adapters: list[str]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[..., None]

    adapter_layer_names = ("svf_z",)
    other_param_names = ("parametrisation", "recompute")

    def __init__(self, base_layer: nn.Module, factors: t2k.SVDFactors, fingerprint: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.transposed = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = factors.out_features, factors.in_features
        self.svf_z = nn.ModuleDict()
        self.parametrisation: dict[str, str] = {}
        self.recompute: dict[str, bool] = {}
        self.fingerprint = fingerprint
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        # Holds the base weight while adapters are merged; a tuple hides it from nn.Module.
        self._merger: tuple[t2k.SVFLinear] | None = None
        self.set_factors(factors)
        self.train(base_layer.training)

    def set_factors(self, factors: t2k.SVDFactors) -> None:
        """Take U, S, V of the base weight; S stays in fp32, in fp64 beside fp64 factors."""
        self.factors = factors = factors.to(dtype=factors.U.dtype)
        # The same U and V about σ = 0: the delta form, in which a base row gets an exact 0.
        self._change = t2k.SVDFactors(factors.U, torch.zeros_like(factors.S), factors.V)
        self._sigma = factors.S.float()

    @property
    def full(self) -> int:
        """min(in, out)."""
        return min(self.in_features, self.out_features)

    @property
    def rank(self) -> int:
        return self.factors.rank

    def _z(self, adapter_name: str) -> Multiplier:
        return cast(Multiplier, self.svf_z[adapter_name])

    def _base(self) -> tuple[Tensor, Tensor | None]:
        """Weight, as it is stored, and bias of the base layer."""
        return cast(Tensor, self.base_layer.weight), cast("Tensor | None", self.base_layer.bias)

    def update_layer(self, adapter_name: str, config: SVFConfig) -> None:
        """Add an adapter at the base model."""
        rank = self.full if config.rank is None else min(config.rank, self.full)
        z = torch.ones(rank, dtype=torch.float32)
        if not config.init_weights:
            z += 0.01 * torch.randn(rank)
        self.svf_z[adapter_name] = Multiplier(z)
        self.parametrisation[adapter_name] = config.parametrisation
        self.recompute[adapter_name] = config.recompute
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # -- what z stands for ---------------------------------------------------------------------

    def multiplier(self, adapter_name: str) -> Tensor:
        """z_eff (r,) fp32 of an adapter, differentiable in its z."""
        z = self._z(adapter_name).weight
        S = self.factors.S[: z.shape[0]]
        effective = t2k.effective_multiplier(S, z, self.parametrisation[adapter_name])
        missing = self.rank - z.shape[0]
        return F.pad(effective, (0, missing), value=1.0) if missing else effective

    def diagonal(self, adapter_names: Sequence[str]) -> Tensor:
        """σ⊙z (r,) fp32 of one adapter, or of several that add their deviations."""
        z = self.multiplier(adapter_names[0])
        for name in adapter_names[1:]:
            z = z + (self.multiplier(name) - 1)
        return self._sigma * z

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW of an adapter, in fp32, in the orientation of the base weight."""
        f = self.factors
        wide = t2k.SVDFactors(f.U.float(), f.S.float(), f.V.float())
        delta = t2k.reconstruct(wide, self.diagonal([adapter_name]) - wide.S)
        return delta.t() if self.transposed else delta

    # -- the call ------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y (..., out) for x (..., in); ``adapter_names``: one per row, or none."""
        rows = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if rows is not None:
            if self.merged:
                raise ValueError(
                    f"adapter_names cannot be used while {self.merged_adapters} are merged into "
                    "the weights; call unmerge_adapter() first."
                )
            return self._by_row(x, rows if isinstance(rows, AdapterRows) else AdapterRows(rows))
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        known = self.svf_z._modules
        names = [name for name in self.active_adapters if name in known]
        if all(self._z(name).rests(self.parametrisation[name]) for name in names):
            return self.base_layer(x, *args, **kwargs)
        recompute = any(self.recompute[name] for name in names)
        return self._scaled(x, self.diagonal(names), None, recompute)

    def _by_row(self, x: Tensor, rows: AdapterRows) -> Tensor:
        """A row of the base model gets the bits that the base layer gives it in this batch."""
        present = tuple(name for name in rows.distinct if name in self.svf_z)
        if not present:
            return self.base_layer(x)
        slot = rows.slots(x, present)
        d = rows.diagonals(self, present)
        if rows.uniform(present):
            return self._scaled(x, d[0], None)
        y = self._scaled(x, d, slot)
        if self.rank == self.full and rows.with_base(present):
            y = torch.where((slot < 0).view(*x.shape[:-1], 1), self.base_layer(x), y)
        return y

    def _scaled(self, x: Tensor, d: Tensor, slot: Tensor | None, recompute: bool = False) -> Tensor:
        """The factorised form; with fewer than all components, their change upon the base."""
        if x.dtype == torch.float64:
            d = d.double()
        if self.rank == self.full:
            bias = self._base()[1]
            return t2k.svf_linear(x, self.factors, d, slot, bias, recompute=recompute)
        change = d - self.factors.S
        return self.base_layer(x) + t2k.svf_linear(x, self._change, change, slot)

    # -- merging -------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W′ = W + U·diag(σ⊙(z − 1))·Vᵀ in place, as a bank merges.

        The base weight is kept aside: ``unmerge`` is bit-exact. Merging one more adapter starts
        from the base weight. ``safe_merge`` raises on NaN and inf and leaves the weight as it was.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.svf_z]
        if not names:
            return
        weight, bias = self._base()
        before = list(self.merged_adapters)
        merger = (
            t2k.SVFLinear(weight, bias, self.factors, transposed=self.transposed)
            if self._merger is None
            else self._merger[0]
        )
        merger.merge_diagonal(self.diagonal([*before, *names]))
        self._merger, self.merged_adapters = (merger,), [*before, *names]
        if safe_merge and not bool(torch.isfinite(weight).all()):
            if before:
                merger.merge_diagonal(self.diagonal(before))
                self.merged_adapters = before
            else:
                self.unmerge()
            raise ValueError(
                f"merging {', '.join(names)} gives NaN or inf in a weight; the adapter is broken. "
                "The weight is as it was before."
            )

    def unmerge(self) -> None:
        """Bring the base weight back, bit-exact."""
        if self._merger is None:
            warnings.warn("no adapter is merged, there is nothing to unmerge.", stacklevel=2)
            return
        self._merger[0].unmerge()
        self._merger, self.merged_adapters = None, []

    def base_weight(self) -> Tensor:
        """The base weight (out, in), also while adapters are merged."""
        weight = self._base()[0].detach()
        if self._merger is not None:
            weight = self._merger[0].stored_weight()
        return weight.t() if self.transposed else weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # -- nn.Module's manners -------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SVFTunerLinear:
        """Move the factors with the module; σ changes device, never below fp32."""
        super()._apply(fn, recurse)
        if self._merger is not None:
            self._merger[0]._apply(fn)
        f = self.factors
        U, Vh = fn(f.U), fn(f.V.t())
        self.set_factors(t2k.SVDFactors(U, f.S.to(U.device), Vh.t()))
        return self

    def extra_repr(self) -> str:
        return f"rank={self.rank} of {self.full}, {self.factors.U.dtype} factors"

    def __repr__(self) -> str:
        return "svf." + super().__repr__()
