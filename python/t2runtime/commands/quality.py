"""`t2 quality MODEL [--text FILE | --task T ...] [--kinds int8 fp8] [--expert FILE]`: what 8-bit
factors do to a model beside bfloat16: perplexity, KL to the original, greedy drift.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import t2kernels as t2k
from t2runtime.commands.train import targets
from t2runtime.loading import load
from t2runtime.options import at_least_one, task_data
from t2runtime.prompts import context_length
from t2runtime.quality import (
    Text,
    answered,
    compare_texts,
    continuations,
    drift,
    new_tokens_that_fit,
    own_texts,
    windows,
)
from t2runtime.sources import sources
from t2runtime.tasks import SKILLS

#: The row of the model's own dtype in factorised form, W dropped.
FACTORS = "factors"
BF16 = "bfloat16"
_EXPERT = "expert"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Texts first, then one row after the other beside the original."""
    at_least_one(args, "limit", "rows", "max_new_tokens")
    if args.limit < 2 or args.tokens < 8:
        raise ValueError("--limit must be at least 2 and --tokens at least 8")
    unknown = [kind for kind in args.kinds or () if kind not in t2k.FACTOR_KINDS]
    if unknown:
        raise ValueError(f"--kinds must be of {', '.join(t2k.FACTOR_KINDS)}; got {unknown[0]!r}")
    expert = t2k.Expert.load(args.expert) if args.expert else None
    original, tokenizer = load(args.model, args.dtype, args.device)
    tokens = min(args.tokens, context_length(original) or args.tokens)
    named, texts = _texts(args, original, tokenizer, tokens)
    # The factors once, for every row; and under an expert the original is factorised too.
    factorised, _ = load(args.model, args.dtype, args.device)
    report = _convert(args, factorised, args.factors, None, keep_weight=expert is not None)
    found = {name: layer.factors for name, layer in t2k.svf_layers(factorised).items()}
    if expert is not None:
        original = factorised
    new = new_tokens_that_fit(original, texts, args.max_new_tokens)
    with _under(args, original, expert):
        before = continuations(original, tokenizer, texts, new, rows=args.rows)
    rows = {}
    for label, model in _changed(args, original, factorised, found):
        with _under(args, original, expert), _under(args, model, expert):
            sums = compare_texts(original, model, texts, rows=args.rows)
            after = continuations(model, tokenizer, texts, new, rows=args.rows)
        rows[label] = {**sums.facts(), **drift(before, after)}
    return {
        "model": args.model,
        "dtype": str(original.dtype).removeprefix("torch."),
        "expert": args.expert,
        "text": named,
        "texts": len(texts),
        "tokens_scored": sum(len(text.ids) - text.scored for text in texts),
        "new_tokens": new,
        "layers": len(report.converted),
        "rows": rows,
    }


def _texts(
    args: argparse.Namespace, model: Any, tokenizer: Any, tokens: int
) -> tuple[str, list[Text]]:
    """What the texts are called, and they: a file's, tasks' answers, or the model's own."""
    if args.text and args.task:
        raise ValueError("--text and --task exclude each other: leave one out")
    if args.text:
        return Path(args.text).name, windows(tokenizer, Path(args.text), tokens, args.limit)
    # The small model was trained on answers, and can sample no question.
    tasks = args.task or (list(SKILLS) if args.model == "small" else [])
    if not tasks:
        found = own_texts(model, tokenizer, tokens, args.limit, rows=args.rows, seed=args.seed)
        return "sampled from the model itself", found
    named = sources(tasks, **task_data(args))
    count = -(-args.limit // len(named))
    asked = [problem for task in named.values() for problem in task(count, "test", args.seed)]
    found = answered(model, tokenizer, asked)
    left = f", {len(asked) - len(found)} too long" if len(found) < len(asked) else ""
    return f"answers of {' + '.join(named)}{left}", found


def _convert(
    args: argparse.Namespace, model: Any, decomposition: Any, kind: str | None, *, keep_weight: bool
) -> t2k.ConversionReport:
    return t2k.convert(
        model, targets=targets(args.targets), decomposition=decomposition, factors=kind,
        keep_weight=keep_weight,
    )  # fmt: skip


def _changed(
    args: argparse.Namespace, original: Any, factorised: Any, found: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """(label, model) of every row; one at a time is in memory beside the original."""
    if factorised is not original:
        yield FACTORS, factorised
    if original.dtype != torch.bfloat16:
        model, _ = load(args.model, BF16, args.device)
        if factorised is original:  # under an expert
            _convert(args, model, found, None, keep_weight=False)
        yield BF16, model
    for kind in args.kinds or t2k.FACTOR_KINDS:
        model, _ = load(args.model, args.dtype, args.device)
        _convert(args, model, found, kind, keep_weight=False)
        yield kind, model


def _under(
    args: argparse.Namespace, model: Any, expert: t2k.Expert | None
) -> AbstractContextManager[Any]:
    """The expert in force on a converted model, or nothing."""
    if expert is None:
        return nullcontext()
    bank = t2k.ExpertBank(model)
    bank.add(_EXPERT, expert, allow_mismatch=args.allow_mismatch)
    return bank.use(_EXPERT)


def show(result: dict[str, Any]) -> str:
    """A header and one line a row."""
    under = f" under {result['expert']}" if result["expert"] else ""
    rows = result["rows"]
    perplexity = next(iter(rows.values()))["perplexity_original"]
    lines = [
        f"{result['model']}{under}, {result['layers']} layers; {result['texts']} texts "
        f"({result['text']}), {result['tokens_scored']:,} tokens, 95 % intervals",
        f"the original in {result['dtype']}: perplexity {_plain(perplexity, '.4g')}",
        f"{'':10}{'perplexity':>28}{'change %':>26}{'KL, nats/token':>32}{'same next token %':>24}",
    ]
    for label, row in rows.items():
        lines.append(
            f"{label:10}{_plain(row['perplexity'], '.4g'):>28}"
            f"{_plain(row['perplexity_change'], '+.3f', 100):>26}{_plain(row['kl'], '.2e'):>32}"
            f"{_plain(row['same_next_token'], '.2f', 100):>24}"
        )
    count = next(iter(rows.values()))["prompts"]
    lines.append(f"greedy continuations of {count} beginnings, up to {result['new_tokens']} tokens")
    for label, row in rows.items():
        place = row["first_difference"]
        where = "" if place is None else f", else first different at token {place:g} (median)"
        lines.append(
            f"{label:10}equal to the end {_plain(row['same_text'], '.1f', 100)} %; tokens before a "
            f"difference {_plain(row['same_tokens'], '.1f', 100)} %{where}"
        )
    return "\n".join(lines)


def _plain(estimate: Mapping[str, float], form: str, times: float = 1) -> str:
    value, low, high = (format(times * estimate[k], form) for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
