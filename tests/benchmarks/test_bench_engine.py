"""The benchmark of two-pass generation runs and gives every ratio."""

import json

import pytest

pytest.importorskip("transformers")

import bench_engine


def test_every_ratio_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width", "64", "--layers", "1", "--rows", "3", "--new-tokens", "3", "--rounds", "1"]
    bench_engine.main([*small, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert all(value > 0 for value in result["ratios"].values())
    assert set(bench_engine.GOALS) <= set(result["ratios"])
    bench_engine.main(small)
    assert "goal <= 0.15" in capsys.readouterr().out
