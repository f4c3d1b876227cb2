"""Two processes (gloo, CPU) train the z that one process trains on the joined batch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two leave, one file per way and process."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(folder)],
            stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]  # fmt: skip
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=180)
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            process.kill()
    return folder


def _read(folder: Path, way: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both processes say; their z are equal and those of one process, to rounding."""
    alone, a, b = (
        torch.load(folder / f"{way}-{place}.pt", weights_only=True)
        for place in ("1-0", "2-0", "2-1")
    )
    for one, first, second in zip(alone["z"], a["z"], b["z"], strict=True):
        assert torch.equal(first, second), "all processes hold one z"
        assert torch.allclose(first, one, atol=1e-5)
        assert not torch.equal(first, torch.ones_like(first))
    ddp = torch.load(folder / "ddp-1-0.pt", weights_only=True)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(alone["z"], ddp["z"], strict=True))
    return a, b


def test_data_parallel(folder):
    facts, _ = _read(folder, "ddp")
    assert len(facts["sent"]) == 4 and all(name.endswith(".z") for name in facts["sent"])
    # Neither parameters nor buffers: nothing of U, S, V is in what DDP knows of the model.
    assert all(name.endswith((".z", ".weight", ".bias")) for name in facts["state"])


def test_accelerate(folder):
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    facts, _ = _read(folder, "accelerate")
    assert facts["processes"] == 2
    assert all(name.endswith((".z", ".weight", ".bias")) for name in facts["state"])


def test_fully_sharded(folder):
    """FSDP2: parameters are sharded, z among them; factors are whole in every process."""
    first, second = _read(folder, "fsdp2")
    assert sum(name.endswith(".z") for name in first["sharded"]) == 4
    assert first["local"] + second["local"] == first["total"]
    assert first["factors"] == ["Tensor"]
    expert = list(first["expert"].values())
    assert all(torch.equal(a, b) for a, b in zip(expert, first["z"], strict=True))
