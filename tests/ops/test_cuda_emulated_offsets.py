"""Offsets beyond 2^31 elements, in memory of which only the pages that are used exist.

The emulation runs the last blocks of the launch alone. A 32-bit offset would be a foreign address:
it kills this process.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from t2kernels import testing
from t2kernels.ops import cuda_forms, reference
from t2kernels.ops.layout import TYPE_CODES

# T rows of y, m apart, and of x, STRIDE apart; m rows of U: each reaches past 2^31 elements.
T, N, R, M, STRIDE, D_STRIDE = 17, 16, 16, (1 << 27) + 32, (1 << 27) + 16, (1 << 31) + 8
CHECKED = 4  # last rows of U
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Vast:
    """Zeros without end."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        try:
            self.memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
        except OSError as error:
            pytest.skip(f"the system gives no address space: {error}")
        self.all = torch.frombuffer(self.memory, dtype=dtype)
        self.address = self.all.data_ptr()
        assert ctypes.sizeof(ctypes.c_void_p) == 8

    def put(self, rows: Tensor, first: int, stride: int) -> None:
        for i, row in enumerate(rows):
            begin = (first + i) * stride
            self.all[begin : begin + len(row)] = row


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="needs POSIX memory maps")
@pytest.mark.parametrize("form", ["fma", "mma"])
@pytest.mark.parametrize("factors", [None, "int8"])
def test_rows_that_begin_beyond_2_to_the_31(emulated, form: str, factors: str | None) -> None:
    dtype = torch.bfloat16
    inputs = testing.make_inputs(T, N, CHECKED, R, dtype=dtype, factors=factors, slots=2)
    assert inputs.slot is not None and inputs.bias is not None
    inputs = replace(inputs, slot=torch.arange(T, dtype=torch.int32) % 2)
    x, U = Vast(T * STRIDE, dtype), Vast(M * R, inputs.U.dtype)
    d, bias = Vast(2 * D_STRIDE, torch.float32), Vast(M, dtype)
    y = Vast(T * M, dtype)
    x.put(inputs.x, 0, STRIDE)
    U.put(inputs.U, M - CHECKED, R)
    d.put(inputs.d, 0, D_STRIDE)
    bias.put(inputs.bias[:, None], M - CHECKED, 1)
    V, slot = inputs.V.t().contiguous(), inputs.slot
    scale = 0 if inputs.scale is None else inputs.scale.data_ptr()
    work = torch.empty(T, R, dtype=torch.float32 if form == "fma" else dtype)

    # Enough multiprocessors for a block an item, of which the last ones run.
    emulated.device = emulated.library.emulator_set_machine(1 << 23, 232448, 233472, 90)
    emulated.library.emulator_set_last_blocks(16)  # all of x V
    emulated.decode(
        x.address, STRIDE, U.address, V.data_ptr(), d.address, D_STRIDE, 2, slot.data_ptr(),
        inputs.base.data_ptr(), bias.address, scale, y.address, 0, work.data_ptr(), 0,
        T, N, R, M, TYPE_CODES[dtype], TYPE_CODES[inputs.U.dtype], cuda_forms.CODES[form], 0,
        emulated.device, 0,
    )  # fmt: skip
    found = torch.stack([y.all[(t + 1) * M - CHECKED : (t + 1) * M] for t in range(T)])
    truth, _ = reference.forward(*inputs.double().args())
    testing.assert_accurate(found, truth, testing.plain_forward(inputs), "y")
