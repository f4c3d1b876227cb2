"""`t2 train MODEL --task T --out EXPERT`: one expert by REINFORCE with KL."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime.evaluate import evaluate
from t2runtime.loading import load
from t2runtime.sources import source
from t2runtime.train import Config, Interrupted, train


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, measure base and expert on the test split, save the expert with its facts."""
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must end in .safetensors, got {args.out!r}")
    given = {
        f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)
    }
    cfg = Config(**given)
    problems = source(args.task, extract=args.extract)
    # Asked for now, so that a file without such lines is refused before anything is trained.
    problems(1, "train", cfg.seed)
    problems(1, "validation", cfg.seed)
    test = problems(256, "test", cfg.seed)
    model, tokenizer = load(args.model, args.dtype, args.device)
    t2k.convert(model, targets=targets(args.targets), rank=args.rank, decomposition=args.factors)
    folder = Path(args.run) if args.run else out.with_suffix("")
    out.parent.mkdir(parents=True, exist_ok=True)
    where = {"expert": str(out), "run": str(folder)}

    def save(expert: Any, **facts: Any) -> None:
        expert.description = f"{args.task} on {args.model}"
        expert.metadata |= {"task": args.task, "config": dataclasses.asdict(cfg), **facts}
        expert.save(out)

    try:
        expert = train(model, tokenizer, problems, cfg, folder, _progress)
    except Interrupted as stop:
        save(stop.expert, interrupted_at_step=stop.step + 1)
        return {
            **where, "interrupted_at_step": stop.step + 1, "validated": stop.validated,
            "exit_code": 130,
        }  # fmt: skip
    # Before the test, so that nothing which happens there can lose it.
    save(expert)
    base = evaluate(model, tokenizer, problems, test, cfg.max_new_tokens)
    bank = t2k.ExpertBank(model)
    bank.add("expert", expert)
    with bank.use("expert"):
        trained = evaluate(model, tokenizer, problems, test, cfg.max_new_tokens)
    save(expert, accuracy=trained.accuracy)
    return {
        **where,
        "base": {"accuracy": base.accuracy, "interval": base.interval},
        "trained": {"accuracy": trained.accuracy, "interval": trained.interval},
        "validation": {k: expert.metadata[k] for k in ("validation", "base_validation")},
        "problems": base.total,
    }


def targets(text: str) -> str | list[str]:
    """`a,b` names several layers; anything else goes through as it is.

    >>> targets("q_proj,v_proj")
    ['q_proj', 'v_proj']
    """
    return text.split(",") if "," in text and not set(text) & set("([{|\\") else text


def show(result: dict[str, Any]) -> str:
    """Base against expert."""
    if "interrupted_at_step" in result:
        which = "the best by validation so far" if result["validated"] else "not validated yet"
        return (
            f"interrupted at step {result['interrupted_at_step']}; the expert in "
            f"{result['expert']} is {which}, metrics in {result['run']}"
        )
    lines = [f"accuracy on {result['problems']} distinct held-out problems, with 95 % intervals:"]
    for name in ("base", "trained"):
        low, high = result[name]["interval"]
        lines.append(
            f"  {name:8s}{100 * result[name]['accuracy']:6.1f} %"
            f"  [{100 * low:.1f}, {100 * high:.1f}]"
        )
    return "\n".join([*lines, f"expert in {result['expert']}, metrics in {result['run']}"])


def _progress(line: dict[str, Any]) -> None:
    if "validation" in line:
        print(
            f"step {line['step']:4d}  sampled {line['sampled_accuracy']:.3f}  "
            f"validation {line['validation']:.3f}  KL {line['kl']:.3f}",
            file=sys.stderr,
        )
