"""Which backend computes a product, and the two switches that a user has over it.

The policy is a table of what was measured, nothing else: native code on a CPU, torch elsewhere.
The Triton and CUDA kernels run when asked for by name; they become a default when a measurement
on the GPU in question says so.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

# Modules are imported when first asked for: importing t2kernels must not import triton.
_MODULES = {
    "reference": "reference",
    "torch": "torch_backend",
    "native": "native",
    "triton": "triton",
    "cuda": "cuda",
}
BACKENDS = tuple(_MODULES)
# Those with ``delta`` and ``delta_unavailable``; the policy takes none of them by itself.
_DELTA_KERNELS = ("triton",)
_loaded: dict[str, Any] = {}


# What ``choose`` takes where it can, by device; torch elsewhere.
DEFAULTS = {"cpu": "native"}

# Up to how many tokens layers that share x (nn/group.py) are one call, by backend. native: measured
# and of no use, q, k, v and gate, up of widths 256 to 2048 take 0.88 to 1.25 of the time of calls
# alone, which are short by now. cuda: not measured; it runs when asked for by name.
GROUP_TOKENS = {"native": 0, "cuda": 128}


class _Switches:
    """Of the process, like torch.set_num_threads. (A ContextVar would break torch.compile.)"""

    backend: str | None = None
    batch_invariant: bool = False


switches = _Switches()


class Choice(NamedTuple):
    """A backend module and the sentence that says why it was chosen. ``fused``: its kernel for the
    delta form runs, see ``choose_delta``."""

    module: Any
    why: str
    fused: bool = False


def load(name: str) -> Any:
    """The backend module called ``name``."""
    module = _loaded.get(name)
    if module is None:
        if name not in _MODULES:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}.")
        module = _loaded[name] = importlib.import_module(f".{_MODULES[name]}", __package__)
    return module


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, every product runs on the backend ``name`` or raises; wins over ``T2_BACKEND``.

    >>> with backend("torch"):
    ...     pass
    """
    load(name)
    before, switches.backend = switches.backend, name
    try:
        yield
    finally:
        switches.backend = before


@contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Inside, the output bits of a row of a converted layer depend on no other row nor on how many
    there are.

    The backend's order of summation is fixed, and so is the form of a layer: within
    ``ExpertBank.use`` every row is computed in factorised form, also when no row has an expert.

    >>> with batch_invariant():
    ...     is_batch_invariant()
    True
    """
    before, switches.batch_invariant = switches.batch_invariant, enabled
    try:
        yield
    finally:
        switches.batch_invariant = before


def is_batch_invariant() -> bool:
    """Whether the caller is inside ``batch_invariant()``."""
    return switches.batch_invariant


def forced_backend() -> str | None:
    """The backend named by ``backend(...)`` or by the variable T2_BACKEND, if any."""
    return switches.backend or os.environ.get("T2_BACKEND") or None


def choose(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Choice:
    """The backend for this call. A forced backend that cannot run the call is an error."""
    name = forced_backend()
    if name is not None:
        module = load(name)
        reason = module.unavailable(x, U, V, d, base, slot, bias, scale)
        if reason is not None:
            raise RuntimeError(
                f"backend {name!r} was asked for (t2kernels.backend or T2_BACKEND) and cannot run "
                f"this call: {reason}. Unset it to let the policy choose."
            )
        return Choice(module, f"{name!r} was asked for by name")
    device = x.device.type
    if device == "cpu":
        native = load("native")
        reason = native.unavailable(x, U, V, d, base, slot, bias, scale)
        if reason is None:
            return Choice(native, "the native kernels are the default on a CPU")
        return Choice(load("torch"), f"the native kernels cannot run this call: {reason}")
    if device == "cuda":
        why = "no kernel of this package has been measured on this GPU against torch"
        return Choice(load("torch"), f"{why}; ask for 'cuda' or 'triton' by name")
    return Choice(load("torch"), f"torch is the one backend for {device}")


def may_fuse_delta() -> bool:
    """Whether ``choose_delta`` could say ``fused`` at all: cheap, for the path of every call."""
    return forced_backend() in _DELTA_KERNELS


def choose_delta(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Choice:
    """The backend for k components on top of a stored weight. Where its module has no kernel that
    sums both products in one accumulator, or that kernel cannot run the call, ``why`` says so and
    ``fused`` is False: the two products are computed apart, rounded and added."""
    module, why, _ = choose(x, U, V, d, base, slot, None, scale)
    if module.NAME not in _DELTA_KERNELS:
        return Choice(module, f"{why}; it has no kernel for both products at once")
    reason = module.delta_unavailable(x, weight, U, V, d, base, slot, bias, scale)
    if reason is not None:
        return Choice(module, f"{why}; its kernel for both products cannot run: {reason}")
    return Choice(module, f"{why}; both products in one accumulator", True)
