"""Prompts as token ids: one left-padded batch for training, evaluation and both passes.

A prompt is a text, or a chat: a list of {"role", "content"} messages that ends with the user's.
Three rules for tokenizers and contexts, the same everywhere:
  no pad token      the end token pads, and is masked there; without one, id 0;
  chat template     chat="auto" makes each prompt the user's turn of the tokenizer's template where
                    it has one and leaves it as it is where not; "on" demands one, "off" uses none
                    (chats always need one);
  long prompts      prompt and max_new_tokens must fit into the model's context; nothing is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Prompt = str | Sequence[Mapping[str, str]]


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
    turn, and for text that is none (a lone surrogate).

    >>> messages_of("Hello")
    [{'role': 'user', 'content': 'Hello'}]
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": _sound(prompt)}]
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
    return [{**message, "content": _sound(message["content"])} for message in messages]


def _sound(text: str) -> str:
    """The text, if it is one: tokenizers take no lone surrogates, and say something else."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a prompt must be text that UTF-8 can hold, got {text[error.start]!r} at character "
            f"{error.start}, half of a character or a byte that was not UTF-8. Leave it out"
        ) from None
    return text


def last_user_message(prompt: Prompt) -> str:
    """The text of a prompt, or of the turn that a chat ends with."""
    return messages_of(prompt)[-1]["content"]


def prompt_ids(tokenizer: Any, prompt: Prompt, chat: str = "auto") -> list[int]:
    """The ids of one prompt; a template puts its own first token, so none is added twice."""
    messages = messages_of(prompt)
    # verbose=False: what fits is checked here, against the model's own context.
    if not uses_template(tokenizer, chat):
        if not isinstance(prompt, str):
            raise ValueError(
                "a chat needs a tokenizer with a chat template and chat='auto' or 'on'; give this "
                "model a str"
            )
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    try:
        made = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            tokenizer_kwargs={"verbose": False},
        )  # fmt: skip
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
