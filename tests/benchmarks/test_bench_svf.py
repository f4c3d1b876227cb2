"""The benchmark's own machinery on layers so small that their times mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import bench_svf
import ceilings
import failures
import goals
import harness
import pytest
import results
import torch
from contestants import LineUp, Options, Skipped
from harness import Contestant, Refused, Samples
from layers import Layer
from shapes import Case, Shape, grid
from training import STEPS, allocations, measure_training

from t2kernels import FACTOR_KINDS

CPU = torch.device("cpu")
SMALL = Shape(48, 32)


class CountingTimer:
    """Every call costs what the contestant's name says."""

    calls_per_sample = 1

    def __init__(self) -> None:
        self.order: list[str] = []

    def prepare(self, contestant: Contestant) -> str:
        return "fake"

    def sample(self, contestant: Contestant) -> float:
        self.order.append(contestant.name)
        return float(contestant.name)


def contestant(name: str, y: torch.Tensor | None = None, **more) -> Contestant:
    y = torch.ones(4, 3) if y is None else y

    def formula(rows: torch.Tensor, double: bool) -> torch.Tensor:
        ones = torch.ones(len(rows), 3)
        return ones.double() if double else ones

    return Contestant(name, 1, lambda i: y, formula, 1, 1, **more)


def test_grid_has_every_requested_case_and_thins_only_defaults():
    named = grid("cpu", False, (SMALL,), ("fp16",), (8192,))
    assert named == [Case(SMALL, "fp16", 8192)]
    defaults = grid("cpu", False)
    assert {c.tokens for c in defaults} >= {1, 2, 3, 4, 8, 16, 512, 8192}
    assert Case(Shape(4096, 4096), "bf16", 8192) not in defaults
    assert len(grid("cuda", False)) > len(grid("cuda", True)) > 0
    assert Case(Shape(4096, 14336), "bf16", 1) in grid("cuda", False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shapes", "2048"], "a shape is INxOUT"),
        (["--shapes", "0x4"], "a shape is INxOUT"),
        (["--tokens", "many"], "a token count is a positive number"),
        (["--dtypes", "int4"], "invalid choice"),
        (["--quik"], "unrecognized arguments"),
        (["--seconds", "0"], "--seconds must lie between"),
        (["--minutes", "-1"], "--minutes must be positive"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
    ],
)
def test_a_typo_is_a_clear_error(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_svf.parse(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp32", "bf16", *FACTOR_KINDS])
def test_every_contestant_passes_the_gate(dtype):
    with torch.inference_mode():
        layer = Layer(SMALL, dtype, CPU, sets=2)
        entries = list(LineUp(Case(SMALL, dtype, 6), layer, Options(compile=False)).build())
        contestants = [e for e in entries if isinstance(e, Contestant)]
        names = {(c.name, c.slots) for c in contestants}
        assert names >= {
            ("dense", 1), ("three-op", 64), ("rebuilt W'", 1), ("ours", 1), ("ours", 64),
            ("ours torch", 1), ("ours invariant", 64), ("LoRA bmm", 64),
        }  # fmt: skip
        assert Skipped("three-op compiled", "--no-compile") in entries
        for entry in contestants:
            verdict = harness.check(entry, 6)
            assert 0 < verdict.error <= verdict.limit
            assert verdict.same_bits_again in (None, True)
            assert verdict.same_bits_alone in (None, True)


@pytest.mark.parametrize("kind", FACTOR_KINDS)
def test_sets_hold_the_same_numbers_elsewhere(kind):
    layer = Layer(SMALL, kind, CPU, sets=2)
    first, second = layer.sets
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.quantized.V.float(), second.quantized.V.float())
    for a, b in ((first.factors, second.factors), (first.quantized, second.quantized)):
        assert a.U.data_ptr() != b.U.data_ptr()
        assert b.V.t().is_contiguous()


@pytest.mark.parametrize("wrong", [torch.full((4, 3), float("nan")), torch.full((4, 3), 1.01)])
def test_the_gate_refuses_a_wrong_result(wrong):
    with pytest.raises(Refused, match="culprit"):
        harness.check(contestant("culprit", wrong), 4)


def test_the_gate_sees_bits_that_depend_on_the_batch():
    call_row = lambda t: torch.ones(1, 3) + 1e-7  # noqa: E731
    verdict = harness.check(contestant("x", ours=True, call_row=call_row), 4)
    assert verdict.same_bits_again is True
    assert verdict.same_bits_alone is False


def test_contestants_take_turns_and_slow_ones_get_fewer():
    timer = CountingTimer()
    pair = [contestant("0.001"), contestant("0.1")]
    samples = harness.measure(pair, timer, seconds=0.03)
    assert len(samples[0].seconds) == 30
    assert len(samples[1].seconds) == 5
    measured = timer.order[4:]  # after the estimates
    places = [i for i, name in enumerate(measured) if name == "0.1"]
    assert places[-1] - places[0] > 20  # spread over the run, not bunched at its beginning


def test_ratio_interval_contains_the_ratio():
    a, b = Samples([2.0, 2.1, 1.9, 2.0, 2.2]), Samples([1.0, 1.1, 0.9, 1.0, 1.0])
    value, low, high = harness.ratio(a, b)
    assert value == pytest.approx(2.0)
    assert low <= value <= high


def row(name, slots=1, **more):
    base = {"shape": "64x64", "dtype": "bf16", "tokens": 1, "name": name, "slots": slots}
    return base | {"time_us": 1.0, "ratio_three_op": 1.0, "ratio_dense": 1.0} | more


def outcome(rows, training, words):
    return next(o for o in goals.evaluate(rows, training) if words in o.goal)


def test_goals_judge_the_worst_row():
    rows = [row("ours native", ratio_three_op=0.5), row("ours native", ratio_three_op=0.8)]
    found = outcome(rows, [], "bf16 native, T 1–8")
    assert found.met is False
    assert "worst 0.800" in found.measured
    assert "1 of 2" in found.measured
    assert outcome(rows[:1], [], "bf16 native, T 1–8").met is True
    assert outcome([], [], "bf16 native, T 1–8").met is None


def test_goals_compare_slots_and_modes_in_the_same_line_up():
    rows = [row("ours"), row("ours", 64, time_us=1.1), row("ours invariant", 64, time_us=1.3)]
    assert outcome(rows, [], "64 different slots").met is False
    assert outcome(rows, [], "time against the policy's choice, decode").met is True
    assert outcome([row("ours", same_bits_again=False)], [], "run to run").met is False


def test_goals_tell_the_kinds_of_factors_apart():
    rows = [row("ours", dtype=kind, factor_error=0.03) for kind in FACTOR_KINDS]
    assert outcome(rows, [], "int8 factors, relative output error").met is False
    assert outcome(rows, [], "fp8 factors, relative output error").met is True


def test_every_goal_is_rendered_also_without_data():
    text = goals.render(goals.evaluate([], []))
    assert text.count("no data") == len(goals.evaluate([], []))


def test_allocations_see_the_peak_and_the_largest_buffer():
    def run():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        del a
        return torch.empty(1 << 18, dtype=torch.uint8)

    assert allocations(run, CPU) == (1 << 20, 1 << 20)


def test_training_rows_see_the_weight_sized_buffer():
    rows = measure_training(Shape(256, 256), "fp32", 16, CPU, seconds=0.001)
    assert [r["name"] for r in rows] == list(STEPS)
    assert not any("refused" in r for r in rows)
    held = {r["name"]: r["weight_sized_buffer"] for r in rows}
    assert held["rebuilt W' autograd"] is True
    assert held["ours"] is False
    assert held["ours recompute"] is False


def test_results_survive_a_round_trip(tmp_path):
    path = tmp_path / "r.json"
    result = {"schema": results.SCHEMA, "rows": [row("ours", interval_dense=(0.123456, 1.0))]}
    results.write(path, result)
    (back,) = results.read(path)["rows"]
    assert back["name"] == "ours"
    assert back["interval_dense"] == [0.1235, 1.0]
    assert list(tmp_path.iterdir()) == [path]
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="is not a result"):
        results.read(path)


@pytest.fixture
def threads(monkeypatch):
    """Threads as they were, and ceilings that are measured in a moment."""
    monkeypatch.setitem(ceilings._MATMUL_SIZES, "cpu", (64,))
    monkeypatch.setitem(ceilings._PROBE_BYTES, "cpu", 1 << 20)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_whole_run_writes_its_files(tmp_path, capsys, threads):
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    argv = ["--shapes", "48x32", "--tokens", "1", "4", "--threads", "1"]
    argv += ["--dtypes", "bf16", *FACTOR_KINDS]
    argv += ["--seconds", "0.001", "--no-compile", "--no-peft", "--no-training"]
    assert bench_svf.main([*argv, "--json", str(out), "--plot", str(png)]) == 0
    printed = capsys.readouterr().out
    assert "three-op" in printed
    assert "goals" in printed
    data = results.read(out)
    assert data["environment"]["threads"] == 1
    assert all("path" not in key for key in data["environment"])
    assert {r["dtype"] for r in data["rows"]} == {"bf16", *FACTOR_KINDS}
    assert any("factor_error" in r for r in data["rows"])
    assert png.stat().st_size > 1000


def test_a_result_says_which_table_of_tiles_was_in_force(tmp_path, monkeypatch):
    monkeypatch.delenv("T2_TUNING", raising=False)
    assert ceilings.environment(CPU, 1)["tuning"] is None
    table = tmp_path / "tuning.json"
    monkeypatch.setenv("T2_TUNING", str(table))
    assert ceilings.environment(CPU, 1)["tuning"] == {"file": "tuning.json", "sha256": "no file"}
    table.write_text("a")
    first = ceilings.environment(CPU, 1)["tuning"]
    table.write_text("b")
    second = ceilings.environment(CPU, 1)["tuning"]
    assert first["file"] == "tuning.json" and first["sha256"] != second["sha256"]


def test_a_run_out_of_time_says_what_is_missing(capsys, threads):
    argv = ["--shapes", "8x8", "--dtypes", "fp32", "--tokens", "1", "--minutes", "1e-9"]
    result = bench_svf.run(bench_svf.parse([*argv, "--no-training"]))
    assert result["rows"] == []
    assert result["not_measured"] == ["fp32 8x8 T=1"]
    assert "out of time" in capsys.readouterr().out


class OutOfResources(Exception):
    """As Triton's: no RuntimeError."""


SMALL_RUN = ["--shapes", "8x8", "--dtypes", "fp32", "--seconds", "0.001", "--no-compile",
             "--no-peft"]  # fmt: skip


def fails(name: str, monkeypatch, when: int = 0) -> None:
    """From its call number ``when`` on the contestant ``name`` of a line-up raises."""
    calls, build = [], LineUp.build

    def built(self):
        for entry in build(self):
            if entry.name != name or entry.slots != 1:
                yield entry
                continue

            def call(i, inner=entry.call):
                calls.append(i)
                if len(calls) > when:
                    raise OutOfResources("shared memory, Required: 300000\nmore lines")
                return inner(i)

            entry.call = call
            yield entry

    monkeypatch.setattr(LineUp, "build", built)


@pytest.mark.parametrize("when", [0, 2, 5], ids=["gate", "warm-up", "turns"])
def test_a_contestant_that_fails_loses_nothing_else(when, tmp_path, threads, monkeypatch, capsys):
    out = tmp_path / "out.json"
    fails("ours torch", monkeypatch, when)
    argv = [*SMALL_RUN, "--tokens", "2", "4", "--no-training", "--json", str(out)]
    assert bench_svf.main(argv) == 1
    rows = results.read(out)["rows"]
    bad = [r for r in rows if "failed" in r]
    assert {r["name"] for r in bad} == {"ours torch"} and {r["tokens"] for r in bad} == {2, 4}
    assert bad[0]["failed"] == "OutOfResources: shared memory, Required: 300000"
    assert sum(r["name"] == "three-op" and "time_us" in r for r in rows) == 4
    assert not any("time_us" in r for r in bad)
    assert "FAILED: OutOfResources: shared memory" in capsys.readouterr().out


def test_results_are_there_after_every_line_up(tmp_path, threads, monkeypatch):
    out = tmp_path / "out.json"
    run_case, seen = bench_svf.run_case, []

    def stopped(*args):
        seen.append(len(results.read(out)["rows"]) if out.exists() else 0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return run_case(*args)

    monkeypatch.setattr(bench_svf, "run_case", stopped)
    argv = [*SMALL_RUN, "--tokens", "1", "2", "3", "--no-training", "--json", str(out)]
    with pytest.raises(KeyboardInterrupt):
        bench_svf.main(argv)
    assert seen[0] == 0 < seen[1] < seen[2] == len(results.read(out)["rows"])


def test_a_training_step_that_fails_leaves_the_others(threads, monkeypatch, tmp_path):
    def broken(*args):
        raise RuntimeError("no kernel")

    out = tmp_path / "out.json"
    monkeypatch.setitem(STEPS, "ours", broken)
    assert bench_svf.main([*SMALL_RUN, "--tokens", "1", "--json", str(out)]) == 1
    found = {r["name"]: r for r in results.read(out)["training"]}
    assert found["ours"]["failed"] == "RuntimeError: no kernel"
    assert all("time_us" in row for name, row in found.items() if name != "ours")


def test_training_steps_end_in_time_too(threads):
    result = bench_svf.run(bench_svf.parse([*SMALL_RUN, "--tokens", "1", "--minutes", "1e-9"]))
    assert result["training"] == []
    assert result["not_measured"] == ["training step, fp32 8x8 T=2", "fp32 8x8 T=1"]


def test_a_lost_device_ends_the_run_with_what_is_there(threads, monkeypatch, tmp_path, capsys):
    out, run_case, seen = tmp_path / "out.json", bench_svf.run_case, []

    def lost(*args):
        seen.append(1)
        if len(seen) == 2:
            raise failures.Broken("AcceleratorError: an illegal memory access")
        return run_case(*args)

    monkeypatch.setattr(bench_svf, "run_case", lost)
    argv = [*SMALL_RUN, "--tokens", "1", "2", "3", "--no-training", "--json", str(out)]
    assert bench_svf.main(argv) == 1
    data = results.read(out)
    assert {r["tokens"] for r in data["rows"]} == {1} and "illegal" in data["stopped"]
    assert len(seen) == 2 and "STOPPED" in capsys.readouterr().out


def test_an_error_is_one_line_and_a_gpu_that_no_longer_answers_is_noticed(monkeypatch):
    assert failures.describe(ValueError(""), CPU) == "ValueError"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cuda, error = torch.device("cuda"), RuntimeError("CUDA error: illegal\nadvice")
    assert failures.describe(error, cuda) == "RuntimeError: CUDA error: illegal"

    def raises():
        raise RuntimeError("CUDA error: illegal")

    monkeypatch.setattr(torch.cuda, "synchronize", raises)
    with pytest.raises(failures.Broken, match="CUDA error: illegal"):
        failures.describe(error, cuda)


def test_goals_for_a_cpu_are_not_judged_on_a_gpu(threads, monkeypatch, capsys):
    argv = [*SMALL_RUN, "--tokens", "1", "--no-training", "--minutes", "1e-9"]
    args = bench_svf.parse(argv)
    assert bench_svf.run(args)["goals"] and "goals" in capsys.readouterr().out
    monkeypatch.setattr(bench_svf, "Bandwidth", lambda *_: SimpleNamespace(method="none"))
    args.device = "cuda"
    assert bench_svf.run(args)["goals"] == [] and "goals" not in capsys.readouterr().out


def test_the_script_finds_its_siblings_where_python_leaves_its_folder_out():
    env = dict(os.environ, PYTHONSAFEPATH="1")
    command = [sys.executable, bench_svf.__file__, "--dry-run", "--quick"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "bf16 2048x2048 T=1" in done.stdout


def test_committed_results_can_be_read():
    """The tables; demo, evidence and claims have forms of their own."""
    folder = results.Path(results.__file__).parent / "results"
    tables = [path for path in folder.glob("*.json") if "schema" in json.loads(path.read_text())]
    assert tables
    for path in tables:
        assert results.read(path)["rows"], path.name
        assert json.loads(path.read_text())["environment"]["commit"]


def test_contexts_are_entered_for_every_call():
    entered = []

    class Context(nullcontext):
        def __enter__(self):
            entered.append(1)

    timer = harness.CpuTimer(2)
    timer.sample(contestant("x", context=Context))
    assert entered == [1]
