"""Runs the ``triton_*_cases.py`` in Triton's interpreter, in a process of its own.

Triton decides between compiling and interpreting when a kernel is first imported; a child process
keeps that decision away from the other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

# Triton 3.6 converts arrays in a way that numpy deprecates, and refuses from 2.4 on.
OLD_TRITON = "ignore:Conversion of an array with ndim:DeprecationWarning"
CASES = Path(__file__).with_name("triton_interpret_cases.py")
DELTA = Path(__file__).with_name("triton_delta_cases.py")
GROUP = Path(__file__).with_name("triton_group_cases.py")
MIXING = CASES.with_name("test_mixing.py")  # every test of it
LARGE = Path(__file__).with_name("triton_large_cases.py")
TUNING = Path(__file__).with_name("triton_tuning_cases.py")


def version_of(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        cwd=CASES.parents[2],
    )


# Parts run beside each other under pytest-xdist.
@pytest.mark.parametrize(
    ("part", "cases"),
    [
        *((part, CASES) for part in ("Forward", "Backward", "Contract")),
        ("Delta", DELTA),
        ("Group", GROUP),
        ("", MIXING),
        ("Descriptors or TestRuns", LARGE),
        ("Tuning", TUNING),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_in_interpreter(part: str, cases: Path) -> None:
    triton = pytest.importorskip("triton")
    versions = version_of(triton), version_of(pytest.importorskip("numpy"))
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of triton before 3.7 fails with numpy 2.4 and later")
    chosen = [str(cases), "-q", "-k", f"Test{part}", "-W", OLD_TRITON, "-p", "no:cacheprovider"]
    result = run(["-m", "pytest", *chosen], TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_importing_the_backend_imports_no_triton() -> None:
    code = "import sys, t2kernels, t2kernels.ops.triton; sys.exit('triton' in sys.modules)"
    result = run(["-c", code])
    assert result.returncode == 0, result.stderr


def test_without_triton_the_backend_says_so() -> None:
    code = """
import sys
sys.modules["triton"] = None
from t2kernels.ops import triton as backend
from t2kernels.testing import make_inputs
print(backend.unavailable(*make_inputs(2, 3, 4, 3).args()))
"""
    result = run(["-c", code])
    assert result.stdout.strip() == "triton is not installed", result.stderr


def test_a_cpu_tensor_is_refused_outside_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = """
from t2kernels.ops import triton as backend
from t2kernels.testing import make_inputs
print(backend.unavailable(*make_inputs(2, 3, 4, 3).args()))
"""
    result = run(["-c", code])
    assert "not on a CUDA GPU" in result.stdout, result.stderr
