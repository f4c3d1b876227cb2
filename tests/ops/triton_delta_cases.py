"""The delta kernel on CPU tensors; collected by ``test_triton_interpret.py`` only.

The truth is the formula in fp64, plain torch the two rounded products; see ``t2kernels/testing.py``
for the rule of acceptance.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import t2kernels as t2k
from t2kernels import testing
from t2kernels.ops import functional, reference
from t2kernels.ops import triton as backend
from t2kernels.ops.triton.common import config
from t2kernels.ops.triton.common.config import Tile
from t2kernels.testing import Inputs, assert_accurate, make_inputs, poisoned_empty

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_triton_interpret.py"

TILES = {
    "shipped": None,
    "small": Tile(16, 64, 16, 4, 2, chunk=16),
    "weights_first": Tile(16, 32, 32, 4, 2, weights_first=True),
}
FP32, FP16 = torch.float32, torch.float16
# (T, n, m, k): degenerate; tails on every axis, k below one inner step and beyond one.
VALUES = [((1, 1, 1, 1), FP32), ((17, 63, 40, 5), FP32), ((63, 33, 70, 33), FP32)]
VALUES += [((17, 63, 40, 5), torch.float64), ((63, 33, 70, 33), FP16)]


@pytest.fixture(params=TILES, autouse=True)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen = TILES[request.param]
    if chosen is not None:
        monkeypatch.setattr(config, "choose", lambda *args, **kwargs: chosen)
    return str(request.param)


def weight_of(i: Inputs, transposed: bool = False) -> Tensor:
    m, n = i.U.shape[0], i.V.shape[0]
    gen = torch.Generator().manual_seed(1)
    w = (torch.randn(m, n, generator=gen, dtype=torch.float64) / n**0.5).to(i.x.dtype)
    return w.t().contiguous().t() if transposed else w


def two_parts(i: Inputs, weight: Tensor) -> Tensor:
    """In i's own dtype: each product rounded, then added."""
    U, V = i.U.to(i.x.dtype), i.V.to(i.x.dtype)
    rows = reference.diagonal_rows(i.d - i.base, torch.zeros_like(i.base), i.slot, i.scale)
    return F.linear(i.x, weight, i.bias) + ((i.x @ V) * rows).to(i.x.dtype) @ U.t()


def run(i: Inputs, weight: Tensor, **options: bool) -> Tensor:
    x, U, V, d, base, slot, bias, scale = i.args()
    assert backend.delta_unavailable(x, weight, U, V, d, base, slot, bias, scale) is None
    with poisoned_empty():
        return backend.delta(x, weight, U, V, d, base, slot, bias, scale, **options)


def check(i: Inputs, *, transposed: bool = False, **options: bool) -> Tensor:
    weight = weight_of(i, transposed)
    y = run(i, weight, **options)
    assert y.dtype == i.x.dtype and y.is_contiguous()
    assert_accurate(y, two_parts(i.double(), weight.double()), two_parts(i, weight))
    return y


class TestDelta:
    @pytest.mark.parametrize("slots", [0, 3])
    @pytest.mark.parametrize(("shape", "dtype"), VALUES, ids=str)
    def test_values(self, shape: tuple[int, ...], slots: int, dtype: torch.dtype) -> None:
        check(make_inputs(*shape, slots=slots, dtype=dtype))

    def test_a_weight_stored_the_other_way(self) -> None:  # transformers' Conv1D
        check(make_inputs(17, 63, 40, 5, slots=2), transposed=True)

    @pytest.mark.parametrize("kind", t2k.FACTOR_KINDS)
    def test_eight_bit_factors(self, kind: str) -> None:
        check(make_inputs(17, 63, 40, 5, slots=2, factors=kind, dtype=FP16))

    @pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
    def test_delta_zero_is_the_stored_weight_bit_for_bit(self, dtype: torch.dtype) -> None:
        i = make_inputs(20, 33, 24, 7, slots=3, dtype=dtype)
        weight = weight_of(i)
        nothing = run(replace(i, d=i.base, slot=None), weight)
        assert torch.equal(run(replace(i, d=i.base.expand(3, -1).contiguous()), weight), nothing)
        assert torch.equal(run(i, weight)[i.slot < 0], nothing[i.slot < 0])
        # Other factors change no bit of it: nothing of them is added.
        other = replace(i, U=i.U.flip(0).contiguous(), d=i.base, slot=None)
        assert torch.equal(run(other, weight), nothing)
        plain = F.linear(i.x, weight, i.bias)
        assert_accurate(nothing, F.linear(*(t.double() for t in (i.x, weight, i.bias))), plain)

    def test_no_tokens_and_strided_x(self) -> None:
        i = make_inputs(0, 5, 6, 2, slots=2)
        assert run(i, weight_of(i)).shape == (0, 6)
        i, wide = make_inputs(9, 33, 21, 6), torch.full((9, 50), torch.nan)
        wide[:, 5:38] = i.x
        check(replace(i, x=wide[:, 5:38]))

    def test_bf16_with_upcast_tiles(self) -> None:
        # The interpreter truncates where the GPU rounds: allow that on top of plain torch.
        i = make_inputs(17, 63, 40, 33, slots=3, dtype=torch.bfloat16)
        weight = weight_of(i)
        truth = two_parts(i.double(), weight.double())
        assert testing.relative_error(run(i, weight), truth) < 8e-3

    @pytest.mark.parametrize("tile", ["shipped"], indirect=True)
    def test_batch_invariant_values(self, tile: str) -> None:
        # The bits themselves are a matter of one tile for all T, and of the GPU's tests.
        check(make_inputs(70, 40, 24, 7, slots=3, dtype=FP16), batch_invariant=True)

    def test_reasons(self) -> None:
        i = make_inputs(3, 8, 6, 2)
        W, args = weight_of(i), i.args()[1:]
        for words, weight in {
            "the stored weight is torch.float16": W.half(),
            "contiguous axis": torch.randn(12, 16)[::2, ::2],
        }.items():
            assert words in (backend.delta_unavailable(i.x, weight, *args) or "")
        assert "U and V" in (backend.delta_unavailable(i.x, W, i.U.half(), *args[1:]) or "")


@pytest.mark.parametrize("tile", ["shipped"], indirect=True)
class TestDeltaInLayers:
    """Where the kernel is taken, and where the two products stay apart."""

    def layer(self, transposed: bool = False) -> t2k.SVFLinear:
        torch.manual_seed(0)
        linear = torch.nn.Linear(24, 20)
        if transposed:
            conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(20, 24)
            with torch.no_grad():
                conv.weight.normal_()
            return t2k.SVFLinear.from_linear(conv, rank=5)
        return t2k.SVFLinear.from_linear(linear, rank=5)

    def count(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        calls, delta = [0], backend.delta

        def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
            calls[0] += 1
            return delta(*args, **kwargs)

        monkeypatch.setattr(backend, "delta", counted)
        return calls

    @pytest.mark.parametrize("transposed", [False, True])
    def test_layer(self, tile: str, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, x, calls = self.layer(transposed), torch.randn(2, 3, 24), self.count(monkeypatch)
        with torch.no_grad():
            layer.z.mul_(1.5)
            with t2k.backend("reference"):
                expected = layer(x)
                assert "no kernel for both products" in t2k.explain(layer, x).why
            assert calls == [0]
            with t2k.backend("triton"):
                y = layer(x)
                assert "in one accumulator" in t2k.explain(layer, x).why
        assert calls == [1]
        torch.testing.assert_close(y, expected)

    def test_with_gradients_the_products_stay_apart(
        self, tile: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer, x, calls = self.layer(), torch.randn(3, 24), self.count(monkeypatch)
        layer.z.data.mul_(1.5)
        with t2k.backend("triton"):
            layer(x).sum().backward()
        assert calls == [0] and layer.z.grad.abs().min() > 0

    def test_function(self, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self.count(monkeypatch)
        weight, x, bias = torch.randn(20, 24), torch.randn(2, 3, 24), torch.randn(20)
        fk = t2k.decompose(weight, rank=5)
        d = fk.S * (1 + 0.3 * torch.randn(2, 5))
        slot = torch.tensor([0, 1, -1, 1, 0, -1], dtype=torch.int32)
        expected = t2k.svf_delta_linear(x, weight, fk, d, slot, bias)
        assert calls == [0]
        with t2k.backend("triton"):
            y = t2k.svf_delta_linear(x, weight, fk, d, slot, bias)
            assert calls == [1]
            torch.testing.assert_close(y, expected)
            with pytest.raises(ValueError, match=r"slot must lie in \[-1, 2\)"):
                t2k.svf_delta_linear(x, weight, fk, d, slot + 1, bias)
            with torch.autocast("cpu", torch.bfloat16):
                t2k.svf_delta_linear(x, weight, fk, d, slot, bias)
            strided = torch.randn(40, 48)[::2, ::2]
            fk = t2k.decompose(strided, rank=5)
            t2k.svf_delta_linear(x, strided, fk, fk.S)
        assert calls == [1], "autocast and a strided weight are computed in two parts"
        assert functional.run_delta(x, weight, fk.U, fk.V.t(), d, fk.S, None, None, None) is None
