"""`t2 generate MODEL --expert FILE[=WEIGHT] --prompt ... [--strategy S]`: one mixture for all
prompts, or one that pass 1 chooses for each.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime.adapt.weights import Mixture
from t2runtime.commands.train import targets
from t2runtime.engine import Transformer2
from t2runtime.options import at_least_one, expert_files
from t2runtime.sources import task_name

#: The mixture that the weights of --expert say, and no pass 1.
FIXED = "fixed"


def check(args: argparse.Namespace) -> None:
    """Raise for options that do not go together, before anything is loaded."""
    at_least_one(args, "max_new_tokens")
    if args.strategy == "classifier" and not args.classifier:
        raise ValueError("--strategy classifier needs --classifier FILE, the expert of pass 1")
    if args.classifier and args.strategy not in ("classifier", "record"):
        raise ValueError(
            "--classifier is for pass 1: give --strategy classifier or record, or leave it out"
        )
    if args.base_answers and args.strategy not in ("prompt", "classifier", "mixture"):
        raise ValueError(
            "--base-answers is for categories of --strategy prompt, classifier or mixture, got "
            f"{args.strategy}"
        )
    for name in ("router", "record"):
        if (args.strategy == name) != bool(getattr(args, name)):
            raise ValueError(
                f"--strategy {name} and --{name} FILE, what `t2 adapt --method {name}` wrote, "
                "go together: give both or none"
            )
    if args.strategy == "few-shot" and not (args.mixtures and args.task):
        raise ValueError("--strategy few-shot needs --mixtures FOLDER and --task NAME")
    if (args.mixtures or args.task) and args.strategy != "few-shot":
        raise ValueError("--mixtures and --task are for --strategy few-shot")
    if args.strategy != FIXED and not args.expert:
        raise ValueError(f"--strategy {args.strategy} needs at least one --expert to choose from")


def engine(args: argparse.Namespace) -> tuple[Transformer2, str | dict[str, float] | None]:
    """The model with the bank that the options describe, and what `generate` is told."""
    check(args)
    args.task = args.task and task_name(args.task)
    t2, weights = loaded(args, args.mixtures)
    return t2, (weights or None) if args.strategy == FIXED else args.strategy


def loaded(
    args: argparse.Namespace, mixtures: str | None = None
) -> tuple[Transformer2, dict[str, float]]:
    """The model with its bank and what else the options name; {expert: weight} as given."""
    given = expert_files(args.expert)
    experts = {name: t2k.Expert.load(path) for name, (path, _) in given.items()}
    weights = {name: weight for name, (_, weight) in given.items()}
    meant: dict[str, Mixture] = {
        name: {name: weight} for name, weight in weights.items() if weight != 1
    }
    meant |= dict.fromkeys(args.base_answers)
    classifier = Path(args.classifier) if args.classifier else None
    if classifier and classifier.resolve() in (path.resolve() for path, _ in given.values()):
        classifier = Path(classifier.stem)  # one of a folder of experts: loaded already
    t2 = Transformer2.from_pretrained(
        args.model, experts, targets=targets(args.targets), dtype=args.dtype, device=args.device,
        factors=args.factors, classifier=classifier, allow_mismatch=args.allow_mismatch,
        mixtures=mixtures or meant, router=args.router, record=args.record, chat=args.chat,
        row_order=args.row_order,
    )  # fmt: skip
    return t2, weights


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, convert, fill the bank, answer all prompts."""
    if not args.prompt:
        raise ValueError("--prompt must be given at least once")
    at_least_one(args, "rows")
    t2, strategy = engine(args)
    outputs = t2.generate(
        args.prompt, strategy, max_new_tokens=args.max_new_tokens, stop=args.stop, task=args.task,
        batch_size=args.rows,
    )  # fmt: skip
    rows = [
        {"prompt": prompt, **dataclasses.asdict(output)}
        for prompt, output in zip(args.prompt, outputs, strict=True)
    ]
    return {"outputs": rows, "exit_code": int(any(output.error for output in outputs))}


def who(row: dict[str, Any]) -> str:
    """Which experts answered, and how sure pass 1 was.

    >>> who({"mixture": {"math": 0.5}, "category": "math", "probabilities": {"math": 0.75}})
    'math 0.50; pass 1: math 75 %'
    >>> who({"mixture": None, "category": None, "probabilities": None})
    'base'
    """
    mixture = row["mixture"]
    if isinstance(mixture, dict) and "task" in mixture:
        answered = f"found for {mixture['task']}"
    elif isinstance(mixture, dict):
        answered = " + ".join(f"{name} {weight:.2f}" for name, weight in mixture.items())
    else:
        answered = mixture or "base"
    if row["probabilities"] is None:
        return answered
    likely = sorted(row["probabilities"].items(), key=lambda item: -item[1])[:3]
    said = ", ".join(f"{name} {100 * share:.0f} %" for name, share in likely if share >= 0.005)
    return f"{answered}; pass 1: {said}"


def show(result: dict[str, Any]) -> str:
    """One block per prompt."""
    return "\n\n".join(
        # As the shell gave it: what is no text in it cannot be printed, and is the row's error.
        f"[{who(row)}] {row['prompt'].encode('utf-8', 'backslashreplace').decode()}\n"
        + (f"error: {row['error']}" if row["error"] else row["text"])
        for row in result["outputs"]
    )
