"""Merging on a GPU: the library's 16-bit product, memory, and captured graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import t2kernels as t2k
from t2kernels.nn import merging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def made(m: int, n: int, dtype: torch.dtype, kind: str | None = None, **options: bool):
    """A layer with random orthonormal factors, and its weight made of them."""
    torch.manual_seed(0)
    r = min(m, n)
    U = torch.linalg.qr(torch.randn(m, r, device="cuda")).Q
    Vh = torch.linalg.qr(torch.randn(n, r, device="cuda")).Q.t().contiguous()
    S = torch.rand(r, device="cuda").sort(descending=True).values
    f = t2k.SVDFactors(U.to(dtype).contiguous(), S, Vh.to(dtype).t())
    weight = ((U * S) @ Vh).to(dtype)
    return t2k.SVFLinear(weight, None, f if kind is None else t2k.quantize(f, kind), **options)


def truth_of(layer: t2k.SVFLinear, d: torch.Tensor) -> torch.Tensor:
    f = layer.factors
    if isinstance(f, t2k.QuantizedFactors):
        f = t2k.dequantize(f, torch.float64)
    U, S, V = (t.double() for t in f)
    if layer.weight is None:
        return (U * d.double()) @ V.t()
    return layer.weight.detach().double() + (U * (d.double() - S)) @ V.t()


@pytest.mark.parametrize("z", [1.001, 1.1, 0.45, 3.0, 0.02, -1.0])
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("keep_weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_and_the_base_back(dtype, keep_weight, kind, z) -> None:
    for m, n in ((1024, 4096), (1000, 333), (4099, 257)):
        layer = made(m, n, dtype, kind, keep_weight=keep_weight)
        base = None if layer.weight is None else layer.weight.clone()
        address = None if layer.weight is None else layer.weight.data_ptr()
        d = layer.factors.S * (z + 0.01 * torch.rand(layer.rank, device="cuda"))
        truth = truth_of(layer, d)
        layer.merge_diagonal(d * 2)
        layer.merge_diagonal(d)
        error = (layer.weight.double() - truth).norm()
        assert error <= 2 * (truth.to(dtype).double() - truth).norm()
        layer.unmerge()
        if base is None:
            assert layer.weight is None
        else:
            assert torch.equal(layer.weight, base)
            assert layer.weight.data_ptr() == address


@pytest.mark.parametrize("keep", ["device", "host"])
def test_memory_of_a_switch(keep: str) -> None:
    layer = made(8192, 2048, torch.bfloat16)
    S = layer.factors.S
    base = layer.weight.clone()
    merging.merge([layer], [S * 1.1], keep)
    assert layer._base_copy.is_pinned() == (keep == "host")
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    merging.merge([layer], [S * 1.2], keep)
    # V·diag(d − σ) is 8 MiB; numbers of r entries beside it.
    assert torch.cuda.max_memory_allocated() - held <= (9 << 20)
    layer.unmerge()
    assert torch.equal(layer.weight, base)


def test_a_captured_graph_sees_what_is_merged() -> None:
    model = nn.Sequential(nn.Linear(512, 512, device="cuda", dtype=torch.bfloat16))
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    bank.add("a", t2k.Expert({"0": torch.full((512,), 1.7)}))
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        graph.replay()
        base = y.clone()
        bank.merge("a")
        graph.replay()
        assert torch.equal(y, model(x))
        assert not torch.equal(y, base)
        bank.unmerge()
        graph.replay()
        assert torch.equal(y, base)
