"""StepGraphs with a graph for the CPU in the place of CUDA's: what is captured, what a replay sees.

The stand-in writes down the operations of a capture with the very tensors they were given, and a
replay runs these again: no Python of the model, no routing object, the same addresses. That is
what a CUDA graph does; tests/gpu/test_graphs.py has the real one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import t2kernels as t2k
from t2kernels import graphs as module
from t2kernels.ops import cuda_forms
from t2kernels.ops.cuda_forms import Barriers

CPU = torch.device("cpu")


class Recording(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class CPUGraph:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, before in self.calls:
            given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if is_tensor(t)}
            for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs))):
                # A view, or a write in place, is where it was.
                if is_tensor(old) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class FakeCUDA:
    """What graphs.py uses of torch.cuda."""

    CUDAGraph = CPUGraph

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capturing = False

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.log.append("current waits"))

    def Stream(self, device: torch.device) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.log.append("side waits"))

    def graph_pool_handle(self) -> str:
        return "pool"

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append("warm-up")
        yield

    @contextmanager
    def graph(self, graph: CPUGraph, *, pool: str, stream: Any) -> Iterator[None]:
        assert pool == "pool"
        self.log.append("capture")
        self.capturing = True
        try:
            with Recording(graph.calls):
                yield
        finally:
            self.capturing = False


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCUDA:
    fake = FakeCUDA()
    monkeypatch.setattr(module, "_cuda", fake)
    monkeypatch.setattr(module, "_DEVICE", "cpu")
    return fake


class Tiny(nn.Module):
    """Tokens in, logits out; Python that ran at replay would show in ``calls``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 11)
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return self.down(torch.tanh(self.up(self.embed(ids))))


@pytest.fixture
def bank() -> t2k.ExpertBank:
    torch.manual_seed(0)
    model = Tiny().eval()
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    gen = torch.Generator().manual_seed(1)
    for name in ("math", "code"):
        z = {n: 1 + 0.5 * torch.randn(m.rank, generator=gen) for n, m in bank._layers.items()}
        bank.add(name, t2k.Expert(z))
    return bank


IDS = torch.randint(0, 11, (8, 1), generator=torch.Generator().manual_seed(2))


def make(bank: t2k.ExpertBank, slots: t2k.Slots | None, **more: Any) -> t2k.StepGraphs:
    given = {"batches": (4, 2), "slots": slots, **more}
    return t2k.StepGraphs(lambda ids: bank.model(ids), {"ids": IDS[:1]}, **given)


def eager(bank: t2k.ExpertBank, routing: Any, ids: Tensor) -> Tensor:
    with torch.no_grad(), bank.use(routing):
        y: Tensor = bank.model(ids)
    return y


def test_a_replay_sees_every_new_routing_mixture_and_expert(
    bank: t2k.ExpertBank, cuda: FakeCUDA
) -> None:
    slots = bank.slots(4)
    graphs = make(bank, slots)
    calls = bank.model.calls
    assert (graphs.batches, calls) == ((2, 4), 2 * 3)

    def check(routing: list[Any], ids: Tensor) -> None:
        before = bank.model.calls
        y = graphs(ids=ids)
        assert bank.model.calls == before, "Python ran"
        torch.testing.assert_close(y, eager(bank, routing, ids))

    check([None, None], IDS[:2])
    slots.admit(0, "math")
    slots.admit(3, {"math": 0.5, "code": 0.5})
    slots.assign([3, None, 0])
    check([{"math": 0.5, "code": 0.5}, None, "math"], IDS[:3])
    slots.assign([0, 0, 3, None])
    check(["math", "math", {"math": 0.5, "code": 0.5}, None], IDS[3:7])
    slots.admit(3, {"code": -1.0})
    check(["math", "math", {"code": -1.0}, None], IDS[3:7])
    bank.add("new", t2k.Expert({"up": torch.full((8,), 2.0)}))
    slots.admit(3, "new")
    slots.assign([3, 0])
    check(["new", "math"], IDS[:2])
    assert [graph.replays for graph in graphs._graphs.values()] == [3, 2]


def test_prefill_of_several_tokens_a_row(bank: t2k.ExpertBank, cuda: FakeCUDA) -> None:
    """The repeated rows of the plan are written in place by ``assign``."""
    slots, ids = bank.slots(2), IDS.view(2, 4)
    graphs = t2k.StepGraphs(bank.model, {"ids": ids}, batches=(2,), slots=slots)
    slots.admit(0, "math")
    slots.admit(1, "code")
    for rows, routing in (([0, 1], ["math", "code"]), ([1, None], ["code", None])):
        slots.assign(rows)
        torch.testing.assert_close(graphs(ids=ids), eager(bank, routing, ids))


def test_the_smallest_graph_that_holds_the_rows(bank: t2k.ExpertBank, cuda: FakeCUDA) -> None:
    graphs = make(bank, None, batches=[1, 4, 2, 2], padding={"ids": 7})
    assert graphs.batches == (1, 2, 4)
    for rows, batch in ((1, 1), (2, 2), (3, 4), (4, 4)):
        before = graphs._graphs[batch].replays
        y = graphs(ids=IDS[:rows])
        assert graphs._graphs[batch].replays == before + 1
        assert y.shape == (rows, 1, 11)
        assert y.data_ptr() == graphs.outputs[batch].data_ptr()
        torch.testing.assert_close(y, eager(bank, None, IDS[:rows]))
    graphs(ids=IDS[:3])
    assert graphs.inputs["ids"].tolist() == [*IDS[:3].tolist(), [7]]
    graphs.inputs["ids"].copy_(IDS[4:])
    torch.testing.assert_close(graphs.replay(4), eager(bank, None, IDS[4:]))


def test_warm_up_comes_before_each_capture(bank: t2k.ExpertBank, cuda: FakeCUDA) -> None:
    """The counters of the cooperative kernel can only be made outside of a capture."""
    barriers, addresses = Barriers(), []

    def step(ids: Tensor) -> Tensor:
        addresses.append(barriers.address(CPU, 0, 5, cuda.capturing))
        return ids + 1

    t2k.StepGraphs(step, {"ids": IDS}, batches=(1, 2), warmup=3)
    assert cuda.log == ["side waits", "warm-up", "capture", "current waits"] * 2
    # The stream's own in every warm-up; one for each capture.
    assert len(addresses) == 8 and len(set(addresses)) == 3


def test_shared_inputs_and_outputs_of_every_kind(cuda: FakeCUDA) -> None:
    def step(x: Tensor, at: Tensor) -> dict[str, Any]:
        return {"sum": x + at, "pair": (x * 2, [at + 1]), "word": "same"}

    x, at = torch.arange(3.0).view(3, 1), torch.tensor([10.0, 20.0])
    graphs = t2k.StepGraphs(step, {"x": x, "at": at}, batches=(4,), shared=["at"])
    out = graphs(x=x, at=at + 1)
    assert out["sum"].tolist() == (x + at + 1).tolist()
    assert out["pair"][0].shape == (3, 1) and out["word"] == "same"
    assert out["pair"][1][0].tolist() == [12.0, 22.0]


class Named(NamedTuple):
    logits: Tensor
    count: int


@dataclass(frozen=True)
class Plain:
    logits: Tensor
    cache: object = None


def test_outputs_keep_their_types(cuda: FakeCUDA) -> None:
    outputs = pytest.importorskip("transformers").modeling_outputs
    caches = object()

    def step(x: Tensor) -> dict[str, Any]:
        return {
            "named": Named(x * 2, 3),
            "model": outputs.CausalLMOutputWithPast(logits=x * 3, past_key_values=caches),
            "plain": Plain(x * 4, caches),
            "topk": x.topk(1),
            "default": defaultdict(list, a=[x]),
        }

    x = torch.arange(3.0).view(3, 1)
    graphs = t2k.StepGraphs(step, {"x": x}, batches=(4,))
    out = graphs(x=x)
    assert type(out["named"]) is Named and out["named"].count == 3
    assert torch.equal(out["named"].logits, x * 2)
    assert type(out["model"]) is outputs.CausalLMOutputWithPast
    assert torch.equal(out["model"].logits, x * 3) and torch.equal(out["model"]["logits"], x * 3)
    assert out["model"].past_key_values is caches and out["model"].loss is None
    assert type(out["plain"]) is Plain and out["plain"].cache is caches
    assert torch.equal(out["plain"].logits, x * 4)
    assert torch.equal(out["topk"].values, x)
    assert out["default"]["b"] == [] and torch.equal(out["default"]["a"][0], x)
    assert graphs.outputs[4]["model"].logits.shape == (4, 1), "a call changed the whole outputs"


def test_the_example_of_the_docs_runs_as_printed(cuda: FakeCUDA) -> None:
    transformers = pytest.importorskip("transformers", reason="the example calls such a model")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    bank.add("math", t2k.Expert({n: torch.rand(m.rank) for n, m in bank._layers.items()}))
    slots = bank.slots(64, batch=32)
    slots.admit(5, "math")
    slots.assign([5, None, 5])
    caches = {n: transformers.StaticCache(config=config, max_cache_len=4) for n in (1, 8, 32)}
    zero = torch.zeros(3, 1, dtype=torch.int64)
    names: dict[str, Any] = {
        "t2k": t2k, "model": model, "caches": caches, "slots": slots,
        "ids": torch.randint(1, 40, (3, 1)), "pos": zero, "at": zero[0],
    }  # fmt: skip
    docs = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", docs, re.S) if "StepGraphs" in b]
    exec(block, names)
    expected = eager_llama(bank, ["math", None, "math"], names["ids"])
    torch.testing.assert_close(names["logits"], expected)


@torch.no_grad()
def eager_llama(bank: t2k.ExpertBank, routing: Any, ids: Tensor) -> Tensor:
    with bank.use(routing):
        y: Tensor = bank.model(ids).logits
    return y


@pytest.mark.parametrize("end", ["close", "forget"])
def test_counters_of_captured_calls_are_given_back(
    cuda: FakeCUDA, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(Barriers, "CAPACITY", 6)
    barriers = Barriers()
    monkeypatch.setattr(cuda_forms, "barriers", barriers)
    seen = []

    def step(ids: Tensor) -> Tensor:
        address = barriers.address(CPU, 0, 5, cuda.capturing)
        if cuda.capturing:
            seen.append(address)
        return ids + 1

    held = t2k.StepGraphs(step, {"ids": IDS}, batches=(1,))
    for _ in range(9):
        graphs = t2k.StepGraphs(step, {"ids": IDS}, batches=(1, 2))
        if end == "close":
            graphs.close()
            graphs.close()
            with pytest.raises(RuntimeError, match="StepGraphs: closed"):
                graphs(ids=IDS[:1])
            with pytest.raises(RuntimeError, match="StepGraphs: closed"):
                graphs.replay(1)
        del graphs
    assert seen[0] not in seen[1:], "those of a graph that is there were given away"
    assert all(a != b for a, b in zip(seen[1::2], seen[2::2]))
    assert held(ids=IDS[:1]).tolist() == (IDS[:1] + 1).tolist()


def test_counters_of_a_capture_by_hand_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Barriers, "CAPACITY", 2)
    barriers = Barriers()
    barriers.address(CPU, 0, 5, False)
    barriers.address(CPU, 0, 5, True)
    with barriers.noted() as counters, pytest.raises(RuntimeError, match="close"):
        barriers.address(CPU, 0, 5, True)
    assert counters == []


WRONG_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, r"expected the inputs \['ids'\], got \[\]"),
    ({"idx": IDS}, ValueError, r"got \['idx'\]"),
    ({"ids": IDS.int()}, TypeError, "ids must be torch.int64, got torch.int32"),
    ({"ids": [1]}, TypeError, "ids must be torch.int64, got list"),
    ({"ids": IDS[:2, 0]}, ValueError, r"ids must have shape \('rows', 1\), got \(2,\)"),
    ({"ids": IDS.view(4, 2)}, ValueError, r"got \(4, 2\)"),
    ({"ids": IDS}, ValueError, "1 to 4 rows, got 8"),
    ({"ids": IDS[:0]}, ValueError, "1 to 4 rows, got 0"),
]


@pytest.mark.parametrize(("given", "error", "words"), WRONG_CALLS)
def test_wrong_calls(
    bank: t2k.ExpertBank, cuda: FakeCUDA, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    graphs = make(bank, None)
    with pytest.raises(error, match=words):
        graphs(**given)
    with pytest.raises(ValueError, match=r"batch must be one of \(2, 4\), got 3"):
        graphs.replay(3)


def test_rows_beyond_the_batch_must_be_the_base(bank: t2k.ExpertBank, cuda: FakeCUDA) -> None:
    slots = bank.slots(4)
    graphs = make(bank, slots)
    slots.admit(0, "math")
    slots.assign([0, 0, None, 0])
    with pytest.raises(
        ValueError, match=r"3 rows, but slots are assigned to rows beyond it: \[0\]"
    ):
        graphs(ids=IDS[:3])
    graphs(ids=IDS[:2])  # the graph for two rows does not see the others


def test_what_happened_to_the_model_since(bank: t2k.ExpertBank, cuda: FakeCUDA) -> None:
    graphs = make(bank, bank.slots(4))
    bank.merge("math")
    with pytest.raises(RuntimeError, match="an expert is merged"):
        graphs(ids=IDS[:2])
    bank.unmerge()
    t2k.revert(bank.model)
    with pytest.raises(RuntimeError, match="was reverted"):
        graphs.replay(2)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"step": 3}, TypeError, "step must be callable"),
    ({"inputs": {}}, ValueError, "non-empty"),
    ({"inputs": {"x": 1.0}}, TypeError, "x must be a tensor, got float"),
    ({"inputs": {"x": torch.tensor(1.0)}}, ValueError, "x has no axis; name it in shared"),
    ({"batches": ()}, ValueError, "batches must be a list of ints"),
    ({"batches": (0,)}, ValueError, "batches must be a list of ints"),
    ({"batches": 4}, ValueError, "batches must be a list of ints"),
    ({"slots": 3}, TypeError, r"slots must be what bank.slots\(...\) returns, got int"),
    ({"shared": "x"}, TypeError, r"shared must be a list of names like .*, got 'x'"),
    ({"shared": 3}, TypeError, "shared must be a list of names"),
    ({"padding": ["x"]}, TypeError, r"padding must be {name: value}, got list"),
    ({"padding": {"x": "0"}}, TypeError, "padding of 'x' must be a number, got '0'"),
    ({"warmup": 0}, ValueError, "warmup must be an int ≥ 1"),
    ({"shared": ["y"]}, ValueError, r"shared names \['y'\], expected some of \['x'\]"),
    ({"shared": ["x"]}, ValueError, "every input is shared"),
    ({"padding": {"y": 1}}, ValueError, r"padding names \['y'\]"),
    ({"inputs": {"x": torch.ones(1, device="meta")}}, RuntimeError, "x is on meta"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG)
def test_wrong_arguments(
    cuda: FakeCUDA, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    given = {"step": lambda x: x, "inputs": {"x": torch.ones(2)}, "batches": (1, 2), **change}
    with pytest.raises(error, match=words):
        t2k.StepGraphs(given.pop("step"), given.pop("inputs"), **given)


def test_slots_for_smaller_batches(bank: t2k.ExpertBank, cuda: FakeCUDA) -> None:
    with pytest.raises(ValueError, match="a batch of 4 rows, but the slots are for 3"):
        make(bank, bank.slots(8, batch=3))


def test_a_cpu_is_refused(bank: t2k.ExpertBank) -> None:
    with pytest.raises(RuntimeError, match=r"need inputs on a GPU, ids is on cpu.*the step itself"):
        make(bank, None)


# What no capture survives, or what it would freeze into a constant: a value that the host looks at.
WAITS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"}


def test_a_transformer_with_a_static_cache(cuda: FakeCUDA) -> None:
    """Prefill and decode of a Llama: greedy tokens as eager, nothing that waits in a capture."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for seed, name in enumerate(("math", "code")):
        gen = torch.Generator().manual_seed(seed)
        z = {n: 1 + torch.randn(m.rank, generator=gen) for n, m in bank._layers.items()}
        bank.add(name, t2k.Expert(z))
    slots, rows, prompt = bank.slots(4), 3, torch.randint(3, 40, (3, 5))
    cache = transformers.StaticCache(config=config, max_cache_len=16)

    def step(ids: Tensor, at: Tensor) -> Tensor:
        out = model(
            input_ids=ids, position_ids=at.expand(len(ids), -1), past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        return out.logits[:, -1]

    graphs = t2k.StepGraphs(
        step, {"ids": prompt[:, :1], "at": torch.zeros(1, 1, dtype=torch.int64)},
        batches=(rows,), shared=["at"], slots=slots,
    )  # fmt: skip
    recorded = {str(call[0]) for graph in graphs._graphs.values() for call in graph.calls}
    assert not recorded & WAITS
    assert "t2kernels.svf_product.default" in recorded
    routings: list[list[Any]] = [["math", None, {"code": 0.5}], ["code", "math", None]]
    for routing in routings:
        slots.admit_all({i: mixture for i, mixture in enumerate(routing) if mixture is not None})
        slots.assign([None if mixture is None else i for i, mixture in enumerate(routing)])
        cache.reset()
        tokens = prompt
        for at in range(11):
            logits = graphs(ids=tokens[:, at : at + 1], at=torch.tensor([[at]]))
            if at + 1 >= prompt.shape[1]:
                tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        with bank.use(routing):
            expected = model.generate(
                prompt, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert torch.equal(tokens, expected)
