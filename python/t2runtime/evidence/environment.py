"""What a reader needs to judge time and bits."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import t2kernels as t2k


def environment() -> dict[str, Any]:
    """Processor and versions, in the order that they are said."""
    return {
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "t2kernels": t2k.__version__,
    }


def cpu_model() -> str:
    """What the system says about the processor, and how many it shows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = [
            line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line
        ]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()} × {os.cpu_count()}"
