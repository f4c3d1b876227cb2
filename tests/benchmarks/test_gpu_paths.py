"""What the benchmarks do on a GPU, as far as it can be followed without one: who takes part, what
is captured and what is not. The GPU is a fake; times are not looked at."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import bench_model
import harness
import pytest
import torch
from contestants import LineUp, Options, Skipped
from harness import Contestant
from layers import Layer
from shapes import Case, Shape

CPU = torch.device("cpu")


def line_up(dtype: str, tokens: int, monkeypatch, slots=(1, 128)) -> list[Contestant | Skipped]:
    """Who would take part on a GPU on which every backend can run."""
    shape = Shape(48, 32)
    made = LineUp(Case(shape, dtype, tokens), Layer(shape, dtype, CPU, sets=2, slots=slots),
                  Options(compile=False, peft=False))  # fmt: skip
    made.on_gpu = True
    monkeypatch.setattr(made, "_unavailable", lambda *args: None)
    return list(made.build())


def names(entries: list[Contestant | Skipped]) -> set[tuple[str, int]]:
    return {(e.name, e.slots) for e in entries if isinstance(e, Contestant)}


def test_decode_has_every_contestant_that_a_goal_asks_for(monkeypatch) -> None:
    found = names(line_up("bf16", 128, monkeypatch))
    for backend in ("cuda", "triton"):
        assert {(f"ours {backend}", s) for s in (1, 128)} <= found
        assert {(f"ours {backend} invariant", s) for s in (1, 128)} <= found
        assert (f"ours delta k=32 {backend}", 1) in found
        assert (f"ours {backend} eager", 1) in found
    assert {("three-op eager", 1), ("three-op", 128), ("dense", 1)} <= found
    assert {("LoRA bmm", 128), ("LoRA gathered", 128), ("LoRA masked", 128)} <= found
    eight_bit = names(line_up("fp8", 128, monkeypatch))
    assert {("ours cuda", 128), ("LoRA bmm", 128), ("dense", 1)} <= eight_bit
    assert not any("delta" in name for name, _ in eight_bit)


def test_prefill_has_ours_by_name_and_ragged_slots(monkeypatch) -> None:
    entries = line_up("bf16", 2048, monkeypatch, slots=(1, 64))
    assert {("ours triton", 1), ("ours triton", 64), ("three-op", 1)} <= names(entries)
    assert not any("invariant" in name or "LoRA" in name for name, _ in names(entries))
    counts = Layer(Shape(8, 8), "fp32", CPU, sets=1, slots=(1, 64)).slot(8192, 64).bincount()
    assert len(counts) == 64 and counts.min() >= 1 and counts.sum() == 8192
    assert counts.max() > 2 * counts.min()


def test_only_the_eager_ones_are_not_captured(monkeypatch) -> None:
    entries = line_up("bf16", 8, monkeypatch)
    eager = {e.name for e in entries if isinstance(e, Contestant) and not e.capture}
    assert eager == {"three-op eager", "ours cuda eager", "ours triton eager"}


@pytest.fixture
def fake_cuda(monkeypatch):
    """Streams and events that do nothing, graphs that count."""
    seen = SimpleNamespace(replays=0, captures=0, refuse=False)

    class Graph:
        def replay(self) -> None:
            seen.replays += 1

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def elapsed_time(self, other: Event) -> float:
            return 4.0

    @contextmanager
    def capture(graph: Graph):
        seen.captures += 1
        if seen.refuse:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    @contextmanager
    def stream(_):
        yield

    none = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda: none, "current_stream": lambda: none, "stream": stream,
        "synchronize": lambda: None, "CUDAGraph": Graph, "graph": capture, "Event": Event,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return seen


def contestant(calls: list[int], **more) -> Contestant:
    def call(i: int) -> torch.Tensor:
        calls.append(i)
        return torch.empty(0)

    return Contestant("x", 1, call, lambda rows, double: torch.empty(0), 0, 0, **more)


def test_a_graph_goes_once_through_all_weight_sets(fake_cuda) -> None:
    calls: list[int] = []
    timer, one = harness.CudaTimer(3), contestant(calls)
    assert timer.prepare(one) == "graph"
    assert calls == [0, 1, 2] * 3 and fake_cuda.replays == 1
    assert timer.sample(one) == pytest.approx(4e-3 / 3)
    assert fake_cuda.replays == 2 and len(calls) == 9


def test_what_wants_no_capture_gets_none_and_what_cannot_says_so(fake_cuda) -> None:
    calls: list[int] = []
    timer, eager = harness.CudaTimer(2), contestant(calls, capture=False)
    assert timer.prepare(eager) == "eager" and fake_cuda.captures == 0
    timer.sample(eager)
    assert calls == [0, 1] * 3 and fake_cuda.replays == 0
    fake_cuda.refuse = True
    assert timer.prepare(contestant(calls)) == "events"


def test_a_model_runs_in_every_setting_of_a_gpu() -> None:
    argv = ["--device", "cuda", "--eager", "--compile", "--factors", "bf16", "int8"]
    args = bench_model.build_parser().parse_args(argv)
    decode = list(bench_model.forms_of(args, "decode"))
    assert {f.setting for f in decode} == {"graph", "served", "eager", "compiled"}
    assert sum(f.targets is None for f in decode) == 3  # dense beside ours in each of them
    assert {f.backend for f in decode} == {None, "cuda", "triton"}
    prefill = [f.backend for f in bench_model.forms_of(args, "prefill") if f.targets]
    assert set(prefill) == {None, "triton"}  # the CUDA kernels end at 128 tokens


def test_a_backend_that_cannot_run_the_model_is_absent_with_its_reason(monkeypatch) -> None:
    monkeypatch.setattr(bench_model, "backends_of", lambda args, stage: ("torch", "cuda"))
    argv = ["--quick", "--targets", "mlp", "--factors", "bf16", "--seconds", "0.001"]
    args = bench_model.build_parser().parse_args([*argv, "--prompt", "4"])
    with torch.inference_mode():
        models = bench_model.Models(bench_model.llama.QUICK, CPU, 128)
        rows = bench_model.measure_stage(args, models, models, 2, "decode")
    found = {row["name"]: row for row in rows}
    assert found["mlp bf16 torch"]["of_dense"] > 0 and "ms" not in found["mlp bf16 cuda"]
    assert "'cuda' was asked for" in found["mlp bf16 cuda"]["absent"]


def test_a_served_step_is_the_stage_itself(monkeypatch) -> None:
    """`StepGraphs` gets the slots that the stage is open in, and its step computes the stage."""
    made = []

    class Graphs:
        def __init__(self, step, inputs, *, batches, slots) -> None:
            made.append((set(inputs), batches, slots.assigned))
            self.step = step

        def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
            return self.step(**inputs)

    monkeypatch.setattr(bench_model.t2k, "StepGraphs", Graphs)
    form = bench_model.Form("mlp", setting=bench_model.SERVED)
    with torch.inference_mode(), ExitStack() as stack:
        models = bench_model.Models(bench_model.llama.QUICK, CPU, 128)
        stage = bench_model._open(stack, models, form, 2, 4, 1)
        one = bench_model._contestant(form, 2, stage)
        found = []
        for call in (one.call, lambda i: stage.run()):
            with one.context():
                found.append(call(0))
    assert made == [({"input_ids", "position_ids"}, (2,), [0, 1])] and not one.capture
    assert torch.equal(*found)


def test_what_is_served_stands_beside_the_dense_graph() -> None:
    settings = (("dense", "graph"), ("ours", bench_model.SERVED), ("ours", "eager"))
    rows = [
        {"name": name, "setting": setting, "stage": "decode", "requests": 1, "error": 0.0}
        for name, setting in settings
    ]
    samples = {
        0: harness.Samples([1.0] * 5, "graph"), 1: harness.Samples([2.0] * 5, "eager"),
        2: harness.Samples([3.0] * 5, "eager"),
    }  # fmt: skip
    bench_model._add_times(rows, [(row, None) for row in rows], samples, 1)
    assert [row.get("of_dense") for row in rows] == [1.0, 0.5, None]
