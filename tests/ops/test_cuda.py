"""What ops/cuda.py answers where it cannot run: reasons, from metadata alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from t2kernels import testing
from t2kernels.ops import cuda, torch_backend
from t2kernels.ops.layout import unfit
from t2kernels.testing import Inputs

GOOD = testing.make_inputs(4, 32, 24, 16, slots=3)

UNFIT = {
    "float64": testing.make_inputs(1, 8, 8, 8, dtype=torch.float64),
    "float16 like x": replace(GOOD, x=GOOD.x.half()),
    "last dimension of x": replace(GOOD, x=GOOD.x.t().contiguous().t()),
    r"contiguous \(m, r\)": replace(GOOD, U=GOOD.U.t().contiguous().t()),
    r"contiguous \(r, n\)": replace(GOOD, V=GOOD.V.contiguous()),
    "d and base are torch.float64": replace(GOOD, d=GOOD.d.double()),
    "last dimension of d": replace(GOOD, d=GOOD.d.t().contiguous().t()),
    "slot is torch.int64": replace(GOOD, slot=torch.zeros(4, dtype=torch.int64)),
}


def test_fit() -> None:
    assert unfit(*GOOD.args()) is None
    assert unfit(*testing.make_inputs(128, 8, 8, 8, int8=True).args()) is None
    wide = torch.zeros(4, 64)[:, :32]
    assert unfit(*replace(GOOD, x=wide).args()) is None
    assert cuda._too_many(128) is None
    assert "129 tokens" in str(cuda._too_many(129))


@pytest.mark.parametrize("words", UNFIT)
def test_unfit(words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        raise RuntimeError(unfit(*UNFIT[words].args()))


def answer(inputs: Inputs) -> str | None:
    return cuda.unavailable(*inputs.args())


def test_tensors_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_missing", None)
    assert answer(GOOD) == "x is on cpu"


def test_build_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_missing", "this build has no CUDA kernels")
    monkeypatch.setattr(cuda, "_native", None)
    assert answer(GOOD) == "this build has no CUDA kernels"
    with pytest.raises(RuntimeError, match="backend 'cuda': this build has no CUDA kernels"):
        cuda.forward(*GOOD.args())


def test_backward_is_torchs() -> None:
    assert cuda.backward is torch_backend.backward
