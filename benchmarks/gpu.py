"""Build, test and measure on a machine with a GPU: its own Python, no network.

    python benchmarks/gpu.py                        all phases, one after another
    python benchmarks/gpu.py --phase build,test-gpu
    python benchmarks/gpu.py --dry-run              rehearse on a CPU what can be rehearsed

The package is installed with its CUDA kernels into .gpu/site, which later phases find again, so
phases may run in separate calls on a machine that keeps the folder. Needed there: torch, nvcc,
setuptools, cmake, ninja, pytest, and pybind11 (or just torch, which carries its headers).
Each phase is stopped after nine minutes. At most eight files come out: one log per phase, what
the benchmarks write, and summary.json.
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

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".gpu"
SITE = WORK / "site"
PHASE_SECONDS = 540
MAX_FILES = 8

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
    return [pytest("tests/gpu", "-v", "--durations=10")]


def test_all(run: Run) -> list[Command]:
    """Everything else, on the versions of torch, Triton and transformers that are here."""
    if run.dry:
        return [pytest("tests", "--collect-only", "-q")]
    workers = str(min(8, os.cpu_count() or 1))
    arguments = ["tests", "--ignore=tests/gpu", "-q", "--durations=10"]
    return [pytest(*arguments, "-n", workers, "--dist", "loadfile")]


def bench(run: Run) -> list[Command]:
    device = ["--device", "cpu", "--quick"] if run.dry else ["--device", "cuda"]
    script = str(ROOT / "benchmarks" / "bench_svf.py")
    return [[sys.executable, script, *device, "--json", str(run.out / "bench_svf.json")]]


def forms(run: Run) -> list[Command]:
    """Every form of the CUDA kernels at decode sizes, and which wins where."""
    size = ["--dtypes", "bf16", "int8", "fp16", "--tokens", "1", "4", "8", "16", "32", "64", "128"]
    device = ["--device", "cuda", *size]
    if run.dry:
        device = ["--device", "cpu", "--shapes", "256x256", "--tokens", "1", "--seconds", "0.01"]
    folder, result = ROOT / "benchmarks", str(run.out / "forms.json")
    measure = [sys.executable, str(folder / "bench_svf.py"), *device, "--forms", "--json", result]
    leave_out = ["--no-compile", "--no-peft", "--no-training"]
    return [[*measure, *leave_out], [sys.executable, str(folder / "forms.py"), result]]


PHASES: dict[str, Callable[[Run], list[Command]]] = {
    "build": build,
    "test-gpu": test_gpu,
    "forms": forms,
    "test-all": test_all,
    "bench": bench,
}


def environment(dry: bool) -> dict[str, str]:
    env = dict(os.environ)
    env["PYTHONPATH"] = str(SITE)
    # The source tree must not shadow what was installed (Python 3.11 and later).
    env["PYTHONSAFEPATH"] = "1"
    env["T2_BUILD_DIR"] = str(WORK / "cmake")
    env.setdefault("T2_REQUIRE_CUDA", "0" if dry else "1")
    env.setdefault("HF_HUB_OFFLINE", "1")
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
    env = environment(run.dry)

    results: dict[str, dict[str, object]] = {}
    for name in names:
        results[name] = execute(name, run, env)
        # Without a build there is nothing to test; a red test does not hide the next phase.
        if name == "build" and results[name]["status"]:
            break
    failed = any(result["status"] for result in results.values())
    found = probe(env)
    summary = {"dry_run": run.dry, "phases": results, "environment": found}
    (run.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    files = [path for path in run.out.rglob("*") if path.is_file()]
    if len(files) > MAX_FILES:
        print(f"gpu: {len(files)} files in {run.out}; at most {MAX_FILES} travel back.")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
