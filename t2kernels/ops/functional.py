"""The public functions: validation, the flattening of leading axes, and the direct path."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..diagonal import check_sigma
from ..quantized import FACTOR_KINDS, QuantizedFactors, is_eight_bit
from ..svd import SVDFactors
from . import dispatch
from .library import check_slot_values, product

_PLAIN = (Tensor, torch.nn.Parameter)
_EIGHT_BIT = tuple(FACTOR_KINDS.values())


def _plain_eager(x: Tensor) -> bool:
    """No compiler, tracer, dispatch mode, function transform or tensor subclass is watching."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._get_tracing_state()
    )


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for x's device; a device that has none (meta) would raise."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def unobserved(x: Tensor) -> bool:
    """Nothing but the product is asked of a call with x: nobody watches, no cast is due."""
    return _plain_eager(x) and not under_autocast(x)


def run(
    x: Tensor,
    U: Tensor,
    Vh: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    recompute: bool,
) -> Tensor:
    """The product of a (T, n) x whose arguments are known to be valid.

    With no gradient wanted and nobody watching, the backend is called directly: the dispatcher
    would cost more than a small layer.
    """
    if x.stride(-1) != 1:  # a kernel must not be chosen, nor bits change, by the layout of x
        x = x.contiguous()
    wants_dd = d.requires_grad and torch.is_grad_enabled()
    wants_grad = wants_dd or (
        torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    )
    invariant = dispatch.is_batch_invariant()
    try:
        direct = not wants_grad and _plain_eager(x) and not torch.is_autocast_enabled(x.device.type)
    except RuntimeError as error:  # the meta device has no autocast; asking first would cost time
        if U.device != x.device:
            message = f"x is on {x.device}, the factors are on {U.device}. Move one of them."
            raise ValueError(f"svf_linear: {message}") from error
        direct = False
    if direct:
        return product(x, U, Vh, d, base, slot, bias, scale, False, invariant)[0]
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        raise RuntimeError(
            "svf_linear has no forward-mode derivative (torch.func.jvp, dual tensors); its tangent "
            "would silently be zero. Use reverse mode: backward, torch.autograd.grad."
        )
    save_h = wants_dd and not recompute
    y, _ = torch.ops.t2kernels.svf_product(x, U, Vh, d, base, slot, bias, scale, save_h, invariant)
    return y


def run_delta(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    Vh: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Tensor | None:
    """x·Wᵀ + x·V·diag(d − σ)·Uᵀ + b of a (T, n) x in one accumulator, for valid arguments.

    None where the two products are to be computed apart: the backend has no such kernel, a gradient
    is wanted, or somebody (a compiler, autocast) is watching.
    """
    if not dispatch.may_fuse_delta() or not _plain_eager(x) or type(weight) not in _PLAIN:
        return None
    tensors = (x, weight, d, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return None
    if under_autocast(x) or forward_ad._current_level >= 0:
        return None
    if x.stride(-1) != 1:
        x = x.contiguous()
    choice = dispatch.choose_delta(x, weight, U, Vh.t(), d, base, slot, bias, scale)
    if not choice.fused:
        return None
    if slot is not None and slot.device.type == "cpu":
        check_slot_values(slot, d.shape[0])
    return choice.module.delta(
        x, weight, U, Vh.t(), d, base, slot, bias, scale,
        batch_invariant=dispatch.is_batch_invariant(),
    )  # fmt: skip


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _check(
    op: str, x: Tensor, f: SVDFactors | QuantizedFactors, d: Tensor, slot: Tensor | None,
    bias: Tensor | None, diagonal: str,
) -> None:  # fmt: skip
    """Shapes, dtypes, devices and layouts; never values, so never a sync."""
    if not isinstance(f, (SVDFactors, QuantizedFactors)):
        raise TypeError(
            f"{op}: factors must be SVDFactors or QuantizedFactors, got {type(f).__name__}. "
            "Make them with t2kernels.decompose(weight)."
        )
    named = {"x": x, "U": f.U, "S": f.S, "V": f.V, diagonal: d, "slot": slot, "bias": bias}
    for name, value in named.items():
        if not isinstance(value, Tensor) and (value is not None or name not in ("slot", "bias")):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}.")
    U, V = f.U, f.V
    if U.dim() != 2 or V.dim() != 2 or f.S.shape != U.shape[1:] or V.shape[1] != U.shape[1]:
        raise ValueError(
            f"{op}: factors must be U (m, r), S (r,), V (n, r), got {_shape(U)}, {_shape(f.S)}, "
            f"{_shape(V)}. Make them with t2kernels.decompose(weight)."
        )
    (m, r), n = U.shape, V.shape[0]
    if isinstance(f, QuantizedFactors):
        scales = (f.u_scale, f.v_scale)
        if not is_eight_bit(U.dtype):
            raise TypeError(
                f"{op}: U and V of QuantizedFactors must be {' or '.join(map(str, _EIGHT_BIT))}, "
                f"got {U.dtype}. Make them with t2kernels.quantize(factors)."
            )
        if any(s.shape != (r,) or s.dtype != torch.float32 or s.device != U.device for s in scales):
            raise ValueError(
                f"{op}: {f.kind} factors need u_scale and v_scale (r,) = ({r},) in torch.float32 "
                f"on {U.device}, got {[(_shape(s), s.dtype) for s in scales]}. Make them with "
                "t2kernels.quantize(factors)."
            )
    if V.dtype != U.dtype or f.S.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: U and V must share a dtype and S be torch.float32 (or float64), got {U.dtype}, "
            f"{V.dtype} and {f.S.dtype}."
        )
    if x.dim() == 0 or x.shape[-1] != n:
        raise ValueError(f"{op}: x must have shape (..., n) with n = {n}, got {_shape(x)}.")
    if d.shape[-1:] != (r,) or d.dim() not in (1, 2):
        raise ValueError(
            f"{op}: {diagonal} must have shape (r,) = ({r},) or (slots, r), got {_shape(d)}. "
            "Was this expert trained for another layer?"
        )
    diag_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if d.dtype != diag_dtype:
        raise TypeError(
            f"{op}: {diagonal} must be {diag_dtype} (for x in {x.dtype}), got {d.dtype}. "
            "The diagonal stays in full precision; use effective_diagonal or .float()."
        )
    autocast = under_autocast(x)
    if not x.is_floating_point():
        wanted = torch.float32 if is_eight_bit(U.dtype) else U.dtype
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}. Use x.to({wanted}).")
    if U.dtype != x.dtype and not isinstance(f, QuantizedFactors) and not autocast:
        raise TypeError(
            f"{op}: x must have the factors' dtype {U.dtype}, got {x.dtype}. "
            f"Use x.to({U.dtype}) or decompose(weight, dtype={x.dtype})."
        )
    if (U.requires_grad or V.requires_grad) and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: U and V are frozen and get no gradient; pass U.detach(), V.detach()."
        )
    if bias is not None and (_shape(bias) != (m,) or (bias.dtype != x.dtype and not autocast)):
        raise ValueError(
            f"{op}: bias must have shape (m,) = ({m},) and dtype {x.dtype}, "
            f"got {_shape(bias)} in {bias.dtype}."
        )
    for name, t in named.items():
        if t is not None and t.device != x.device:
            raise ValueError(
                f"{op}: all tensors must be on x's device {x.device}, {name} is on {t.device}."
            )
    if _plain_eager(x):
        check_sigma(f.S)
    if slot is None:
        if d.dim() == 2:
            raise ValueError(
                f"{op}: {diagonal} has {d.shape[0]} slots {_shape(d)}; slot (tokens,) int32 must "
                f"say which token uses which; pass {diagonal}[i] for a single one."
            )
        return
    tokens = x.numel() // n if n else 0
    if d.dim() != 2:
        raise ValueError(f"{op}: with slot, {diagonal} must be (slots, r), got {_shape(d)}.")
    if slot.dtype != torch.int32:
        raise TypeError(f"{op}: slot must be torch.int32, got {slot.dtype}. Use slot.int().")
    if _shape(slot) != (tokens,):
        raise ValueError(
            f"{op}: slot must have shape (tokens,) = ({tokens},), one entry per row of x "
            f"flattened to (tokens, n), got {_shape(slot)}."
        )


class _Known:
    """Factors that passed ``_check`` once. Nothing here keeps U alive."""

    __slots__ = ("S", "V", "Vh", "m", "n", "pointers", "r", "ref", "scale", "scales")

    def __init__(self, f: SVDFactors | QuantizedFactors) -> None:
        key = id(f.U)
        self.ref = weakref.ref(f.U, lambda _: _known.pop(key, None))
        self.V, self.S, self.Vh = f.V, f.S, f.V.t()
        (self.m, self.r), self.n = f.U.shape, f.V.shape[0]
        self.pointers = _pointers(f)
        self.scales: tuple[Tensor, ...] = ()
        self.scale: Tensor | None = None
        if isinstance(f, QuantizedFactors):
            self.scales, self.scale = (f.u_scale, f.v_scale), f.scale


_known: dict[int, _Known] = {}


def _pointers(f: SVDFactors | QuantizedFactors) -> tuple[int, ...]:
    """What changes when factors are replaced in place (``.data``) or σ is written to."""
    S = f.S
    return f.U.data_ptr(), f.V.data_ptr(), S.data_ptr(), -1 if S.is_inference() else S._version


def _recall(f: SVDFactors | QuantizedFactors) -> _Known | None:
    """What is known about these factors, if they are still what they were."""
    known = _known.get(id(f.U))
    if (
        known is None
        or known.ref() is not f.U
        or known.V is not f.V
        or known.S is not f.S
        or known.pointers != _pointers(f)
    ):
        return None
    if isinstance(f, QuantizedFactors):
        same = known.scales and known.scales[0] is f.u_scale and known.scales[1] is f.v_scale
        return known if same else None
    return None if known.scales else known


def _remember(f: SVDFactors | QuantizedFactors) -> None:
    if f.U.is_contiguous() and f.V.t().is_contiguous() and f.S.dtype == torch.float32:
        _known[id(f.U)] = _Known(f)


def _fits(
    known: _Known, x: Tensor, U: Tensor, d: Tensor, slot: Tensor | None, bias: Tensor | None
) -> bool:
    """The usual call: all that ``_check`` asks of x, d and slot, in the fewest steps."""
    device = x.device
    return (
        type(d) in _PLAIN
        and x.dtype is not torch.float64
        and (U.dtype is x.dtype or (known.scale is not None and x.is_floating_point()))
        and x.dim() > 0
        and x.shape[-1] == known.n
        and d.dtype is torch.float32
        and d.shape[-1] == known.r
        and d.dim() == (1 if slot is None else 2)
        and device == U.device
        and device == d.device
        and not (U.requires_grad or known.V.requires_grad)
        and (bias is None or (bias.dtype is x.dtype and bias.shape == (known.m,)
                              and bias.device == device))
        and (slot is None or (type(slot) is Tensor and slot.dtype is torch.int32
                              and slot.dim() == 1 and slot.shape[0] * known.n == x.numel()
                              and slot.device == device))
    )  # fmt: skip


def layout(f: SVDFactors | QuantizedFactors) -> tuple[Tensor, Tensor]:
    """(U, Vh), both contiguous; a copy only where the caller built factors of another layout."""
    return f.U.contiguous(), f.V.t().contiguous()


def _dense_layout(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _rows(d: Tensor) -> Tensor:
    return d if d.stride(-1) == 1 else d.contiguous()


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x·Wᵀ + b; in batch-invariant mode by a kernel whose order of summation is fixed.

    Equivalent to ``F.linear(x, weight, bias)``, which it is outside that mode. For the layers of a
    model that were not converted, when all of it is to be invariant.

    Args:
        x: (..., n). weight: (m, n). bias: (m,) or None. All of one floating dtype.

    Returns:
        y (..., m) in x's dtype. Where no native kernel runs the call (a GPU, gradients), every row
        is a product of its own: slow, and right by construction.

    >>> import torch, t2kernels as t2k
    >>> x, w = torch.randn(3, 4), torch.randn(2, 4)
    >>> with t2k.batch_invariant():
    ...     torch.equal(t2k.dense(x, w, None)[:1], t2k.dense(x[:1], w, None))
    True
    """
    if not dispatch.is_batch_invariant():
        return F.linear(x, weight, bias)
    x2 = x.reshape(-1, x.shape[-1])
    wants_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    direct = not wants_grad and _plain_eager(x) and not under_autocast(x)
    native = dispatch.load("native")
    if direct and native.linear_unavailable(x2, weight, bias) is None:
        y = native.linear(x2, weight, bias)
    else:  # row by row: slow, and right by construction
        rows = [F.linear(x2[t : t + 1].contiguous(), weight, bias) for t in range(x2.shape[0])]
        y = torch.cat(rows) if rows else F.linear(x2, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def svf_linear(
    x: Tensor,
    f: SVDFactors | QuantizedFactors,
    d: Tensor,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """y = x·V·diag(d)·Uᵀ + b, without building W′ = U·diag(d)·Vᵀ (paper, section 3.1).

    Equivalent to ``F.linear(x, f.U @ torch.diag(d) @ f.V.T, bias)``; with ``slot`` every token t
    uses the diagonal ``d[slot[t]]``, and ``slot[t] == -1`` means ``d = f.S``, the base weight to
    rounding.

    Args:
        x: (..., n) in the factors' dtype (any floating dtype with 8-bit factors).
        f: factors U (m, r), S (r,), V (n, r), from ``decompose`` or ``quantize``.
        d: (r,) or (slots, r), fp32 (fp64 for fp64 x): σ⊙z from ``effective_diagonal``.
        slot: (tokens,) int32 with tokens = x.numel() / n, in [-1, slots). Values are checked here
            for CPU tensors; on a GPU a check would stall, so check where the routing is set.
        bias: (m,) in x's dtype.
        recompute: with gradients, compute h = xV again in backward instead of keeping (tokens, r).

    Returns:
        y (..., m) in x's dtype. Sums are accumulated in fp32; h⊙d is rounded to x's dtype once.

    Gradients reach x, d (per slot) and bias; U and V are frozen. Under autocast x, U, V and the
    bias are cast to the autocast dtype, d stays fp32. Cost: 2r(n + m) FLOP a token, whatever the
    number of slots.

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.
        RuntimeError: a backend was asked for by name and cannot run this call.

    >>> import torch, t2kernels as t2k
    >>> w, x = torch.randn(5, 3), torch.randn(2, 3)
    >>> f = t2k.decompose(w)
    >>> torch.allclose(t2k.svf_linear(x, f, f.S), x @ w.T, atol=1e-5)
    True
    """
    direct = _plain_eager(x) and isinstance(f, (SVDFactors, QuantizedFactors))
    known = _recall(f) if direct else None
    try:
        fits = known is not None and _fits(known, x, f.U, d, slot, bias)
    except AttributeError:  # bias is no tensor: _check says so
        fits = False
    if known is not None and fits:
        U, Vh, scale = f.U, known.Vh, known.scale
    else:
        _check("svf_linear", x, f, d, slot, bias, "d")
        U, Vh = layout(f)
        scale = f.scale if isinstance(f, QuantizedFactors) else None
        if direct:
            _remember(f)
    x2 = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    slot, bias = _dense_layout(slot), _dense_layout(bias)
    base = f.S if f.S.dtype is d.dtype else f.S.to(d.dtype)
    y = run(x2, U, Vh, _rows(d), base, slot, bias, scale, recompute)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], U.shape[0])


def svf_delta_linear(
    x: Tensor,
    weight: Tensor,
    fk: SVDFactors | QuantizedFactors,
    dk: Tensor,
    slot: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """y = x·Wᵀ + x·V_k·diag(d_k − σ_k)·U_kᵀ + b: k components on top of the stored weight.

    Equivalent to ``F.linear(x, weight + fk.U @ torch.diag(dk - fk.S) @ fk.V.T, bias)``. Exact for
    experts trained on k components, and the only form in which k < r components may be used:
    U_k·Σ_k·V_kᵀ alone is not W. A token with slot -1 gets the stored weight itself.

    Args:
        x: (..., n) in the dtype of ``weight``.
        weight: (m, n), the stored base weight; gets a gradient like F.linear's if it wants one.
        fk: the leading k factors, ``decompose(weight, rank=k)``.
        dk: (k,) or (slots, k), fp32.
        slot, bias, recompute: as in ``svf_linear``.

    Returns:
        y (..., m) in x's dtype. Backends with a kernel for it (triton, where no gradient is
        wanted) sum both products in one accumulator; elsewhere each is rounded to x's dtype
        before they are added.

    Cost: 2nm + 2k(n + m) FLOP a token. Errors as in ``svf_linear``.

    >>> import torch, t2kernels as t2k
    >>> w, x = torch.randn(5, 3), torch.randn(2, 3)
    >>> fk = t2k.decompose(w, rank=2)
    >>> torch.equal(t2k.svf_delta_linear(x, w, fk, fk.S), x @ w.T)
    True
    """
    _check("svf_delta_linear", x, fk, dk, slot, bias, "dk")
    if not isinstance(weight, Tensor):
        got = type(weight).__name__
        raise TypeError(f"svf_delta_linear: weight must be a torch.Tensor, got {got}.")
    m, n = fk.U.shape[0], fk.V.shape[0]
    if _shape(weight) != (m, n):
        raise ValueError(
            f"svf_delta_linear: weight must have shape (m, n) = ({m}, {n}) to match the factors, "
            f"got {_shape(weight)}."
        )
    if weight.device != x.device:
        message = f"must be on x's device {x.device}, weight is on {weight.device}."
        raise ValueError(f"svf_delta_linear: all tensors {message}")
    if weight.dtype != x.dtype and not under_autocast(x):
        raise TypeError(f"svf_delta_linear: weight must be {x.dtype} like x, got {weight.dtype}.")
    U, Vh = layout(fk)
    scale = fk.scale if isinstance(fk, QuantizedFactors) else None
    S = fk.S.to(dk.dtype)
    slot = _dense_layout(slot)
    x2 = x.reshape(-1, n)
    fused = run_delta(x2, weight, U, Vh, _rows(dk), S, slot, _dense_layout(bias), scale)
    if fused is not None:
        return fused.view(*x.shape[:-1], m)
    y = dense(x, weight, bias)
    delta = run(x2, U, Vh, _rows(dk - S), torch.zeros_like(S), slot, None, scale, recompute)
    return y + delta.view(y.shape)
