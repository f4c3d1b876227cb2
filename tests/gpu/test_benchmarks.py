"""The benchmarks at small sizes on a GPU: each runs there, and nothing of ours is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t2kernels.ops import cuda

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODEL = ["--layers", "2", "--hidden", "256", "--intermediate", "512", "--heads", "4",
         "--kv-heads", "2", "--vocabulary", "512"]  # fmt: skip
LINES = ["--shapes", "256x512", "--seconds", "0.01", "--no-compile", "--no-peft"]
RUNS = {
    "decode": ["bench_svf.py", *LINES, "--dtypes", "bf16", "int8", "fp8", "--tokens", "1", "128",
               "--slots", "1", "128", "--training-tokens", "64"],
    "prefill": ["bench_svf.py", *LINES, "--dtypes", "bf16", "--tokens", "1100", "--slots", "1",
                "64", "--no-training"],
    "parts": ["bench_parts.py", "--quick", "--tokens", "3", "--seconds", "0.01"],
    "overhead": ["bench_overhead.py", "--seconds", "0.01", "--dtype", "bfloat16"],
    "model": ["bench_model.py", *MODEL, "--requests", "3", "--prompt", "16", "--seconds", "0.05"],
    "step": ["bench_step.py", *MODEL, "--rows", "4", "--prompt", "20", "--new-tokens", "4"],
    "decompose": ["bench_decompose.py", *MODEL],
}  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(cuda._missing is not None, reason=str(cuda._missing)),
]


@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs_and_refuses_nothing(name: str, tmp_path: Path) -> None:
    script, *arguments = RUNS[name]
    out = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / script), "--device", "cuda", *arguments]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["environment"]["gpu"] and result["environment"]["driver"]
    assert "REFUSED" not in done.stdout
    if name == "model":
        assert "served" in done.stdout and " events" not in done.stdout  # all of it was captured
