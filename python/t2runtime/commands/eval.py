"""`t2 eval MODEL --task T [--data FILE] [--expert E ...]`: greedy accuracy of the base and of each
expert, or LoRA, DoRA or IA3 in a folder of PEFT's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime.commands.train import targets
from t2runtime.evaluate import Score, evaluate
from t2runtime.formats.saved import kind_of, refuse, with_adapter
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
    given = _experts(args.expert)
    model, tokenizer = load(args.model, args.dtype, args.device)
    new_tokens = args.max_new_tokens or task.max_new_tokens
    score = partial(
        evaluate, model, tokenizer, task, problems, new_tokens, rows=args.rows, chat=args.chat
    )
    scores: dict[str, Score] = {BASE: score(label=BASE)}
    for name, adapter in given.items():
        if isinstance(adapter, Path):
            with with_adapter(model, adapter):
                scores[name] = score(label=name)
    experts = {name: e for name, e in given.items() if isinstance(e, t2k.Expert)}
    if experts:
        t2k.convert(model, targets=targets(args.targets), decomposition=args.factors)
        bank = t2k.ExpertBank(model)
        for name, expert in experts.items():
            bank.add(name, expert, allow_mismatch=args.allow_mismatch)
    for name in experts:
        with bank.use(name):
            scores[name] = score(label=name)
    return {
        "model": args.model,
        "task": task.name,
        "split": args.split,
        "problems": len(problems),
        "max_new_tokens": new_tokens,
        "skipped_lines": getattr(task, "skipped", 0),
        "repeated_prompts": getattr(task, "repeated", 0),
        "scores": {
            name: {
                "accuracy": scores[name].accuracy,
                "interval": scores[name].interval,
                "right": scores[name].right,
                "points_over_base": 100 * (scores[name].accuracy - scores[BASE].accuracy),
            }
            for name in (BASE, *given)
        },
    }


def _experts(paths: Sequence[str]) -> dict[str, t2k.Expert | Path]:
    """By name: an expert that was read, or the folder of an adapter."""
    found: dict[str, t2k.Expert | Path] = {}
    for path in map(Path, paths):
        name = path.stem if path.suffix == ".safetensors" else path.name
        if name in found or name == BASE:
            raise ValueError(f"--expert: two rows would be called {name!r}; rename a file")
        if path.is_dir() and kind_of(path) != "adapter":
            raise refuse(path, "an expert file or the folder of an adapter of PEFT")
        found[name] = path if path.is_dir() else t2k.Expert.load(path)
    return found


def show(result: dict[str, Any]) -> str:
    """One table."""
    lines = [
        f"{result['task']}, {result['problems']} distinct {result['split']} problems, greedy, "
        "95 % intervals"
    ]
    if result["skipped_lines"]:
        lines.append(f"{result['skipped_lines']} broken lines of the data were left out")
    if result["repeated_prompts"]:
        lines.append(f"{result['repeated_prompts']} held-out rows repeated a prompt: left out")
    width = max(map(len, result["scores"]))
    for name, score in result["scores"].items():
        low, high = (100 * bound for bound in score["interval"])
        gain = "" if name == BASE else f"  {score['points_over_base']:+6.1f} points"
        lines.append(
            f"  {name:{width}s}{100 * score['accuracy']:8.1f} %  [{low:5.1f}, {high:5.1f}]{gain}"
        )
    return "\n".join(lines)
