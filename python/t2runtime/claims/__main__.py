"""Measure and judge: `python -m t2runtime.claims --out FOLDER`, or `make claims`.

Every finished unit is a line of FOLDER/runs.jsonl; a stopped run goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2runtime.claims import report
from t2runtime.claims.units import KINDS, Context, units
from t2runtime.evidence.environment import environment
from t2runtime.evidence.ledger import Ledger, finish


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was run and written."""
    args = _parser().parse_args(argv)
    if args.seeds < 2 or args.jobs < 1:
        raise SystemExit("--seeds must be at least 2 (intervals need two) and --jobs at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        known = report.read_evidence(args.evidence) if args.evidence else {}
        files = [report.read(path) for path in args.report_only]
        result = report.merged(files) if files else _measured(args)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    evidence = {**result.get("evidence", {}), **known}
    report.write(args.out, {**result, "evidence": evidence})
    print((args.out / "claims.md").read_text(encoding="utf-8"))
    return 0


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    settings = dict(_setting(text) for text in args.set)
    context = Context(args.out.resolve(), args.model, args.stories, args.data, settings)
    wanted, lacking = units(args.units, range(args.seeds), context)
    rows = finish(wanted, Ledger(args.out / "runs.jsonl"), args.jobs, "claims")
    own = {name: dict(unit.settings) for unit in wanted for name in [unit.name]}
    return {
        "environment": environment(), "seeds": args.seeds, "settings": own, "lacking": lacking,
        "rows": [{k: v for k, v in row.items() if k != "key"} for row in rows],
    }  # fmt: skip


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        raise ValueError(f"--set takes NAME=NUMBER, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="t2runtime.claims", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/claims"))
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="units at a time")
    parser.add_argument("--units", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--model", default="small", help="the base model")
    parser.add_argument("--stories", metavar="MODEL", help="folder of a model that tells stories")
    parser.add_argument("--data", metavar="FOLDER", help="data sets, one folder each")
    parser.add_argument(
        "--evidence", type=Path, metavar="FILE", help="evidence.json of `make evidence`"
    )
    help_set = 'settings of the units; "train.steps=1" of every training'
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=NUMBER", help=help_set)
    help_only = "claims.json files: judge and draw again, run nothing; a kind of unit that several "
    help_only += "have is taken from the last"
    parser.add_argument(
        "--report-only", type=Path, nargs="+", default=[], metavar="FILE", help=help_only
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
