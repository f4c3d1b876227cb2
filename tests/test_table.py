"""Where experts live: growth, reuse, rounding, and the host's memory with a cache on the device."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import t2kernels as t2k
from t2kernels.table import ExpertTable, RowCache

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def make_table(width: int = 5, **options: object) -> ExpertTable:
    given = {"dtype": torch.float32, "host": False, "cache": 4, "capacity": 0, **options}
    return ExpertTable(width, **given)  # type: ignore[arg-type]


def z(seed: int, width: int = 5) -> Tensor:
    return 1 + 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("host", [False, True])
def test_rows_survive_growth_and_are_used_again(host: bool) -> None:
    table = make_table(host=host)
    rows = [table.put(z(i), CPU) for i in range(20)]
    assert rows == list(range(20))
    assert table.nbytes == 32 * 5 * 4
    for row in (3, 11, 7):
        table.remove(row)
    assert len(table) == 17
    assert table.vectors([3, 7, 11], CPU).isnan().all()
    assert [table.put(z(30 + i), CPU) for i in range(4)] == [3, 7, 11, 20]
    expected = [z(i) for i in (0, 30, 31, 19, 33)]
    assert torch.equal(table.vectors([0, 3, 7, 19, 20], CPU), torch.stack(expected))


def test_capacity_is_made_at_once() -> None:
    table = make_table(capacity=100)
    table.put(z(0), CPU)
    before = table._rows.data_ptr()
    for i in range(99):
        table.put(z(i), CPU)
    assert table._rows.data_ptr() == before and table._rows.shape[0] == 100


def test_no_mixture_can_name_a_row_that_was_never_used() -> None:
    table = make_table()
    table.put(z(0), CPU)
    with table.resident([0], CPU) as (Z, places):
        assert Z.shape[0] == 1 and places == [0]


def test_bf16_holds_the_deviation() -> None:
    table = make_table(dtype=BF16)
    table.put(z(0), CPU)
    back = table.vectors([0], CPU)[0]
    assert ((back - z(0)).abs() <= (z(0) - 1).abs() / 256 + 1e-7).all()


def test_cache_keeps_what_was_used_last() -> None:
    table = make_table(host=True, cache=3)
    for i in range(6):
        table.put(z(i), CPU)

    def wanted(*rows: int) -> None:
        with table.resident(rows, CPU) as (Z, places):
            assert Z.data_ptr() == address
            assert torch.equal(Z[places], torch.stack([z(row) for row in rows]))

    address = table._cache_on(CPU).rows.data_ptr()
    cache = table.cache
    assert cache is not None
    wanted(0, 1, 0)
    wanted(2)
    assert (cache.hits, cache.misses) == (0, 3)
    wanted(0)
    wanted(3)  # in the place of 1
    assert (cache.hits, cache.misses) == (1, 4)
    assert [row in cache for row in range(6)] == [True, False, True, True, False, False]
    table.prefetch([5, 4], CPU)  # in the places of 2 and 0
    wanted(4, 5)
    assert (cache.hits, cache.misses) == (3, 4)
    wanted(3, 4, 0)
    with pytest.raises(ValueError, match=r"4 experts are wanted at once.*room for 3"):
        wanted(0, 1, 2, 3)


def test_an_expert_that_changes_leaves_the_cache() -> None:
    table = make_table(host=True, cache=2)
    for i in range(3):
        table.put(z(i), CPU)
    table.prefetch([0, 1], CPU)
    table.put(z(9), CPU, 1)
    with table.resident([1, 0], CPU) as (Z, places):
        assert torch.equal(Z[places], torch.stack([z(9), z(0)]))
    table.remove(0)
    assert table.cache is not None and 0 not in table.cache
    assert table.put(z(8), CPU) == 0
    with table.resident([0, 1], CPU) as (Z, places):
        assert sorted(places) == [0, 1]
        assert torch.equal(Z[places], torch.stack([z(8), z(9)]))


def test_a_place_of_the_cache_is_never_given_twice() -> None:
    cache, table = RowCache(torch.empty(4, 2)), torch.arange(40.0).view(20, 2)
    gen = torch.Generator().manual_seed(0)
    for step in range(300):
        rows = torch.randint(0, 20, (4,), generator=gen).tolist()
        with cache.holding(table, rows) as places:
            assert torch.equal(cache.rows[places], table[rows])
        assert len(set(cache._places.values())) == len(cache._places) <= 4
        if step % 3 == 0:
            cache.forget(rows[0])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": torch.float16}, TypeError, "dtype must be one of"),
        ({"host": "yes"}, TypeError, "host must be True or False, got 'yes'"),
        ({"cache": 0}, ValueError, "cache must be an int of at least 1"),
        ({"capacity": -1}, ValueError, "capacity must be an int of at least 0"),
        ({"capacity": True}, ValueError, "capacity must be an int"),
    ],
)
def test_wrong_options(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        t2k.ExpertBank(make_model(), **options)  # type: ignore[arg-type]


# -- through the bank ---------------------------------------------------------------------------


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    t2k.convert(model, progress=False)
    return model


def expert(seed: int, **more: object) -> t2k.Expert:
    gen = torch.Generator().manual_seed(seed)
    z = {name: 1 + 0.2 * torch.randn(8, generator=gen) for name in ("0", "2")}
    return t2k.Expert(z, **more)  # type: ignore[arg-type]


def outputs(bank: t2k.ExpertBank, routing: object, **more: object) -> Tensor:
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), bank.use(routing, **more):  # type: ignore[arg-type]
        y: Tensor = bank.model(x)
    return y


ROUTINGS = [
    ["e1", None, {"e0": 0.5, "e3": -2.0}],
    {"e2": 1.0, "e0": 0.25},
    torch.tensor([[0.5, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.1, 0.0, 0.0]]),
    torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(1)),
]


@pytest.mark.parametrize("mixture", ["deviation", "paper", "paper-normalised", "authors"])
@pytest.mark.parametrize("host", [False, True])
def test_where_experts_live_changes_no_bit(host: bool, mixture: str) -> None:
    plain, other = t2k.ExpertBank(make_model()), t2k.ExpertBank(make_model(), host=host)
    other.add("gone", expert(7))
    for bank in (plain, other):
        for i in range(4):
            bank.add(f"e{i}", expert(i))
    other.remove("gone")  # its row is free: the order of the bank is not that of the rows
    other.remove("e3")
    other.add("e3", expert(3))
    assert [other._entries[n].row for n in other.names] == [1, 2, 3, 0]
    routings = ROUTINGS if mixture == "deviation" else [ROUTINGS[1], ROUTINGS[3]]
    for routing in routings:
        new = outputs(other, routing, mixture=mixture)
        assert torch.equal(new, outputs(plain, routing, mixture=mixture))
    for bank in (plain, other):
        bank.merge({"e3": 0.5, "e1": 0.7}, mixture=mixture)
    assert torch.equal(plain.model[0].weight, other.model[0].weight)


def test_mixing_has_the_bits_of_the_equation_in_torch() -> None:
    bank = t2k.ExpertBank(make_model())
    for i in range(4):
        bank.add(f"e{i}", expert(i))
    weights = {"e3": 0.3, "e0": -1.7, "e2": 1e-3}
    S = torch.cat([layer.factors.S for layer in t2k.svf_layers(bank.model).values()])
    Z = torch.stack([torch.cat(list(expert(i).z.values())) for i in (0, 2, 3)])
    expected = S * t2k.mix(Z, torch.tensor([[-1.7, 1e-3, 0.3]]))[0]
    with bank.use(weights):
        plan = bank._route.plan
        assert plan is not None and plan.arena is not None
        assert torch.equal(plan.arena[0], expected)


def test_sigma_that_changes_is_seen() -> None:
    bank = t2k.ExpertBank(make_model())
    bank.add("e0", expert(0))
    before = outputs(bank, "e0")
    for layer in t2k.svf_layers(bank.model).values():
        layer.factors.S.mul_(2.0)
    assert not torch.allclose(outputs(bank, "e0"), before)


def test_a_bf16_bank_keeps_no_other_copy(tmp_path: Path) -> None:
    exact, bank = (t2k.ExpertBank(make_model(), dtype=d) for d in (torch.float32, BF16))
    prints = {name: layer.fingerprint for name, layer in t2k.svf_layers(bank.model).items()}
    for b in (exact, bank):
        for i in range(3):
            b.add(f"e{i}", expert(i, fingerprints=dict(prints), description=f"number {i}"))
    entries = list(bank._entries.values())
    assert all(not e.expert.z for e in entries)
    assert all(e.expert.fingerprints is entries[0].expert.fingerprints for e in entries)
    back = bank["e1"]
    assert back.description == "number 1" and back.fingerprints == prints
    assert back.fingerprints is not entries[0].expert.fingerprints
    for name, values in expert(1).z.items():
        assert ((back.z[name] - values).abs() <= (values - 1).abs() / 256 + 1e-7).all()
    difference = outputs(bank, ["e1", "e0", {"e2": 0.5}]) - outputs(
        exact, ["e1", "e0", {"e2": 0.5}]
    )
    assert 0 < difference.abs().max() < 1e-2
    bank.save(tmp_path)
    again = t2k.ExpertBank(make_model(), dtype=BF16)
    assert again.load(tmp_path) == ["e0", "e1", "e2"]
    assert torch.equal(outputs(again, ["e1", "e0", "e2"]), outputs(bank, ["e1", "e0", "e2"]))


def test_an_expert_of_some_layers_comes_back_as_such() -> None:
    bank = t2k.ExpertBank(make_model(), dtype=BF16)
    bank.add("half", t2k.Expert({"2": torch.full((8,), 1.5)}))
    assert list(bank["half"].z) == ["2"]
    assert torch.equal(bank["half"].z["2"], torch.full((8,), 1.5))


def test_an_expert_that_is_replaced_keeps_its_place() -> None:
    bank = t2k.ExpertBank(make_model())
    for i in range(3):
        bank.add(f"e{i}", expert(i))
    bank.add("e0", expert(9), overwrite=True)
    assert bank.names == ["e0", "e1", "e2"]
    assert torch.equal(outputs(bank, "e0"), outputs(bank, torch.tensor([[1.0, 0.0, 0.0]])))
    fresh = t2k.ExpertBank(bank.model)
    fresh.add("x", expert(9))
    assert torch.equal(outputs(bank, "e0"), outputs(fresh, "x"))


def test_a_thousand_experts_are_named_and_mixed() -> None:
    bank = t2k.ExpertBank(make_model(), dtype=BF16, host=True, cache=8)
    for i in range(1000):
        bank.add(f"e{i}", expert(i))
    bank.prefetch(["e999", "e5"])
    bank.prefetch("e7")
    cache = bank._table.cache
    assert cache is not None and len([r for r in range(1000) if r in cache]) == 3
    routing = ["e999", {"e5": 1.0, "e7": 0.5}, None]
    few = t2k.ExpertBank(bank.model, dtype=BF16)
    for i in (5, 7, 999):
        few.add(f"e{i}", expert(i))
    assert torch.equal(outputs(bank, routing), outputs(few, routing))
    assert (cache.hits, cache.misses) == (3, 0)
    with pytest.raises(KeyError, match=r"'e1000'; the bank has 1000 experts\. Did you mean 'e100"):
        bank.prefetch(["e1000"])
    assert "1000 experts" in repr(bank)


def test_a_copy_is_a_bank_of_its_own() -> None:
    bank = t2k.ExpertBank(make_model(), host=True, cache=2)
    bank.add("e0", expert(0))
    slots = bank.slots(2)
    slots.admit(0, "e0")
    other, other_slots = copy.deepcopy((bank, slots))
    other.add("e0", expert(1), overwrite=True)
    other_slots.admit(0, "e0")
    bank.remove("e0")
    fresh = t2k.ExpertBank(make_model())
    for i in range(2):
        fresh.add(f"e{i}", expert(i))
    assert torch.equal(outputs(other, ["e0", "e0", None]), outputs(fresh, ["e1", "e1", None]))
    assert not torch.equal(slots.arena[0], other_slots.arena[0])
    with torch.no_grad(), slots.use(2), other_slots.use(2):  # two models, two routings
        assert bank._route.plan is not None and other._route.plan is not None
        assert bank._route.plan.arena is slots.arena
        assert other._route.plan.arena is other_slots.arena
