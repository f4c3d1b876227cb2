"""The CUDA kernels' own source as a library for the CPU, by tests/cuda_emulation."""

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
from typing import Any

import pytest
import torch
from torch import Tensor

from t2kernels import testing
from t2kernels.ops import cuda, cuda_forms, reference
from t2kernels.ops.layout import unfit, unfit_group
from t2kernels.testing import Group, Inputs

ROOT = Path(__file__).resolve().parents[2]
KERNELS, EMULATION = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda_emulation"
COMPILER = shutil.which("g++")
ERROR_BYTES = 500
# Multiprocessors, shared memory of a block and of a multiprocessor, compute capability.
MACHINES = {
    "sm_90": (3, 232448, 233472, 90),
    "sm_80": (2, 166912, 167936, 80),
    "sm_89": (4, 101376, 102400, 89),
}


def compile_object(source: Path, target: Path, headers: Path = KERNELS) -> Path:
    """One object file; ``headers`` may be a changed copy of csrc/cuda."""
    # What the host code keeps for a kernel must not be shared by several libraries of one process.
    flags = ["-std=c++17", "-fPIC", "-fno-gnu-unique", "-ffp-contract=off"]
    flags += ["-DT2_CUDA_EMULATION"]
    flags += [f"-I{EMULATION}", f"-I{headers}", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command = [str(COMPILER), *flags, "-O1", "-x", "c++", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for the emulation:\n{done.stderr}")
    return target


class Emulation:
    """What the tests do with the library: settings, calls as the CUDA backend makes them."""

    def __init__(self, objects: list[Path], folder: Path) -> None:
        self.device = 0
        self.objects, path = objects, folder / "libemulated.so"
        subprocess.run([str(COMPILER), "-shared", *map(str, objects), "-o", str(path)], check=True)
        self.library = ctypes.CDLL(str(path))
        self.library.emulated_svf_decode.argtypes = [ctypes.c_int64] * 25 + [
            ctypes.c_char_p, ctypes.c_int64,
        ]  # fmt: skip
        self.library.emulated_mix.argtypes = [ctypes.c_int64] * 18 + [
            ctypes.c_char_p, ctypes.c_int64,
        ]  # fmt: skip
        self.library.emulated_svf_group.argtypes = [ctypes.c_int64] * 19 + [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64,
        ]  # fmt: skip

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of entry.cpp; its error is raised."""
        text = ctypes.create_string_buffer(ERROR_BYTES)
        if getattr(self.library, name)(*arguments, text, ctypes.c_int64(ERROR_BYTES)):
            raise RuntimeError(text.value.decode())

    def decode(self, *arguments: int) -> None:
        """What the native module has as cuda_svf_decode."""
        self.call("emulated_svf_decode", *arguments)

    def mix(self, *arguments: int) -> None:
        """What the native module has as cuda_mix."""
        self.call("emulated_mix", *arguments)

    def group(self, *arguments: Any) -> None:
        """What the native module has as cuda_svf_group: lists in five places."""
        lists = [list(a) for a in arguments if isinstance(a, list)]
        numbers = [a for a in arguments if not isinstance(a, list)]
        flat = [number for entries in lists for number in entries]
        lengths = (ctypes.c_int64 * len(lists))(*map(len, lists))
        self.call("emulated_svf_group", *numbers, (ctypes.c_int64 * len(flat))(*flat), lengths)

    def with_fault(self, header: str, right: str, wrong: str, unit: str, folder: Path) -> Emulation:
        """The same, with ``wrong`` for ``right`` in a header that the unit ``unit`` is made of."""
        changed = folder / "cuda"
        shutil.copytree(KERNELS, changed)
        text = (changed / header).read_text()
        assert text.count(right) == 1, "the source has changed: say the fault anew"
        (changed / header).write_text(text.replace(right, wrong))
        # First in line, so that the linker takes its copies of shared inline functions.
        first = compile_object(changed / unit, folder / f"{unit}.o", changed)
        rest = [path for path in self.objects if path.stem != unit]
        return Emulation([first, *rest], folder)

    def settings(self, order: int = 0, late: bool = False, machine: str = "sm_90") -> None:
        """Order of the threads, when copies land, what machine it is."""
        self.library.emulator_set_order(order)
        self.library.emulator_set_late_copies(int(late))
        self.library.emulator_set_last_blocks(0)
        self.device = self.library.emulator_set_machine(*MACHINES[machine])

    def questions(self) -> int:
        """How often the host code asked about devices and kernels since the last call of this."""
        return int(self.library.emulator_take_questions())

    def launches(self) -> tuple[int, int, int]:
        """Plain, programmatic and cooperative launches since the last call of this."""
        return tuple(self.library.emulator_take_launches(kind) for kind in range(3))  # type: ignore[return-value]

    def run(
        self, inputs: Inputs, *, form: str = "fma", tile: str = "auto", save_h: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """One call of the backend, outputs and workspaces poisoned."""
        assert unfit(*inputs.args(), kinds=cuda.KINDS) is None
        assert cuda._too_many(inputs.x.shape[0]) is None
        with testing.poisoned_empty(), cuda_forms.form(form, tile):
            return cuda.forward(*inputs.args(), save_h=save_h)

    def check(self, inputs: Inputs, *, form: str = "fma", tile: str = "auto") -> None:
        """y and h against the fp64 truth."""
        y, h = self.run(inputs, form=form, tile=tile, save_h=True)
        wide = inputs.double()
        truth, h_truth = reference.forward(*wide.args(), save_h=True)
        testing.assert_accurate(y, truth, testing.plain_forward(inputs), "y")
        plain_h = inputs.x @ inputs.V.to(inputs.x.dtype)
        testing.assert_accurate(h, h_truth, plain_h, "h")

    def run_group(self, group: Group, *, form: str = "fma", tile: str = "auto") -> list[Tensor]:
        """One call for layers that share x, outputs and workspaces poisoned."""
        assert unfit_group(*group.args(), kinds=cuda.KINDS) is None
        with testing.poisoned_empty(), cuda_forms.form(form, tile):
            assert cuda_forms.refused(group.x, group.Us, group.V) is None
            return cuda.forward_group(*group.args())

    def at_the_edge(self, inputs: Inputs) -> tuple[Inputs, list[mmap.mmap]]:
        """Copies whose last bytes are followed by a forbidden page; keep the second alive."""
        moved, keep = {}, []
        for field in fields(inputs):
            tensor = getattr(inputs, field.name)
            if tensor is None:
                continue
            copy, memory = self.edge(tensor.t() if field.name == "V" else tensor)
            moved[field.name] = copy.t() if field.name == "V" else copy
            keep.append(memory)
        return replace(inputs, **moved), keep

    @staticmethod
    def edge(tensor: Tensor) -> tuple[Tensor, mmap.mmap]:
        """A copy that ends at a forbidden page; it lives as long as the second."""
        size = max(tensor.numel() * tensor.element_size(), 1)
        room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, room + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        copy = torch.frombuffer(
            memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size
        )
        return copy.view(tensor.shape).copy_(tensor), memory


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The library, compiled once."""
    if COMPILER is None:
        pytest.skip("g++ is needed for the emulation")
    folder = tmp_path_factory.mktemp("cuda_emulation")
    sources = sorted([*KERNELS.glob("*.cu"), *EMULATION.glob("*.cpp")])
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda s: compile_object(s, folder / f"{s.name}.o"), sources))
    return Emulation(objects, folder)


@pytest.fixture
def in_place_of_native(monkeypatch: pytest.MonkeyPatch) -> object:
    """Puts an emulation behind ops/cuda.py."""

    def install(emulation: Emulation) -> Emulation:
        native = SimpleNamespace(
            cuda_svf_decode=emulation.decode,
            cuda_svf_group=emulation.group,
            cuda_mix=emulation.mix,
        )
        monkeypatch.setattr(cuda, "_native", native)
        monkeypatch.setattr(cuda, "_stream", lambda x: 0)
        monkeypatch.setattr(cuda, "_index", lambda x: emulation.device)
        monkeypatch.setattr(cuda, "_capturing", lambda: False)
        monkeypatch.setattr(cuda_forms, "barriers", cuda_forms.Barriers())
        emulation.settings()
        emulation.launches()
        return emulation

    return install


@pytest.fixture
def emulated(emulation: Emulation, in_place_of_native) -> Iterator[Emulation]:
    """ops/cuda.py with the emulation in the place of the native module."""
    yield in_place_of_native(emulation)
    emulation.settings()
