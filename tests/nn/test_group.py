"""Layers that share x in one call: the same bits, and alone wherever that is not certain."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import t2kernels as t2k
from t2kernels.ops import dispatch, native

N, B = 64, 3

pytestmark = pytest.mark.skipif(native._MISSING is not None, reason=str(native._MISSING))


class Attention(nn.Module):
    """Calls its layers with one x, or as the test says."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(N, 64)
        self.k_proj = nn.Linear(N, 24, bias=False)
        self.v_proj = nn.Linear(N, 24)
        self.o_proj = nn.Linear(112, N)

    def parts(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x):
        return self.o_proj(torch.cat(self.parts(x), -1))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return self.attn(x)


def build(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Model().to(dtype)
    t2k.convert(model, progress=False, **options)
    bank = t2k.ExpertBank(model)
    gen = torch.Generator().manual_seed(1)
    for name in "ab":
        z = {n: 1 + 0.3 * torch.randn(m.rank, generator=gen)
             for n, m in t2k.svf_layers(model).items()}  # fmt: skip
        bank.add(name, t2k.Expert(z))
    return model, bank


X = torch.randn(B, 2, N, generator=torch.Generator().manual_seed(2))
ROWS = ["a", None, "b"]


@pytest.fixture(autouse=True)
def groups_on_a_cpu(monkeypatch):
    """The policy has no use for them there; the CPU's kernels are as good a proof as any."""
    monkeypatch.setitem(dispatch.GROUP_TOKENS, "native", 16)


@pytest.fixture
def calls(monkeypatch):
    """The number of members of every grouped call that was made."""
    made = []
    real = native.forward_group

    def watched(x, Us, *args, **options):
        made.append(len(Us))
        return real(x, Us, *args, **options)

    monkeypatch.setattr(native, "forward_group", watched)
    return made


@pytest.fixture
def ready():
    """(model, bank) inside a routing by rows that every layer has met: the next call is grouped."""
    model, bank = build()
    with torch.no_grad(), bank.use(ROWS):
        model(X)
        yield model, bank


def group_of(model):
    return model.attn.q_proj._group[0]


@pytest.mark.parametrize("routing", ["a", ROWS, [None, "b", "b"]], ids=["uniform", "rows", "more"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
def test_the_bits_are_those_of_calls_alone(calls, routing, dtype, kind, invariant):
    x = X.to(dtype)
    outs = []
    for groups in (False, True):
        model, bank = build(dtype, factors=kind, groups=groups)
        with torch.no_grad(), t2k.batch_invariant(invariant), bank.use(routing):
            first = model.attn.parts(x)
            again = model.attn.parts(x)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        outs.append(again)
    assert calls == [3]
    assert all(torch.equal(a, b) for a, b in zip(*outs))


def test_who_is_called_first_does_not_matter(ready, calls):
    model, _ = ready
    expected = model.attn.parts(X)
    layers = [model.attn.q_proj, model.attn.k_proj, model.attn.v_proj]
    for order in ((2, 1, 0), (1, 0, 2), (0, 2, 1)):
        x = X.clone()
        got = {i: layers[i](x) for i in order}
        assert all(torch.equal(got[i], expected[i]) for i in order)
    assert calls == [3] * 4


def test_the_same_layer_twice_is_computed_twice(ready):
    model, _ = ready
    first, again = model.attn.q_proj(X), model.attn.q_proj(X)
    assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
    again.zero_()
    assert torch.equal(model.attn.q_proj(X), first)


def alone(model, name, x):
    layer = getattr(model.attn, name)
    kept, layer._group, layer._settled = layer._group, None, None
    try:
        return layer(x)
    finally:
        layer._group, layer._settled = kept, None


def test_x_written_in_between(ready):
    model, _ = ready
    x = X.clone()
    model.attn.q_proj(x)
    assert group_of(model)._memo.results
    x.mul_(2.0)
    assert torch.equal(model.attn.k_proj(x), alone(model, "k_proj", x))


def test_another_x_in_between_and_sharing_that_ends(ready, calls):
    model, _ = ready
    attn = model.attn
    for _ in range(4):
        x, other = torch.randn(B, 1, N), torch.randn(B, 1, N)
        q, k, v = attn.q_proj(x), attn.k_proj(other), attn.v_proj(other)
        with t2k.backend("torch"):
            assert t2k.explain(attn.q_proj, x).backend == "torch"
            torch.testing.assert_close(q, attn.q_proj(x))
            torch.testing.assert_close(k, attn.k_proj(other))
            torch.testing.assert_close(v, attn.v_proj(other))
        attn.q_proj(x), attn.k_proj(other), attn.v_proj(other)  # settled by torch: anew
    assert not group_of(model).shares
    assert len(calls) < 8
    assert "called with another x" in t2k.explain(attn.q_proj, X).why


def test_one_result_left_does_not_end_it(ready, calls):
    model, _ = ready
    for _ in range(3):
        model.attn.q_proj(X.clone())
        x = X.clone()
        model.attn.parts(x)
    assert group_of(model).shares
    assert calls == [3] * 6


def test_the_plan_between(ready):
    model, bank = ready
    x = X.clone()
    model.attn.q_proj(x)
    with bank.use(["b", "b", "b"]):
        model(X)
        model.attn.q_proj(x)
        expected = alone(model, "k_proj", x)
        assert torch.equal(model.attn.k_proj(x), expected)
    assert torch.equal(model.attn.k_proj(x), alone(model, "k_proj", x))


@pytest.mark.parametrize("write", ["admit", "admit_all", "assign"])
def test_slots_written_in_between(write):
    model, bank = build()
    slots = bank.slots(4, batch=B)
    slots.admit(0, "a")
    slots.admit(1, "b")
    slots.assign([0, 1, None])
    x = X.clone()
    with torch.no_grad(), slots.use(B):
        model(x)
        model(x)
        model.attn.q_proj(x)
        assert group_of(model)._memo.results
        before = alone(model, "v_proj", x)
        if write == "admit":
            slots.admit(0, torch.tensor([0.0, 0.5]))
        elif write == "admit_all":
            slots.admit_all({0: {"b": 0.5}})
        else:
            slots.assign([1, 0, None])
        after = model.attn.k_proj(x)
        assert torch.equal(after, alone(model, "k_proj", x))
        assert not torch.equal(model.attn.v_proj(x), before)


def other_bias(layer):
    layer.bias = nn.Parameter(torch.ones(24))


def moved_bias(layer):
    layer.bias.data = layer.bias.data + 1


def other_factors(layer):
    f = layer.factors
    layer._set_factors(t2k.SVDFactors(f.U * -1, f.S, f.V.clone()))


@pytest.mark.parametrize("change", [other_bias, moved_bias, other_factors])
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_member_that_changed(ready, change, when):
    model, _ = ready
    model(X)
    x = X.clone()
    if when == "before":
        change(model.attn.v_proj)
    model.attn.q_proj(x)
    if when == "between":
        change(model.attn.v_proj)
    expected = alone(model, "v_proj", x)
    assert torch.equal(model.attn.v_proj(x), expected)
    model(X), model(X)
    assert torch.equal(model.attn.v_proj(x), expected)


def test_what_nobody_takes_goes_with_x_or_with_the_next_call(ready):
    model, _ = ready
    group = group_of(model)
    x = X.clone()
    model.attn.q_proj(x)
    kept = [weakref.ref(y) for y in group._memo.results.values()]
    gone = weakref.ref(x)
    assert len(kept) == 2
    del x
    gc.collect()
    assert gone() is None and all(y() is None for y in kept)
    model.attn.parts(X)  # all are taken: it was no habit
    x = X.clone()
    model.attn.q_proj(x)
    kept = [weakref.ref(y) for y in group._memo.results.values()]
    other = X.clone()
    model.attn.parts(other)
    assert all(y() is None for y in kept) and not group._memo.results


def test_an_error_leaves_nothing(ready, monkeypatch):
    model, _ = ready
    model(X)

    def broken(*args, **options):
        raise RuntimeError("no memory")

    with monkeypatch.context() as m:
        m.setattr(native, "forward_group", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            model(X)
        assert group_of(model)._memo is None
    assert torch.equal(model(X), model(X))


@pytest.mark.parametrize("mode", ["grad", "inference", "autocast", "many tokens", "base", "merged"])
def test_alone_where_it_is_not_certain(calls, mode):
    model, bank = build()
    reference, other = build(groups=False)
    for bank_ in (bank, other):
        for name in "ab":
            bank_.add(name, bank[name], overwrite=True, allow_mismatch=True)
    x = torch.randn(B, 20, N) if mode == "many tokens" else X.clone()
    x.requires_grad_(mode == "grad")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast")
    routing = None if mode == "base" else ROWS
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode == "grad"):
        if mode == "inference":
            x = X.clone()
        if mode == "merged":
            bank.merge("a"), other.merge("a")
            outs = [[m(x) for _ in range(3)] for m in (model, reference)]
        else:
            outs = []
            for m, b in ((model, bank), (reference, other)):
                with b.use(routing), autocast:
                    outs.append([m(x) for _ in range(3)])
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(*outs))
    assert group_of(model)._memo is None
    assert outs[0][0].requires_grad is (mode == "grad")


def tied(model):
    """Whether the members' V are one piece of memory of their own size."""
    layers = group_of(model).layers
    memory = {m._Vh.untyped_storage().data_ptr() for m in layers}
    size = sum(m._Vh.numel() * m._Vh.element_size() for m in layers)
    return len(memory) == 1 and layers[0]._Vh.untyped_storage().nbytes() == size


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("change", ["bfloat16", "deepcopy", "pickle", "assign", "one member"])
def test_moves_and_copies_are_tied_again(calls, change, kind):
    model, _ = build(factors=kind)
    assert tied(model)
    x = X
    if change == "bfloat16":
        model, x = model.bfloat16(), X.bfloat16()
    elif change == "deepcopy":
        twin = copy.deepcopy(model)
        assert group_of(twin) is not group_of(model)
        model = twin
    elif change == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif change == "assign":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    else:
        model.attn.k_proj.double().float()
    assert group_of(model).layers[1] is model.attn.k_proj
    bank = t2k.ExpertBank(model)
    gen = torch.Generator().manual_seed(1)
    z = {n: 1 + 0.3 * torch.randn(m.rank, generator=gen)
         for n, m in t2k.svf_layers(model).items()}  # fmt: skip
    bank.add("a", t2k.Expert(z))
    with torch.no_grad(), bank.use("a"):
        expected = [alone(model, name, x) for name in ("q_proj", "k_proj", "v_proj")]
        for _ in range(4):
            got = model.attn.parts(x)
            assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert calls and set(calls) == {3}
    assert tied(model)


def test_the_policy_has_no_use_for_them_on_a_cpu(monkeypatch):
    monkeypatch.undo()
    model, bank = build()
    with torch.no_grad(), bank.use(ROWS):
        for _ in range(3):
            model(X)
        assert group_of(model)._memo is None and group_of(model)._ready is None
        assert "native does not gain" in t2k.explain(model.attn.q_proj, X).why


def test_the_report_and_the_switch():
    torch.manual_seed(0)
    model = Model()
    report = t2k.convert(model, progress=False)
    assert report.groups == [("attn.q_proj", "attn.k_proj", "attn.v_proj")]
    assert "= attn.q_proj, attn.k_proj, attn.v_proj share x" in str(report)
    bank = t2k.ExpertBank(model)
    bank.add("a", t2k.Expert({"attn.q_proj": torch.full((64,), 2.0)}))
    with torch.no_grad(), bank.use("a"):
        assert "one call with k_proj and v_proj" in t2k.explain(model.attn.q_proj, X).why
        assert "at most 16" in t2k.explain(model.attn.q_proj, torch.randn(1, 17, N)).why
        assert "one call" not in t2k.explain(model.attn.o_proj, torch.randn(1, 112)).why
    t2k.revert(model)
    report = t2k.convert(model, progress=False, groups=False)
    assert not report.groups and model.attn.q_proj._group is None
    t2k.revert(model)
    assert not t2k.convert(model, progress=False, rank=8).groups  # the delta form
    t2k.revert(model)
    assert t2k.convert(model, progress=False, exclude=["k_proj"]).groups == [
        ("attn.q_proj", "attn.v_proj")
    ]


def test_layers_of_other_widths_are_no_group():
    model = Model()
    model.attn.k_proj = nn.Linear(N + 1, 24)
    assert not t2k.convert(model, progress=False).groups


def test_a_model_that_is_dropped_frees_its_groups():
    model, bank = build()
    with torch.no_grad(), bank.use("a"):
        model(X), model(X)
    ref = weakref.ref(group_of(model))
    del model, bank
    gc.collect()
    assert ref() is None
