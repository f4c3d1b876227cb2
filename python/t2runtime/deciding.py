"""Pass 1 of one call: what gives every request its mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import t2kernels as t2k
from t2runtime.adapt.mixtures import Hashes
from t2runtime.adapt.prompt import Categories, judge, question_ids
from t2runtime.adapt.router import Router, hidden_features
from t2runtime.adapt.weights import Mixture, check_mixture, combined
from t2runtime.prompts import last_user_message, pad_left, pad_token, prompt_ids
from t2runtime.request import Request, asked_of

if TYPE_CHECKING:
    from t2runtime.engine import Transformer2

#: How the mixture of each request is decided; see `Transformer2.generate`.
STRATEGIES = ("prompt", "classifier", "mixture", "few-shot", "router", "record")
#: Shares of a "mixture" below this count as nothing.
_LEAST = 1e-3
#: Gives every request of a batch its mixture, and says whether that took a pass.
Decide = Callable[[list[Request]], bool]


class Decision:
    """How the requests of one call get their mixtures. Raises for what concerns all of them.

    The bank's experts are hashed once for the call, however many requests a found mixture answers.
    """

    def __init__(
        self, t2: Transformer2, strategy: Any, task: str | None, requests: Sequence[Request]
    ) -> None:
        self.t2, self._hashed = t2, Hashes(t2.bank)
        #: For each batch of the requests in turn.
        self.decide = self._of(strategy, task, requests)

    def _check(self, mixture: Mixture, what: str) -> None:
        check_mixture(self.t2.bank, mixture, what, self._hashed)

    def _of(self, strategy: Any, task: str | None, requests: Sequence[Request]) -> Decide:
        bank = self.t2.bank
        if isinstance(strategy, str) and strategy in STRATEGIES:
            return self._named(strategy, task)
        if strategy is None or isinstance(strategy, (str, Mapping)):
            if isinstance(strategy, str) and strategy not in bank:
                known = ", ".join((*STRATEGIES, *bank.names))
                raise ValueError(f"strategy must be one of {known}, or a mixture; got {strategy!r}")
            self._check(strategy, "strategy")
            return _for_all(strategy)
        if not isinstance(strategy, Sequence) or len(strategy) != len(requests):
            got = f"{len(strategy)} entries" if isinstance(strategy, Sequence) else repr(strategy)
            raise ValueError(
                f"strategy must be a name, a {{name: weight}}, None, or a list with one of these "
                f"for each of {len(requests)} prompts; got {got}"
            )
        for mixture, request in zip(strategy, requests, strict=True):
            request.mixture = mixture
            request.attempt(lambda one: self._check(one.mixture, "the mixture"))
        return lambda batch: False

    def _named(self, strategy: str, task: str | None) -> Decide:
        """One of `STRATEGIES`."""
        t2 = self.t2
        if strategy == "few-shot":
            return _for_all(self._found(task))
        if strategy == "classifier" and t2.classifier is None:
            raise ValueError(
                "strategy 'classifier' needs a classification expert: Transformer2(..., "
                "classifier=name) names one of the bank"
            )
        if strategy in ("router", "record"):
            made = t2.router if strategy == "router" else t2.record
            if made is None:
                raise ValueError(
                    f"strategy {strategy!r} needs one: Transformer2(..., {strategy}=FILE) "
                    f"loads what `t2 adapt --method {strategy}` wrote"
                )
            made.check(t2.bank, self._hashed)
            if isinstance(made, Router):
                router = made
                return lambda batch: self._routed(batch, router)
        categories = t2.categories_of(strategy, self._hashed)
        return lambda batch: self._pass1(batch, categories, strategy)

    def _found(self, task: str | None) -> Mixture:
        """The mixture that was found for a task."""
        mixtures = self.t2.mixtures
        if task is None or task not in mixtures:
            raise ValueError(
                "strategy 'few-shot' needs task=, one of the tasks that a mixture was found for "
                f"({', '.join(mixtures) or 'none: pass mixtures=folder'}), got {task!r}"
            )
        self._check(mixtures[task], f"task {task!r}")
        return mixtures[task]

    def _pass1(self, requests: list[Request], categories: Categories, strategy: str) -> bool:
        """Names the category of every request, with probabilities, and what it means."""
        model, tokenizer, chat = self.t2.model, self.t2.tokenizer, self.t2.chat
        reply = max(map(len, categories.replies(tokenizer, chat)))

        def question(one: Request) -> list[int]:
            return question_ids(model, tokenizer, categories, one.prompt, chat, reply=reply)

        sound, asked = asked_of(requests, question)
        if sound:
            invariant = t2k.is_batch_invariant()
            with self.t2.bank.use(self.t2.sorter(strategy)):
                verdicts = judge(model, tokenizer, categories, asked, chat,
                                 share_prefix=not invariant)  # fmt: skip
            for request, verdict in zip(sound, verdicts, strict=True):
                request.verdict = verdict
                request.attempt(lambda one: self._mean(one, categories, strategy))
        return True

    def _mean(self, request: Request, categories: Categories, strategy: str) -> None:
        """The mixture that the verdict on a request stands for."""
        verdict = request.verdict
        if verdict is None or not all(map(math.isfinite, verdict.probabilities.values())):
            raise ValueError(
                "pass 1 gave probabilities that are not finite: the weights in force overflow, or "
                "the classification expert has diverged"
            )
        if strategy == "record" and self.t2.record is not None:
            other = verdict.category == categories.other
            request.mixture = None if other else self.t2.record.choose(verdict.category)
        elif strategy == "mixture":
            shares = {k: v for k, v in verdict.probabilities.items() if v >= _LEAST}
            request.mixture = combined(shares, self.t2.mixture_of)
        else:
            request.mixture = self.t2.mixture_of(verdict.category, categories)
        self._check(request.mixture, f"category {verdict.category!r}")

    def _routed(self, requests: list[Request], router: Router) -> bool:
        """The mixture of every request by the router network, from the question alone."""
        model, tokenizer = self.t2.model, self.t2.tokenizer

        def question(one: Request) -> list[int]:
            return prompt_ids(tokenizer, last_user_message(one.prompt), self.t2.chat)

        sound, asked = asked_of(requests, question)
        if sound:
            ids, mask = pad_left(asked, pad_token(tokenizer), model.device)
            alpha = router.weights(hidden_features(model, ids, mask))
            for request, row in zip(sound, alpha.tolist(), strict=True):
                request.mixture = dict(zip(router.names, row, strict=True))
                request.attempt(lambda one: self._check(one.mixture, "the router"))
        return True


def _for_all(mixture: Mixture) -> Decide:
    """One mixture for every request, decided before; no pass."""

    def decide(requests: list[Request]) -> bool:
        for request in requests:
            request.mixture = mixture
        return False

    return decide
