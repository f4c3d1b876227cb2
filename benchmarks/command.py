"""How every benchmark begins: options that all share, checked, and a record of the machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from ceilings import environment


def add_shared(parser: argparse.ArgumentParser, *, device: bool = False) -> None:
    """--json and --threads; --device where a benchmark runs on a GPU too."""
    add = parser.add_argument
    if device:
        add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, metavar="N", help="CPU threads; default: torch's own")
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")


def begin(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """Check the shared options (exit 2 before anything is measured), set the threads; the
    record of the machine and of the versions."""
    device = torch.device(getattr(args, "device", "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be a positive number, got {args.threads}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"the folder of {args.json} does not exist")
    if args.threads:
        torch.set_num_threads(args.threads)
    return environment(device, torch.get_num_threads())
