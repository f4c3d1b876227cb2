"""Mixing experts on a GPU: every backend against fp64 and against the bits of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import t2kernels as t2k
from t2kernels.ops import cuda, dispatch
from t2kernels.ops.mixing import mix_rows
from t2kernels.testing import relative_error

DEVICE = "cuda"
NAN = float("nan")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(params=["cuda", "triton", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "triton":
        pytest.importorskip("triton")
    if name == "cuda" and cuda._missing is not None:
        pytest.skip(cuda._missing)
    monkeypatch.setenv("T2_BACKEND", name)
    return name


def inputs(R: int, experts: int = 6) -> tuple[Tensor, Tensor]:
    gen = torch.Generator(device=DEVICE).manual_seed(0)
    S = torch.rand(R, generator=gen, device=DEVICE)
    return S, 1 + 0.1 * torch.randn(experts, R, generator=gen, device=DEVICE)


def on_cpu(S: Tensor, Z: Tensor, alpha: Tensor, **more: Tensor | int) -> Tensor:
    """The same on the CPU, whose backends are tested bit for bit against the equation."""
    out = torch.full((alpha.shape[0], S.shape[0]), NAN)
    moved = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in more.items()}
    with dispatch.backend("torch"):
        mix_rows(out, S.cpu(), Z.cpu(), alpha.cpu(), **moved)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("R", [1, 63, 512, 2052, 224 * 4096 + 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_and_sparse(backend: str, R: int, dtype: torch.dtype) -> None:
    S, Z = inputs(R)
    Z = Z if dtype == torch.float32 else (Z - 1).to(dtype)
    alpha = torch.randn(8, 6, device=DEVICE)
    arena = torch.full((12, R), NAN, device=DEVICE)
    rows = torch.tensor([5, 0, 11, 3, 7, 1, 9, 10], dtype=torch.int32, device=DEVICE)
    mix_rows(arena, S, Z, alpha, rows=rows)
    deviation = Z.double() - 1 if dtype == torch.float32 else Z.double()
    truth = S.double() * (1 + alpha.double() @ deviation)
    assert relative_error(arena[rows.long()], truth) < 1e-6
    assert torch.equal(arena[rows.long()].cpu(), on_cpu(S, Z, alpha))
    assert arena.isnan().all(1).sum() == 4
    indices = torch.tensor([[2, 0, -1], [5, -1, -1]], dtype=torch.int32, device=DEVICE)
    mix_rows(arena, S, Z, alpha[:2, :3], indices=indices, rows=rows[:2])
    expected = on_cpu(S, Z, alpha[:2, :3], indices=indices)
    assert torch.equal(arena[rows[:2].long()].cpu(), expected)


def test_weights_per_layer(backend: str) -> None:
    sizes = [4096, 1024, 3, 0, 14336]
    S, Z = inputs(sum(sizes))
    offsets = torch.tensor([0, *sizes], device=DEVICE).cumsum(0)
    alpha = torch.randn(5, len(sizes), 6, device=DEVICE)
    out = torch.full((5, sum(sizes)), NAN, device=DEVICE)
    more = {"offsets": offsets, "longest": max(sizes)}
    mix_rows(out, S, Z, alpha, **more)
    assert torch.equal(out.cpu(), on_cpu(S, Z, alpha, **more))


def test_foreign_numbers(backend: str) -> None:
    S, Z = inputs(1000)
    arena = torch.full((6, 1000), 7.0, device=DEVICE)
    indices = torch.tensor([[0, 6], [1, 2], [3, -2]], dtype=torch.int32, device=DEVICE)
    rows = torch.tensor([2, 6, 0], dtype=torch.int32, device=DEVICE)
    mix_rows(arena, S, Z, torch.ones(3, 2, device=DEVICE), indices=indices, rows=rows)
    assert arena[[0, 2]].isnan().all()
    assert (arena[[1, 3, 4, 5]] == 7).all()


def test_offsets_beyond_32_bits(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of free GPU memory")
    R, slots = 65_536, (1 << 32) // 65_536 // 2 + 2  # 2³¹ elements and more
    S, Z = inputs(R, 2)
    table = torch.zeros(slots, R, device=DEVICE, dtype=torch.bfloat16)
    table[-1] = (Z[1] - 1).to(torch.bfloat16)
    arena = torch.zeros(slots, R, device=DEVICE)
    last = torch.tensor([[slots - 1]], dtype=torch.int32, device=DEVICE)
    mix_rows(arena, S, table, torch.ones(1, 1, device=DEVICE), indices=last, rows=last[0])
    expected = on_cpu(S, table[-1:], torch.ones(1, 1))
    assert torch.equal(arena[-1:].cpu(), expected)
    assert not arena[:-1].any()


def test_in_a_graph(backend: str) -> None:
    if backend == "torch":
        pytest.skip("torch's mixing waits for nothing, but is many launches: not promised")
    S, Z = inputs(5000)
    alpha = torch.randn(2, 6, device=DEVICE)
    out = torch.full((2, 5000), NAN, device=DEVICE)
    mix_rows(out, S, Z, alpha)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mix_rows(out, S, Z, alpha)
    alpha.mul_(-0.5)
    graph.replay()
    assert torch.equal(out.cpu(), on_cpu(S, Z, alpha))


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bank_mixes_the_same_wherever_its_experts_live(
    backend: str, host: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64))
    t2k.convert(model, progress=False)
    expected, arenas = [], []
    for device in ("cpu", DEVICE):
        model.to(device)
        banked = t2k.ExpertBank(model, dtype=dtype, host=host and device == DEVICE, cache=4)
        for i in range(40):
            gen = torch.Generator().manual_seed(i)
            z = {n: 1 + 0.1 * torch.randn(64, generator=gen) for n in banked.layers}
            banked.add(f"e{i}", t2k.Expert(z))
        if device == "cpu":
            with dispatch.backend("torch"):
                slots = banked.slots(40)
                for i in range(40):
                    slots.admit(i, {f"e{i}": 0.5, f"e{(7 * i) % 40}": 1.0})
            expected = slots.arena
            continue
        slots, side = banked.slots(40), torch.cuda.Stream()
        for i in range(40):
            banked.prefetch([f"e{(i + 1) % 40}", f"e{(7 * i + 7) % 40}"])
            with torch.cuda.stream(side if i % 2 else torch.cuda.current_stream()):
                slots.admit(i, {f"e{i}": 0.5, f"e{(7 * i) % 40}": 1.0})
        torch.cuda.synchronize()
        arenas = slots.arena
    # σ was computed once, on the CPU, and moved.
    assert torch.equal(arenas.cpu(), expected)
