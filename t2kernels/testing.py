"""Inputs and error measures shared by the tests, the benchmarks and anyone who adds a kernel.

The rule of acceptance (also flash-attention's): a kernel may err, against the fp64 truth, by at
most twice what plain torch errs in the same dtype, plus a small floor (``error_floor``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .ops import reference
from .ops.layout import member_calls
from .quantized import FACTOR_KINDS

# Sizes with a reason: 1 (degenerate), 17 (one past a power of two), 63 (one short of a tile),
# 64 and 128 (whole tiles), 200 (several tiles and a tail).
AWKWARD_SIZES = (1, 17, 63, 64, 128, 200)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of the kernel contract; see ``ops/reference.py`` for the shapes."""

    x: Tensor
    U: Tensor
    V: Tensor
    d: Tensor
    base: Tensor
    slot: Tensor | None
    bias: Tensor | None
    scale: Tensor | None = None

    def args(self) -> tuple[Tensor | None, ...]:
        """In the order of ``forward``."""
        return (self.x, self.U, self.V, self.d, self.base, self.slot, self.bias, self.scale)

    def double(self) -> Inputs:
        """The same (already rounded) values in fp64, for the truth."""

        def up(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.double()

        return replace(
            self,
            x=self.x.double(), U=self.U.double(), V=self.V.double(), d=self.d.double(),
            base=self.base.double(), bias=up(self.bias), scale=up(self.scale),
        )  # fmt: skip


def make_inputs(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    *,
    slots: int = 0,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    factors: str | None = None,
) -> Inputs:
    """Random inputs of the kernel contract.

    ``slots`` = 0 gives one d (r,); otherwise D (slots, r) and a slot per token that uses every
    slot in turn and -1 now and then. ``factors`` "int8" or "fp8" gives 8-bit factors with a scale
    per column.
    U and V have roughly orthonormal columns, so y has the size of x times sigma.
    """
    gen = torch.Generator().manual_seed(seed)
    T, n, m, r = tokens, in_features, out_features, rank
    diag_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    x = randn(T, n).to(dtype)
    scale = None
    if factors is not None:

        def eight_bit(*shape: int) -> Tensor:  # entries of about 73 in the mean square
            if factors == "int8":
                return torch.randint(-127, 128, shape, generator=gen, dtype=torch.int8)
            return (73 * randn(*shape)).clamp_(-448, 448).to(FACTOR_KINDS[factors])

        U, Vh = eight_bit(m, r), eight_bit(r, n)
        scale = ((0.5 + torch.rand(r, generator=gen)) / (73.0**2 * (m * n) ** 0.5)).to(diag_dtype)
    else:
        U = (randn(m, r) / m**0.5).to(dtype)
        Vh = (randn(r, n) / n**0.5).to(dtype)
    base = (0.1 + randn(r).abs()).to(diag_dtype)
    if slots:
        d = (base * (1 + 0.3 * randn(slots, r))).to(diag_dtype)
        slot = (torch.arange(T, dtype=torch.int32) * 7) % (slots + 1) - 1
    else:
        d = (base * (1 + 0.3 * randn(r))).to(diag_dtype)
        slot = None
    b = randn(m).to(dtype) if bias else None
    moved = [None if t is None else t.to(device) for t in (x, U, Vh, d, base, slot, b, scale)]
    x, U, Vh, d, base, slot, b, scale = moved  # type: ignore[assignment]
    return Inputs(x, U, Vh.t(), d, base, slot, b, scale)


@dataclass(frozen=True)
class Group:
    """Arguments of one call for layers that share x; see ``reference.forward_group``."""

    x: Tensor
    Us: tuple[Tensor, ...]
    V: Tensor
    d: Tensor
    base: Tensor
    slot: Tensor | None
    biases: tuple[Tensor | None, ...]
    scale: Tensor | None = None

    def args(self) -> tuple[Any, ...]:
        """In the order of ``forward_group``."""
        return (self.x, self.Us, self.V, self.d, self.base, self.slot, self.biases, self.scale)

    def members(self) -> list[Inputs]:
        """The same layers one by one, on the same memory."""
        return [Inputs(*call) for call in member_calls(*self.args())]


def make_group(
    tokens: int,
    in_features: int,
    out_features: Sequence[int],
    ranks: Sequence[int],
    *,
    slots: int = 0,
    bias: Sequence[bool] = (),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    factors: str | None = None,
) -> Group:
    """Random inputs for layers that share x, made as by ``make_inputs``.

    ``bias`` says which members have one; those it does not reach have.
    """
    with_bias = [*bias, *[True] * len(ranks)]
    members = [
        make_inputs(
            tokens, in_features, m, r, slots=slots, bias=with_bias[i], dtype=dtype, device=device,
            seed=seed + i, factors=factors,
        )
        for i, (m, r) in enumerate(zip(out_features, ranks))
    ]  # fmt: skip
    scales = [member.scale for member in members if member.scale is not None]
    return Group(
        x=members[0].x,
        Us=tuple(member.U for member in members),
        V=torch.cat([member.V.t() for member in members]).t(),
        d=torch.cat([member.d for member in members], -1),
        base=torch.cat([member.base for member in members]),
        slot=members[0].slot,
        biases=tuple(member.bias for member in members),
        scale=torch.cat(scales) if scales else None,
    )


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual − truth‖ / ‖truth‖ in fp64; inf if anything is not finite."""
    a, b = actual.detach().double().cpu(), truth.detach().double().cpu()
    if a.shape != b.shape:
        raise ValueError(
            f"relative_error: shapes differ, {tuple(a.shape)} against {tuple(b.shape)}"
        )
    if not torch.isfinite(a).all():
        return float("inf")
    if a.numel() == 0:
        return 0.0
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def error_floor(dtype: torch.dtype, elements: int = 1) -> float:
    """What even a right kernel may err beyond the rule.

    In a few elements of a low precision plain torch can be right by luck, so one unit in the last
    place is allowed there; in many, rounding averages out and a few units of fp32 are enough.
    """
    if elements >= 256 or dtype in (torch.float32, torch.float64):
        return 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return torch.finfo(dtype).eps


def plain_forward(inputs: Inputs) -> Tensor:
    """The three operations a torch user would write, in the inputs' own dtype."""
    i = inputs
    U, V = (i.U.to(i.x.dtype), i.V.to(i.x.dtype)) if i.scale is not None else (i.U, i.V)
    rows = reference.diagonal_rows(i.d, i.base, i.slot, i.scale)
    y = ((i.x @ V) * rows).to(i.x.dtype) @ U.t()
    return y if i.bias is None else y + i.bias


def assert_accurate(actual: Tensor, truth: Tensor, plain: Tensor, what: str = "result") -> None:
    """Raise unless error(actual) ≤ 2 × error(plain torch) + floor, against the fp64 truth."""
    error, allowed = relative_error(actual, truth), 2 * relative_error(plain, truth)
    limit = allowed + error_floor(actual.dtype, actual.numel())
    if not error <= limit:
        raise AssertionError(f"{what}: relative error {error:.3e}, allowed {limit:.3e}")


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, ``torch.empty`` and relatives return NaN (or 101 for integers), so that an element
    which a kernel forgot to write shows."""

    def poison(make):  # type: ignore[no-untyped-def]
        def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 101)

        return wrapped

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poison(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield
