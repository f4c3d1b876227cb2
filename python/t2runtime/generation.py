"""Prompts in, token ids and text out: one left-padded batch for training, evaluation and both
passes.

Nothing here knows experts: whoever wants a mixture opens `bank.use(...)` around the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Completions:
    """What `complete` returns. Row b is prompt b.

    ids: (rows, prompt + new) tokens, left-padded prompts first; attention: 1 at real prompt
    tokens and all generated ones; sampled: (rows, new) bool, True up to and including the first
    end token.
    """

    ids: Tensor
    attention: Tensor
    sampled: Tensor
    texts: list[str]

    @property
    def prompt_length(self) -> int:
        """Columns of `ids` that belong to the prompts."""
        return self.ids.shape[1] - self.sampled.shape[1]

    @property
    def new_ids(self) -> Tensor:
        """The generated columns of `ids`."""
        return self.ids[:, self.prompt_length :]

    def rows(self, part: slice) -> Completions:
        """Some of the rows."""
        return Completions(
            self.ids[part], self.attention[part], self.sampled[part], self.texts[part]
        )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the model's own, else the tokenizer's; may be empty."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def pad_token(tokenizer: Any) -> int:
    """The id to pad with; masked everywhere, so any id does where the tokenizer names none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def encode(tokenizer: Any, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (rows, length), padded on the left; the tokenizer is left as
    it is.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ValueError(f"prompts must give at least one token each, got none for {prompt!r}")
    width = max(map(len, rows))
    pad = pad_token(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    samples: int = 1,
    temperature: float = 0.0,
) -> Completions:
    """Generate for a batch: greedily at temperature 0, else from the full softmax at `temperature`.

    With `samples` > 1 the rows of one prompt follow each other.
    """
    ids, mask = encode(tokenizer, prompts, model.device)
    ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    )
    ends = end_tokens(model, tokenizer)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token(tokenizer),
        **sampling,
    )
    new = output[:, ids.shape[1] :]
    is_end = torch.isin(new, torch.tensor(ends, device=new.device, dtype=new.dtype))
    sampled = is_end.cumsum(1) - is_end.long() == 0
    texts = [
        tokenizer.decode(row[keep], skip_special_tokens=True)
        for row, keep in zip(new, sampled, strict=True)
    ]
    return Completions(output, torch.cat([mask, torch.ones_like(new)], 1), sampled, texts)


def answer_log_probs(model: Any, completions: Completions, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (rows, new, vocabulary) in fp32 at the positions that chose the
    completions' tokens.

    Read from the very ids that were sampled, end token included; nothing is tokenised again.
    """
    new = completions.sampled.shape[1]
    accepted = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if "position_ids" in accepted:
        # Generation counts positions from the first real token; so must this.
        extra["position_ids"] = (completions.attention.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = new + 1
    logits = model(
        input_ids=completions.ids, attention_mask=completions.attention, use_cache=False, **extra
    ).logits
    logits = logits[:, -(new + 1) : -1].float()
    return torch.log_softmax(logits / temperature, dim=-1)


def forced(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], model: Any
) -> Completions:
    """Given answers in the place of sampled ones, to ask a model for their likelihood."""
    prompt_ids, prompt_mask = encode(tokenizer, prompts, model.device)
    ends = end_tokens(model, tokenizer)[:1]
    rows = [
        list(tokenizer(answer, add_special_tokens=False)["input_ids"]) + ends for answer in answers
    ]
    width = max(map(len, rows))
    pad = pad_token(tokenizer)
    new = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
    kept = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    kept = kept.to(model.device)
    return Completions(
        torch.cat([prompt_ids, new], 1),
        torch.cat([prompt_mask, torch.ones_like(new)], 1),
        kept.bool(),
        list(answers),
    )
