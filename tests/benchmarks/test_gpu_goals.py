"""Goals for a GPU judged on rows whose times are made up, one that meets and one that misses."""

from __future__ import annotations

import json
from pathlib import Path

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


MLP = {"shape": "14336x4096"}
MANY = {"tokens": 128, "slots": 128}
LARGE = {"tokens": 8192}
# (part of the goal, rows that meet it, rows that miss it); a pair of rows is ours and the other.
LINES = [
    ("4096²: share of the floor", [row("ours cuda", 1, percent_of_floor=81.0)],
     [row("ours cuda", 1, percent_of_floor=79.0)]),
    ("14336: share of the floor", [row("ours", 1, percent_of_floor=91.0, **MLP)],
     [row("ours", 1, percent_of_floor=89.0, **MLP)]),
    ("T ≤ 32, 4096²: speed-up", [row("ours", 1.0), row("three-op", 1.26)],
     [row("ours", 1.0), row("three-op", 1.24)]),
    ("T ≤ 32, 4096↔14336: speed-up", [row("ours", 1.0, **MLP), row("three-op", 1.11, **MLP)],
     [row("ours", 1.0, **MLP), row("three-op", 1.09, **MLP)]),
    ("eager three torch ops", [row("ours", 1.0), row("three-op eager", 1.0)],
     [row("ours", 1.0), row("three-op eager", 0.9)]),
    ("8-bit factors against dense bf16, T ≤ 64, 4096²",
     [row("ours", 1.04, dtype="fp8"), row("dense", 1.0, dtype="fp8")],
     [row("ours", 1.06, dtype="fp8"), row("dense", 1.0, dtype="fp8")]),
    ("8-bit factors against dense bf16, T ≤ 64, 4096↔14336",
     [row("ours", 0.7, dtype="int8", **MLP), row("dense", 1.0, dtype="int8", **MLP)],
     [row("ours", 0.8, dtype="int8", **MLP), row("dense", 1.0, dtype="int8", **MLP)]),
    ("128 different slots against one, 4096²",
     [row("ours", 1.04, **MANY), row("ours", 1.0, tokens=128)],
     [row("ours", 1.06, **MANY), row("ours", 1.0, tokens=128)]),
    ("128 different adapters, T = 128: bf16",
     [row("ours", 0.9, **MANY), row("LoRA bmm", 1.0, **MANY), row("LoRA gathered", 2.0, **MANY)],
     [row("ours", 1.1, **MANY), row("LoRA bmm", 1.0, **MANY), row("LoRA gathered", 2.0, **MANY)]),
    ("the same, 8-bit factors",
     [row("ours", 0.7, dtype="int8", **MANY), row("LoRA bmm", 1.0, dtype="int8", **MANY)],
     [row("ours", 0.8, dtype="int8", **MANY), row("LoRA bmm", 1.0, dtype="int8", **MANY)]),
    ("batch-invariant mode", [row("ours", 1.0), row("ours cuda invariant", 1.1)],
     [row("ours", 1.0), row("ours cuda invariant", 1.2)]),
    ("two library GEMMs and a scale, 4096²",
     [row("ours triton", 0.97, **LARGE), row("three-op", 1.0, **LARGE)],
     [row("ours triton", 0.99, **LARGE), row("three-op", 1.0, **LARGE)]),
    ("64 slots in a ragged batch",
     [row("ours", 1.02, slots=64, **LARGE), row("ours", 1.0, **LARGE)],
     [row("ours", 1.04, slots=64, **LARGE), row("ours", 1.0, **LARGE)]),
    ("delta k = 256 against dense, any T, 4096→1024",
     [row("ours delta k=256 cuda", 1.3, shape="4096x1024"), row("dense", 1, shape="4096x1024")],
     [row("ours delta k=256 cuda", 1.5, shape="4096x1024"), row("dense", 1, shape="4096x1024")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "good", "bad"), LINES, ids=[line[0] for line in LINES])
def test_a_line_up_decides(text, good, bad):
    assert judged(text, good).met is True
    assert judged(text, bad).met is False
    assert judged(text).met is None


TRAINING = [
    ("T = 2048, against a rebuilt", [step("ours triton", 1), step("rebuilt W' autograd", 2.3)],
     [step("ours triton", 1), step("rebuilt W' autograd", 2.1)]),
    ("through three ops", [step("ours", 1.0), step("three-op autograd", 1.0)],
     [step("ours", 1.1), step("three-op autograd", 1.0)]),
    ("with recomputation", [step("ours recompute", 1, keeps_tokens_by_rank=False)],
     [step("ours triton recompute", 1, keeps_tokens_by_rank=True)]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "good", "bad"), TRAINING, ids=[line[0] for line in TRAINING])
def test_a_training_step_decides(text, good, bad):
    assert judged(text, training=good).met is True
    assert judged(text, training=bad).met is False


OTHERS = [
    ("q, k, v as a group", "parts", {"part": "group", "judged": True, "ratio": 0.85}, 0.86),
    ("Python per layer", "overhead", {"python_us": 5.0}, 5.1),
    ("bf16, all linears", "model",
     {"of_dense": 0.7, "factors": "bf16", "targets": "all-linear", "requests": 32,
      "stage": "decode"}, 0.69),
    ("merge of all", "model", {"merge_ms": 85.0}, 85.1),
    ("decomposition of all", "decompose", {"total_minutes": 10.0}, 10.1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "good", "worse"), OTHERS, ids=[o[0] for o in OTHERS])
def test_other_benchmarks_decide(text, kind, good, worse):
    good = {"where": "there", "size": "8B", **good}
    key = next(
        k for k in ("ratio", "python_us", "of_dense", "merge_ms", "total_minutes") if k in good
    )
    assert judged(text, [good], benchmark=kind).met is True
    bad = judged(text, [{**good, key: worse}], benchmark=kind)
    assert bad.met is False and "there" in bad.measured
    assert judged(text, [good], benchmark=kind, device="cpu").met is None


def test_a_graph_is_not_held_against_what_could_not_be_captured():
    ours = row("ours", 1.0, timing="graph")
    for timing, expected in (("graph", True), ("events", None)):
        found = judged("T ≤ 32, 4096²: speed-up", [ours, row("three-op", 9.0, timing=timing)])
        assert found.met is expected


def test_line_ups_of_two_runs_are_not_compared():
    runs = [
        {"benchmark": "svf", "environment": CUDA, "rows": [row("ours", 1.0)]},
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
         "rows": [row("ours", 1.0), row("three-op", 2.0)]},
    )  # fmt: skip
    assert gpu_goals.main([str(p) for p in sorted(tmp_path.iterdir())]) == 0
    printed = capsys.readouterr().out
    assert "met          three torch ops in a graph, T ≤ 32, 4096²: speed-up" in printed
    assert printed.count("not measured") == len(gpu_goals.GOALS) - 2
