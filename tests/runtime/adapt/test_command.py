"""`t2 adapt`: finds, saves, scores without the shots, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import t2kernels as t2k
from t2runtime.adapt.mixtures import load_mixture
from t2runtime.cli import main

QUICK = ["--shots", "3", "--population", "6", "--elites", "2", "--generations", "1",
         "--limit", "8"]  # fmt: skip


@pytest.fixture
def experts(small: Any, tmp_path: Path) -> Path:
    """A folder of two: the base under a name, and one that answers nothing rightly."""
    model, _ = small
    here = t2k.Expert.from_model(model)
    folder = tmp_path / "experts"
    folder.mkdir()
    here.save(folder / "still.safetensors")
    (8.0 * here).save(folder / "also.safetensors")
    far = {n: v * 0.0 for n, v in here.z.items()}
    t2k.Expert(far, here.fingerprints).save(folder / "far.safetensors")
    return folder


@pytest.mark.parametrize("shots_from", ["validation", "test"])
def test_finds_saves_and_scores(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shots_from: str
) -> None:
    out = tmp_path / "mixtures"
    argv = ["adapt", "small", "--task", "other", "--expert", str(experts), "--out", str(out)]
    assert main([*argv, *QUICK, "--shots-from", shots_from, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["on_shots"]["accuracy"] == 1.0, "the base knows this task"
    assert result["problems"] == 8 and result["leaked"] == (3 if shots_from == "test" else 0)
    assert result["forwards"] == result["budget"] == 2 * 3 * 6
    assert set(result["scores"]) == {"base", "mixture"}
    assert load_mixture(out, "other").weights == result["weights"]
    assert main([*argv, *QUICK, "--per", "layer", "--method", "random", "--name", "again"]) == 0
    shown = capsys.readouterr().out
    assert "(mean over the layers)" in shown and "again.json" in shown


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--shots", "0"], "--shots must be at least 1"),
        (["--high", "0.5"], "low..high must hold 0 (the base) and 1"),
        (["--budget", "10"], "budget must be at least 36 forwards"),
        (["--expert", "nowhere.safetensors"], "does not exist"),
        (["--name", "../up"], "task must consist of"),
    ],
)
def test_bad_input(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str],
    words: str,
) -> None:  # fmt: skip
    argv = ["adapt", "small", "--task", "other", "--out", str(tmp_path / "m")]
    assert main([*argv, "--expert", str(experts), *QUICK, *change]) == 2
    assert words in capsys.readouterr().err


def test_no_experts_and_two_of_a_name(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["adapt", "small", "--task", "other", "--out", str(tmp_path / "m"), *QUICK]
    assert main(argv) == 2
    assert "--expert must be given at least once" in capsys.readouterr().err
    twice = ["--expert", str(experts), "--expert", str(experts / "far.safetensors")]
    assert main([*argv, *twice]) == 2
    assert "two files are called far" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([*argv, "--expert", str(tmp_path / "empty")]) == 2
    assert "holds no *.safetensors" in capsys.readouterr().err


def test_a_mixture_is_recalled_by_the_file_it_was_found_with(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or by its name; the error names the tasks that there are, as a command does."""
    data, out = tmp_path / "data" / "own.jsonl", tmp_path / "mixtures"
    data.parent.mkdir()
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    given = ["small", "--expert", str(experts), "--max-new-tokens", "4"]
    assert main(["adapt", *given, "--task", str(data), "--out", str(out), *QUICK]) == 0
    asked = ["generate", *given, "--strategy", "few-shot", "--mixtures", str(out), "--prompt",
             "3+1=", "--json"]  # fmt: skip
    capsys.readouterr()
    for task in (str(data), "own"):
        assert main([*asked, "--task", task]) == 0
        assert json.loads(capsys.readouterr().out)["outputs"][0]["mixture"]["task"] == "own"
    assert main([*asked, "--task", "other"]) == 2
    said = capsys.readouterr().err
    assert "'few-shot' needs --task, one of the tasks that a mixture was found for (own)" in said
