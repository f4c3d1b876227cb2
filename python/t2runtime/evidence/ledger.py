"""Runs that take hours, in processes of their own: every finished one is a line of a file, and what
was stopped goes on where it stood.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

logger = logging.getLogger(__name__)
Row = dict[str, Any]


class Job(Protocol):
    """One run: the same key, the same run."""

    @property
    def key(self) -> str:
        """All that decides the run, in one line."""

    @property
    def command(self) -> Sequence[str]:
        """Module and arguments for `python -m`; its last line on stdout is a JSON object."""

    @property
    def named(self) -> Mapping[str, Any]:
        """What the row says of the run itself."""


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


def finish(runs: Iterable[Job], ledger: Ledger, jobs: int, what: str) -> list[Row]:
    """The rows of all runs, in order; those not in the ledger are run now, `jobs` at a time.

    Raises RuntimeError, with the key of the run and its last words, where one fails.
    """
    wanted = list(runs)
    missing = [run for run in wanted if run.key not in ledger.rows]
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_one, run, what) for run in missing]
        try:
            for done in tqdm(as_completed(futures), what, len(futures), disable=None):
                ledger.add(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [ledger.rows[run.key] for run in wanted]


def _one(run: Job, what: str) -> Row:
    """One run in a process of its own, on one thread, so that time and memory are its own."""
    done = subprocess.run(
        [sys.executable, "-m", *run.command],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"{what}: the run {run.key} failed: {last[0]}")
    facts = json.loads(done.stdout.splitlines()[-1])
    return {"key": run.key, **run.named, **facts}
