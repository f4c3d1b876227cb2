"""`t2 eval MODEL --task T [--data FILE] [--expert E ...]`: greedy accuracy of the base and of each
expert.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime.commands.train import targets
from t2runtime.evaluate import Score, evaluate
from t2runtime.loading import load
from t2runtime.sources import source

BASE = "base"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the data first, then score the same problems under the base and each expert."""
    if args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    if args.rows < 1:
        raise ValueError(f"--rows must be at least 1, got {args.rows}")
    task = source(
        args.task,
        data=args.data,
        extract=args.extract,
        on_bad_lines="skip" if args.skip_bad_lines else "error",
    )
    problems = task(args.limit, args.split, args.seed)
    experts: dict[str, Any] = {}
    for path in map(Path, args.expert):
        if path.stem in experts or path.stem == BASE:
            raise ValueError(f"--expert: two rows would be called {path.stem!r}; rename a file")
        experts[path.stem] = t2k.Expert.load(path)
    model, tokenizer = load(args.model, args.dtype, args.device)
    new_tokens = args.max_new_tokens or task.max_new_tokens
    scores: dict[str, Score] = {}
    if experts:
        t2k.convert(model, targets=targets(args.targets), decomposition=args.factors)
        bank = t2k.ExpertBank(model)
        for name, expert in experts.items():
            bank.add(name, expert, allow_mismatch=args.allow_mismatch)
    scores[BASE] = evaluate(model, tokenizer, task, problems, new_tokens, rows=args.rows)
    for name in experts:
        with bank.use(name):
            scores[name] = evaluate(model, tokenizer, task, problems, new_tokens, rows=args.rows)
    return {
        "model": args.model,
        "task": task.name,
        "split": args.split,
        "problems": len(problems),
        "max_new_tokens": new_tokens,
        "skipped_lines": getattr(task, "skipped", 0),
        "scores": {
            name: {
                "accuracy": score.accuracy,
                "interval": score.interval,
                "right": score.right,
                "points_over_base": 100 * (score.accuracy - scores[BASE].accuracy),
            }
            for name, score in scores.items()
        },
    }


def show(result: dict[str, Any]) -> str:
    """One table."""
    lines = [
        f"{result['task']}, {result['problems']} distinct {result['split']} problems, greedy, "
        "95 % intervals"
    ]
    if result["skipped_lines"]:
        lines.append(f"{result['skipped_lines']} broken lines of the data were left out")
    width = max(map(len, result["scores"]))
    for name, score in result["scores"].items():
        low, high = (100 * bound for bound in score["interval"])
        gain = "" if name == BASE else f"  {score['points_over_base']:+6.1f} points"
        lines.append(
            f"  {name:{width}s}{100 * score['accuracy']:8.1f} %  [{low:5.1f}, {high:5.1f}]{gain}"
        )
    return "\n".join(lines)
