"""`t2 eval MODEL --task T [--data FILE] [--expert E ...]`: greedy accuracy of the base and of each
expert, or LoRA, DoRA or IA3 in a folder of PEFT's.

With `--strategy S ...`, or several tasks, the rows are strategies of the engine over one mixed
batch: `t2runtime.compare`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime.adapt.asking import difference, trained_to_name
from t2runtime.adapt.classifier import CategorySource
from t2runtime.adapt.mixtures import load_mixtures
from t2runtime.commands.generate import loaded
from t2runtime.commands.train import targets
from t2runtime.compare import check_searches, compare, text_table
from t2runtime.engine import STRATEGIES
from t2runtime.evaluate import Score, evaluate
from t2runtime.formats.saved import kind_of, refuse, with_adapter
from t2runtime.loading import load
from t2runtime.options import at_least_one, expert_files, search_settings, task_data
from t2runtime.sources import sources
from t2runtime.tasks import Source

BASE = "base"
#: The base weights as a strategy.
NONE = "none"
_NEEDED_BY = {
    ("classifier", "record"): "classifier",
    ("few-shot",): "mixtures",
    ("router",): "router",
    ("record",): "record",
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the data first, then score the same problems in every way."""
    at_least_one(args, "limit", "rows", "shots", "max_new_tokens")
    named = sources(args.task, **task_data(args))
    if args.strategy or len(named) > 1:
        return _strategies(args, named)
    for option in ("classifier", "mixtures", "router", "record", "base-answers"):
        if getattr(args, option.replace("-", "_")):
            raise ValueError(f"--{option} is for --strategy: say which are to be compared")
    (task,) = named.values()
    return _alone(args, task)


def _strategies(args: argparse.Namespace, named: Mapping[str, Source]) -> dict[str, Any]:
    """Strategies of the engine on all tasks."""
    known = (*STRATEGIES, NONE, *expert_files(args.expert))
    words = args.strategy or [NONE, *expert_files(args.expert)]
    for word in words:
        if word not in known:
            raise ValueError(f"--strategy must be one of {', '.join(known)}; got {word!r}")
    if set(words) != {NONE} and not args.expert:
        raise ValueError(f"--strategy {words[0]} needs at least one --expert to choose from")
    for word, option in _NEEDED_BY.items():
        if getattr(args, option) and not set(word) & set(words):
            raise ValueError(f"--{option} is for --strategy {' or '.join(word)}; leave it out")
    if "classifier" in words and not args.classifier:
        raise ValueError("--strategy classifier needs --classifier FILE, the expert of pass 1")
    mixtures = load_mixtures(args.mixtures) if args.mixtures else None
    if "few-shot" in words and mixtures is None:  # now, so that no other strategy's work is lost
        check_searches(
            named, args.method, args.shots, args.shots_from, args.seed, _size(args),
            search_settings(args),
        )  # fmt: skip
    t2, _ = loaded(args)
    rows = compare(
        t2, named, [None if word == NONE else word for word in words], split=args.split,
        problems=args.limit, mixtures=mixtures, methods=args.method, shots=args.shots,
        shots_from=args.shots_from, max_new_tokens=args.max_new_tokens, seed=args.seed,
        rows=args.rows, progress=True, **search_settings(args),
    )  # fmt: skip
    return {
        "model": args.model,
        "tasks": list(named),
        "split": args.split,
        "problems": rows[0].score.total,
        "rows_per_batch": args.rows,
        "skipped_lines": sum(getattr(task, "skipped", 0) for task in named.values()),
        "repeated_prompts": sum(getattr(task, "repeated", 0) for task in named.values()),
        "strategies": [row.facts() for row in rows],
    }


def _size(args: argparse.Namespace) -> int | None:
    """Weights in a member of a search, as far as that is known without the model."""
    sorter = Path(args.classifier).resolve() if args.classifier else None
    paths = [path.resolve() for path, _ in expert_files(args.expert).values()]
    return len([path for path in paths if path != sorter]) if args.per == "expert" else None


def _alone(args: argparse.Namespace, task: Source) -> dict[str, Any]:
    """The base, each expert, each adapter of PEFT."""
    problems = task(args.limit, args.split, args.seed)
    given = _experts(args.expert)
    if isinstance(task, CategorySource):
        _asked_alike(task, given)
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


def _asked_alike(task: CategorySource, given: Mapping[str, t2k.Expert | Path]) -> None:
    """Refuse classification experts that were trained on another question than the task's."""
    for name, expert in given.items():
        own = trained_to_name(expert, name) if isinstance(expert, t2k.Expert) else None
        if own is not None and (differs := difference(own, task.categories)):
            raise ValueError(
                f"expert {name!r} was trained on another question: {differs}. `t2 classify` asks "
                "each classification expert what it was trained on"
            )


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
    name = result.get("task") or " + ".join(result["tasks"])
    lines = [
        f"{name}, {result['problems']} distinct {result['split']} problems, greedy, 95 % intervals"
    ]
    if result["skipped_lines"]:
        lines.append(f"{result['skipped_lines']} broken lines of the data were left out")
    if result["repeated_prompts"]:
        lines.append(f"{result['repeated_prompts']} held-out rows repeated a prompt: left out")
    if "strategies" in result:
        left = result["strategies"][0]["left_out"]
        if left:
            lines.append(
                f"{left} of the problems drawn were left out: a strategy was found with them"
            )
        return "\n".join([*lines, text_table(result["strategies"])])
    width = max(map(len, result["scores"]))
    for name, score in result["scores"].items():
        low, high = (100 * bound for bound in score["interval"])
        gain = "" if name == BASE else f"  {score['points_over_base']:+6.1f} points"
        lines.append(
            f"  {name:{width}s}{100 * score['accuracy']:8.1f} %  [{low:5.1f}, {high:5.1f}]{gain}"
        )
    return "\n".join(lines)
