"""What each form of the same model costs: tokens per second of the base, merged, factorised, and
all mixtures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from t2runtime.prompts import encode, pad_token


@contextmanager
def merged(bank: Any, name: str) -> Iterator[None]:
    """One expert merged into the weights for the length of the block."""
    bank.merge(name)
    try:
        yield
    finally:
        bank.unmerge()


def tokens_per_second(
    model: Any,
    tokenizer: Any,
    bank: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int = 12,
    rounds: int = 8,
) -> dict[str, dict[str, float]]:
    """Generated tokens per second of each form: {"median", "low", "high"} over rounds.

    Every round times each form once, in turns, so that what else the machine does meets all of
    them alike; a first round is not counted. All do the same work.
    """
    names = list(bank.names)
    # Multiples of the golden ratio never meet: as many different mixtures as requests.
    many = [
        {name: 0.2 + 0.8 * (0.618034 * (row + 1) * (k + 1) % 1) for k, name in enumerate(names)}
        for row in range(len(prompts))
    ]
    forms: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "base": nullcontext,
        "merged, one expert": lambda: merged(bank, names[0]),
        "factorised, one expert": lambda: bank.use(names[0]),
        "factorised, a mixture per request": lambda: bank.use(many),
    }
    ids, mask = encode(tokenizer, prompts, model.device)
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    order = list(forms.items())
    for turn in range(rounds + 1):
        # Every round begins with another form: what runs first finds the caches of the last.
        shift = turn % len(order)
        for form, weights in order[shift:] + order[:shift]:
            with weights(), torch.no_grad():
                _wait(model)
                start = time.perf_counter()
                model.generate(
                    input_ids=ids, attention_mask=mask,
                    max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                    do_sample=False, pad_token_id=pad_token(tokenizer),
                )  # fmt: skip
                _wait(model)
            if turn:
                seconds[form].append(time.perf_counter() - start)
    tokens = len(prompts) * new_tokens
    return {
        form: {
            "median": tokens / statistics.median(times),
            "low": tokens / max(times),
            "high": tokens / min(times),
        }
        for form, times in seconds.items()
    }


def lines(rates: dict[str, dict[str, float]]) -> list[str]:
    """One line per form: median, the slowest and the fastest round, share of the base."""
    base = rates["base"]["median"]
    return [
        f"  {form:36s}{rate['median']:9.1f}   [{rate['low']:.1f}, {rate['high']:.1f}]"
        f"   {rate['median'] / base:.2f} x base"
        for form, rate in rates.items()
    ]


def _wait(model: Any) -> None:
    """The GPU, if there is one, has finished what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
