"""Build, test and measure on a machine with a GPU: its own Python, no network.

    python benchmarks/gpu.py                        all phases, one after another
    python benchmarks/gpu.py --phase build,test-gpu
    python benchmarks/gpu.py --dry-run              rehearse on a CPU what can be rehearsed

The package is installed with its CUDA kernels into .gpu/site, which later phases find again, so
phases may run in separate calls on a machine that keeps the folder. Needed there: torch, nvcc,
setuptools, cmake, ninja, pytest, and pybind11 (or just torch, which carries its headers).
Each phase is stopped after nine minutes. What comes out: one log per phase, one file of results
per benchmark, a picture of each that can be drawn (with matplotlib), and summary.json with every
goal, measured or not. Where that is more than eight files, all but the summary are packed into
results.tar.gz.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_goals import evaluate, files, render
from outputs import draw, pack, result_files

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".gpu"
SITE = WORK / "site"
PHASE_SECONDS = 540
BENCHMARKS = "tests/gpu/test_benchmarks.py"

# Asked in a fresh interpreter, so that this one needs neither torch nor the package.
PROBE = """
import importlib.util, json, platform, sys
info = {"python": platform.python_version(), "machine": platform.machine()}
import torch
info["torch"], info["cuda"] = torch.__version__, torch.version.cuda
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    info["gpu"] = {"name": p.name, "multiprocessors": p.multi_processor_count,
                   "memory_mib": p.total_memory >> 20, "capability": [p.major, p.minor]}
for name in ("triton", "transformers", "peft", "numpy"):
    if importlib.util.find_spec(name):
        info[name] = getattr(__import__(name), "__version__", "?")
try:
    import t2kernels
    from t2kernels import _native
    info["t2kernels"] = {"file": t2kernels.__file__, **_native.build_info()}
except ImportError as error:
    info["t2kernels"] = {"missing": str(error)}
print(json.dumps(info))
"""

# The end of the build phase: the right package is found, it has kernels, there is a GPU.
CHECK = """
import sys
from pathlib import Path
import t2kernels
from t2kernels import _native
if not Path(t2kernels.__file__).is_relative_to(sys.argv[1]):
    sys.exit(f"t2kernels comes from {t2kernels.__file__}, not from {sys.argv[1]}")
import torch
if sys.argv[2] == "gpu":
    if not hasattr(_native, "cuda_svf_decode"):
        sys.exit("the native module has no CUDA kernels")
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; DRY_RUN=1 rehearses without one")
print(_native.build_info())
"""


class Run(NamedTuple):
    """What a phase needs to know."""

    out: Path
    dry: bool


Command = list[str]


def build(run: Run) -> list[Command]:
    shutil.rmtree(SITE, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    check = [sys.executable, "-c", CHECK, str(SITE), "dry" if run.dry else "gpu"]
    return [[*pip, "--no-index", "-v", "--target", str(SITE), str(ROOT)], check]


def pytest(*arguments: str) -> Command:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


def test_gpu(run: Run) -> list[Command]:
    """The tests that need a GPU, one process: they also take much of its memory."""
    return [pytest("tests/gpu", f"--ignore={BENCHMARKS}", "-v", "--durations=10")]


def test_bench(run: Run) -> list[Command]:
    """Every benchmark at a small size, before time is spent on large ones."""
    return [pytest(BENCHMARKS, "-v", "--durations=10")]


def test_all(run: Run) -> list[Command]:
    """Everything else, on the versions of torch, Triton and transformers that are here."""
    if run.dry:
        return [pytest("tests", "--collect-only", "-q")]
    workers = str(min(8, os.cpu_count() or 1))
    arguments = ["tests", "--ignore=tests/gpu", "-q", "--durations=10"]
    return [pytest(*arguments, "-n", workers, "--dist", "loadfile")]


def script(name: str, *arguments: str) -> Command:
    return [sys.executable, str(ROOT / "benchmarks" / name), *arguments]


# A layer, a number of tokens and a time that a rehearsal on a CPU is over in seconds with.
REHEARSAL = "--device cpu --shapes 64x96 --seconds 0.01 --dtypes bf16 int8 fp8"
LARGE = "4096x14336 4096x4096 14336x4096"


def line_ups(run: Run, name: str, arguments: str, rehearsed: str) -> Command:
    """bench_svf.py with the options of a phase, or with those of its rehearsal."""
    chosen = f"{REHEARSAL} {rehearsed}" if run.dry else f"--device cuda {arguments}"
    return script("bench_svf.py", *chosen.split(), "--json", str(run.out / f"{name}.json"))


def sanitizer(run: Run) -> list[Command]:
    """The CUDA kernels on small cases under compute-sanitizer, where the tool is."""
    return [script("sanitize.py", *(["--dry-run"] if run.dry else []))]


def forms(run: Run) -> list[Command]:
    """Every form of the CUDA kernels at decode sizes, and which wins where."""
    both = "--forms --no-compile --no-peft --no-training"
    shapes = f"--shapes {LARGE} 4096x1024 --dtypes bf16 int8 fp8 fp16"
    sizes = f"{both} {shapes} --tokens 1 8 32 64 128 --seconds 0.03"
    measure = line_ups(run, "forms", sizes, f"{both} --tokens 1")
    return [measure, script("forms.py", str(run.out / "forms.json"))]


def decode(run: Run) -> list[Command]:
    """T up to 128: every backend beside every baseline; the goals of decode."""
    both = "--no-compile --no-peft --no-training"
    shapes = f"--shapes {LARGE} 4096x1024 --dtypes bf16 int8 fp8"
    sizes = f"{both} {shapes} --tokens 1 8 32 64 128 --slots 1 128"
    return [line_ups(run, "decode", sizes, f"{both} --tokens 1 8 --slots 1 8")]


def prefill(run: Run) -> list[Command]:
    """T from 512: against library products, delta, ragged slots."""
    both = "--no-compile --no-peft --no-training --slots 1 64"
    sizes = f"{both} --shapes {LARGE} 4096x1024 --dtypes bf16 --tokens 8192 2048 512 32768"
    return [line_ups(run, "prefill", sizes, f"{both} --tokens 256")]


def train(run: Run) -> list[Command]:
    """A training step of one layer: time, memory, what is kept for backward."""
    both = "--no-compile --no-peft --tokens 1"
    sizes = f"{both} --shapes {LARGE} --dtypes bf16 --training-tokens 2048 8192"
    return [line_ups(run, "train", sizes, f"{both} --training-tokens 32")]


def peers(run: Run) -> list[Command]:
    """What other phases leave out: compiled torch, PEFT, fp16 and fp32."""
    sizes = "--no-training --dtypes bf16 fp16 fp32 --tokens 1 32 128"
    return [line_ups(run, "peers", sizes, "--no-training --tokens 4")]


def rehearsable(run: Run, name: str, *arguments: str) -> Command:
    """A benchmark with --device, --quick and --json, writing a file named after it."""
    device = ["--device", "cpu", "--quick"] if run.dry else ["--device", "cuda"]
    result = run.out / f"{name.removeprefix('bench_').removesuffix('.py')}.json"
    return script(name, *device, *arguments, "--json", str(result))


def parts(run: Run) -> list[Command]:
    """Layers that share x as one call, mixing, what Python costs, a bank of many experts."""
    small = ["--tokens", "4", "--seconds", "0.01"]
    device = ["--device", "cpu", "--seconds", "0.01"] if run.dry else ["--device", "cuda"]
    result = ["--dtype", "bfloat16", "--json", str(run.out / "overhead.json")]
    bank = ["--experts", "100", "--layers", "4", "--rounds", "5"]
    if not run.dry:
        bank = ["--experts", "10000", "--layers", "256", "--device", "cuda"]
        bank += ["--backends", "cuda", "triton", "torch"]
    return [
        rehearsable(run, "bench_parts.py", *(small if run.dry else [])),
        script("bench_overhead.py", *device, *result),
        script("bench_bank.py", *bank),
        script("bench_bank.py", *bank, "--host"),
    ]


def model(run: Run) -> list[Command]:
    """The 8B model: merge, decode and prefill of 1 to 64 requests."""
    small = ["--seconds", "0.01", "--requests", "2", "--prompt", "8"]
    return [rehearsable(run, "bench_model.py", *(small if run.dry else []))]


def compiled(run: Run) -> list[Command]:
    """Its decode step through torch.compile, and launched from Python."""
    result = ["--json", str(run.out / "model-compiled.json")]
    few = ["--only", "decode", "--requests", "32", "--factors", "bf16", "int8", "--eager"]
    if run.dry:
        few = ["--quick", "--only", "decode", "--requests", "2", "--factors", "bf16"]
        return [script("bench_model.py", "--device", "cpu", *few, "--targets", "mlp", *result)]
    return [script("bench_model.py", "--device", "cuda", *few, "--compile", *result)]


def step(run: Run) -> list[Command]:
    """A REINFORCE step of the 8B model, part by part."""
    small = ["--rows", "4", "--prompt", "20", "--new-tokens", "4", "--steps", "1"]
    return [rehearsable(run, "bench_step.py", *(small if run.dry else []))]


def decompose(run: Run) -> list[Command]:
    """All linears of the 8B shape; the next call goes on where this one stops."""
    state = WORK / ("decompose-rehearsal.json" if run.dry else "decompose.json")
    if run.dry:
        state.unlink(missing_ok=True)
    return [rehearsable(run, "bench_decompose.py", "--state", str(state))]


def tune(run: Run) -> list[Command]:
    """A table of tiles for this GPU, which what is measured after it uses; a call goes on."""
    made, copy = tuning(run.dry), "import shutil, sys; shutil.copy(*sys.argv[1:])"
    sizes = "--rehearse --shapes 64x48 --tokens 1 --dtypes fp16" if run.dry else (
        "--dtypes bf16 --minutes 7"
    )  # fmt: skip
    if run.dry:
        made.unlink(missing_ok=True)
    make = [sys.executable, "-m", "t2kernels.tune", "--out", str(made), *sizes.split()]
    return [make, [sys.executable, "-c", copy, str(made), str(run.out / "tuning.json")]]


def tuning(dry: bool) -> Path:
    """Where the table is kept between calls."""
    return WORK / ("tuning-rehearsal.json" if dry else "tuning.json")


PHASES: dict[str, Callable[[Run], list[Command]]] = {
    "build": build,
    "test-gpu": test_gpu,
    "test-bench": test_bench,
    "forms": forms,
    "tune": tune,
    "decode": decode,
    "prefill": prefill,
    "model": model,
    "parts": parts,
    "train": train,
    "step": step,
    "decompose": decompose,
    "compiled": compiled,
    "peers": peers,
    "sanitizer": sanitizer,
    "test-all": test_all,
}
# Only what is measured uses the table: the tests ask for rules, and for the interpreter's tiles.
TUNED = ("forms", "decode", "prefill", "model", "parts", "train", "step", "compiled", "peers")


def environment(dry: bool, phase: str = "") -> dict[str, str]:
    """What a phase runs in; a T2_TUNING of the caller's goes before the table made here."""
    env = dict(os.environ)
    env["PYTHONPATH"] = str(SITE)
    # The source tree must not shadow what was installed (Python 3.11 and later).
    env["PYTHONSAFEPATH"] = "1"
    env["T2_BUILD_DIR"] = str(WORK / "cmake")
    env.setdefault("T2_REQUIRE_CUDA", "0" if dry else "1")
    env.setdefault("HF_HUB_OFFLINE", "1")
    if dry or phase not in TUNED:
        env.pop("T2_TUNING", None)
    elif tuning(dry).is_file():
        env.setdefault("T2_TUNING", str(tuning(dry)))
    return env


def probe(env: dict[str, str]) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip()[-2000:]}
    found: dict[str, object] = json.loads(done.stdout)
    return found


def execute(name: str, run: Run, env: dict[str, str]) -> dict[str, object]:
    """Run one phase with its output in a log and on the screen's last lines."""
    started, status = time.monotonic(), 0
    log_path = run.out / f"{name}.log"
    with open(log_path, "w") as log:
        for command in PHASES[name](run):
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            left = PHASE_SECONDS - (time.monotonic() - started)
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=left
                )
                status = done.returncode
            except subprocess.TimeoutExpired:
                status = 124
                log.write(f"\nstopped: the phase took more than {PHASE_SECONDS} s\n")
            if status:
                break
    seconds = round(time.monotonic() - started, 1)
    tail = log_path.read_text(errors="replace").splitlines()[-15:]
    print(f"== {name}: {'ok' if status == 0 else f'FAILED ({status})'} in {seconds} s")
    print("\n".join(f"   {line}" for line in tail), flush=True)
    return {"status": status, "seconds": seconds}


def chosen(text: str) -> list[str]:
    names = list(PHASES) if text == "all" else [n for n in text.replace(",", " ").split() if n]
    unknown = [name for name in names if name not in PHASES]
    if unknown or not names:
        raise SystemExit(
            f"gpu: --phase must be 'all' or some of {', '.join(PHASES)}; got {text!r}."
        )
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phase", default="all", help=f"all, list, or some of {', '.join(PHASES)}")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args()
    if options.phase == "list":
        print("\n".join(PHASES))
        return 0
    names = chosen(options.phase)
    if "build" not in names and not (SITE / "t2kernels").is_dir():
        raise SystemExit(f"gpu: nothing is installed in {SITE}; run the phase 'build' first.")
    run = Run(options.out.resolve(), options.dry_run)
    run.out.mkdir(parents=True, exist_ok=True)

    results: dict[str, dict[str, object]] = {}
    for name in names:
        results[name] = execute(name, run, environment(run.dry, name))
        # Without a build there is nothing to test; a red test does not hide the next phase.
        if name == "build" and results[name]["status"]:
            break
    failed = any(result["status"] for result in results.values())
    found = probe(environment(run.dry))
    with result_files(run.out) as paths:
        outcomes = evaluate(files(paths), any_device=run.dry)
    summary = {
        "dry_run": run.dry,
        "phases": results,
        "environment": found,
        "goals": [outcome.as_dict() for outcome in outcomes],
    }
    (run.out / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(found, indent=1))
    print("goals, rehearsed on a CPU: the figures mean nothing" if run.dry else "goals")
    print(render(outcomes))
    draw(run.out, environment(run.dry))
    pack(run.out)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
