"""Checkpoints whose keys loading rearranges: factors and exports of models that also see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import t2kernels as t2k
from t2runtime.cli import main
from t2runtime.formats.weights import Weights

transformers = pytest.importorskip("transformers")

_TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.2,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# As wide as the text's layers: attention of both has matrices of one shape under one last name.
_EYES: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def _gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**_TEXT, sliding_window=8).to_dict(),
        vision_config=transformers.SiglipVisionConfig(**_EYES).to_dict(),
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _llava() -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT).to_dict(),
        vision_config=transformers.CLIPVisionConfig(**_EYES).to_dict(),
        image_token_id=63,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    """Its checkpoint lacks a part in the middle: only the values tell which weight is meant."""
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


MAKERS = {"gemma3": _gemma3, "llava": _llava, "qwen2-vl": _qwen2_vl}


def _saved(folder: Path, make: Any, shard: str = "5GB") -> Any:
    """The model as it is after saving and loading."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():  # biases and class tokens begin at zero
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return type(model).from_pretrained(folder).eval()


def _rearranged(folder: Path) -> Path:
    """The eyes' keys as the hub's older files have them: another part in the middle."""
    file = folder / "model.safetensors"
    tensors = {
        key.replace("vision_tower.encoder.", "vision_tower.vision_model.encoder."): value
        for key, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 13).view(2, 5)).logits


@pytest.mark.parametrize(
    ("family", "shard"),
    [
        ("gemma3", "5GB"),
        ("gemma3", "10KB"),
        ("llava", "5GB"),
        ("llava", "10KB"),
        ("qwen2-vl", "5GB"),
    ],
)
def test_factors_and_a_merged_checkpoint(tmp_path: Path, family: str, shard: str) -> None:
    folder, factors, out = (tmp_path / name for name in ("model", "factors", "out"))
    model = _saved(folder, MAKERS[family], shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "10KB")
    base = _logits(model)
    stored = t2k.decompose_checkpoint(folder, factors, device="cpu", progress=False)
    report = t2k.convert(model, decomposition=factors, progress=False)
    names = {done.name for done in report.converted}
    assert any("language_model.layers" in name for name in names)
    assert not names & set(stored.names)
    for name, layer in t2k.svf_layers(model).items():
        made = t2k.decompose(layer.weight.detach())
        assert all(torch.equal(a, b) for a, b in zip(layer.factors, made, strict=True)), name
    generator = torch.Generator().manual_seed(0)
    z = {n: 1 + 0.3 * torch.randn(m.rank, generator=generator)
         for n, m in t2k.svf_layers(model).items()}  # fmt: skip
    prints = {n: m.fingerprint for n, m in t2k.svf_layers(model).items()}
    expert = t2k.Expert(z, prints)
    expert.save(tmp_path / "e.safetensors")
    bank = t2k.ExpertBank(model)
    bank.add("e", expert)
    bank.merge("e")
    words = ["export", str(folder), "--experts", str(tmp_path / "e.safetensors")]
    assert main([*words, "--factors", str(factors), "--out", str(out)]) == 0
    exported = type(model).from_pretrained(out).eval()
    own = dict(model.named_parameters())
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, own[name]), name
    assert torch.equal(_logits(exported), _logits(model))
    assert not torch.equal(_logits(exported), base)


def test_values_decide_where_names_do_not(tmp_path: Path) -> None:
    model = _saved(tmp_path / "model", _llava)
    folder = _rearranged(tmp_path / "model")
    model = type(model).from_pretrained(folder).eval()
    t2k.convert(model, progress=False)
    prints = {name: layer.fingerprint for name, layer in t2k.svf_layers(model).items()}
    weights = Weights(folder, prints, fingerprints=prints)
    for name in prints:
        assert t2k.fingerprint(weights.read(name)) == prints[name]
    eyes = next(n for n in prints if n.endswith("vision_tower.encoder.layers.0.self_attn.q_proj"))
    assert ".vision_model." in weights.by_layer[eyes].name
    # Without values nothing is guessed, and the error says what comes near.
    with pytest.raises(ValueError, match=r"lacks .* of 1 layers.*near.*vision_model.*q_proj"):
        Weights(folder, [eyes])
    with pytest.raises(ValueError, match="lacks 1 of 1 layers"):
        Weights(folder, [eyes], fingerprints={eyes: "0" * 32})


def test_two_weights_of_the_same_values_are_an_error(tmp_path: Path) -> None:
    model = _saved(tmp_path / "model", _llava)
    folder = _rearranged(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    key = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    tensors["another." + key] = tensors[key].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    stored = t2k.decompose_checkpoint(folder, tmp_path / "f", device="cpu", progress=False)
    assert len([name for name in stored.names if name.endswith(key.removesuffix(".weight"))]) == 2
    with pytest.raises(ValueError, match=r"several weights.*another\.vision_tower.*, vision_t"):
        t2k.convert(model, decomposition=tmp_path / "f", progress=False)


def test_an_svf_adapter_of_peft_reads_the_same_factors(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import t2runtime.peft as svf

    model = _saved(tmp_path / "model", _llava)
    t2k.decompose_checkpoint(tmp_path / "model", tmp_path / "f", device="cpu", progress=False)
    base = _logits(model)
    config = svf.SVFConfig(decomposition=str(tmp_path / "f"), target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(_logits(wrapped), base)
