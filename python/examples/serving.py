"""Continuous batching: requests come and go, each under its own mixture, in the rows of one batch.

python python/examples/serving.py [STEPS]

Takes seconds. The experts are trained for STEPS = 2 steps each, enough to tell their answers apart;
more steps make better experts and take longer.

One slot for each row of the batch. A request is admitted into a free row (one mixing launch, and
its prompt is read), decodes beside the others, leaves when it is done, and the next takes its
place. The key/value cache is this loop's own: a row's part of it is replaced when the row is.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import t2kernels as t2k
from t2runtime import tasks
from t2runtime.loading import load
from t2runtime.train import small_model, train

ROWS, NEW_TOKENS = 3, 8

Mixture = str | dict[str, float] | None


@dataclass
class Request:
    number: int
    prompt: str
    mixture: Mixture
    tokens: list[int] = field(default_factory=list)  # generated so far
    held: int = 0  # tokens of it in the cache


class Server:
    """Decodes up to ROWS requests at a time, greedily."""

    def __init__(self, model: Any, tokenizer: Any, bank: t2k.ExpertBank) -> None:
        self.model, self.tokenizer, self.slots = model, tokenizer, bank.slots(ROWS)
        self.rows: list[Request | None] = [None] * ROWS
        self.cache: Any = None  # (ROWS, heads, columns, width) a layer; a row's tokens end it

    def admit(self, request: Request) -> None:
        """Mix its diagonals into the slot of a free row, read its prompt, keep what that leaves."""
        row = self.rows.index(None)
        self.slots.admit(row, request.mixture)
        self.slots.assign([row])
        ids = self.tokenizer(request.prompt, return_tensors="pt").input_ids
        with self.slots.use(1):
            out = self.model(input_ids=ids, use_cache=True)
        request.held = ids.shape[1]
        request.tokens.append(int(out.logits[0, -1].argmax()))
        self._paste(row, out.past_key_values)
        self.rows[row] = request

    def step(self) -> list[Request]:
        """The requests that are done leave, with their slots; one more token for the others."""
        done = [request for request in self.rows if request is not None and self._leaves(request)]
        if any(self.rows):
            self._decode()
        return done

    def _decode(self) -> None:
        self.slots.assign([None if r is None else row for row, r in enumerate(self.rows)])
        held = [0 if r is None else r.held for r in self.rows]
        last = [self.tokenizer.pad_token_id if r is None else r.tokens[-1] for r in self.rows]
        columns = self.cache.get_seq_length() + 1
        mask = torch.arange(columns) >= columns - 1 - torch.tensor(held)[:, None]
        with self.slots.use(ROWS):
            out = self.model(
                input_ids=torch.tensor(last)[:, None],
                attention_mask=mask.long(),
                position_ids=torch.tensor(held)[:, None],
                past_key_values=self.cache,
                use_cache=True,
            )
        for row, request in enumerate(self.rows):
            if request is not None:
                request.held += 1
                request.tokens.append(int(out.logits[row, -1].argmax()))

    def _leaves(self, request: Request) -> bool:
        done = request.tokens[-1] == self.tokenizer.eos_token_id
        if not done and len(request.tokens) < NEW_TOKENS:
            return False
        row = self.rows.index(request)
        self.rows[row] = None
        self.slots.assign([None if r is None else i for i, r in enumerate(self.rows)])
        self.slots.release(row)
        return True

    def _paste(self, row: int, fresh: Any) -> None:
        """Put the cache of one prompt into a row, all rows right-aligned, no column too many.

        The cache object stays the one that the model made: its keys belong to these slots.
        """
        if self.cache is None:
            self.cache = fresh
        new = fresh.get_seq_length()
        columns = max([new, *(r.held for r in self.rows if r is not None)])
        for ours, theirs in zip(self.cache.layers, fresh.layers):
            for name in ("keys", "values"):
                alone: Tensor = getattr(theirs, name)
                old: Tensor = getattr(ours, name)
                kept = min(columns, old.shape[2]) if len(old) == ROWS else 0
                wide = alone.new_zeros(ROWS, alone.shape[1], columns, alone.shape[3])
                if kept:
                    wide[:, :, columns - kept :] = old[:, :, old.shape[2] - kept :]
                wide[row, :, columns - new :] = alone[0]
                setattr(ours, name, wide)


@torch.no_grad()
def serve(model: Any, tokenizer: Any, bank: t2k.ExpertBank, requests: list[Request]) -> list[str]:
    """The answers, in the order of the requests; admits whenever a row is free."""
    server, waiting = Server(model, tokenizer, bank), deque(requests)
    while waiting or any(server.rows):
        while waiting and None in server.rows:
            server.admit(waiting.popleft())
        for request in server.step():
            print(f"  request {request.number} is done, {len(waiting)} waiting")
    return [tokenizer.decode(r.tokens, skip_special_tokens=True) for r in requests]


@torch.no_grad()
def at_once(model: Any, tokenizer: Any, bank: t2k.ExpertBank, requests: list[Request]) -> list[str]:
    """The same requests as one batch under ``bank.use``."""
    batch = tokenizer([r.prompt for r in requests], return_tensors="pt", padding=True)
    with bank.use([r.mixture for r in requests]):
        out = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = out[:, batch.input_ids.shape[1] :]
    answers: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def main(steps: int) -> None:
    """Two short trainings, eight requests, three rows."""
    model, tokenizer = load("small")
    t2k.convert(model, progress=False)
    bank = t2k.ExpertBank(model)
    for name in ("add", "reverse"):
        cfg = small_model(steps=steps, validate_every=10, validation_problems=16)
        bank.add(name, train(model, tokenizer, tasks.Generated(name), cfg))
    asked: list[tuple[str, Mixture]] = [
        ("37+48=", "add"), ("turn 48213=", "reverse"), ("say wxyz=", None),
        ("6+8=", {"add": 0.9}), ("turn 105=", {"reverse": 0.7, "add": 0.1}), ("90+15=", "add"),
        ("turn abc=", None), ("5+19=", {"add": 0.5, "reverse": 0.5}),
    ]  # fmt: skip
    requests = [Request(i, *what) for i, what in enumerate(asked)]
    answers = serve(model, tokenizer, bank, requests)
    for request, answer, expected in zip(
        requests, answers, at_once(model, tokenizer, bank, requests), strict=True
    ):
        print(f"{request.prompt:14s}{answer:10s}{request.mixture}")
        if answer != expected:
            raise SystemExit(f"under bank.use it was {expected!r}")
    print(f"the same {len(requests)} answers as one batch under bank.use")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
