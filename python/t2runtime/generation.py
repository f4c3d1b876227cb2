"""Token ids in, token ids and text out, and how likely they are.

Nothing here knows experts: whoever wants a mixture opens `bank.use(...)` around the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2runtime.prompts import (
    Prompt,
    check_context,
    context_length,
    encode,
    end_tokens,
    pad_token,
    turn_end,
)


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
        """Some of the rows, without the columns that are padding in all of them."""
        attention, sampled = self.attention[part], self.sampled[part]
        start = int(attention.any(0).int().argmax())
        new = int(sampled.any(0).sum())
        end = self.prompt_length + new
        return Completions(
            self.ids[part, start:end], attention[:, start:end], sampled[:, :new], self.texts[part]
        )


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """What the model's forward takes by name; of PEFT's wrapper, what the model inside takes."""
    inside = getattr(model, "get_base_model", None)
    return inspect.signature((inside() if callable(inside) else model).forward).parameters


def decode(tokenizer: Any, ids: Sequence[int] | Tensor) -> str:
    """The text of generated ids, without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


#: What would bend the softmax of a sample; a model's own settings may hold any of it.
_UNBENT = {
    "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
#: One answer a row, as a tensor of ids, whatever the model's own settings ask for.
_PLAIN = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False,
    "remove_invalid_values": False,
}  # fmt: skip


def sampling(model: Any, temperature: float) -> dict[str, Any]:
    """What `model.generate` is told: greedy at 0, else the full softmax."""
    own = model.generation_config

    def undone(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in settings.items() if getattr(own, k, None) not in (None, v)}

    plain = undone(_PLAIN)
    if temperature <= 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, **plain}
    bent = undone(_UNBENT)
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        **plain,
        **bent,
    }


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    chat: str = "auto",
) -> Completions:
    """Generate for a batch: greedily at temperature 0, else from the full softmax at `temperature`.

    With `samples` > 1 the rows of one prompt follow each other.
    """
    ids, mask = encode(tokenizer, prompts, model.device, chat)
    ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    return complete_ids(model, tokenizer, ids, mask, max_new_tokens, temperature=temperature)


@torch.no_grad()
def complete_ids(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    cache: Any = None,
) -> Completions:
    """As `complete`, for prompts as token ids and attention mask (rows, length), padded on the
    left. `cache`: an empty key/value cache of transformers to fill, for a caller who goes on with
    it.
    """
    check_context(model, mask.sum(1).tolist(), [max_new_tokens] * len(mask))
    ends = end_tokens(model, tokenizer)
    try:
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token(tokenizer),
            **({} if cache is None else {"past_key_values": cache}),
            **sampling(model, temperature),
        )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise RuntimeError(
            "sampling: the model's logits are not finite under the weights in force; an expert has "
            "diverged, or the weights overflow in this dtype"
        ) from error
    new = output[:, ids.shape[1] :]
    is_end = torch.isin(new, torch.tensor(ends, device=new.device, dtype=new.dtype))
    sampled = is_end.cumsum(1) - is_end.long() == 0
    texts = _decode_rows(tokenizer, new.tolist(), sampled.sum(1).tolist())
    return Completions(output, torch.cat([mask, torch.ones_like(new)], 1), sampled, texts)


def _decode_rows(
    tokenizer: Any, rows: Sequence[Sequence[int]], lengths: Sequence[int]
) -> list[str]:
    """The text of each row's first tokens; of equal rows (a population's, often) only one is
    decoded.
    """
    kept = [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    known = {row: decode(tokenizer, row) for row in dict.fromkeys(kept)}
    return [known[row] for row in kept]


def answer_log_probs(model: Any, completions: Completions, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (rows, new, vocabulary) in fp32 at the positions that chose the
    completions' tokens.

    Read from the very ids that were sampled, end token included; nothing is tokenised again.
    """
    return torch.log_softmax(answer_logits(model, completions) / temperature, dim=-1)


def token_log_probs(model: Any, completions: Completions, temperature: float = 1.0) -> Tensor:
    """Log-probabilities (rows, new) in fp32 of the completions' own tokens: as `answer_log_probs`,
    without the vocabulary.
    """
    return chosen_log_probs(answer_logits(model, completions) / temperature, completions.new_ids)


def chosen_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of the ids (rows, new) by the logits (rows, new, vocabulary) that chose them."""
    nll = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return -nll.view(ids.shape)


def answer_logits(model: Any, completions: Completions) -> Tensor:
    """The logits (rows, new, vocabulary) in fp32 that chose the completions' tokens.

    Where each row fits into the context and the batch, a long prompt above a long answer, is wider,
    the rows are moved together first: no model sees a position that it does not have. What stands
    behind a row's end is then without meaning.
    """
    new = completions.sampled.shape[1]
    if too_wide(model, completions):
        logits = answer_logits(model, _moved_together(completions))
        missing = new - completions.sampled.sum(1, keepdim=True)
        column = (torch.arange(new, device=logits.device) + missing).clamp(max=new - 1)
        return logits[torch.arange(len(logits), device=logits.device)[:, None], column]
    accepted = forward_parameters(model)
    extra: dict[str, Any] = {}
    if "position_ids" in accepted:
        # Generation counts positions from the first real token; so must this.
        extra["position_ids"] = (completions.attention.cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = new + 1
    logits = model(
        input_ids=completions.ids, attention_mask=completions.attention, use_cache=False, **extra
    ).logits
    return logits[:, -(new + 1) : -1].float()


def too_wide(model: Any, completions: Completions) -> bool:
    """Whether the batch has more columns than the model's context positions."""
    context = context_length(model)
    return context is not None and completions.ids.shape[1] > context


def _moved_together(completions: Completions) -> Completions:
    """The rows with all padding on the left: each answer ends in the last column."""
    prompts = completions.attention[:, : completions.prompt_length].bool()
    real = torch.cat([prompts, completions.sampled], 1)
    width = int(real.sum(1).max())
    order = real.int().argsort(dim=1, stable=True)[:, -width:]
    ids, attention = completions.ids.gather(1, order), real.gather(1, order).long()
    return Completions(ids, attention, completions.sampled, completions.texts)


def forced(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[str | Sequence[int]],
    model: Any,
    chat: str = "auto",
) -> Completions:
    """Given answers, texts or token ids, each with its end token (`turn_end`), in the place of
    sampled ones.
    """
    ids, mask = encode(tokenizer, prompts, model.device, chat)
    ends = turn_end(model, tokenizer, chat)

    def ids_of(answer: str | Sequence[int]) -> list[int]:
        if not isinstance(answer, str):
            return list(answer)
        return list(tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])

    rows = [ids_of(answer) + ends for answer in answers]
    for answer, row in zip(answers, rows, strict=True):
        if not row:
            raise ValueError(
                f"answers must give at least one token each, got none for {answer!r}, and the "
                "model has no end token"
            )
    width = max(map(len, rows))
    check_context(model, mask.sum(1).tolist(), list(map(len, rows)))
    pad = pad_token(tokenizer)
    new = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
    kept = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    kept = kept.to(model.device)
    return Completions(
        torch.cat([ids, new], 1),
        torch.cat([mask, torch.ones_like(new)], 1),
        kept.bool(),
        [one if isinstance(one, str) else decode(tokenizer, one) for one in answers],
    )
