"""`t2 classify MODEL --task T [--classifier FILE]`: how well pass 1 names categories, on the base
and under a classification expert.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.adapt.classifier import CategorySource
from t2runtime.adapt.confusion import Report, report
from t2runtime.adapt.prompt import SMALL, Categories, classify
from t2runtime.commands.train import targets
from t2runtime.loading import load
from t2runtime.sources import source
from t2runtime.tasks.files import FileSource

#: More different answers than this are no categories.
_MOST = 500


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the data first, then ask the same questions under each weights."""
    if args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    categories, questions, answers = asked(
        source(args.task, data=args.data), args.limit, args.split, args.seed
    )
    experts = {Path(file).stem: t2k.Expert.load(file) for file in args.classifier}
    model, tokenizer = load(args.model, args.dtype, args.device)
    t2k.convert(model, targets=targets(args.targets), decomposition=args.factors, progress=False)
    bank = t2k.ExpertBank(model)
    for name, expert in experts.items():
        bank.add(name, expert, allow_mismatch=args.allow_mismatch)
    reports: dict[str, Report] = {}
    for name, under in (("base", None), *((name, name) for name in experts)):
        verdicts = classify(model, tokenizer, bank, categories, questions, under, rows=args.rows)
        reports[name] = report(verdicts, answers)
    return {
        "task": args.task,
        "split": args.split,
        "reports": {name: one.facts() for name, one in reports.items()},
        "text": {name: str(one) for name, one in reports.items()},
    }


def asked(
    problems: Any, count: int, split: Any, seed: int
) -> tuple[Categories, list[str], list[str]]:
    """(categories, questions, right categories) of a source of category questions; of any other
    source whose answers are few, its prompts with the answers as categories.
    """
    if isinstance(problems, CategorySource):
        drawn = problems.questions(count, split, seed)
        return problems.categories, [p.prompt for p in drawn], [p.answer for p in drawn]
    drawn = problems(count, split, seed)
    prompts, answers = [p.prompt for p in drawn], [p.answer for p in drawn]
    if problems.name == tasks.category.NAME:
        return SMALL, [prompt.removeprefix(tasks.category.PREFIX) for prompt in prompts], answers
    if not isinstance(problems, FileSource):
        raise ValueError(
            f"--task must be 'category', 'category:a+b' or a file of labels, got {problems.name!r}"
        )
    names = {
        p.answer
        for part in tasks.SPLITS
        if problems.size(part)
        for p in problems(problems.size(part), part, seed)
    }
    names.discard(Categories.other)
    if len(names) > _MOST:
        raise ValueError(
            f"--task {problems.name!r} has {len(names)} different answers; up to {_MOST} can be "
            "categories"
        )
    return Categories(tuple(sorted(names)), "{question}"), prompts, answers


def show(result: dict[str, Any]) -> str:
    """One report after the other."""
    return "\n\n".join(f"{name}: {text}" for name, text in result["text"].items())
