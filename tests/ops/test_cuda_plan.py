"""How the tensor-core kernel fills machines that need not be here: arithmetic, no measurement.

``pytest -s`` prints, for the layers of an 8B model, the bytes of weights that are on their way at
once beside those that memory needs to be kept busy (bandwidth times latency), and the time in which
the memory could deliver the factors.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest

MMA, PDL, COOPERATIVE = 1, 2, 3
# Bytes per second, and seconds from asking for a byte to having it under load (an assumption).
LATENCY = 1e-6
# Registers of the largest kernel are checked in test_cuda_compile.py: two blocks always fit.
RESERVED = 1024


class Gpu(NamedTuple):
    """Multiprocessors, shared memory of a block and of a multiprocessor, capability; bytes/s."""

    multiprocessors: int
    block: int
    multiprocessor: int
    capability: int
    bandwidth: float


GPUS = {
    "H200": Gpu(132, 232448, 233472, 90, 4.3e12),
    "A100": Gpu(108, 166912, 167936, 80, 1.5e12),
    "L40S": Gpu(142, 101376, 102400, 89, 0.8e12),
}
# n, m; r is the smaller one.
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)]


class Plan(NamedTuple):
    """Of a launch; ``items`` of the product in question, ``other_items`` of the other one in it."""

    rows: int
    tokens: int
    stages: int
    per_multiprocessor: int
    blocks: int
    shared_bytes: int
    stage_weight_bytes: int
    items: int
    other_items: int

    def in_flight(self, items: int) -> int:
        """Bytes of weights on their way at once, over the whole machine."""
        return min(items, self.blocks) * (self.stages - 1) * self.stage_weight_bytes


def launches(emulated, gpu: Gpu, tokens: int, shape: tuple[int, int], eight_bit: bool, form: int):
    """The plans of x V and of h Uᵀ; the same one where one launch does both."""
    emulated.library.emulator_set_machine(*gpu[:4])
    both = (min(shape), shape[1])
    plans = []
    for rows, other in [both, both[::-1]] if form == COOPERATIVE else [(row, row) for row in both]:
        out = (ctypes.c_int64 * len(Plan._fields))()
        numbers = map(ctypes.c_int64, (tokens, rows, other, eight_bit, form))
        emulated.library.emulated_plan(*numbers, out)
        plans.append(Plan(*out))
    return plans


@pytest.mark.parametrize("name", GPUS)
def test_every_tile_fits_every_machine(emulated, name: str) -> None:
    gpu = GPUS[name]
    for shape in [*SHAPES, (16, 1), (1 << 20, 1 << 20)]:
        for tokens in (1, 8, 9, 32, 33, 64, 128):
            for eight_bit in (False, True):
                for form in (MMA, PDL, COOPERATIVE):
                    for p in launches(emulated, gpu, tokens, shape, eight_bit, form):
                        assert 2 <= p.stages <= 8 and 1 <= p.per_multiprocessor <= 2
                        assert p.shared_bytes <= gpu.block
                        resident = p.per_multiprocessor * (p.shared_bytes + RESERVED)
                        assert resident <= gpu.multiprocessor
                        room = p.per_multiprocessor * gpu.multiprocessors
                        assert p.blocks == min(max(p.items, p.other_items), room)


@pytest.mark.parametrize(
    ("tokens", "eight_bit"), [(1, False), (32, False), (64, False), (1, True), (32, True)]
)
def test_the_second_kernel_of_the_overlapping_form_finds_room_while_the_first_runs(
    emulated, tokens: int, eight_bit: bool
) -> None:
    """Else it could not fetch U before. (8-bit factors leave too little room at 64 tokens.)"""
    gpu = GPUS["H200"]
    for shape in SHAPES:
        first, second = launches(emulated, gpu, tokens, shape, eight_bit, PDL)
        assert places_beside(first, second, gpu) >= second.blocks, (shape, first, second)


def test_where_the_second_kernel_finds_no_room(emulated) -> None:
    """The doubt that csrc/README.md names, as far as arithmetic goes."""
    first, second = launches(emulated, GPUS["H200"], 64, (4096, 4096), True, PDL)
    # On the multiprocessors that the first leaves empty.
    assert places_beside(first, second, GPUS["H200"]) == 132 - first.blocks == 46


def places_beside(first: Plan, second: Plan, gpu: Gpu) -> int:
    """Blocks of the second kernel for which all blocks of the first, spread evenly over the
    machine, leave memory; two blocks of both kernels is what registers are sure to allow."""
    each, more = divmod(first.blocks, gpu.multiprocessors)
    free = 0
    for i in range(gpu.multiprocessors):
        here = each + (i < more)
        memory = gpu.multiprocessor - here * (first.shared_bytes + RESERVED)
        free += min(memory // (second.shared_bytes + RESERVED), 2 - here)
    return free


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_overlapping_form_keeps_the_memory_busy_at_few_tokens(
    emulated, eight_bit: bool
) -> None:
    """Either kernel by itself up to 8 tokens; at 32 both together, where they overlap."""
    gpu = GPUS["H200"]
    needed = gpu.bandwidth * LATENCY
    for shape in SHAPES[:3]:
        for tokens in (1, 8, 32):
            plans = launches(emulated, gpu, tokens, shape, eight_bit, PDL)
            own = [p.in_flight(p.items) for p in plans]
            print(
                f"\n  {'8-bit' if eight_bit else 'bf16':5} {shape} T={tokens:<3} "
                f"{[p.blocks for p in plans]} blocks of {[p.stages for p in plans]} stages, "
                f"{[round(n / 1e6, 1) for n in own]} MB",
                end="",
            )
            assert (min(own) if tokens <= 8 else sum(own)) >= needed, (shape, tokens, own)


@pytest.mark.parametrize("name", GPUS)
def test_enough_is_on_its_way(emulated, name: str) -> None:
    """Up to 32 tokens, where the goals are: both factors, on every layer but the small one."""
    gpu = GPUS[name]
    needed = gpu.bandwidth * LATENCY
    print(f"\n{name}: {needed / 1e6:.1f} MB must be on their way")
    for eight_bit in (False, True):
        for shape in SHAPES:
            for tokens in (8, 32, 64, 128):
                v, u = launches(emulated, gpu, tokens, shape, eight_bit, COOPERATIVE)
                factors = min(shape) * sum(shape) * (1 if eight_bit else 2)
                # Of L2: the factor once for each tile of tokens, activations once for each of rows.
                reads = -(-tokens // v.tokens) + tokens / v.rows * (2 if eight_bit else 1)
                print(
                    f"  {'8-bit' if eight_bit else 'bf16':5} {shape[0]:>5} to {shape[1]:<5} "
                    f"T={tokens:<4}tile {v.rows}x{v.tokens:<3}{v.blocks:>4} blocks of {v.stages} "
                    f"stages, {v.shared_bytes / 1024:5.1f} KiB; {v.in_flight(v.items) / 1e6:4.1f} "
                    f"MB of V, {u.in_flight(u.items) / 1e6:4.1f} of U on their way; "
                    f"L2 reads {reads:3.1f} x the factors; floor "
                    f"{factors / gpu.bandwidth * 1e6:5.1f} us"
                )
                least = min(p.in_flight(p.items) for p in (v, u))
                if tokens <= 32 and shape != (4096, 1024):
                    assert least >= needed, (eight_bit, shape, tokens)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_group_keeps_the_memory_busy_where_its_small_members_cannot(
    emulated, eight_bit: bool
) -> None:
    """q, k, v of 4096 to 4096, 1024 and 1024 in one cooperative launch, against k alone."""
    needed = GPUS["H200"].bandwidth * LATENCY
    for tokens in (8, 32):
        numbers = {}
        for name, rank, rows in (("k", 1024, 1024), ("q, k, v", 6144, 6144)):
            emulated.library.emulator_set_machine(*GPUS["H200"][:4])
            out = (ctypes.c_int64 * len(Plan._fields))()
            sizes = map(ctypes.c_int64, (tokens, rank, rows, eight_bit, COOPERATIVE))
            emulated.library.emulated_plan(*sizes, out)
            plan = Plan(*out)
            numbers[name] = min(plan.in_flight(items) for items in (plan.items, plan.other_items))
            print(
                f"\n  {'8-bit' if eight_bit else 'bf16':5} {name:8} T={tokens:<3} {plan.blocks:>4} "
                f"blocks of {plan.stages} stages, {numbers[name] / 1e6:4.1f} MB on their way "
                f"({needed / 1e6:.1f} needed)",
                end="",
            )
        assert numbers["k"] < needed <= numbers["q, k, v"], (tokens, numbers)
