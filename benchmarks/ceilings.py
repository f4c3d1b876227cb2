"""What the machine can do, measured beside the contestants, and what machine it is."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import t2kernels as t2k

# Larger than any cache, small enough to be read a few dozen times a second.
_PROBE_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
_MATMUL_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_MATMUL_SECONDS = 1.0


def _native() -> ModuleType | None:
    try:
        from t2kernels import _native
    except ImportError:
        return None
    return _native


class Bandwidth:
    """The read bandwidth (CPU) or copy bandwidth (GPU) in GB/s, sampled among the contestants.

    On a CPU the memory that is read is the factors' own: the same pages, the same number of
    threads, once through and in order, by a loop that does nothing else.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device, self._threads, self._native = device, threads, _native()
        if device.type == "cuda":
            self.method = "copy of 1 GiB, bytes counted twice"
            self._source = torch.ones(_PROBE_BYTES["cuda"] // 4, device=device)
            self._target = torch.empty_like(self._source)
        elif self._native is not None:
            self.method = "native read of the line-up's own factors"
        else:
            self.method = "torch.sum of 128 MiB, best of 3"
            self._source = torch.ones(_PROBE_BYTES["cpu"] // 4)

    def sample(self, factors: Sequence[Tensor]) -> float:
        """GB/s (1e9) now; ``factors``: contiguous tensors of the layer, too cold for the caches."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(3):
                self._target.copy_(self._source)
            end.record()
            torch.cuda.synchronize()
            return 6 * _PROBE_BYTES["cuda"] / begin.elapsed_time(end) / 1e6
        if self._native is not None:
            read = self._native.read_bandwidth
            rates = [(t.nbytes, read(t.data_ptr(), t.nbytes, self._threads)) for t in factors]
            return sum(size for size, _ in rates) / sum(size / rate for size, rate in rates)
        best = min(_seconds(self._source.sum, self._device) for _ in range(3))
        return _PROBE_BYTES["cpu"] / best / 1e9


def _seconds(function: Any, device: torch.device) -> float:
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def matmul_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of a large square x·Wᵀ: the best of a second's worth of products.

    The larger of two sizes is used unless the small one says that it would take too long, as in
    fp16 on a CPU that has to emulate it.
    """
    best = 0.0
    for size in _MATMUL_SIZES[device.type]:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        flops = 2 * size**3
        for _ in range(2):
            last = _seconds(lambda a=a, b=b: a @ b.T, device)
        count = max(3, min(20, int(_MATMUL_SECONDS / 2 / last)))
        least = min(_seconds(lambda a=a, b=b: a @ b.T, device) for _ in range(count))
        best = max(best, flops / least / 1e9)
        if last * 8 > _MATMUL_SECONDS:
            break
    return best


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_features() -> list[str]:
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16")
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in wanted if name in flags]


def _commit() -> str:
    """The commit of the checkout that this file is in, with a mark if files differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ("git", *args), cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (commit or "unknown") + (" with changes" if changed else "")


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of the NVIDIA driver, from the tool that comes with it."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _tuning(device: torch.device) -> dict[str, str] | None:
    """Name and digest of the table of tiles that Triton's kernels go by, if there is one."""
    named = os.environ.get("T2_TUNING")
    if named:
        path = Path(named)
    elif device.type == "cuda":
        try:
            from t2kernels.ops.triton.common import tables
        except ImportError:
            return None
        path = tables.SHIPPED / tables.file_name(tables.gpu_name(device))
        if not path.exists():
            return None
    else:
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "no file"
    return {"file": path.name, "sha256": digest}


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Everything that a reader needs to judge the numbers; no path and no host name."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device.type,
        "cpu": _cpu_model(),
        "cpu_features": _cpu_features(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "transformers": _version("transformers"),
        "t2kernels": t2k.__version__,
        "tuning": _tuning(device),
    }
    native = _native()
    if native is None:
        record["native"] = None
    else:
        record["native"] = native.isa_name(-1)
        record["thread_runtime"] = Path(native.thread_runtime().split(" ")[0]).name
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = properties.name
        record["gpu_sms"] = properties.multi_processor_count
        record["gpu_memory_mib"] = properties.total_memory >> 20
        record["gpu_l2_mib"] = properties.L2_cache_size >> 20
        record["cuda"] = torch.version.cuda
        record["driver"] = _driver()
    return record
