"""One request on its way through both passes, and the answer that the caller gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from t2runtime.adapt.prompt import Verdict
from t2runtime.adapt.weights import Mixture
from t2runtime.generation import Prompt


@dataclass(frozen=True)
class Output:
    """One answer. The seconds are those of the whole batch's pass, which all its requests waited
    for.

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

    max_new_tokens: one number for all, one for each, or None: what the engine gives.
    """
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        raise TypeError(
            "prompts must be a list of texts and chats, got "
            f"{type(prompts).__name__}. Wrap a single prompt: [prompt]"
        )
    each = isinstance(max_new_tokens, (list, tuple))
    most = list(max_new_tokens) if each else [max_new_tokens] * len(prompts)  # type: ignore[arg-type]
    if len(most) != len(prompts):
        raise ValueError(
            f"max_new_tokens must be one number, or one for each of {len(prompts)} prompts; got "
            f"{len(most)}"
        )
    for number in most if each else [max_new_tokens]:
        if number is not None and number < 1:  # type: ignore[operator]
            raise ValueError(f"max_new_tokens must be at least 1, got {number}")
    return [Request(prompt, number) for prompt, number in zip(prompts, most, strict=True)]  # type: ignore[arg-type]


def asked_of(
    requests: list[Request], question: Callable[[Request], list[int]]
) -> tuple[list[Request], list[list[int]]]:
    """The requests that pass 1 can look at, and the token ids that it looks at."""
    asked: list[list[int]] = []
    for request in requests:
        request.attempt(lambda one: asked.append(question(one)))
    return [request for request in requests if request.error is None], asked


#: Gives every request its mixture, and says whether that took a pass.
Decide = Callable[[list[Request]], bool]


def for_all(mixture: Mixture) -> Decide:
    """One mixture for every request, decided before; no pass."""

    def decide(requests: list[Request]) -> bool:
        for request in requests:
            request.mixture = mixture
        return False

    return decide
