"""Compile the Triton kernels for a GPU that is not here, and read the facts off the code.

Run as a program it prints one line per kernel: ``python tests/ops/triton_aot.py [90 80]``. Used
by ``test_triton_compile.py``, which asserts on the same facts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Shared memory one block may use, in bytes (CUDA C programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 90: 232448}
POINTER = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "int8": "*i8"}
# Arguments that any real layer passes as multiples of 16.
ALIGNED = {"stride_x", "stride_g", "stride_d", "IN", "INNER", "OUT", "R", "COLS",
           "stride_b_inner", "stride_b_out", "stride_partial", "stride_out", "stride_z",
           "stride_grad"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kernel as it ships: which arguments are present, which tile, which dtypes."""

    kernel: str  # project | expand | expand_t | gradient | finalise | mix | mix_gradient
    dtype: str = "bf16"
    tile: str = "LARGE"
    arch: int = 90
    slots: bool = False
    int8: bool = False

    @property
    def name(self) -> str:
        marks = ["slots"] * self.slots + ["int8"] * self.int8
        return "-".join([self.kernel, self.dtype, self.tile, f"sm_{self.arch}", *marks])


@dataclass(frozen=True)
class Facts:
    """What the compiler made of a case."""

    shared: int  # bytes
    registers: int  # per thread
    stack: int  # bytes per thread: spills
    local: int
    wgmma: int  # instructions in the PTX
    mma_sync: int
    cp_async: int


def _arguments(case: Case) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """(kernel, type per argument, constants, launch options) of a case."""
    import triton.language as tl

    from t2kernels.ops.triton import _backward, _forward, _mix
    from t2kernels.ops.triton.common import config

    x, w = POINTER[case.dtype], POINTER["int8" if case.int8 else case.dtype]
    tile = getattr(config, case.tile, None)
    scale = "*fp32" if case.int8 else None
    slot = "*i32" if case.slots else None
    diagonal = {"d_ptr": "*fp32", "base_ptr": "*fp32", "slot_ptr": slot, "scale_ptr": scale}
    if not case.slots:
        diagonal["stride_d"] = 0  # type: ignore[assignment]
    types: dict[str, Any]
    constants: dict[str, Any]
    if case.kernel in ("finalise", "mix", "mix_gradient"):
        floats = ("partial_ptr", "out_ptr", "s_ptr", "z_ptr", "alpha_ptr", "grad_ptr")
        types = {name: "*fp32" for name in floats}
        types["slot_ptr"] = slot
        types["scale_ptr"] = "*fp32"
        for name in ("index_ptr", "row_ptr"):
            types[name] = slot
        types["offsets_ptr"] = "*i64" if case.slots else None
        constants = {
            "BLOCK_ROWS": _backward.REDUCE_ROWS,
            "BLOCK_COLS": _backward.REDUCE_COLS,
            "BLOCK": _mix.MIX_COLS,
        }
        kernel = {
            "finalise": _backward.finalise_kernel,
            "mix": _mix.mix_kernel,
            "mix_gradient": _mix.mix_gradient_kernel,
        }[case.kernel]
        launch = {"num_warps": 4, **config.FUSION}
    else:
        assert tile is not None
        constants = {
            "ACC": tl.float32,
            "BLOCK_T": tile.tokens,
            "BLOCK_OUT": tile.outputs,
            "BLOCK_INNER": tile.inner,
            "CHUNK": tile.chunk,
            "EVEN_INNER": True,
            "WEIGHTS_FIRST": tile.weights_first,
            "GROUP": config.GROUP,
            "UPCAST": False,
        }
        launch = config.options(tile)
        if case.kernel == "project":
            kernel = _forward.project_kernel
            types = {"x_ptr": x, "vh_ptr": w, "h_ptr": x, "hd_ptr": x, **diagonal}
        elif case.kernel in ("expand", "expand_t"):
            kernel = _forward.expand_kernel
            unit = "stride_b_inner" if case.kernel == "expand" else "stride_b_out"
            types = {"a_ptr": x, "b_ptr": w, "bias_ptr": x, "y_ptr": x, unit: 1}
            if case.kernel == "expand_t":
                types["bias_ptr"] = None
        else:
            kernel = _backward.gradient_kernel
            types = {"g_ptr": x, "u_ptr": w, "h_ptr": x, "gud_ptr": x, **diagonal}
            types["product_ptr"] = "*fp32" if case.slots else None
            types["partial_ptr"] = None if case.slots else "*fp32"
    names = kernel.arg_names
    signature, values = {}, {}
    for name in names:
        kind = types.get(name, "i32")
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif kind is None or kind == 1:
            signature[name], values[name] = "constexpr", kind
        else:
            signature[name] = kind if isinstance(kind, str) else "i32"
    return kernel, signature, values, launch


def facts(case: Case) -> Facts:
    """Compile a case as the launcher would specialise it and read the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, launch = _arguments(case)
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ALIGNED
        if kind != "constexpr"
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(list(signature).index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=launch)
    ptx = compiled.asm["ptx"]
    usage = resource_usage(compiled.asm["cubin"])
    return Facts(
        shared=compiled.metadata.shared,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma_sync=len(re.findall(r"\bmma\.sync", ptx)),
        cp_async=len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
    )


def cuobjdump() -> Path | None:
    """The tool that triton's package carries."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, SHARED … of the one kernel in a cubin."""
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump is missing from triton's package; reinstall triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)}


def _cases_of(arch: int) -> list[Case]:
    cases = []
    for tile in ("LARGE", "MEDIUM", "DECODE_16", "DECODE_32", "DECODE_64"):
        cases += [Case("project", "bf16", tile, arch, slots) for slots in (False, True)]
        cases += [Case("gradient", "bf16", tile, arch, slots) for slots in (False, True)]
        cases += [Case(kernel, "bf16", tile, arch) for kernel in ("expand", "expand_t")]
    for tile in ("LARGE", "DECODE_16"):
        cases.append(Case("project", "fp16", tile, arch, True))
        cases.append(Case("expand", "fp16", tile, arch))
    for tile in ("LARGE_INT8", "MEDIUM", "DECODE_16", "DECODE_32", "DECODE_64"):
        cases.append(Case("project", "bf16", tile, arch, True, int8=True))
        cases.append(Case("expand", "bf16", tile, arch, int8=True))
        cases.append(Case("gradient", "bf16", tile, arch, True, int8=True))
        cases.append(Case("expand_t", "bf16", tile, arch, int8=True))
    for tile in ("FP32", "FP32_LARGE", "DECODE_FP32"):
        cases.append(Case("project", "fp32", tile, arch, True))
        cases.append(Case("expand", "fp32", tile, arch))
        cases.append(Case("gradient", "fp32", tile, arch, True))
        cases.append(Case("gradient", "fp32", tile, arch, False))
        cases.append(Case("expand_t", "fp32", tile, arch))
    for slots in (False, True):
        cases += [
            Case(kernel, "fp32", "-", arch, slots) for kernel in ("finalise", "mix", "mix_gradient")
        ]
    return cases


def compile_all(cases: list[Case], workers: int = 2) -> dict[Case, Facts]:
    """Facts of every case, compiled in fresh processes (never the interpreter's)."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return dict(zip(cases, pool.map(facts, cases), strict=True))


def main() -> None:
    archs = [int(a) for a in sys.argv[1:]] or [90, 80]
    cases = [case for arch in archs for case in _cases_of(arch)]
    for case, f in compile_all(cases).items():
        print(
            f"{case.name:44s} shared {f.shared:6d} regs {f.registers:3d} stack {f.stack:4d} "
            f"local {f.local:3d} wgmma {f.wgmma:3d} mma.sync {f.mma_sync:3d} "
            f"cp.async {f.cp_async:3d}",
            flush=True,
        )


if __name__ == "__main__":
    main()
