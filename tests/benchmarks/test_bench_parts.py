"""The benchmark of groups at a size whose times mean nothing: its gate, its rows, its summary."""

from __future__ import annotations

from pathlib import Path

import bench_parts
import mixing
import pytest
import results
import torch
from harness import Refused

from t2kernels.testing import make_group

TINY = ["--quick", "--tokens", "3", "--dtypes", "bf16", "int8", "--seconds", "0.001"]


def test_rows_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_parts.main([*TINY, "--json", str(tmp_path / "out.json")]) == 0
    rows = results.read(tmp_path / "out.json")["rows"]
    mixed = [r for r in rows if r["part"] == "mix" and "time_us" in r]
    rows = [r for r in rows if r["part"] == "group"]
    assert {r["experts"] for r in mixed} == {6, 10_000}
    assert {r["requests"] for r in mixed} == {1, 64}
    assert {"native", "torch"} <= {r["name"] for r in mixed}
    forms = {(r["group"], r["dtype"], r["name"], r["form"]) for r in rows if "time_us" in r}
    assert {("qkv", "int8", "torch", "group"), ("gate-up", "bf16", "torch", "calls")} <= forms
    judged = [r for r in rows if r.get("judged")]
    assert {r["dtype"] for r in judged} == {"bf16", "int8"} and all(r["ratio"] > 0 for r in judged)
    assert {r["name"] for r in rows if "absent" in r} <= {"cuda", "triton"}
    assert "group / calls" in capsys.readouterr().out


def test_a_member_that_is_wrong_is_refused() -> None:
    group = make_group(3, 8, [8, 4], [8, 4], slots=2)
    right = bench_parts.apart(bench_parts.dispatch.load("torch"), group)
    bench_parts.gate("torch", right, group)
    with pytest.raises(Refused, match="torch: member 1"):
        bench_parts.gate("torch", [right[0], right[1] + 1], group)


def test_a_row_that_nobody_asked_for_is_refused(monkeypatch) -> None:
    one = mixing.Mixing(6, torch.float32, 1, 2, torch.device("cpu"), 16)
    assert one.gate("mix") < 1e-6
    monkeypatch.setattr(one, "call", lambda i: one.out.zero_())
    with pytest.raises(Refused, match="a row of the arena changed"):
        one.gate("mix")
    monkeypatch.setattr(one, "call", lambda i: one.out)
    with pytest.raises(Refused, match="relative error"):
        one.gate("mix")


def test_sets_hold_the_same_numbers_elsewhere() -> None:
    first, second, *_ = bench_parts.sets_of(make_group(1, 8, [8, 4], [8, 4]), torch.device("cpu"))
    assert torch.equal(first.V, second.V) and second.V.t().is_contiguous()
    assert first.Us[1].data_ptr() != second.Us[1].data_ptr()
