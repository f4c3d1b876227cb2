"""Layers that share x by the CUDA kernels' own source, run on the CPU by tests/cuda_emulation.

Against the truth, and bit for bit against each layer alone. tests/gpu/test_groups.py has the same
on the real thing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2kernels import testing
from t2kernels.ops import cuda, cuda_forms, reference
from t2kernels.testing import Group

BF16, FP16 = torch.bfloat16, torch.float16
MMA = ["mma", "mma-pdl", "mma-coop"]
# Launches by kind: plain, programmatic, cooperative. The second products are one launch, or, in
# form fma, one for each member.
LAUNCHES = {"mma": (2, 0, 0), "mma-pdl": (1, 1, 0), "mma-coop": (0, 0, 1)}

kinds = pytest.mark.parametrize(
    ("dtype", "factors"),
    [(BF16, None), (FP16, None), (BF16, "int8"), (BF16, "fp8")],
    ids=["bf16", "fp16", "int8", "fp8"],
)

# T, n, the members' m and r. Ranks differ: a member of 16 gives work to one warp of four, the next
# one to all; more items than blocks; tiles of rows that end inside a member;
SHAPES = [
    (1, 16, [63], [16]),
    (3, 64, [63, 17], [32, 16]),
    (9, 144, [40, 17, 50], [208, 16, 640]),
    (40, 80, [100, 33, 16, 70], [16, 1040, 32, 144]),
    (70, 528, [60, 90], [64, 64]),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape, **more) -> Group:
    T, n, ms, ranks = shape
    more = {"dtype": BF16, "slots": 3, "seed": T + n, **more}
    return testing.make_group(T, n, ms, ranks, **more)


def check(emulated, group: Group, form: str, tile: str = "auto") -> list[Tensor]:
    """Every member against the fp64 truth and against itself alone in the same form."""
    ys = emulated.run_group(group, form=form, tile=tile)
    assert len(ys) == len(group.Us)
    for i, (y, member) in enumerate(zip(ys, group.members())):
        truth, _ = reference.forward(*member.double().args())
        testing.assert_accurate(y, truth, testing.plain_forward(member), f"y of member {i}")
        assert torch.equal(y, emulated.run(member, form=form, tile=tile)[0]), f"member {i} alone"
    return ys


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("form", MMA)
@kinds
@shapes
def test_tensor_cores(emulated, shape, dtype, factors: str | None, form: str) -> None:
    """Late copies and shuffled threads: the order that a GPU is most unlike."""
    group = make(shape, dtype=dtype, factors=factors, bias=[True, False])
    emulated.settings(order=sum(shape[:2]), late=True)
    emulated.launches()
    emulated.run_group(group, form=form)
    assert emulated.launches() == LAUNCHES[form]
    check(emulated, group, form)


@pytest.mark.parametrize("factors", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, [1], [1]),
        (1, 17, [63, 1], [17, 9]),
        (5, 63, [17, 9, 4], [63, 17, 1]),
        (17, 64, [33, 16], [32, 80]),
    ],
    ids=str,
)
def test_plain(emulated, shape, dtype, factors: str | None) -> None:
    """Columns of a member that begin anywhere, and such that 16-byte loads can read."""
    group = make(shape, dtype=dtype, factors=factors, bias=[False])
    emulated.launches()
    emulated.run_group(group)
    assert emulated.launches() == (1 + len(group.Us), 0, 0)
    check(emulated, group, "fma")


@pytest.mark.parametrize(("dtype", "factors"), [(BF16, None), (BF16, "int8")])
def test_no_form_tile_order_or_machine_changes_a_bit(emulated, dtype, factors) -> None:
    shape = (70, 144, [100, 20, 60], [80, 640, 16])
    group = make(shape, dtype=dtype, factors=factors, slots=7)
    assert group.slot is not None
    whole = emulated.run_group(group, form="mma")
    cases = [
        ([69], 0, False),
        (list(range(7, -1, -1)), 1, True),
        (list(range(30, 62)), 5, False),
        (list(range(69)), 0, True),
    ]
    for chosen, order, late in cases:
        part = replace(group, x=group.x[chosen], slot=group.slot[chosen])
        for machine in ("sm_90", "sm_80", "sm_89"):
            for form in MMA:
                emulated.settings(order=order, late=late, machine=machine)
                ys = emulated.run_group(part, form=form)
                assert same(ys, [y[chosen] for y in whole]), (order, late, machine, form)


@pytest.mark.parametrize("tile", list(cuda_forms.TILE_CODES)[1:])
def test_every_tile_by_name(emulated, tile: str) -> None:
    group = make((70, 80, [130, 20, 50], [80, 16, 144]))
    emulated.settings(order=len(tile), late=True)
    expected = emulated.run_group(group, form="mma")
    assert same(check(emulated, group, "mma-coop", tile), expected)


@pytest.mark.parametrize("form", cuda_forms.FORMS)
class TestEveryForm:
    def test_members_do_not_touch_each_other(self, emulated, form: str) -> None:
        """Not even by a NaN in the columns next door."""
        group = make((5, 64, [24, 40, 8], [32, 16, 48]))
        expected = emulated.run_group(group, form=form)
        group.d[:, 32:48] = float("nan")
        group.base[32:48] = float("nan")
        ys = emulated.run_group(group, form=form)
        assert ys[1].isnan().all()
        assert same(ys[::2], expected[::2])

    def test_strided_x_and_arena(self, emulated, form: str) -> None:
        group = make((6, 144, [24, 40], [80, 16]))
        expected = emulated.run_group(group, form=form)
        for width, first in ((147, 1), (160, 8)):
            wide = torch.full((6, width), float("nan"), dtype=BF16)
            x = wide[:, first : first + 144].copy_(group.x)
            arena = torch.full((3, 131), float("nan"))
            d = arena[:, 11:107].copy_(group.d)
            assert same(emulated.run_group(replace(group, x=x, d=d), form=form), expected)

    @pytest.mark.parametrize("slots", [0, 40])
    def test_diagonals(self, emulated, form: str, slots: int) -> None:
        group = make((40, 32, [24, 9], [16, 32]), slots=slots)
        if slots:
            group = replace(group, slot=torch.randperm(41, dtype=torch.int32)[:40] - 1)
        check(emulated, group, form)

    def test_a_foreign_slot_gives_nan_and_leaves_the_others(self, emulated, form: str) -> None:
        group = make((3, 16, [16, 8], [16, 16]), slots=2)
        good, bad = (torch.tensor([1, s, -1], dtype=torch.int32) for s in (0, 2))
        expected = emulated.run_group(replace(group, slot=good), form=form)
        for y, right in zip(emulated.run_group(replace(group, slot=bad), form=form), expected):
            assert y[1].isnan().all()
            assert torch.equal(y[[0, 2]], right[[0, 2]])

    def test_no_tokens(self, emulated, form: str) -> None:
        ys = emulated.run_group(make((0, 16, [63, 8], [16, 32])), form=form)
        assert [y.shape for y in ys] == [(0, 63), (0, 8)]

    def test_reads_nothing_behind_the_end(self, emulated, form: str) -> None:
        """Every operand ends at a forbidden page: a read past it would kill this process."""
        group = make((9, 48, [7, 30], [64, 16]))
        expected = emulated.run_group(group, form=form)
        places = [emulated.at_the_edge(member) for member in group.members()]
        (first, _), (second, _) = places
        joined = replace(second, V=group.V, d=group.d, base=group.base)
        joined, _memory = emulated.at_the_edge(joined)
        moved = replace(
            group, x=joined.x, V=joined.V, d=joined.d, base=joined.base, slot=joined.slot,
            Us=(first.U, second.U), biases=(first.bias, second.bias),
        )  # fmt: skip
        assert same(emulated.run_group(moved, form=form), expected)


def test_a_step_for_a_warp_that_has_none_shows(
    emulation, in_place_of_native, tmp_path: Path
) -> None:
    """The emulation sees the fault that only a group of different ranks can have."""
    right, wrong = "if (share.steps == 0) continue;", "if (share.steps < 0) continue;"
    group = make((9, 144, [200, 170, 200], [208, 16, 640]))  # several items for every block
    expected = in_place_of_native(emulation).run_group(group, form="mma")
    unit = "decode_mma_bf16.cu"
    broken = emulation.with_fault("decode_mma.cuh", right, wrong, unit, tmp_path)
    assert not same(in_place_of_native(broken).run_group(group, form="mma"), expected)


@pytest.mark.parametrize("form", MMA)
def test_counters_are_left_at_zero(emulated, form: str) -> None:
    for _ in range(2):
        check(emulated, make((4, 64, [400, 16], [64, 32])), form)
    for pool in cuda_forms.barriers._pools.values():
        assert not pool.any()


def test_what_does_not_fit_is_an_error(emulated) -> None:
    def call(**changes: object) -> None:
        c = {"U": [16], "bias": [0], "y": [16], "r": [16], "m": [16], "form": 1, **changes}
        emulated.group(
            16, 16, c["U"], 16, 16, 0, 1, 0, 16, c["bias"], 0, c["y"], 16, 0, 2, 16, c["r"],
            c["m"], 1, 1, c["form"], 0, 0, 0,
        )  # fmt: skip

    for name in ("U", "bias", "y", "r", "m"):
        with pytest.raises(RuntimeError, match="one entry for each member"):
            call(**{name: [16, 16]})
    for members in ([], [16] * 5):
        with pytest.raises(RuntimeError, match="1 to 4 members"):
            call(**dict.fromkeys(("U", "bias", "y", "r", "m"), members))
    two = {key: [16, 16] for key in ("U", "bias", "y", "r", "m")}
    with pytest.raises(RuntimeError, match="multiples of 8"):
        call(**{**two, "r": [16, 20]})
    with pytest.raises(RuntimeError, match="on 16 bytes"):
        call(**{**two, "U": [16, 8]})
    with pytest.raises(RuntimeError, match="n, r, m > 0"):
        call(**{**two, "m": [16, 0], "form": 0})
    with pytest.raises(RuntimeError, match="must be given"):
        call(**{**two, "y": [16, 0], "form": 0})
    with pytest.raises(RuntimeError, match="needs barrier"):
        call(form=3)


def test_says_why_not(emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    group = make((4, 64, [24, 8], [32, 20]))
    monkeypatch.setattr(cuda, "_missing", None)
    assert cuda.group_unavailable(*group.args()) == "x is on cpu"
    monkeypatch.setattr(cuda, "_elsewhere", lambda x: None)
    assert cuda.group_unavailable(*group.args()) is None
    with cuda_forms.form("mma"):
        reason = str(cuda.group_unavailable(*group.args()))
        assert "form 'mma' was asked for" in reason and "multiples of 8" in reason
        with pytest.raises(RuntimeError, match="multiples of 8"):
            cuda.forward_group(*group.args())
    assert "129 tokens" in str(cuda.group_unavailable(*make((129, 8, [8], [8])).args()))
    odd = replace(group, Us=(group.Us[0], group.Us[1].t().contiguous().t()))
    assert "member 1: U must be" in str(cuda.group_unavailable(*odd.args()))
    monkeypatch.setattr(cuda, "_native", None)
    monkeypatch.setattr(cuda, "_missing", "this build has no CUDA kernels")
    with pytest.raises(RuntimeError, match="backend 'cuda': this build has no CUDA kernels"):
        cuda.forward_group(*group.args())


def test_one_form_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size of all members together; plain where one of them does not fit."""
    rules = (cuda_forms.Rule(8, 6000, "mma-coop", "32x8"), cuda_forms.Rule(128, 1e9, "mma"))
    monkeypatch.setattr(cuda_forms, "RULES", rules)
    group = make((8, 64, [24, 8], [32, 16]))
    assert group.V.numel() + sum(U.numel() for U in group.Us) == 3072 + 896
    x, Us, V = group.x, group.Us, group.V
    assert cuda_forms.choose_group(x, Us, V, False) == ("mma-coop", "32x8")
    assert cuda_forms.choose_group(x, Us, V, True) == ("mma", "auto")
    large = make((8, 64, [24, 200], [32, 16]))
    assert cuda_forms.choose_group(large.x, large.Us, large.V, False) == ("mma", "auto")
    odd = make((8, 64, [24, 8], [32, 12]))
    assert cuda_forms.choose_group(odd.x, odd.Us, odd.V, False) == ("fma", "auto")
