"""Layers on a GPU: the short way, groups, streams and graphs, by the CUDA backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import t2kernels as t2k
from t2kernels import testing
from t2kernels.ops import cuda

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
