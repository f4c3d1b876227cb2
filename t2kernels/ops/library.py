"""The product as operators of torch: schema, fake, autograd, autocast.

``t2kernels::svf_product`` and its backward are what torch.compile, autograd and export see. They
take ``Vh``, the contiguous (r, n) transpose of V, because a compiler may hand an operator a
re-strided copy of a view but keeps a contiguous tensor contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantized import is_eight_bit
from . import dispatch

_library = torch.library.Library("t2kernels", "DEF")
_library.define(
    "svf_product(Tensor x, Tensor U, Tensor Vh, Tensor d, Tensor base, Tensor? slot, Tensor? bias,"
    " Tensor? scale, bool save_h, bool batch_invariant) -> (Tensor, Tensor)"
)
_library.define(
    "svf_product_backward(Tensor g, Tensor x, Tensor U, Tensor Vh, Tensor d, Tensor base,"
    " Tensor? slot, Tensor? h, Tensor? scale, bool need_dx, bool need_dd) -> (Tensor, Tensor)"
)


def check_slot_values(slot: Tensor, slots: int) -> None:
    """Raise unless every value lies in [-1, slots). Reads the values: a sync on a GPU."""
    if slot.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(slot))
    if low < -1 or high >= slots:
        raise ValueError(
            f"slot must lie in [-1, {slots}) for d with {slots} slots (-1 is the base), "
            f"got values from {low} to {high}."
        )


def product(
    x: Tensor,
    U: Tensor,
    Vh: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    save_h: bool,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor | None]:
    """One call of the chosen backend, without any dispatcher: the direct path ends here.

    Slots on a CPU are checked here at the latest; on a GPU that would be a sync.
    """
    V = Vh.t()
    module = dispatch.choose(x, U, V, d, base, slot, bias, scale).module
    if slot is not None and slot.device.type == "cpu" and module.NAME != "native":
        check_slot_values(slot, d.shape[0])  # the native kernels look at every slot anyway
    return module.forward(
        x, U, V, d, base, slot, bias, scale, save_h=save_h, batch_invariant=batch_invariant
    )


def _product_kernel(x: Tensor, U: Tensor, Vh: Tensor, d: Tensor, base: Tensor, slot: Tensor | None,
                    bias: Tensor | None, scale: Tensor | None, save_h: bool,
                    batch_invariant: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, h = product(x, U, Vh, d, base, slot, bias, scale, save_h, batch_invariant)
    return y, x.new_empty(0) if h is None else h


def _backward_kernel(g: Tensor, x: Tensor, U: Tensor, Vh: Tensor, d: Tensor, base: Tensor,
                     slot: Tensor | None, h: Tensor | None, scale: Tensor | None, need_dx: bool,
                     need_dd: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    V = Vh.t()
    module = dispatch.choose(x, U, V, d, base, slot, None, scale).module
    dx, dd = module.backward(g, x, U, V, d, base, slot, h, scale, need_dx=need_dx, need_dd=need_dd)
    return (
        x.new_empty(0) if dx is None else dx,
        d.new_empty(0) if dd is None else dd,
    )


def _product_fake(x: Tensor, U: Tensor, Vh: Tensor, d: Tensor, base: Tensor, slot: Tensor | None,
                  bias: Tensor | None, scale: Tensor | None, save_h: bool,
                  batch_invariant: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens = x.shape[0]
    h = x.new_empty(tokens, U.shape[1]) if save_h else x.new_empty(0)
    return x.new_empty(tokens, U.shape[0]), h


def _backward_fake(g: Tensor, x: Tensor, U: Tensor, Vh: Tensor, d: Tensor, base: Tensor,
                   slot: Tensor | None, h: Tensor | None, scale: Tensor | None, need_dx: bool,
                   need_dd: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    dd = d.new_empty(d.shape) if need_dd else d.new_empty(0)
    return dx, dd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, U, Vh, d, base, slot, _bias, scale, save_h, _ = inputs
    ctx.saved_h = save_h
    ctx.save_for_backward(x, U, Vh, d, base, slot, scale, output[1] if save_h else None)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, _gh: Tensor | None) -> tuple[Any, ...]:
    x, U, Vh, d, base, slot, scale, h = ctx.saved_tensors
    need = ctx.needs_input_grad
    if g is None or not (need[0] or need[3] or need[6]):
        return (None,) * 10
    dx = dd = db = None
    if need[0] or need[3]:
        # The gradient of a sum is an expanded scalar; the kernels want rows in memory.
        dx, dd = torch.ops.t2kernels.svf_product_backward(
            g.contiguous(), x, U, Vh, d, base, slot, h, scale, need[0], need[3]
        )
    if need[6]:
        db = g.sum(0)
    return (dx if need[0] else None, None, None, dd if need[3] else None) + (None,) * 2 + (
        db, None, None, None
    )  # fmt: skip


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    g, x, U, Vh, d, base, slot, _h, scale, *_ = inputs
    ctx.save_for_backward(g, x, U, Vh, d, base, slot, scale)
    ctx.set_materialize_grads(False)


def _backward_of_backward(ctx: Any, ddx: Tensor | None, ddd: Tensor | None) -> tuple[Any, ...]:
    """dx = ((g U) ⊙ d) Vᵀ is linear in g and d, dd = Σ (g U) ⊙ (x V) in g and x: their gradients
    are the same two operators, which makes every order of derivative out of the first.

    h = x V has no gradient of its own; that of x is whole.
    """
    g, x, U, Vh, d, base, slot, scale = ctx.saved_tensors
    need = ctx.needs_input_grad
    forward = torch.ops.t2kernels.svf_product
    backward = torch.ops.t2kernels.svf_product_backward
    d_g = d_x = d_d = None
    if ddx is not None:
        ddx = ddx.contiguous()
        if need[0]:
            d_g, _ = forward(ddx, U, Vh, d, base, slot, None, scale, False, False)
        if need[4]:
            _, d_d = backward(g, ddx, U, Vh, d, base, slot, None, scale, False, True)
    if ddd is not None:
        ddd, none = ddd.contiguous(), torch.zeros_like(base)
        if need[0]:
            more, _ = forward(x, U, Vh, ddd, none, slot, None, scale, False, False)
            d_g = more if d_g is None else d_g + more
        if need[1]:
            d_x, _ = backward(g, x, U, Vh, ddd, none, slot, None, scale, True, False)
    return (d_g, d_x, None, None, d_d) + (None,) * 6


def _autocast(device: str):  # type: ignore[no-untyped-def]
    """x, the factors and the bias in the autocast dtype; d, base and scale stay fp32."""

    def kernel(x: Tensor, U: Tensor, Vh: Tensor, d: Tensor, base: Tensor, slot: Tensor | None,
               bias: Tensor | None, scale: Tensor | None, save_h: bool,
               batch_invariant: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype = torch.get_autocast_dtype(device)

        def cast(t: Tensor) -> Tensor:
            wide = t.dtype == torch.float64 or is_eight_bit(t.dtype)
            return t if wide or not t.is_floating_point() else t.to(dtype)

        with torch.autocast(device, enabled=False):
            return torch.ops.t2kernels.svf_product(
                cast(x), cast(U), cast(Vh), d, base, slot,
                None if bias is None else cast(bias), scale, save_h, batch_invariant,
            )  # fmt: skip

    return kernel


_library.impl("svf_product", _product_kernel, "CompositeExplicitAutograd")
_library.impl("svf_product_backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("t2kernels::svf_product", _product_fake, lib=_library)
torch.library.register_fake("t2kernels::svf_product_backward", _backward_fake, lib=_library)
torch.library.register_autograd(
    "t2kernels::svf_product", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "t2kernels::svf_product_backward", _backward_of_backward, setup_context=_setup_second,
    lib=_library,
)  # fmt: skip
for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("svf_product", _autocast(_device), _key)
