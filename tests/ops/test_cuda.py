"""What ops/cuda.py answers where it cannot run: reasons, from metadata alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from t2kernels import testing
from t2kernels.ops import cuda, cuda_forms, torch_backend
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
    assert unfit(*testing.make_inputs(128, 8, 8, 8, factors="int8").args()) is None
    fp8 = testing.make_inputs(128, 8, 8, 8, factors="fp8").args()
    assert "float8_e4m3fn; expected torch.float32 like x, or int8" in str(unfit(*fp8))
    assert unfit(*fp8, kinds=("int8", "fp8")) is None
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


FMA = cuda_forms.Form("fma")


def in_bf16(*sizes: int, **more: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = testing.make_inputs(*sizes, dtype=torch.bfloat16, **more)
    return inputs.x, inputs.U, inputs.V


def test_unmeasured_forms_are_asked_for_by_name() -> None:
    x, U, V = in_bf16(4, 64, 40, 32)
    assert cuda_forms.choose(x, U, V, False) == FMA
    for name in cuda_forms.FORMS:
        with cuda_forms.form(name):
            assert cuda_forms.choose(x, U, V, True) == (name, "auto")
    assert cuda_forms.choose(x, U, V, False) == FMA
    words = "form must be one of fma, mma, mma-pdl, mma-coop"
    with pytest.raises(ValueError, match=words), cuda_forms.form("wgmma"):
        pass


def test_tiles() -> None:
    assert cuda_forms.tiles(1) == cuda_forms.tiles(8) == ("16x8", "32x8", "64x8")
    assert cuda_forms.tiles(9) == cuda_forms.tiles(32) == ("32x32", "64x32")
    assert cuda_forms.tiles(33) == cuda_forms.tiles(128) == ("32x64", "48x64")
    with cuda_forms.form("mma", "64x8"):
        assert cuda_forms.choose(*in_bf16(99, 64, 40, 32), True) == ("mma", "64x8")
    with (
        pytest.raises(ValueError, match="tile must be one of auto, 16x8"),
        cuda_forms.form("mma", "8x8"),
    ):
        pass


def test_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that holds; no tokens in batch-invariant mode; plain where nothing else fits."""
    rules = (
        cuda_forms.Rule(8, 5000, "mma-coop", "32x8"),
        cuda_forms.Rule(8, 1e9, "mma-pdl"),
        cuda_forms.Rule(128, 1e9, "mma"),
    )
    monkeypatch.setattr(cuda_forms, "RULES", rules)
    small, large, many = in_bf16(8, 64, 40, 32), in_bf16(8, 64, 400, 32), in_bf16(9, 64, 40, 32)
    assert cuda_forms.choose(*small, False) == ("mma-coop", "32x8")
    assert cuda_forms.choose(*large, False) == ("mma-pdl", "auto")
    assert cuda_forms.choose(*many, False) == ("mma", "auto")
    assert cuda_forms.choose(*small, True) == cuda_forms.choose(*many, True) == ("mma", "auto")
    assert cuda_forms.choose(*in_bf16(8, 63, 40, 32), False) == FMA


NO_MMA = {
    "float32 with factors in torch.float32": testing.make_inputs(1, 16, 16, 16),
    "float16 with factors in torch.int8": testing.make_inputs(
        1, 16, 8, 16, dtype=torch.half, factors="int8"
    ),
    "multiples of 8": testing.make_inputs(1, 20, 16, 16, dtype=torch.half),
    "multiples of 16": testing.make_inputs(1, 24, 16, 16, dtype=torch.bfloat16, factors="int8"),
}


@pytest.mark.parametrize("words", NO_MMA)
def test_what_the_tensor_core_forms_cannot_run(words: str) -> None:
    inputs = NO_MMA[words]
    with cuda_forms.form("mma"), pytest.raises(RuntimeError, match=words):
        cuda_forms.choose(inputs.x, inputs.U, inputs.V, False)
    assert cuda_forms.choose(inputs.x, inputs.U, inputs.V, False) == FMA


def test_factors_off_16_bytes() -> None:
    x, U, V = in_bf16(1, 64, 40, 32)
    odd = torch.empty(U.numel() + 1, dtype=U.dtype)[1:].view_as(U).copy_(U)
    assert "on 16 bytes" in str(cuda_forms.unfit(x, odd, V))
    assert cuda_forms.unfit(x, U, V) is None


class TestBarriers:
    CPU = torch.device("cpu")

    def test_streams_keep_theirs_and_captured_calls_get_new_ones(self) -> None:
        barriers = cuda_forms.Barriers()
        first = barriers.address(self.CPU, 0, 11, False)
        assert first == barriers.address(self.CPU, 0, 11, False)
        others = [
            barriers.address(self.CPU, 0, 12, False),
            barriers.address(self.CPU, 0, 11, True),
            barriers.address(self.CPU, 0, 11, True),
            barriers.address(self.CPU, 1, 11, False),
        ]
        assert len({first, *others}) == 5
        assert all(abs(a - b) >= 8 for a in others[:3] for b in (first,))

    def test_counters_cannot_be_made_in_a_capture(self) -> None:
        with pytest.raises(RuntimeError, match="warm-up"):
            cuda_forms.Barriers().address(self.CPU, 0, 1, True)

    def test_they_run_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_forms.Barriers, "CAPACITY", 2)
        barriers = cuda_forms.Barriers()
        barriers.address(self.CPU, 0, 1, False)
        barriers.address(self.CPU, 0, 1, True)
        with pytest.raises(RuntimeError, match="all 2 counters of device 0"):
            barriers.address(self.CPU, 0, 1, True)
        assert barriers.address(self.CPU, 0, 1, False)
