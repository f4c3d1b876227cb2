"""Two-pass generation against itself: what pass 1, different mixtures and batch invariance cost.

    python benchmarks/bench_engine.py [--model FOLDER] [--rows 32] [--new-tokens 128] [--rounds 5]

Without --model a random Llama of --width and --layers with a character tokenizer, so that every
request makes all its tokens. The forms take turns in every round; medians of rounds, and ratios
within one run. Goals: pass 1 at most 0.15 of pass 2; 32 mixtures at least 0.95 of the tokens per
second of one expert.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import t2kernels as t2k
from t2runtime.base_model import build_tokenizer
from t2runtime.demo.local_model import random_experts
from t2runtime.engine import Output, Transformer2
from t2runtime.loading import load

WORDS = ("add", "flip", "the largest of", "who is first among", "count", "say")
GOALS = {"pass 1 / pass 2": ("<=", 0.15), "mixtures / one expert": (">=", 0.95)}


def random_model(width: int, layers: int) -> tuple[Any, Any]:
    """A random Llama whose end token is never the likeliest, and a tokenizer of characters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 11 // 4 // 64 * 64,
        num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=width // 64,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[:4] = 0
        model.lm_head.weight[4:] += model.lm_head.weight[4:].sign() * 0.01
    return model, tokenizer


def engine(args: argparse.Namespace) -> Transformer2:
    """The model with six experts."""
    if args.model:
        model, tokenizer = load(args.model)
    else:
        model, tokenizer = random_model(args.width, args.layers)
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for name, expert in random_experts(model, 6, 0).items():
        expert.description = f"what {name} is for"
        bank.add(name, expert)
    return Transformer2(model, tokenizer, bank)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each form, median over rounds, and the ratios that the goals are about."""
    t2 = engine(args)
    prompts = [f"{WORDS[i % len(WORDS)]} {7919 * (i + 1) % 100003}=" for i in range(args.rows)]
    names = t2.bank.names
    many = [{n: 0.2 + 0.8 * (0.618034 * (row + 1) * (k + 1) % 1) for k, n in enumerate(names)}
            for row in range(args.rows)]  # fmt: skip

    def call(strategy: Any) -> list[Output]:
        outputs = t2.generate(prompts, strategy, max_new_tokens=args.new_tokens)
        failed = [output.error for output in outputs if output.error]
        if failed:
            raise RuntimeError(f"a request failed: {failed[0]}")
        return outputs

    forms: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Any]] = {
        "two passes": (nullcontext, "prompt"),
        "one expert": (nullcontext, names[0]),
        "mixtures": (nullcontext, many),
        "mixtures, invariant": (t2k.batch_invariant, many),
        "two passes, invariant": (t2k.batch_invariant, "prompt"),
    }
    first: dict[str, list[float]] = {form: [] for form in forms}
    second: dict[str, list[float]] = {form: [] for form in forms}
    order = list(forms.items())
    for turn in range(args.rounds + 1):
        for form, (mode, strategy) in order[turn % 5 :] + order[: turn % 5]:
            with mode():
                output = call(strategy)[0]
            if turn:  # the first round warms up
                first[form].append(output.pass1_seconds)
                second[form].append(output.pass2_seconds)

    def ratio(a: list[float], b: list[float]) -> float:
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    return {
        "rows": args.rows,
        "new_tokens": args.new_tokens,
        "threads": torch.get_num_threads(),
        "seconds": {
            form: {"pass 1": statistics.median(first[form]),
                   "pass 2": statistics.median(second[form])} for form in forms
        },
        "ratios": {
            "pass 1 / pass 2": ratio(first["two passes"], second["two passes"]),
            "mixtures / one expert": ratio(second["one expert"], second["mixtures"]),
            "invariant / usual, pass 2": ratio(second["mixtures, invariant"], second["mixtures"]),
            "invariant / usual, pass 1": ratio(first["two passes, invariant"], first["two passes"]),
        },
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Print the figures, one line each, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="a local folder instead of the random model")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    result = run(args)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{args.rows} requests, {args.new_tokens} new tokens, {result['threads']} threads")
    for form, seconds in result["seconds"].items():
        print(f"  {form:24s}pass 1 {seconds['pass 1']:7.3f} s   pass 2 {seconds['pass 2']:7.3f} s")
    for what, value in result["ratios"].items():
        goal = "   goal {} {}".format(*GOALS[what]) if what in GOALS else ""
        print(f"  {what:28s}{value:6.3f}{goal}")


if __name__ == "__main__":
    main()
