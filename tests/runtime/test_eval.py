"""`t2 eval`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.cli import main


@pytest.fixture
def expert(small: Any, tmp_path: Path) -> Path:
    """Far from the base, so that it answers nothing rightly."""
    model, _ = small
    here = t2k.Expert.from_model(model)
    z = {name: -torch.ones_like(value) for name, value in here.z.items()}
    path = tmp_path / "far.safetensors"
    t2k.Expert(z, here.fingerprints, here.base_model).save(path)
    return path


def test_base_and_experts_in_one_table(expert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "small", "--task", "other", "--limit", "40", "--expert", str(expert)]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    base, far = result["scores"]["base"], result["scores"]["far"]
    assert result["problems"] == 40 and result["task"] == "other" and result["split"] == "test"
    assert base["accuracy"] > 0.9 and far["accuracy"] < 0.1
    assert base["interval"][0] < base["accuracy"] <= base["interval"][1]
    assert far["points_over_base"] == pytest.approx(100 * (far["accuracy"] - base["accuracy"]))
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()
    assert "40 distinct test problems" in table[0] and len(table) == 3
    assert table[1].split()[0] == "base" and table[2].split()[-1] == "points"


def test_data_of_the_users_own(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "test.jsonl"
    rows = [json.dumps({"prompt": f"say ab{c}d=", "answer": f"ab{c}d"}) for c in "abcdefgh"]
    path.write_text("\n".join([*rows, "{broken"]))
    words = ["eval", "small", "--task", str(path), "--max-new-tokens", "8", "--rows", "3"]
    assert main(words) == 2
    assert "line 9" in capsys.readouterr().err
    assert main([*words, "--skip-bad-lines"]) == 0
    out = capsys.readouterr().out
    assert "8 distinct test problems" in out and "1 broken lines" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--task", "gsm8k"), "needs its data"),
        (("--task", "gsm8"), "Did you mean 'gsm8k'"),
        (("--task", "add", "--limit", "0"), "--limit must be"),
        (("--task", "add", "--rows", "0"), "--rows must be"),
        (("--task", "gsm8k", "--data", "nowhere"), "no such file or folder"),
        (("--task", "add", "--expert", "base.safetensors"), "rename"),
        (("--task", "add", "--extract", "nubmer"), "Did you mean number?"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["eval", "small", *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and not out and said in err and len(err.splitlines()) == 1
