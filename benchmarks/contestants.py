"""Who takes part: every form of the layer that a user could run instead, and ours.

Each builder returns contestants whose truth is the form's own mathematics: a LoRA layer is
compared with LoRA in fp64, so that nobody is timed on a wrong result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import Contestant
from layers import LORA_RANK, Layer, WeightSet
from shapes import DECODE_TOKENS, SLOTS, Case
from torch import Tensor

import t2kernels as t2k
from t2kernels.ops import cuda_forms, dispatch

logger = logging.getLogger("bench_svf")

# Above, only the baselines that goals refer to and the policy's own choice take part.
MANY_TOKENS = 1024


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
        A, B = (a[who].to(x.dtype) for a in (self._layer.lora_a, self._layer.lora_b))
        low = torch.bmm(torch.bmm(x.unsqueeze(1), A.transpose(1, 2)), B.transpose(1, 2))
        return F.linear(x, w.weight) + low.squeeze(1)


class LineUp:
    """Builds the contestants of one case."""

    def __init__(self, case: Case, layer: Layer, options: Options) -> None:
        self.case, self.layer, self.options = case, layer, options
        self.T, self.x = case.tokens, layer.x(case.tokens)
        self.truth = Truth(layer, self.x)
        self.d16 = layer.D.to(self.x.dtype)  # torch's forms get the diagonal in x's dtype

    def build(self) -> Iterator[Contestant | Skipped]:
        yield self._contestant(
            "dense", 1, lambda i: F.linear(self.x, self.layer.sets[i].weight), self.truth.dense,
            self._dense_cost(),
        )  # fmt: skip
        yield from self._three_op()
        yield from self._ours()
        if self.T <= MANY_TOKENS:
            yield self._rebuilt()
            yield from self._compiled()
            yield from self._bmm()
            yield from self._peft()

    # Costs: (bytes, flops), the least that a form needs. Activations in and out count once.

    def _io(self) -> int:
        s = self.layer.shape
        return self.T * (s.in_features + s.out_features) * self.x.element_size()

    def _dense_cost(self, low_rank: int = 0, adapters: int = 1) -> tuple[int, int]:
        s, size = self.layer.shape, self.x.element_size()
        both = s.in_features + s.out_features
        weight = s.in_features * s.out_features
        return (
            (weight + adapters * low_rank * both) * size + self._io(),
            2 * self.T * (weight + low_rank * both),
        )

    def _svf_cost(self, slots: int, width: int) -> tuple[int, int]:
        s = self.layer.shape
        products = s.rank * (s.in_features + s.out_features)
        diagonals = 4 * s.rank * min(slots, self.T)
        return products * width + diagonals + self._io(), 2 * self.T * products

    def _contestant(
        self, name: str, slots: int, call: Callable[[int], Tensor],
        formula: Callable[[Tensor, bool], Tensor], cost: tuple[int, int], **more: Any,
    ) -> Contestant:  # fmt: skip
        return Contestant(name, slots, call, formula, *cost, **more)

    def _slots(self) -> Iterator[int]:
        """One, many, and between where the batch has room for them."""
        for slots in SLOTS:
            if slots in (SLOTS[0], SLOTS[-1]) or slots <= self.T <= DECODE_TOKENS:
                yield slots

    # Baselines

    def _three_op_call(
        self, function: Callable[..., Tensor], slots: int
    ) -> Callable[[int], Tensor]:
        x, sets, one, D = self.x, self.layer.sets, self.d16[0], self.d16
        if slots == 1:
            return lambda i: function(x, sets[i].factors.U, sets[i].factors.V, one)
        slot = self.layer.slot(self.T, slots).long()
        return lambda i: function(x, sets[i].factors.U, sets[i].factors.V, D[slot])

    def _three_op(self) -> Iterator[Contestant]:
        for slots in (SLOTS[0], SLOTS[-1]):
            yield self._contestant(
                "three-op", slots, self._three_op_call(three_op, slots),
                partial(self.truth.svf, slots), self._svf_cost(slots, self.x.element_size()),
            )  # fmt: skip

    def _compiled(self) -> Iterator[Contestant | Skipped]:
        name = "three-op compiled"
        if not self.options.compile:
            yield Skipped(name, "--no-compile")
            return
        function = compiled_three_op(self.layer.device.type)
        if isinstance(function, str):
            yield Skipped(name, function)
            return
        yield self._contestant(
            name, 1, self._three_op_call(function, 1), partial(self.truth.svf, 1),
            self._svf_cost(1, self.x.element_size()),
        )  # fmt: skip

    def _rebuilt(self) -> Contestant | Skipped:
        x, sets, d, s = self.x, self.layer.sets, self.d16[0], self.layer.shape
        size, weight = x.element_size(), s.in_features * s.out_features

        def call(i: int) -> Tensor:
            U, _, V = sets[i].factors
            return F.linear(x, (U * d) @ V.T)

        # U and V are read, W' is written and read.
        moved = (s.rank * (s.in_features + s.out_features) + 2 * weight) * size + self._io()
        work = 2 * weight * (s.rank + self.T)
        slow = (str(s), self.case.dtype, "rebuilt W'") in self.options.too_slow
        if slow or work / self.options.gflops / 1e9 > self.options.longest_call_s:
            return Skipped("rebuilt W'", "one call takes more than a second")
        return self._contestant("rebuilt W'", 1, call, partial(self.truth.svf, 1), (moved, work))

    def _bmm(self) -> Iterator[Contestant | Skipped]:
        x, sets, name = self.x, self.layer.sets, "LoRA bmm"
        for slots in (SLOTS[0], SLOTS[-1]):
            groups = min(slots, self.T)
            if self.T % groups or (groups == 1 and slots > 1):
                yield Skipped(name, "needs a batch that falls into equal groups of tokens")
                continue
            # The tokens of an adapter lie together, so nothing has to be gathered: its best case.
            At = self.layer.lora_a[:groups].transpose(1, 2)
            Bt = self.layer.lora_b[:groups].transpose(1, 2)

            def call(i: int, At: Tensor = At, Bt: Tensor = Bt) -> Tensor:
                grouped = x.view(At.shape[0], -1, x.shape[1])
                low = torch.bmm(torch.bmm(grouped, At), Bt)
                return F.linear(x, sets[i].weight).add_(low.view(x.shape[0], -1))

            yield self._contestant(
                name, slots, call, partial(self.truth.lora, groups),
                self._dense_cost(LORA_RANK, groups),
            )  # fmt: skip

    def _peft(self) -> Iterator[Contestant | Skipped]:
        name = "PEFT LoRA"
        module = self.layer.peft_linear() if self.options.peft else "--no-peft"
        if isinstance(module, str):
            yield Skipped(name, module)
            return
        x, sets = self.x, self.layer.sets

        def call(i: int, **routing: Any) -> Tensor:
            module.base_layer.weight.data = sets[i].weight
            return module(x, **routing)

        yield self._contestant(
            name, 1, call, partial(self.truth.lora, 1), self._dense_cost(LORA_RANK)
        )
        for slots in self._slots():
            groups = min(slots, self.T)
            if groups == 1 or self.T > DECODE_TOKENS:
                continue
            names = [f"a{t * groups // self.T}" for t in range(self.T)]
            yield self._contestant(
                name, slots, partial(call, adapter_names=names), partial(self.truth.lora, groups),
                self._dense_cost(LORA_RANK, groups),
            )  # fmt: skip

    # Ours

    def _ours(self) -> Iterator[Contestant | Skipped]:
        for slots in self._slots():
            yield self._svf("ours", slots, nullcontext)
        if self.T <= MANY_TOKENS:
            for backend in t2k.BACKENDS:
                if backend == "reference":
                    continue
                reason = self._unavailable(backend)
                if reason is not None:
                    yield Skipped(f"ours {backend}", reason)
                    continue
                yield self._svf(f"ours {backend}", 1, partial(t2k.backend, backend))
        if self.T <= DECODE_TOKENS:
            if self.options.forms:
                yield from self._cuda_forms()
            yield self._svf("ours invariant", 1, t2k.batch_invariant)
            yield self._svf("ours invariant", SLOTS[-1], t2k.batch_invariant)
        if self.case.dtype not in t2k.FACTOR_KINDS:
            yield self._delta(1)
            yield self._delta(SLOTS[-1])

    def _factors(self, i: int) -> t2k.SVDFactors | t2k.QuantizedFactors:
        w = self.layer.sets[i]
        return w.factors if w.quantized is None else w.quantized

    def _unavailable(self, backend: str) -> str | None:
        f = self._factors(0)
        scale = f.scale if isinstance(f, t2k.QuantizedFactors) else None
        try:
            module = dispatch.load(backend)
        except ImportError as error:
            return f"cannot be imported ({error})"
        return module.unavailable(self.x, f.U, f.V, self.layer.D[0], f.S, None, None, scale)

    def _cuda_forms(self) -> Iterator[Contestant | Skipped]:
        f = self._factors(0)
        for form in cuda_forms.FORMS:
            reason = self._unavailable("cuda")
            if reason is None and form != "fma":
                reason = cuda_forms.unfit(self.x, f.U, f.V)
            if reason is not None:
                yield Skipped(f"ours cuda {form}", reason)
                continue
            yield self._svf(f"ours cuda {form}", SLOTS[-1], partial(cuda_form, form), alone=True)
            for tile in ("auto",) if form == "fma" else cuda_forms.tiles(self.T):
                context = partial(cuda_form, form, tile)
                yield self._svf(f"ours cuda {form} {tile}", 1, context, alone=True)

    def _svf(
        self,
        name: str,
        slots: int,
        context: Callable[[], AbstractContextManager[object]],
        *,
        alone: bool = False,
    ) -> Contestant:
        x, T, D = self.x, self.T, self.layer.D
        slot = None if slots == 1 else self.layer.slot(T, slots)
        d = D[0] if slots == 1 else D
        factors = [self._factors(i) for i in range(len(self.layer.sets))]
        eight_bit = self.case.dtype in t2k.FACTOR_KINDS
        formula = partial(self.truth.quantized if eight_bit else self.truth.svf, slots)

        def call_row(t: int) -> Tensor:
            row_slot = None if slot is None else slot[t : t + 1]
            return t2k.svf_linear(x[t : t + 1], factors[0], d, row_slot)

        return self._contestant(
            name, slots, lambda i: t2k.svf_linear(x, factors[i], d, slot), formula,
            self._svf_cost(slots, 1 if eight_bit else x.element_size()), context=context, ours=True,
            call_row=call_row if alone or context is t2k.batch_invariant else None,
        )  # fmt: skip

    def _delta(self, slots: int) -> Contestant:
        x, sets, k = self.x, self.layer.sets, self.layer.sets[0].leading.rank
        slot = None if slots == 1 else self.layer.slot(self.T, slots)
        D = self.layer.D[:, :k].contiguous()
        d = D[0] if slots == 1 else D
        return self._contestant(
            f"ours delta k={k}", slots,
            lambda i: t2k.svf_delta_linear(x, sets[i].weight, sets[i].leading, d, slot),
            partial(self.truth.delta, slots), self._dense_cost(k), ours=True,
        )  # fmt: skip


@contextmanager
def cuda_form(form: str, tile: str = "auto") -> Iterator[None]:
    """Inside, the CUDA backend in this form or an error."""
    with t2k.backend("cuda"), cuda_forms.form(form, tile):
        yield


@cache
def compiled_three_op(device: str) -> Any:
    """``three_op`` compiled, or the reason why there is none."""
    function = torch.compile(three_op, dynamic=True)
    try:
        ones = torch.ones(2, 2, device=device)
        function(ones, ones, ones.T, ones[0])
    except Exception as error:  # a missing compiler shows in many ways
        logger.debug("torch.compile failed", exc_info=True)
        return f"torch.compile does not work here ({type(error).__name__})"
    return function
