"""`t2 adapt MODEL --task T --expert E ... --out MIXTURE`: a mixture of experts from a few shots.

With `--method router` or `record` what is made, of one task or several, decides for every question.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2kernels.files import check_name
from t2runtime.adapt.asking import tell_unnamed
from t2runtime.adapt.fewshot import FewShot, check_search, search
from t2runtime.adapt.mixtures import load_mixture, mixture_path, save_mixture
from t2runtime.adapt.record import Record, record_of_tasks
from t2runtime.adapt.router import Router, RouterConfig, train_router
from t2runtime.adapt.shots import draw_shots, held_out
from t2runtime.commands.train import targets
from t2runtime.compare import compare, text_table
from t2runtime.engine import Transformer2
from t2runtime.options import at_least_one, expert_files, search_settings, task_data
from t2runtime.sources import sources
from t2runtime.tasks import Source


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the data, find and save, then score what was found beside the base."""
    at_least_one(args, "shots", "problems", "limit", "rows", "max_new_tokens", "steps")
    named = sources(args.task, **task_data(args))
    if args.method in ("router", "record"):
        return _learned(args, named)
    if len(named) > 1:
        raise ValueError(
            f"--method {args.method} finds the mixture of one --task, got {', '.join(named)}. "
            "Run it for each, or use --method router or record"
        )
    (task,) = named.values()
    return _mixture(args, task)


def _mixture_name(said: str | None, task: str) -> str:
    """What the mixture is called; ValueError for what is no name of a file."""
    try:
        return check_name(said or task, "task")
    except ValueError as error:
        raise ValueError(f"{error} Call it otherwise: --task NAME={task}") from None


def experts_to_mix(args: argparse.Namespace) -> int | None:
    """Weights in a member of a search, as far as that is known without the model."""
    return len(files(args.expert)) if args.per == "expert" else None


def _engine(args: argparse.Namespace) -> Transformer2:
    """The model with the experts that may be chosen."""
    experts = {path.stem: t2k.Expert.load(path) for path in files(args.expert)}
    return Transformer2.from_pretrained(
        args.model, experts, targets=targets(args.targets), dtype=args.dtype, device=args.device,
        factors=args.factors, allow_mismatch=args.allow_mismatch, chat=args.chat,
        row_order=args.row_order,
    )  # fmt: skip


def _learned(args: argparse.Namespace, named: Mapping[str, Source]) -> dict[str, Any]:
    """A router or a record: from training or validation splits, scored on test problems."""
    out, ending = Path(args.out), ".safetensors" if args.method == "router" else ".json"
    if out.suffix != ending:
        raise ValueError(f"--out must be a file that ends in {ending}, got {args.out!r}")
    if args.name is not None:
        raise ValueError(
            f"--name is for the mixture of a search, --method {args.method} takes its tasks' own "
            f"names, got {args.name!r}. Call a task otherwise by --task NAME=TASK"
        )
    replaced = _replaces(out)
    t2 = _engine(args)
    unnamed = tell_unnamed(t2.categories, named) if args.method == "record" else []
    names, began = list(t2.bank.names), time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.method == "router":
        cfg = RouterConfig(steps=args.steps, high=args.high, l1=args.l1, seed=args.seed)
        made = train_router(
            t2.model, t2.tokenizer, t2.bank, names, list(named.values()), cfg, chat=t2.chat,
            max_new_tokens=args.max_new_tokens,
        )  # fmt: skip
        made.save(out)
        t2.router = Router.load(out)
    else:
        record = record_of_tasks(
            t2.model, t2.tokenizer, t2.bank, names, named, args.problems, rows=args.rows,
            max_new_tokens=args.max_new_tokens, seed=args.seed, chat=t2.chat,
        )  # fmt: skip
        record.save(out)
        t2.record = Record.load(out)
    seconds = time.perf_counter() - began
    rows = compare(
        t2, named, [None, args.method], problems=args.limit, seed=args.seed, rows=args.rows,
        max_new_tokens=args.max_new_tokens,
    )  # fmt: skip
    return {
        "model": args.model,
        "tasks": list(named),
        "method": args.method,
        "file": str(out),
        "replaced": replaced,
        "seconds": seconds,
        "problems": rows[0].score.total,
        "leaked": rows[0].left_out,
        "chosen": {task: t2.record.choose(task) for task in named} if t2.record else None,
        "never_named": unnamed,
        "strategies": [row.facts() for row in rows],
    }


def _mixture(args: argparse.Namespace, task: Source) -> dict[str, Any]:
    """The mixture of a task, by a search on its shots."""
    name = _mixture_name(args.name, task.name)  # now, so that no search is lost by it
    shots = draw_shots(task, args.shots, args.shots_from, args.seed)
    more = args.shots if args.shots_from == "test" else 0
    held_out(task(args.limit + more, "test", args.seed), shots)  # raises now, not after the search
    check_search(args.method, len(shots), experts_to_mix(args), **search_settings(args))
    out = Path(args.out)
    replaced = _replaces(out if out.suffix == ".json" else mixture_path(out, name))
    t2 = _engine(args)
    model, tokenizer, bank = t2.model, t2.tokenizer, t2.bank
    new_tokens = args.max_new_tokens or task.max_new_tokens
    began = time.perf_counter()
    found = search(
        model, tokenizer, bank, list(bank.names), shots, new_tokens, method=args.method,
        grader=task, seed=args.seed, chat=args.chat, **search_settings(args),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    # Saved before it is scored: an interrupted evaluation loses nothing.
    facts = {"shots": len(shots), "shots_from": args.shots_from, "model": args.model}
    path = save_mixture(args.out, found.saved(name, **facts))
    rows = compare(
        t2, {task.name: task}, [None, "few-shot"], mixtures={task.name: load_mixture(path)},
        problems=args.limit, shots=args.shots, shots_from=args.shots_from, rows=args.rows,
        max_new_tokens=args.max_new_tokens, seed=args.seed,
    )  # fmt: skip
    return {
        "model": args.model,
        "task": task.name,
        "mixture": str(path),
        "replaced": replaced,
        "method": found.method,
        "per": args.per,
        "weights": found.weights,
        "shots": len(shots),
        "shots_asked": args.shots,
        "shots_from": args.shots_from,
        "forwards": found.forwards,
        "budget": found.budget,
        "seconds": seconds,
        "on_shots": dict(zip(("accuracy", "log_likelihood"), found.search.score, strict=True)),
        "leaked": rows[0].left_out,
        "problems": rows[0].score.total,
        "scores": {
            name: {"accuracy": s.accuracy, "interval": s.interval, "right": s.right}
            for name, s in zip(("base", "mixture"), (row.score for row in rows), strict=True)
        },
        "mean_weights": _means(found),
    }


def _replaces(path: Path) -> bool:
    """Whether a file is there already; it is said before the work, in time to stop it."""
    if path.exists():
        print(f"t2 adapt: note: {path} is there and will be replaced", file=sys.stderr)
    return path.exists()


def files(given: list[str]) -> list[Path]:
    """Expert files by distinct names; a folder stands for its *.safetensors."""
    if not given:
        raise ValueError("--expert must be given at least once: the experts to mix")
    return [path for path, _ in expert_files(given, weighted=False).values()]


def _means(found: FewShot) -> dict[str, float]:
    """{expert: weight}, over the layers' mean where each has its own."""
    alpha = found.alpha if found.alpha.dim() == 1 else found.alpha.mean(0)
    weights = dict(zip(found.space.bank.names, alpha.tolist(), strict=True))
    return {name: weights[name] for name in found.space.names}


def show(result: dict[str, Any]) -> str:
    """What was found, what it cost, and what it gains."""
    if "strategies" in result:
        return _show_learned(result)
    weights = ", ".join(f"{name} {w:.2f}" for name, w in result["mean_weights"].items())
    mean = " (mean over the layers)" if result["per"] == "layer" else ""
    fewer = result["shots"] < result["shots_asked"]
    asked = f" ({result['shots_asked']} were asked for)" if fewer else ""
    lines = [
        f"{result['task']}: {result['method']} on {result['shots']} shots{asked} of the "
        f"{result['shots_from']} split, {result['forwards']:,} forwards of {result['budget']:,} in "
        f"{result['seconds']:.1f} s",
        f"  weights{mean}: {weights}",
        f"  on the shots: {100 * result['on_shots']['accuracy']:.1f} % right, log-likelihood "
        f"{result['on_shots']['log_likelihood']:.3f}",
        f"  on {result['problems']} test problems without the shots ({result['leaked']} left out), "
        "95 % intervals:",
    ]
    for name, score in result["scores"].items():
        low, high = (100 * bound for bound in score["interval"])
        lines.append(f"    {name:8s}{100 * score['accuracy']:6.1f} %  [{low:5.1f}, {high:5.1f}]")
    return "\n".join([*lines, f"  saved: {result['mixture']}{_instead(result)}"])


def _show_learned(result: dict[str, Any]) -> str:
    """What was made, from what, and the base beside it."""
    lines = [f"{' + '.join(result['tasks'])}: {result['method']} made in {result['seconds']:.1f} s"]
    if result["chosen"]:
        said = ", ".join(f"{task} {name or 'base'}" for task, name in result["chosen"].items())
        lines.append(f"  speaks for: {said}")
    if result["never_named"]:
        lines.append(
            f"  pass 1 names experts of the bank, so never {', '.join(result['never_named'])}: "
            "what the record says of them is of no use. Call a task like the expert of its "
            "category: --task NAME=TASK"
        )
    lines.append(
        f"  on {result['problems']} test problems without those it was made with "
        f"({result['leaked']} left out), 95 % intervals:"
    )
    table = text_table(result["strategies"])
    return "\n".join([*lines, table, f"  saved: {result['file']}{_instead(result)}"])


def _instead(result: dict[str, Any]) -> str:
    return ", in place of the one that was there" if result["replaced"] else ""
