"""Measure one generation of a few-shot search against a merge, and a reload, for each member.

    python benchmarks/bench_adapt.py                       # 32 members x 10 shots
    python benchmarks/bench_adapt.py --models random --layers 12 --hidden 768 --json out.json

A generation answers every shot under every member (a mixture of experts), greedily, and computes
the likelihood of every right answer. Ours makes it one batch in which each member's rows are
computed under its own mixture. "merge" writes each member into the weights by `bank.merge`, then
answers its shots. "public scheme" is that of the authors' public code: rebuild every adapted W'
from its factors, then load all weights into the model that generates. (Their nuclear norm factor
is left out, so that all forms have the same weights; so is what their engine costs to start.)

Everything around is equal: model, mixtures, shots (tokenised once for all forms), generation,
machine, process. The forms take turns; their likelihoods must agree and their answers be equal, but
for one in a hundred (of two tokens as good as equal rounding chooses), or nothing is timed.
Measured on the small model and on a random Llama of --layers and --hidden.

The floor is what the products of the converted layers alone take for as many tokens, each at its
best in the same run: no form that computes them for every row can be faster than a baseline by more
than the baseline's time over this floor.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Also where Python leaves the script's own folder out of its path (-P, PYTHONSAFEPATH).
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

try:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import t2kernels as t2k
    from t2runtime import tasks
    from t2runtime.adapt.fewshot import Space
    from t2runtime.adapt.shots import Batches, answer_and_score, encode_shots
    from t2runtime.demo.local_model import random_experts
    from t2runtime.loading import load
except ImportError as error:
    sys.exit(f"bench_adapt: {error}. Run it with the Python that t2kernels[hf] is installed in.")

from command import add_shared, begin
from harness import Refused, Samples, ratio
from results import SCHEMA, write
from torch import Tensor

EXPERTS = 4
MODELS = ("small", "random")
OURS, PUBLIC = "one batch", "public scheme"
GOALS = (("merge", 3.0), (PUBLIC, 8.0))
# Nats of a whole answer, in fp32 over some ten layers.
_TOLERANCE = 1e-2
_MAY_DIFFER = 0.01

Answers = tuple[list[str], Tensor]  # of every member and shot: text, likelihood of the right answer


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bench_adapt", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--members", type=int, default=32, help="of the population (32)")
    add("--shots", type=int, default=10, help="labelled prompts (10)")
    add("--new-tokens", type=int, default=8, help="of an answer, at most (8)")
    add("--rows", type=int, nargs="+", default=[80], help="also with so many rows a batch (80)")
    add("--models", choices=MODELS, nargs="+", default=list(MODELS), help="which (both)")
    add("--layers", type=int, default=8, help="of the random model (8)")
    add("--hidden", type=int, default=512, help="its width (512)")
    add("--rounds", type=int, default=5, help="in which every form has a turn (5)")
    add_shared(parser)
    return parser


class Generation:
    """One population on a model, in each form."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        self.model, self.tokenizer = load("small", "float32", "cpu")
        if model == "random":
            self.model = make_model(args.layers, args.hidden, len(self.tokenizer))
        self.plain = copy.deepcopy(self.model)  # the public scheme's: weights only
        t2k.convert(self.model, progress=False)
        self.bank = t2k.ExpertBank(self.model)
        for name, expert in random_experts(self.model, EXPERTS, 0).items():
            self.bank.add(name, expert)
        problems = tasks.problems("add", args.shots, "validation")
        self.shots = encode_shots(self.model, self.tokenizer, problems)
        self.new_tokens = args.new_tokens
        drawn = torch.Generator().manual_seed(1)
        self.members = torch.rand(args.members, EXPERTS, generator=drawn)
        self.alpha = Space(self.bank, tuple(self.bank.names)).alpha(self.members)
        layers = t2k.svf_layers(self.model)
        self.factors = {name: layer.factors for name, layer in layers.items()}
        self.weights = {n: p.detach().clone() for n, p in self.plain.state_dict().items()}

    def _answer(self, model: Any, members: int, shots: slice = slice(None)) -> Answers:
        some = self.shots.rows(shots)
        return answer_and_score(model, self.tokenizer, some, self.new_tokens, members)

    def one_batch(self, rows: int | None = None) -> Answers:
        """Ours: `rows` at once, by default all."""
        texts: list[str] = []
        likely = []
        for part, few in Batches(rows).parts(len(self.members), len(self.shots.ids)):
            group = self.alpha[part]
            with self.bank.use(group):
                some, values = self._answer(self.model, len(group), few)
            texts += some
            likely.append(values)
        return texts, torch.cat(likely)

    def merged(self) -> Answers:
        """`bank.merge` for each member."""
        texts: list[str] = []
        likely = []
        try:
            for member in self.members.tolist():
                self.bank.merge(dict(zip(self.bank.names, member, strict=True)))
                some, values = self._answer(self.model, 1)
                texts += some
                likely.append(values)
        finally:
            self.bank.unmerge()
        return texts, torch.cat(likely)

    @torch.no_grad()
    def reloaded(self) -> Answers:
        """Every W' rebuilt, then all weights loaded, for each member."""
        texts: list[str] = []
        likely = []
        experts = [self.bank[name] for name in self.bank.names]
        for member in self.members:
            new = dict(self.weights)
            for name, f in self.factors.items():
                z = t2k.mix(torch.stack([e.z[name] for e in experts]), member[None])[0]
                new[f"{name}.weight"] = (f.U * (f.S * z)) @ f.V.T
            self.plain.load_state_dict(new)
            some, values = self._answer(self.plain, 1)
            texts += some
            likely.append(values)
        return texts, torch.cat(likely)

    @torch.no_grad()
    def floor(self) -> float:
        """Seconds of nothing but the converted layers' products, for all tokens of `one_batch`."""
        tokens = 0

        def count(module: Any, args: Any, given: dict[str, Any]) -> None:
            nonlocal tokens
            tokens += given["input_ids"].numel()

        hook = self.model.register_forward_pre_hook(count, with_kwargs=True)
        self.one_batch()
        hook.remove()
        rows, width = len(self.members) * len(self.shots.ids), self.shots.prompt_length
        best: dict[tuple[int, int], float] = {}
        total = 0.0
        with self.bank.use(self.alpha):
            for layer in t2k.svf_layers(self.model).values():
                shape = (layer.in_features, layer.out_features)
                if shape not in best:
                    x = torch.randn(rows, width, layer.in_features)
                    best[shape] = min(_seconds(lambda x=x, f=layer: f(x)) for _ in range(5))
                total += best[shape]
        return total * tokens / (rows * width)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def make_model(layers: int, hidden: int, vocabulary: int) -> LlamaForCausalLM:
    """A Llama with random weights, fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32,
        vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=64,
        initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gate(name: str, found: Answers, want: Answers) -> tuple[float, int]:
    """The largest difference of a likelihood, and how many answers differ; Refused where either is
    more than rounding can make: of two tokens all but equal it may choose either.
    """
    differ = sum(a != b for a, b in zip(found[0], want[0], strict=True))
    if differ > _MAY_DIFFER * len(want[0]):
        raise Refused(f"{name}: {differ} of {len(want[0])} answers differ")
    worst = float((found[1] - want[1]).abs().max())
    if not worst <= _TOLERANCE:
        raise Refused(f"{name}: a likelihood differs by {worst:.2e} nats, allowed {_TOLERANCE:g}")
    return worst, differ


def measure_forms(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """A row for every form; the speed-up of ours over it, with its interval."""
    generation = Generation(args, model)
    forms: dict[str, Callable[[], Answers]] = {
        OURS: generation.one_batch,
        **{f"{n} rows a batch": partial(generation.one_batch, n) for n in args.rows},
        "merge": generation.merged,
        PUBLIC: generation.reloaded,
    }
    want = generation.reloaded()
    errors = {n: gate(n, form(), want) for n, form in forms.items() if n != PUBLIC}
    errors[PUBLIC] = (0.0, 0)
    parameters = sum(p.numel() for p in generation.plain.parameters())
    print(
        f"{model}: {parameters / 1e6:.1f} M parameters, {args.members} members x {args.shots} "
        f"shots, {args.new_tokens} new tokens at most; {len(set(want[0]))} distinct answers of "
        f"{len(want[0])}",
        flush=True,
    )
    floor, samples = generation.floor(), take_turns(forms, args.rounds)
    floor = min(floor, generation.floor())
    print(f"  products of the converted layers alone: {floor:.3f} s")
    return [
        _row(model, name, own, samples[OURS], floor, *errors[name]) for name, own in samples.items()
    ]


def take_turns(forms: dict[str, Callable[[], Answers]], rounds: int) -> dict[str, Samples]:
    """Wall seconds of each form, once a round, in an order drawn anew; all have run before."""
    samples = {name: Samples() for name in forms}
    order, drawn = list(forms), random.Random(0)
    for _ in range(rounds):
        drawn.shuffle(order)
        for name in order:
            samples[name].seconds.append(_seconds(forms[name]))
    return samples


def _row(
    model: str, name: str, own: Samples, ours: Samples, floor: float, error: float, differ: int
) -> dict[str, Any]:
    speedup, low, high = ratio(own, ours)
    ceiling = own.median / floor
    print(
        f"  {name:20}{own.median:8.3f} s ({own.quantile(0.2):.3f}–{own.quantile(0.8):.3f})  ours "
        f"is {speedup:5.2f} x as fast ({low:.2f}–{high:.2f}), at most {ceiling:.1f} x  "
        f"likelihoods within {error:.0e}, {differ} answers differ",
        flush=True,
    )
    return {
        "model": model, "name": name, "seconds": own.median, "p20": own.quantile(0.2),
        "p80": own.quantile(0.8), "repetitions": len(own.seconds), "speedup_of_ours": speedup,
        "interval_speedup": (low, high), "floor": floor, "ceiling": ceiling, "error": error,
        "answers_differ": differ,
    }  # fmt: skip


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal, on each model, with what was measured."""
    found = {(row["model"], row["name"]): row["speedup_of_ours"] for row in rows}
    models = dict.fromkeys(row["model"] for row in rows)
    return [
        {
            "goal": f"{model}: one batch against {name}", "limit": f"≥ {limit:g}",
            "measured": found[model, name], "met": found[model, name] >= limit,
        }
        for model in models for name, limit in GOALS
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when forms do not agree; 2 for a wrong command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.members, args.shots, args.new_tokens, args.rounds, *args.rows) < 1:
        parser.error("--members, --shots, --new-tokens, --rounds and --rows must be at least 1")
    if args.layers < 1 or args.hidden < 32 or args.hidden % 32:
        parser.error("--layers must be at least 1, --hidden a multiple of 32")
    record = begin(parser, args)
    try:
        rows = [row for model in args.models for row in measure_forms(args, model)]
    except Refused as refusal:
        print(f"REFUSED: {refusal}", file=sys.stderr)
        return 1
    outcomes = judge(rows)
    for outcome in outcomes:
        mark = "met" if outcome["met"] else "MISSED"
        print(f"{outcome['goal']:44}{outcome['limit']:8}{outcome['measured']:6.2f}  {mark}")
    if args.json is not None:
        names = ("members", "shots", "new_tokens", "rounds", "layers", "hidden")
        settings = {name: getattr(args, name) for name in names}
        write(args.json, {"schema": SCHEMA, "environment": record, "settings": settings,
                          "goals": outcomes, "rows": rows})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
