"""`t2 adapt MODEL --task T --expert E ... --out MIXTURE`: a mixture of experts from a few shots."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2kernels.files import check_name
from t2runtime.adapt.fewshot import FewShot, search
from t2runtime.adapt.mixtures import load_mixture, save_mixture
from t2runtime.adapt.shots import gain
from t2runtime.commands.train import targets
from t2runtime.loading import load
from t2runtime.sources import source


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read the data, search on the shots, save, score base and mixture on what is no shot."""
    for option in ("shots", "limit", "rows"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1, got {getattr(args, option)}")
    task = source(
        args.task,
        data=args.data,
        extract=args.extract,
        on_bad_lines="skip" if args.skip_bad_lines else "error",
    )
    name = check_name(args.name or task.name, "task")  # now, so that no search is lost by it
    shots = task(args.shots, args.shots_from, args.seed)
    more = args.shots if args.shots_from == "test" else 0
    problems = task(args.limit + more, "test", args.seed)
    experts = {path.stem: t2k.Expert.load(path) for path in files(args.expert)}
    model, tokenizer = load(args.model, args.dtype, args.device)
    t2k.convert(model, targets=targets(args.targets), decomposition=args.factors, progress=False)
    bank = t2k.ExpertBank(model)
    for stem, expert in experts.items():
        bank.add(stem, expert, allow_mismatch=args.allow_mismatch)
    new_tokens = args.max_new_tokens or task.max_new_tokens
    began = time.perf_counter()
    found = search(
        model, tokenizer, bank, list(experts), shots, new_tokens, method=args.method, per=args.per,
        population=args.population, elites=args.elites, generations=args.generations,
        budget=args.budget, rows_per_batch=args.rows_per_batch, low=args.low, high=args.high,
        l1=args.l1, l2=args.l2, grader=task, seed=args.seed, chat=args.chat,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    # Saved before it is scored: an interrupted evaluation loses nothing.
    facts = {"shots": len(shots), "shots_from": args.shots_from, "model": args.model}
    path = save_mixture(args.out, found.saved(name, **facts))
    reached = gain(
        model, tokenizer, bank, load_mixture(path).alpha(bank), problems, shots, new_tokens, task,
        rows=args.rows, chat=args.chat,
    )  # fmt: skip
    return {
        "model": args.model,
        "task": task.name,
        "mixture": str(path),
        "method": found.method,
        "per": args.per,
        "weights": found.weights,
        "shots": len(shots),
        "shots_from": args.shots_from,
        "forwards": found.forwards,
        "budget": found.budget,
        "seconds": seconds,
        "on_shots": dict(zip(("accuracy", "log_likelihood"), found.search.score, strict=True)),
        "leaked": reached.leaked,
        "problems": reached.base.total,
        "scores": {
            row: {"accuracy": s.accuracy, "interval": s.interval, "right": s.right}
            for row, s in (("base", reached.base), ("mixture", reached.mixture))
        },
        "mean_weights": _means(found),
    }


def files(given: list[str]) -> list[Path]:
    """Expert files by distinct names; a folder stands for its *.safetensors."""
    found: list[Path] = []
    for path in map(Path, given):
        inside = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"--expert: the folder {path} holds no *.safetensors")
        found += inside
    if not found:
        raise ValueError("--expert must be given at least once: the experts to mix")
    twice = {path.stem for path in found if [p.stem for p in found].count(path.stem) > 1}
    if twice:
        raise ValueError(f"--expert: two files are called {', '.join(sorted(twice))}; rename one")
    return found


def _means(found: FewShot) -> dict[str, float]:
    """{expert: weight}, over the layers' mean where each has its own."""
    alpha = found.alpha if found.alpha.dim() == 1 else found.alpha.mean(0)
    weights = dict(zip(found.space.bank.names, alpha.tolist(), strict=True))
    return {name: weights[name] for name in found.space.names}


def show(result: dict[str, Any]) -> str:
    """What was found, what it cost, and what it gains."""
    weights = ", ".join(f"{name} {w:.2f}" for name, w in result["mean_weights"].items())
    mean = " (mean over the layers)" if result["per"] == "layer" else ""
    lines = [
        f"{result['task']}: {result['method']} on {result['shots']} shots of the "
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
    return "\n".join([*lines, f"  saved: {result['mixture']}"])
