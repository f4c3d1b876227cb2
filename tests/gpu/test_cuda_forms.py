"""The tensor-core kernel on a GPU, in its three launch forms: what the emulation cannot show.

First what any kernel must do, then what only these forms can do wrong: overlap of the two launches
(mma-pdl), the grid barrier (mma-coop), graphs and streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from t2kernels import testing
from t2kernels.ops import cuda, cuda_forms, reference
from t2kernels.testing import Inputs

DEVICE = "cuda"
BF16, FP16 = torch.bfloat16, torch.float16
FORMS = ["mma", "mma-pdl", "mma-coop"]
# A number of tokens for every tile, full and not, and one past it.
BUCKETS = [1, 2, 8, 9, 16, 32, 33, 64, 65, 100, 128]

forms = pytest.mark.parametrize("form", FORMS)
kinds = pytest.mark.parametrize(
    ("dtype", "factors"),
    [(BF16, None), (FP16, None), (BF16, "int8"), (BF16, "fp8")],
    ids=["bf16", "fp16", "int8", "fp8"],
)


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return cuda._missing


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """The yardstick is plain torch without reduced-precision sums."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before):
        setattr(matmul, name, value)


def make(T: int, n: int, m: int, r: int, *, int8: bool = False, **more) -> Inputs:
    more = {"dtype": BF16, "slots": 3, "factors": "int8" if int8 else None, **more}
    return testing.make_inputs(T, n, m, r, device=DEVICE, **more)


def run(
    inputs: Inputs, form: str, tile: str = "auto", *, save_h: bool = False
) -> tuple[Tensor, Tensor | None]:
    assert cuda.unavailable(*inputs.args()) is None
    with testing.poisoned_empty(), cuda_forms.form(form, tile):
        return cuda.forward(*inputs.args(), save_h=save_h)


def check(inputs: Inputs, form: str) -> None:
    y, h = run(inputs, form, save_h=True)
    truth, h_truth = reference.forward(*inputs.double().args(), save_h=True)
    testing.assert_accurate(y, truth, testing.plain_forward(inputs), "y")
    plain_h = inputs.x @ inputs.V.to(inputs.x.dtype)
    testing.assert_accurate(h, h_truth, plain_h, "h")


@forms
@kinds
@pytest.mark.parametrize("tokens", BUCKETS)
def test_square(tokens: int, dtype, factors: str | None, form: str) -> None:
    check(make(tokens, 1024, 1024, 1024, dtype=dtype, factors=factors), form)


@forms
@kinds
@pytest.mark.parametrize("sizes", [(16, 1, 16), (48, 63, 144), (1040, 33, 16), (32, 5000, 80)])
@pytest.mark.parametrize("slots", [0, 1, 17])
def test_awkward_sizes(sizes, slots: int, dtype, factors: str | None, form: str) -> None:
    n, m, r = sizes
    check(make(17, n, m, r, slots=slots, dtype=dtype, factors=factors, bias=slots != 1), form)


@forms
@pytest.mark.parametrize("shape", [(4096, 14336, 4096), (14336, 4096, 4096), (4096, 1024, 1024)])
@pytest.mark.parametrize("tokens", [1, 32, 128])
@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
def test_shapes_of_an_8b_model(shape, tokens: int, factors: str | None, form: str) -> None:
    n, m, r = shape
    check(make(tokens, n, m, r, factors=factors), form)


@forms
def test_all_slots_different(form: str) -> None:
    inputs = make(128, 256, 512, 256, slots=128)
    check(replace(inputs, slot=torch.randperm(128, device=DEVICE).to(torch.int32)), form)


@kinds
def test_no_form_or_tile_changes_a_bit(dtype, factors: str | None) -> None:
    inputs = make(128, 2048, 600, 512, slots=9, dtype=dtype, factors=factors)
    assert inputs.slot is not None
    whole, _ = run(inputs, "mma")
    for form in FORMS:
        for tokens in BUCKETS:
            part = replace(inputs, x=inputs.x[:tokens], slot=inputs.slot[:tokens])
            assert torch.equal(run(part, form)[0], whole[:tokens]), (form, tokens)
        for tile in cuda_forms.TILE_CODES:
            assert torch.equal(run(inputs, form, tile)[0], whole), (form, tile)
    order = torch.randperm(128, device=DEVICE)
    mixed = replace(inputs, x=inputs.x[order], slot=inputs.slot[order])
    assert torch.equal(run(mixed, "mma")[0], whole[order]), "neighbours"
    odd = torch.zeros(128, 2051, dtype=dtype, device=DEVICE)[:, 1:2049].copy_(inputs.x)
    assert torch.equal(run(replace(inputs, x=odd), "mma")[0], whole), "alignment"


@forms
def test_same_bits_a_thousand_times(form: str) -> None:
    """Calls follow each other without a pause and reuse each other's memory: a race would show."""
    inputs = make(16, 4096, 1024, 1024)
    expected, _ = run(inputs, form)
    with cuda_forms.form(form):
        wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(1000):
            wrong += (cuda.forward(*inputs.args())[0] != expected).any()
    assert int(wrong) == 0


@forms
def test_a_foreign_slot_gives_nan(form: str) -> None:
    inputs = make(3, 64, 64, 64, slots=2)
    slot = torch.tensor([0, 2, -1], dtype=torch.int32, device=DEVICE)
    y, _ = run(replace(inputs, slot=slot), form)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@forms
def test_offsets_beyond_32_bits(form: str) -> None:
    """U has more than 2^31 elements, and x a row stride that passes 2^31 elements."""
    m, r, T = 2**21 + 3, 1032, 3
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    x_memory = torch.zeros(2 * (2**30 + 8) + 64, dtype=BF16, device=DEVICE)
    x = x_memory.as_strided((T, 64), (2**30 + 8, 1)).copy_(torch.randn(T, 64, device=DEVICE))
    Vh = torch.randn(r, 64, device=DEVICE).bfloat16()
    U = torch.zeros(m, r, dtype=BF16, device=DEVICE)
    U[-5:] = torch.randn(5, r, device=DEVICE) / 32
    d = torch.rand(r, device=DEVICE)
    y, _ = run(Inputs(x, U, Vh.t(), d, d, None, None), form)
    tail = Inputs(x.contiguous(), U[-5:].contiguous(), Vh.t(), d, d, None, None)
    assert torch.equal(y[:, -5:], run(tail, form)[0])
    assert not y[:, :-5].any()


def captured(inputs: Inputs, form: str) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    run(inputs, form)  # warm-up: the barrier's counters are made outside of the capture
    graph = torch.cuda.CUDAGraph()
    with cuda_forms.form(form), torch.cuda.graph(graph):
        y, _ = cuda.forward(*inputs.args())
    return graph, y


@forms
@pytest.mark.parametrize("tokens", [1, 32, 128])
def test_a_graph_takes_new_routing_without_recapture(tokens: int, form: str) -> None:
    inputs = make(tokens, 512, 768, 512, slots=9)
    assert inputs.slot is not None
    graph, y = captured(inputs, form)
    for seed in range(4):
        inputs.x.copy_(torch.randn(inputs.x.shape) * (seed + 1))
        inputs.slot.copy_(torch.randint(-1, 9, (tokens,), dtype=torch.int32))
        inputs.d[seed].mul_(-2)
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, run(inputs, form)[0]), seed


@forms
def test_a_graph_of_many_layers(form: str) -> None:
    """Each call in the graph reuses the memory of the one before, counters apart."""
    layers = [make(8, 256, 256, 256, seed=seed, bias=False) for seed in range(12)]

    def chain() -> Tensor:
        x = layers[0].x
        for layer in layers:
            x = cuda.forward(*replace(layer, x=x).args())[0]
        return x

    with cuda_forms.form(form):
        expected = chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain()
    for _ in range(50):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


@forms
def test_two_streams_at_once(form: str) -> None:
    """Eager calls on one stream, a graph on another, hundreds of each, without a wait between."""
    eager, replayed = make(16, 2048, 1024, 1024), make(48, 1024, 2048, 1024, seed=1)
    graph, y = captured(replayed, form)
    graph.replay()
    expected, graph_expected = run(eager, form)[0], run(replayed, form)[0]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    wrong = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    for _ in range(300):
        with torch.cuda.stream(streams[0]), cuda_forms.form(form):
            wrong[0] += (cuda.forward(*eager.args())[0] != expected).any()
        with torch.cuda.stream(streams[1]):
            graph.replay()
            wrong[1] += (y != graph_expected).any()
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]


def test_counters_are_left_at_zero() -> None:
    for tokens in BUCKETS:
        run(make(tokens, 512, 4096, 512), "mma-coop")
    torch.cuda.synchronize()
    for pool in cuda_forms.barriers._pools.values():
        assert not pool.any()


@forms
def test_leaves_the_current_device_alone(form: str) -> None:
    last = torch.cuda.device_count() - 1
    inputs = testing.make_inputs(2, 64, 64, 64, dtype=BF16, device=f"cuda:{last}")
    with torch.cuda.device(0):
        y, _ = run(inputs, form)
        assert torch.cuda.current_device() == 0
    assert y.device.index == last


def test_a_form_that_cannot_run_is_an_error() -> None:
    inputs = make(2, 64, 64, 64, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="torch.float32"):
        run(inputs, "mma")
