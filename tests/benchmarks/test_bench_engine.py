"""The benchmark of two-pass generation runs and gives every ratio."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import bench_engine
import results

SMALL = ["--width", "64", "--layers", "1", "--rows", "3", "--new-tokens", "3", "--rounds", "1"]


def test_every_ratio_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_engine.main([*SMALL, "--json", str(tmp_path / "out.json")]) == 0
    found = results.read(tmp_path / "out.json")
    assert all(low <= value <= high for value, low, high in found["ratios"].values())
    assert len(found["ratios"]) == 4 and set(bench_engine.GOALS) <= set(found["ratios"])
    assert [row["form"] for row in found["rows"]][:2] == ["two passes", "one expert"]
    assert all(row["pass 2"] > 0 for row in found["rows"])
    assert found["environment"]["device"] == "cpu" and found["settings"]["rows"] == 3
    assert "goal <= 0.15" in capsys.readouterr().out


def test_goals_are_judged_by_their_medians() -> None:
    met = bench_engine.judge({"pass 1 / pass 2": [0.14, 0.1, 0.3],
                              "mixtures / one expert": [0.94, 0.9, 1.2]})  # fmt: skip
    assert [outcome["met"] for outcome in met] == [True, False]


def test_another_tokenizer(tmp_path: Path) -> None:
    bench_engine.build_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = bench_engine.random_model(64, 1, str(tmp_path))
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rows", "0"], "at least 1"),
        (["--model", "a", "--tokenizer", "b"], "brings its own"),
        (["--json", "/nowhere/x.json"], "does not exist"),
    ],
)
def test_bad_arguments(argv, words, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_engine.main(argv)
    assert stop.value.code == 2 and words in capsys.readouterr().err
