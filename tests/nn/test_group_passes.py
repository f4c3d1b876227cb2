"""Layers that share x over several passes: moves, captures of CUDA graphs, writes, patience."""

import copy
import gc
import logging
import pickle
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import t2kernels as t2k
from t2kernels import graphs
from t2kernels.nn import group as module
from t2kernels.nn import linear
from t2kernels.ops import dispatch, native, prepared

N, B = 32, 2
NAMES = ("q_proj", "k_proj", "v_proj")

pytestmark = pytest.mark.skipif(native._MISSING is not None, reason=str(native._MISSING))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        for name, width in zip(NAMES, (32, 16, 16)):
            setattr(self, name, nn.Linear(N, width))
        self.gate_proj, self.up_proj = nn.Linear(N, 48), nn.Linear(N, 48)

    def forward(self, x):
        return tuple(getattr(self, name)(x) for name in (*NAMES, "gate_proj", "up_proj"))


def bank_of(model):
    bank = t2k.ExpertBank(model)
    gen = torch.Generator().manual_seed(1)
    for name in "ab":
        z = {n: 1 + 0.3 * torch.randn(m.rank, generator=gen)
             for n, m in t2k.svf_layers(model).items()}  # fmt: skip
        bank.add(name, t2k.Expert(z))
    return bank


def build(**options):
    torch.manual_seed(0)
    model = Model().eval()
    report = t2k.convert(model, progress=False, **options)
    assert report.groups == [NAMES, ("gate_proj", "up_proj")]
    return model


@pytest.fixture(autouse=True)
def groups_on_a_cpu(monkeypatch):
    monkeypatch.setitem(dispatch.GROUP_TOKENS, "native", 16)
    with torch.no_grad():
        yield


@pytest.fixture
def log(monkeypatch):
    """What computed each layer: "ordinary", "alone" or "GROUP" with the number of members."""
    calls = []

    def watch(owner, name, note):
        real = getattr(owner, name)

        def watched(*args, **options):
            y = real(*args, **options)
            if note(args, y) is not None:
                calls.append(note(args, y))
            return y

        monkeypatch.setattr(owner, name, watched)

    watch(native, "forward_group", lambda args, y: f"GROUP{len(args[1])}")
    watch(prepared.PreparedNative, "__call__", lambda args, y: None if y is None else "alone")
    watch(linear, "run", lambda args, y: "ordinary")
    return calls


def passes(model, log, count, x):
    out = []
    for _ in range(count):
        log.clear()
        model(x)
        out.append(list(log))
    return out


@pytest.fixture
def capture(monkeypatch):
    """The number of the capture that is under way; a CPU has none."""
    now = SimpleNamespace(number=0)
    monkeypatch.setattr(module, "_capture", lambda x: now.number)
    return now


def places(model):
    return [layer._Vh.data_ptr() for layer in t2k.svf_layers(model).values()]


def alone(model, name, x):
    layer = getattr(model, name)
    kept, layer._group, layer._settled = layer._group, None, None
    try:
        return layer(x)
    finally:
        layer._group, layer._settled = kept, None


FIRST, STEADY = ["ordinary"] * 5, ["GROUP3", "GROUP2"]


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("move", ["none", "bfloat16", "copy", "pickle", "k alone", "v alone"])
def test_from_the_second_call_on_all_is_settled(log, move, kind):
    model = build(factors=kind)
    x = torch.randn(B, 1, N)
    if move == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    elif move == "copy":
        model = copy.deepcopy(model)
    elif move == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif move != "none":
        getattr(model, move[0] + "_proj").double().float()
    with bank_of(model).use(["a", None]):
        before = places(model)
        assert passes(model, log, 4, x) == [FIRST, STEADY, STEADY, STEADY]
        assert places(model) == before


def test_a_move_ties_at_once_and_forgets_the_old_memory():
    model = build()
    group = model.q_proj._group[0]
    with bank_of(model).use(["a", None]):
        model(torch.randn(B, 1, N)), model(torch.randn(B, 1, N))
        assert group._ready is not None
    model.bfloat16()
    assert group.tied and group._ready is None and group._memo is None


def test_no_weight_moves_while_a_graph_is_captured(log, capture):
    """Nor later: a graph that was captured reads V where it lay."""
    model = build()
    x = torch.randn(B, 1, N)
    model.k_proj.double().float()
    bank, before = bank_of(model), places(model)
    capture.number = 1
    with bank.use(["a", None]):
        assert passes(model, log, 2, x) == [FIRST, ["alone", "alone", "alone", "GROUP2"]]
        capture.number = 0
        assert "V lie apart" in t2k.explain(model.q_proj, x).why
    with bank.use(["b", None]):
        assert passes(model, log, 2, x)[1] == ["alone", "alone", "alone", "GROUP2"]
        assert places(model) == before
    model.float()  # moved, though to where it is
    assert model.q_proj._group[0].tied
    with bank.use(["a", None]):
        assert passes(model, log, 2, x) == [FIRST, STEADY]


def test_use_inside_a_capture_ties_at_the_next(log, capture):
    model = build()
    model.k_proj.double().float()
    bank, before = bank_of(model), places(model)
    capture.number = 1
    with bank.use(["a", None]):
        assert places(model) == before
    capture.number = 0
    with bank.use(["a", None]):
        assert passes(model, log, 2, torch.randn(B, 1, N)) == [FIRST, STEADY]


@pytest.mark.parametrize("q, k", [(1, 2), (1, 0), (0, 1)])
def test_a_result_stays_in_its_capture(log, capture, q, k):
    model = build()
    x = torch.randn(B, 1, N)
    with bank_of(model).use(["a", None]):
        model(x), model(x)
        log.clear()
        capture.number = q
        first = model.q_proj(x)
        capture.number = k
        rest = model.k_proj(x), model.v_proj(x)
        assert log == ["GROUP3", "alone", "alone"]
        again = model(x)
        assert log[3:] == STEADY
        assert all(torch.equal(a, b) for a, b in zip((first, *rest), again))


class Graph:
    """Writes down the native calls of a capture and makes them again, with the same memory."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for real, args, options, before in self.calls:
            after = real(*args, **options)
            for old, new in zip(*([ys] if torch.is_tensor(ys) else ys for ys in (before, after))):
                old.copy_(new)


@pytest.fixture
def cuda(monkeypatch, capture):
    """What StepGraphs uses of torch.cuda. The products alone are recorded, without a mode: that
    is what a mode would keep from happening."""
    running = []

    def record(owner, name):
        real = getattr(owner, name)

        def recorded(*args, **options):
            y = real(*args, **options)
            if running and y is not None:
                running[-1].calls.append((real, args, options, y))
            return y

        monkeypatch.setattr(owner, name, recorded)

    record(native, "forward_group")
    record(prepared.PreparedNative, "__call__")

    @contextmanager
    def graph(graph, *, pool, stream):
        capture.number += 1
        number, seen = capture.number, places_of()
        running.append(graph)
        yield
        running.pop()
        assert places_of() == seen
        capture.number = number

    @contextmanager
    def stream(stream):
        yield

    models = []

    def places_of():
        return [places(m) for m in models]

    waits = SimpleNamespace(wait_stream=lambda other: None)
    fake = SimpleNamespace(
        CUDAGraph=Graph, graph=graph, stream=stream, graph_pool_handle=lambda: None,
        current_stream=lambda device: waits, Stream=lambda device: waits, models=models,
    )  # fmt: skip
    monkeypatch.setattr(graphs, "_cuda", fake)
    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    return fake


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("warmup", [1, 2])
def test_groups_in_graphs_of_a_step(cuda, warmup, moved):
    model = build()
    if moved:
        model.double().float()
    cuda.models.append(model)
    bank = bank_of(model)
    slots = bank.slots(4, batch=B)
    slots.admit(0, "a")
    slots.admit(1, "b")
    x = torch.randn(B, 1, N)
    step = t2k.StepGraphs(lambda x: model(x), {"x": x}, batches=(2, 1), slots=slots, warmup=warmup)
    for graph in step._graphs.values():
        assert [len(ys) for _, _, _, ys in graph.calls] == [3, 2]
    for assigned in ([0, 1], [1, None], [None, 0]):
        slots.assign(assigned)
        x = torch.randn(B, 1, N)
        got = step(x=x)
        with slots.use(B):
            expected = [alone(model, n, x) for n in t2k.svf_layers(model)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


WRITES = {
    "x.data": lambda m, x: setattr(x, "data", torch.ones(B, 1, N)),
    "x": lambda m, x: x.mul_(2),
    "bias": lambda m, x: m.k_proj.bias.add_(1),
    "bias.data": lambda m, x: setattr(m.k_proj.bias, "data", torch.ones(16)),
    "U": lambda m, x: m.k_proj._U.mul_(2),
    "S": lambda m, x: m.k_proj._S.mul_(2),
    "arena": lambda m, x: m._t2_route.plan.arena.mul_(3),
}


@pytest.mark.parametrize("what", WRITES)
def test_writes_between_two_members(log, what):
    model = build()
    with bank_of(model).use(["a", None]):
        x = torch.randn(B, 1, N)
        model(x), model(x)
        log.clear()
        model.q_proj(x)
        WRITES[what](model, x)
        got = model.k_proj(x)
        model.v_proj(x)
        assert log.count("GROUP3") == 1
        assert torch.equal(got, alone(model, "k_proj", x))


@pytest.mark.parametrize("again", NAMES)
def test_a_member_that_decides_anew_goes_alone_in_that_pass(log, again):
    """With one static x: nothing is computed twice, and the pass after it is whole."""
    model = build()
    x = torch.randn(B, 1, N)
    with bank_of(model).use(["a", None]):
        model(x), model(x)
        getattr(model, again)._settled = None
        (got,) = passes(model, log, 1, x)
        products = [3 if c == "GROUP3" else 1 for c in got if c != "GROUP2"]
        assert sum(products) == (3 if again == "q_proj" else 4)  # q computed all
        assert passes(model, log, 2, x) == [STEADY, STEADY]


def test_a_dropped_bank_takes_its_arena_along():
    model = build()
    bank, x = bank_of(model), torch.randn(B, 1, N)
    with bank.use(["a", None]):
        model(x), model(x)
        arena = weakref.ref(model._t2_route.plan.arena)
    del bank
    gc.collect()
    assert group_of(model)._ready is not None and arena() is None


def group_of(model):
    return model.q_proj._group[0]


def test_failed_requests_do_not_end_sharing(log):
    model = build()
    with bank_of(model).use(["a", None]):
        model(torch.randn(B, 1, N)), model(torch.randn(B, 1, N))
        for _ in range(2):
            model.q_proj(torch.randn(B, 1, N))  # and then an error
        assert passes(model, log, 2, torch.randn(B, 1, N)) == [STEADY, STEADY]


@pytest.mark.parametrize("static", [True, False])
def test_sharing_ends_and_begins_again(log, caplog, static):
    model = build()
    x = torch.randn(B, 1, N)
    caplog.set_level(logging.INFO, logger="t2kernels")
    with bank_of(model).use(["a", None]):
        model(x), model(x)
        for _round in range(2):
            for _ in range(module.PATIENCE + 1):
                assert group_of(model).shares
                model.q_proj(x if static else torch.randn(B, 1, N))
            assert not group_of(model).shares
            assert "not all of them were called" in t2k.explain(model.q_proj, x).why
            assert copy.deepcopy(group_of(model)).shares
            log.clear()
            model.q_proj(x)
            assert log == ["alone"]
            other = torch.randn(B, 1, N)
            assert passes(model, log, 2, other)[0][:3] == ["alone"] * 3
            assert passes(model, log, 1, other) == [STEADY]
    told = [r.getMessage() for r in caplog.records if r.name == module.__name__]
    assert len(told) == 1 and told[0].startswith("q_proj, k_proj, v_proj: computed apart")


def test_an_inference_tensor_is_computed_alone_and_explain_says_so(log):
    model = build()
    with torch.inference_mode(), bank_of(model).use(["a", None]):
        x = torch.randn(B, 1, N)
        assert passes(model, log, 2, x)[1] == ["alone"] * 5
        assert "torch.no_grad()" in t2k.explain(model.q_proj, x).why


def test_groups_is_a_switch():
    with pytest.raises(TypeError, match="groups must be True or False, got str"):
        t2k.convert(Model(), progress=False, groups="x")
