"""Layers that share x as one call, on every backend of a CPU: the truth, and the member alone.

tests/ops/test_cuda_emulated_group.py and tests/gpu/test_groups.py have the same for the CUDA
kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from t2kernels.ops import native, reference, torch_backend
from t2kernels.ops.layout import MAX_MEMBERS, unfit_group
from t2kernels.testing import Group, assert_accurate, make_group, plain_forward, poisoned_empty

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FACTORS = [None, "int8", "fp8"]
needs_native = pytest.mark.skipif(native._MISSING is not None, reason=str(native._MISSING))
ISAS = [] if native._MISSING is not None else native._native.isa_available()

# T, n, the members' m and r: one member; degenerate; one past or short of a step; q, k, v; a member
# of many rows; more tokens than one pass over the weights takes.
SHAPES = [
    (1, 1, [1], [1]),
    (1, 17, [63, 1, 9], [9, 1, 17]),
    (2, 63, [63, 17], [17, 63]),
    (5, 64, [64, 32, 32], [64, 32, 32]),
    (9, 200, [7, 130], [31, 65]),
    (40, 97, [66, 33, 5, 1], [48, 16, 63, 3]),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
kinds = pytest.mark.parametrize("factors", FACTORS)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn."""
    monkeypatch.setattr(native, "_AUTO", native._native.isa_code(request.param))
    yield request.param


@pytest.fixture(params=["kernel", "library"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The native kernels at every T, or the library at every T."""
    limit = 1 << 30 if request.param == "kernel" else -1
    for key in list(native.DECODE_TOKENS):
        monkeypatch.setitem(native.DECODE_TOKENS, key, limit)
    return request.param


def run(module, group: Group, **options: bool) -> list[Tensor]:
    assert module.group_unavailable(*group.args()) is None
    with poisoned_empty():
        return module.forward_group(*group.args(), **options)


def alone(module, group: Group, **options: bool) -> list[Tensor]:
    return [module.forward(*member.args(), **options)[0] for member in group.members()]


def check(module, group: Group) -> list[Tensor]:
    """Every member against the fp64 truth; the same bits from run to run."""
    ys = run(module, group)
    again = run(module, group)
    assert len(ys) == len(group.Us)
    for i, (y, member) in enumerate(zip(ys, group.members())):
        assert y.dtype == group.x.dtype and y.is_contiguous()
        assert torch.equal(y, again[i]), "two runs differ"
        truth, _ = reference.forward(*member.double().args())
        assert_accurate(y, truth, plain_forward(member), f"y of member {i}")
    return ys


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@shapes
@dtypes
@kinds
@pytest.mark.parametrize("slots", [0, 3])
def test_torch(shape, dtype, factors, slots: int) -> None:
    T, n, ms, ranks = shape
    group = make_group(
        T, n, ms, ranks, slots=slots, bias=[slots == 0], dtype=dtype, factors=factors
    )
    ys = check(torch_backend, group)
    if len(ms) == 1:
        assert same(ys, alone(torch_backend, group))


@shapes
@dtypes
def test_reference_is_the_members_one_by_one(shape, dtype) -> None:
    T, n, ms, ranks = shape
    group = make_group(T, n, ms, ranks, slots=2, dtype=dtype)
    assert same(check(reference, group), alone(reference, group))


@shapes
@dtypes
@kinds
@pytest.mark.parametrize("slots", [0, 3])
def test_native(isa, path: str, shape, dtype, factors, slots: int, monkeypatch) -> None:
    monkeypatch.setattr(native, "DEQUANTISE_ELEMENTS", 1000)
    T, n, ms, ranks = shape
    group = make_group(
        T, n, ms, ranks, slots=slots, bias=[slots == 0], dtype=dtype, factors=factors
    )
    ys = check(native, group)
    if path == "kernel" or len(ms) == 1:
        assert same(ys, alone(native, group))


@needs_native
@dtypes
@kinds
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_bits_depend_on_neither_threads_nor_passes(
    dtype, factors, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token alone, and among so many that the weights are read twice."""
    group = make_group(75, 30000, [40, 8, 24], [24, 8, 16], slots=3, dtype=dtype, factors=factors)
    assert group.slot is not None
    whole = run(native, group, batch_invariant=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in ([39], [3, 0], list(range(20))):
            part = replace(group, x=group.x[tokens], slot=group.slot[tokens])
            ys = run(native, part, batch_invariant=True)
            assert same(ys, [y[tokens] for y in whole]), tokens
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "module", [reference, torch_backend, pytest.param(native, marks=needs_native)]
)
class TestEveryBackend:
    def test_batch_invariant(self, module) -> None:
        """A row's bits are its own, and those of the member alone."""
        group = make_group(7, 63, [17, 40], [30, 16], slots=3, dtype=torch.bfloat16)
        assert group.slot is not None
        whole = run(module, group, batch_invariant=True)
        assert same(whole, alone(module, group, batch_invariant=True))
        part = replace(group, x=group.x[4:5], slot=group.slot[4:5])
        assert same(run(module, part, batch_invariant=True), [y[4:5] for y in whole])

    def test_strided_x_and_arena(self, module) -> None:
        group = make_group(6, 50, [41, 20], [37, 8], slots=3)
        wide = torch.full((6, 61), float("nan"))
        wide[:, 3:53] = group.x
        arena = torch.full((3, 91), float("nan"))
        arena[:, 11:56] = group.d
        check(module, replace(group, x=wide[:, 3:53], d=arena[:, 11:56]))

    def test_all_slots_different(self, module) -> None:
        group = make_group(9, 32, [24, 16], [24, 16], slots=8)
        slot = torch.randperm(9, dtype=torch.int32) - 1
        check(module, replace(group, slot=slot))

    @pytest.mark.parametrize("slots", [0, 2])
    def test_no_tokens(self, module, slots: int) -> None:
        group = make_group(0, 20, [30, 12], [10, 7], slots=slots)
        assert [y.shape for y in run(module, group)] == [(0, 30), (0, 12)]


@needs_native
def test_native_refuses_a_slot_that_does_not_exist() -> None:
    group = make_group(2, 16, [8, 8], [4, 4], slots=2)
    with pytest.raises(ValueError, match="slot must lie in"):
        run(native, replace(group, slot=torch.tensor([0, 2], dtype=torch.int32)))


@needs_native
def test_native_wants_one_entry_for_each_member() -> None:
    call = [8, 1, [8], 8, 8, 1, 1, 0, 8, [0], 0, [8], 1, 1, [1], [1], 0, 0, 1, -1]
    for at in (2, 9, 11, 14, 15):
        with pytest.raises(ValueError, match="one entry for each member"):
            native._native.svf_group(*call[:at], [1, 1], *call[at + 1 :])
    with pytest.raises(ValueError, match="r must be at least 1, got 0"):
        native._native.svf_group(*call[:14], [0], *call[15:])


GOOD = make_group(4, 32, [24, 8], [16, 8], slots=3)


def changed(name: str, i: int, value: Tensor) -> Group:
    entries = list(getattr(GOOD, name))
    entries[i] = value
    return replace(GOOD, **{name: tuple(entries)})


UNFIT = {
    "has 0 members; 1 to 4": replace(GOOD, Us=(), biases=()),
    "has 5 members": make_group(1, 4, [1] * 5, [1] * 5),
    "float16 like x": replace(GOOD, x=GOOD.x.half()),
    r"^U must be a contiguous": changed("Us", 0, GOOD.Us[0].t().contiguous().t()),
    r"member 1: U must be a contiguous \(m, r\)": changed("Us", 1, torch.ones(8, 16)[:, ::2]),
    "member 1: U is torch.int8; expected torch.float32": changed("Us", 1, GOOD.Us[1].char()),
    "member 1: bias is torch.float16": changed("biases", 1, torch.zeros(8).half()),
    r"contiguous \(r, n\)": replace(GOOD, V=GOOD.V.contiguous()),
    "base must be contiguous": replace(GOOD, base=torch.ones(48)[::2]),
}


@pytest.mark.parametrize("words", UNFIT)
def test_why_not(words: str) -> None:
    args = UNFIT[words].args()
    assert MAX_MEMBERS == 4
    with pytest.raises(RuntimeError, match=words):
        raise RuntimeError(unfit_group(*args))
    if native._MISSING is None:
        assert native.group_unavailable(*args) == unfit_group(*args, kinds=native._KINDS)


def test_what_fits() -> None:
    assert unfit_group(*GOOD.args()) is None
    eight = make_group(4, 32, [24, 8], [16, 8], factors="fp8")
    assert "or int8" in str(unfit_group(*eight.args()))
    assert unfit_group(*eight.args(), kinds=("int8", "fp8")) is None


@needs_native
def test_native_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = replace(GOOD, x=GOOD.x.to("meta"))
    assert "x is on meta" in str(native.group_unavailable(*meta.args()))
    monkeypatch.setattr(native, "_MISSING", "the native module is not built")
    assert native.group_unavailable(*GOOD.args()) == "the native module is not built"
