"""The recipe of docs/training-real-models.md, at small size: plan, decompose, train, inspect,
evaluate, generate, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.cli import main

Make = Callable[..., Path]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_recipe(
    make: Make, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    folder = str(make(family, torch.bfloat16, shard="20KB"))
    factors, expert = str(tmp_path / "factors"), str(tmp_path / "add.safetensors")

    def call(*words: str) -> dict[str, Any]:
        code = main([*words, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    planned = call(
        "plan", folder, "--targets", "mlp", "--prompts", "2", "--samples", "2", "--tokens", "16"
    )
    made = call("decompose", folder, "--out", factors, "--targets", "mlp")
    assert made["weights"] == planned["layers"] == 6
    common = ("--targets", "mlp", "--factors", factors)
    call(
        "train", folder, *common, "--task", "add", "--out", expert, "--steps", "2", "--prompts",
        "2", "--samples", "2", "--max-new-tokens", "3",
    )  # fmt: skip
    looked = call("inspect", expert)
    assert looked["values"] == planned["values"]
    assert any(value > 0 for value in looked["most_moved"].values())
    call("eval", folder, *common, "--task", "add", "--expert", expert, "--limit", "4")
    call("generate", folder, *common, "--expert", expert, "--prompt", "1+1=")
    out = tmp_path / "merged"
    call("export", folder, "--experts", expert, "--factors", factors, "--out", str(out))
    model = tools.load(folder)
    t2k.convert(model, targets="mlp", decomposition=factors, progress=False)
    bank = t2k.ExpertBank(model)
    bank.add("add", t2k.Expert.load(expert))
    bank.merge("add")
    assert torch.equal(tools.logits(tools.load(out)), tools.logits(model))
