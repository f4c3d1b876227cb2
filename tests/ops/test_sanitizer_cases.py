"""The cases that compute-sanitizer sees on a GPU (benchmarks/sanitize.py), on the emulation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from t2kernels.ops import mixing

_PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "sanitize.py"
_SPEC = importlib.util.spec_from_file_location("sanitize_cases", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
sanitize = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(sanitize)


def test_every_kernel_has_a_case() -> None:
    seen = {(case.name.partition(" T=")[0].partition(" requests")[0], case.form)
            for case in sanitize.cases("cpu")}  # fmt: skip
    forms = ("fma", "mma", "mma-pdl", "mma-coop")
    for kind in ("bfloat16", "float16", "int8", "fp8"):
        assert {(f"{p}{kind}", form) for p in ("", "group, ") for form in forms} <= seen
    assert {("float32", "fma"), ("group, float32", "fma")} <= seen
    assert {("mix, float32", None), ("mix, bfloat16", None)} <= seen


def test_the_cases_are_right(emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "_unavailable", lambda name, out: None)
    chosen = [c for c in sanitize.cases("cpu") if " T=" not in c.name or "T=9" in c.name]
    assert sanitize.run_calls(chosen) == 2 * (1 + 4 * 4) + 4


def test_a_wrong_result_is_an_error(emulated) -> None:
    case = next(c for c in sanitize.cases("cpu") if c.form == "mma")
    wrong = case._replace(call=lambda: [y + 1 for y in case.call()])
    with pytest.raises(RuntimeError, match="T=1, mma: relative error"):
        sanitize.run_calls([wrong])
