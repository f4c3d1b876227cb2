"""The Triton kernels on a real GPU; the interpreter's tests are in ``tests/ops``.

The truth is the reference in fp64 on the same GPU; see ``t2kernels/testing.py`` for the rule of
acceptance.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from t2kernels import testing
from t2kernels.ops import reference
from t2kernels.ops import triton as backend
from t2kernels.quantized import FACTOR_KINDS
from t2kernels.testing import Inputs, assert_accurate, make_inputs, poisoned_empty

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (T, n, m, r): every tile that ships (T 1, 17, 33, 65; large: T 2100), tails on every axis, rows
# whose length is no multiple of 16 bytes, degenerate sizes.
SHAPES = [
    (1, 1, 1, 1),
    (1, 1024, 2048, 1024),
    (17, 200, 136, 120),
    (33, 63, 130, 61),
    (65, 320, 4096, 320),
    (300, 17, 63, 17),
    (2100, 264, 3000, 2056),
]
gib = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 30e9,
    reason="needs 30 GB of GPU memory",
)


def inputs(*shape: int, **options) -> Inputs:  # type: ignore[no-untyped-def]
    return make_inputs(*shape, device="cuda", **options)


def random_gradient(i: Inputs) -> Tensor:
    gen = torch.Generator(device="cuda").manual_seed(1)
    shape = (i.x.shape[0], i.U.shape[0])
    return torch.randn(shape, generator=gen, device="cuda", dtype=FP32).to(i.x.dtype)


def check_forward(i: Inputs) -> None:
    with poisoned_empty():
        y, h = backend.forward(*i.args(), save_h=True)
    truth, h_truth = reference.forward(*i.double().args(), save_h=True)
    assert y.dtype == i.x.dtype and h is not None and h_truth is not None
    assert_accurate(y, truth, testing.plain_forward(i), "y")
    assert_accurate(h, h_truth, i.x @ i.V.to(i.x.dtype), "h")


def check_backward(i: Inputs, *, saved: bool) -> None:
    g, (x, U, V, d, base, slot, _, scale) = random_gradient(i), i.args()
    h = backend.forward(*i.args(), save_h=True)[1] if saved else None
    with poisoned_empty():
        dx, dd = backend.backward(g, x, U, V, d, base, slot, h, scale)
    j = i.double()
    args = (j.x, j.U, j.V, j.d, j.base, j.slot)
    dx_truth, dd_truth = reference.backward(g.double(), *args, None, j.scale)
    gu, h_plain = g @ U.to(g.dtype), x @ V.to(x.dtype)
    dx_plain = (gu * reference.diagonal_rows(d, base, slot, scale)).to(x.dtype) @ V.t().to(x.dtype)
    product = (h_plain * gu).float() * (1 if scale is None else scale)
    if slot is None:
        dd_plain = product.sum(0)
    else:
        member = slot.unsqueeze(0) == torch.arange(len(d), device="cuda").unsqueeze(1)
        dd_plain = (member.double() @ product.double()).float()
    assert dx is not None and dd is not None and dx_truth is not None and dd_truth is not None
    assert_accurate(dx, dx_truth, dx_plain, "dx")
    error = testing.relative_error(dd, dd_truth)
    allowed = 2 * testing.relative_error(dd_plain, dd_truth) + testing.error_floor(x.dtype)
    assert error <= allowed, f"dd: {error:.3e} > {allowed:.3e}"


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], slots: int, dtype: torch.dtype) -> None:
    i = inputs(*shape, slots=slots, dtype=dtype)
    assert backend.unavailable(*i.args()) is None
    check_forward(i)
    check_backward(i, saved=shape[0] % 2 == 1)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_eight_bit_factors(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    i = inputs(*shape, slots=3, dtype=dtype, factors=kind)
    check_forward(i)
    check_backward(i, saved=False)


@pytest.mark.parametrize("tokens", [64, 200, 4096])
def test_64_slots(tokens: int) -> None:
    i = inputs(tokens, 512, 640, 512, slots=64, dtype=BF16)
    check_forward(i)
    check_backward(i, saved=True)


@pytest.mark.parametrize("tokens", [1000, 8192])
def test_ragged_slots(tokens: int) -> None:
    """Requests one after another, as in a batch of prompts: runs of one slot, and their ends."""
    i = inputs(tokens, 1024, 1536, 1024, slots=64, dtype=BF16)
    gen = torch.Generator().manual_seed(0)
    ends = torch.rand(63, generator=gen).mul(tokens).int().sort().values
    slot = torch.searchsorted(ends, torch.arange(tokens, dtype=torch.int32), right=True) - 1
    i = replace(i, slot=slot.int().cuda())
    check_forward(i)
    check_backward(i, saved=True)


def test_every_slot_minus_one_is_base() -> None:
    i = inputs(70, 128, 96, 96, slots=2, dtype=BF16)
    i = replace(i, slot=torch.full_like(i.slot, -1))
    one = backend.forward(i.x, i.U, i.V, i.base, i.base, None, i.bias, None)[0]
    assert torch.equal(backend.forward(*i.args())[0], one)


def test_strided_x_and_arena_rows() -> None:
    i = inputs(70, 136, 96, 88, slots=3, dtype=BF16)
    wide = torch.full((70, 200), torch.nan, device="cuda", dtype=BF16)
    arena = torch.full((3, 120), torch.nan, device="cuda")
    wide[:, 8:144], arena[:, 9:97] = i.x, i.d
    check_forward(replace(i, x=wide[:, 8:144], d=arena[:, 9:97]))


def test_no_tokens() -> None:
    i = inputs(0, 5, 6, 4, slots=2, dtype=BF16)
    assert backend.forward(*i.args())[0].shape == (0, 6)
    dx, dd = backend.backward(random_gradient(i), *i.args()[:6])
    assert dx is not None and dx.shape == (0, 5) and dd is not None and not dd.any()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("factors", [None, *FACTOR_KINDS])
def test_batch_invariance(dtype: torch.dtype, factors: str | None) -> None:
    """A row's bits: alone, at another place, among 1, 7, 64 or 300 rows of other requests."""
    i = inputs(300, 200, 264, 136, slots=5, dtype=dtype, factors=factors)
    assert i.slot is not None
    whole, _ = backend.forward(*i.args(), batch_invariant=True)
    for first, count in ((0, 1), (13, 1), (299, 1), (5, 7), (64, 64), (100, 200)):
        rows = slice(first, first + count)
        part = replace(i, x=i.x[rows], slot=i.slot[rows])
        y, _ = backend.forward(*part.args(), batch_invariant=True)
        assert torch.equal(y, whole[rows]), f"rows {first} to {first + count}"
    order = torch.randperm(300, device="cuda")
    shuffled = replace(i, x=i.x[order], slot=i.slot[order])
    assert torch.equal(backend.forward(*shuffled.args(), batch_invariant=True)[0], whole[order])


@pytest.mark.parametrize("slots", [0, 7])
def test_same_bits_every_time(slots: int) -> None:
    i = inputs(2100, 520, 1000, 520, slots=slots, dtype=BF16)
    g = random_gradient(i)
    results = []
    for _ in range(3):
        y, h = backend.forward(*i.args(), save_h=True)
        results.append((y, *backend.backward(g, *i.args()[:6], h)))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again))


def test_a_bad_row_stays_alone() -> None:
    i = inputs(70, 128, 96, 96, slots=3, dtype=BF16)
    good, _ = backend.forward(*i.args())
    x = i.x.clone()
    x[7] = torch.nan
    bad, _ = backend.forward(*replace(i, x=x).args())
    rows = torch.arange(70, device="cuda") != 7
    assert torch.equal(bad[rows], good[rows]) and bad[7].isnan().all()


@gib
def test_inputs_beyond_32_bits() -> None:
    i = inputs(3, 64, 64, 64, slots=3, dtype=BF16)
    x = torch.empty(2**31 + 64, dtype=BF16, device="cuda").as_strided((3, 64), (2**30, 1))
    d = torch.empty(2**31 + 64, dtype=FP32, device="cuda").as_strided((3, 64), (2**30, 1))
    x.copy_(i.x), d.copy_(i.d)
    y, _ = backend.forward(*replace(i, x=x, d=d).args())
    assert torch.equal(y, backend.forward(*i.args())[0])


@gib
def test_outputs_beyond_32_bits() -> None:
    tokens, out = 140_000, 16_384  # 2.3e9 elements
    i = inputs(tokens, 64, out, 64, dtype=BF16)
    y, _ = backend.forward(*i.args())
    last = replace(i, x=i.x[-5:])
    truth, _ = reference.forward(*last.double().args())
    assert_accurate(y[-5:], truth, testing.plain_forward(last), "y")
    dx, _ = backend.backward(y, *i.args()[:6], need_dd=False)
    j = last.double()
    truth, _ = reference.backward(
        y[-5:].double(), j.x, j.U, j.V, j.d, j.base, need_dd=False
    )  # fmt: skip
    assert dx is not None and truth is not None
    assert testing.relative_error(dx[-5:], truth) < 2e-2


@pytest.mark.parametrize("tokens", [20, 8192])  # the second by tensor descriptors on sm_90
def test_graph_capture(tokens: int) -> None:
    """New routing and new diagonals through the same tensors, without a new capture."""
    i = inputs(tokens, 256, 320, 256, slots=4, dtype=BF16)
    assert i.slot is not None
    backend.forward(*i.args())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = backend.forward(*i.args())
    i.slot.copy_(i.slot.flip(0))
    i.d.mul_(0.5)
    i.x.copy_(i.x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, backend.forward(*i.args())[0])


def test_fp64_is_refused() -> None:
    reason = backend.unavailable(*inputs(3, 4, 5, 4, dtype=torch.float64).args())
    assert reason is not None and "float64" in reason
