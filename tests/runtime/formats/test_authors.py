"""Files as the authors' public code writes them, made from scratch; W′ against their formula."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import t2kernels as t2k
from t2runtime.cli import main
from t2runtime.formats import authors

Make = Callable[..., Path]


def parameters(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """p of every MLP matrix, in the model's order, as their training initialises and moves it."""
    gen = torch.Generator().manual_seed(seed)
    return {
        name: (0.1 + 0.5 * torch.randn(min(w.shape), generator=gen)).bfloat16()
        for name, w in model.state_dict().items()
        if "mlp" in name
    }


def formula(weight: Tensor, q: Tensor) -> Tensor:
    """U·diag(σ⊙q)·Vᵀ·Σσ/Σ(σ⊙q) in fp64."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (U * (S * q)) @ Vh * (S.sum() / (S * q).sum())


def ours(weight: Tensor, z: Tensor) -> Tensor:
    U, S, V = t2k.decompose(weight, dtype=torch.float64)
    return (U * (S * z.double())) @ V.t()


def as_policy(p: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a module that holds them in a ParameterList under that name."""
    module = nn.Module()
    module.learnable_params_module_list = nn.ParameterList(nn.Parameter(v) for v in p.values())
    return module.state_dict()


def as_parameters(p: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(v) for name, v in p.items()}


def as_search(p: dict[str, Tensor], other: dict[str, Tensor], per_layer: bool) -> dict[str, Tensor]:
    alpha = torch.tensor([[0.7], [0.4]])
    if per_layer:
        alpha = alpha * torch.linspace(0.5, 1.5, len(p))
    content = {"adaptive_weights": alpha}
    for name in p:
        for k, vectors in enumerate((p, other)):
            content[f"weights_{k}_k_{name.replace('.', '_')}"] = vectors[name]
    return content


def run(folder: Path, file: Path, out: Path, *words: str) -> int:
    return main(["convert", str(file), "--model", str(folder), "--out", str(out), *words])


@pytest.mark.parametrize("mask", ["sigmoid", "bf16-sigmoid"])
@pytest.mark.parametrize("layout", ["policy", "parameters"])
def test_weights_equal_the_formula(
    make: Make, tools: Any, tmp_path: Path, layout: str, mask: str
) -> None:
    folder = make("llama")
    model = tools.load(folder)
    p = parameters(model)
    content = as_policy(p) if layout == "policy" else as_parameters(p)
    old = layout == "parameters" and mask == "sigmoid"  # the file format before torch 1.6, too
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=not old)
    out = tmp_path / "math.safetensors"
    assert run(folder, tmp_path / "file.pt", out, "--mask", mask, "--max-mult", "2") == 0
    expert = t2k.Expert.load(out)
    assert len(expert.z) == 6 and expert.metadata["layout"] == layout
    t2k.convert(model, targets="mlp", progress=False)
    layers = t2k.svf_layers(model)
    bank = t2k.ExpertBank(model)
    bank.add("math", expert)  # its fingerprints are the model's
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    bank.merge("math")
    for name, weight in weights.items():
        own = p[f"{name}.weight"]
        q = torch.sigmoid(own.double()) if mask == "sigmoid" else torch.sigmoid(own).double()
        truth = formula(weight, 2 * q)
        z = expert.z[name]
        assert float((ours(weight, z) - truth).norm() / truth.norm()) < 3e-7
        merged = layers[name].weight.detach().double()
        assert float((merged - truth).norm() / truth.norm()) < 2e-5
    card = out.with_suffix(".md").read_text()
    assert "converted" in card and layout in card


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_search_is_deployed_without_the_sigmoid(
    make: Make, tools: Any, tmp_path: Path, per_layer: bool
) -> None:
    folder = make("llama")
    model = tools.load(folder)
    p, other = parameters(model), parameters(model, 1)
    # Their p start at 0.1; these are large enough for the sum not to be near 0.
    p, other = ({n: v + 1 for n, v in d.items()} for d in (p, other))
    content = as_search(p, other, per_layer)
    torch.save(content, tmp_path / "file.pt")
    out = tmp_path / "mix.safetensors"
    assert run(folder, tmp_path / "file.pt", out) == 0
    z = t2k.Expert.load(out).z
    for index, name in enumerate(p):
        a = content["adaptive_weights"][:, index if per_layer else 0]
        q = p[name] * a[0] + other[name] * a[1]  # bf16, as they sum it
        weight = model.state_dict()[name]
        truth = formula(weight, q.double())
        found = ours(weight, z[name.removesuffix(".weight")])
        assert float((found - truth).norm() / truth.norm()) < 3e-7


def test_factors_from_a_folder_give_the_same(make: Make, tools: Any, tmp_path: Path) -> None:
    folder = make("llama", torch.bfloat16, shard="20KB")
    torch.save(as_policy(parameters(tools.load(folder))), tmp_path / "file.pt")
    t2k.decompose_checkpoint(folder, tmp_path / "store", progress=False)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert run(folder, tmp_path / "file.pt", a) == 0
    assert run(folder, tmp_path / "file.pt", b, "--factors", str(tmp_path / "store")) == 0
    one, two = t2k.Expert.load(a), t2k.Expert.load(b)
    assert one.fingerprints == two.fingerprints
    for name, z in one.z.items():
        torch.testing.assert_close(two.z[name], z, atol=1e-6, rtol=1e-6)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was_run",)


def _write_harmful(path: Path) -> None:
    torch.save({"learnable_params_module_list.0": _Harmful()}, path)


def _truncated(path: Path) -> None:
    torch.save({"learnable_params_module_list.0": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-700])


def _with(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (_write_harmful, "mkdir"),
        (lambda path: path.write_bytes(pickle.dumps(_Harmful())), "more than plain tensors"),
        (_truncated, "truncated, damaged"),
        (lambda path: path.write_bytes(b""), "truncated, damaged"),
        (lambda path: path.write_bytes(b"hello, this is text"), "file.pt"),
        (_with(torch.ones(3)), "a mapping of tensors, got a Tensor"),
        (_with({"epoch": 3}), "names to tensors only, got a int"),
        (_with({}), "a mapping of tensors"),
        (_with({"model.layers.0.mlp.up_proj.weight.U": torch.ones(2, 2)}), "decomposition"),
        (_with({"optimizer_step": torch.ones(2)}), "'optimizer_step'"),
        (_with({"learnable_params_module_list.1": torch.ones(2)}), "lacks learnable_params"),
        (_with({"learnable_params_module_list.0": torch.ones(2, 2)}), "float vector"),
        (_with({"learnable_params_module_list.0": torch.tensor([1.0, torch.nan])}), "diverged"),
        (_with({"adaptive_weights": torch.ones(2, 1)}), "adaptive_weights must be"),
        (
            _with({"adaptive_weights": torch.ones(2, 1), "weights_0_k_a_mlp": torch.ones(3)}),
            "1 of 2 experts",
        ),
    ],
)
def test_other_files_are_refused_by_name(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any,
    write: Callable[[Path], Any], said: str,
) -> None:  # fmt: skip
    folder = make("llama")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file.pt")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert run(folder, tmp_path / "file.pt", tmp_path / "new" / "e.safetensors") == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def _lacks_one(p: dict[str, Tensor]) -> Any:
    return dict(list(as_parameters(p).items())[:-1])


def _one_too_long(p: dict[str, Tensor]) -> Any:
    content = as_policy(p)
    content["learnable_params_module_list.2"] = torch.ones(33)
    return content


def _other_names(p: dict[str, Tensor]) -> Any:
    return {name.replace("mlp", "block.mlp"): v for name, v in p.items()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda p: dict(list(as_policy(p).items())[:3]), "3 matrices, the model has 6"),
        (_lacks_one, "lacks 1 of the model's 6"),
        (_one_too_long, "33 values for 'model.layers.0.mlp.down_proj.weight'"),
        (_other_names, "6 that the model lacks"),
    ],
)
def test_the_wrong_model_is_refused(
    make: Make, tools: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    content: Callable[[dict[str, Tensor]], Any], said: str,
) -> None:  # fmt: skip
    folder = make("llama")
    torch.save(content(parameters(tools.load(folder))), tmp_path / "file.pt")
    out = tmp_path / "new" / "e.safetensors"
    assert run(folder, tmp_path / "file.pt", out) == 2
    assert said in capsys.readouterr().err and not out.parent.exists()


def test_a_model_that_their_code_cannot_train(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("gpt2")
    torch.save({"learnable_params_module_list.0": torch.ones(2)}, tmp_path / "file.pt")
    assert run(folder, tmp_path / "file.pt", tmp_path / "e.safetensors") == 2
    assert "is not a matrix" in capsys.readouterr().err


def test_no_file_and_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, tmp_path / "none.pt", tmp_path / "e.safetensors") == 2
    assert "no such file" in capsys.readouterr().err
    torch.save({"learnable_params_module_list.0": torch.ones(2)}, tmp_path / "file.pt")
    assert run(tmp_path / "none", tmp_path / "file.pt", tmp_path / "e.safetensors") == 2
    assert "local folder" in capsys.readouterr().err


def test_json_and_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = [torch.full((128,), 0.1).bfloat16() for _ in range(12)]
    content = {f"learnable_params_module_list.{i}": v for i, v in enumerate(p)}
    torch.save(content, tmp_path / "policy_params.pt")
    out = tmp_path / "e.safetensors"
    words = ["convert", str(tmp_path / "policy_params.pt"), "--model", "small", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == 12 * 128
    # A constant parameter is the base: the factor takes every common scale out.
    for z in t2k.Expert.load(out).z.values():
        torch.testing.assert_close(z, torch.ones_like(z), atol=1e-6, rtol=0)


def test_a_mask_that_sums_to_nothing() -> None:
    with pytest.raises(ValueError, match="their formula divides"):
        authors.multiplier(torch.tensor([1.0, -1.0]), torch.ones(2), "none")
    with pytest.raises(ValueError, match="mask must be one of"):
        authors.multiplier(torch.ones(2), torch.ones(2), "tanh")
