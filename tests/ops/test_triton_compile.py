"""Facts about the Triton kernels' machine code, compiled for GPUs that need not be here.

``triton_aot.py`` compiles in processes of its own (this one may be interpreting, or hold no
triton); here its numbers meet the limits. ``python tests/ops/triton_aot.py`` prints them for
every kernel and tile that ships.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AOT = Path(__file__).with_name("triton_aot.py")
# Shared memory one block may use, in bytes (CUDA C programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 90: 232448}


def compiled(cache: Path, arch: int) -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    result = subprocess.run(
        [sys.executable, "-W", "error", str(AOT), "--few", "--json", str(arch)],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_facts(arch: int, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "cuobjdump").exists() or not (tools / "ptxas").exists():
        pytest.skip(f"triton's package has no ptxas or cuobjdump in {tools}")
    kernels = compiled(tmp_path, arch)
    assert {k["kernel"] for k in kernels.values()} >= {
        "project",
        "expand",
        "delta",
        "gradient",
        "mix",
    }
    faults = []
    for name, k in kernels.items():
        product = k["tile"] != "-"
        if k["shared"] > SHARED_LIMIT[arch]:
            faults.append(f"{name}: {k['shared']} bytes of shared memory")
        if k["stack"] or k["local"]:
            faults.append(f"{name}: spills {k['stack']} + {k['local']} bytes a thread")
        # Loads run ahead of the products through shared memory, by threads or by the engine.
        engine = k["tile"] == "LARGE_SM90"
        if product and not k["tma" if engine else "cp_async"]:
            faults.append(f"{name}: no {'TMA' if engine else 'cp.async'}")
        if engine and (k["cp_async"] or k["tma"] % 2):
            faults.append(f"{name}: an operand that does not come by TMA")
        if product and k["dtype"] != "fp32":
            # 32 outputs by 16 tokens are below wgmma's 64 rows.
            wide = arch >= 90 and k["tile"] != "DECODE_16"
            if not k["wgmma" if wide else "mma_sync"]:
                faults.append(f"{name}: no {'wgmma' if wide else 'mma.sync'}")
        if k["overlap"] != ("overlap" in name):
            faults.append(f"{name}: {k['overlap']} times griddepcontrol")
        if k["dependent"] != ("overlap" in name and k["kernel"] == "delta"):
            faults.append(f"{name}: launched as a programmatic dependent: {k['dependent']}")
        # fp32 is IEEE: tensor cores would mean tf32.
        if k["dtype"] == "fp32" and (k["wgmma"] or k["mma_sync"]):
            faults.append(f"{name}: fp32 on tensor cores")
    assert not faults, "\n".join(faults)
