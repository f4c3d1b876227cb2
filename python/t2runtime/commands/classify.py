"""`t2 classify MODEL --task T [--classifier FILE]`: how well pass 1 names categories, on the base
and under a classification expert, which is asked as it was in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.adapt.asking import trained_to_name
from t2runtime.adapt.classifier import CategorySource
from t2runtime.adapt.confusion import Report, report
from t2runtime.adapt.prompt import Categories, classify
from t2runtime.commands.eval import BASE
from t2runtime.commands.train import descriptions, targets
from t2runtime.loading import load
from t2runtime.sources import source
from t2runtime.tasks.files import FileSource

#: More different answers than this are no categories.
_MOST = 500


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the data first, then ask the same questions under each weights."""
    if args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    problems = source(
        args.task, data=args.data, small=args.model == "small", descriptions=descriptions(args)
    )
    categories, questions, answers = asked(problems, args.limit, args.split, args.seed)
    experts: dict[str, t2k.Expert] = {}
    for file in map(Path, args.classifier):
        if file.stem in (BASE, *experts):
            raise ValueError(f"--classifier: two rows would be called {file.stem!r}; rename a file")
        experts[file.stem] = t2k.Expert.load(file)
    rows = ways(categories, experts, set(answers))
    model, tokenizer = load(args.model, args.dtype, args.device)
    t2k.convert(model, targets=targets(args.targets), decomposition=args.factors, progress=False)
    bank = t2k.ExpertBank(model)
    for name, expert in experts.items():
        bank.add(name, expert, allow_mismatch=args.allow_mismatch)
    reports: dict[str, Report] = {}
    for name, (way, under) in rows.items():
        verdicts = classify(model, tokenizer, bank, way, questions, under, rows=args.rows)
        reports[name] = report(verdicts, answers)
    return {
        "task": args.task,
        "split": args.split,
        "reports": {name: one.facts() for name, one in reports.items()},
        "text": {name: str(one) for name, one in reports.items()},
    }


def ways(
    categories: Categories, experts: Mapping[str, t2k.Expert], answers: Set[str]
) -> dict[str, tuple[Categories, str | None]]:
    """{row: (what is asked, under which expert)}: each expert as it was asked in training, one that
    does not say how as the task asks; the base in the same ways.

    Raises ValueError for an expert that was not trained to name some of the `answers`.
    """
    found: dict[str, tuple[Categories, str | None]] = {}
    bases: list[Categories] = []
    for name, expert in experts.items():
        own = trained_to_name(expert, name) or categories
        missing = sorted(answers - set(own.all_names))
        if missing:
            raise ValueError(
                f"--task must ask for categories that the classifier {name!r} was trained to name, "
                f"{', '.join(own.all_names)}; got {', '.join(missing)}. Name the task's otherwise "
                "(NAME=TASK), or train it again"
            )
        if own not in bases:
            bases.append(own)
            label = BASE if len(bases) == 1 else f"{BASE}, asked as {name}"
            found[label] = (own, None)
        found[name] = (own, name)
    return found or {BASE: (categories, None)}


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
