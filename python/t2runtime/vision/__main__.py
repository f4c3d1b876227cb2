"""`python -m t2runtime.vision digits|vqa --data FOLDER --out FOLDER`: one measurement a seed.

Bases, experts and results stay in the folder of --out; a seed that is finished there is shown, one
that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from t2runtime.vision import digits, easy_vqa, vqa


def finished(path: Path, settings: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row in a file, measured and written where it is not there yet.

    Raises ValueError where the file holds a row of other settings.
    """
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] != settings:
            raise ValueError(
                f"--out: {path} was measured with {kept['settings']}, not with {settings}. Take "
                "another folder"
            )
        row: dict[str, Any] = kept["row"]
        return row
    row = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"settings": settings, "row": row}, indent=1) + "\n", "utf-8")
    os.replace(part, path)
    return row


def run_digits(data: Path, out: Path, seeds: Sequence[int]) -> None:
    """A table of every seed."""
    images = digits.read(data)
    for seed in seeds:
        settings = digits.Settings(seed=seed)
        measure = partial(digits.measure, images, settings)
        row = finished(out / f"digits{seed}.json", repr(settings), measure)
        print(f"seed {seed}\n{digits.table(row)}\n")


def run_vqa(data: Path, out: Path, seeds: Sequence[int]) -> None:
    """A table of every seed; the base is made once."""
    questions = easy_vqa.EasyVQA.read(data)
    for seed in seeds:
        settings = vqa.Settings(seed=seed)
        measure = partial(vqa.measure, questions, out, settings)
        row = finished(out / f"vqa{seed}.json", repr(settings), measure)
        print(f"seed {seed}\n{vqa.table(row)}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was measured; 2 with a line on stderr for what cannot be."""
    parser = argparse.ArgumentParser(prog="t2runtime.vision", description=__doc__)
    parser.add_argument("what", choices=("digits", "vqa"))
    parser.add_argument("--data", type=Path, required=True, help="folder of digits or of easy-VQA")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run = run_digits if args.what == "digits" else run_vqa
        run(args.data, args.out, args.seeds)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
