"""Who takes part in a line-up: ours in every form, beside what a user could run instead.

Each contestant's truth is its form's own mathematics: a LoRA layer is compared with LoRA in fp64,
so that nobody is timed on a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

from baselines import baselines
from harness import Contestant
from lineup import Basis, Options, Skipped
from shapes import DECODE_TOKENS, MANY_TOKENS
from torch import Tensor

import t2kernels as t2k
from t2kernels.ops import cuda_forms, dispatch

__all__ = ["LineUp", "Options", "Skipped"]

GPU_BACKENDS = ("cuda", "triton")
Factors = t2k.SVDFactors | t2k.QuantizedFactors


class LineUp(Basis):
    """Builds the contestants of one case."""

    def build(self) -> Iterator[Contestant | Skipped]:
        yield from baselines(self)
        for slots in self.slots():
            yield self._svf("ours", slots, nullcontext)
        if self.T <= MANY_TOKENS or self.on_gpu:
            yield from self._by_backend()
        if self.T <= DECODE_TOKENS:
            if self.options.forms:
                yield from self._cuda_forms()
            for slots in (1, self.many):
                yield self._svf("ours invariant", slots, t2k.batch_invariant)
        if self.case.dtype not in t2k.FACTOR_KINDS:
            for slots in (1, self.many):
                yield self._delta("", slots)

    def _by_backend(self) -> Iterator[Contestant | Skipped]:
        """Every backend by force; those with kernels for a GPU in each of their modes."""
        eight_bit = self.case.dtype in t2k.FACTOR_KINDS
        for backend in t2k.BACKENDS:
            if backend == "reference":
                continue
            name = f"ours {backend}"
            reason = self._unavailable(backend, self._factors(0))
            if reason is not None:
                yield Skipped(name, reason)
                continue
            yield self._svf(name, 1, partial(within, backend))
            if backend not in GPU_BACKENDS:
                continue
            yield self._svf(name, self.many, partial(within, backend))
            if self.T <= DECODE_TOKENS:
                yield self._svf(f"{name} eager", 1, partial(within, backend), capture=False)
                for slots in (1, self.many):
                    context = partial(within, backend, invariant=True)
                    yield self._svf(f"{name} invariant", slots, context)
            leading = self.layer.sets[0].leading
            if not eight_bit and self._unavailable(backend, leading) is None:
                yield self._delta(backend, 1)

    def _factors(self, i: int) -> Factors:
        w = self.layer.sets[i]
        return w.factors if w.quantized is None else w.quantized

    def _unavailable(self, backend: str, f: Factors) -> str | None:
        scale = f.scale if isinstance(f, t2k.QuantizedFactors) else None
        try:
            module = dispatch.load(backend)
        except ImportError as error:
            return f"cannot be imported ({error})"
        d = self.layer.D[0, : f.S.shape[0]]
        reason: str | None = module.unavailable(self.x, f.U, f.V, d, f.S, None, None, scale)
        return reason

    def _cuda_forms(self) -> Iterator[Contestant | Skipped]:
        f = self._factors(0)
        for form in cuda_forms.FORMS:
            reason = self._unavailable("cuda", f)
            if reason is None and form != "fma":
                reason = cuda_forms.unfit(self.x, f.U, f.V)
            if reason is not None:
                yield Skipped(f"ours cuda {form}", reason)
                continue
            yield self._svf(f"ours cuda {form}", self.many, partial(cuda_form, form), alone=True)
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
        capture: bool = True,
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

        return self.contestant(
            name, slots, lambda i: t2k.svf_linear(x, factors[i], d, slot), formula,
            self.svf_cost(slots, 1 if eight_bit else x.element_size()), context=context, ours=True,
            call_row=call_row if alone or name.endswith("invariant") else None, capture=capture,
        )  # fmt: skip

    def _delta(self, backend: str, slots: int) -> Contestant:
        x, sets, k = self.x, self.layer.sets, self.layer.sets[0].leading.rank
        slot = None if slots == 1 else self.layer.slot(self.T, slots)
        D = self.layer.D[:, :k].contiguous()
        d = D[0] if slots == 1 else D
        return self.contestant(
            f"ours delta k={k} {backend}".rstrip(), slots,
            lambda i: t2k.svf_delta_linear(x, sets[i].weight, sets[i].leading, d, slot),
            partial(self.truth.delta, slots), self.dense_cost(k), ours=True,
            context=partial(within, backend) if backend else nullcontext,
        )  # fmt: skip


@contextmanager
def within(backend: str, *, invariant: bool = False) -> Iterator[None]:
    """Inside, this backend or an error; in batch-invariant mode where asked for."""
    with ExitStack() as stack:
        stack.enter_context(t2k.backend(backend))
        if invariant:
            stack.enter_context(t2k.batch_invariant())
        yield


@contextmanager
def cuda_form(form: str, tile: str = "auto") -> Iterator[None]:
    """Inside, the CUDA backend in this form or an error."""
    with t2k.backend("cuda"), cuda_forms.form(form, tile):
        yield
