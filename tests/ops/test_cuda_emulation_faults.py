"""The emulation sees the faults it is there for: each is put into a copy of the kernel's source."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from t2kernels import testing

TWO_BARRIERS = "__syncthreads();  // before the next tokens, or the next item, write there"


class Fault(NamedTuple):
    file: str
    right: str
    wrong: str
    form: str
    factors: str | None = None


FAULTS = {
    "reads a stage before it is there": Fault(
        "decode_mma.cuh", "wait(stages_ - 2);", "wait(stages_ - 1);", "mma"
    ),
    "fills a stage that is still to be read": Fault(
        "decode_mma.cuh", "i < stages_ - 1; ++i) copy_next", "i < stages_; ++i) copy_next", "mma"
    ),
    "does not wait for the kernel before": Fault(
        "decode_mma.cuh", "wait_for_the_kernel_before();", ";", "mma-pdl"
    ),
    "does not wait for the other blocks": Fault(
        "decode_mma.cuh", "grid_barrier(call.barrier);", ";", "mma-coop"
    ),
    "reads the partial sums too early": Fault(
        "decode_mma.cuh", "      __syncthreads();\n#pragma unroll 1", "#pragma unroll 1", "mma"
    ),
    "overwrites partial sums": Fault("decode_mma.cuh", TWO_BARRIERS, "", "mma"),
    "leaves the counters as they are": Fault(
        "grid_barrier.cuh", "counters[0] = 0;", "", "mma-coop"
    ),
    "takes int8 for a number without sign": Fault(
        "fragments.cuh", "(two & 0xff80ff80u) | 0x80008000u)", "0xc300c300u)", "mma", factors="int8"
    ),
}


def goes_wrong(emulated, form: str, factors: str | None) -> bool:
    """Whether any order of threads shows it, over two calls: two items of V and ten of U for three
    blocks, so that one of them is done with V at once."""
    dtype = torch.bfloat16
    inputs = testing.make_inputs(20, 2080, 300, 48, slots=3, dtype=dtype, factors=factors)
    for order, late in ((0, False), (1, True), (2, False), (3, True)):
        emulated.settings(order=order, late=late)
        try:
            for _ in range(2):
                emulated.check(inputs, form=form)
        except (AssertionError, RuntimeError):
            return True
    return False


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_shows(emulation, in_place_of_native, fault: Fault, tmp_path: Path) -> None:
    unit = f"decode_mma_{fault.factors or 'bf16'}.cu"
    broken = emulation.with_fault(fault.file, fault.right, fault.wrong, unit, tmp_path)
    assert goes_wrong(in_place_of_native(broken), fault.form, fault.factors)


@pytest.mark.parametrize("form", ["mma", "mma-pdl", "mma-coop"])
@pytest.mark.parametrize("factors", [None, "int8"])
def test_without_a_fault_nothing_shows(emulated, form: str, factors: str | None) -> None:
    assert not goes_wrong(emulated, form, factors)
