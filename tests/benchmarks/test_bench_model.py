"""The whole-model benchmark at a size whose times mean nothing: its gate, its rows, its merge."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import bench_model
import gpu_goals
import llama
import plot
import results
import torch
import whole_model
from harness import Refused
from shapes import Shape
from whole_model import Form, Models, Stage

TINY = ["--quick", "--layers", "2", "--requests", "3", "--prompt", "5", "--seconds", "0.001"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models():
    with torch.inference_mode():
        yield Models(llama.QUICK, CPU, 128)


def test_rows_goals_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_model.main([*TINY, "--json", str(tmp_path / "out.json")]) == 0
    found = results.read(tmp_path / "out.json")
    rows = found["rows"]
    assert [row["stage"] for row in rows] == ["merge", "admit"] + ["decode"] * 7 + ["prefill"] * 7
    assert {row["name"] for row in rows[2:9]} >= {"dense", "mlp fp8 policy"}
    assert all(row["of_dense"] > 0 and row["ms"] > 0 for row in rows[2:])
    assert rows[0]["merge_ms"] > 0 and rows[0]["matrices"] == 6
    assert found["settings"]["hidden"] == 64 and found["ceilings"]["gbs"] > 0
    assert "all-linear int8" in capsys.readouterr().out
    plot.draw(found, tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert rows[1]["done_us"] >= rows[1]["returned_us"] > 0
    # The goals are about one size of model alone.
    (merge,) = [o for o in gpu_goals.evaluate([found], any_device=True) if "merge" in o.goal]
    assert merge.met is None
    rows[0]["size"] = "8B"
    (merge,) = [o for o in gpu_goals.evaluate([found], any_device=True) if "merge" in o.goal]
    assert "6 matrices" in merge.measured


def test_a_merge_that_is_further_off_than_rounding_is_refused(models, monkeypatch) -> None:
    (row,) = bench_model.measure_merge(models, 2)
    assert 0 < row["error"] < 2.5e-3
    merge = bench_model.t2k.ExpertBank.merge

    def careless(bank, name):
        merge(bank, name)
        for layer in bank.layers:
            models.dense.get_submodule(layer).weight.mul_(1 + 2**-8)

    monkeypatch.setattr(bench_model.t2k.ExpertBank, "merge", careless)
    with pytest.raises(Refused, match="merge: relative error"):
        bench_model.measure_merge(models, 2)


def test_factors_are_orthonormal_and_every_weight_is_its_own() -> None:
    source = llama.Orthonormal(CPU)
    first, second = (source.factors(Shape(48, 32), torch.float32) for _ in range(2))
    for f in (first, second):
        assert torch.allclose(f.U.T @ f.U, torch.eye(32), atol=1e-5)
        assert torch.allclose(f.V.T @ f.V, torch.eye(32), atol=1e-5)
    assert not torch.equal(first.U, second.U)


def test_twins_share_their_memory(models) -> None:
    linear = models.dense.model.layers[0].mlp.up_proj
    layers = [
        models.bank(t, "bf16").model.model.layers[0].mlp.up_proj for t in ("mlp", "all-linear")
    ]
    assert {layer.weight.data_ptr() for layer in layers} == {linear.weight.data_ptr()}
    assert layers[0].factors.U.data_ptr() == layers[1].factors.U.data_ptr()


@pytest.mark.parametrize("start", [0, 6])
def test_the_gate_knows_whose_mixture_is_whose(models, start, monkeypatch) -> None:
    form = Form("all-linear", "int8")
    with torch.inference_mode():
        assert whole_model.gate(models, form, 3, start, 4) < 0.03
        monkeypatch.setattr(whole_model, "truth_rows", lambda requests: [(0, 1), (requests - 1, 0)])
        with pytest.raises(Refused, match="all-linear int8 policy: relative error"):
            whole_model.gate(models, form, 3, start, 4)


def test_a_stage_can_be_run_again_and_again(models) -> None:
    with torch.inference_mode():
        stage = Stage(models.dense, 2, 5, 1)
        stage.fill()
        stage.before()
        first = stage.run()
        stage.run()
        stage.before()
        assert torch.equal(stage.run(), first)
        whole = models.dense(input_ids=stage.ids, use_cache=False).logits[:, -1]
    assert torch.allclose(first.float(), whole.float(), atol=0.1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--heads", "3"], "multiple of twice --heads"),
        (["--layers", "0"], "at least 1"),
        (["--requests", "0"], "must be positive"),
        (["--json", "/nowhere/x.json"], "does not exist"),
    ],
)
def test_bad_arguments(argv, words, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_model.main([*TINY, *argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err
