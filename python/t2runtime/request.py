"""One request on its way through both passes, and the answer that the caller gets."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from t2runtime.adapt.prompt import Verdict
from t2runtime.adapt.weights import Mixture
from t2runtime.prompts import Prompt


@dataclass(frozen=True)
class Output:
    """One answer. The seconds are those of a pass over the whole batch that the request was in,
    which all its requests waited for.

    mixture: what pass 2 used. category, probabilities: what pass 1 said; None where it named no
    category. error: None, or why this request has no answer; its text is then empty.
    """

    text: str
    mixture: Mixture
    category: str | None = None
    probabilities: dict[str, float] | None = None
    pass1_seconds: float = 0.0
    pass2_seconds: float = 0.0
    error: str | None = None


@dataclass
class Request:
    """What becomes of one prompt on its way."""

    prompt: Prompt
    index: int = 0  # in the call
    most: int | None = None  # new tokens asked for
    ids: list[int] = field(default_factory=list)
    budget: int = 0
    mixture: Mixture = None
    verdict: Verdict | None = None
    text: str = ""
    error: str | None = None

    def output(self, pass1_seconds: float, pass2_seconds: float) -> Output:
        """As the caller gets it."""
        category = self.verdict.category if self.verdict else None
        probabilities = self.verdict.probabilities if self.verdict else None
        mixture = None if self.error else self.mixture
        return Output(self.text, mixture, category, probabilities,
                      pass1_seconds, pass2_seconds, self.error)  # fmt: skip

    def limit(self, most: Any) -> None:
        """At most so many new tokens."""
        self.most = count("max_new_tokens", most)

    def attempt(self, step: Callable[[Request], None]) -> None:
        """Do a step unless an earlier one failed; what is wrong with this request stays with it."""
        if self.error is None:
            try:
                step(self)
            except (ValueError, TypeError, KeyError) as error:
                self.error = str(error.args[0]) if error.args else type(error).__name__


def requests_of(
    prompts: Sequence[Prompt], max_new_tokens: int | Sequence[int] | None
) -> list[Request]:
    """One request a prompt; ValueError or TypeError for what concerns all of them.

    max_new_tokens: one number for all, one for each, or None: what the engine gives. A bad entry of
    a list is the error of its request.
    """
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise TypeError(
            "prompts must be a list of texts and chats, got "
            f"{type(prompts).__name__}. Wrap a single prompt: [prompt]"
        )
    each: Sequence[Any] = [max_new_tokens] * len(prompts)
    if isinstance(max_new_tokens, Sequence) and not isinstance(max_new_tokens, (str, bytes)):
        each = max_new_tokens
        if len(each) != len(prompts):
            raise ValueError(
                f"max_new_tokens must be one number, or one for each of {len(prompts)} prompts; "
                f"got {len(each)}"
            )
    elif max_new_tokens is not None:
        count("max_new_tokens", max_new_tokens)
    requests = [Request(prompt, index) for index, prompt in enumerate(prompts)]
    for request, given in zip(requests, each, strict=True):
        if given is not None:
            request.attempt(partial(Request.limit, most=given))
    return requests


def count(name: str, value: Any) -> int:
    """A number of at least 1; TypeError or ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int of at least 1, got {value!r:.80}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def asked_of(
    requests: list[Request], question: Callable[[Request], list[int]]
) -> tuple[list[Request], list[list[int]]]:
    """The requests that pass 1 can look at, and the token ids that it looks at."""
    asked: list[list[int]] = []
    for request in requests:
        request.attempt(lambda one: asked.append(question(one)))
    return [request for request in requests if request.error is None], asked
