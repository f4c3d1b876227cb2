"""The C++ backend for the CPU: both products in one call at decode sizes, library GEMMs above.

Small T is bound by reading U and V once; ``csrc/cpu`` streams them at the memory's speed. Where the
library's GEMM is good it is the better product from a few dozen tokens on, and only the diagonal
between is ours. The point of change is measured, per dtype: see the constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantized import FACTOR_KINDS, is_eight_bit
from . import torch_backend
from .layout import FLOATS, TYPE_CODES, columns, unfit, unfit_group

try:
    from .. import _native  # type: ignore[attr-defined]

    _MISSING: str | None = None
except ImportError as error:  # a source tree without a build, or a build for another Python
    _native = None  # type: ignore[assignment]
    _MISSING = (
        f"the native module is not built ({error}); run `pip install .` or "
        "`python setup.py build_ext --inplace`"
    )

NAME = "native"

_AUTO = -1
_KINDS = tuple(FACTOR_KINDS)

# Where the library takes over is measured (benchmarks/LOG.md, "CPU kernels"; 2 cores of EPYC Zen 5,
# torch 2.13 with MKL 2024.2 and oneDNN 3.12). Tokens:
_UNLIMITED = 1 << 62
# oneDNN's bf16 GEMM reaches 750 GFLOP/s there, ours 500: at 20 tokens ours takes 0.92 to 0.94 of
# torch's time, at 32 it takes 1.00 to 1.07.
_BF16_TOKENS = 20
# The same GEMM after widening 8-bit factors to bf16 in memory; ours widens in registers, fp8 in
# fewer steps than int8: at 48 tokens ours takes 0.77 and 0.82 of the library's time with fp8 (1.07
# and 1.08 with int8), at 96 tokens 0.88 and 1.00 (2048² and 4096², one thread).
_8BIT_BF16_TOKENS = {"int8": 40, "fp8": 80}
# A library at its best (not measured here: MKL on its own make of CPU, fp16 in hardware) is left
# to do everything that the memory's speed does not decide.
_CAUTIOUS_TOKENS = 16
# Without vector instructions of ours only products that wait for memory are worth it.
_SCALAR_TOKENS = 4
# 8-bit weights of large T are widened piece by piece into one buffer of at most this many elements.
DEQUANTISE_ELEMENTS = 4 * 1024 * 1024


def _mkl_is_slow() -> bool:
    """MKL's fp32 GEMM stays at 156 of some 500 GFLOP/s on AMD; ours reaches 290 there."""
    try:
        with open("/proc/cpuinfo") as file:
            return torch.backends.mkl.is_available() and "AuthenticAMD" in file.read(4096)
    except OSError:
        return False


def _onednn_has(dtype: str) -> bool:
    """Whether torch's GEMM in a 16-bit type is oneDNN's; if not it is a loop at 55 GFLOP/s."""
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported")())
    except (AttributeError, RuntimeError):
        return True


def _decode_tokens() -> dict[tuple[torch.dtype, torch.dtype], int]:
    """Largest T for the kernel of ours, by the dtypes of x and of the factors."""
    if _MISSING is not None or _native.isa_name(_AUTO) == "scalar":
        same = dict.fromkeys(FLOATS, _SCALAR_TOKENS)
        eight_bf16 = dict.fromkeys(_KINDS, _SCALAR_TOKENS)
    else:
        wide = _native.isa_name(_AUTO) != "avx2"
        fp32 = _UNLIMITED if wide and _mkl_is_slow() else _CAUTIOUS_TOKENS
        fp16 = _CAUTIOUS_TOKENS if _onednn_has("fp16") else _UNLIMITED
        bf16, eight_bf16 = _UNLIMITED, dict.fromkeys(_KINDS, _UNLIMITED)
        if _onednn_has("bf16"):
            fast = _native.isa_name(_AUTO) == "avx512bf16"
            bf16 = _BF16_TOKENS if fast else _CAUTIOUS_TOKENS
            eight_bf16 = _8BIT_BF16_TOKENS if fast else dict.fromkeys(_KINDS, _CAUTIOUS_TOKENS)
        same = {torch.float32: fp32, torch.bfloat16: bf16, torch.float16: fp16}
    table = {(dtype, dtype): tokens for dtype, tokens in same.items()}
    for kind, dtype in FACTOR_KINDS.items():
        table[torch.float32, dtype] = same[torch.float32]
        table[torch.bfloat16, dtype] = eight_bf16[kind]
        # fp16 never goes to a library with 8-bit factors: unscaled products leave its range.
        table[torch.float16, dtype] = _UNLIMITED
    return table


DECODE_TOKENS = _decode_tokens()


def decode_tokens(x: torch.dtype, factors: torch.dtype, batch_invariant: bool) -> int:
    """The largest T that the kernel of ours takes, by dtypes; all T in batch-invariant mode."""
    return _UNLIMITED if batch_invariant else DECODE_TOKENS.get((x, factors), 0)


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
    """Why this call cannot run here, or None."""
    return _absent(x, V) or unfit(x, U, V, d, base, slot, bias, scale, kinds=_KINDS)


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
    """Why ``forward_group`` cannot run this call, or None."""
    return _absent(x, V) or unfit_group(x, Us, V, d, base, slot, biases, scale, kinds=_KINDS)


def _absent(x: Tensor, weight: Tensor) -> str | None:
    if _MISSING is not None:
        return _MISSING
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"x is on {x.device}, the native backend runs on the cpu"
    return None


def _by_library(
    tokens: int, dtype: torch.dtype, factors: torch.dtype, batch_invariant: bool
) -> bool:
    return tokens > decode_tokens(dtype, factors, batch_invariant)


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
    """y = ((x V) * d_row) Uᵀ + bias; see ``ops/reference.py`` for shapes.

    In batch-invariant mode, and up to ``DECODE_TOKENS`` tokens, the bits of a row depend on this
    row, the factors and the instruction set only.
    """
    tokens, n = x.shape
    m, r = U.shape
    if _by_library(tokens, x.dtype, U.dtype, batch_invariant):
        return _forward_library(x, U, V, d, base, slot, bias, scale, save_h)
    y = torch.empty((tokens, m), dtype=x.dtype, device="cpu")
    h = torch.empty((tokens, r), dtype=x.dtype, device="cpu") if save_h else None
    _native.svf_forward(
        x.data_ptr(),
        x.stride(0),
        U.data_ptr(),
        V.data_ptr(),
        d.data_ptr(),
        d.stride(0),
        1 if slot is None else d.shape[0],
        0 if slot is None else slot.data_ptr(),
        base.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        y.data_ptr(),
        0 if h is None else h.data_ptr(),
        tokens,
        n,
        r,
        m,
        TYPE_CODES[x.dtype],
        TYPE_CODES[U.dtype],
        torch.get_num_threads(),
        _AUTO,
    )
    return y, h


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
    """Layers that share x, in one parallel region; see ``reference.forward_group`` for shapes.

    Where the kernels are ours a member's bits are those of ``forward`` for it alone.
    """
    tokens, n = x.shape
    if _by_library(tokens, x.dtype, V.dtype, batch_invariant):
        h = _product(x, V)
        _scale_rows(h, h, d, base, slot, scale)
        return [_expand(h[:, c], U, bias) for U, bias, c in zip(Us, biases, columns(Us))]
    ys = [torch.empty((tokens, U.shape[0]), dtype=x.dtype, device="cpu") for U in Us]
    _native.svf_group(
        x.data_ptr(),
        x.stride(0),
        [U.data_ptr() for U in Us],
        V.data_ptr(),
        d.data_ptr(),
        d.stride(0),
        1 if slot is None else d.shape[0],
        0 if slot is None else slot.data_ptr(),
        base.data_ptr(),
        [0 if bias is None else bias.data_ptr() for bias in biases],
        0 if scale is None else scale.data_ptr(),
        [y.data_ptr() for y in ys],
        tokens,
        n,
        [U.shape[1] for U in Us],
        [U.shape[0] for U in Us],
        TYPE_CODES[x.dtype],
        TYPE_CODES[V.dtype],
        torch.get_num_threads(),
        _AUTO,
    )
    return ys


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
    """dx = ((g U) * d_row) Vᵀ and dd[s] = Σ scale * h[t] * (g U)[t] over the tokens of slot s."""
    if not (need_dx or need_dd):
        return None, None
    if is_eight_bit(U.dtype) and x.dtype == torch.float16:
        # Products with unscaled 8-bit factors leave fp16's range.
        return torch_backend.backward(
            g, x, U, V, d, base, slot, h, scale, need_dx=need_dx, need_dd=need_dd
        )
    gu = _product(g, U)
    if need_dd and h is None:
        h = _product(x, V)
    if need_dd and h is not None and h.shape[1] > 1 and h.stride(1) != 1:
        h = h.contiguous()
    dd = torch.empty(d.shape, dtype=torch.float32, device="cpu") if need_dd else None
    # An empty table has no address; it means "every row uses base", not "no diagonal".
    d_address = d.data_ptr() or base.data_ptr()
    _native.backward_rows(
        gu.data_ptr(),
        gu.stride(0),
        0 if h is None or not need_dd else h.data_ptr(),
        0 if h is None else h.stride(0),
        d_address if need_dx else 0,
        d.stride(0),
        1 if slot is None else d.shape[0],
        0 if slot is None else slot.data_ptr(),
        base.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if dd is None else dd.data_ptr(),
        gu.shape[0],
        gu.shape[1],
        TYPE_CODES[gu.dtype],
        torch.get_num_threads(),
        _AUTO,
    )
    return (_product(gu, V.t()) if need_dx else None), dd


def linear_unavailable(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why ``linear`` cannot run this call, or None."""
    reason = _absent(x, weight)
    if reason is not None:
        return reason
    if x.dtype != weight.dtype or x.dtype not in FLOATS:
        return f"x and weight have dtypes {x.dtype} and {weight.dtype}"
    if bias is not None and bias.dtype != x.dtype:
        return f"bias has dtype {bias.dtype}, expected {x.dtype}"
    if x.shape[1] == 0 or weight.shape[0] == 0:
        return "an empty product"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias, (T, n) x (m, n) → (T, m), with bits that depend on neither T nor other rows.

    The stored weight's counterpart of ``forward(batch_invariant=True)``. Needs what ``unavailable``
    needs: cpu, one dtype of float32, bfloat16 and float16, contiguous weight and bias.
    """
    if x.dtype != weight.dtype:
        raise TypeError(
            "native.linear: x and weight must share one dtype of float32, bfloat16 and float16, "
            f"got {x.dtype} and {weight.dtype}. Cast one of them."
        )
    reason = linear_unavailable(x, weight, bias)
    if reason is not None:
        raise RuntimeError(f"native.linear: {reason}")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            "native.linear: x must be (T, n) and weight (m, n), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}. Flatten leading dimensions first."
        )
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device="cpu")
    code = TYPE_CODES[x.dtype]
    _native.linear(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.shape[0],
        x.shape[1],
        weight.shape[0],
        code,
        code,
        torch.get_num_threads(),
        _AUTO,
    )
    return y


def isa() -> str:
    """Name of the instruction set in use: avx512bf16, avx512, avx2 or scalar."""
    if _MISSING is not None:
        raise RuntimeError(f"native.isa: {_MISSING}")
    return str(_native.isa_name(_AUTO))


def _scale_rows(
    h: Tensor, out: Tensor, d: Tensor, base: Tensor, slot: Tensor | None, scale: Tensor | None
) -> None:
    """out[t] = h[t] * d_row(t) (* scale); out may be h."""
    _native.scale_rows(
        h.data_ptr(),
        h.stride(0),
        out.data_ptr(),
        out.stride(0),
        d.data_ptr(),
        d.stride(0),
        1 if slot is None else d.shape[0],
        0 if slot is None else slot.data_ptr(),
        base.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        h.shape[0],
        h.shape[1],
        TYPE_CODES[h.dtype],
        torch.get_num_threads(),
        _AUTO,
    )


def _forward_library(
    x: Tensor,
    U: Tensor,
    V: Tensor,
    d: Tensor,
    base: Tensor,
    slot: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    save_h: bool,
) -> tuple[Tensor, Tensor | None]:
    """Two library GEMMs and one pass over h."""
    h = _product(x, V)
    hd = torch.empty_like(h) if save_h else h
    _scale_rows(h, hd, d, base, slot, scale)
    return _expand(hd, U, bias), h if save_h else None


def _expand(hd: Tensor, U: Tensor, bias: Tensor | None) -> Tensor:
    y = _product(hd, U.t())
    if bias is not None:
        y += bias
    return y


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (T, k) times b (k, q) by the library; 8-bit b is widened in pieces of bounded size."""
    if not is_eight_bit(b.dtype):
        return torch.mm(a, b)
    # The pieces are rows of the stored matrix, be it b itself or its transpose.
    by_columns = b.t().is_contiguous()
    stored = b.t() if by_columns else b
    rows, cols = stored.shape
    step = max(1, min(rows, DEQUANTISE_ELEMENTS // cols))
    buffer = torch.empty((step, cols), dtype=a.dtype, device="cpu")
    out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device="cpu")
    total = (
        None
        if by_columns
        else torch.zeros((a.shape[0], b.shape[1]), dtype=torch.float32, device="cpu")
    )
    for begin in range(0, rows, step):
        piece = buffer[: min(step, rows - begin)]
        end = begin + piece.shape[0]
        _native.dequantise(
            stored.data_ptr() + begin * cols,
            TYPE_CODES[b.dtype],
            0,
            0,
            piece.data_ptr(),
            piece.shape[0],
            cols,
            TYPE_CODES[a.dtype],
            torch.get_num_threads(),
            _AUTO,
        )
        if total is None:
            out[:, begin:end] = torch.mm(a, piece.t())
        else:
            # Partial sums over k are kept in fp32; one piece (the usual case) is rounded only once.
            part = torch.mm(a[:, begin:end], piece)
            if step >= rows:
                return part
            total += part
    return out if total is None else total.to(a.dtype)
