"""What a change of the weights' format does to a model: perplexity, KL, greedy drift.

Two models read the same texts, the original and one whose weights were rounded. Everything is
paired: the same tokens under both. Intervals are 95 %, from resampling whole texts, since the
tokens of one text are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from t2runtime.evaluate import wilson
from t2runtime.generation import Completions, complete_ids
from t2runtime.prompts import context_length, pad_left, pad_token, prompt_ids, turn_end
from t2runtime.tasks import Problem

#: Resamples behind an interval.
_RESAMPLES = 2000
#: Tokens of a text that greedy continuations start from, at most.
_PROMPT = 32

Ids = list[int]


@dataclass(frozen=True)
class Text:
    """Token ids; those from `scored` on are scored, and a greedy continuation starts behind the
    first `prompt` of them.
    """

    ids: Ids
    scored: int
    prompt: int

    @classmethod
    def running(cls, ids: Ids) -> Text:
        """Prose: scored from its second token, continued from its first half, 32 at most."""
        return cls(ids, 1, max(1, min(_PROMPT, len(ids) // 2)))


#: A value with the ends of its interval.
Estimate = dict[str, float]


def windows(tokenizer: Any, path: Path, tokens: int, limit: int) -> list[Text]:
    """A text file as rows of at most `tokens` ids, each behind the tokenizer's start token where it
    has one; of more than `limit` rows, that many at even distances.

    Raises ValueError for a file that is no text, or of fewer than two rows.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path} is no text in UTF-8: {error}") from error
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = tokens - len(start)
    rows = [[*start, *ids[at : at + step]] for at in range(0, len(ids), step)]
    rows = [row for row in rows if len(row) >= 8]
    if len(rows) < 2:
        raise ValueError(
            f"--text {path} gives {len(ids)} tokens, too few for two rows of {tokens} "
            "(intervals need several). Give a longer text or lower --tokens"
        )
    count = min(limit, len(rows))
    return [Text.running(rows[i * len(rows) // count]) for i in range(count)]


def answered(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> list[Text]:
    """Problems with what a model should answer (`Problem.target`) and its end token, as
    next-token training sees them: the answer is scored, and greedy answers start at the question.
    Those beyond the model's context are left out; ValueError where fewer than two are left.
    """
    without = next((problem for problem in problems if not problem.target.strip()), None)
    if without is not None:
        raise ValueError(
            f"--task {without.category!r} has no text to score for {without.prompt[:80]!r}; give "
            "--text FILE, or neither for texts that the model samples"
        )
    end, context = turn_end(model, tokenizer), context_length(model)
    found = []
    for problem in problems:
        asked = prompt_ids(tokenizer, problem.prompt)
        answer = tokenizer(problem.target, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*asked, *answer, *end]
        if context is None or len(ids) <= context:
            found.append(Text(ids, len(asked), len(asked)))
    if len(found) < 2:
        raise ValueError(
            f"{len(found)} of {len(problems)} problems with their answers fit into the model's "
            f"context of {context} tokens, two are needed; give another --task, or --text FILE"
        )
    return found


def own_texts(
    model: Any, tokenizer: Any, tokens: int, limit: int, *, rows: int, seed: int
) -> list[Text]:
    """`limit` texts that the model itself writes: sampled at temperature 1 from its start token,
    with their end token, of at most `tokens` ids.

    Raises ValueError for a tokenizer without a start token.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no start token to sample texts from; give --text FILE")
    found: list[Text] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(found) < limit:
            count = min(rows, limit - len(found))
            start = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
            made = complete_ids(
                model, tokenizer, start, torch.ones_like(start), tokens - 1, temperature=1.0
            )
            lengths = made.sampled.sum(1).tolist()
            found += [
                Text.running(row[: 1 + length])
                for row, length in zip(made.ids.tolist(), lengths, strict=True)
                if length
            ]
    return found


@dataclass(frozen=True)
class Sums:
    """Per text, in fp64: scored tokens, -log p of them under both models, KL, equal choices."""

    tokens: Tensor
    nll: Tensor
    nll_changed: Tensor
    kl: Tensor
    same: Tensor

    def mean(self, part: Tensor) -> Estimate:
        """Σ part / Σ tokens with its interval."""
        return resampled(part, self.tokens)

    def facts(self) -> dict[str, Any]:
        """Perplexities, their ratio less 1, KL in nats a token, share of equal choices."""
        original, changed = self.mean(self.nll), self.mean(self.nll_changed)
        ratio = self.mean(self.nll_changed - self.nll)
        return {
            "perplexity_original": {k: math.exp(v) for k, v in original.items()},
            "perplexity": {k: math.exp(v) for k, v in changed.items()},
            "perplexity_change": {k: math.expm1(v) for k, v in ratio.items()},
            "kl": self.mean(self.kl),
            "same_next_token": self.mean(self.same),
        }


def resampled(part: Tensor, weight: Tensor, seed: int = 0) -> Estimate:
    """Σ part / Σ weight over texts, and 95 % of its values over resampled sets of texts.

    >>> made = resampled(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    >>> made["value"], made["low"], made["high"]
    (2.0, 1.0, 3.0)
    """
    part, weight = part.double(), weight.double()
    drawn = torch.randint(
        len(part), (_RESAMPLES, len(part)), generator=torch.Generator().manual_seed(seed)
    )
    values = part[drawn].sum(1) / weight[drawn].sum(1)
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return {"value": float(part.sum() / weight.sum()), "low": low, "high": high}


@torch.no_grad()
def compare_texts(original: Any, changed: Any, texts: Sequence[Text], *, rows: int) -> Sums:
    """Both models on the same texts, fed what is right at each place."""
    found: list[tuple[float, ...]] = []
    for batch in _batches(texts, rows):
        logits = [_logits(model, [text.ids for text in batch]) for model in (original, changed)]
        for i, text in enumerate(batch):
            # Row by row in fp64: the differences are small, the vocabulary is not.
            places = slice(text.scored - 1, len(text.ids) - 1)
            first, second = (part[i, places].double().log_softmax(-1) for part in logits)
            chosen = torch.tensor(text.ids[text.scored :], device=first.device)[:, None]
            found.append(
                (
                    len(chosen),
                    -float(first.gather(1, chosen).sum()),
                    -float(second.gather(1, chosen).sum()),
                    float((first.exp() * (first - second)).sum()),
                    float((first.argmax(-1) == second.argmax(-1)).sum()),
                )
            )
    return Sums(*torch.tensor(found, dtype=torch.float64).unbind(1))


def _batches(texts: Sequence[Text], rows: int) -> Iterator[Sequence[Text]]:
    for start in range(0, len(texts), rows):
        yield texts[start : start + rows]


def _logits(model: Any, batch: Sequence[Ids]) -> Tensor:
    """(rows, longest, vocabulary); padded behind, where a causal model's texts do not see it."""
    width = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=model.device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in batch], device=model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if not bool(torch.isfinite(logits[mask.bool()]).all()):
        raise RuntimeError("the model's logits are not finite on these texts; try another --dtype")
    return logits


def continuations(
    model: Any, tokenizer: Any, texts: Sequence[Text], new_tokens: int, *, rows: int
) -> list[Ids]:
    """Greedy continuations of the texts' beginnings, up to and with the end token."""
    found: list[Ids] = []
    for batch in _batches(texts, rows):
        prompts = [text.ids[: text.prompt] for text in batch]
        ids, mask = pad_left(prompts, pad_token(tokenizer), model.device)
        made: Completions = complete_ids(model, tokenizer, ids, mask, new_tokens)
        lengths = made.sampled.sum(1).tolist()
        rows_of = zip(made.new_ids.tolist(), lengths, strict=True)
        found += [row[:length] for row, length in rows_of]
    return found


def new_tokens_that_fit(model: Any, texts: Sequence[Text], wanted: int) -> int:
    """`wanted`, or what the context leaves behind the longest prompt."""
    context = context_length(model)
    longest = max(text.prompt for text in texts)
    return wanted if context is None else min(wanted, context - longest)


def drift(original: Sequence[Ids], changed: Sequence[Ids]) -> dict[str, Any]:
    """How far greedy continuations stay together: the share of prompts answered alike to the last
    token (Wilson's interval), the share of tokens before the first difference, and the median
    place of that difference (from 0) among those that differ.

    >>> drift([[1, 2, 3], [4, 5]], [[1, 2, 9], [4, 5]])["first_difference"]
    2
    """
    places = [_first_difference(a, b) for a, b in zip(original, changed, strict=True)]
    equal = sum(place is None for place in places)
    lengths = torch.tensor([max(len(a), len(b)) for a, b in zip(original, changed)])
    kept = [length if p is None else p for p, length in zip(places, lengths.tolist())]
    low, high = wilson(equal, len(places))
    differing = [place for place in places if place is not None]
    return {
        "prompts": len(places),
        "same_text": {"value": equal / len(places), "low": low, "high": high},
        "same_tokens": resampled(torch.tensor(kept), lengths),
        "first_difference": median(differing) if differing else None,
    }


def _first_difference(a: Ids, b: Ids) -> int | None:
    """The first place where two rows differ, None where they are equal."""
    if a == b:
        return None
    pairs = zip(a, b)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
