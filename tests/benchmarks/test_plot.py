"""What plot.py draws of small results, and what it says where it draws nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import plot
import results

WHERE = {"cpu": "a CPU", "threads": 1, "torch": "2", "commit": "0"}
OVERHEAD = [{"part": "overhead", "name": n, "us": 2.0, "q1_us": 1.5, "q3_us": 2.5} for n in "abc"]
PARTS = [
    {"part": "mix", "name": "native", "experts": 6, "time_us": 1.0},
    {"part": "group", "group": "qkv", "dtype": "bf16", "tokens": 1, "name": "x", "absent": "no"},
    *(
        {"part": "group", "group": "qkv", "dtype": dtype, "tokens": tokens, "name": "native",
         "form": form, "time_us": 1.0 + tokens}
        for dtype in ("bf16", "int8") for form in ("group", "calls") for tokens in (1, 8)
    ),
    {"part": "group", "group": "qkv", "dtype": "bf16", "tokens": 1, "name": "fastest", "ratio": 1},
]  # fmt: skip
CLEAR = "only results of bench_svf.py, bench_model.py, bench_parts.py and bench_overhead.py can be"


def write(path: Path, kind: str, rows: list[dict]) -> Path:
    head = {"schema": results.SCHEMA, "benchmark": kind, "environment": WHERE}
    results.write(path, {**head, "rows": rows})
    return path


@pytest.mark.parametrize(("kind", "rows"), [("parts", PARTS), ("overhead", OVERHEAD)])
def test_every_benchmark_of_its_own_picture(tmp_path: Path, kind: str, rows) -> None:
    result = write(tmp_path / "a.json", kind, rows)
    assert plot.main([str(result)]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("step", [{"part": "loss"}], f"{CLEAR} drawn; this is one of step"),
        ("parts", PARTS[:2], "the result holds no times of groups"),
        ("overhead", [], "the result holds no times"),
    ],
)
def test_what_is_not_drawn_is_said_in_a_line(
    tmp_path: Path, kind: str, rows, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = write(tmp_path / "a.json", kind, rows)
    assert plot.main([str(result), str(tmp_path / "a.png")]) == 1
    assert capsys.readouterr().err == f"plot: {words}\n"
