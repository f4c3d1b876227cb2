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

from t2runtime.generation import encode, pad_token


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
    repeats: int = 5,
) -> dict[str, float]:
    """Generated tokens per second of each form, median over repeats that take turns; same work
    for each.
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
    for turn in range(repeats + 1):
        for form, weights in forms.items():
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
    return {
        form: len(prompts) * new_tokens / statistics.median(times)
        for form, times in seconds.items()
    }


def _wait(model: Any) -> None:
    """The GPU, if there is one, has finished what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
