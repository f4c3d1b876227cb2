"""Layers that share x on a GPU: every backend that runs there, every form of the CUDA kernels.

Indices and the order of sums are proved by tests/ops/test_cuda_emulated_group.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from t2kernels import testing
from t2kernels.ops import cuda, cuda_forms, dispatch, reference
from t2kernels.testing import Group

DEVICE = "cuda"
BF16, FP16 = torch.bfloat16, torch.float16
FORMS = list(cuda_forms.FORMS)


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return cuda._missing


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

forms = pytest.mark.parametrize("form", FORMS)
# n, the members' m and r: q, k, v and gate, up of an 8B model; awkward ones, of which the last is
# for form fma alone.
WHOLE = [
    (4096, [4096, 1024, 1024], [4096, 1024, 1024]),
    (4096, [14336, 14336], [4096, 4096]),
    (144, [63, 1, 200, 17], [16, 208, 1040, 64]),
]
ODD = (63, [17, 1, 63], [17, 9, 63])


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """The yardstick is plain torch without TF32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    yield
    matmul.allow_tf32 = before


def make(tokens: int, shape, **more) -> Group:
    n, ms, ranks = shape
    more = {"dtype": BF16, "slots": 3, "device": DEVICE, "bias": [True, False], **more}
    return testing.make_group(tokens, n, ms, ranks, **more)


def run(group: Group, form: str, tile: str = "auto", **options: bool) -> list[Tensor]:
    with testing.poisoned_empty(), cuda_forms.form(form, tile):
        reason = cuda.group_unavailable(*group.args())
        assert reason is None, reason
        return cuda.forward_group(*group.args(), **options)


def alone(group: Group, form: str) -> list[Tensor]:
    with cuda_forms.form(form):
        return [cuda.forward(*member.args())[0] for member in group.members()]


def accurate(group: Group, ys: list[Tensor]) -> None:
    for i, (y, member) in enumerate(zip(ys, group.members(), strict=True)):
        truth, _ = reference.forward(*member.double().args())
        testing.assert_accurate(y, truth, testing.plain_forward(member), f"y of member {i}")


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@forms
@pytest.mark.parametrize("tokens", [1, 8, 32, 64, 128])
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_bits_are_those_of_each_layer_alone(shape, tokens: int, form: str) -> None:
    group = make(tokens, shape)
    ys = run(group, form)
    assert same(ys, alone(group, form))
    assert same(run(group, form), ys), "two runs differ"
    if tokens in (1, 64):
        accurate(group, ys)


@forms
@pytest.mark.parametrize(("dtype", "factors"), [(FP16, None), (BF16, "int8"), (BF16, "fp8")])
def test_other_factors(dtype, factors: str | None, form: str) -> None:
    group = make(33, WHOLE[2], dtype=dtype, factors=factors)
    ys = run(group, form)
    assert same(ys, alone(group, form))
    accurate(group, ys)


@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_any_size_by_plain_multiply_adds(tokens: int, dtype, factors: str | None) -> None:
    group = make(tokens, ODD, dtype=dtype, factors=factors)
    ys = run(group, "fma")
    assert same(ys, alone(group, "fma"))
    accurate(group, ys)


@forms
def test_a_row_is_its_own(form: str) -> None:
    """Neither the number of rows nor their strides nor the slots of the others."""
    group = make(128, WHOLE[2], slots=127)
    group = replace(group, slot=torch.arange(-1, 127, dtype=torch.int32, device=DEVICE))
    assert group.slot is not None
    whole = run(group, form)
    for count in (1, 7, 9, 33, 65):
        part = replace(group, x=group.x[:count], slot=group.slot[:count])
        assert same(run(part, form, batch_invariant=True), [y[:count] for y in whole]), count
    wide = torch.full((128, 151), float("nan"), dtype=BF16, device=DEVICE)
    arena = torch.full((127, 2001), float("nan"), device=DEVICE)
    x = wide[:, 3:147].copy_(group.x)
    d = arena[:, 5 : 5 + group.d.shape[1]].copy_(group.d)
    assert same(run(replace(group, x=x, d=d), form), whole)


@pytest.mark.parametrize("tile", list(cuda_forms.TILE_CODES)[1:])
def test_tiles(tile: str) -> None:
    group = make(70, WHOLE[2])
    expected = run(group, "mma")
    for form in ("mma", "mma-pdl", "mma-coop"):
        assert same(run(group, form, tile), expected), form


@forms
def test_in_a_graph_and_on_two_streams(form: str) -> None:
    group, other = make(8, WHOLE[0]), make(8, WHOLE[0], seed=9)
    expected, others = run(group, form), run(other, form)
    graph = torch.cuda.CUDAGraph()
    with cuda_forms.form(form), torch.cuda.graph(graph):
        captured = cuda.forward_group(*group.args())
    for y in captured:
        y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, expected)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        results = []
        for stream, inputs in zip(streams, (group, other)):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), cuda_forms.form(form):
                results.append(cuda.forward_group(*inputs.args()))
        torch.cuda.synchronize()
        assert same(results[0], expected) and same(results[1], others)


@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 64, 300])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_other_backends(backend: str, tokens: int, factors: str | None) -> None:
    module = dispatch.load(backend)
    for shape in (WHOLE[0], WHOLE[2], ODD):
        group = make(tokens, shape, factors=factors)
        reason = module.group_unavailable(*group.args())
        if reason == "triton is not installed":
            pytest.skip(reason)
        assert reason is None
        with testing.poisoned_empty():
            accurate(group, module.forward_group(*group.args()))


def test_says_why_not() -> None:
    assert "129 tokens" in str(cuda.group_unavailable(*make(129, ODD).args()))
    with cuda_forms.form("mma-coop"):
        assert "multiples of 8" in str(cuda.group_unavailable(*make(4, ODD).args()))
