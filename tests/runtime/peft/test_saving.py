"""Adapters in files: what is written, every way to read it, and bases that do not fit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import t2kernels as t2k
import t2runtime.peft as svf


@pytest.fixture
def saved(kit, stored, tmp_path):
    """(folder of an adapter, its logits)."""
    model = kit.model(stored())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", kit.logits(model)


def test_files_hold_z_and_fingerprints(kit, base, saved):
    folder, _ = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 14
    assert all(k.endswith(".svf_z.weight") and v.dtype == torch.float32 for k, v in tensors.items())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "SVF" and "decomposition" not in config
    assert config["requires"] == "import t2runtime.peft"
    name = "model.layers.0.mlp.up_proj"
    assert config["fingerprints"][name] == t2k.fingerprint(base.get_submodule(name).weight)
    assert "import t2runtime.peft" in (folder / "README.md").read_text()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained(kit, stored, saved, low_cpu_mem_usage):
    folder, expected = saved
    model = peft.PeftModel.from_pretrained(
        stored(), folder, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(kit.logits(model), expected)
    assert not any(p.requires_grad for p in model.parameters())
    trainable = peft.PeftModel.from_pretrained(stored(), folder, is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())


def test_the_other_ways_to_load(kit, stored, saved):
    folder, expected = saved
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(kit.logits(auto), expected)
    model = stored()
    model.load_adapter(str(folder))
    assert torch.equal(kit.logits(model), expected)
    model.disable_adapters()
    assert torch.equal(kit.logits(model), kit.logits(stored()))
    second = kit.model(stored(), "first")
    second.load_adapter(str(folder), "second")
    second.set_adapter("second")
    assert torch.equal(kit.logits(second), expected)


def test_transformers_reads_z_in_fp32(kit, stored, saved):
    folder, _ = saved
    expected = load_file(folder / "adapter_model.safetensors")
    model = stored().bfloat16()
    model.load_adapter(str(folder))
    for name, layer in svf.tuner_layers(model).items():
        z = layer.svf_z["default"].weight
        assert z.dtype == torch.float32
        assert torch.equal(z, expected[f"base_model.model.{name}.svf_z.weight"])
    assert model.active_adapters() == ["default"]


def test_transformers_adds_and_saves(kit, stored, tmp_path):
    model = stored()
    model.add_adapter(svf.SVFConfig(target_modules=["q_proj"]), "own")
    kit.move(model, "own")
    expected = kit.logits(model)
    model.save_pretrained(tmp_path / "own")
    again = stored()
    again.load_adapter(str(tmp_path / "own"))
    assert torch.equal(kit.logits(again), expected)


def test_several_adapters_in_one_folder(kit, stored, tmp_path):
    model = kit.model(stored(), "math", "code")
    model.save_pretrained(tmp_path / "both")
    again = peft.PeftModel.from_pretrained(stored(), tmp_path / "both" / "math", "math")
    again.load_adapter(tmp_path / "both" / "code", "code")
    names = ["math", "code", "__base__"]
    expected = kit.logits(model, adapter_names=names)
    assert torch.equal(kit.logits(again.eval(), adapter_names=names), expected)


@pytest.mark.parametrize("settings", [
    {"rank": 4, "parametrisation": "sigmoid-normalised"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    {"target_modules": r".*layers\.0\..*_proj", "exclude_modules": ["o_proj"]},
], ids=str)  # fmt: skip
def test_settings_come_back(kit, stored, tmp_path, settings):
    model = kit.model(stored(), **settings)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(stored(), tmp_path / "adapter").eval()
    assert svf.tuner_layers(again).keys() == svf.tuner_layers(model).keys()
    assert torch.equal(kit.logits(again), kit.logits(model))


# -- another base ------------------------------------------------------------------------------


def test_another_base_is_refused_by_name(kit, stored, saved):
    folder, _ = saved
    other = kit.base(seed=1)
    weights = {k: v.clone() for k, v in other.state_dict().items()}
    ways = (
        lambda model: peft.PeftModel.from_pretrained(model, folder),
        lambda model: model.load_adapter(str(folder)),
    )
    for load in ways:
        with pytest.raises(ValueError, match=r"another base model \(.*base\): the weight of layer"):
            load(other)
        assert all(torch.equal(v, weights[k]) for k, v in other.state_dict().items())
        assert other.state_dict().keys() == weights.keys(), "nothing was changed"
    model = kit.model(kit.base(seed=1), "mine")
    with pytest.raises(ValueError, match="allow_mismatch"):
        model.load_adapter(folder, "theirs")
    assert list(model.peft_config) == ["mine"]
    shorter = stored()
    shorter.model.layers = shorter.model.layers[:1]
    with pytest.raises(ValueError, match="'model.layers.1.*which LlamaForCausalLM lacks"):
        peft.PeftModel.from_pretrained(shorter, folder)


def test_the_override(kit, stored, saved):
    folder, expected = saved
    with svf.loading(allow_mismatch=True):
        model = peft.PeftModel.from_pretrained(kit.base(seed=1), folder).eval()
    assert not kit.close(kit.logits(model), expected, 1e-2)
    own = model.peft_config["default"].fingerprints
    layer = svf.tuner_layers(model)["model.layers.0.mlp.up_proj"]
    assert own["model.layers.0.mlp.up_proj"] == t2k.fingerprint(layer.base_weight())
    # Other sizes stay an error.
    with svf.loading(allow_mismatch=True), pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(kit.base(hidden_size=16, num_attention_heads=2), folder)


def test_a_configuration_can_be_used_for_two_bases(kit):
    config = svf.SVFConfig(task_type="CAUSAL_LM")
    peft.get_peft_model(kit.base(), config)
    peft.get_peft_model(kit.base(seed=1), config)
    assert config.fingerprints is None


def test_a_model_of_bf16_is_the_same_base(kit, stored, saved):
    folder, _ = saved
    peft.PeftModel.from_pretrained(stored().bfloat16(), folder)


# -- decompositions ----------------------------------------------------------------------------


def test_decomposition_from_a_store(kit, stored, saved, tmp_path):
    folder, expected = saved
    t2k.decompose_checkpoint(tmp_path / "base", tmp_path / "factors", progress=False)
    config = svf.SVFConfig(decomposition=str(tmp_path / "factors"), task_type="CAUSAL_LM")
    model = peft.get_peft_model(stored(), config)
    model.save_pretrained(tmp_path / "fresh")
    assert "factors" not in (tmp_path / "fresh" / "adapter_config.json").read_text()
    with svf.loading(decomposition=tmp_path / "factors"):
        loaded = peft.PeftModel.from_pretrained(stored(), folder).eval()
    assert kit.close(kit.logits(loaded), expected)
    other = kit.base(seed=1)
    with pytest.raises(ValueError, match="fingerprint"):
        peft.get_peft_model(other, svf.SVFConfig(decomposition=str(tmp_path / "factors")))
    assert not svf.tuner_layers(other), "the failed adapter was taken back"
    with pytest.raises(FileNotFoundError, match="manifest"):
        peft.get_peft_model(kit.base(), svf.SVFConfig(decomposition=str(tmp_path)))


def test_a_store_of_k_components_sets_the_rank(kit, stored, tmp_path):
    stored()
    t2k.decompose_checkpoint(tmp_path / "base", tmp_path / "factors", rank=4, progress=False)
    config = svf.SVFConfig(decomposition=str(tmp_path / "factors"), task_type="CAUSAL_LM")
    model = peft.get_peft_model(stored(), config)
    assert model.peft_config["default"].rank == 4
    assert {layer.rank for layer in svf.tuner_layers(model).values()} == {4}
    with pytest.raises(ValueError, match="has 4. Set rank=4"):
        peft.get_peft_model(kit.base(), svf.SVFConfig(decomposition=config.decomposition, rank=9))


# -- the import --------------------------------------------------------------------------------


def test_without_the_import_peft_names_the_key(saved):
    folder, _ = saved
    code = (
        "import peft, sys\n"
        f"peft.PeftConfig.from_pretrained({str(folder)!r})\n"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "KeyError: 'SVF'" in done.stderr
    assert "import t2runtime.peft" in (folder / "adapter_config.json").read_text()


def test_unsupported_versions_are_named():
    from t2runtime.peft.version import check_version

    for found in ("0.15.2", "0.20.0", "0.30.0"):
        with pytest.raises(ImportError, match=f"tested: .*0.21.2.* found peft {found}"):
            check_version(found)
    for tested in svf.TESTED:
        check_version(tested)


def test_registering_twice_is_harmless():
    from t2runtime.peft.model import register

    register()
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SVF"] is svf.SVFConfig


def test_copies_of_the_config(kit, base):
    model = kit.model(base)
    config = model.peft_config["default"]
    assert copy.deepcopy(config) == config
    assert isinstance(transformers.PreTrainedModel, type) and config.peft_type == "SVF"
