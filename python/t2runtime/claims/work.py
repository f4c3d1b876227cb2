"""One unit in a process of its own: one JSON line on stdout.

python -m t2runtime.claims.work '{"unit": "dispatch", ...}' FOLDER
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch

from t2runtime.claims.units import KINDS, Context


def run(key: str, out: Path) -> dict[str, Any]:
    """The row of a unit; `cpu_seconds` counts training of experts that were not there yet."""
    given = json.loads(key)
    kind, seed = KINDS[given.pop("unit")], given.pop("seed")
    context = Context(out, **{**given, "settings": dict(given["settings"])})
    begin = time.process_time()
    row = kind.measure(seed, context)
    return {**row, "cpu_seconds": time.process_time() - begin}


def main(argv: list[str]) -> int:
    """0; the row on stdout."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(json.dumps(run(argv[0], Path(argv[1]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
