"""`t2 decompose` of mixture-of-experts checkpoints: what no layer in memory could use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.cli import main
from t2runtime.commands.decompose import EXPERTS

transformers = pytest.importorskip("transformers")


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def decompose(capsys: Any, folder: Path, out: Path, *words: str) -> str:
    assert main(["decompose", str(folder), "--out", str(out), "--device", "cpu", *words]) == 0
    return capsys.readouterr().out


def test_stacked_experts_are_left_out_unless_asked_for(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    said = decompose(capsys, mixtral, out)
    # Two blocks, three experts of three matrices; four of attention.
    assert "left out 18 matrices of experts" in said and "--with-experts" in said
    assert len(t2k.FactorStore(out)) == 8 and "made by svd fp32 (8)" in said
    model = transformers.MixtralForCausalLM.from_pretrained(mixtral)
    report = t2k.convert(model, decomposition=out, progress=False)
    assert len(report.converted) == 8 and "expert tensor" in str(report)
    said = decompose(capsys, mixtral, out, "--with-experts", "--method", "gram")
    assert "made by gram (18)" in said
    assert "of experts" not in said and len(t2k.FactorStore(out)) == 26
    found = json.loads(decompose(capsys, mixtral, tmp_path / "json", "--json"))
    assert found["experts"] == {"matrices": 18, "left_out": True, "known": True}


def test_experts_of_a_model_that_cannot_be_built_are_taken_and_named(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mixtral / "config.json").write_text('{"model_type": "nobody-knows"}')
    said = decompose(capsys, mixtral, tmp_path / "out")
    assert "18 of them are matrices of experts" in said and "not known" in said
    assert len(t2k.FactorStore(tmp_path / "out")) == 26


def test_experts_that_are_layers_are_taken(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    expert = torch.nn.ModuleDict({"w1": torch.nn.Linear(2, 2)})
    block = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([expert])})
    whole = torch.nn.ModuleDict({"block": block})
    monkeypatch.setattr("t2runtime.commands.decompose.skeleton", lambda path: whole)
    assert "of experts" not in decompose(capsys, mixtral, tmp_path / "out")
    assert len(t2k.FactorStore(tmp_path / "out")) == 26


def test_names_of_experts() -> None:
    for name in ("model.layers.0.mlp.experts.11.up_proj", "l.0.block_sparse_moe.experts.0.w1"):
        assert re.fullmatch(EXPERTS, name)
    for name in ("model.layers.0.mlp.shared_experts.up_proj", "model.layers.0.mlp.up_proj"):
        assert not re.fullmatch(EXPERTS, name)
