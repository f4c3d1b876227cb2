"""Mixing experts into rows of an arena: every backend against fp64, and in the same bits.

CUDA's kernel runs in tests/cuda_emulation. Triton's runs where TRITON_INTERPRET=1 was set before
the first import: ``test_triton_interpret.py`` runs this file again so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from t2kernels.ops import cuda, dispatch, mixing, native
from t2kernels.ops.mixing import mix_rows
from t2kernels.testing import relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["torch", "native", "cuda"]
NAN = float("nan")
# (R, slots): one column, tails of a vector, of a block of 512 and of a tile of 2048 columns.
SIZES = [1, 3, 63, 512, 513, 2052, 4100]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "native" and native._MISSING is not None:
        pytest.skip(native._MISSING)
    if name == "cuda":
        request.getfixturevalue("emulated")
        monkeypatch.setattr(mixing, "_unavailable", lambda name, out: None)
    monkeypatch.setenv("T2_BACKEND", name)
    return name


def inputs(R: int, experts: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.rand(R, generator=gen), 1 + 0.5 * torch.randn(experts, R, generator=gen)


def truth(S: Tensor, Z: Tensor, alpha: Tensor) -> Tensor:
    """Dense, in fp64; alpha (B, K) or already one per column, (B, R, K)."""
    deviation = Z.double() - 1
    if alpha.dim() == 2:
        return S.double() * (1 + alpha.double() @ deviation)
    return S.double() * (1 + torch.einsum("brk,kr->br", alpha.double(), deviation))


def plain(S: Tensor, Z: Tensor, alpha: Tensor) -> Tensor:
    """What a torch user would write, one operation at a time, in the same order."""
    total = torch.ones(alpha.shape[0], S.shape[0])
    for k in range(Z.shape[0]):
        a = alpha[..., k] if alpha.dim() == 3 else alpha[:, k : k + 1]
        total = total + a * (Z[k] - 1)
    return S * total


def arena(rows: int, R: int) -> Tensor:
    return torch.full((rows, R), NAN)


@pytest.mark.parametrize("R", SIZES)
def test_dense(backend: str, R: int) -> None:
    S, Z = inputs(R)
    alpha = torch.randn(3, 5)
    out = arena(4, R)
    mix_rows(out, S, Z, alpha)
    assert relative_error(out[:3], truth(S, Z, alpha)) < 1e-6
    assert torch.equal(out[:3], plain(S, Z, alpha))
    assert out[3].isnan().all()


@pytest.mark.parametrize("R", SIZES)
def test_sparse_into_named_rows(backend: str, R: int) -> None:
    S, Z = inputs(R, 6)
    indices = torch.tensor([[4, 1, -1], [5, 5, 5], [0, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 2.0, 7.0], [1.0, 1.0, 1.0], [0.25, NAN, 3.0], [1.0, 2.0, 3.0]])
    rows = torch.tensor([6, -1, 0, 3], dtype=torch.int32)
    out = arena(8, R)
    mix_rows(out, S, Z, weights, indices=indices, rows=rows)
    dense = torch.zeros(3, 6)
    dense[0, 1], dense[0, 4], dense[1, 0] = 2.0, 0.5, 0.25
    assert relative_error(out[[6, 0, 3]], truth(S, Z, dense)) < 1e-6
    assert torch.equal(out[3], S)
    assert out[[1, 2, 4, 5, 7]].isnan().all()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("sizes", [[1030, 1, 1070], [3, 0, 2, 700], [5], [2048, 4, 2048, 4]])
def test_weights_per_layer(backend: str, sizes: list[int], sparse: bool) -> None:
    R, L = sum(sizes), len(sizes)
    S, Z = inputs(R, 4)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    alpha = torch.randn(2, L, 4)
    alpha[0, 0, 1] = 0.0
    full = alpha.repeat_interleave(torch.tensor(sizes), 1)
    extra: dict[str, Any] = {"offsets": offsets, "longest": max(sizes)}
    out = arena(2, R)
    if sparse:
        extra["indices"] = torch.tensor([[3, 1, 2, 0]] * 2, dtype=torch.int32)
        alpha = alpha[..., [3, 1, 2, 0]]
    mix_rows(out, S, Z, alpha, **extra)
    assert relative_error(out, truth(S, Z, full)) < 1e-6
    if not sparse:
        assert torch.equal(out, plain(S, Z, full))


@pytest.mark.parametrize("R", [63, 512, 2052])
def test_bf16_holds_the_deviation(backend: str, R: int) -> None:
    """Within 2⁻⁸ of σ Σ |α| |z − 1|, column by column; a bf16 z would be ten times as far off."""
    S, Z = inputs(R)
    Z = 1 + 0.02 * (Z - 1)
    alpha = torch.randn(3, 5)
    out = arena(3, R)
    stored = (Z - 1).to(torch.bfloat16)
    mix_rows(out, S, stored, alpha)
    exact = truth(S, Z, alpha)
    bound = S.double() * (alpha.abs().double() @ (Z - 1).abs().double()) / 256
    assert ((out - exact).abs() <= bound + 1e-6).all()
    assert relative_error(out, truth(S, 1 + stored.double(), alpha)) < 1e-6
    coarse = truth(S, Z.to(torch.bfloat16), alpha)
    assert (coarse - exact).norm() > 10 * (out - exact).norm()


def test_weight_zero_reads_no_expert(backend: str) -> None:
    S, _ = inputs(100)
    out = arena(1, 100)
    mix_rows(out, S, torch.full((2, 100), NAN), torch.zeros(1, 2))
    assert torch.equal(out[0], S)


def test_a_bit_of_a_row_depends_on_no_other_row(backend: str) -> None:
    S, Z = inputs(1100)
    alpha = torch.randn(6, 5)
    whole, alone = arena(6, 1100), arena(6, 1100)
    mix_rows(whole, S, Z, alpha)
    for i in range(6):
        mix_rows(alone, S, Z, alpha[i : i + 1], rows=torch.tensor([i], dtype=torch.int32))
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("foreign", [5, -2, 2**31 - 1, -(2**31)])
def test_a_foreign_index_gives_nan_and_leaves_the_others(backend: str, foreign: int) -> None:
    S, Z = inputs(700)
    weights = torch.ones(3, 2)
    good = torch.tensor([[0, 1], [2, 3], [4, -1]], dtype=torch.int32)
    bad = good.clone()
    bad[1, 1] = foreign
    expected, out = arena(3, 700), torch.zeros(3, 700)
    mix_rows(expected, S, Z, weights, indices=good)
    mix_rows(out, S, Z, weights, indices=bad)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("foreign", [4, -2, 2**31 - 1])
def test_a_foreign_row_is_never_written(backend: str, foreign: int) -> None:
    S, Z = inputs(700)
    memory = torch.full((9, 700), 7.0)
    rows = torch.tensor([1, foreign], dtype=torch.int32)
    arguments = (memory[2:6], S, Z, torch.ones(2, 5))
    if backend in ("native", "torch"):
        with pytest.raises(ValueError, match="rows must lie in"):
            mix_rows(*arguments, rows=rows)
        assert (memory == 7).all()
    else:
        mix_rows(*arguments, rows=rows)
        assert (memory[[0, 1, 2, 4, 5, 6, 7, 8]] == 7).all()


def test_strided_table_and_arena(backend: str) -> None:
    S, Z = inputs(130)
    alpha = torch.randn(2, 5)
    wide, room = torch.full((5, 300), NAN), torch.full((4, 333), 7.0)
    wide[:, 100:230] = Z
    mix_rows(room[::2, 3:133], S, wide[:, 100:230], alpha)
    assert torch.equal(room[::2, 3:133], plain(S, Z, alpha))
    assert (room[1::2] == 7).all()
    assert (room[:, 133:] == 7).all()
    assert (room[:, :3] == 7).all()


def test_offsets_beyond_32_bits(backend: str) -> None:
    """Rows a gigabyte apart in an arena that is never touched elsewhere: 4 rows span 2³² bytes."""
    if backend == "triton":
        pytest.skip("the interpreter copies the whole arena")
    S, Z = inputs(8)
    stride = (1 << 28) + (1 << 20)
    memory = torch.empty(5 * stride, dtype=torch.float32)  # pages that nobody writes do not exist
    table, out = memory[: 5 * stride].view(5, stride)[:, 8:16], memory.view(5, stride)[:, 16:24]
    table.copy_(Z)
    rows = torch.tensor([4], dtype=torch.int32)
    mix_rows(out, S, table, torch.ones(1, 5), rows=rows)
    assert torch.equal(out[4:], plain(S, Z, torch.ones(1, 5)))


def test_nothing_to_do(backend: str) -> None:
    mix_rows(arena(0, 8), torch.rand(8), torch.rand(2, 8), torch.rand(0, 2))
    mix_rows(arena(2, 0), torch.rand(0), torch.rand(2, 0), torch.rand(2, 2))
    out = arena(2, 8)
    mix_rows(out, torch.full((8,), 3.0), torch.rand(0, 8), torch.rand(2, 0))
    assert (out == 3).all()


def test_threads_change_no_bit() -> None:
    if native._MISSING is not None or INTERPRETED:
        pytest.skip("the native module")
    S, Z = inputs(70_001)
    alpha = torch.randn(4, 5)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = arena(4, 70_001)
        mix_rows(out, S, Z, alpha)
        results.append(out)
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_reads_nothing_behind_the_end(emulated: Any, dtype: torch.dtype) -> None:
    S, Z = inputs(517, 3)
    moved = [S, Z.to(dtype), torch.randn(2, 3), torch.tensor([[2, 0, -1]] * 2, dtype=torch.int32)]
    edges = [emulated.edge(t) for t in moved]
    s, z, alpha, indices = (edge[0] for edge in edges)
    out, _memory = emulated.edge(arena(2, 517))
    expected = arena(2, 517)
    addresses = mixing._addresses(mixing.Mixing(out, s, z, alpha, indices, None, None, None))
    emulated.mix(*addresses, 0, 0)
    mixing._torch_mix(mixing.Mixing(expected, *moved, None, None, None))
    assert torch.equal(out, expected)


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({4: 2}, "z_dtype must be"),
        ({14: 9}, "without indices K"),
        ({12: 1}, "a row of out for each"),
        ({0: 0}, "must be given"),
        ({9: 0}, "sizes must not be negative"),
    ],
)
def test_wrong_codes_are_errors(emulated: Any, change: dict[int, int], words: str) -> None:
    arguments = [8, 8, 1, 2, 0, 8, 0, 0, 0, 1, 8, 1, 4, 4, 2, 1]  # S ... R; addresses 8
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=words):
        emulated.mix(*arguments, 0, 0)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"S": torch.rand(3, 3)}, ValueError, "S must be contiguous fp32"),
    ({"S": torch.rand(8).double()}, ValueError, "S must be contiguous fp32"),
    ({"Z": torch.rand(2, 7)}, ValueError, "Z must be"),
    ({"Z": torch.rand(2, 8).half()}, TypeError, "Z must be one of"),
    ({"out": torch.rand(2, 8).half()}, TypeError, "out must be one of"),
    ({"out": torch.rand(8, 2).t()}, ValueError, "contiguous rows"),
    ({"out": torch.rand(1, 8)}, ValueError, "1 rows for 2"),
    ({"alpha": torch.rand(2)}, ValueError, "alpha must be"),
    ({"alpha": torch.rand(2, 2).double()}, TypeError, "alpha must be float32"),
    ({"alpha": torch.rand(2, 3)}, ValueError, "3 columns for 2"),
    ({"indices": torch.zeros(2, 2)}, ValueError, "indices must be int32"),
    ({"offsets": torch.tensor([0, 8])}, ValueError, "go together"),
    ({"rows": torch.zeros(1, dtype=torch.int32)}, ValueError, "rows must be int32"),
    (
        {"offsets": torch.tensor([0]), "longest": 8, "alpha": torch.rand(2, 1, 2)},
        ValueError,
        "offsets must be int64",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD, ids=lambda v: v if v is str else None)
def test_bad_input(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"out": torch.rand(2, 8), "S": torch.rand(8), "Z": torch.rand(2, 8)}
    with pytest.raises(error, match=words):
        mix_rows(**{**given, "alpha": torch.rand(2, 2), **change})


def test_native_refuses_offsets_that_do_not_rise() -> None:
    if native._MISSING is not None or INTERPRETED:
        pytest.skip("the native module")
    S, Z = inputs(8, 2)
    for bad in ([0, 9, 8], [1, 4, 8], [0, 4, 7]):
        with pytest.raises(ValueError, match="offsets must rise"):
            mix_rows(arena(1, 8), S, Z, torch.ones(1, 2, 2), offsets=torch.tensor(bad), longest=8)


def test_a_backend_asked_for_by_name_mixes_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    S, Z = inputs(8, 2)
    call: Callable[[], None] = lambda: mix_rows(arena(1, 8), S, Z, torch.ones(1, 2))  # noqa: E731
    monkeypatch.setattr(cuda, "_missing", "no CUDA kernels here")
    with dispatch.backend("cuda"), pytest.raises(RuntimeError, match="no CUDA kernels here"):
        call()
    monkeypatch.setattr(cuda, "_missing", None)
    with dispatch.backend("cuda"), pytest.raises(RuntimeError, match="the arena is on cpu"):
        call()
    with dispatch.backend("reference"):
        call()
    monkeypatch.setattr(native, "_MISSING", "not built")
    call()  # torch
    with dispatch.backend("native"), pytest.raises(RuntimeError, match="not built"):
        call()
