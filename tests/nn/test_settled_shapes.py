"""The short way through a layer: shapes, rows and slots, and what it keeps in memory."""

import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import t2kernels as t2k
from t2kernels.ops import native

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


def own(model):
    with torch.no_grad():
        model.proj.z.mul_(1.5)


def test_other_shapes_find_their_rows():
    model, bank = build()
    routing = ["a", None, "b"]
    with torch.no_grad(), bank.use(routing):
        for length in (1, 5, 1, 2):
            x = torch.randn(B, length, N)
            rows = model(x)
            assert torch.equal(model(x), rows)
            for row, name in enumerate(routing):
                with bank.use([name, "b"] if name is None else name):
                    two = x[row : row + 1].expand(2, -1, -1) if name is None else x[row : row + 1]
                    assert torch.equal(model(two)[0], rows[row])
        model(X)
        assert is_short(model.proj)
        with pytest.raises(ValueError, match="not a multiple"):
            model.proj(torch.randn(4, 1, N))
        beams = torch.randn(2 * B, 1, N)
        assert model(beams).shape == (2 * B, 1, M)
        with pytest.raises(ValueError, match="first axis is not the batch"):
            bank.model._t2_route.batch = X
            model.proj(beams)


def test_a_bank_that_is_dropped_takes_its_arena_along():
    model, bank = build()
    with torch.no_grad(), bank.use(["a", None, "b"]):
        model(X)
        assert is_short(model.proj)
        arena = StorageWeakRef(model._t2_route.plan.arena.untyped_storage())
    assert not arena.expired()
    del bank
    gc.collect()
    assert arena.expired()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_dtypes_with_and_without_a_kernel(dtype):
    model, bank = build()
    model.to(dtype)
    with torch.no_grad(), bank.use(["a", None, "b"]):
        y = model(X.to(dtype))
        assert torch.equal(model(X.to(dtype)), y)
        assert is_short(model.proj, X.to(dtype)) is (dtype is torch.float16)


def test_many_shapes_are_forgotten_again():
    model, _ = build()
    own(model)
    with torch.no_grad():
        for length in range(1, 200):
            model.proj(torch.randn(1, length, N))
        assert len(model.proj._settled._product._shapes) <= 64


def test_a_slot_outside_of_the_table_is_named():
    model, bank = build()
    with torch.no_grad(), bank.use(["a", "b", "a"]):
        model(X), model(X)
        settled = model.proj._settled
        settled._slots_of[1].fill_(4096)
        with pytest.raises(ValueError, match="slot"):
            model(X)
