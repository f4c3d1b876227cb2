"""The C++ kernels: every instruction set of this machine against the fp64 truth, and their bits."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from t2kernels.ops import native, reference
from t2kernels.ops.layout import TYPE_CODES
from t2kernels.quantized import FACTOR_KINDS
from t2kernels.testing import (
    Inputs,
    assert_accurate,
    make_inputs,
    plain_forward,
    poisoned_empty,
    relative_error,
)

if native._MISSING is not None:
    pytest.skip(native._MISSING, allow_module_level=True)
from t2kernels import _native

ISAS = _native.isa_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FACTORS = [None, *FACTOR_KINDS]
# (T, n, m, r): degenerate; one past or short of a step, a line, a tile; whole tiles; many tokens.
SHAPES = [
    (1, 1, 1, 1),
    (1, 17, 63, 9),
    (2, 64, 128, 32),
    (3, 33, 31, 65),
    (4, 200, 63, 17),
    (5, 63, 200, 64),
    (7, 128, 1, 5),
    (13, 1, 17, 63),
    (40, 97, 66, 48),
    (130, 70, 90, 61),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, through the argument that T2_CPU_ISA sets by default."""
    monkeypatch.setattr(native, "_AUTO", _native.isa_code(request.param))
    yield request.param


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode kernel at every T, not the library."""
    for dtypes in list(native.DECODE_TOKENS):
        monkeypatch.setitem(native.DECODE_TOKENS, dtypes, 1 << 30)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library path at every T."""
    for dtypes in list(native.DECODE_TOKENS):
        monkeypatch.setitem(native.DECODE_TOKENS, dtypes, -1)


def check_forward(i: Inputs, **options: bool) -> Tensor:
    """Runs forward with poisoned outputs and compares y and h with the truth."""
    assert native.unavailable(*i.args()) is None
    truth, h_truth = reference.forward(*i.double().args(), save_h=True)
    with poisoned_empty():
        y, h = native.forward(*i.args(), save_h=True, **options)
        again, no_h = native.forward(*i.args(), **options)
    assert no_h is None and h is not None and h_truth is not None
    assert y.dtype == h.dtype == i.x.dtype
    assert torch.equal(y, again), "two runs differ"
    assert_accurate(y, truth, plain_forward(i), "y")
    weights = i.V.to(i.x.dtype)
    assert_accurate(h, h_truth, i.x @ weights, "h")
    return y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("factors", FACTORS)
def test_forward_decode(isa, decode, shape, dtype, slots, factors) -> None:
    T, n, m, r = shape
    check_forward(
        make_inputs(T, n, m, r, slots=slots, bias=slots == 0, dtype=dtype, factors=factors)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("factors", FACTORS)
def test_forward_library(isa, library, shape, dtype, slots, factors, monkeypatch) -> None:
    monkeypatch.setattr(native, "DEQUANTISE_ELEMENTS", 1000)
    T, n, m, r = shape
    check_forward(
        make_inputs(T, n, m, r, slots=slots, bias=slots == 0, dtype=dtype, factors=factors)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("path", ["decode", "library"])
def test_strided_inputs(isa, path, dtype, factors, request) -> None:
    request.getfixturevalue(path)
    i = make_inputs(6, 50, 41, 37, slots=3, dtype=dtype, factors=factors)
    wide = torch.full((6, 61), float("nan"), dtype=dtype)
    wide[:, 3:53] = i.x
    arena = torch.full((3, 91), float("nan"))
    arena[:, 11:48] = i.d
    strided = replace(i, x=wide[:, 3:53], d=arena[:, 11:48])
    y = check_forward(strided)
    if path == "decode":  # the library may choose another kernel for other strides
        assert torch.equal(y, native.forward(*i.args())[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens(isa, dtype) -> None:
    for slots in (None, 0, 2):
        i = make_inputs(0, 20, 30, 10, slots=slots or 0, dtype=dtype)
        if slots == 0:
            i = replace(i, d=i.d[None, :][:0], slot=torch.empty(0, dtype=torch.int32))
        y, h = native.forward(*i.args(), save_h=True, batch_invariant=True)
        assert y.shape == (0, 30) and h is not None and h.shape == (0, 10)
        g = torch.empty(0, 30, dtype=dtype)
        with poisoned_empty():
            dx, dd = native.backward(g, i.x, i.U, i.V, i.d, i.base, i.slot)
        assert dx is not None and dx.shape == (0, 20)
        assert dd is not None and torch.equal(dd, torch.zeros_like(i.d))


def test_empty_table_means_base(isa) -> None:
    i = make_inputs(3, 20, 30, 10)
    none = replace(i, d=torch.empty(0, 10), slot=torch.full((3,), -1, dtype=torch.int32))
    plain = replace(i, d=i.base)
    assert torch.equal(native.forward(*none.args())[0], native.forward(*plain.args())[0])
    g = torch.randn(3, 30)
    dx, dd = native.backward(g, i.x, i.U, i.V, none.d, i.base, none.slot)
    want, _ = native.backward(g, i.x, i.U, i.V, i.base, i.base)
    assert dx is not None and want is not None and torch.equal(dx, want)
    assert dd is not None and dd.shape == (0, 10)


def every_value(kind: str) -> Tensor:
    """All 8-bit patterns but NaN: -128 of int8, zeros and subnormals of fp8 among them."""
    values = torch.arange(-128, 128, dtype=torch.int8).view(FACTOR_KINDS[kind])
    return values[~values.float().isnan()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_every_value_is_exact(isa, dtype, kind) -> None:
    """x picks one entry at a time, so y must be that entry, in whole steps and in the tail."""
    values = every_value(kind)
    count, one = len(values), torch.ones(1)
    assert count == (256 if kind == "int8" else 254)
    for size in (count, 1, 7, 33):
        V = values[-size:].view(1, size).t()  # n = size, r = 1
        y, _ = native.forward(
            torch.eye(size, dtype=dtype), one.to(V.dtype)[None], V, one, one, scale=one,
            batch_invariant=True,
        )  # fmt: skip
        assert y.float().flatten().tolist() == values[-size:].float().tolist()


@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_values_do_not_depend_on_flushing(isa, kind) -> None:
    """Small fp8 values are no small numbers of fp32: a processor that flushes those keeps them."""
    values, one = every_value(kind), torch.ones(1)
    V, eye = values[None].t(), torch.eye(len(values))
    torch.set_flush_denormal(True)
    try:
        y, _ = native.forward(eye, one.to(V.dtype)[None], V, one, one, scale=one)
        wide = native._product(eye, V)
    finally:
        torch.set_flush_denormal(False)
    assert y.flatten().tolist() == wide.flatten().tolist() == values.float().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("shape", [(203, 139, 101), (2600, 31, 19)], ids=str)  # one chunk, more
def test_batch_invariant_bits(isa, dtype, factors, shape) -> None:
    """A row alone, in batches of 1 to 40, at any place, on one thread or two: the same bits."""
    i = make_inputs(40, *shape, slots=5, dtype=dtype, factors=factors)
    assert i.slot is not None

    def rows(begin: int, end: int) -> Tensor:
        assert i.slot is not None
        part = replace(i, x=i.x[begin:end], slot=i.slot[begin:end])
        return native.forward(*part.args(), batch_invariant=True)[0]

    whole = rows(0, 40)
    for t in range(40):
        assert torch.equal(rows(t, t + 1)[0], whole[t])
    for size in range(2, 40):
        assert torch.equal(rows(40 - size, 40), whole[40 - size :])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            # Also more tokens than one pass over the weights takes.
            many = replace(i, x=i.x.repeat(30, 1), slot=i.slot.repeat(30))
            y = native.forward(*many.args(), batch_invariant=True)[0]
            assert torch.equal(y, whole.repeat(30, 1))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 17, 64, 200])
def test_linear(isa, dtype, n) -> None:
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(23, n, generator=gen).to(dtype)
    w = torch.randn(61, n, generator=gen).to(dtype)
    bias = torch.randn(61, generator=gen).to(dtype)
    truth = x.double() @ w.double().t()
    with poisoned_empty():
        y = native.linear(x, w)
    assert_accurate(y, truth, x @ w.t())
    assert_accurate(native.linear(x, w, bias), truth + bias.double(), x @ w.t() + bias)
    for t in range(23):
        assert torch.equal(native.linear(x[t : t + 1], w)[0], y[t])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("factors", FACTORS)
def test_backward(isa, shape, dtype, slots, factors) -> None:
    T, n, m, r = shape
    i = make_inputs(T, n, m, r, slots=slots, dtype=dtype, factors=factors)
    g = make_inputs(T, m, 1, 1, dtype=dtype, seed=7).x
    j = i.double()
    head = (i.x, i.U, i.V, i.d, i.base, i.slot)
    truth = reference.backward(g.double(), j.x, j.U, j.V, j.d, j.base, j.slot, None, j.scale)
    plain = reference.backward(g, *head, None, i.scale)
    with poisoned_empty():
        dx, dd = native.backward(g, *head, None, i.scale)
        _, h = native.forward(*i.args(), save_h=True)
        saved = native.backward(g, *head, h, i.scale)
        dx_only, no_dd = native.backward(g, *head, h, i.scale, need_dd=False)
        no_dx, dd_only = native.backward(g, *head, h, i.scale, need_dx=False)
    assert dx is not None and dd is not None and no_dd is None and no_dx is None
    # The reference keeps everything in fp32; a 16-bit kernel rounds g U once.
    floor = 8 * torch.finfo(dtype).eps
    for got in ((dx, dd), saved, (dx_only, dd_only)):
        for name, value, want, rounded in zip(("dx", "dd"), got, truth, plain, strict=True):
            assert value is not None and want is not None and rounded is not None
            error = relative_error(value, want)
            assert error <= 2 * relative_error(rounded, want) + floor, (name, error)
    assert dd.dtype == torch.float32 and dd.shape == i.d.shape


def test_backward_bits_do_not_depend_on_threads(isa) -> None:
    i = make_inputs(300, 64, 64, 700, slots=3, dtype=torch.float32)
    gu, h = torch.randn(300, 700), torch.randn(300, 700)
    assert i.slot is not None

    def run(count: int) -> tuple[Tensor, Tensor]:
        out, dd = gu.clone(), torch.full_like(i.d, float("nan"))
        assert i.slot is not None
        _native.backward_rows(
            out.data_ptr(), 700, h.data_ptr(), 700, i.d.data_ptr(), 700, 3, i.slot.data_ptr(),
            i.base.data_ptr(), 0, dd.data_ptr(), 300, 700, 0, count, native._AUTO,
        )  # fmt: skip
        return out, dd

    first = run(1)
    for count in (1, 2, 3, 5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(count), strict=True))
    rows = reference.diagonal_rows(i.d, i.base, i.slot, None)
    assert torch.equal(first[0], gu * rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_dequantise(isa, dtype, axis, kind) -> None:
    values = every_value(kind)
    q = values[torch.randint(0, len(values), (37, 83))]
    scale = torch.rand(37 if axis == 0 else 83)
    out = torch.full((37, 83), float("nan"), dtype=dtype)
    _native.dequantise(
        q.data_ptr(), TYPE_CODES[q.dtype], scale.data_ptr(), axis, out.data_ptr(), 37, 83,
        TYPE_CODES[dtype], 2, native._AUTO,
    )  # fmt: skip
    want = (q.float() * (scale[:, None] if axis == 0 else scale)).to(dtype)
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_like_torch(isa, dtype) -> None:
    """All 16-bit values, halves between neighbours, overflow, subnormals, NaN: as torch rounds."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    values = torch.cat([values, values * (1 + 2.0**-9), values * (1 + 2.0**-12), values * 1.5])
    h = values.to(dtype).reshape(1, -1)
    r = h.shape[1]
    d = torch.randn(r, generator=torch.Generator().manual_seed(0))
    d[: r // 2] = 1
    out = torch.empty_like(h)
    _native.scale_rows(
        h.data_ptr(), r, out.data_ptr(), r, d.data_ptr(), r, 1, 0, 0, 0, 1, r,
        TYPE_CODES[dtype], 1, native._AUTO,
    )  # fmt: skip
    want = (h.float() * d).to(dtype)
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out.nan_to_num(0, 7, -7), want.nan_to_num(0, 7, -7))


class PageEnd:
    """Memory whose last byte is the last of its page; the next page must not be touched."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (
            [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        )
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.libc = libc
        self.maps: list[tuple[int, int]] = []

    def place(self, t: Tensor) -> Tensor:
        """A copy of ``t`` that ends where a forbidden page begins, and starts after another one."""
        page, size = mmap.PAGESIZE, t.numel() * t.element_size()
        body = -(-size // page) * page
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = self.libc.mmap(
            None, body + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0
        )
        assert start not in (None, ctypes.c_void_p(-1).value)
        assert self.libc.mprotect(start, page, 0) == 0
        assert self.libc.mprotect(start + page + body, page, 0) == 0
        self.maps.append((start, body + 2 * page))
        raw = (ctypes.c_char * size).from_address(start + page + body - size)
        out = torch.frombuffer(raw, dtype=t.dtype).reshape(t.shape)
        out.copy_(t)
        return out

    def close(self) -> None:
        for start, size in self.maps:
            self.libc.munmap(start, size)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs POSIX mmap")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", FACTORS)
def test_nothing_outside_is_touched(isa, decode, dtype, factors) -> None:
    """Every operand ends at a page that faults: one byte read or written past it kills the run."""
    for T, n, m, r in [(1, 1, 1, 1), (3, 33, 13, 31), (6, 200, 63, 47), (17, 65, 130, 9)]:
        i = make_inputs(T, n, m, r, slots=2, dtype=dtype, factors=factors)
        end = PageEnd()
        try:
            put = end.place
            Vh = put(i.V.t().contiguous())
            h, y = put(torch.zeros(T, r, dtype=dtype)), put(torch.zeros(T, m, dtype=dtype))
            assert i.slot is not None and i.bias is not None
            x, U, d, base, slot, bias = map(put, (i.x, i.U, i.d, i.base, i.slot, i.bias))
            scale = None if i.scale is None else put(i.scale)
            address = 0 if scale is None else scale.data_ptr()
            codes = TYPE_CODES[dtype], TYPE_CODES[U.dtype]
            _native.svf_forward(
                x.data_ptr(), n, U.data_ptr(), Vh.data_ptr(), d.data_ptr(), r, 2, slot.data_ptr(),
                base.data_ptr(), bias.data_ptr(), address, y.data_ptr(), h.data_ptr(),
                T, n, r, m, *codes, 2, native._AUTO,
            )  # fmt: skip
            assert torch.equal(y, native.forward(*i.args())[0])
            dd = put(torch.zeros(2, r))
            _native.scale_rows(
                h.data_ptr(), r, h.data_ptr(), r, d.data_ptr(), r, 2, slot.data_ptr(),
                base.data_ptr(), address, T, r, codes[0], 2, native._AUTO,
            )  # fmt: skip
            _native.backward_rows(
                h.data_ptr(), r, h.data_ptr(), r, d.data_ptr(), r, 2, slot.data_ptr(),
                base.data_ptr(), address, dd.data_ptr(), T, r, codes[0], 2, native._AUTO,
            )  # fmt: skip
        finally:
            end.close()


def test_one_thread_runtime() -> None:
    """Our threads are those of the OpenMP runtime that torch brought; there is no second one."""
    i = make_inputs(4, 512, 512, 512)
    native.forward(*i.args())
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    if not loaded:
        pytest.skip("torch brings no OpenMP runtime here")
    assert len(loaded) == 1
    assert _native.thread_runtime() in loaded


def test_bad_arguments_are_named() -> None:
    i = make_inputs(4, 16, 16, 8, slots=2)
    bad = replace(i, slot=torch.tensor([0, 1, 2, -1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"slot must lie in \[-1, 2\) .* got 2 for token 2"):
        native.forward(*bad.args())
    with pytest.raises(ValueError, match="isa"):
        _native.isa_code("sse9")
    with pytest.raises(TypeError, match="share one dtype"):
        native.linear(i.x, i.x.half())
    with pytest.raises(ValueError, match="Flatten"):
        native.linear(i.x, i.x[:, :3])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda i: {"V": i.V.contiguous()}, "contiguous \\(r, n\\)"),
        (lambda i: {"U": i.U.t().contiguous().t()}, "U must be"),
        (lambda i: {"x": i.x.double()}, "float64"),
        (lambda i: {"U": i.U.half()}, "like x"),
        (lambda i: {"d": i.d.double()}, "expected torch.float32"),
        (lambda i: {"slot": i.slot.long()}, "int32"),
        (lambda i: {"x": i.x.t().contiguous().t()}, "last dimension of x"),
        (lambda i: {"bias": i.bias.half()}, "bias"),
    ],
)
def test_unavailable(change, reason) -> None:
    i = make_inputs(4, 16, 24, 8, slots=2)
    assert native.unavailable(*i.args()) is None
    why = native.unavailable(*replace(i, **change(i)).args())
    assert why is not None
    assert re.search(reason, why)


def test_bandwidth_probe_measures_something() -> None:
    memory = torch.ones(2 << 20)
    assert _native.read_bandwidth(memory.data_ptr(), memory.nbytes, 2) > 0.1
    assert native.isa() in ISAS
