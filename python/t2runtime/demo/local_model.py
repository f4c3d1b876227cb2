"""The demo on any local causal model: identity, a mixed batch under given or random experts, and
what it costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import t2kernels as t2k
from t2runtime.demo import cost
from t2runtime.generation import complete
from t2runtime.loading import load
from t2runtime.prompts import encode
from t2runtime.rows import row_order_of

PROMPTS = (
    "Once upon a time", "The answer is", "In the morning, she",
    "Question: how many days has a week? Answer:", "One day, a little", "He said that",
)  # fmt: skip
NEW_TOKENS = 24


def run(
    path: str,
    files: Sequence[str],
    seed: int,
    say: Callable[[str], None],
    row_order: str | None = None,
) -> dict[str, Any]:
    """Convert, check that the base is unchanged bit for bit, generate with a mixture per request,
    time it.
    """
    start = time.perf_counter()
    model, tokenizer = load(path)
    ids, mask = encode(tokenizer, PROMPTS, model.device)
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
    report = t2k.convert(model)
    say(f"{path}: {len(report.converted)} layers converted, {report.trainable:,} singular values, "
        f"{len(report.skipped)} skipped")  # fmt: skip
    bank = t2k.ExpertBank(model, row_order or row_order_of(model))
    for file in files:
        bank.add(Path(file).stem, t2k.Expert.load(file))
    if not files:
        for name, expert in random_experts(model, 3, seed).items():
            bank.add(name, expert)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return torch.as_tensor(model(input_ids=ids, attention_mask=mask).logits)

    identity = torch.equal(logits(), before)
    with bank.use(None):
        identity = identity and torch.equal(logits(), before)
    with cost.merged(bank, bank.names[0]):
        changed = not torch.equal(logits(), before)
    identity = identity and torch.equal(logits(), before)
    say(
        f"identity bit-exact as converted, under None, and after unmerge: {identity}; "
        f"an expert changes it: {changed}"
    )

    mixtures = [_mixture(bank.names, row) for row in range(len(PROMPTS))]
    with bank.use(mixtures):
        began = time.perf_counter()
        texts = complete(model, tokenizer, PROMPTS, NEW_TOKENS).texts
        seconds = time.perf_counter() - began
    rows = []
    for prompt, text, mixture in zip(PROMPTS, texts, mixtures, strict=True):
        say(f"  {mixture or 'base'}\n    {prompt!r} -> {text!r}")
        rows.append({"prompt": prompt, "text": text, "mixture": mixture})
    rates = cost.tokens_per_second(model, tokenizer, bank, PROMPTS, rounds=5)
    say(f"\nthe mixed batch took {seconds:.2f} s; generated tokens per second of each form,")
    say("median and range of 5 rounds in which the forms take turns:")
    for line in cost.lines(rates):
        say(line)
    return {
        "model": path,
        "experts": list(files) or "random",
        "converted": len(report.converted),
        "identity_bit_exact": identity,
        "mixed_batch": rows,
        "cost": rates,
        "passed": identity and changed,
        "seconds": time.perf_counter() - start,
    }


def random_experts(model: Any, count: int, seed: int) -> dict[str, Any]:
    """Experts near the base, for a model that has none: z = 1 + 0.05 times a standard normal."""
    generator = torch.Generator().manual_seed(seed)
    here = t2k.Expert.from_model(model)
    return {
        f"random{index}": t2k.Expert(
            {n: 1 + 0.05 * torch.randn(z.shape, generator=generator) for n, z in here.z.items()},
            here.fingerprints,
            here.base_model,
        )
        for index in range(count)
    }


def _mixture(names: Sequence[str], row: int) -> dict[str, float] | None:
    """A different mixture for every row; the first row is the base."""
    if row == 0:
        return None
    return {name: round(((row + 2 * k) % 5 + row) / 10, 2) for k, name in enumerate(names)}
