"""The CUDA kernels compile for sm_80 and sm_90a without spills and within the machine's limits, one
file of them also for plain sm_90, where T2_CUDA_ARCHS may ask for it.

Needs nvcc, no GPU. The compiler's own report (-Xptxas -v) is the witness, for the tensor-core
kernel also its machine code (cuobjdump, from the toolkit or from Triton); registers and shared
memory of every kernel are printed (pytest -s).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHS = ["80", "90a"]
ALSO_PLAIN_90 = "decode_mma_bf16"  # the one that asks whether the architecture is 90 or later

# A block may have 65,536 registers on both; 48 KiB is what needs no opt-in at launch.
REGISTERS_PER_SM, MAX_REGISTERS, STATIC_SHARED_BYTES = 65536, 255, 48 * 1024

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


# Instructions of one kernel's machine code that a tensor-core kernel must and must not have.
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]+)")
WANTED = ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "LDGDEPBAR", "DEPBAR"]
WANTED_ON_90 = ["PREEXIT", "ACQBULK"]  # let the next kernel start; wait for the one before
LOCAL_MEMORY = ("LDL", "STL")


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    beside = Path(NVCC).resolve().parent if NVCC else None
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=beside)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        found = shutil.which("cuobjdump", path=folder)
    return found


class Kernel(NamedTuple):
    source: str
    name: str
    arch: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def archs(stem: str) -> list[str]:
    """What a source is compiled for."""
    return [*ARCHS, "90"] if stem == ALSO_PLAIN_90 else ARCHS


def parse(source: str, text: str) -> list[Kernel]:
    kernels = []
    for found in REPORT.finditer(text):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        spill = int(found["stores"]) + int(found["loads"])
        kernels.append(
            Kernel(
                source,
                found["name"],
                found["arch"],
                int(found["registers"]),
                int(shared[1]) if shared else 0,
                int(found["stack"]),
                spill,
            )
        )
    return kernels


def compile_one(source: Path, folder: Path) -> list[Kernel]:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs(source.stem)]
    output = str(folder / f"{source.stem}.o")
    command = [str(NVCC), "-std=c++17", "-O3", *targets, "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings"]
    command += ["-c", str(source), "-o", output]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc refuses {source.name}:\n{done.stdout}{done.stderr}")
    return parse(source.name, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvcc")


@pytest.fixture(scope="module")
def kernels(folder: Path) -> list[Kernel]:
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda s: compile_one(s, folder), sorted(KERNELS.glob("*.cu")))
        found = [kernel for report in reports for kernel in report]
    print(f"\n{len(found)} kernels")
    for source, arch in sorted({(k.source, k.arch) for k in found}):
        group = [k for k in found if (k.source, k.arch) == (source, arch)]
        registers = [k.registers for k in group]
        print(
            f"  {source:16} sm_{arch:4} {len(group):3} kernels, {min(registers)} to "
            f"{max(registers)} registers, {max(k.shared_bytes for k in group)} bytes shared"
        )
    return found


def test_every_dtype_has_its_kernels(kernels: list[Kernel]) -> None:
    # x same as factors in three dtypes, int8 and fp8 under each; two products; tiles of 1, 4 and 8
    # tokens by vector and one for any alignment. On tensor cores four kinds in seven tiles.
    plain = [k for k in kernels if k.source.startswith("decode_") and "_mma" not in k.source]
    assert len(plain) == 9 * 2 * 4 * len(ARCHS)
    tensor_core = [k for k in kernels if "decode_mma" in k.name]
    assert len(tensor_core) == 4 * 7 * len(ARCHS) + 7
    assert {k.source for k in tensor_core if k.arch == "90"} == {f"{ALSO_PLAIN_90}.cu"}
    # Mixing: z in fp32 or bf16, by vector or not, weights per request or per layer.
    assert len([k for k in kernels if "mix_kernel" in k.name]) == 2 * 2 * 2 * len(ARCHS)


def test_nothing_spills(kernels: list[Kernel]) -> None:
    spilled = [k for k in kernels if k.spill_bytes or k.stack_bytes]
    assert not spilled, spilled


def test_limits(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.registers <= MAX_REGISTERS, kernel
        # __launch_bounds__(128, 2): two blocks of 128 threads fit one multiprocessor.
        assert 2 * 128 * kernel.registers <= REGISTERS_PER_SM, kernel
        assert kernel.shared_bytes <= STATIC_SHARED_BYTES, kernel


@pytest.mark.parametrize("source", ["decode_fp32.cu", "decode_bf16.cu", "decode_fp16.cu"])
def test_loads_are_16_bytes_wide(source: str, tmp_path: Path) -> None:
    """In PTX: the aligned kernels load vectors of four 32-bit words."""
    output = tmp_path / "kernel.ptx"
    command = [str(NVCC), "-std=c++17", "-O3", "-arch=compute_80", "-ptx"]
    subprocess.run([*command, str(KERNELS / source), "-o", str(output)], check=True)
    entries = output.read_text().split(".entry ")[1:]
    wide = [entry for entry in entries if re.search(r"ld\.global(\.nc)?\.v4\.", entry)]
    assert len(wide) == 6, "two products, tiles of 1, 4 and 8 tokens"
    assert not any(re.search(r"\batom\.|\bred\.", entry) for entry in entries), "no atomics"


def machine_code(folder: Path, name: str) -> list[tuple[str, str, list[str]]]:
    """(architecture, function, names of its instructions) of one object file."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is neither in the CUDA toolkit nor in Triton")
    command = [tool, "-sass", str(folder / f"{name}.o")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    by_arch = re.split(r"arch = sm_(\w+)", text)[1:]
    return [
        (arch, function.split()[0], INSTRUCTION.findall(function))
        for arch, part in zip(by_arch[::2], by_arch[1::2])
        for function in part.split("Function : ")[1:]
    ]


def test_mixing_rounds_every_step_and_moves_16_bytes(kernels: list[Kernel], folder: Path) -> None:
    """No fused multiply-add, whose bits would not be torch's; no atomics, no local memory."""
    functions = machine_code(folder, "mix")
    assert sorted(arch for arch, _, _ in functions) == sorted(ARCHS * 8)
    for _, function, names in functions:
        assert any(name.startswith("FMUL") for name in names)
        assert not any(name.startswith(("FFMA", "ATOM", "RED", *LOCAL_MEMORY)) for name in names)
        vector = "mix_kernelILb1E" in function
        assert vector == any(name.startswith("STG.E.128") for name in names), function
        assert vector == any(name.startswith("LDG.E.128") for name in names), function


@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8", "fp8"])
def test_tensor_cores_and_asynchronous_copies(
    kernels: list[Kernel], folder: Path, kind: str
) -> None:
    """In the machine code; no local memory; atomics only for the two counters of the barrier."""
    name = f"decode_mma_{kind}"
    functions = machine_code(folder, name)
    assert sorted(arch for arch, _, _ in functions) == sorted(archs(name) * 7)
    for arch, _, names in functions:
        for wanted in WANTED + (WANTED_ON_90 if arch.startswith("90") else []):
            assert any(name.startswith(wanted) for name in names), (arch, wanted)
        assert not any(name.startswith(LOCAL_MEMORY) for name in names)
        atomics = [name for name in names if name.startswith(("ATOM", "RED"))]
        assert len(atomics) == 2 and not any(".F" in name for name in atomics), atomics
