"""The CUDA kernels' own source, run on the CPU by tests/cuda_emulation, against the fp64 truth.

Proves indices, tails, masks, the order of sums and the barriers; proves nothing about speed or
about what only a GPU does. tests/gpu/test_cuda.py is the same on the real thing.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from t2kernels import testing
from t2kernels.ops import cuda, reference
from t2kernels.ops.layout import unfit
from t2kernels.testing import Inputs

ROOT = Path(__file__).resolve().parents[2]
KERNELS, EMULATION = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda_emulation"
COMPILER = shutil.which("g++")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ERROR_BYTES = 500

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is needed for the emulation")


def compile_library(folder: Path) -> Path:
    flags = ["-std=c++17", "-fPIC", "-ffp-contract=off", f"-I{EMULATION}", f"-I{KERNELS}"]
    flags += ["-Wall", "-Werror", "-Wno-unknown-pragmas"]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.name}.o"
        command = [str(COMPILER), *flags, "-O1", "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for the emulation:\n{done.stderr}")
        return str(target)

    sources = sorted([*KERNELS.glob("*.cu"), *EMULATION.glob("*.cpp")])
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "libemulated.so"
    subprocess.run([str(COMPILER), "-shared", *objects, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(compile_library(tmp_path_factory.mktemp("cuda_emulation"))))
    loaded.emulated_svf_decode.argtypes = [ctypes.c_int64] * 22 + [ctypes.c_char_p, ctypes.c_int64]
    return loaded


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """ops/cuda.py with the emulation in the place of the native module."""

    def decode(*arguments: int) -> None:
        text = ctypes.create_string_buffer(ERROR_BYTES)
        if library.emulated_svf_decode(*arguments, text, ERROR_BYTES):
            raise RuntimeError(text.value.decode())

    monkeypatch.setattr(cuda, "_native", SimpleNamespace(cuda_svf_decode=decode))
    monkeypatch.setattr(cuda, "_stream", lambda x: 0)
    monkeypatch.setattr(cuda, "_index", lambda x: 0)
    library.emulator_set_order(0)
    yield library
    library.emulator_set_order(0)


def run(inputs: Inputs, *, save_h: bool = False) -> tuple[Tensor, Tensor | None]:
    assert unfit(*inputs.args()) is None
    assert cuda._too_many(inputs.x.shape[0]) is None
    with testing.poisoned_empty():
        return cuda.forward(*inputs.args(), save_h=save_h)


def check(inputs: Inputs) -> None:
    y, h = run(inputs, save_h=True)
    wide = inputs.double()
    truth, h_truth = reference.forward(*wide.args(), save_h=True)
    testing.assert_accurate(y, truth, testing.plain_forward(inputs), "y")
    plain_h = inputs.x @ inputs.V.to(inputs.x.dtype)
    testing.assert_accurate(h, h_truth, plain_h, "h")


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


@pytest.mark.parametrize("int8", [False, True], ids=["same", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_diagonal(emulated: ctypes.CDLL, shape, dtype, int8: bool) -> None:
    T, n, m, r = shape
    check(testing.make_inputs(T, n, m, r, dtype=dtype, int8=int8, seed=T + n))


@pytest.mark.parametrize("int8", [False, True], ids=["same", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [1, 5, 17])
def test_diagonal_per_slot(emulated: ctypes.CDLL, slots: int, dtype, int8: bool) -> None:
    inputs = testing.make_inputs(17, 63, 17, 64, slots=slots, dtype=dtype, int8=int8, bias=False)
    assert inputs.slot is not None and int(inputs.slot.min()) == -1
    check(inputs)


@pytest.mark.parametrize("n", [63, 64])
def test_strided_x_and_d(emulated: ctypes.CDLL, n: int) -> None:
    inputs = testing.make_inputs(5, n, 24, 16, slots=3)
    x = torch.full((5, 3 * n), float("nan"))
    D = torch.full((3, 40), float("nan"))
    x[:, n : 2 * n], D[:, 3:19] = inputs.x, inputs.d
    check(replace(inputs, x=x[:, n : 2 * n], d=D[:, 3:19]))


def test_no_tokens(emulated: ctypes.CDLL) -> None:
    y, h = run(testing.make_inputs(0, 17, 63, 17), save_h=True)
    assert y.shape == (0, 63) and h is not None and h.shape == (0, 17)


def test_a_foreign_slot_gives_nan_and_leaves_the_others(emulated: ctypes.CDLL) -> None:
    inputs = testing.make_inputs(3, 16, 16, 16, slots=2)
    good, _ = run(replace(inputs, slot=torch.tensor([1, 0, -1], dtype=torch.int32)))
    y, _ = run(replace(inputs, slot=torch.tensor([1, 2, -1], dtype=torch.int32)))
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_depend_on_the_row_alone(emulated: ctypes.CDLL, dtype) -> None:
    inputs = testing.make_inputs(17, 136, 24, 72, slots=3, dtype=dtype)
    assert inputs.slot is not None
    whole, _ = run(inputs)
    for tokens in ([0], [16], [5, 3, 4], list(range(9)), list(range(16, -1, -1))):
        part, _ = run(replace(inputs, x=inputs.x[tokens], slot=inputs.slot[tokens]))
        assert torch.equal(part, whole[tokens]), tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_does_not_change_bits(emulated: ctypes.CDLL, dtype) -> None:
    """An odd row stride sends x down the path of single loads."""
    inputs = testing.make_inputs(6, 136, 24, 72, dtype=dtype)
    odd = torch.zeros(6, 141, dtype=dtype)[:, 1:137].copy_(inputs.x)
    assert torch.equal(run(replace(inputs, x=odd))[0], run(inputs)[0])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_threads_does_not_change_bits(emulated: ctypes.CDLL, order: int) -> None:
    """A missing barrier would show here."""
    inputs = testing.make_inputs(9, 136, 24, 72, slots=3)
    expected, _ = run(inputs)
    emulated.emulator_set_order(order)
    assert torch.equal(run(inputs)[0], expected)


def at_the_edge(tensor: Tensor) -> tuple[Tensor, mmap.mmap]:
    """A copy whose last byte is the last one of a page that is followed by a forbidden page."""
    size = max(tensor.numel() * tensor.element_size(), 1)
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return copy.view(tensor.shape).copy_(tensor), memory


@pytest.mark.parametrize("shape", [(1, 17, 63, 17), (9, 63, 7, 65), (5, 64, 9, 32)], ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["same", "int8"])
def test_reads_nothing_behind_the_end(emulated: ctypes.CDLL, shape, int8: bool) -> None:
    """Every operand ends at a forbidden page: a read past it would kill this process."""
    T, n, m, r = shape
    inputs = testing.make_inputs(T, n, m, r, slots=2, dtype=torch.bfloat16, int8=int8)
    moved, keep = {}, []
    for field in fields(inputs):
        tensor = getattr(inputs, field.name)
        if tensor is None:
            continue
        copy, memory = at_the_edge(tensor.t() if field.name == "V" else tensor)
        moved[field.name] = copy.t() if field.name == "V" else copy
        keep.append(memory)
    assert torch.equal(run(replace(inputs, **moved))[0], run(inputs)[0])


def test_wrong_codes_are_errors(emulated: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match="x_dtype must be fp32"):
        cuda._native.cuda_svf_decode(*([8] * 14), 1, 1, 1, 1, 3, 3, 0, 0)
    with pytest.raises(RuntimeError, match="w_dtype equal to x_dtype"):
        cuda._native.cuda_svf_decode(*([8] * 14), 1, 1, 1, 1, 0, 1, 0, 0)
    with pytest.raises(RuntimeError, match="n, r, m > 0"):
        cuda._native.cuda_svf_decode(*([8] * 14), 1, 0, 1, 1, 0, 0, 0, 0)
