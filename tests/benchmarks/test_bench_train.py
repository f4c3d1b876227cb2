"""The training benchmark at a size whose times mean nothing: its gate, its rows, its goals."""

from __future__ import annotations

from pathlib import Path

import bench_train
import pytest
import results
import torch
from harness import Refused

TINY = ["--layers", "1", "--hidden", "64", "--tokens", "128", "--seconds", "0.01"]


def test_rows_goals_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_train.main([*TINY, "--json", str(tmp_path / "out.json")]) == 0
    found = results.read(tmp_path / "out.json")
    names = [row["name"] for row in found["rows"]]
    assert len(names) == len(set(names)) == 6
    baseline = next(row for row in found["rows"] if row["name"] == bench_train.BASELINE)
    assert baseline["memory"] == baseline["speedup"] == 1
    assert all(row["seconds"] > 0 and row["step_mib"] > 0 for row in found["rows"])
    assert 0 < found["loop"]["overhead"] < 1
    assert "overhead of the loop" in capsys.readouterr().out


def test_forms_do_not_share_their_effects() -> None:
    """A step leaves no gradient behind, and the same answers give the same gradient again."""
    model = bench_train.make_model(1, 64)
    layers = {n: m for n, m in model.named_modules() if n.endswith("up_proj")}
    factors = {n: bench_train.t2k.decompose(m.weight.detach()) for n, m in layers.items()}
    z = {n: torch.full((len(f.S),), 0.9) for n, f in factors.items()}
    public = bench_train.Public(model, factors, z)
    cfg = bench_train.Config(kl=0.0, rows_per_backward=8)
    first = public.step(bench_train.make_answers(256), cfg, again=True)
    second = public.step(bench_train.make_answers(256), cfg, again=False)
    assert all(p.grad is None for p in model.parameters())
    assert bench_train.gate("push", second, first) < 1e-5


def test_a_wrong_gradient_is_refused() -> None:
    want = {"layer": torch.ones(4)}
    with pytest.raises(Refused, match=r"ours: relative error of dz 1.00e-03, allowed 1e-04"):
        bench_train.gate("ours", {"layer": torch.full((4,), 1.001)}, want)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tokens", "100"], "multiples of 128"),
        (["--hidden", "100"], "multiple of 64"),
        (["--json", "/nowhere/x.json"], "does not exist"),
    ],
)
def test_bad_arguments(argv, words, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_train.main(argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err
