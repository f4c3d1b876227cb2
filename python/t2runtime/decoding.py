"""Greedy answers for a batch of rows that each stop on their own: at the end token, at a stop
string, or when their tokens are used up. Text can be had while it is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from t2runtime.generation import decode, sampling
from t2runtime.prompts import end_tokens, pad_left, pad_token

#: A byte, in tokenizers that fall back to them.
_BYTE = re.compile("<0x[0-9A-F]{2}>")
#: Called with the row and the next piece of its text.
Stream = Callable[[int, str], None]


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    budgets: Sequence[int],
    stop: Sequence[str] = (),
    stream: Stream | None = None,
) -> list[tuple[str, str | None]]:
    """(text, None) of each row of token ids: at most `budgets[row]` tokens, without the end token,
    and up to the first of the `stop` strings; or ("", why there is none), for a row whose logits
    are not finite, or all equal, under the weights in force. Such a row ends there, the others go
    on.

    `stream` gets pieces that add up to the text; what may turn out to be part of a stop string, or
    of a character, is held back. A tokenizer that takes back what it has decoded in another way
    than bytes ends the row's stream there: its pieces are then the beginning of what it said.
    """
    ids, mask = pad_left(rows, pad_token(tokenizer), model.device)
    ends = end_tokens(model, tokenizer)
    watch = _Watch(tokenizer, ids.shape[1], list(budgets), ends, tuple(stop), stream)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max(budgets),
        pad_token_id=pad_token(tokenizer),
        logits_processor=[watch.look],
        stopping_criteria=[watch],
        **sampling(model, 0.0),
    )
    texts = watch.texts(output)
    return [
        (text, None) if row not in watch.failed else ("", _overflow(watch.failed[row], model.dtype))
        for row, text in enumerate(texts)
    ]


def _overflow(what: str, dtype: torch.dtype) -> str:
    return (
        f"pass 2 gave logits that are {what}: the weights of the mixture are so large that the "
        f"model overflows in {str(dtype).removeprefix('torch.')}, or an expert has diverged. Give "
        "smaller weights"
    )


@dataclass
class _Watch:
    """What a batch being generated is asked after each token: which rows are done."""

    tokenizer: Any
    width: int
    budgets: list[int]
    ends: list[int]
    stop: tuple[str, ...]
    stream: Stream | None
    lengths: dict[int, int] = field(default_factory=dict)  # new tokens of the rows that are done
    given: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # what their logits were, and when

    def look(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits (rows, vocabulary) as they are, after a look for rows that overflowed.

        A maximum that is not finite is that of NaN, of an overflow, or of no token at all; some
        tokens may be forbidden (-inf). Logits that are all equal choose none: a norm divides by
        infinity where the squares that it sums overflow, and leaves 0 of every value.
        """
        most, least = scores.amax(-1), scores.amin(-1)
        finite = most.isfinite()
        for row in (~finite | (most == least)).nonzero()[:, 0].tolist():
            if row not in self.lengths:
                what = "all equal, as a norm leaves them" if bool(finite[row]) else "not finite"
                new = input_ids.shape[1] - self.width
                self.failed.setdefault(row, f"{what} after {new} new tokens")
        return scores

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """(rows,) bool, True where a row is done."""
        new = input_ids.shape[1] - self.width
        last = input_ids[:, -1].tolist()
        for row, budget in enumerate(self.budgets):
            if row in self.failed:
                self.lengths.setdefault(row, 0)
            if row in self.lengths:
                continue
            ended = last[row] in self.ends
            done = ended or new >= budget
            if self.stop or self.stream:
                ids = input_ids[row, self.width : self.width + new - ended].tolist()
                done = self._said(row, ids, done) or done
            if done:
                self.lengths[row] = new - ended
        done_rows = [row in self.lengths for row in range(len(self.budgets))]
        return torch.tensor(done_rows, device=input_ids.device)

    def _said(self, row: int, ids: list[int], done: bool) -> bool:
        """Pass on what is certain of the row's text so far; whether a stop string is in it."""
        text = decode(self.tokenizer, ids)
        cut = self._cut(text)
        stopped = len(cut) < len(text)
        if self.stream:
            certain = cut
            if not (stopped or done):
                count = self._settled(ids)
                certain = text if count == len(ids) else decode(self.tokenizer, ids[:count])
                certain = certain[: len(certain) - self._open(certain)]
            before = self.given.get(row, "")
            if len(certain) > len(before) and certain.startswith(before):
                self.given[row] = certain
                self.stream(row, certain[len(before) :])
        return stopped

    def _settled(self, ids: list[int]) -> int:
        """How many of the ids stand before the bytes at the end. A run of bytes that turns out not
        to be UTF-8 is decoded as U+FFFD throughout, its letters too.
        """
        count = len(ids)
        while count:
            token = self.tokenizer.convert_ids_to_tokens(ids[count - 1])
            if token is None or not _BYTE.fullmatch(token):  # None: no token has this id
                break
            count -= 1
        return count

    def _cut(self, text: str) -> str:
        """The text up to the first stop string."""
        found = [at for at in map(text.find, self.stop) if at >= 0]
        return text[: min(found)] if found else text

    def _open(self, text: str) -> int:
        """Characters at the end that may become part of a stop string or of another character."""
        most = len(text) - len(text.rstrip("\ufffd"))
        for word in self.stop:
            for length in range(1, min(len(word), len(text) + 1)):
                if text.endswith(word[:length]):
                    most = max(most, length)
        return most

    def texts(self, output: Tensor) -> list[str]:
        """The finished texts; rows that the model ended otherwise count whole."""
        new = output[:, self.width :]
        return [
            self._cut(decode(self.tokenizer, row[: self.lengths.get(index, new.shape[1])]))
            for index, row in enumerate(new)
        ]
