"""Tensor descriptors, persistent programs and sums over runs of tokens, on CPU tensors; collected
by ``test_triton_interpret.py`` only. The interpreter reads descriptors as the memory engine does:
blocks, bounds, zeros outside; alignment is checked, speed is not.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from t2kernels import testing
from t2kernels.ops import reference
from t2kernels.ops import triton as backend
from t2kernels.ops.triton import _backward
from t2kernels.ops.triton.common import config
from t2kernels.ops.triton.common.config import Tile
from t2kernels.testing import Inputs, make_inputs

sys.path.insert(0, str(Path(__file__).parent))
import triton_delta_cases
import triton_interpret_cases

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_triton_interpret.py"

FP16, BF16 = torch.float16, torch.bfloat16
SMALL = Tile(16, 32, 16, 4, 2, chunk=16, descriptors=True, persistent=True)
# (T, n, m, r) in multiples of 8, as descriptors ask, with tails on every axis; more tiles than
# persistent programs.
SHAPES = [(17, 72, 40, 24), (63, 40, 136, 88)]


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, object]]:
    """SMALL for all products; what the kernels were given."""
    given, plain = [], config.operands

    def noted(*args, **kwargs):  # type: ignore[no-untyped-def]
        given.append(plain(*args, **kwargs))
        return given[-1]

    monkeypatch.setattr(config, "operands", noted)
    monkeypatch.setattr(config, "choose", lambda *args, **kwargs: SMALL)
    return given


def by_descriptors(operands: list[tuple[object, object]]) -> set[bool]:
    return {isinstance(value, TensorDescriptor) for pair in operands for value in pair}


class TestDescriptors:
    @pytest.mark.parametrize("slots", [0, 3])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_values(self, shape: tuple[int, ...], slots: int, operands) -> None:  # type: ignore[no-untyped-def]
        i = make_inputs(*shape, slots=slots, dtype=FP16)
        triton_interpret_cases.check_forward(i)
        g = torch.randn(shape[0], shape[2]).half()
        triton_interpret_cases.check_backward(i, g, saved=slots == 0)
        for transposed in (False, True):
            triton_delta_cases.check(i, transposed=transposed)
        assert by_descriptors(operands) == {True}

    def test_same_bits_as_pointers(self, operands, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
        """The walk is the same, so are the sums; one program for all tiles changes none."""
        i, g = make_inputs(63, 40, 136, 88, slots=3, dtype=FP16), torch.randn(63, 136).half()
        results = []
        for tile in (SMALL, SMALL._replace(persistent=False), SMALL._replace(descriptors=False)):
            monkeypatch.setattr(config, "choose", lambda *args, tile=tile, **kwargs: tile)
            y, h = backend.forward(*i.args(), save_h=True)
            results.append((y, h, *backend.backward(g, *i.args()[:6], h)))
        assert by_descriptors(operands) == {True, False}
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_bf16_with_upcast_tiles(self, operands) -> None:  # type: ignore[no-untyped-def]
        # The interpreter truncates where the GPU rounds: allow that on top of plain torch.
        i = make_inputs(17, 72, 40, 24, slots=3, dtype=BF16)
        y, _ = backend.forward(*i.args())
        truth, _ = reference.forward(*i.double().args())
        assert testing.relative_error(y, truth) < 8e-3 and by_descriptors(operands) == {True}

    def test_rows_that_lie_apart(self, operands) -> None:  # type: ignore[no-untyped-def]
        i = make_inputs(20, 40, 24, 16, slots=3, dtype=FP16)
        wide = torch.full((20, 64), torch.nan, dtype=FP16)
        wide[:, 8:48] = i.x
        triton_interpret_cases.check_forward(replace(i, x=wide[:, 8:48]))
        assert by_descriptors(operands) == {True}

    # (what, whether the first and whether the second product has descriptors)
    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ("row stride", (False, True)),
            ("alignment", (False, True)),
            ("expanded", (False, True)),
            ("rank", (True, False)),
            ("fp32", (False, False)),
            ("8 bits", (False, False)),
        ],
    )
    def test_what_does_not_suit_goes_by_pointers(  # type: ignore[no-untyped-def]
        self, change: str, expected: tuple[bool, bool], operands
    ) -> None:
        dtype = torch.float32 if change == "fp32" else FP16
        factors = "int8" if change == "8 bits" else None
        rank = 13 if change == "rank" else 16
        i = make_inputs(20, 40, 24, rank, dtype=dtype, factors=factors)
        x = i.x
        if change == "row stride":
            x = torch.empty(20, 45, dtype=dtype)[:, :40].copy_(x)
        elif change == "alignment":
            x = torch.empty(20 * 40 + 1, dtype=dtype)[1:].view(20, 40).copy_(x)
        elif change == "expanded":
            x = x[:1].expand(20, 40)
        triton_interpret_cases.check_forward(replace(i, x=x))
        assert [by_descriptors([pair]) for pair in operands[:2]] == [{e} for e in expected]

    def test_which_tile_has_them(self) -> None:
        x = torch.empty(1, 1, dtype=BF16)
        for kernel in ("project", "expand", "gradient", "delta"):
            large = config.choose(kernel, 8192, 4096, 4096, x, x)
            assert large == config.LARGE_SM90
            assert config.tile_bytes(large) <= 232448
            small = config.choose(kernel, 64, 4096, 4096, x, x)
            eight = config.choose(kernel, 8192, 4096, 4096, x, x.to(torch.int8))
            assert not (small.descriptors or eight.descriptors)

    def test_a_persistent_grid_holds_one_program_per_multiprocessor(self) -> None:
        device = torch.device("cpu")
        assert config.grid(SMALL, 63, 136, device) == (config.multiprocessors(device),)
        assert config.grid(SMALL, 3, 5, device) == (1,)
        assert config.grid(SMALL._replace(persistent=False), 63, 136, device) == (20,)


def ragged(*lengths: int, slots: tuple[int, ...]) -> Tensor:
    parts = [torch.full((n,), s, dtype=torch.int32) for n, s in zip(lengths, slots, strict=True)]
    return torch.cat(parts)


class TestRuns:
    """dd per slot: sums over runs of 16 tokens of one slot, single rows where slots meet."""

    def inputs(self, slot: Tensor, slots: int, dtype: torch.dtype = torch.float32) -> Inputs:
        i = make_inputs(len(slot), 12, 20, 10, slots=slots, dtype=dtype)
        return replace(i, slot=slot)

    @pytest.mark.parametrize(
        "slot",
        [
            ragged(1, 15, 16, 17, 40, 3, slots=(2, 0, 1, -1, 3, 0)),
            ragged(600, 500, 37, slots=(1, 0, 1)),  # several steps of the reduction
            ragged(16, 16, 5, slots=(1, 1, 1)),
            torch.randperm(70).int() % 4,  # every run is mixed
        ],
        ids=["boundaries", "long", "one slot", "mixed"],
    )
    def test_values(self, slot: Tensor) -> None:
        i = self.inputs(slot, 4)
        triton_interpret_cases.check_backward(i, torch.randn(len(slot), 20))

    def test_only_what_is_needed_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The cost of many slots: a row per run, and single rows only where requests meet."""
        lengths = [130] * 8
        i = self.inputs(ragged(*lengths, slots=tuple(range(8))), 8)
        seen = []

        def finalise(partial: Tensor, out: Tensor, *rest: object) -> None:
            seen.append(partial.isfinite().all(1))
            out.zero_()

        monkeypatch.setattr(_backward, "finalise", finalise)
        with testing.poisoned_empty():
            backend.backward(torch.randn(1040, 20), *i.args()[:6])
        runs = i.slot.view(-1, 16)
        mixed = (runs != runs[:, :1]).any(1)
        assert mixed.sum() == 7
        expected = torch.zeros(65, 16, dtype=torch.bool)
        expected[:, 0], expected[mixed] = True, True
        assert torch.equal(seen[0], expected.flatten())


class TestRunsOfManySlots:
    def test_slots_lie_on_the_axis_that_holds_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """CUDA launches up to 2^31 - 1 programs on axis 0, but 65,535 on the others."""
        grids = []

        class Recorder:
            def __getitem__(self, grid):  # type: ignore[no-untyped-def]
                grids.append(grid)
                return lambda *args, **kwargs: None

        monkeypatch.setattr(_backward, "finalise_slots_kernel", Recorder())
        slot = torch.zeros(4, dtype=torch.int32)
        _backward.finalise(torch.zeros(4, 300), torch.empty(70000, 300), slot, None)
        assert grids == [(70000, 3)]
