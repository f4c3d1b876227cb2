"""Run all of it: `python -m t2runtime.evidence --out FOLDER`, or `make evidence`.

Every finished run is a line of FOLDER/runs.jsonl; a stopped evidence run goes on where it stood.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from t2runtime.evidence import report
from t2runtime.evidence.environment import environment
from t2runtime.evidence.grid import ARMS, SKILLS, comparisons, stories, tuning
from t2runtime.evidence.ledger import Ledger, Row, finish


def chosen_rates(rows: Sequence[Row]) -> dict[str, float]:
    """Of every arm with several rates the best by validation, the smaller on a tie."""
    rates = {}
    for name, arm in ARMS.items():
        own = [row for row in rows if row["arm"] == name]
        if arm.rates:
            rates[name] = max(own, key=lambda row: (row["validation"], -row["lr"]))["lr"]
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was run and written."""
    parser = argparse.ArgumentParser(prog="t2runtime.evidence", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/evidence"))
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--tasks", nargs="+", default=SKILLS, choices=SKILLS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--stories", metavar="MODEL", help="folder of a model that tells stories")
    args = parser.parse_args(argv)
    if args.seeds < 2 or args.jobs < 1:
        parser.error("--seeds must be at least 2 (intervals need two) and --jobs at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    ledger, seeds = Ledger(args.out / "runs.jsonl"), range(args.seeds)
    rates = chosen_rates(finish(tuning(), ledger, args.jobs, "learning rates"))
    compared = finish(comparisons(rates, seeds, args.tasks), ledger, args.jobs, "comparisons")
    told: list[Row] = []
    if args.stories:
        told = finish(stories(args.stories, seeds), ledger, args.jobs, "stories")
    report.write(args.out, environment(), rates, compared, told)
    print((args.out / "evidence.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
