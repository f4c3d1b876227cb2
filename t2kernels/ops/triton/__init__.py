"""The Triton backend: kernels for NVIDIA GPUs of compute capability 8.0 and later.

Importing this package does not import triton; the first ``forward``, ``backward`` or ``mix``
does. With ``TRITON_INTERPRET=1`` in the environment before that, the same kernels run on CPU
tensors in triton's interpreter (for tests: slow, and the only place where they take fp64).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...quantized import FACTOR_KINDS
from ..layout import FLOATS, columns, unfit, unfit_group

if TYPE_CHECKING:
    from ..mixing import Mixing

NAME = "triton"

_INTERPRETED = (*FLOATS, torch.float64)
_KINDS = tuple(FACTOR_KINDS)


@functools.cache
def _missing() -> str | None:
    """Why triton cannot be used at all, found without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "the Triton kernels are tested on NVIDIA GPUs only"
    return None


@functools.cache
def _old_gpu(index: int | None) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if major >= 8:
        return None
    return f"the GPU has compute capability {major}.{minor}; 8.0 is needed"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> str | None:
    """None where this backend can run the call, else a short reason. Never touches the GPU."""
    return _elsewhere(x) or unfit(x, U, V, d, base, slot, bias, scale, _floats(), _KINDS)


def group_unavailable(
    x: Tensor,
    Us: Sequence[Tensor],
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
) -> str | None:
    """None where ``forward_group`` can run the call, else a short reason."""
    args = (x, Us, V, d, base, slot, biases, scale)
    return _elsewhere(x) or unfit_group(*args, _floats(), _KINDS)


def _elsewhere(x: Tensor) -> str | None:
    reason = _missing()
    if reason is not None:
        return reason
    if x.is_cuda:
        return _old_gpu(x.device.index)
    return None if _interpreting() else f"x is on {x.device.type}, not on a CUDA GPU"


def _floats() -> tuple[torch.dtype, ...]:
    """fp64 has no tile on a GPU; the interpreter takes it, for exact tests of the gradients."""
    return _INTERPRETED if _interpreting() else FLOATS


def _patterns(factor: Tensor) -> Tensor:
    """fp8 factors as their bit patterns: the kernels decode them, on GPUs without fp8 too."""
    return factor.view(torch.uint8) if factor.dtype == torch.float8_e4m3fn else factor


def forward(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    save_h: bool = False,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = ((x V) ⊙ d_row) Uᵀ + bias and, with ``save_h``, x V: see ``ops/reference.py``."""
    from ._forward import forward as run

    return run(
        x, _patterns(U), _patterns(V), d, base, slot, bias, scale,
        save_h=save_h, batch_invariant=batch_invariant,
    )  # fmt: skip


def forward_group(
    x: Tensor,
    Us: Sequence[Tensor],
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    biases: Sequence[Tensor | None],
    scale: Tensor | None,
    *,
    batch_invariant: bool = False,
) -> list[Tensor]:
    """Layers that share x, one first launch for all: see ``ops/reference.py``. The tile of the
    first product may be another than a member's alone: equal to rounding. Reached by benchmarks and
    tests only: ``dispatch.GROUP_TOKENS`` has no entry for this backend."""
    from ._forward import expand, project

    work = torch.empty((x.shape[0], V.shape[1]), dtype=x.dtype, device=x.device)
    project(x, _patterns(V), d, base, slot, scale, h=None, hd=work, batch_invariant=batch_invariant)
    return [
        expand(
            work[:, c], _patterns(U), bias, transposed=False, batch_invariant=batch_invariant
        )
        for U, bias, c in zip(Us, biases, columns(Us))
    ]  # fmt: skip


def backward(
    g: Tensor,
    x: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None = None,
    h: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    need_dx: bool = True,
    need_dd: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dd): see ``ops/reference.py``."""
    from ._backward import backward as run

    return run(
        g, x, _patterns(U), _patterns(V), d, base, slot, h, scale,
        need_dx=need_dx, need_dd=need_dd,
    )  # fmt: skip


def delta_unavailable(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> str | None:
    """None where ``delta`` can run the call, else a short reason. Never touches the GPU."""
    if weight.dtype is not x.dtype or weight.device != x.device:
        return f"the stored weight is {weight.dtype} on {weight.device}; expected it like x"
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        return "the stored weight must have a contiguous axis and no gaps"
    return unavailable(x, U, V, d, base, slot, bias, scale)


def delta(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """y = x·Wᵀ + ((x V_k) ⊙ (d_row - σ)) U_kᵀ + bias, rounded once: see ``_delta.delta``."""
    from ._delta import delta as run

    return run(
        x, weight, _patterns(U), _patterns(V), d, base, slot, bias, scale,
        batch_invariant=batch_invariant,
    )  # fmt: skip


def mix_unavailable(out: Tensor) -> str | None:
    """Why experts cannot be mixed into this arena, or None."""
    reason = _missing()
    if reason is not None:
        return reason
    if out.is_cuda:
        return _old_gpu(out.device.index)
    return None if _interpreting() else f"the arena is on {out.device.type}, not on a CUDA GPU"


def mix(call: Mixing) -> None:
    """out[rows[i]] = S ⊙ (1 + Σ_k α[i, k] (Z[indices[i, k]] − 1)): see ``ops/mixing.py``."""
    from ._mix import mix as run

    run(call)
