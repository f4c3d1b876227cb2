"""Mixtures that divide by zero are refused where routing is set; a weight of zeros is fine."""

import pytest
import torch
from torch import nn

import t2kernels as t2k


def _setup(zero_layer=False, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    if zero_layer:
        nn.init.zeros_(model[0].weight)
    t2k.convert(model, progress=False, **options)
    bank = t2k.ExpertBank(model)
    for name in ("math", "code"):
        bank.add(name, t2k.Expert({n: 1 + 0.5 * torch.rand(8) for n in bank.layers}))
    return model, bank


ZEROS, CANCELS = torch.zeros(3, 2), torch.tensor([[1.0, 1.0], [0.25, -0.25]])
PER_LAYER = torch.ones(2, 2, 2)
PER_LAYER[1, 1] = 0.0


@pytest.mark.parametrize(
    ("routing", "mixture", "message"),
    [
        ({"math": 0.0}, "authors", r"mixture='authors'.*Σ\(σ⊙z\).*request 0, layer '0'"),
        (["math", {"code": 0.0}], "authors", r"request 1, layer '0'"),
        (ZEROS, "authors", r"request 0, layer '0'"),
        (ZEROS, "paper-normalised", r"mixture='paper-normalised'.*Σα.*request 0"),
        (CANCELS, "paper-normalised", r"request 1"),
        (PER_LAYER, "authors", r"request 1, layer '2'"),
        (PER_LAYER, "paper-normalised", r"request 1, layer '2'"),
        ({"math": 0.3, "code": -0.1 - 0.2}, "paper-normalised", r"Σα"),
    ],
)
def test_what_divides_by_zero_is_refused(routing, mixture, message):
    model, bank = _setup()
    kinds = [routing]
    if isinstance(routing, torch.Tensor):
        kinds.append(routing.clone().requires_grad_())  # mixed in the layers, later
    for kind in kinds:
        with pytest.raises(ValueError, match=message) as caught, bank.use(kind, mixture=mixture):
            pass
        assert "ExpertBank.use" in str(caught.value) and "'deviation'" in str(caught.value)
    x = torch.randn(2, 1, 8)
    with torch.no_grad(), bank.use("math", mixture=mixture):  # nothing is left behind
        assert bool(torch.isfinite(model(x)).all())


def test_a_merge_that_divides_by_zero_leaves_the_weights():
    model, bank = _setup()
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"ExpertBank\.merge: mixture='authors'.*layer '0'"):
        bank.merge({"math": 0.0}, mixture="authors")
    assert torch.equal(model[0].weight, before)
    bank.merge({"math": 0.5}, mixture="authors")


def test_weights_beyond_fp32_are_refused():
    _, bank = _setup()
    with (
        pytest.raises(ValueError, match="the weight of 'math' is 1e\\+39"),
        bank.use({"math": 1e39}),
    ):
        pass


def test_mixing_on_a_cpu_is_checked_by_itself():
    with pytest.raises(ValueError, match=r"mix: form 'authors' divides by Σ\(σ⊙z\).*row 1"):
        t2k.mix(torch.ones(1, 3), torch.tensor([[1.0], [0.0]]), "authors", torch.ones(3))
    with pytest.raises(ValueError, match=r"mix: form 'paper-normalised' divides by Σα"):
        t2k.mix(torch.ones(2, 3), torch.tensor([[1.0, -1.0]]), "paper-normalised")


@pytest.mark.parametrize("routing", ["math", {"math": 0.5, "code": 0.5}, torch.rand(1, 2)])
def test_a_weight_of_zeros_has_one_z(routing):
    """Any z is the base of a zero matrix; normalising its nuclear norm would divide 0 by 0."""
    model, bank = _setup(zero_layer=True)
    x = torch.randn(2, 1, 8)
    with torch.no_grad(), bank.use(routing, mixture="authors"):
        y = model(x)
    assert bool(torch.isfinite(y).all())
    alpha = torch.rand(2, 2, requires_grad=True)
    with bank.use(alpha, mixture="authors"):
        model(x).square().sum().backward()
    assert bool(torch.isfinite(alpha.grad).all()) and bool(alpha.grad.any())


def test_a_weight_of_zeros_can_be_trained_around():
    model, _ = _setup(zero_layer=True, parametrisation="sigmoid-normalised")
    zs = t2k.trainable(model)
    with torch.no_grad():
        for z in zs:
            z.add_(0.1 * torch.randn(8))
    loss = model(torch.randn(4, 8)).square().sum()
    loss.backward()
    assert bool(torch.isfinite(loss)) and not bool(zs[0].grad.any()) and bool(zs[1].grad.any())
    expert = t2k.Expert.from_model(model)
    assert torch.equal(expert.z["0"], torch.ones(8))
    expert.apply_to(model)
    multiplier = t2k.effective_multiplier(torch.zeros(3), torch.randn(3), "sigmoid-normalised")
    assert torch.equal(multiplier, torch.ones(3))
