"""The Triton kernels on CPU tensors; collected by ``test_triton_interpret.py`` only.

The truth is the reference in fp64; see ``t2kernels/testing.py`` for the rule of acceptance.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from t2kernels import testing
from t2kernels.ops import reference
from t2kernels.ops import triton as backend
from t2kernels.ops.triton.common import config
from t2kernels.ops.triton.common.config import Tile
from t2kernels.quantized import FACTOR_KINDS
from t2kernels.testing import Inputs, assert_accurate, make_inputs

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_triton_interpret.py"

# Small tiles make several programs, several inner steps and several epilogue chunks of a small
# problem; both operand orders. None: what ships.
TILES = {
    "shipped": None,
    "small": Tile(16, 64, 16, 4, 2, chunk=16),
    "weights_first": Tile(16, 32, 32, 4, 2, weights_first=True),
}
# (T, n, m, r): degenerate, one past and one short of a tile, wide, tall, r below both.
SHAPES = [(1, 1, 1, 1), (17, 63, 40, 33), (63, 17, 130, 17), (2, 64, 64, 64)]
# Every shape in fp32; the other dtypes where they could differ.
VALUES = [(shape, torch.float32) for shape in SHAPES]
VALUES += [(shape, torch.float64) for shape in SHAPES[:2]]
VALUES += [(shape, torch.float16) for shape in SHAPES[1:4:2]]


@contextmanager
def guarded_empty() -> Iterator[None]:
    """Inside, torch.empty is poisoned with NaN and lies between two strips of NaN, which must be
    whole at the end: a tail mask that is too wide writes there."""
    empty, blocks, strip = torch.empty, [], 64

    def guarded(shape, dtype, device):  # type: ignore[no-untyped-def]
        size = math.prod(shape)
        block = empty(size + 2 * strip, dtype=dtype, device=device).fill_(torch.nan)
        blocks.append(block)
        return block[strip : strip + size].view(shape)

    with (
        mock.patch.object(torch, "empty", guarded),
        mock.patch.object(torch, "empty_like", lambda t: guarded(t.shape, t.dtype, t.device)),
    ):
        yield
    for block in blocks:
        assert block[:strip].isnan().all() and block[-strip:].isnan().all(), "wrote out of bounds"


@pytest.fixture(params=TILES, autouse=True)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    chosen = TILES[request.param]
    if chosen is not None:
        monkeypatch.setattr(config, "choose", lambda *args, **kwargs: chosen)
    return str(request.param)


shipped_tiles = pytest.mark.parametrize("tile", ["shipped"], indirect=True)


def check_forward(i: Inputs) -> None:
    with guarded_empty():
        y, h = backend.forward(*i.args(), save_h=True)
        alone, none = backend.forward(*i.args())
    truth, h_truth = reference.forward(*i.double().args(), save_h=True)
    assert y.dtype == i.x.dtype
    assert_accurate(y, truth, testing.plain_forward(i), "y")
    assert h is not None and h_truth is not None and none is None
    assert_accurate(h, h_truth, i.x @ i.V.to(i.x.dtype), "h")
    assert torch.equal(alone, y)


def gradients(i: Inputs, g: Tensor, h: Tensor | None, **need: bool):
    x, U, V, d, base, slot, _, scale = i.args()
    with guarded_empty():
        return backend.backward(g, x, U, V, d, base, slot, h, scale, **need)


def check_backward(i: Inputs, g: Tensor, *, saved: bool = True) -> None:
    h = (i.x.double() @ i.V.double()).to(i.x.dtype) if saved else None
    dx, dd = gradients(i, g, h)
    j = i.double()
    args = (j.x, j.U, j.V, j.d, j.base, j.slot)
    dx_truth, dd_truth = reference.backward(g.double(), *args, None, j.scale)
    # Plain torch in the inputs' dtype.
    U, V = i.U.to(i.x.dtype), i.V.to(i.x.dtype)
    gu = g @ U
    rows = reference.diagonal_rows(i.d, i.base, i.slot, i.scale)
    dx_plain = (gu * rows).to(i.x.dtype) @ V.t()
    product = ((i.x @ V) * gu).to(i.d.dtype) * (1 if i.scale is None else i.scale)
    if i.slot is None:
        dd_plain = product.sum(0)
    else:
        dd_plain = torch.stack([product[i.slot == s].sum(0) for s in range(len(i.d))])
    assert dx is not None and dd is not None and dx_truth is not None and dd_truth is not None
    assert dx.dtype == i.x.dtype and dd.dtype == i.d.dtype and dd.shape == i.d.shape
    assert_accurate(dx, dx_truth, dx_plain, "dx")
    # dd is fp32 whatever x is; where h is rounded to 16 bits its error is that of h.
    error = testing.relative_error(dd, dd_truth)
    allowed = 2 * testing.relative_error(dd_plain, dd_truth) + testing.error_floor(i.x.dtype)
    assert error <= allowed, f"dd: {error:.3e} > {allowed:.3e}"


class TestForward:
    @pytest.mark.parametrize("slots", [0, 3])
    @pytest.mark.parametrize(("shape", "dtype"), VALUES, ids=str)
    def test_values(self, shape: tuple[int, ...], slots: int, dtype: torch.dtype) -> None:
        check_forward(make_inputs(*shape, slots=slots, dtype=dtype))

    @pytest.mark.parametrize("slots", [0, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", FACTOR_KINDS)
    def test_eight_bit_factors(self, slots: int, dtype: torch.dtype, kind: str) -> None:
        check_forward(make_inputs(17, 63, 40, 33, slots=slots, dtype=dtype, factors=kind))

    @pytest.mark.parametrize("kind", FACTOR_KINDS)
    def test_every_eight_bit_value_is_exact(self, kind: str) -> None:
        values = torch.arange(-128, 128, dtype=torch.int8).view(FACTOR_KINDS[kind])
        values = values[~values.float().isnan()]
        for dtype in (torch.float32, torch.float16):
            x, one = torch.eye(len(values), dtype=dtype), torch.ones(1)
            y, _ = backend.forward(x, one.to(values.dtype)[None], values[None].t(), one, one)
            assert y.flatten().float().tolist() == values.float().tolist()

    def test_bf16_with_upcast_tiles(self) -> None:
        # The interpreter truncates where the GPU rounds: allow that on top of plain torch.
        i = make_inputs(17, 63, 40, 33, slots=3, dtype=torch.bfloat16)
        y, _ = backend.forward(*i.args())
        truth, _ = reference.forward(*i.double().args())
        assert testing.relative_error(y, truth) < 8e-3

    def test_no_bias(self) -> None:
        check_forward(make_inputs(5, 20, 20, 20, bias=False))

    def test_every_token_its_own_slot(self) -> None:
        i = make_inputs(33, 20, 24, 20, slots=33)
        check_forward(replace(i, slot=torch.randperm(33).int()))

    def test_every_slot_minus_one_is_base(self) -> None:
        i = make_inputs(20, 17, 19, 17, slots=2)
        i = replace(i, slot=torch.full((20,), -1, dtype=torch.int32))
        check_forward(i)
        one = backend.forward(i.x, i.U, i.V, i.base, i.base, None, i.bias, None)[0]
        assert torch.equal(backend.forward(*i.args())[0], one)

    def test_no_tokens(self) -> None:
        for slots in (0, 2):
            i = make_inputs(0, 5, 6, 4, slots=slots)
            y, h = backend.forward(*i.args(), save_h=True)
            assert y.shape == (0, 6) and h is not None and h.shape == (0, 4)

    def test_strided_x_and_arena_rows(self) -> None:
        i = make_inputs(20, 33, 21, 18, slots=3)
        wide, arena = torch.full((20, 50), torch.nan), torch.full((3, 40), torch.nan)
        wide[:, 5:38], arena[:, 9:27] = i.x, i.d
        check_forward(replace(i, x=wide[:, 5:38], d=arena[:, 9:27]))

    def test_a_bad_row_stays_alone(self) -> None:
        i = make_inputs(20, 33, 21, 18, slots=3)
        good, _ = backend.forward(*i.args())
        x = i.x.clone()
        x[7] = torch.nan
        bad, _ = backend.forward(*replace(i, x=x).args())
        rows = torch.arange(20) != 7
        assert torch.equal(bad[rows], good[rows]) and bad[7].isnan().all()

    @shipped_tiles
    def test_offsets_beyond_32_bits(self, tile: str) -> None:
        # 4 GiB of address space, a few pages of memory.
        i = make_inputs(3, 16, 8, 8, dtype=torch.float16)
        x = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((3, 16), (2**30, 1))
        x.copy_(i.x)
        y, _ = backend.forward(*replace(i, x=x).args())
        assert torch.equal(y, backend.forward(*i.args())[0])


class TestBackward:
    @pytest.mark.parametrize("slots", [0, 3])
    @pytest.mark.parametrize(("shape", "dtype"), VALUES, ids=str)
    def test_values(self, shape: tuple[int, ...], slots: int, dtype: torch.dtype) -> None:
        i = make_inputs(*shape, slots=slots, dtype=dtype)
        g = torch.randn(shape[0], shape[2], dtype=torch.float64).to(dtype)
        check_backward(i, g)

    @pytest.mark.parametrize("slots", [0, 3])
    @pytest.mark.parametrize("kind", FACTOR_KINDS)
    def test_eight_bit_factors_and_recomputed_h(self, slots: int, kind: str) -> None:
        i = make_inputs(17, 63, 40, 33, slots=slots, factors=kind)
        check_backward(i, torch.randn(17, 40), saved=False)

    @pytest.mark.parametrize("kind", FACTOR_KINDS)
    @pytest.mark.parametrize("slots", [0, 3])
    def test_eight_bit_factors_stay_in_the_range_of_fp16(self, slots: int, kind: str) -> None:
        """x V without its scale leaves fp16; dd, which has the scale, does not."""
        i = make_inputs(9, 600, 24, 17, slots=slots, dtype=torch.float16, factors=kind)
        i = replace(i, x=i.x * 60)
        h = (i.x.float() @ i.V.float()).half()
        assert not h.isfinite().all(), "in range: no test"
        assert backend.forward(*i.args())[0].isfinite().all()
        g = torch.randn(9, 24).half()
        j, head = i.double(), (i.x, i.U, i.V, i.d, i.base, i.slot)
        truth = reference.backward(g.double(), j.x, j.U, j.V, j.d, j.base, j.slot, None, j.scale)
        for saved in (None, h):
            found = backend.backward(g, *head, saved, i.scale)
            for a, b in zip(found, truth, strict=True):
                assert a is not None and b is not None
                assert testing.relative_error(a, b) < 2e-3

    @pytest.mark.parametrize("slots", [0, 4])
    def test_only_what_is_needed(self, slots: int) -> None:
        i, g = make_inputs(19, 20, 21, 18, slots=slots), torch.randn(19, 21)
        dx, dd = gradients(i, g, None)
        only_dx = gradients(i, g, None, need_dd=False)
        only_dd = gradients(i, g, None, need_dx=False)
        assert only_dx[1] is None and torch.equal(only_dx[0], dx)
        assert only_dd[0] is None and torch.equal(only_dd[1], dd)
        assert gradients(i, g, None, need_dx=False, need_dd=False) == (None, None)

    def test_slots_without_tokens_get_zero(self) -> None:
        i = make_inputs(9, 8, 7, 6, slots=5)
        i = replace(i, slot=torch.tensor([4, -1, 2] * 3, dtype=torch.int32))
        _, dd = gradients(i, torch.randn(9, 7), None)
        assert dd.any(1).tolist() == [False, False, True, False, True]
        check_backward(i, torch.randn(9, 7))

    def test_no_tokens(self) -> None:
        for slots in (0, 2):
            i = make_inputs(0, 5, 6, 4, slots=slots)
            dx, dd = gradients(i, torch.empty(0, 6), None)
            assert dx.shape == (0, 5) and dd.shape == i.d.shape and not dd.any()

    def test_expanded_gradient(self) -> None:
        # What .sum().backward() sends: every stride 0.
        i = make_inputs(9, 8, 7, 6)
        check_backward(i, torch.ones(()).expand(9, 7))

    def test_same_bits_every_time(self) -> None:
        i, g = make_inputs(70, 20, 21, 18, slots=4), torch.randn(70, 21)
        first, second = gradients(i, g, None), gradients(i, g, None)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])

    @pytest.mark.parametrize("tile", ["small"], indirect=True)
    @pytest.mark.parametrize("slots", [0, 2])
    def test_gradcheck(self, slots: int, tile: str) -> None:
        i = make_inputs(3, 4, 3, 2, slots=slots, dtype=torch.float64)

        class Layer(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, d, bias):  # type: ignore[no-untyped-def]
                y, h = backend.forward(x, i.U, i.V, d, i.base, i.slot, bias, save_h=True)
                ctx.save_for_backward(x, d, h)
                return y

            @staticmethod
            def backward(ctx, g):  # type: ignore[no-untyped-def]
                x, d, h = ctx.saved_tensors
                dx, dd = backend.backward(g, x, i.U, i.V, d, i.base, i.slot, h)
                return dx, dd, g.sum(0)

        inputs = [t.clone().requires_grad_() for t in (i.x, i.d, i.bias)]
        assert torch.autograd.gradcheck(Layer.apply, inputs)


@shipped_tiles
class TestContract:
    def test_available(self, tile: str) -> None:
        assert backend.NAME == "triton"
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            assert backend.unavailable(*make_inputs(3, 4, 5, 4, dtype=dtype).args()) is None
        for kind in FACTOR_KINDS:
            i = make_inputs(3, 4, 5, 4, factors=kind, slots=2)
            assert backend.unavailable(*i.args()) is None

    def test_reasons(self, tile: str) -> None:
        i = make_inputs(3, 4, 5, 4, slots=2)
        cases = {
            "torch.int64": replace(i, x=i.x.long()),
            "U and V are": replace(i, U=i.U.half()),
            "expected torch.float32 like x": replace(i, V=i.V.half()),
            "contiguous (m, r)": replace(i, U=i.U.t().contiguous().t()),
            "contiguous (r, n)": replace(i, V=i.V.contiguous()),
            "dimension of x": replace(i, x=i.x.t().contiguous().t()),
            "dimension of d": replace(i, d=i.d.t().contiguous().t()),
        }
        for words, changed in cases.items():
            assert words in (backend.unavailable(*changed.args()) or ""), words

    def test_one_tile_in_batch_invariant_mode(self, tile: str) -> None:
        for dtype in (torch.bfloat16, torch.float32):
            x, weight = torch.empty(1, 1, dtype=dtype), torch.empty(1, 1, dtype=dtype)
            sizes = (1, 16, 17, 64, 65, 512, 8192)
            tiles = {
                config.choose("project", T, 4096, 4096, x, weight, batch_invariant=True)
                for T in sizes
            }
            assert len(tiles) == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_batch_invariant_values(self, tile: str, dtype: torch.dtype) -> None:
        i = make_inputs(70, 33, 21, 18, slots=3, dtype=dtype)
        y, _ = backend.forward(*i.args(), batch_invariant=True)
        truth, _ = reference.forward(*i.double().args())
        assert_accurate(y, truth, testing.plain_forward(i))

    # Largest shared memory per block: sm_86, sm_80, sm_90.
    @pytest.mark.parametrize("limit", [101376, 166912, 232448])
    def test_every_tile_fits_its_gpu(
        self, tile: str, limit: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(config, "shared_limit", lambda device: limit)
        x = torch.empty(1, 1, dtype=torch.bfloat16)
        for weight in (x, x.to(torch.int8), x.to(torch.uint8)):
            for T in (1, 17, 33, 65, 8192):
                for invariant in (False, True):
                    t = config.choose(
                        "project", T, 4096, 4096, x, weight, batch_invariant=invariant
                    )
                    assert config.tile_bytes(t) <= limit and t.stages >= 3
