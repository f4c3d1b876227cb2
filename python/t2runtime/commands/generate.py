"""`t2 generate MODEL --expert FILE[=WEIGHT] --prompt ...`: one mixture for all prompts, or two
passes.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import t2kernels as t2k
from t2runtime.adapt.prompt import SMALL, Categories
from t2runtime.commands.train import targets
from t2runtime.engine import TwoPass
from t2runtime.generation import complete, room
from t2runtime.loading import load

_CLASSIFIER = "classifier"


def parse_expert(text: str) -> tuple[Path, float]:
    """FILE or FILE=WEIGHT.

    >>> parse_expert("math.safetensors=0.7")
    (PosixPath('math.safetensors'), 0.7)
    """
    path, sign, weight = text.rpartition("=")
    if not sign:
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise ValueError(
            f"--expert must be FILE or FILE=WEIGHT with a number, got {text!r}"
        ) from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, convert, fill the bank with the files given (named after them), generate."""
    if not args.prompt:
        raise ValueError("--prompt must be given at least once")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    weights: dict[str, float] = {}
    experts: dict[str, Any] = {}
    for path, weight in map(parse_expert, args.expert):
        if path.stem in experts:
            raise ValueError(f"--expert: two files are called {path.stem!r}; rename one")
        experts[path.stem], weights[path.stem] = t2k.Expert.load(path), weight
    if args.two_pass and not experts:
        raise ValueError("--two-pass needs at least one --expert to choose from")
    if args.classifier and not args.two_pass:
        raise ValueError("--classifier is for pass 1: give --two-pass as well, or leave it out")
    if args.two_pass and args.chat != "auto":
        raise ValueError(
            f"--chat is not for --two-pass, which decides by the model; got {args.chat}"
        )
    model, tokenizer = load(args.model, args.dtype, args.device)
    t2k.convert(model, targets=targets(args.targets), decomposition=args.factors)
    new_tokens = args.max_new_tokens or room(model, tokenizer, args.prompt, 64, args.chat)
    bank = t2k.ExpertBank(model)
    for name, expert in experts.items():
        bank.add(name, expert, allow_mismatch=args.allow_mismatch)
    if not args.two_pass:
        with bank.use(weights or None):
            texts = complete(model, tokenizer, args.prompt, new_tokens, chat=args.chat).texts
        rows = [
            {"prompt": p, "text": t, "mixture": weights or None}
            for p, t in zip(args.prompt, texts, strict=True)
        ]
        return {"outputs": rows}
    if args.classifier:
        classifier = t2k.Expert.load(args.classifier)
        bank.add(_CLASSIFIER, classifier, allow_mismatch=args.allow_mismatch)
    categories = (
        dataclasses.replace(SMALL, names=tuple(experts))
        if args.model == "small"
        else Categories(tuple(experts))
    )
    mixtures = {name: {name: weight} for name, weight in weights.items()}
    engine = TwoPass(
        model, tokenizer, bank, categories, _CLASSIFIER if args.classifier else None, mixtures
    )
    outputs = engine.generate(args.prompt, new_tokens)
    return {
        "outputs": [
            {"prompt": p, **dataclasses.asdict(output)}
            for p, output in zip(args.prompt, outputs, strict=True)
        ]
    }


def show(result: dict[str, Any]) -> str:
    """One block per prompt."""
    blocks = []
    for row in result["outputs"]:
        category = f" ({row['category']})" if "category" in row else ""
        blocks.append(f"[{row['mixture'] or 'base'}{category}] {row['prompt']}\n{row['text']}")
    return "\n\n".join(blocks)
