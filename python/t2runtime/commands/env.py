"""`t2 env`: versions, processors, backends and why one is unavailable."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

import t2kernels as t2k
from t2kernels.testing import make_inputs

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "triton",
    "peft",
    "trl",
    "matplotlib",
)
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Gather everything; nothing here needs a GPU."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "t2kernels": t2k.__version__,
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "name": processor(),
            "isa": cpu_flags(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": _gpus(),
        "native": native_build(),
        "backends": backends(),
    }


def show(result: dict[str, Any]) -> str:
    """A few aligned lines."""
    cpu = result["cpu"]
    packages = ", ".join(f"{n} {v}" for n, v in result["packages"].items() if v)
    missing = [n for n, v in result["packages"].items() if not v]
    lines = [
        f"t2kernels  {result['t2kernels']}, python {result['python']}, {result['system']}",
        f"packages   {packages}",
        f"absent     {', '.join(missing) or 'none'}",
        f"cpu        {cpu['name']}, {cpu['threads']} threads, "
        f"{' '.join(cpu['isa']) or 'flags unknown'}",
        f"gpu        {'; '.join(gpu['name'] for gpu in result['gpus']) or 'none'}",
        "native     " + ", ".join(f"{k} {v}" for k, v in result["native"].items()),
    ]
    for name, reason in result["backends"].items():
        lines.append(
            f"backend    {name:10s}{'available' if reason is None else 'unavailable: ' + reason}"
        )
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's name where the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets that matter here."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [flag for flag in _FLAGS if flag in flags]


def _cpuinfo(key: str) -> str | None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return None
    for line in info.read_text().splitlines():
        if line.split(":")[0].strip() == key:
            return line.split(":", 1)[1].strip()
    return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_gib": round(p.total_memory / 2**30, 1),
        }
        for p in found
    ]


def native_build() -> dict[str, Any]:
    """What the compiled module says of itself."""
    try:
        module = importlib.import_module("t2kernels._native")
    except ImportError as error:
        return {"built": False, "reason": str(error)}
    info = getattr(module, "build_info", None)
    facts = info() if callable(info) else info
    return {"built": True, **(facts if isinstance(facts, dict) else {})}


def backends() -> dict[str, str | None]:
    """Each backend's reason not to run a small fp32 decode call on the best device here; None if
    it would.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reasons: dict[str, str | None] = {}
    for name in t2k.BACKENDS:
        try:
            with t2k.backend(name):
                i = make_inputs(1, 64, 64, 64, bias=False, device=device)
                factors = t2k.SVDFactors(i.U, i.base, i.V)
                with torch.no_grad():
                    t2k.svf_linear(i.x, factors, i.d)
            reasons[name] = None
        except (RuntimeError, ImportError, ValueError, TypeError) as error:
            # The library wraps the reason in advice for a forced backend; here only it counts.
            reason = str(error).splitlines()[0]
            if name == "cuda" and device == "cpu":
                reasons[name] = "no CUDA device"
                continue
            reasons[name] = reason.rpartition("cannot run this call: ")[2].partition(". Unset")[0]
    return reasons
