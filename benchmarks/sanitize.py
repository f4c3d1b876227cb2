"""Small cases of the CUDA kernels under NVIDIA's compute-sanitizer.

    python benchmarks/sanitize.py            # all tools; says so and ends well where there is none
    python benchmarks/sanitize.py --cases    # the cases alone, as the tools run them

Each case is compared with the formula in fp64, since a kernel that the tool stops has no result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from t2kernels.ops import cuda, cuda_forms, reference
from t2kernels.testing import Inputs, make_inputs, poisoned_empty, relative_error

TOOLS = ("memcheck", "racecheck", "synccheck")
SECONDS = 120  # for one tool
_ERRORS_FOUND = 99
_KINDS: tuple[tuple[torch.dtype, str | None, float], ...] = (
    # dtype, 8-bit factors, and how far a right result may be from fp64
    (torch.float32, None, 1e-5),
    (torch.bfloat16, None, 2e-2),
    (torch.float16, None, 2e-3),
    (torch.bfloat16, "int8", 2e-2),
    (torch.bfloat16, "fp8", 2e-2),
)


def cases(device: str) -> Iterator[tuple[str, Inputs, float]]:
    """(name, inputs, bound): few and many tokens, one past a tile, rows and columns past one."""
    for dtype, factors, bound in _KINDS:
        for tokens in (1, 9, 33, 128):
            inputs: Any = make_inputs(
                tokens, 144, 176, 112, dtype=dtype, factors=factors, slots=3, device=device
            )
            yield f"{factors or str(dtype).removeprefix('torch.')} T={tokens}", inputs, bound


def run_cases(device: str) -> int:
    """Each case in every form that can run it; how many ran."""
    count = 0
    for name, inputs, bound in cases(device):
        truth, _ = reference.forward(*inputs.double().args())
        for form in cuda_forms.FORMS:
            if form != "fma" and cuda_forms.unfit(inputs.x, inputs.U, inputs.V) is not None:
                continue
            with poisoned_empty(), cuda_forms.form(form):
                y, _ = cuda.forward(*inputs.args())
            error = relative_error(y, truth)
            if not error <= bound:
                raise RuntimeError(f"{name}, {form}: relative error {error:.1e}, allowed {bound}")
            count += 1
    torch.cuda.synchronize()
    return count


def find_tool() -> str | None:
    """compute-sanitizer on the path or beside nvcc."""
    found = shutil.which("compute-sanitizer")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    for home in filter(None, homes):
        found = found or shutil.which("compute-sanitizer", path=str(Path(home) / "bin"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a tool finds an error or a case is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", action="store_true", help="run the cases, without a tool")
    parser.add_argument("--dry-run", action="store_true", help="list the cases")
    args = parser.parse_args(argv)
    if args.dry_run:
        print(*(name for name, _, _ in cases("cpu")), sep="\n")
        return 0
    if not torch.cuda.is_available() or cuda._missing is not None:
        print(f"sanitize: skipped, no CUDA kernels can run here ({cuda._missing or 'no GPU'})")
        return 0
    if args.cases:
        print(f"{run_cases('cuda')} calls")
        return 0
    tool = find_tool()
    if tool is None:
        print("sanitize: skipped, this machine has no compute-sanitizer")
        return 0
    # Without torch's cache every tensor has bounds of its own.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = False
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", str(_ERRORS_FOUND), sys.executable,
                   str(Path(__file__).resolve()), "--cases"]  # fmt: skip
        try:
            status = subprocess.run(command, env=env, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: not finished after {SECONDS} s", flush=True)
            continue
        print(f"{name}: {'clean' if status == 0 else f'FAILED ({status})'}", flush=True)
        failed |= status != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
