"""Two-pass generation against itself: what pass 1, different mixtures and batch invariance cost.

    python benchmarks/bench_engine.py --json out.json
    python benchmarks/bench_engine.py --tokenizer FOLDER     # another vocabulary
    python benchmarks/bench_engine.py --model FOLDER --rounds 3 --no-invariant

Without --model a random Llama of --width and --layers whose end token is never the likeliest, so
that every request makes all its tokens; its tokenizer knows single characters, unless --tokenizer
names a folder with another. Pass 1 reads the experts' names token by token, so the vocabulary
counts. The forms take turns in every round; medians of rounds, and ratios within one run. Goals:
pass 1 at most 0.15 of pass 2; 32 mixtures at least 0.95 of the tokens per second of one expert.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from command import add_shared, begin
from results import SCHEMA, write

import t2kernels as t2k
from t2runtime.base_model import build_tokenizer
from t2runtime.demo.local_model import random_experts
from t2runtime.engine import Output, Transformer2
from t2runtime.loading import load

WORDS = ("add", "flip", "the largest of", "who is first among", "count", "say")
GOALS = {"pass 1 / pass 2": ("<=", 0.15), "mixtures / one expert": (">=", 0.95)}


def random_model(width: int, layers: int, folder: str | None = None) -> tuple[Any, Any]:
    """A random Llama whose end token is never the likeliest, and the tokenizer of a folder, or one
    of characters.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = build_tokenizer() if folder is None else AutoTokenizer.from_pretrained(folder)
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
        model, tokenizer = random_model(args.width, args.layers, args.tokenizer)
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for name, expert in random_experts(model, 6, 0).items():
        expert.description = f"what {name} is for"
        bank.add(name, expert)
    return Transformer2(model, tokenizer, bank)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each form, medians over rounds, and the ratios that the goals are about."""
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
    }
    if args.invariant:
        forms["mixtures, invariant"] = (t2k.batch_invariant, many)
        forms["two passes, invariant"] = (t2k.batch_invariant, "prompt")
    seconds: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
    order = list(forms.items())
    for turn in range(args.rounds + 1):
        first = turn % len(order)
        for form, (mode, strategy) in order[first:] + order[:first]:
            with mode():
                output = call(strategy)[0]
            if turn:  # the first round warms up
                seconds[form].append((output.pass1_seconds, output.pass2_seconds))

    def ratio(one: str, part: int, other: str, other_part: int) -> list[float]:
        """Over rounds: median, smallest, largest."""
        found = [x[part] / y[other_part] for x, y in zip(seconds[one], seconds[other], strict=True)]
        return [statistics.median(found), min(found), max(found)]

    ratios = {
        "pass 1 / pass 2": ratio("two passes", 0, "two passes", 1),
        "mixtures / one expert": ratio("one expert", 1, "mixtures", 1),
    }
    if args.invariant:
        ratios["invariant / usual, pass 2"] = ratio("mixtures, invariant", 1, "mixtures", 1)
        ratios["invariant / usual, pass 1"] = ratio("two passes, invariant", 0, "two passes", 0)
    rows = [
        {"form": form, **{f"pass {n}": statistics.median(pair[n - 1] for pair in pairs)
                          for n in (1, 2)}} for form, pairs in seconds.items()
    ]  # fmt: skip
    return {"ratios": ratios, "rows": rows}


def judge(ratios: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Each goal with what was measured."""
    outcomes = []
    for what, (sign, limit) in GOALS.items():
        value = ratios[what][0]
        met = value <= limit if sign == "<=" else value >= limit
        outcomes.append({"goal": what, "limit": f"{sign} {limit:g}", "measured": value, "met": met})
    return outcomes


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench_engine", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", help="a local folder instead of the random model")
    add("--tokenizer", help="a local folder whose tokenizer the random model takes")
    add("--width", type=int, default=512, help="of the random model (512)")
    add("--layers", type=int, default=8, help="of the random model (8)")
    add("--rows", type=int, default=32, help="requests of a batch (32)")
    add("--new-tokens", type=int, default=128, help="of each request (128)")
    add("--rounds", type=int, default=5, help="beside one that warms up (5)")
    add("--no-invariant", dest="invariant", action="store_false", help="leave that mode out")
    add_shared(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the figures, one line each; 2 for a wrong command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.width, args.layers, args.rows, args.new_tokens, args.rounds) < 1:
        parser.error("--width, --layers, --rows, --new-tokens and --rounds must be at least 1")
    if args.model and args.tokenizer:
        parser.error("--tokenizer is for the random model, --model brings its own")
    record = begin(parser, args)
    result = run(args)
    print(f"{args.rows} requests, {args.new_tokens} new tokens, {record['threads']} threads")
    for row in result["rows"]:
        print(f"  {row['form']:24s}pass 1 {row['pass 1']:7.3f} s   pass 2 {row['pass 2']:7.3f} s")
    for what, (value, low, high) in result["ratios"].items():
        goal = "   goal {} {}".format(*GOALS[what]) if what in GOALS else ""
        print(f"  {what:28s}{value:6.3f} ({low:.3f}–{high:.3f}){goal}")
    if args.json is not None:
        settings = {
            "model": "random" if args.model is None else Path(args.model).name,
            "tokenizer": "characters" if args.tokenizer is None else Path(args.tokenizer).name,
            **{n: getattr(args, n) for n in ("width", "layers", "rows", "new_tokens", "rounds")},
        }
        if args.model is not None:
            for name in ("tokenizer", "width", "layers"):
                del settings[name]
        write(args.json, {"schema": SCHEMA, "environment": record, "settings": settings,
                          "goals": judge(result["ratios"]), **result})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
