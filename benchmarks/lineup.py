"""A line-up: one layer, one dtype, one number of tokens; what all its contestants share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from harness import Contestant
from layers import Layer, WeightSet
from shapes import DECODE_TOKENS, Case
from torch import Tensor


@dataclass(frozen=True)
class Skipped:
    """A contestant that cannot run here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Options:
    """What the command line leaves out."""

    compile: bool = True
    peft: bool = True
    # Every form of the CUDA kernels by name, beside the one that the policy takes.
    forms: bool = False
    # Contestants whose one call takes longer are left out, also where the machine's best rate
    # says so beforehand.
    gflops: float = float("inf")
    longest_call_s: float = 1.0
    # (shape, dtype, name) of baselines that took longer: not asked again at another T.
    too_slow: set[tuple[str, str, str]] = field(default_factory=set)


def three_op(x: Tensor, U: Tensor, V: Tensor, d: Tensor) -> Tensor:
    """What a torch user would write; d is in x's dtype already."""
    return ((x @ V) * d) @ U.T


class Truth:
    """The mathematics of each form on some rows, in fp64 or as plain torch in the layer's dtype."""

    def __init__(self, layer: Layer, x: Tensor) -> None:
        self._layer, self._x = layer, x

    @cached_property
    def _double(self) -> WeightSet:
        return self._layer.doubled

    def _parts(self, rows: Tensor, double: bool) -> tuple[Tensor, WeightSet]:
        x = self._x[rows.to(self._x.device)]
        return (x.double(), self._double) if double else (x, self._layer.sets[0])

    def _diagonal(self, rows: Tensor, slots: int, like: Tensor) -> Tensor:
        slot = self._layer.slot(self._x.shape[0], slots).long()[rows.to(like.device)]
        D = self._layer.D[slot]
        return D.double() if like.dtype == torch.float64 else D

    def dense(self, rows: Tensor, double: bool) -> Tensor:
        x, w = self._parts(rows, double)
        return F.linear(x, w.weight)

    def svf(self, slots: int, rows: Tensor, double: bool) -> Tensor:
        x, w = self._parts(rows, double)
        d = self._diagonal(rows, slots, x)
        return ((x @ w.factors.V) * d).to(x.dtype) @ w.factors.U.T

    def quantized(self, slots: int, rows: Tensor, double: bool) -> Tensor:
        x, w = self._parts(rows, double)
        q = w.quantized
        if q is None:
            raise RuntimeError("8-bit factors were not made for this layer")
        d = self._diagonal(rows, slots, x) * q.scale
        return ((x @ q.V.to(x.dtype)) * d).to(x.dtype) @ q.U.T.to(x.dtype)

    def delta(self, slots: int, rows: Tensor, double: bool) -> Tensor:
        x, w = self._parts(rows, double)
        U, S, V = w.leading
        d = self._diagonal(rows, slots, x)[:, : S.shape[0]] - S
        return F.linear(x, w.weight) + ((x @ V) * d).to(x.dtype) @ U.T

    def lora(self, groups: int, rows: Tensor, double: bool) -> Tensor:
        x, w = self._parts(rows, double)
        who = (rows * groups // self._x.shape[0]).to(x.device)
        A, B = (a[who].to(x.dtype) for a in self._layer.lora[0])
        low = torch.bmm(torch.bmm(x.unsqueeze(1), A.transpose(1, 2)), B.transpose(1, 2))
        return F.linear(x, w.weight) + low.squeeze(1)


class Basis:
    """The tensors, the truth and the costs that contestants of one case are made from."""

    def __init__(self, case: Case, layer: Layer, options: Options) -> None:
        self.case, self.layer, self.options = case, layer, options
        self.T, self.x = case.tokens, layer.x(case.tokens)
        self.truth = Truth(layer, self.x)
        self.d16 = layer.D.to(self.x.dtype)  # torch's forms get the diagonal in x's dtype
        self.many = layer.slots[-1]
        self.on_gpu = layer.device.type == "cuda"

    # Costs: (bytes, flops), the least that a form needs. Activations in and out count once.

    def io(self) -> int:
        s = self.layer.shape
        return self.T * (s.in_features + s.out_features) * self.x.element_size()

    def dense_cost(self, low_rank: int = 0, adapters: int = 1) -> tuple[int, int]:
        s, size = self.layer.shape, self.x.element_size()
        both = s.in_features + s.out_features
        weight = s.in_features * s.out_features
        return (
            (weight + adapters * low_rank * both) * size + self.io(),
            2 * self.T * (weight + low_rank * both),
        )

    def svf_cost(self, slots: int, width: int) -> tuple[int, int]:
        s = self.layer.shape
        products = s.rank * (s.in_features + s.out_features)
        diagonals = 4 * s.rank * min(slots, self.T)
        return products * width + diagonals + self.io(), 2 * self.T * products

    def contestant(
        self, name: str, slots: int, call: Callable[[int], Tensor],
        formula: Callable[[Tensor, bool], Tensor], cost: tuple[int, int], **more: Any,
    ) -> Contestant:  # fmt: skip
        return Contestant(name, slots, call, formula, *cost, **more)

    def slots(self) -> Iterator[int]:
        """One, many, and between where the batch has room for them."""
        for slots in self.layer.slots:
            if slots in (1, self.many) or slots <= self.T <= DECODE_TOKENS:
                yield slots
