"""The benchmark of a call's overhead: its rows, and the bare kernel that they are judged by."""

from __future__ import annotations

from pathlib import Path

import bench_overhead
import pytest
import results
import torch

from t2kernels.ops import native

pytestmark = pytest.mark.skipif(native._MISSING is not None, reason=str(native._MISSING))


def test_rows_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert bench_overhead.main(["--seconds", "0.001", "--json", str(out)]) == 0
    rows = {row["name"]: row for row in results.read(out)["rows"]}
    assert set(bench_overhead.LAYERS) < set(rows)
    bare = rows[bench_overhead.BARE]["us"]
    for name in bench_overhead.LAYERS:
        assert rows[name]["python_us"] == pytest.approx(rows[name]["us"] - bare, abs=0.01)
    assert "beyond the kernel" in capsys.readouterr().out


def test_the_bare_kernel_computes_what_the_call_did() -> None:
    x, U, Vh, d = torch.randn(3, 8), torch.randn(8, 8), torch.randn(8, 8), torch.rand(8)
    made = []

    def call() -> None:
        made.append(native.forward(x, U, Vh.t(), d, d)[0])

    again = bench_overhead.bare(native, "svf_forward", call)
    want = made[0].clone()
    made[0].zero_()
    again()
    assert torch.equal(made[0], want)
