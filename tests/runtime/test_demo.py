import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import t2kernels as t2k
from t2runtime.base_model import build_tokenizer
from t2runtime.cli import main
from t2runtime.demo import plot
from t2runtime.demo.small import _gain
from t2runtime.evaluate import Score


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A tiny random GPT-2 on disk whose tokenizer has neither a pad token nor a chat template."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=128,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_any_local_model_with_random_experts(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--model", str(gpt2), "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["identity_bit_exact"] and results["experts"] == "random"
    mixtures = [json.dumps(row["mixture"]) for row in results["mixed_batch"]]
    assert len(set(mixtures)) == len(mixtures), "every request has its own"
    for rate in results["cost"].values():
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    said = capsys.readouterr().out
    assert "demo passed" in said and "1.00 x base" in said


def test_any_local_model_with_a_given_expert(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    t2k.convert(model, progress=False)
    expert = 3.0 * t2k.Expert({n: z + 0.1 for n, z in t2k.Expert.from_model(model).z.items()})
    expert.save(tmp_path / "mine.safetensors")
    words = ["demo", "--model", str(gpt2), "--expert", str(tmp_path / "mine.safetensors")]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["mixed_batch"]
    assert rows[0]["mixture"] is None and set(rows[1]["mixture"]) == {"mine"}


def test_too_little_gain_fails() -> None:
    assert _gain(Score(100, 400), Score(300, 400))["passed"]
    assert not _gain(Score(100, 400), Score(150, 400))["passed"]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = {
        "skills": {"add": _gain(Score(100, 400), Score(300, 400))},
        "curves": {"add": [0.3, 0.5, 0.8]},
        "stopped_early": ["add"],
        "cost": {n: {"median": 100.0, "low": 90.0, "high": 104.0} for n in ("base", "merged")},
    }
    assert plot.save(results, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 10_000
