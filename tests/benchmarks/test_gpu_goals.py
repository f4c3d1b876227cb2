"""Goals for a GPU judged on rows whose times are made up, one that meets and one that misses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import bench_overhead
import bench_parts
import bench_svf
import gpu
import gpu_goals
import pytest
import results

CUDA = {"device": "cuda", "commit": "0", "torch": "0"}


def row(name: str, time: float, **more):
    base = {"shape": "4096x4096", "dtype": "bf16", "tokens": 8, "slots": 1}
    return base | {"name": name, "time_us": time, "percent_of_floor": 50.0} | more


def step(name: str, time: float, **more):
    base = {"shape": "4096x14336", "dtype": "bf16", "tokens": 2048}
    return base | {"name": name, "time_us": time} | more


def judged(text: str, rows=(), training=(), benchmark: str = "svf", device: str = "cuda"):
    result = {
        "benchmark": benchmark, "environment": {**CUDA, "device": device},
        "rows": list(rows), "training": list(training),
    }  # fmt: skip
    (found,) = [o for o in gpu_goals.evaluate([result]) if text in o.goal]
    return found


def spread(text: str, rows):
    """These rows at every point that the goal names."""
    (goal,) = [g for g in gpu_goals.GOALS if text in g.text]
    found = []
    for point in {p for measure in goal.every for p in measure.points}:
        at = dict(zip(("shape", "dtype", "tokens"), point))
        for r in rows:
            # A goal about many slots keeps them; the invariant mode is wanted for both.
            found.append({**r, **at, **({"slots": point[3]} if len(point) > 3 else {})})
    return found


MLP = {"shape": "14336x4096"}
MANY = {"tokens": 128, "slots": 128}
LARGE = {"tokens": 8192}
LORA = [row("LoRA bmm", 1.0, **MANY), row("LoRA gathered", 2.0, **MANY)]
# (part of the goal, rows that meet it, rows that miss it); a pair of rows is ours and the other.
LINES = [
    ("4096²: share of the floor", [row("ours cuda", 1, percent_of_floor=81.0)],
     [row("ours cuda", 1, percent_of_floor=79.0)]),
    ("14336: share of the floor", [row("ours cuda", 1, percent_of_floor=91.0, **MLP)],
     [row("ours cuda", 1, percent_of_floor=89.0, **MLP)]),
    ("T ≤ 32, 4096²: speed-up", [row("ours cuda", 1.0), row("three-op", 1.26)],
     [row("ours cuda", 1.0), row("three-op", 1.24)]),
    ("T ≤ 32, 4096↔14336: speed-up", [row("ours cuda", 1.0, **MLP), row("three-op", 1.11, **MLP)],
     [row("ours cuda", 1.0, **MLP), row("three-op", 1.09, **MLP)]),
    ("eager three torch ops", [row("ours cuda", 1.0), row("three-op eager", 1.0)],
     [row("ours cuda", 1.0), row("three-op eager", 0.9)]),
    ("8-bit factors against dense bf16, T ≤ 64, 4096²",
     [row("ours cuda", 1.04, dtype="fp8"), row("dense", 1.0, dtype="fp8")],
     [row("ours cuda", 1.06, dtype="fp8"), row("dense", 1.0, dtype="fp8")]),
    ("8-bit factors against dense bf16, T ≤ 64, 4096↔14336",
     [row("ours cuda", 0.7, dtype="int8", **MLP), row("dense", 1.0, dtype="int8", **MLP)],
     [row("ours cuda", 0.8, dtype="int8", **MLP), row("dense", 1.0, dtype="int8", **MLP)]),
    ("128 different slots against one, 4096²",
     [row("ours cuda", 1.04, **MANY), row("ours cuda", 1.0, tokens=128)],
     [row("ours cuda", 1.06, **MANY), row("ours cuda", 1.0, tokens=128)]),
    ("128 different adapters, T = 128: bf16",
     [row("ours cuda", 0.9, **MANY), *LORA],
     [row("ours cuda", 1.1, **MANY), *LORA]),
    ("the same, 8-bit factors",
     [row("ours cuda", 0.7, dtype="int8", **MANY), row("LoRA bmm", 1.0, dtype="int8", **MANY)],
     [row("ours cuda", 0.8, dtype="int8", **MANY), row("LoRA bmm", 1.0, dtype="int8", **MANY)]),
    ("batch-invariant mode", [row("ours cuda", 1.0), row("ours cuda invariant", 1.1)],
     [row("ours cuda", 1.0), row("ours cuda invariant", 1.2)]),
    ("two library GEMMs and a scale, 4096²",
     [row("ours triton", 0.97, **LARGE), row("three-op", 1.0, **LARGE)],
     [row("ours triton", 0.99, **LARGE), row("three-op", 1.0, **LARGE)]),
    ("64 slots in a ragged batch",
     [row("ours cuda", 1.02, slots=64, **LARGE), row("ours cuda", 1.0, **LARGE)],
     [row("ours cuda", 1.04, slots=64, **LARGE), row("ours cuda", 1.0, **LARGE)]),
    ("delta k = 256 against dense, any T, 4096→1024",
     [row("ours delta k=256 cuda", 1.3, shape="4096x1024"), row("dense", 1, shape="4096x1024")],
     [row("ours delta k=256 cuda", 1.5, shape="4096x1024"), row("dense", 1, shape="4096x1024")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "good", "bad"), LINES, ids=[line[0] for line in LINES])
def test_line_ups_decide_once_every_point_is_there(text, good, bad):
    everywhere = spread(text, good)
    assert judged(text, everywhere).met is True
    assert judged(text, [*everywhere, *({**r, "shape": "x"} for r in bad)]).met is True
    assert judged(text, bad).met is False
    assert judged(text).met is None and gpu_goals.mark(judged(text)) == "not measured"
    some = judged(text, good)
    if some.wanted > 1:
        assert some.met is None and "missing: " in some.measured
        assert gpu_goals.mark(some) == f"partly measured (1 of {some.wanted})"


TRAINING = [
    ("T = 2048, against a rebuilt", [step("ours triton", 1), step("rebuilt W' autograd", 2.3)],
     [step("ours triton", 1), step("rebuilt W' autograd", 2.1)]),
    ("through three ops", [step("ours triton", 1.0), step("three-op autograd", 1.0)],
     [step("ours triton", 1.1), step("three-op autograd", 1.0)]),
    ("with recomputation", [step("ours recompute", 1, keeps_tokens_by_rank=False)],
     [step("ours triton recompute", 1, keeps_tokens_by_rank=True)]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "good", "bad"), TRAINING, ids=[line[0] for line in TRAINING])
def test_a_training_step_decides(text, good, bad):
    assert judged(text, training=spread(text, good)).met is True
    assert judged(text, training=good).met is None
    assert judged(text, training=bad).met is False


GRAPH = {"factors": "bf16", "targets": "all-linear", "requests": 32, "stage": "decode",
         "setting": "graph", "backend": "cuda", "size": "8B", "where": "there"}  # fmt: skip
OTHERS = [
    ("q, k, v as a group", "parts", {"part": "group", "judged": True, "ratio": 0.85}, 0.86),
    ("Python per layer", "overhead", {"python_us": 5.0}, 5.1),
    ("bf16, all linears", "model", {"of_dense": 0.7, **GRAPH}, 0.69),
    ("merge of all", "model", {"merge_ms": 85.0}, 85.1),
    ("decomposition of all", "decompose", {"total_minutes": 10.0}, 10.1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "good", "worse"), OTHERS, ids=[o[0] for o in OTHERS])
def test_other_benchmarks_decide(text, kind, good, worse):
    good = {"where": "there", "size": "8B", **good}
    key = next(
        k for k in ("ratio", "python_us", "of_dense", "merge_ms", "total_minutes") if k in good
    )
    (goal,) = [g for g in gpu_goals.GOALS if text in g.text]
    by = {"parts": ("dtype", "tokens"), "overhead": ("name",)}.get(kind, ())
    every = [{**good, **dict(zip(by, point))} for m in goal.every for point in m.points]
    assert judged(text, every, benchmark=kind).met is True
    bad = judged(text, [*every[1:], {**every[0], key: worse}], benchmark=kind)
    assert bad.met is False and "there" in bad.measured
    assert judged(text, every, benchmark=kind, device="cpu").met is None
    if len(every) > 1:
        some = judged(text, every[:1], benchmark=kind)
        assert gpu_goals.mark(some) == f"partly measured (1 of {len(every)})"


def test_a_model_is_judged_as_a_graph_by_a_kernel():
    slow = {**GRAPH, "of_dense": 0.5}
    for other in ({"setting": "eager"}, {"setting": "compiled"}, {"backend": None}):
        found = judged("bf16, all linears", [slow, {**slow, "of_dense": 0.97, **other}],
                       benchmark="model")  # fmt: skip
        assert found.met is False and "0.500" in found.measured


PREFILL = "two library GEMMs and a scale, 4096²"


def test_plain_torch_is_no_form_of_ours_against_the_library():
    others = [row("three-op", 1.0, **LARGE), row("ours torch", 0.97, **LARGE),
              row("ours", 0.97, **LARGE)]  # fmt: skip
    assert judged(PREFILL, others).met is None
    assert judged(PREFILL, [*others, row("ours triton", 1.3, **LARGE)]).met is False


@pytest.mark.parametrize("word", ["refused", "failed"])
def test_a_wrong_result_of_ours_is_shown(word):
    wrong = {**row("ours triton", 1.0, **LARGE), word: "relative error 1"}
    del wrong["time_us"]
    rows = [row("three-op", 1.0, **LARGE), wrong]
    alone = judged(PREFILL, rows)
    assert alone.met is None and "WRONG, no time: bf16 4096x4096 T=8192, ours triton" in (
        alone.measured
    )
    beside = judged(PREFILL, [*rows, row("ours cuda", 0.9, **LARGE)])
    assert beside.met is True and "relative error 1" in beside.measured
    assert "WRONG" in gpu_goals.render([alone]) and "WRONG" in gpu_goals.markdown([alone])


def test_a_decomposition_that_misses_its_accuracy_misses_its_goal():
    total = {"shape": "all", "size": "8B", "where": "224 of 224", "total_minutes": 5.0}
    bad = {"shape": "4096x1024", "done": 1, "refused": "error 1e-2"}
    text = "decomposition of all"
    assert judged(text, [total], benchmark="decompose").met is True
    found = judged(text, [bad, total], benchmark="decompose")
    assert found.met is False and "4096x1024 (error 1e-2)" in found.measured


@pytest.mark.parametrize("goal", gpu_goals.GOALS, ids=lambda goal: goal.text)
def test_the_phases_of_a_goal_measure_every_point_that_it_names(goal, tmp_path):
    found = set()
    for phase in goal.phase.split(","):
        for command in gpu.PHASES[phase](gpu.Run(tmp_path, False)):
            if command[1].endswith("bench_svf.py"):
                args = bench_svf.build_parser().parse_args(command[2:])
                tokens = args.training_tokens if phase == "train" else args.tokens
                found |= set(itertools.product(map(str, args.shapes), args.dtypes, tokens))
            elif command[1].endswith("bench_parts.py"):
                args = bench_parts.build_parser().parse_args(command[2:])
                found |= set(itertools.product(args.dtypes, args.tokens))
            elif command[1].endswith("bench_overhead.py"):
                found |= {(name,) for name in bench_overhead.LAYERS}
    wanted = {point[:3] for measure in goal.every for point in measure.points}
    assert wanted and (wanted <= found or wanted == {()})


def test_a_graph_is_not_held_against_what_could_not_be_captured():
    ours = row("ours cuda", 1.0, timing="graph")
    for timing, expected in (("graph", True), ("events", None)):
        rows = [ours, row("three-op", 9.0, timing=timing)]
        found = judged("T ≤ 32, 4096²: speed-up", spread("T ≤ 32, 4096²: speed-up", rows))
        assert found.met is expected


def test_line_ups_of_two_runs_are_not_compared():
    runs = [
        {"benchmark": "svf", "environment": CUDA, "rows": [row("ours cuda", 1.0)]},
        {"benchmark": "svf", "environment": CUDA, "rows": [row("three-op", 9.0)]},
    ]
    (found,) = [o for o in gpu_goals.evaluate(runs) if "T ≤ 32, 4096²: speed-up" in o.goal]
    assert found.met is None


def test_the_page_of_goals_is_what_the_committed_results_say():
    """benchmarks/GOALS.md ends with the tables that the command prints."""
    folder = Path(gpu_goals.__file__).parent
    found = gpu_goals.files(sorted((folder / "results").glob("*.json")))
    tables = gpu_goals.markdown(gpu_goals.evaluate(found))
    assert (folder / "GOALS.md").read_text().endswith(tables + "\n")


def test_files_of_other_kinds_are_passed_over(tmp_path, capsys):
    (tmp_path / "demo.json").write_text(json.dumps({"schema": 99}))
    results.write(
        tmp_path / "svf.json",
        {"schema": results.SCHEMA, "benchmark": "svf", "environment": CUDA,
         "rows": spread("T ≤ 32, 4096²: speed-up",
                        [row("ours cuda", 1.0), row("three-op", 2.0)])},
    )  # fmt: skip
    assert gpu_goals.main([str(p) for p in sorted(tmp_path.iterdir())]) == 0
    printed = capsys.readouterr().out
    assert "met          three torch ops in a graph, T ≤ 32, 4096²: speed-up" in printed
    assert printed.count("not measured") == len(gpu_goals.GOALS) - 2
