"""The delta kernel on a real GPU: k components on top of the stored weight, in one accumulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import t2kernels as t2k
from t2kernels.ops import reference
from t2kernels.ops import triton as backend
from t2kernels.testing import Inputs, assert_accurate, make_inputs, poisoned_empty

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (T, n, m, k): every tile that ships, tails on every axis, rows of no multiple of 16 bytes.
SHAPES = [
    (1, 1, 1, 1),
    (1, 1024, 2048, 256),
    (17, 200, 136, 63),
    (33, 63, 130, 17),
    (65, 320, 4096, 64),
    (2100, 264, 3000, 72),
]


def weight_of(i: Inputs, transposed: bool = False) -> Tensor:
    m, n = i.U.shape[0], i.V.shape[0]
    gen = torch.Generator().manual_seed(1)
    w = (torch.randn(m, n, generator=gen) / n**0.5).to("cuda", i.x.dtype)
    return w.t().contiguous().t() if transposed else w


def two_parts(i: Inputs, weight: Tensor) -> Tensor:
    U, V = i.U.to(i.x.dtype), i.V.to(i.x.dtype)
    rows = reference.diagonal_rows(i.d - i.base, torch.zeros_like(i.base), i.slot, i.scale)
    return F.linear(i.x, weight, i.bias) + ((i.x @ V) * rows).to(i.x.dtype) @ U.t()


def run(i: Inputs, weight: Tensor, **options: bool) -> Tensor:
    x, *rest = i.args()
    assert backend.delta_unavailable(x, weight, *rest) is None
    with poisoned_empty():
        return backend.delta(x, weight, *rest, **options)


def check(i: Inputs, weight: Tensor) -> None:
    wide = two_parts(i.double(), weight.double())
    assert_accurate(run(i, weight), wide, two_parts(i, weight))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], slots: int, dtype: torch.dtype) -> None:
    i = make_inputs(*shape, slots=slots, dtype=dtype, device="cuda")
    check(i, weight_of(i, transposed=slots == 0))


@pytest.mark.parametrize("kind", t2k.FACTOR_KINDS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_eight_bit_factors(shape: tuple[int, ...], kind: str) -> None:
    i = make_inputs(*shape, slots=3, dtype=BF16, device="cuda", factors=kind)
    check(i, weight_of(i))


@pytest.mark.parametrize("tokens", [20, 300])
def test_base_rows_and_delta_zero_are_the_stored_weight(tokens: int) -> None:
    i = make_inputs(tokens, 520, 640, 72, slots=3, dtype=BF16, device="cuda")
    weight = weight_of(i)
    nothing = run(replace(i, d=i.base, slot=None), weight)
    assert torch.equal(run(i, weight)[i.slot < 0], nothing[i.slot < 0])
    plain = F.linear(i.x, weight, i.bias)
    assert i.bias is not None
    truth = F.linear(i.x.double(), weight.double(), i.bias.double())
    assert_accurate(nothing, truth, plain)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_batch_invariance(dtype: torch.dtype) -> None:
    i = make_inputs(300, 200, 264, 72, slots=5, dtype=dtype, device="cuda")
    assert i.slot is not None
    weight = weight_of(i)
    whole = run(i, weight, batch_invariant=True)
    for first, count in ((0, 1), (299, 1), (5, 7), (64, 64), (100, 200)):
        rows = slice(first, first + count)
        part = replace(i, x=i.x[rows], slot=i.slot[rows])
        assert torch.equal(run(part, weight, batch_invariant=True), whole[rows])


def test_a_layer_in_a_graph() -> None:
    torch.manual_seed(0)
    layer = t2k.SVFLinear.from_linear(torch.nn.Linear(256, 320), rank=40).cuda().to(BF16)
    x = torch.randn(20, 256, device="cuda", dtype=BF16)
    with torch.no_grad(), t2k.backend("triton"):
        layer.z.mul_(1.5)
        assert "in one accumulator" in t2k.explain(layer, x).why
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(x.flip(0))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer(x))
