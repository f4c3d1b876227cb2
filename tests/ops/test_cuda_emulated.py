"""The plain CUDA kernel's own source, run on the CPU by tests/cuda_emulation, against the truth.

Proves indices, tails, masks, the order of sums and the barriers; proves nothing about speed or
about what only a GPU does. tests/gpu/test_cuda.py is the same on the real thing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from t2kernels import testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# (T, n, m, r): 1 is degenerate; 17 and 63 have tails; 64 and 136 allow 16-byte loads in every
# dtype but end inside a warp; 600 and 2056 need a second round of the block's loop.
SHAPES = [
    (1, 1, 1, 1),
    (1, 17, 63, 17),
    (17, 63, 17, 63),
    (1, 64, 128, 64),
    (3, 136, 64, 72),
    (17, 64, 63, 136),
    (9, 2056, 5, 16),
    (2, 16, 9, 600),
]


@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_diagonal(emulated, shape, dtype, factors: str | None) -> None:
    T, n, m, r = shape
    emulated.check(testing.make_inputs(T, n, m, r, dtype=dtype, factors=factors, seed=T + n))


@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [1, 5, 17])
def test_diagonal_per_slot(emulated, slots: int, dtype, factors: str | None) -> None:
    inputs = testing.make_inputs(
        17, 63, 17, 64, slots=slots, dtype=dtype, factors=factors, bias=False
    )
    assert inputs.slot is not None and int(inputs.slot.min()) == -1
    emulated.check(inputs)


@pytest.mark.parametrize("n", [63, 64])
def test_strided_x_and_d(emulated, n: int) -> None:
    inputs = testing.make_inputs(5, n, 24, 16, slots=3)
    x = torch.full((5, 3 * n), float("nan"))
    D = torch.full((3, 40), float("nan"))
    x[:, n : 2 * n], D[:, 3:19] = inputs.x, inputs.d
    emulated.check(replace(inputs, x=x[:, n : 2 * n], d=D[:, 3:19]))


def test_no_tokens(emulated) -> None:
    y, h = emulated.run(testing.make_inputs(0, 17, 63, 17), save_h=True)
    assert y.shape == (0, 63) and h is not None and h.shape == (0, 17)


def test_a_foreign_slot_gives_nan_and_leaves_the_others(emulated) -> None:
    inputs = testing.make_inputs(3, 16, 16, 16, slots=2)
    good, _ = emulated.run(replace(inputs, slot=torch.tensor([1, 0, -1], dtype=torch.int32)))
    y, _ = emulated.run(replace(inputs, slot=torch.tensor([1, 2, -1], dtype=torch.int32)))
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_depend_on_the_row_alone(emulated, dtype) -> None:
    inputs = testing.make_inputs(17, 136, 24, 72, slots=3, dtype=dtype)
    assert inputs.slot is not None
    whole, _ = emulated.run(inputs)
    for tokens in ([0], [16], [5, 3, 4], list(range(9)), list(range(16, -1, -1))):
        part, _ = emulated.run(replace(inputs, x=inputs.x[tokens], slot=inputs.slot[tokens]))
        assert torch.equal(part, whole[tokens]), tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_does_not_change_bits(emulated, dtype) -> None:
    """An odd row stride sends x down the path of single loads."""
    inputs = testing.make_inputs(6, 136, 24, 72, dtype=dtype)
    odd = torch.zeros(6, 141, dtype=dtype)[:, 1:137].copy_(inputs.x)
    assert torch.equal(emulated.run(replace(inputs, x=odd))[0], emulated.run(inputs)[0])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_threads_does_not_change_bits(emulated, order: int) -> None:
    """A missing barrier would show here."""
    inputs = testing.make_inputs(9, 136, 24, 72, slots=3)
    expected, _ = emulated.run(inputs)
    emulated.settings(order=order)
    assert torch.equal(emulated.run(inputs)[0], expected)


@pytest.mark.parametrize("shape", [(1, 17, 63, 17), (9, 63, 7, 65), (5, 64, 9, 32)], ids=str)
@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
def test_reads_nothing_behind_the_end(emulated, shape, factors: str | None) -> None:
    """Every operand ends at a forbidden page: a read past it would kill this process."""
    T, n, m, r = shape
    inputs = testing.make_inputs(T, n, m, r, slots=2, dtype=torch.bfloat16, factors=factors)
    moved, _memory = emulated.at_the_edge(inputs)
    assert torch.equal(emulated.run(moved)[0], emulated.run(inputs)[0])


def test_wrong_codes_are_errors(emulated) -> None:
    def decode(n: int, x_dtype: int, w_dtype: int, form: int = 0, tile: int = 0) -> None:
        emulated.decode(*([8] * 15), 1, n, 1, 1, x_dtype, w_dtype, form, tile, 0, 0)

    with pytest.raises(RuntimeError, match="x_dtype must be fp32"):
        decode(1, 3, 3)
    with pytest.raises(RuntimeError, match="w_dtype equal to x_dtype"):
        decode(1, 0, 1)
    with pytest.raises(RuntimeError, match="n, r, m > 0"):
        decode(0, 0, 0)
    with pytest.raises(RuntimeError, match="form must be one of"):
        decode(1, 0, 0, 4)
    with pytest.raises(RuntimeError, match="tile must be one of"):
        decode(1, 0, 0, 1, 8)
