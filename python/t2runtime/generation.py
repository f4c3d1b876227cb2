"""Prompts in, token ids and text out: one left-padded batch for training, evaluation and both
passes.

Nothing here knows experts: whoever wants a mixture opens `bank.use(...)` around the call.
A prompt is a text, or a chat: a list of {"role", "content"} messages that ends with the user's.
Three rules for tokenizers and contexts, the same everywhere:
  no pad token      the end token pads, and is masked there; without one, id 0;
  chat template     chat="auto" makes each prompt the user's turn of the tokenizer's template where
                    it has one and leaves it as it is where not; "on" demands one, "off" uses none
                    (chats always need one);
  long prompts      prompt and max_new_tokens must fit into the model's context; nothing is cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Prompt = str | Sequence[Mapping[str, str]]


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


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the model's own, else the tokenizer's; may be empty."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def turn_end(model: Any, tokenizer: Any, chat: str = "auto") -> list[int]:
    """The one id that a given answer is ended with, [] where nothing ends answers.

    Of several, that which the chat template puts behind an assistant's turn, where prompts go into
    it; else the tokenizer's own; else the first.
    """
    ends = end_tokens(model, tokenizer)
    likely = [tokenizer.eos_token_id]
    if uses_template(tokenizer, chat):
        said = "This is the reply."
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        behind = whole.rpartition(said)[2]
        likely = [*tokenizer(behind, add_special_tokens=False)["input_ids"], *likely]
    return [token for token in [*likely, *ends] if token in ends][:1]


def pad_token(tokenizer: Any) -> int:
    """The id to pad with; masked everywhere, so any id does where the tokenizer names none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def uses_template(tokenizer: Any, chat: str) -> bool:
    """Whether prompts go into the chat template, by the rule above."""
    if chat not in ("auto", "on", "off"):
        raise ValueError(f"chat must be 'auto', 'on' or 'off', got {chat!r}")
    has_one = getattr(tokenizer, "chat_template", None) is not None
    if chat == "on" and not has_one:
        raise ValueError(
            "chat='on' needs a tokenizer with a chat template, and this one has none; "
            "use chat='off' to give prompts as they are"
        )
    return has_one and chat != "off"


def messages_of(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as chat messages; a text is the user's only one.

    Raises TypeError for what is neither, ValueError for a chat that does not end with the user's
    turn.

    >>> messages_of("Hello")
    [{'role': 'user', 'content': 'Hello'}]
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise TypeError(
            "a prompt must be a str or a list of {'role', 'content'} messages, got "
            f"{type(prompt).__name__}"
        )
    messages: list[Any] = list(prompt)
    for index, message in enumerate(messages):
        keys = ("role", "content")
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in keys
        ):
            raise TypeError(
                f"message {index} of a chat must be {{'role': str, 'content': str}}, "
                f"got {message!r:.80}"
            )
    if not messages or messages[-1]["role"] != "user":
        got = f"one by {messages[-1]['role']!r}" if messages else "no message"
        raise ValueError(f"a chat must end with a message of role 'user', got {got}")
    return [dict(message) for message in messages]


def last_user_message(prompt: Prompt) -> str:
    """The text of a prompt, or of the turn that a chat ends with."""
    return messages_of(prompt)[-1]["content"]


def prompt_ids(tokenizer: Any, prompt: Prompt, chat: str = "auto") -> list[int]:
    """The ids of one prompt; a template puts its own first token, so none is added twice."""
    messages = messages_of(prompt)
    if not uses_template(tokenizer, chat):
        if not isinstance(prompt, str):
            raise ValueError(
                "a chat needs a tokenizer with a chat template and chat='auto' or 'on'; give this "
                "model a str"
            )
        # verbose=False: what fits is checked here, against the model's own context.
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    try:
        made = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # what a template raises is jinja2's, and jinja2 is not ours
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise ValueError(f"the chat template refuses this chat: {error}") from error
    return list(made["input_ids"])


def context_length(model: Any) -> int | None:
    """Positions that the model was made for, None where its config does not say."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return None if length is None else int(length)


def check_context(model: Any, lengths: Sequence[int], new: Sequence[int]) -> None:
    """Raise unless prompts of these lengths and each as many new tokens fit into the context."""
    context = context_length(model)
    if context is None:
        return
    pairs = zip(lengths, new, strict=True)
    long = [row for row, (length, most) in enumerate(pairs) if length + most > context]
    if long:
        raise ValueError(
            f"{len(long)} of {len(lengths)} prompts do not fit: prompt {long[0]} has "
            f"{lengths[long[0]]} tokens and {new[long[0]]} new ones are asked for "
            f"(max_new_tokens), the model's context holds {context}. Shorten the prompt or lower "
            "max_new_tokens."
        )


def encode(
    tokenizer: Any, prompts: Sequence[Prompt], device: torch.device, chat: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (rows, length), padded on the left; the tokenizer is left as
    it is.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    rows = [prompt_ids(tokenizer, prompt, chat) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise ValueError(f"prompts must give at least one token each, got none for {prompt!r}")
    return pad_left(rows, pad_token(tokenizer), device)


def pad_left(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (rows, length) of rows of any lengths."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


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
