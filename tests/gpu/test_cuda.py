"""The CUDA kernels on a GPU: what tests/ops/test_cuda_emulated.py cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from t2kernels import testing
from t2kernels.ops import cuda, reference, torch_backend
from t2kernels.testing import Inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = "cuda"


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return cuda._missing


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def run(inputs: Inputs, **options: bool):
    reason = cuda.unavailable(*inputs.args())
    assert reason is None, reason
    with testing.poisoned_empty():
        return cuda.forward(*inputs.args(), **options)


def check(inputs: Inputs) -> None:
    y, h = run(inputs, save_h=True)
    truth, h_truth = reference.forward(*inputs.double().args(), save_h=True)
    testing.assert_accurate(y, truth, testing.plain_forward(inputs), "y")
    plain_h = inputs.x @ inputs.V.to(inputs.x.dtype)
    testing.assert_accurate(h, h_truth, plain_h, "h")


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """The yardstick is plain torch without TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    yield
    matmul.allow_tf32 = before


@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 8, 17, 64, 128])
def test_square(tokens: int, dtype, factors: str | None) -> None:
    check(
        testing.make_inputs(tokens, 1024, 1024, 1024, dtype=dtype, factors=factors, device=DEVICE)
    )


@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (17, 63, 17), (63, 17, 63), (200, 128, 64)], ids=str)
@pytest.mark.parametrize("slots", [0, 1, 5, 64])
def test_awkward_sizes(sizes, slots: int, dtype, factors: str | None) -> None:
    n, m, r = sizes
    check(
        testing.make_inputs(17, n, m, r, slots=slots, dtype=dtype, factors=factors, device=DEVICE)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_slots_different(dtype) -> None:
    inputs = testing.make_inputs(64, 256, 512, 256, slots=64, dtype=dtype, device=DEVICE)
    check(replace(inputs, slot=torch.arange(64, dtype=torch.int32, device=DEVICE)))


@pytest.mark.parametrize("shape", [(4096, 14336, 4096), (14336, 4096, 4096), (4096, 1024, 1024)])
@pytest.mark.parametrize("tokens", [1, 32])
def test_shapes_of_an_8b_model(shape, tokens: int) -> None:
    n, m, r = shape
    check(testing.make_inputs(tokens, n, m, r, slots=3, dtype=torch.bfloat16, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_row_alone_and_stay_from_run_to_run(dtype) -> None:
    inputs = testing.make_inputs(128, 2048, 512, 512, slots=9, dtype=dtype, device=DEVICE)
    assert inputs.slot is not None
    whole, _ = run(inputs)
    assert torch.equal(run(inputs)[0], whole)
    for count in (1, 3, 4, 7, 8, 63):
        part, _ = run(replace(inputs, x=inputs.x[:count], slot=inputs.slot[:count]))
        assert torch.equal(part, whole[:count]), count
    odd = torch.zeros(128, 2051, dtype=dtype, device=DEVICE)[:, 1:2049].copy_(inputs.x)
    assert torch.equal(run(replace(inputs, x=odd))[0], whole), "alignment"


def test_offsets_beyond_32_bits() -> None:
    """U has more than 2^31 elements, and x a row stride that passes 2^31 elements."""
    m, r, T = 2**21 + 3, 1032, 3
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    x_memory = torch.zeros(2 * (2**30 + 8) + 64, dtype=torch.bfloat16, device=DEVICE)
    x = x_memory.as_strided((T, 64), (2**30 + 8, 1)).copy_(torch.randn(T, 64, device=DEVICE))
    Vh = torch.randn(r, 64, device=DEVICE).bfloat16()
    U = torch.zeros(m, r, dtype=torch.bfloat16, device=DEVICE)
    U[-5:] = torch.randn(5, r, device=DEVICE) / 32
    assert U.numel() > 2**31 and x.stride(0) * (T - 1) > 2**31
    d = torch.rand(r, device=DEVICE)
    y, _ = run(Inputs(x, U, Vh.t(), d, d, None, None))
    tail = Inputs(x.contiguous(), U[-5:].contiguous(), Vh.t(), d, d, None, None)
    assert torch.equal(y[:, -5:], run(tail)[0])
    assert not y[:, :-5].any()


def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    inputs = testing.make_inputs(4, 512, 512, 512, slots=3, dtype=torch.bfloat16, device=DEVICE)
    expected, _ = run(inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y, _ = run(inputs)
    side.synchronize()
    assert torch.equal(y, expected)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = cuda.forward(*inputs.args())
    inputs.x.mul_(-2)
    graph.replay()
    torch.cuda.synchronize()
    again, _ = run(inputs)
    assert torch.equal(captured, again) and not torch.equal(again, expected)


def test_leaves_the_current_device_alone() -> None:
    last = torch.cuda.device_count() - 1
    inputs = testing.make_inputs(2, 64, 64, 64, device=f"cuda:{last}")
    with torch.cuda.device(0):
        y, _ = run(inputs)
        assert torch.cuda.current_device() == 0
        assert torch.empty(1, device="cuda").device.index == 0
    assert y.device.index == last


def test_a_foreign_slot_gives_nan() -> None:
    inputs = testing.make_inputs(3, 64, 64, 64, slots=2, device=DEVICE)
    slot = torch.tensor([0, 2, -1], dtype=torch.int32, device=DEVICE)
    y, _ = run(replace(inputs, slot=slot))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype, slots: int) -> None:
    inputs = testing.make_inputs(64, 200, 136, 128, slots=slots, dtype=dtype, device=DEVICE)
    g = torch.randn(64, 136, device=DEVICE).to(dtype)
    x, U, V, d, base, slot, _, scale = inputs.args()
    _, h = run(inputs, save_h=True)
    wide = inputs.double()
    truth = reference.backward(g.double(), *wide.args()[:6], scale=wide.scale)
    plain = torch_backend.backward(g, x, U, V, d, base, slot, None, scale)
    for given in (h, None):
        got = cuda.backward(g, x, U, V, d, base, slot, given, scale)
        again = cuda.backward(g, x, U, V, d, base, slot, given, scale)
        for name, a, b, t, p in zip(("dx", "dd"), got, again, truth, plain):
            assert torch.equal(a, b), f"{name}: same bits from run to run"
            testing.assert_accurate(a, t, p, name)


def test_says_why_not() -> None:
    many = testing.make_inputs(129, 64, 64, 64, device=DEVICE)
    assert "129 tokens" in str(cuda.unavailable(*many.args()))
    here = testing.make_inputs(1, 64, 64, 64)
    assert cuda.unavailable(*here.args()) == "x is on cpu"
