"""Statistics, pictures and cards of experts, and `t2 inspect`."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.card import card_text, write_card
from t2runtime.cli import main
from t2runtime.describe import by_kind, cosines, kind_of, most_moved
from t2runtime.loading import load


def expert(seed: int = 0, **more: Any) -> t2k.Expert:
    gen = torch.Generator().manual_seed(seed)
    names = [
        f"model.layers.{i}.{n}"
        for i in range(3)
        for n in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    z = {n: 1 + 0.1 * (i + 1) * torch.randn(8, generator=gen) for i, n in enumerate(names)}
    return t2k.Expert(z, dict.fromkeys(names, "ab"), "owner/base", "adds numbers", more)


def test_by_kind_and_most_moved() -> None:
    e = expert()
    kinds = by_kind(e)
    assert list(kinds) == ["mlp down_proj", "mlp up_proj", "attention q_proj"]
    assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1)
    assert all(kind["layers"] == 3 and kind["values"] == 24 for kind in kinds.values())
    moved = most_moved(e, 2)
    values = list(moved.values())
    assert len(moved) == 2 and values[0] >= values[1]
    z = e.z[next(iter(moved))]
    assert values[0] == pytest.approx(float((z - 1).square().mean().sqrt()))
    still = t2k.Expert({"up_proj": torch.ones(3)})
    assert by_kind(still)["mlp up_proj"]["share"] == 0.0
    assert kind_of("h.0.attn.c_attn") == "attention c_attn"


def test_cosines() -> None:
    a, b = expert(0), expert(1)
    found = cosines({"a": a, "b": b, "minus": -a, "half": 0.5 * a})
    assert found[0][0] == found[0][3] == 1.0 and found[0][2] == -1.0
    assert found[0][1] == found[1][0] is not None and abs(found[0][1]) < 1
    assert cosines({"a": a, "still": 0 * a})[0][1] is None
    with pytest.raises(ValueError, match="different models or ranks"):
        cosines({"a": a, "b": t2k.Expert({n: torch.ones(3) for n in a.z})})


def test_inspect_one_and_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{n}.safetensors") for n in "ab"]
    for seed, file in enumerate(files):
        expert(seed).save(file)
    assert main(["inspect", files[0], "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["kinds"]["mlp up_proj"]["layers"] == 3 and len(one["most_moved"]) == 5
    assert main(["inspect", *files, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["cosines"]["a"]["a"] == 1.0 and abs(both["cosines"]["a"]["b"]) < 1
    assert main(["inspect", *files]) == 0
    out = capsys.readouterr().out
    assert "cosine" in out and "share of movement" in out
    assert main(["inspect", files[0], files[0]]) == 2
    assert main(["inspect", files[0], str(tmp_path)]) == 2
    assert "only experts" in capsys.readouterr().err


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = [str(tmp_path / f"{n}.safetensors") for n in "ab"]
    for seed, file in enumerate(files):
        expert(seed).save(file)
    picture = tmp_path / "z.png"
    assert main(["inspect", *files, "--plot", str(picture)]) == 0
    assert str(picture) in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert main(["inspect", files[0], "--plot", str(tmp_path / "z.doc")]) == 2
    assert ".png" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.doc"))


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def no_plots(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest, **more)

    expert().save(tmp_path / "a.safetensors")
    monkeypatch.setattr(builtins, "__import__", no_plots)
    words = ["inspect", str(tmp_path / "a.safetensors"), "--plot", str(tmp_path / "z.png")]
    assert main(words) == 2
    assert "t2kernels[plot]" in capsys.readouterr().err


def test_the_card(tmp_path: Path) -> None:
    e = expert(
        task="gsm8k", data="train split", reward="+1 right, -1 wrong", licence="mit",
        tags=["math"], accuracy=0.8125, accuracy_interval=[0.75, 0.9],
        test={"base": {"accuracy": 0.5, "interval": [0.4, 0.6]}, "problems": 256},
        config={"lr": 0.002}, note="a | b `c`\nd",
    )  # fmt: skip
    path = tmp_path / "math.safetensors"
    card = write_card(e, path)
    assert card == tmp_path / "math.md"
    text = card.read_text()
    head = text.split("---")[1]
    assert 'base_model: "owner/base"' in head and 'license: "mit"' in head and '["math"]' in head
    for said in (
        "# math", "adds numbers", "9 weights by fingerprint", "gsm8k", "train split", "+1 right",
        "0.8125 (95 % interval 0.75 to 0.9)",
        "| test base | 0.5 (95 % interval 0.4 to 0.6) |", "| test problems | 256 |",
        "mlp up\\_proj",
        '"lr": 0.002', 'Expert.load("math.safetensors")', '["down_proj", "q_proj", "up_proj"]',
        "a \\| b \\`c\\` d",
    ):  # fmt: skip
        assert said in text, said
    assert "accuracy interval" not in text
    bare = card_text(t2k.Expert({"up": torch.ones(2)}), "e.safetensors")
    assert "not stated" in bare and "Metrics" not in bare


def run_snippet(e: t2k.Expert, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    e.save(folder / "e.safetensors")
    text = write_card(e, folder / "e.safetensors").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    exec(code, {})


def test_the_snippet_for_the_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    model, _ = load("small")
    t2k.convert(model, targets="k_proj", progress=False)
    run_snippet(t2k.Expert.from_model(model), tmp_path, monkeypatch)


def test_the_snippet_of_a_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    t2k.convert(model, targets="mlp", progress=False)
    run_snippet(t2k.Expert.from_model(model), tmp_path, monkeypatch)
