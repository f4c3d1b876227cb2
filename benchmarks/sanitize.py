"""Small cases of the CUDA kernels under NVIDIA's compute-sanitizer.

    python benchmarks/sanitize.py                 # all tools; says so and ends well without any
    python benchmarks/sanitize.py --cases calls   # the cases alone, as the tools run them

Products in every form, groups in every form, mixing, and graphs of them all that are replayed.
Each case is compared with the formula in fp64, since a kernel that the tool stops has no result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import t2kernels as t2k
from t2kernels.ops import cuda, cuda_forms, reference
from t2kernels.ops.mixing import mix_rows
from t2kernels.testing import make_group, make_inputs, poisoned_empty, relative_error

# (tool, cases) of one run each. What a tool sees in a replay it sees in the call as well, but for
# memory that is gone by then: one tool looks at graphs.
RUNS = (("memcheck", "calls"), ("racecheck", "calls"), ("synccheck", "calls"),
        ("memcheck", "graphs"))  # fmt: skip
SECONDS = 120  # for one run
_ERRORS_FOUND = 99
_KINDS: tuple[tuple[torch.dtype, str | None, float], ...] = (
    # dtype, 8-bit factors, and how far a right result may be from fp64
    (torch.float32, None, 1e-5),
    (torch.bfloat16, None, 2e-2),
    (torch.float16, None, 2e-3),
    (torch.bfloat16, "int8", 2e-2),
    (torch.bfloat16, "fp8", 2e-2),
)
_MIX_BOUND = 1e-6


class Case(NamedTuple):
    """``call`` enqueues it, and again where it is captured; ``want`` is the same in fp64."""

    name: str
    form: str | None  # None: a kernel without forms
    bound: float
    call: Callable[[], list[Tensor]]
    want: Callable[[], list[Tensor]]

    def within(self) -> AbstractContextManager[None]:
        """What the call runs in."""
        return cuda_forms.form(self.form) if self.form else t2k.backend("cuda")


def cases(device: str) -> Iterator[Case]:
    """Few and many tokens, one past a tile, rows and columns past one; one request and many."""
    for dtype, factors, bound in _KINDS:
        kind = factors or str(dtype).removeprefix("torch.")
        for tokens in (1, 9, 33, 128):
            inputs = make_inputs(
                tokens, 144, 176, 112, dtype=dtype, factors=factors, slots=3, device=device
            )
            members = make_group(
                tokens, 144, (176, 48, 63), (112, 48, 16), dtype=dtype, factors=factors, slots=3,
                device=device,
            )  # fmt: skip
            for form in cuda_forms.FORMS:
                if form == "fma" or cuda_forms.unfit(inputs.x, inputs.U, inputs.V) is None:
                    yield Case(
                        f"{kind} T={tokens}", form, bound,
                        lambda i=inputs: [cuda.forward(*i.args())[0]],
                        lambda i=inputs: [reference.forward(*i.double().args())[0]],
                    )  # fmt: skip
                if form == "fma" or cuda_forms.unfit_group(*members.args()[:3]) is None:
                    yield Case(
                        f"group, {kind} T={tokens}", form, bound,
                        lambda g=members: cuda.forward_group(*g.args()),
                        lambda g=members: [
                            reference.forward(*m.double().args())[0] for m in g.members()
                        ],
                    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        for requests, columns in ((1, 512), (5, 515)):
            yield _mixing(dtype, requests, columns, device)


def _mixing(dtype: torch.dtype, requests: int, columns: int, device: str) -> Case:
    """Some experts of a table into some rows of an arena, whose other rows stay."""
    generator = torch.Generator().manual_seed(columns)
    S = torch.rand(columns, generator=generator).to(device)
    deviation = (0.1 * torch.randn(7, columns, generator=generator)).to(device, dtype)
    Z = deviation if dtype == torch.bfloat16 else 1 + deviation
    alpha = torch.randn(requests, 3, generator=generator).to(device)
    indices = torch.randint(0, 7, (requests, 3), generator=generator, dtype=torch.int32).to(device)
    rows = torch.arange(requests, 0, -1, dtype=torch.int32, device=device)
    out = torch.full((requests + 2, columns), 7.0, device=device)

    def call() -> list[Tensor]:
        mix_rows(out, S, Z, alpha, indices=indices, rows=rows)
        return [out]

    def want() -> list[Tensor]:
        change = Z.double() if dtype == torch.bfloat16 else Z.double() - 1
        mixed = (alpha.double()[..., None] * change[indices.long()]).sum(1)
        truth = torch.full_like(out, 7.0, dtype=torch.float64)
        truth[rows.long()] = S.double() * (1 + mixed)
        return [truth]

    kind = str(dtype).removeprefix("torch.")
    return Case(f"mix, {kind} requests={requests}", None, _MIX_BOUND, call, want)


def check(case: Case, found: Sequence[Tensor], how: str = "") -> None:
    """RuntimeError where a result is farther from fp64 than it may be."""
    for got, truth in zip(found, case.want(), strict=True):
        error = relative_error(got, truth)
        if not error <= case.bound:
            name = ", ".join(filter(None, (case.name, case.form, how)))
            raise RuntimeError(f"{name}: relative error {error:.1e}, allowed {case.bound}")


def run_calls(chosen: Sequence[Case]) -> int:
    """Every case once; how many ran."""
    for case in chosen:
        with case.within(), poisoned_empty():
            check(case, case.call())
    return len(chosen)


def run_graphs(chosen: Sequence[Case]) -> int:
    """Every case as a graph of two calls, replayed twice; how many ran."""
    for case in chosen:
        with case.within():
            case.call()  # the counters of the cooperative form exist before a capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = [case.call(), case.call()]
            for turn in range(2):
                for tensor in (t for result in results for t in result):
                    tensor.fill_(7.0 if case.form is None else float("nan"))
                graph.replay()
                for result in results:
                    check(case, result, f"replay {turn + 1}")
    return len(chosen)


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


def run_tools(tool: str) -> bool:
    """Whether no tool found an error and no case was wrong."""
    clean = True
    for name, which in RUNS:
        command = [tool, "--tool", name, "--error-exitcode", str(_ERRORS_FOUND), sys.executable,
                   str(Path(__file__).resolve()), "--cases", which]  # fmt: skip
        env = dict(os.environ)
        if which == "calls":  # without torch's cache every tensor has bounds of its own
            env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        try:
            status = subprocess.run(command, env=env, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}, {which}: not finished after {SECONDS} s", flush=True)
            continue
        print(f"{name}, {which}: {'clean' if status == 0 else f'FAILED ({status})'}", flush=True)
        clean = clean and status == 0
    return clean


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a tool finds an error or a case is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", choices=("calls", "graphs"), help="run these without a tool")
    parser.add_argument("--dry-run", action="store_true", help="list the cases")
    args = parser.parse_args(argv)
    if args.dry_run:
        print(*(", ".join(filter(None, c[:2])) for c in cases("cpu")), sep="\n")
        return 0
    if not torch.cuda.is_available() or cuda._missing is not None:
        print(f"sanitize: skipped, no CUDA kernels can run here ({cuda._missing or 'no GPU'})")
        return 0
    if args.cases:
        with torch.no_grad():
            run = run_calls if args.cases == "calls" else run_graphs
            print(f"{run(list(cases('cuda')))} cases, {args.cases}")
        torch.cuda.synchronize()
        return 0
    tool = find_tool()
    if tool is None:
        print("sanitize: skipped, this machine has no compute-sanitizer")
        return 0
    return int(not run_tools(tool))


if __name__ == "__main__":
    sys.exit(main())
