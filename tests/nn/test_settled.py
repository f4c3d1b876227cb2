"""The short way through a layer: taken when nothing changed, and never when anything did."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import t2kernels as t2k
from t2kernels.ops import dispatch, native

N, M, B = 24, 20, 3

pytestmark = pytest.mark.skipif(native._MISSING is not None, reason=str(native._MISSING))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(N, M)

    def forward(self, x):
        return self.proj(x)


def build(**options):
    torch.manual_seed(0)
    model = Model()
    t2k.convert(model, progress=False, **options)
    bank = t2k.ExpertBank(model)
    for name, scale in (("a", 1.5), ("b", 0.5)):
        bank.add(name, t2k.Expert({"proj": torch.linspace(0.5, scale, M)}))
    return model, bank


X = torch.randn(B, 2, N, generator=torch.Generator().manual_seed(1))


def is_short(layer, x=X):
    """Whether the layer would answer without deciding anew."""
    with torch.no_grad():
        return layer._settled is not None and layer._settled(layer, x) is not None


def anew(layer, x=X):
    """What the layer says when it decides from scratch."""
    layer._settled = None
    y = layer(x)
    layer._settled = None
    return y


def own(model):
    with torch.no_grad():
        model.proj.z.mul_(1.5)


@pytest.fixture(params=["own", "rests", "uniform", "rows", "slot", "all base", "dropped base"])
def settled(request):
    """(model, bank) in each state, after a call: the next one is short."""
    model, bank = build(keep_weight=request.param != "dropped base")
    if request.param == "own":
        own(model)
    routing = {"uniform": "a", "rows": ["a", None, "b"], "slot": ["a", "b"], "all base": None}
    slot = torch.tensor([0, 1, -1, 0, 1, 1], dtype=torch.int32) if request.param == "slot" else None
    with torch.no_grad():
        if request.param in routing:
            with bank.use(routing[request.param], slot=slot):
                model(X)
                assert is_short(model.proj)
                yield model, bank
        else:
            model(X)
            assert is_short(model.proj)
            yield model, bank


def test_the_short_way_gives_the_same_bits(settled):
    model, _ = settled
    expected = anew(model.proj)
    model(X)
    assert is_short(model.proj)
    assert torch.equal(model(X), expected)
    wide = X.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    assert torch.equal(model(wide), anew(model.proj, wide))


def test_the_next_plan_decides(settled):
    model, bank = settled
    before = model(X)
    for routing in (["b", "b", "a"], "b", None, ["a", None, "b"]):
        with bank.use(routing):
            first = model(X)
            assert is_short(model.proj)
            assert torch.equal(model(X), first)
            assert torch.equal(first, anew(model.proj))
        assert torch.equal(model(X), before)


def test_the_same_routing_with_another_expert_of_that_name():
    model, bank = build()
    with torch.no_grad():
        with bank.use("a"):
            first = model(X)
        bank.add("a", t2k.Expert({"proj": torch.full((M,), 3.0)}), overwrite=True)
        with bank.use("a"):
            assert not torch.equal(model(X), first)


@pytest.mark.parametrize("keep_weight", [True, False])
def test_a_merge_decides(keep_weight):
    for before in (None, own):
        model, bank = build(keep_weight=keep_weight)
        if before:
            before(model)
        with torch.no_grad():
            y = model(X)
            assert is_short(model.proj)
            bank.merge("a")
            merged = model(X)
            torch.testing.assert_close(
                merged, nn.functional.linear(X, model.proj.weight, model.proj.bias)
            )
            assert not torch.equal(merged, y)
            bank.unmerge()
            assert torch.equal(model(X), y)


def z_by_no_grad(layer):
    with torch.no_grad():
        layer.z.mul_(2.0)


def z_by_data(layer):
    layer.z.data.mul_(2.0)


def z_to_other_memory(layer):
    layer.z.data = layer.z.data * 2


def z_replaced(layer):
    layer.z = nn.Parameter(layer.z.detach() * 2)


def sigma_written(layer):
    layer._S.data.mul_(2.0)


def bias_written(layer):
    with torch.no_grad():
        layer.bias.add_(1.0)


def bias_to_other_memory(layer):
    layer.bias.data = layer.bias.data + 1


def bias_replaced(layer):
    layer.bias = nn.Parameter(layer.bias.detach() + 1)


def bias_dropped(layer):
    layer.bias = None


def z_loaded(layer):
    layer.load_state_dict({**layer.state_dict(), "z": layer.z.detach() * 2})


def z_assigned(layer):
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.load_state_dict({**state, "z": state["z"] * 2}, assign=True)


def factors_replaced(layer):
    f = layer.factors
    layer._set_factors(t2k.SVDFactors(f.U * -1, f.S, f.V))


def factors_in_other_memory(layer):
    layer._U.data = layer._U.data * -1
    layer._Vh.data = layer._Vh.data * 2


def factors_written(layer):
    layer._U.mul_(-1)


@pytest.mark.parametrize(
    "change",
    [
        z_by_no_grad, z_by_data, z_to_other_memory, z_replaced, sigma_written, bias_written,
        bias_to_other_memory, bias_replaced, bias_dropped, z_loaded, z_assigned, factors_replaced,
        factors_in_other_memory, factors_written,
    ],
)  # fmt: skip
def test_what_changes_a_layer_of_its_own_z_is_seen(change):
    model, _ = build()
    own(model)
    with torch.no_grad():
        before = model(X)
        assert is_short(model.proj)
        change(model.proj)
        after = model(X)
        assert not torch.equal(after, before)
        assert torch.equal(after, anew(model.proj))


@pytest.mark.parametrize(
    "change",
    [
        z_by_no_grad, z_by_data, z_to_other_memory, z_replaced, bias_written, bias_replaced,
        bias_to_other_memory, bias_dropped, z_loaded, z_assigned,
    ],
)  # fmt: skip
def test_what_changes_a_layer_at_rest_is_seen(change):
    model, _ = build()
    with torch.no_grad():
        before = model(X)
        assert is_short(model.proj)
        change(model.proj)
        after = model(X)
        assert not torch.equal(after, before)
        assert torch.equal(after, anew(model.proj))


@pytest.mark.parametrize(
    "change",
    [
        bias_written, bias_to_other_memory, bias_replaced, bias_dropped, factors_replaced,
        factors_in_other_memory, factors_written,
    ],
)  # fmt: skip
@pytest.mark.parametrize("routing", ["a", ["a", None, "b"]], ids=["uniform", "rows"])
def test_what_changes_a_routed_layer_is_seen(routing, change):
    model, bank = build()
    with torch.no_grad(), bank.use(routing):
        before = model(X)
        assert is_short(model.proj)
        change(model.proj)
        after = model(X)
        assert not torch.equal(after, before)
        assert torch.equal(after, anew(model.proj))


def test_a_move_and_a_cast(settled):
    model, _ = settled
    expected = model(X)
    model.bfloat16()
    assert not is_short(model.proj)
    with pytest.raises((TypeError, RuntimeError)):
        model(X)
    assert model(X.bfloat16()).dtype == torch.bfloat16
    model.float()
    torch.testing.assert_close(model(X), expected, atol=0.1, rtol=0.1)
    assert is_short(model.proj)


def test_copies_settle_for_themselves(settled):
    model, _ = settled
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)
    for twin in copies[:2]:
        assert twin.proj._settled is None
        base = twin(X)  # outside of `use`: a copy has no plan
        assert torch.equal(twin(X), base)
    replica = model.proj._replicate_for_data_parallel()
    replica._parameters = {k: None if p is None else nn.Parameter(p + 1, requires_grad=False)
                           for k, p in model.proj._parameters.items()}  # fmt: skip
    assert torch.equal(replica(X), anew(replica))


def test_switches_decide(settled, monkeypatch):
    model, _ = settled
    expected = model(X)
    ran = []
    forward = dispatch.load("torch").forward

    def watched(*args, **options):
        ran.append(True)
        return forward(*args, **options)

    monkeypatch.setattr(dispatch.load("torch"), "forward", watched)
    factorised = model.proj._settled._product is not None
    with t2k.backend("torch"):
        torch.testing.assert_close(model(X), expected)
    assert bool(ran) is factorised
    assert torch.equal(model(X), expected)
    ran.clear()
    monkeypatch.setenv("T2_BACKEND", "torch")
    model(X)
    assert bool(ran) is factorised
    monkeypatch.delenv("T2_BACKEND")
    model(X)
    monkeypatch.setenv("T2_BACKEND", "cuda")
    if factorised:
        with pytest.raises(RuntimeError, match="T2_BACKEND"):
            model(X)
    monkeypatch.delenv("T2_BACKEND")
    assert torch.equal(model(X), expected)
    with t2k.batch_invariant():
        whole = model(X)
        assert torch.equal(whole, model(X))
        assert torch.equal(whole, anew(model.proj))


def test_gradients_are_wanted(settled):
    model, _ = settled
    x = X.clone().requires_grad_()
    with torch.enable_grad():
        model.proj.z.requires_grad_(model.proj._route[0].plan is None)
        y = model(x)
        y.sum().backward()
    assert x.grad.abs().sum() > 0
    assert model.proj._route[0].plan is not None or model.proj.z.grad.abs().sum() > 0


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nobody_who_watches_is_passed_by(settled):
    model, bank = settled
    y = model(X)
    factorised = model.proj._settled._product is not None
    with Count() as seen:
        model(X)
    assert any("svf_product" in c for c in seen.calls) is factorised
    model(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16
    model(X)

    class Sub(torch.Tensor):
        pass

    assert type(model(X.as_subclass(Sub))) is Sub
    model(X)
    if bank.model.proj._route[0].plan is None:  # a plan of three requests has no smaller batch
        mapped = torch.func.vmap(model)(X)
        torch.testing.assert_close(mapped, y)
    with warnings.catch_warnings():  # a tracer warns of every shape that is looked at
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model.proj, X, check_trace=False)
    other = torch.randn_like(X)
    assert torch.equal(traced(other), model(other))


def test_a_wrong_input_is_named(settled):
    model, _ = settled
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.randn(B, 2, N + 1))
    with pytest.raises((TypeError, RuntimeError)):
        model(X.bfloat16())
    assert is_short(model.proj)
