"""Blocks of `use` that are left in any order, and several banks on one model."""

import copy

import pytest
import torch
from torch import nn

import t2kernels as t2k

MESSAGE = r"ExpertBank\.use.*left before.*reverse order"


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    t2k.convert(model, progress=False)
    return model


def _bank(model):
    bank = t2k.ExpertBank(model)
    for seed, name in enumerate(("math", "code")):
        gen = torch.Generator().manual_seed(seed)
        bank.add(name, t2k.Expert({n: torch.rand(8, generator=gen) for n in bank.layers}))
    return bank


@pytest.fixture
def bank(model):
    return _bank(model)


X = torch.randn(2, 1, 8)


@torch.no_grad()
def _under(bank, routing):
    with bank.use(routing):
        return bank.model(X)


def _stream(bank, routing):
    with bank.use(routing):
        while True:
            yield bank.model(X)


@torch.no_grad()
def test_blocks_left_in_another_order_leave_nothing_behind(model, bank):
    expected = {name: _under(bank, name) for name in ("math", "code")}
    base = model(X)
    first, second = _stream(bank, "math"), _stream(bank, "code")
    assert torch.equal(next(first), expected["math"])
    assert torch.equal(next(second), expected["code"])
    with pytest.raises(RuntimeError, match=MESSAGE):
        first.close()
    assert torch.equal(next(second), expected["code"])  # the block that is open decides
    half = {"math": 0.5}
    with bank.use(half):
        third = model(X)
    assert torch.equal(next(second), expected["code"])  # whose diagonals were not written over
    second.close()
    assert torch.equal(model(X), base)
    assert torch.equal(_under(bank, half), third)


@torch.no_grad()
def test_an_error_inside_is_not_hidden_by_the_order(model, bank):
    base = model(X)
    outer, inner = bank.use("math"), bank.use("code")
    outer.__enter__()
    inner.__enter__()
    error = KeyError("mine")
    assert not outer.__exit__(KeyError, error, None)
    inner.__exit__(None, None, None)
    assert torch.equal(model(X), base)


@torch.no_grad()
def test_a_copy_made_inside_a_block_starts_outside(model, bank):
    base = model(X)
    with bank.use("math"), bank.use("code"):
        twin = copy.deepcopy(model)
    with _bank(twin).use("math"):
        pass
    assert torch.equal(twin(X), base)


@torch.no_grad()
def test_a_bank_does_not_replace_what_another_merged(model, bank):
    other = _bank(model)
    base = model(X)
    bank.merge("math")
    merged = model(X)
    for routing in ("code", None):
        with pytest.raises(RuntimeError, match=r"another bank.*unmerge\(\)"):
            other.merge(routing)
        assert torch.equal(model(X), merged)
    bank.merge("code")  # its own may be replaced
    assert not torch.equal(model(X), merged)
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="another bank"):
        _bank(twin).merge("math")
    other.unmerge()  # asked for
    assert torch.equal(model(X), base)
    other.merge("math")
    assert torch.equal(model(X), merged)
