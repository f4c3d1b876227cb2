"""Decomposition of a checkpoint on a GPU: accuracy of every weight, and going on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import t2kernels as t2k
from t2kernels import store as store_module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_a_checkpoint_stopped_and_finished(tmp_path: Path, monkeypatch: Any) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((512, 512), (256, 1024), (1024, 256), (333, 100), (64, 4096))
    low = torch.randn(300, 20, generator=g) @ torch.randn(20, 400, generator=g)
    weights = [torch.randn(*s, generator=g) * 0.02 for s in shapes] + [low, torch.zeros(64, 32)]
    named = {f"layers.{i}.mlp.up_proj.weight": w.bfloat16() for i, w in enumerate(weights)}
    save_file(named, tmp_path / "model.safetensors")
    inner, calls = store_module._decompose_one, []

    def fourth_fails(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store_module, "_decompose_one", fourth_fails)
        t2k.decompose_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", device="cuda")
    store = t2k.decompose_checkpoint(
        tmp_path / "model.safetensors", tmp_path / "out", device="cuda"
    )
    assert len(store) == len(weights) and len(store.made) == len(weights) - 3
    for name in store.names:
        info = store.info(name)
        assert info["method"] == "gram" and not info["repeated"], name
        assert info["accuracy"]["relative_error"] <= 1e-6, name
        assert info["accuracy"]["orthogonality_u"] <= 1e-6, name
        exact = torch.linalg.svdvals(named[f"{name}.weight"].double())
        S = store.load(name).S
        assert float((S - exact).abs().max()) <= 1e-6 * float(exact[0]), name


@pytest.mark.parametrize(("m", "n"), [(4096, 4096), (1024, 4096)])
def test_what_the_library_does_alone_is_within_the_bounds_too(m: int, n: int) -> None:
    """The way that a weight is made again, where "gram" misses its bounds."""
    weight = (torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * 0.02).cuda()
    factors = t2k.decompose(weight, precision="fp64")
    reached = t2k.accuracy(weight, factors)
    assert reached.relative_error <= 1e-7
    assert max(reached.orthogonality_u, reached.orthogonality_v) <= 1e-6
