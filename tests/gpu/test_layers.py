"""Layers on a GPU: the short way, groups, streams and graphs, by the CUDA backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import t2kernels as t2k
from t2kernels import testing
from t2kernels.ops import cuda, prepared

N, B = 256, 4


def missing() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return cuda._missing


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(N, 256)
        self.k_proj = nn.Linear(N, 64, bias=False)
        self.v_proj = nn.Linear(N, 64)

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def build(kind: str | None = None, groups: bool = True):
    torch.manual_seed(0)
    model = Attention().to(torch.bfloat16)
    t2k.convert(model, progress=False, factors=kind, groups=groups)
    bank = t2k.ExpertBank(model.cuda())
    gen = torch.Generator().manual_seed(1)
    for name in "ab":
        z = {n: 1 + 0.3 * torch.randn(m.rank, generator=gen)
             for n, m in t2k.svf_layers(model).items()}  # fmt: skip
        bank.add(name, t2k.Expert(z))
    return model, bank


ROWS = ["a", None, "b", "a"]


def inputs() -> torch.Tensor:
    return torch.randn(B, 1, N, generator=torch.Generator().manual_seed(2)).bfloat16().cuda()


@pytest.fixture(autouse=True)
def settings():
    with torch.no_grad(), t2k.backend("cuda"):
        yield


@pytest.mark.parametrize("routing", ["a", ROWS], ids=["uniform", "rows"])
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_short_and_grouped_calls_have_the_bits_of_the_ordinary_one(routing, kind) -> None:
    x, outs = inputs(), []
    for groups in (False, True):
        model, bank = build(kind, groups)
        with bank.use(routing), testing.poisoned_empty():
            ordinary = model(x)
            assert all(m._settled is not None for m in t2k.svf_layers(model).values())
            for _ in range(3):
                assert torch.equal(model(x.clone()), ordinary)
        outs.append(ordinary)
    assert torch.equal(*outs)
    assert torch.isfinite(outs[0]).all()
    assert model.q_proj._group[0]._ready is not None


def test_a_new_mixture_and_a_move_are_seen() -> None:
    model, bank = build()
    x = inputs()
    with bank.use(ROWS):
        first = model(x)
        assert torch.equal(model(x.clone()), first)
        with bank.use("b"):
            assert not torch.equal(model(x.clone()), first)
        assert torch.equal(model(x.clone()), first)
        model.k_proj.z.data = model.k_proj.z.data.clone()
        model.v_proj.bias.data = model.v_proj.bias.data + 1
        moved = model(x.clone())
        torch.testing.assert_close(moved[..., -64:], first[..., -64:] + 1, rtol=0.02, atol=0.05)


def test_two_streams_at_once() -> None:
    model, bank = build()
    x = [inputs() * (i + 1) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with bank.use(ROWS):
        expected = [model(t.clone()) for t in x]
        torch.cuda.synchronize()
        got: list[list[torch.Tensor]] = [[], []]
        for _ in range(20):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    got[i].append(model(x[i]))
        torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(y, expected[i]) for y in got[i])


def test_a_captured_group_follows_its_input() -> None:
    model, bank = build()
    static = inputs()
    with bank.use(ROWS):
        for _ in range(3):
            model(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(static)
        for scale in (2.0, -1.0):
            static.copy_(inputs() * scale)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, model(static.clone()))


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is enqueued from here on: a group's product or a layer's."""
    made: list[str] = []
    real, short = cuda.forward_group, prepared.PreparedCuda.__call__

    def group(x, Us, *args, **options):
        made.append(f"group of {len(Us)}")
        return real(x, Us, *args, **options)

    def alone(self, x, slot, d):
        y = short(self, x, slot, d)
        made.extend(["alone"] * (y is not None))
        return y

    monkeypatch.setattr(cuda, "forward_group", group)
    monkeypatch.setattr(prepared.PreparedCuda, "__call__", alone)
    return made


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("warmup", [1, 2])
def test_a_step_of_a_moved_model_is_captured_with_its_groups(monkeypatch, warmup, kind) -> None:
    model, bank = build(kind)  # moved to the GPU after convert
    layers = t2k.svf_layers(model).values()
    slots = bank.slots(4, batch=B)
    slots.admit(0, "a")
    slots.admit(1, "b")
    made = calls_of(monkeypatch)
    places = [layer._Vh.data_ptr() for layer in layers]
    graphs = t2k.StepGraphs(
        lambda x: model(x), {"x": inputs()}, batches=(B, 1), slots=slots, warmup=warmup
    )
    assert [layer._Vh.data_ptr() for layer in layers] == places
    assert made == ["group of 3"] * (2 * warmup)  # the first warm-up of each goes the long way
    torch.cuda.empty_cache()
    for assigned in ([0, 1, None, 1], [None, 0, 1, 0]):
        slots.assign(assigned)
        x = inputs() * (1 + len(made))
        with slots.use(B):
            expected = model(x)
        assert torch.equal(graphs(x=x), expected)


def test_a_result_stays_in_its_capture() -> None:
    """q in one graph, k and v in the next, of one static x: each graph computes its own."""
    model, bank = build()
    static = inputs()
    with bank.use(ROWS):
        for _ in range(3):
            model(static)
        torch.cuda.synchronize()
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            q = model.q_proj(static)
        with torch.cuda.graph(second):
            k, v = model.k_proj(static), model.v_proj(static)
        static.copy_(inputs() * 3)
        expected = model(static.clone())
        for y in (q, k, v):
            y.fill_(float("nan"))
        second.replay()
        first.replay()
        torch.cuda.synchronize()
        assert torch.equal(torch.cat([q, k, v], -1), expected)


def test_no_weight_moves_in_a_capture() -> None:
    model, bank = build()
    static = inputs()
    with bank.use(ROWS):
        expected = model(static)
        model.k_proj.float().bfloat16()  # parts it from its neighbours, inside the block
        model(static)
        torch.cuda.synchronize()
        places = [layer._Vh.data_ptr() for layer in t2k.svf_layers(model).values()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(static)
    with bank.use(ROWS):  # the graph reads V where it lay
        assert [m._Vh.data_ptr() for m in t2k.svf_layers(model).values()] == places
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
