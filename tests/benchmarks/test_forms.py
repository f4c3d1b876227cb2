"""Rules from measured times; the times here are made up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import forms
import torch
from contestants import LineUp, Options, Skipped
from layers import Layer
from results import SCHEMA, write
from shapes import Case, Shape

from t2kernels.ops import cuda_forms

TILE = {"fma": "auto", "mma": "32x8"}


def row(form: str, shape: str, tokens: int, time: float, dtype: str = "bf16", slots: int = 1):
    return {
        "name": f"ours cuda {form} {TILE[form]}", "slots": slots, "dtype": dtype, "shape": shape,
        "tokens": tokens, "time_us": time, "percent_of_floor": 50.0, "ratio_dense": 1.5,
    }  # fmt: skip


ROWS = [
    row("fma", "64x64", 1, 1.0), row("mma", "64x64", 1, 2.0),
    row("fma", "64x64", 8, 3.0), row("mma", "64x64", 8, 2.0),
    row("fma", "64x64", 32, 9.0), row("mma", "64x64", 32, 2.0),
    row("fma", "64x128", 1, 4.0), row("mma", "64x128", 1, 4.4),
    # A second dtype turns it; a third has no mma, and many slots have no say.
    row("fma", "64x128", 1, 8.0, "int8"), row("mma", "64x128", 1, 4.0, "int8"),
    row("mma", "64x128", 1, 0.1, slots=64),
    {"name": "ours", "slots": 1, "dtype": "bf16", "shape": "64x64", "tokens": 1, "time_us": 0.1},
    {**row("mma", "64x64", 1, 0.0), "refused": "wrong", "name": "ours cuda x", "slots": 2},
]  # fmt: skip


def test_rules_name_the_fastest_and_hold_in_order() -> None:
    found = forms.rules(forms.winners(forms.times(ROWS)))
    assert found == [
        (1, 8192.0, "fma auto"),
        (32, 8192.0, "mma 32x8"),
        (1, float("inf"), "mma 32x8"),
    ]
    text = forms.render(forms.times(ROWS))
    assert "fma auto* 1.0  mma 32x8 2.0  [50 %, –, 1.50]" in text
    # What is printed is what the table takes.
    printed = eval(text[text.index("RULES = (") + 8 :], {"Rule": cuda_forms.Rule})
    assert [(r.tokens, r.elements, f"{r.form} {r.tile}") for r in printed] == found


def test_a_form_that_lacks_a_dtype_is_no_rule() -> None:
    rows = [row("fma", "64x64", 1, 9.0), row("fma", "64x64", 1, 9.0, "fp16")]
    rows.append(row("mma", "64x64", 1, 1.0))
    assert forms.winners(forms.times(rows)) == {(8192, 1): "fma auto"}


def run(file: Path, rows: list[dict[str, object]]) -> str:
    write(file, {"schema": SCHEMA, "rows": rows})
    command = [sys.executable, forms.__file__, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_script_reads_what_the_benchmark_writes(tmp_path: Path) -> None:
    assert "no form of the CUDA kernels was measured" in run(tmp_path / "none.json", [])
    assert 'Rule(1, float("inf"), "mma", "32x8")' in run(tmp_path / "some.json", ROWS)


def test_every_form_is_a_contestant_with_its_reason_where_there_is_no_gpu() -> None:
    layer = Layer(Shape(48, 32), "bf16", torch.device("cpu"), sets=1)
    line_up = LineUp(Case(Shape(48, 32), "bf16", 4), layer, Options(compile=False, forms=True))
    names = {entry.name for entry in line_up.build() if isinstance(entry, Skipped)}
    assert {f"ours cuda {form}" for form in cuda_forms.FORMS} <= names
    without = LineUp(Case(Shape(48, 32), "bf16", 4), layer, Options(compile=False))
    assert "ours cuda mma" not in {entry.name for entry in without.build()}
