"""Compile the Triton kernels for a GPU that is not here, and read the facts off the code.

    python tests/ops/triton_aot.py [--few] [--json] [80 90]

prints one line per kernel as it ships; ``--few`` takes the subset on which
``test_triton_compile.py`` asserts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from t2kernels.quantized import FACTOR_KINDS

POINTER = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "int8": "*i8", "fp8": "*u8"}
# Arguments that any real layer passes as multiples of 16.
ALIGNED = {"stride_x", "stride_g", "stride_d", "IN", "INNER", "OUT", "R", "COLS",
           "stride_b_inner", "stride_b_out", "stride_a", "stride_h", "stride_hd",
           "stride_w_inner", "stride_w_out", "stride_partial", "stride_out",
           "stride_z"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kernel as it ships: which arguments are present, which tile, which dtypes."""

    # project | expand | expand_t | delta | gradient | finalise | finalise_slots | mix
    kernel: str
    dtype: str = "bf16"
    tile: str = "LARGE"
    arch: int = 90
    slots: bool = False
    factors: str | None = None
    even: bool = True  # the inner size is a multiple of the tile's
    overlap: bool = False  # the delta form's two kernels, side by side

    @property
    def name(self) -> str:
        marks = ["slots"] * self.slots + ["uneven"] * (not self.even) + ["overlap"] * self.overlap
        marks += [] if self.factors is None else [self.factors]
        return "-".join([self.kernel, self.dtype, self.tile, f"sm_{self.arch}", *marks])


@dataclass(frozen=True)
class Facts:
    """What the compiler made of a case."""

    shared: int  # bytes
    registers: int  # per thread
    stack: int  # bytes per thread: spills
    local: int
    wgmma: int  # instructions in the PTX
    tma: int
    mma_sync: int
    cp_async: int
    overlap: int  # what lets the next kernel begin, or waits for the last one
    dependent: bool  # launched while the last one runs


def _operand(tile: Any, pointer: str, block: tuple[int, int]) -> str:
    """The type of a product's operand: a pointer or a tensor descriptor."""
    if not tile.descriptors:
        return pointer
    return f"tensordesc<{pointer[1:]}[{block[0]}, {block[1]}]>"


def _arguments(case: Case) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """(kernel, type per argument, constants, launch options) of a case."""
    import triton.language as tl

    from t2kernels.ops.triton import _backward, _delta, _forward, _mix
    from t2kernels.ops.triton.common import config

    x, w = POINTER[case.dtype], POINTER[case.factors or case.dtype]
    tile = getattr(config, case.tile, None)
    if tile is not None and case.kernel == "gradient" and case.slots:
        tile = config.for_slots(tile)
    scale = "*fp32" if case.factors else None
    slot = "*i32" if case.slots else None
    diagonal = {"d_ptr": "*fp32", "base_ptr": "*fp32", "slot_ptr": slot, "scale_ptr": scale}
    if not case.slots:
        diagonal["stride_d"] = 0  # type: ignore[assignment]
    types: dict[str, Any]
    constants: dict[str, Any]
    if case.kernel in ("finalise", "finalise_slots", "mix"):
        floats = ("partial_ptr", "product_ptr", "out_ptr", "s_ptr", "alpha_ptr")
        types = dict.fromkeys(floats, "*fp32")
        types["slot_ptr"] = "*i32"
        types["scale_ptr"] = "*fp32"
        types["z_ptr"] = POINTER[case.dtype]
        for name in ("index_ptr", "row_ptr"):
            types[name] = slot
        types["offsets_ptr"] = "*i64" if case.slots else None
        constants = {
            "BLOCK_ROWS": _backward.REDUCE_ROWS,
            "BLOCK_RUNS": _backward.REDUCE_ROWS,
            "BLOCK_COLS": _backward.REDUCE_COLS,
            "BLOCK": _mix.MIX_COLS,
            "DEVIATION": case.dtype == "bf16",
        }
        kernel = {
            "finalise": _backward.finalise_kernel,
            "finalise_slots": _backward.finalise_slots_kernel,
            "mix": _mix.mix_kernel,
        }[case.kernel]
        launch = _mix.LAUNCH if case.kernel == "mix" else config.SMALL
    else:
        assert tile is not None
        constants = {
            "ACC": tl.float32,
            "BLOCK_T": tile.tokens,
            "BLOCK_OUT": tile.outputs,
            "BLOCK_INNER": tile.inner,
            "CHUNK": tile.chunk,
            "EVEN_INNER": case.even,
            "WEIGHTS_FIRST": tile.weights_first,
            "GROUP": config.GROUP,
            "UPCAST": False,
            "BLOCKWISE": case.dtype == "fp32",
            "DESCRIPTORS": tile.descriptors,
            "PERSISTENT": tile.persistent,
            "INNER_FIRST": case.kernel == "expand_t",
            "OFFSET": case.overlap,
            "OVERLAP": case.overlap,
        }
        left = _operand(tile, x, (tile.tokens, tile.inner))
        right = _operand(tile, w, (tile.outputs, tile.inner))
        right_k = _operand(tile, w, (tile.inner, tile.outputs))
        launch = config.options(tile) | config.dependent(case.overlap and case.kernel == "delta")
        if case.kernel == "project":
            kernel = _forward.project_kernel
            types = {"x": left, "vh": right, "h_ptr": x, "hd_ptr": x, **diagonal}
        elif case.kernel in ("expand", "expand_t"):
            kernel = _forward.expand_kernel
            unit = "stride_b_inner" if case.kernel == "expand" else "stride_b_out"
            types = {"a": left, "b": right, "bias_ptr": x, "y_ptr": x, unit: 1}
            if case.kernel == "expand_t":
                types |= {"bias_ptr": None, "b": right_k}
        elif case.kernel == "delta":
            kernel = _delta.delta_kernel
            constants["EVEN_RANK"] = case.even
            types = {"x": left, "w": _operand(tile, x, (tile.outputs, tile.inner)), "hd": left}
            types |= {"u": right, "bias_ptr": x, "y_ptr": x}
            types["stride_w_inner"] = 1
        else:
            kernel = _backward.gradient_kernel
            # h of 8-bit factors leaves fp16's range.
            h = "*fp32" if case.factors and case.dtype == "fp16" else x
            types = {"g": left, "u": right_k, "h_ptr": h, "gud_ptr": x, **diagonal}
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
        dependent=bool(compiled.metadata.launch_pdl),
        overlap=len(re.findall(r"griddepcontrol", ptx)),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
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


def large(arch: int) -> str:
    """The name of the largest 16-bit tile that fits the GPU."""
    return "LARGE_SM90" if arch >= 90 else "LARGE_SM80"


def few_cases(arch: int) -> list[Case]:
    """Each kernel in the tiles that strain registers and shared memory most."""
    big = large(arch)
    # Where rows do not suit the memory engine, or there is none.
    pointers = "LARGE" if arch >= 90 else big
    cases = [
        Case("project", "bf16", big, arch, slots=True),
        Case("project", "fp16", pointers, arch, slots=True, even=False),
        Case("gradient", "bf16", big, arch, slots=True),
        Case("gradient", "bf16", big, arch),
        Case("expand", "bf16", big, arch),
        Case("expand_t", "fp16", big, arch),
        Case("delta", "bf16", big, arch, overlap=arch >= 90),
        Case("expand", "fp16", "DECODE_64", arch),
        Case("project", "bf16", "LARGE_8BIT", arch, slots=True, factors="int8"),
        Case("project", "bf16", "LARGE_8BIT", arch, slots=True, factors="fp8"),
        Case("gradient", "fp16", "LARGE_8BIT", arch, slots=True, factors="fp8"),
        Case("project", "fp32", "FP32_LARGE", arch, slots=True),
        Case("gradient", "fp32", "FP32", arch, slots=True),
        Case("finalise", "fp32", "-", arch),
        Case("finalise_slots", "fp32", "-", arch),
        Case("mix", "fp32", "-", arch, slots=True),
    ]
    if arch >= 90:
        cases += [
            Case("project", "bf16", "MEDIUM", arch, slots=True),
            Case("gradient", "bf16", "DECODE_64", arch, slots=True),
            Case("expand", "bf16", "DECODE_32", arch),
            Case("expand", "bf16", "DECODE_16", arch, factors="int8"),
            Case("expand", "bf16", "DECODE_16", arch, factors="fp8"),
            Case("mix", "bf16", "-", arch, slots=True),
            Case("gradient", "bf16", pointers, arch, slots=True),
            Case("delta", "bf16", pointers, arch, overlap=True),
            Case("delta", "bf16", "DECODE_16", arch, overlap=True),
            Case("project", "bf16", "DECODE_16", arch, slots=True, overlap=True),
        ]
    else:
        cases += [
            Case("delta", "bf16", "DECODE_16", arch),
            Case("project", "bf16", "DECODE_16", arch, slots=True),
        ]
    return cases


def all_cases(arch: int) -> list[Case]:
    """Every kernel in every tile that ships for it."""
    products = [("project", False), ("project", True), ("gradient", False), ("gradient", True)]
    products += [("expand", False), ("expand_t", False), ("delta", False)]
    cases = []
    for kernel, slots in products:
        largest = ("LARGE_SM90", "LARGE") if arch >= 90 else ("LARGE_SM80",)
        for tile in (*largest, "MEDIUM", "DECODE_16", "DECODE_32", "DECODE_64"):
            for dtype in ("bf16", "fp16"):
                cases.append(Case(kernel, dtype, tile, arch, slots))
            cases.append(Case(kernel, "bf16", tile, arch, slots, even=False))
        for tile in ("LARGE_8BIT", "MEDIUM_8BIT", "DECODE_16", "DECODE_32", "DECODE_64"):
            for kind in FACTOR_KINDS:
                cases.append(Case(kernel, "bf16", tile, arch, slots, factors=kind))
        for tile in ("FP32", "FP32_LARGE", "DECODE_FP32"):
            cases.append(Case(kernel, "fp32", tile, arch, slots))
    cases += [Case(kernel, "fp32", "-", arch) for kernel in ("finalise", "finalise_slots")]
    for dtype in ("fp32", "bf16"):
        cases += [Case("mix", dtype, "-", arch, slots) for slots in (False, True)]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", nargs="*", type=int, default=[80, 90])
    parser.add_argument("--few", action="store_true", help="the subset that the test asserts on")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    choose = few_cases if options.few else all_cases
    cases = [case for arch in options.arch for case in choose(arch)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = dict(zip(cases, pool.map(facts, cases)))
    if options.json:
        print(json.dumps({case.name: asdict(case) | asdict(f) for case, f in results.items()}))
        return
    for case, f in results.items():
        print(
            f"{case.name:46s} shared {f.shared:6d} registers {f.registers:3d} "
            f"stack {f.stack:3d} local {f.local:3d} wgmma {f.wgmma:3d} tma {f.tma:2d} "
            f"mma.sync {f.mma_sync:3d} cp.async {f.cp_async:3d}"
        )


if __name__ == "__main__":
    main()
