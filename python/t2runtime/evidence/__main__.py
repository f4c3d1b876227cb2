"""Run all of it: `python -m t2runtime.evidence --out FOLDER`, or `make evidence`.

Every finished run is a line of FOLDER/runs.jsonl; a stopped evidence run goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import t2kernels as t2k
from t2runtime.evidence import report
from t2runtime.evidence.grid import ARMS, SKILLS, Run, comparisons, stories, tuning

logger = logging.getLogger(__name__)
Row = dict[str, Any]


class Ledger:
    """Finished runs in a file, one line each; a line that a kill cut short is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, Row] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self.rows[row["key"]] = row
                except (json.JSONDecodeError, KeyError, TypeError):
                    logger.warning("%s: a line that is no finished run was dropped", path)
            text = "".join(json.dumps(row) + "\n" for row in self.rows.values())
            part = path.with_suffix(".part")
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)

    def add(self, row: Row) -> None:
        """Remember a finished run."""
        self.rows[row["key"]] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def finish(runs: Iterable[Run], ledger: Ledger, jobs: int, what: str) -> list[Row]:
    """The rows of all runs, in order; those not in the ledger are run now, `jobs` at a time."""
    wanted = list(runs)
    missing = [run for run in wanted if run.key not in ledger.rows]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_one, run) for run in missing]
        try:
            for done in tqdm(as_completed(futures), what, len(futures), disable=None):
                ledger.add(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [ledger.rows[run.key] for run in wanted]


def _one(run: Run) -> Row:
    """One run in a process of its own, on one thread, so that time and memory are its own."""
    done = subprocess.run(
        [sys.executable, "-m", "t2runtime.evidence.work", run.key],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"evidence: the run {run.key} failed: {last[0]}")
    facts = json.loads(done.stdout.splitlines()[-1])
    named = {"key": run.key, "arm": run.arm, "task": run.task, "seed": run.seed}
    return {**named, "lr": dict(run.settings)["lr"], **facts}


def chosen_rates(rows: Sequence[Row]) -> dict[str, float]:
    """Of every arm with several rates the best by validation, the smaller on a tie."""
    rates = {}
    for name, arm in ARMS.items():
        own = [row for row in rows if row["arm"] == name]
        if arm.rates:
            rates[name] = max(own, key=lambda row: (row["validation"], -row["lr"]))["lr"]
    return rates


def environment() -> dict[str, Any]:
    """What a reader needs to judge time and bits."""
    return {
        "cpu": report.cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "t2kernels": t2k.__version__,
    }


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
