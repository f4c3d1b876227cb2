"""Graphs of a step over serving slots: what a replay computes is what the eager model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import t2kernels as t2k
from t2kernels.ops import cuda, cuda_forms, dispatch

DEVICE, BF16 = "cuda", torch.bfloat16
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


class Net(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


@pytest.fixture(params=["torch", "triton", "fma", "mma", "mma-pdl", "mma-coop"])
def bank(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = Net().to(DEVICE, BF16).eval()
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for i, name in enumerate(("math", "code", "prose")):
        gen = torch.Generator().manual_seed(i)
        z = {n: 1 + 0.5 * torch.randn(256, generator=gen) for n in bank.layers}
        bank.add(name, t2k.Expert(z))
    if request.param in ("torch", "triton"):
        if request.param == "triton":
            pytest.importorskip("triton")
        with dispatch.backend(request.param):
            yield bank
        return
    if cuda._missing is not None:
        pytest.skip(cuda._missing)
    with dispatch.backend("cuda"), cuda_forms.form(request.param):
        yield bank


def batch(rows: int, seed: int = 0) -> Tensor:
    gen = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(rows, 1, 256, generator=gen, device=DEVICE).to(BF16)


@torch.no_grad()
def eager(bank: t2k.ExpertBank, slots: t2k.Slots, x: Tensor) -> Tensor:
    with slots.use(len(x)):
        y: Tensor = bank.model(x)
    return y


def capture(bank: t2k.ExpertBank, slots: t2k.Slots, **more: Any) -> t2k.StepGraphs:
    given = {"batches": (1, 8, 32), "slots": slots, **more}
    return t2k.StepGraphs(bank.model, {"x": batch(1)}, **given)


ROUTINGS = [
    [None, "math", {"code": 0.5, "prose": -0.25}],
    ["prose", {"math": 2.0}, None, "code"] * 5,
    ["math"] * 8,
    [{"math": 0.1 * i, "code": 1.0} for i in range(32)],
    ["code"],
]


def test_new_routing_mixture_and_expert_without_recapture(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(32)
    graphs = capture(bank, slots)
    for number, routing in enumerate(ROUTINGS):
        if number == 3:
            bank.add("math", bank["prose"], overwrite=True)
        places = list(range(len(routing)))[::-1]
        for slot, mixture in zip(places, routing):
            slots.admit(slot, mixture)
        slots.assign(places)
        x = batch(len(routing), number)
        got = graphs(x=x).clone()
        held = next(b for b in graphs.batches if b >= len(x))
        padded = torch.cat([x, torch.zeros_like(batch(held - len(x)))])
        assert torch.equal(got, eager(bank, slots, padded)[: len(x)])
        with torch.no_grad(), bank.use(routing):
            torch.testing.assert_close(got, bank.model(x), rtol=2e-2, atol=2e-2)


def test_cold_caches_change_no_bit(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(8)
    graphs = capture(bank, slots, batches=(8,))
    slots.admit(3, {"math": 0.5, "code": 0.5})
    slots.assign([3] * 8)
    x, flush = batch(8), torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    first = graphs(x=x).clone()
    for _ in range(5):
        flush.random_()
        assert torch.equal(graphs(x=x), first)


def test_two_graphs_on_two_streams_at_once(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(8)
    pair = [capture(bank, slots, batches=(8,)) for _ in range(2)]
    for slot in range(8):
        slots.admit(slot, {"math": 0.2 * slot, "code": 1.0})
    slots.assign(list(range(8)))
    inputs = [batch(8, seed) for seed in range(2)]
    expected = [eager(bank, slots, x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in pair]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for graphs, x, stream in zip(pair, inputs, streams):
            with torch.cuda.stream(stream):
                results.append(graphs(x=x))
        torch.cuda.synchronize()
        for got, truth in zip(results, expected):
            assert torch.equal(got, truth)


def test_admission_beside_replays_of_another_stream(bank: t2k.ExpertBank) -> None:
    """Each replay sees the slot as it was when the replay was enqueued, whole."""
    slots = bank.slots(2)
    graphs = capture(bank, slots, batches=(1,))
    slots.admit(0, "math")
    slots.assign([0])
    x, truth = batch(1), {}
    for name in ("math", "code"):
        slots.admit(0, name)
        truth[name] = eager(bank, slots, x)
    serving, admitting = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    results = []
    for step in range(60):
        name = ("math", "code")[step % 2]
        with torch.cuda.stream(admitting):
            slots.admit(0, name)
        with torch.cuda.stream(serving):
            results.append((name, graphs(x=x).clone()))
    torch.cuda.synchronize()
    for name, got in results:
        assert torch.equal(got, truth[name])


def test_an_unmade_counter_is_refused_inside_a_capture() -> None:
    """What the warm-up is for."""
    barriers = cuda_forms.Barriers()
    with pytest.raises(RuntimeError, match="warm-up"):
        barriers.address(torch.device(DEVICE), 0, 0, True)
