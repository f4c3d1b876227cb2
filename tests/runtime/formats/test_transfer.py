"""Experts on another model of the same shapes: order, fingerprints, refusals, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.adapt.prompt import Categories
from t2runtime.cli import main
from t2runtime.formats.transfer import transfer

Make = Callable[..., Path]


@pytest.fixture
def pair(make: Make, tools: Any) -> tuple[Any, Any]:
    """Two models of the same shapes and other weights, converted."""
    models = [tools.load(make("llama", name=f"m{seed}", seed=seed)) for seed in (0, 1)]
    for model in models:
        t2k.convert(model, progress=False)
    return models[0], models[1]


def test_the_kth_z_goes_to_the_kth_singular_value(pair: tuple[Any, Any], tools: Any) -> None:
    first, second = pair
    expert = tools.random_expert(first, 0)
    with pytest.raises(ValueError, match="another base weight"):
        t2k.ExpertBank(second).add("x", expert)
    moved = transfer(expert, second)
    t2k.ExpertBank(second).add("x", moved)
    base = tools.logits(second)
    moved.apply_to(second)
    assert not torch.equal(base, tools.logits(second))
    name, layer = next(iter(t2k.svf_layers(second).items()))
    U, S, Vh = torch.linalg.svd(layer.weight.double(), full_matrices=False)
    expected = (U * (S * expert.z[name].double())) @ Vh
    torch.testing.assert_close(
        layer(torch.eye(layer.in_features)).T.double(), expected, atol=1e-5, rtol=1e-4
    )
    assert moved.base_model == second.config._name_or_path != expert.base_model
    with pytest.raises(ValueError, match="another base weight"):
        t2k.ExpertBank(first).add("x", moved)


def test_a_shuffle_is_a_permutation_that_the_seed_decides(
    pair: tuple[Any, Any], tools: Any
) -> None:
    first, second = pair
    expert = tools.random_expert(first, 0)
    one, same, other = (transfer(expert, second, "shuffled", seed=s) for s in (3, 3, 4))
    for name, z in expert.z.items():
        assert torch.equal(one.z[name], same.z[name])
        assert torch.equal(one.z[name].sort().values, z.sort().values)
        assert not torch.equal(one.z[name], z) and not torch.equal(one.z[name], other.z[name])
    # A layer's permutation depends on no other layer.
    name = list(expert.z)[3]
    alone = transfer(t2k.Expert({name: expert.z[name]}), second, "shuffled", seed=3)
    assert torch.equal(alone.z[name], one.z[name])
    # Layers of one rank are shuffled differently.
    wide = [n for n, z in expert.z.items() if len(z) == 32]
    equal = t2k.Expert({n: torch.arange(32.0) for n in wide[:2]})
    a, b = transfer(equal, second, "shuffled").z.values()
    assert not torch.equal(a, b)
    assert one.metadata["transfer"]["seed"] == 3


def test_what_was_measured_elsewhere_is_not_kept(pair: tuple[Any, Any], tools: Any) -> None:
    expert = tools.random_expert(pair[0], 0)
    asked = Categories(("add", "max")).facts()
    expert.metadata = {"task": "add", "validation": 0.9, "categories": asked}
    moved = transfer(expert, pair[1])
    kept = {"task": "add", "categories": asked}
    assert moved.metadata == {**kept, "transfer": {"from": None, "order": "sigma"}}
    assert moved.description == expert.description


@pytest.mark.parametrize(
    ("z", "order", "seed", "said"),
    [
        ({"none.q_proj": torch.ones(32)}, "sigma", 0, "1 of 1 layers that the model lacks, first"),
        ({"model.layers.0.mlp.up_proj": torch.ones(31)}, "sigma", 0, "31 values for layer 'model."),
        ({"model.layers.0.mlp.up_proj": torch.ones(32)}, "best", 0, "one of sigma, shuffled, got"),
        ({"model.layers.0.mlp.up_proj": torch.ones(32)}, "shuffled", -1, "seed must be a whole"),
    ],
)
def test_refused_by_name(
    pair: tuple[Any, Any], z: dict[str, torch.Tensor], order: str, seed: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        transfer(t2k.Expert(z), pair[1], order, seed=seed)


def test_a_model_that_is_not_converted(make: Make, tools: Any) -> None:
    with pytest.raises(ValueError, match="must be a converted one"):
        transfer(t2k.Expert({"up": torch.ones(2)}), tools.load(make()))


@pytest.mark.parametrize("order", ["sigma", "shuffled"])
def test_the_command_gives_the_same(
    make: Make, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], order: str
) -> None:
    first, second = make(name="first"), make(name="second", seed=1)
    expert = tools.write_expert(first, tmp_path / "e.safetensors")
    out = tmp_path / "new" / "moved.safetensors"
    words = ["convert", str(tmp_path / "e.safetensors"), "--model", str(second), "--out", str(out)]
    if order == "shuffled":
        words += ["--order", order, "--seed", "5"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["order"] == order and result["layers"] == len(expert.z)
    model = tools.load(second)
    t2k.convert(model, progress=False)
    moved, here = t2k.Expert.load(out), transfer(expert, model, order, seed=5)
    assert moved.fingerprints == here.fingerprints
    assert all(torch.equal(moved.z[name], here.z[name]) for name in here.z)
    assert moved.base_model == str(second)
    assert order in Path(result["card"]).read_text()
    assert main(words) == 0
    assert f"in order '{order}'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        ("e.safetensors", ["--mask", "none"], "--mask is for the authors' files"),
        ("p.pt", ["--order", "sigma"], "--order is for a transfer"),
        ("gone.safetensors", [], "gone.safetensors"),
    ],
)
def test_mistakes_on_the_command_line(
    make: Make, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str,
    options: list[str], said: str,
) -> None:  # fmt: skip
    folder, out = make(), tmp_path / "new" / "x.safetensors"
    tools.write_expert(folder, tmp_path / "e.safetensors")
    words = ["convert", str(tmp_path / file), "--model", str(folder), "--out", str(out), *options]
    assert main(words) == 2
    assert said in capsys.readouterr().err and not out.parent.exists()
    other = make("gpt2", name="other")
    words = ["convert", str(tmp_path / "e.safetensors"), "--model", str(other), "--out", str(out)]
    assert main(words) == 2
    assert "lacks 14 of 14 layers" in capsys.readouterr().err and not out.parent.exists()
