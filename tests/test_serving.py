"""Slots: what a batch computes under them, what stays where it is, and what is refused."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import t2kernels as t2k
from t2kernels.streams import ThreadOrder


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture
def bank() -> t2k.ExpertBank:
    torch.manual_seed(0)
    model = Tiny().eval()
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    gen = torch.Generator().manual_seed(1)
    for name in ("math", "code", "prose"):
        bank.add(
            name, t2k.Expert({n: 1 + 0.5 * torch.randn(8, generator=gen) for n in bank.layers})
        )
    return bank


X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def served(bank: t2k.ExpertBank, slots: t2k.Slots, x: Tensor = X) -> Tensor:
    with slots.use(len(x)):
        y: Tensor = bank.model(x)
    return y


@torch.no_grad()
def used(bank: t2k.ExpertBank, routing: Any, x: Tensor = X, **more: Any) -> Tensor:
    with bank.use(routing, **more):
        y: Tensor = bank.model(x)
    return y


MIXTURES = ["math", {"code": 0.7, "prose": -0.3}, None, {"prose": 1.0, "math": 1.0, "code": 0.5}]


def test_the_same_bits_as_use(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(8, batch=4)
    for slot, mixture in zip((6, 0, 3, 2), MIXTURES):
        slots.admit(slot, mixture)
    slots.assign([6, 0, None, 2])
    expected = used(bank, MIXTURES)
    assert torch.equal(served(bank, slots), expected)
    slots.assign([6, 0, 3, 2])  # None in a slot is σ, as the base is
    assert torch.equal(served(bank, slots), expected)
    slots.assign([2, 2, -1, 6])
    mixed = [MIXTURES[3], MIXTURES[3], None, MIXTURES[0]]
    assert torch.equal(served(bank, slots), used(bank, mixed))


@pytest.mark.parametrize("form", ["paper", "paper-normalised", "authors"])
def test_every_form_of_mixture(bank: t2k.ExpertBank, form: str) -> None:
    slots = bank.slots(2)
    slots.admit(0, {"math": 0.4, "prose": 0.9}, mixture=form)
    slots.admit(1, None, mixture=form)
    slots.assign([0, 1])
    expected = used(bank, [{"math": 0.4, "prose": 0.9}, None], X[:2], mixture=form)
    assert torch.equal(served(bank, slots, X[:2]), expected)
    with pytest.raises(ValueError, match=r"Slots\.admit: mixture='paper-normalised' divides by Σα"):
        slots.admit(0, {"math": 1.0, "code": -1.0}, mixture="paper-normalised")


@pytest.mark.parametrize("form", ["deviation", "authors"])
@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
def test_weights_as_a_tensor(bank: t2k.ExpertBank, shape: tuple[int, ...], form: str) -> None:
    slots, alpha = bank.slots(3), 0.2 + torch.rand(shape)
    slots.admit(1, alpha, mixture=form)
    slots.assign([1, 1])
    x = X[:2]
    expected = used(bank, torch.stack([alpha, alpha]), x, mixture=form)
    assert torch.equal(served(bank, slots, x), expected)


def test_admission_touches_no_other_slot(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(5)
    assert slots.arena.isnan().all()
    slots.admit(2, "math")
    before = slots.arena.clone()
    slots.admit(4, {"code": 0.5})
    slots.admit(0, torch.rand(2, 3))
    changed = (slots.arena != before) & ~(slots.arena.isnan() & before.isnan())
    assert changed.any(1).tolist() == [True, False, False, False, True]
    assert torch.equal(slots.arena[2], before[2])
    assert slots.free == [1, 3]


@pytest.mark.parametrize("form", ["deviation", "authors"])
def test_several_admissions_at_once(bank: t2k.ExpertBank, form: str) -> None:
    together, alone = bank.slots(6), bank.slots(6)
    routings = {4: "math", 0: None, 5: {"code": 0.7, "prose": -0.3}, 2: {"prose": 1.0}}
    together.admit_all(routings, mixture=form)
    for slot, routing in routings.items():
        alone.admit(slot, routing, mixture=form)
    assert torch.equal(together.arena.nan_to_num(7.0), alone.arena.nan_to_num(7.0))
    assert together.free == [1, 3]
    before = together.arena.clone()
    together.admit_all({})
    with pytest.raises(KeyError, match="no expert named 'maths'"):
        together.admit_all({1: "math", 3: "maths"})
    assert torch.equal(together.arena.nan_to_num(7.0), before.nan_to_num(7.0))
    assert together.free == [1, 3]


def test_addresses_and_plans_never_change(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(4)
    with slots.use(3):
        plan = bank._route.plan
    assert plan is not None and plan.rows is not None and plan.arena is slots.arena
    addresses = slots.arena.data_ptr(), slots.rows.data_ptr(), plan.rows.data_ptr()
    for slot, mixture in enumerate(MIXTURES):
        slots.admit(slot, mixture)
        slots.assign([slot] * 4)
        slots.assign([slot])
    assert slots.plan(3) is plan
    assert addresses == (slots.arena.data_ptr(), slots.rows.data_ptr(), plan.rows.data_ptr())
    assert slots.rows.tolist() == [3, -1, -1, -1] == slots.assigned


def test_a_new_routing_inside_the_block_is_seen(bank: t2k.ExpertBank) -> None:
    """Decode (one token a row: ``rows`` itself) and prefill (repeated rows, written in place)."""
    slots = bank.slots(4)
    slots.admit(0, "math")
    slots.admit(1, "code")
    with torch.no_grad(), slots.use(2):
        plan = bank._route.plan
        assert plan is not None
        for x in (X[:2], X[:2, :1]):
            places = plan.token_slots(x, None).data_ptr()
            for rows, mixtures in (([0, 1], ["math", "code"]), ([1, None], ["code", None])):
                slots.assign(rows)
                assert torch.equal(bank.model(x), used(bank, mixtures, x))
                assert plan.token_slots(x, None).data_ptr() == places
        assert plan.token_slots(X[:2, :1], None).data_ptr() == slots.rows.data_ptr()


def test_a_new_expert_under_an_old_name_needs_a_new_admission(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(2)
    slots.admit(0, "math")
    slots.assign([0, 0])
    before = served(bank, slots, X[:2])
    bank.add("math", bank["code"], overwrite=True)
    bank.remove("prose")
    assert torch.equal(served(bank, slots, X[:2]), before)
    slots.admit(0, "math")
    assert torch.equal(served(bank, slots, X[:2]), used(bank, ["code", "code"], X[:2]))


def test_a_compiled_model_serves_every_slot_with_one_graph(bank: t2k.ExpertBank) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    slots = bank.slots(3)
    compiled = torch.compile(bank.model, backend=backend, fullgraph=True)
    with torch.no_grad(), slots.use(2):
        for mixtures in (["math", "code"], [{"prose": 0.5}, None]):
            for slot, mixture in enumerate(mixtures):
                slots.admit(slot, mixture)
            slots.assign([0, 1])
            torch.testing.assert_close(compiled(X[:2]), used(bank, mixtures, X[:2]))
    assert len(graphs) == 1


def test_inference_mode(bank: t2k.ExpertBank) -> None:
    with torch.inference_mode():
        slots = bank.slots(2)
        slots.admit(0, "math")
        slots.assign([0])
        y = served(bank, slots, X[:1])
    slots.admit(0, "math")
    slots.assign([0])
    assert torch.equal(served(bank, slots, X[:1]), y)


def test_release(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(2)
    slots.admit(1, "math")
    slots.assign([None, 1])
    with pytest.raises(ValueError, match=r"Slots\.release: row 1 is assigned to slot 1"):
        slots.release(1)
    slots.assign([])
    slots.release(1)
    assert slots.arena.isnan().all() and slots.free == [0, 1]
    with pytest.raises(ValueError, match="nobody was admitted to slot 1"):
        slots.release(1)
    with pytest.raises(ValueError, match=r"row 0 names slot 1, to which nobody was admitted"):
        slots.assign([1])


WRONG: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("admit", (2, "math"), ValueError, r"slot must lie in \[0, 2\), got 2"),
    ("admit", (-1, "math"), ValueError, r"slot must lie in \[0, 2\), got -1"),
    ("admit", (True, "math"), TypeError, "slot must be an int, got bool"),
    ("admit", (0, "maths"), KeyError, "Did you mean 'math'"),
    ("admit", (0, ["math"]), TypeError, "must be a name"),
    ("admit", (0, {"math": float("inf")}), ValueError, "finite"),
    ("admit", (0, torch.ones(2)), ValueError, r"\(K,\) = \(3,\) or \(L, K\) = \(2, 3\)"),
    ("admit", (0, torch.ones(3).long()), ValueError, "float tensor"),
    ("admit", (0, torch.full((3,), float("nan"))), ValueError, "must be finite"),
    ("admit_all", ({2: "math"},), ValueError, r"slot must lie in \[0, 2\), got 2"),
    ("admit_all", (["math"],), TypeError, r"expected {slot: routing}, got list"),
    ("release", ("0",), TypeError, "slot must be an int, got str"),
    ("admit", (10**9000, "math"), ValueError, r"got an int of 29898 bits"),
    ("admit", (torch.tensor(0), "math"), TypeError, "slot must be an int, got Tensor"),
    ("admit", ([0], "math"), TypeError, "slot must be an int, got list"),
    ("admit", (0, {"math": 10**9000}), ValueError, r"Slots\.admit: .* is an int of 29898 bits;"),
    ("admit", (0, {"math": "1"}), TypeError, r"Slots\.admit: the weight of 'math' must be"),
    ("admit", (0, 3), TypeError, r"Slots\.admit: a request's entry must be"),
    ("assign", ([10**9000],), ValueError, "names slot an int of 29898 bits, to which nobody"),
    ("assign", ([0.0],), TypeError, "row 0 must be an int or None, got 0.0"),
    ("assign", ([0, 0, 0],), ValueError, "3 rows, but the batch has at most 2"),
    ("assign", (["math"],), TypeError, "row 0 must be an int or None, got 'math'"),
    ("assign", (torch.zeros(2),), TypeError, "expected a list"),
    ("assign", (3,), TypeError, "expected a list"),
    ("plan", (3,), ValueError, "batch must be an int from 1 to 2, got 3"),
    ("plan", (0,), ValueError, "batch must be an int from 1 to 2, got 0"),
]


@pytest.mark.parametrize(("method", "given", "error", "words"), WRONG)
def test_wrong_use(
    bank: t2k.ExpertBank, method: str, given: Any, error: type[Exception], words: str
) -> None:
    slots = bank.slots(2)
    slots.admit(0, "code")
    slots.assign([0])
    arena, rows = slots.arena.clone(), slots.rows.clone()
    with pytest.raises(error, match=words):
        getattr(slots, method)(*given)
    assert torch.equal(slots.arena.nan_to_num(), arena.nan_to_num())
    assert torch.equal(slots.rows, rows) and slots.assigned == [0, -1] and slots.free == [1]


@pytest.mark.parametrize("given", [(0,), (2, 0), (True,), (2.0,)])
def test_wrong_sizes(bank: t2k.ExpertBank, given: Any) -> None:
    with pytest.raises(ValueError, match=r"ExpertBank\.slots: (count|batch) must be an int ≥ 1"):
        bank.slots(*given)


def test_wrong_form_and_a_batch_of_another_size(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(2)
    with pytest.raises(ValueError, match="mixture must be one of"):
        slots.admit(0, "math", mixture="sum")
    with slots.use(2), pytest.raises(ValueError, match="2 requests, but"):
        bank.model(X[:3])


def test_merged_and_reverted_models_are_refused(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(2)
    bank.merge("math")
    with pytest.raises(RuntimeError, match=r"Slots\.use: an expert is merged"), slots.use():
        pass
    bank.unmerge()
    t2k.revert(bank.model)
    calls = [
        lambda: slots.admit(0, "math"), lambda: slots.assign([]), lambda: slots.release(0),
        lambda: slots.use().__enter__(),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match="was reverted"):
            call()


def test_a_model_that_was_moved_needs_new_slots(
    bank: t2k.ExpertBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = bank.slots(2)
    meta = property(lambda self: torch.device("meta"))
    monkeypatch.setattr(type(bank._mixer), "device", meta)
    with pytest.raises(RuntimeError, match=r"Slots\.admit: the model is on meta, these slots.*cpu"):
        slots.admit(0, "math")


def test_caches_are_tied_to_the_slots_not_to_who_sits_in_them(bank: t2k.ExpertBank) -> None:
    class Cache:
        def get_seq_length(self) -> int:
            return 3

    class WithCache(Tiny):
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            return super().forward(x)

    model = WithCache()
    t2k.convert(model, progress=False)
    own = t2k.ExpertBank(model)
    own.add("math", bank["math"])
    slots, others, cache = own.slots(2), own.slots(2), Cache()
    cache._t2_key = slots.plan(1).key  # type: ignore[attr-defined]
    with slots.use(2):
        model(X[:2], cache=cache)
    slots.admit(0, "math")
    slots.assign([0])
    with slots.use(1):
        model(X[:1], cache=cache)
    for block in (others.use(1), own.use("math")):
        with block, pytest.raises(RuntimeError, match="under other experts"):
            model(X[:1], cache=cache)


def test_a_step_in_progress_sees_no_write_of_another_thread(bank: t2k.ExpertBank) -> None:
    """Else the first layer would be computed under one expert and the second under another."""
    slots, threads = bank.slots(2), []
    slots.admit_all({0: "math", 1: "code"})
    slots.assign([0])

    def write(*_: Any) -> None:
        threads.append(threading.Thread(target=slots.assign, args=([1],)))
        threads.append(threading.Thread(target=slots.admit, args=(0, "prose")))
        for thread in threads:
            thread.start()
            thread.join(0.2)

    handle = bank.model.down.register_forward_pre_hook(write)
    y = served(bank, slots, X[:1])
    handle.remove()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(y, used(bank, "math", X[:1]))
    assert slots.assigned == [1, -1]
    torch.testing.assert_close(served(bank, slots, X[:1]), used(bank, "code", X[:1]))
    slots.assign([0])
    torch.testing.assert_close(served(bank, slots, X[:1]), used(bank, "prose", X[:1]))


def test_a_thread_that_waits_in_vain_says_what_to_do(
    bank: t2k.ExpertBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ThreadOrder, "PATIENCE", 0.05)
    slots, failed = bank.slots(2), []

    def assign() -> None:
        try:
            slots.assign([None])
        except RuntimeError as error:
            failed.append(str(error))

    with slots.use(1):
        slots.admit(0, "math")  # the thread that is inside may
        thread = threading.Thread(target=assign)
        thread.start()
        thread.join()
    assert len(failed) == 1
    assert re.match(r"Slots\.assign: waited 0.05 seconds .* between steps, or", failed[0])
    slots.assign([0])  # nothing is left behind
    assert served(bank, slots, X[:1]).isfinite().all()


def test_the_example_of_the_docs_runs_as_printed() -> None:
    transformers = pytest.importorskip("transformers", reason="the example calls such a model")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for name in ("math", "code"):
        bank.add(name, t2k.Expert({n: torch.rand(m.rank) for n, m in bank._layers.items()}))
    ids = torch.randint(1, 40, (3, 4))
    names: dict[str, Any] = {"bank": bank, "model": model, "ids": ids, "cache": None}
    docs = Path(__file__).parent.parent / "docs" / "serving.md"
    block = next(re.finditer(r"```python\n(.*?)```", docs.read_text(encoding="utf-8"), re.S))[1]
    with torch.no_grad():
        exec(block, names)
        with bank.use([{"math": 0.7, "code": 0.3}, None, "code"]):
            expected = model(ids).logits
    torch.testing.assert_close(names["logits"], expected)
    assert names["slots"].assigned[:3] == [2, 5, -1] and 7 in names["slots"].free


def test_numbers_of_slots_may_be_numpys(bank: t2k.ExpertBank) -> None:
    slots = bank.slots(3)
    slots.admit(numpy.int64(2), "math")
    slots.assign([numpy.int32(2), None])
    assert slots.assigned == [2, -1, -1] and type(slots.assigned[0]) is int
    slots.assign([])
    slots.release(numpy.uint8(2))
    assert slots.free == [0, 1, 2]


def test_threads_admit_side_by_side(bank: t2k.ExpertBank) -> None:
    slots, failed = bank.slots(32), []

    def admit(first: int) -> None:
        try:
            for slot in range(first, 32, 4):
                slots.admit(slot, {"math": slot / 10, "code": 1.0})
                slots.release(slot)
                slots.admit(slot, {"math": slot / 10})
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=admit, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = bank.slots(1)
    assert not failed and not slots.free
    for slot in range(32):
        alone.admit(0, {"math": slot / 10})
        assert torch.equal(slots.arena[slot], alone.arena[0])
