"""The benchmark of a REINFORCE step at a size whose times mean nothing: its gate and its parts."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import bench_step
import llama
import results
import torch
from harness import Refused

TINY = ["--quick", "--rows", "4", "--prompt", "20", "--new-tokens", "4", "--steps", "1",
        "--rows-per-backward", "2"]  # fmt: skip


@pytest.fixture
def trainer():
    args = bench_step.build_parser().parse_args(TINY)
    cfg = bench_step.Config(steps=2, prompts=4, max_new_tokens=4, rows_per_backward=3)
    return bench_step.trainer_of(llama.QUICK, args, "all-linear", cfg)


def test_rows_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TINY, "--targets", "mlp", "--json", str(tmp_path / "out.json")]
    assert bench_step.main(argv) == 0
    rows = results.read(tmp_path / "out.json")["rows"]
    assert [row["part"] for row in rows] == [*bench_step.PARTS, "step"]
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[-1]["seconds"] >= max(row["seconds"] for row in rows[:-1])
    assert 4 * 24 <= rows[-1]["tokens"] <= 4 * 40
    assert "optimiser" in capsys.readouterr().out


def test_a_step_moves_z_and_every_part_takes_time(trainer) -> None:
    before = [z.detach().clone() for z in trainer.parameters]
    meter, _ = trainer.step(0, 20)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters))
    assert all(z.grad is None for z in trainer.parameters)
    assert all(seconds > 0 for seconds in meter.seconds.values())


def test_a_gradient_that_is_wrong_is_refused(trainer, monkeypatch) -> None:
    assert bench_step.gate(trainer, None, 20) < 0.2
    plain = bench_step.z_gradient
    calls = []

    def wrong_at_first(*args):
        calls.append(args)
        return plain(*args) * (1.5 if len(calls) == 1 else 1)

    monkeypatch.setattr(bench_step, "z_gradient", wrong_at_first)
    with pytest.raises(Refused, match="policy: error of dz"):
        bench_step.gate(trainer, None, 20)


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["--rows", "0"], "at least 1"), (["--vocabulary", "9"], "must hold the tokenizer's")],
)
def test_bad_arguments(argv, words, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_step.main([*TINY, *argv])
    assert stop.value.code == 2 and words in capsys.readouterr().err
