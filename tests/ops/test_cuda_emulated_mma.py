"""The tensor-core kernel's own source, run on the CPU by tests/cuda_emulation, against the truth.

Proves fragments, swizzles, the ring, the barriers and the order of sums in all three launch forms;
proves nothing about speed, nor how a tensor core rounds. tests/gpu/test_cuda.py has the same on the
real thing.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from t2kernels import testing
from t2kernels.ops import cuda_forms

BF16, FP16 = torch.bfloat16, torch.float16
KINDS = {
    "bf16": (BF16, None),
    "fp16": (FP16, None),
    "int8": (BF16, "int8"),
    "fp8": (BF16, "fp8"),
}
FORMS = ["mma", "mma-pdl", "mma-coop"]
LAUNCHES = {"mma": (2, 0, 0), "mma-pdl": (1, 1, 0), "mma-coop": (0, 0, 1)}

kinds = pytest.mark.parametrize(("dtype", "factors"), KINDS.values(), ids=KINDS)
forms = pytest.mark.parametrize("form", FORMS)

# (T, n, m, r): one chunk of k; less than a slice; tails in k, in the rows and in every tile of
# tokens; slices of several steps and of none; more items than blocks.
SHAPES = [
    (1, 16, 1, 16),
    (3, 64, 63, 32),
    (8, 144, 17, 208),
    (9, 528, 50, 48),
    (32, 1040, 33, 16),
    (33, 32, 70, 144),
    (65, 64, 200, 1072),
    (128, 80, 33, 64),
]


def make(T: int, n: int, m: int, r: int, **more):
    more = {"dtype": BF16, "slots": 3, **more}
    return testing.make_inputs(T, n, m, r, **more)


@forms
@kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_truth(emulated, shape, dtype, factors: str | None, form: str) -> None:
    """Late copies and shuffled threads: the order that a GPU is most unlike."""
    emulated.settings(order=sum(shape), late=True)
    emulated.check(make(*shape, dtype=dtype, factors=factors, seed=sum(shape)), form=form)
    assert emulated.launches() == LAUNCHES[form]


@kinds
@pytest.mark.parametrize("slots", [0, 1, 40])
def test_diagonals(emulated, slots: int, dtype, factors: str | None) -> None:
    inputs = make(40, 64, 24, 80, dtype=dtype, factors=factors, slots=slots, bias=False)
    if slots == 40:
        inputs = replace(inputs, slot=torch.randperm(41, dtype=torch.int32)[:40] - 1)
    emulated.check(inputs, form="mma-coop")


@kinds
def test_no_tile_form_order_or_machine_changes_a_bit(emulated, dtype, factors: str | None) -> None:
    """T alone chooses the tile, the machine chooses stages and blocks (and sometimes the tile)."""
    inputs = make(128, 576, 100, 160, dtype=dtype, factors=factors, slots=7)
    assert inputs.slot is not None
    whole, _ = emulated.run(inputs, form="mma")
    cases = [(order, late) for order in (0, 1, 5) for late in (False, True)]
    tokens = [[127], list(range(7, -1, -1)), [100, 3], list(range(30, 62)), list(range(99))]
    for number, (order, late) in enumerate(cases):
        chosen = tokens[number % len(tokens)]
        part = replace(inputs, x=inputs.x[chosen], slot=inputs.slot[chosen])
        for machine in ("sm_90", "sm_80", "sm_89"):
            for form in FORMS:
                emulated.settings(order=order, late=late, machine=machine)
                y, _ = emulated.run(part, form=form)
                assert torch.equal(y, whole[chosen]), (order, late, machine, form)


@kinds
@pytest.mark.parametrize("tile", list(cuda_forms.TILE_CODES)[1:])
def test_every_tile_by_name(emulated, tile: str, dtype, factors: str | None) -> None:
    """More items than blocks, tails of rows and tokens, rings that go round."""
    inputs = make(70, 1104, 150, 80, dtype=dtype, factors=factors)
    emulated.settings(order=len(tile), late=True)
    emulated.check(inputs, form="mma-coop", tile=tile)
    expected, _ = emulated.run(inputs, form="mma")
    for order, late, form in ((0, False, "mma-pdl"), (3, True, "mma-coop")):
        emulated.settings(order=order, late=late)
        assert torch.equal(emulated.run(inputs, form=form, tile=tile)[0], expected)


def test_a_tile_too_large_for_the_machine(emulated) -> None:
    emulated.settings(machine="sm_89")
    with pytest.raises(RuntimeError, match="too little shared memory"):
        emulated.run(make(4, 64, 64, 64), form="mma", tile="64x32")
    emulated.check(make(4, 64, 64, 64), form="mma", tile="64x8")


def test_neighbours_do_not_change_bits(emulated) -> None:
    """Not even a NaN next door."""
    inputs = make(20, 64, 40, 64)
    expected, _ = emulated.run(inputs, form="mma")
    inputs.x[3] = float("nan")
    y, _ = emulated.run(inputs, form="mma")
    assert y[3].isnan().all()
    rest = [t for t in range(20) if t != 3]
    assert torch.equal(y[rest], expected[rest])


@kinds
def test_where_x_lies_does_not_change_bits(emulated, dtype, factors: str | None) -> None:
    """Rows that 16-byte copies cannot read are copied first; wide rows are read where they are."""
    inputs = make(6, 144, 24, 80, dtype=dtype, factors=factors)
    expected, _ = emulated.run(inputs, form="mma")
    for width, first in ((147, 1), (160, 8)):
        wide = torch.full((6, width), float("nan"), dtype=dtype)
        x = wide[:, first : first + 144].copy_(inputs.x)
        assert torch.equal(emulated.run(replace(inputs, x=x), form="mma")[0], expected)


def test_a_foreign_slot_gives_nan_and_leaves_the_others(emulated) -> None:
    inputs = make(3, 16, 16, 16, slots=2)
    good, _ = emulated.run(
        replace(inputs, slot=torch.tensor([1, 0, -1], dtype=torch.int32)), form="mma"
    )
    bad = replace(inputs, slot=torch.tensor([1, 2, -1], dtype=torch.int32))
    y, _ = emulated.run(bad, form="mma")
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], good[[0, 2]])


@forms
@pytest.mark.parametrize("shape", [(1, 16, 63, 16), (9, 48, 7, 64), (70, 64, 9, 528)], ids=str)
@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
def test_reads_nothing_behind_the_end(emulated, shape, factors: str | None, form: str) -> None:
    """Every operand ends at a forbidden page: a read past it would kill this process."""
    inputs = make(*shape, factors=factors)
    moved, _memory = emulated.at_the_edge(inputs)
    assert torch.equal(emulated.run(moved, form=form)[0], emulated.run(inputs, form=form)[0])


@pytest.mark.parametrize("form", ["fma", "mma"])
@pytest.mark.parametrize("factors", ["int8", "fp8"])
def test_every_8_bit_number_is_read_exactly(emulated, factors: str, form: str) -> None:
    """256 rows of U that hold one number each, r = 16 of them, times one."""
    codes = torch.arange(256, dtype=torch.uint8)
    if factors == "int8":
        codes = codes[codes != 128]  # -128 is never made, but read as well
    else:
        codes = codes[(codes & 0x7F) != 0x7F]  # NaN
    inputs = make(1, 16, 256, 16, factors=factors, slots=0, bias=False)
    numbers = codes.view(inputs.U.dtype)
    U = torch.zeros(256, 16, dtype=torch.uint8).view(inputs.U.dtype)
    U.view(torch.uint8)[: len(codes), 5] = codes
    V = torch.zeros(16, 16, dtype=torch.uint8).view(inputs.U.dtype)
    V.view(torch.uint8)[5, 3] = 0x38 if factors == "fp8" else 1  # 1.0
    x = torch.zeros(1, 16, dtype=BF16)
    x[0, 3] = 1
    ones = torch.ones(16)
    y, _ = emulated.run(replace(inputs, x=x, U=U, V=V.t(), d=ones, scale=ones), form=form)
    assert torch.equal(y[0, : len(codes)].float(), numbers.float())


def test_no_tokens(emulated) -> None:
    y, h = emulated.run(make(0, 16, 63, 16), form="mma-coop", save_h=True)
    assert y.shape == (0, 63) and h is not None and h.shape == (0, 16)


def test_before_sm_90_nothing_overlaps(emulated) -> None:
    """The instruction that waits for the kernel before is not there."""
    emulated.settings(machine="sm_80")
    emulated.check(make(4, 64, 40, 64), form="mma-pdl")
    assert emulated.launches() == (2, 0, 0)


def test_counters_are_left_at_zero(emulated) -> None:
    """Nobody has to zero them between calls, on whatever grid."""
    for inputs in (make(4, 64, 400, 64), make(40, 64, 16, 32), make(4, 64, 400, 64, seed=1)):
        emulated.check(inputs, form="mma-coop")
    (pool,) = cuda_forms.barriers._pools.values()
    assert not pool.any()


def meet(emulated, blocks: int, come: int, looks: int = 1000):
    counters, before = (ctypes.c_uint32 * 2)(), ctypes.c_int(0)
    after = (ctypes.c_int * blocks)()
    sizes = [ctypes.c_int64(blocks), ctypes.c_int64(come), ctypes.c_int64(looks)]
    emulated.call("emulated_barrier", *sizes, counters, ctypes.byref(before), after)
    return list(counters), list(after)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_barrier_holds_every_block_until_the_last(emulated, order: int) -> None:
    emulated.settings(order=order)
    for blocks in (1, 2, 6):
        assert meet(emulated, blocks, blocks) == ([0, 0], [blocks] * blocks)


def test_barrier_gives_up_on_a_block_that_never_comes(emulated) -> None:
    emulated.settings()
    with pytest.raises(RuntimeError, match="blocks for each other"):
        meet(emulated, 3, 2)
    with pytest.raises(RuntimeError, match="trap"):
        meet(emulated, 3, 2, looks=0)


@forms
def test_the_runtime_is_asked_once_for_a_kernel_on_a_device(emulated, form: str) -> None:
    """Five attributes of the device, three questions about the kernel; then none."""
    inputs = make(4, 64, 40, 64)
    emulated.check(inputs, form=form)
    emulated.questions()
    expected, _ = emulated.run(inputs, form=form)
    assert emulated.questions() == 0
    # A device that was not seen before.
    emulated.device = emulated.library.emulator_set_machine(6, 100000 + len(form), 101024, 90)
    assert torch.equal(emulated.run(inputs, form=form)[0], expected)
    assert emulated.questions() == 5 + 3
    emulated.settings(machine="sm_89")
    emulated.run(inputs, form=form)
    emulated.settings()
    emulated.questions()
    emulated.run(inputs, form=form)
    assert emulated.questions() == 0, "the other device's answers were kept"


def test_what_does_not_fit_is_an_error(emulated) -> None:
    right = {"x": 16, "stride": 16, "n": 16, "r": 16, "m": 16}
    right |= {"x_dtype": 1, "w_dtype": 1, "form": 1}

    def decode(**changes: int) -> None:
        c = {**right, **changes}
        pointers = [c["x"], c["stride"], 16, 16, 16, 0, 1, 0, 16, 0, 0, 16, 0, 16, 0]
        sizes = [2, c["n"], c["r"], c["m"]]
        emulated.decode(*pointers, *sizes, c["x_dtype"], c["w_dtype"], c["form"], 0, 0, 0)

    with pytest.raises(RuntimeError, match="needs bf16 or fp16 x"):
        decode(x_dtype=0, w_dtype=0)
    for eight_bit in (3, 4):
        with pytest.raises(RuntimeError, match="bf16 x with 8-bit"):
            decode(x_dtype=2, w_dtype=eight_bit)
    for wrong in ({"n": 12}, {"r": 20}, {"w_dtype": 3, "n": 24}):
        with pytest.raises(RuntimeError, match="multiples of 8"):
            decode(**wrong)
    for wrong in ({"x": 8}, {"stride": 20}):
        with pytest.raises(RuntimeError, match="on 16 bytes"):
            decode(**wrong)
    with pytest.raises(RuntimeError, match="below 2"):
        decode(m=1 << 30)
    with pytest.raises(RuntimeError, match="needs barrier"):
        decode(form=3)
