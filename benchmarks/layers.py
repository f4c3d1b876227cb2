"""The tensors of a line-up: several sets of the same weights, so that none stays in a cache.

Each set holds the same numbers at other addresses. A contestant that is called again meets a set
that has not been read since at least four times the size of the last-level cache went by, as in
a model, where the other layers come between.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from shapes import DECODE_TOKENS, SLOTS, Case, Shape
from torch import Tensor

import t2kernels as t2k

DELTA_RANK = 256
LORA_RANK = 16
# Distinct bytes between two visits of one set, in units of the last-level cache.
_CACHES = 4
_FALLBACK_CACHE_BYTES = 64 << 20
_MAX_SETS = 64
_LORA_SETS = 4


@dataclass(frozen=True)
class WeightSet:
    """Everything that a contestant may read of one layer."""

    weight: Tensor  # (m, n)
    factors: t2k.SVDFactors
    leading: t2k.SVDFactors  # the k leading components, for the delta form
    quantized: t2k.QuantizedFactors | None

    @property
    def read(self) -> tuple[Tensor, Tensor]:
        """The factors that our form reads."""
        f = self.factors if self.quantized is None else self.quantized
        return f.V.t(), f.U

    def clone(self) -> WeightSet:
        """The same numbers elsewhere in memory."""

        def copied(f: t2k.SVDFactors) -> t2k.SVDFactors:
            return t2k.SVDFactors(f.U.clone(), f.S, f.V.t().clone().t())

        q = self.quantized
        if q is not None:
            q = q._replace(U=q.U.clone(), V=q.V.t().clone().t())
        return WeightSet(self.weight.clone(), copied(self.factors), copied(self.leading), q)

    def double(self) -> WeightSet:
        """The same (already rounded) numbers in fp64, for the truth."""

        def up(f: Any) -> Any:
            return f._replace(U=f.U.double(), S=f.S.double(), V=f.V.double())

        q = self.quantized
        if q is not None:
            q = up(q)._replace(u_scale=q.u_scale.double(), v_scale=q.v_scale.double())
        return WeightSet(self.weight.double(), up(self.factors), up(self.leading), q)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [text.read_text().strip() for text in levels]
    units = {"K": 1 << 10, "M": 1 << 20}
    known = [int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units]
    return max(known, default=_FALLBACK_CACHE_BYTES)


class Layer:
    """Weights, diagonals and adapters of one shape and dtype; activations for any T."""

    def __init__(
        self,
        shape: Shape,
        dtype: str,
        device: torch.device,
        *,
        seed: int = 0,
        sets: int | None = None,
        slots: tuple[int, ...] | None = None,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.activations = Case(shape, dtype, 1).activations
        self.seed, self.slots = seed, slots or SLOTS[device.type]
        most = max(self.slots)
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        n, m, r = shape.in_features, shape.out_features, shape.rank
        # Columns of norm about 1: for the time and for the rounding as good as singular vectors.
        U = (randn(m, r) / m**0.5).to(self.activations)
        V = (randn(r, n) / n**0.5).to(self.activations).t()
        S = torch.linspace(2.0, 0.05, r, device=device)
        k = min(DELTA_RANK, r)
        factors = t2k.SVDFactors(U, S, V)
        first = WeightSet(
            (randn(m, n) / n**0.5).to(self.activations),
            factors,
            t2k.SVDFactors(U[:, :k].contiguous(), S[:k], V[:, :k].t().contiguous().t()),
            t2k.quantize(factors, dtype) if dtype in t2k.FACTOR_KINDS else None,
        )
        self.sets = [first]
        self.D = S * (1 + 0.3 * randn(most, r))  # (slots, r) fp32
        A = (randn(most, LORA_RANK, n) / n**0.5).to(self.activations)
        B = (randn(most, m, LORA_RANK) / LORA_RANK**0.5).to(self.activations)
        least = min(m * n * U.element_size(), r * (m + n) * (1 if dtype in t2k.FACTOR_KINDS else 4))
        needed = -(-_CACHES * cache_bytes(device) // least)
        count = min(max(needed, 2), _MAX_SETS) if sets is None else sets
        self.sets += [first.clone() for _ in range(count - 1)]
        # LoRA's A (slots, k, n) and B (slots, m, k): many of them are as large as the weight, and
        # as little may they wait in a cache.
        copies = min(count, _LORA_SETS)
        self.lora = [(A, B)] + [(A.clone(), B.clone()) for _ in range(copies - 1)]

    @cached_property
    def doubled(self) -> WeightSet:
        """The first set in fp64."""
        return self.sets[0].double()

    @cached_property
    def _peft(self) -> Any:
        if importlib.util.find_spec("peft") is None:
            return "peft is not installed"
        import peft

        model = torch.nn.ModuleDict({"layer": torch.nn.Linear(1, 1, bias=False)})
        linear = model["layer"]
        linear.in_features, linear.out_features = self.shape.in_features, self.shape.out_features
        linear.weight = torch.nn.Parameter(self.sets[0].weight, requires_grad=False)
        config = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=["layer"])
        for slot in range(max(self.slots)):
            if hasattr(model, "peft_config"):
                del model.peft_config  # else every further adapter warns
            peft.inject_adapter_in_model(config, model, adapter_name=f"a{slot}")
            adapted = model["layer"]
            adapted.lora_A[f"a{slot}"].weight.data = self.lora[0][0][slot]
            adapted.lora_B[f"a{slot}"].weight.data = self.lora[0][1][slot]
        model.eval()
        adapted.set_adapter("a0")
        return adapted

    def peft_linear(self) -> Any:
        """A PEFT LoRA layer with adapters a0, a1, …, or the reason why there is none."""
        return self._peft

    def x(self, tokens: int) -> Tensor:
        """(T, n) activations."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(tokens, self.shape.in_features, generator=generator)
        return x.to(self.device, self.activations)

    def slot(self, tokens: int, slots: int) -> Tensor:
        """(T,) int32: one run of tokens a slot; every token another slot where T < slots.

        Runs are equal at decode sizes. Above, they are as unequal as prompts are: the longest up
        to seven times the shortest.
        """
        t = torch.arange(tokens, dtype=torch.int64)
        if tokens <= DECODE_TOKENS:
            return (t * slots // tokens).to(torch.int32).to(self.device)
        generator = torch.Generator().manual_seed(self.seed + 2)
        ends = (0.25 + 1.5 * torch.rand(slots, generator=generator)).cumsum(0)
        ends = (ends * tokens / ends[-1]).long()[:-1]  # where the next slot begins
        return torch.searchsorted(ends, t, right=True).to(torch.int32).to(self.device)
