"""Self-adaptation in two passes: pass 1 decides a mixture per request, pass 2 answers with it.

Both passes run on stated weights: pass 1 on the base or on the classification expert, "other" on
the base. Nothing is carried from pass 1 to pass 2 but the decision, in particular no key/value
cache. A request that cannot be answered fails alone, and says why.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import t2kernels as t2k
from t2runtime.adapt.asking import bank_categories, servable
from t2runtime.adapt.mixtures import Hashes, load_mixtures
from t2runtime.adapt.prompt import Categories
from t2runtime.adapt.record import Record
from t2runtime.adapt.router import Router
from t2runtime.adapt.weights import Mixture, check_mixture, routing
from t2runtime.deciding import STRATEGIES, Decision
from t2runtime.decoding import Stream, answer
from t2runtime.invariant import invariant_model
from t2runtime.loading import load
from t2runtime.prompts import Prompt, context_length, prompt_ids, uses_template
from t2runtime.request import Output, Request, count, requests_of
from t2runtime.rows import row_order_of

__all__ = ["STRATEGIES", "Output", "Transformer2"]

NEW_TOKENS = 256


class Transformer2:
    """A model with a bank of experts that chooses, for every request, the experts that answer it.

    Args:
        model, tokenizer: a causal model of transformers, converted (`t2kernels.convert`).
        bank: its `t2kernels.ExpertBank`; experts may be added at any time.
        categories: what pass 1 may name. Default: the experts of the bank except classification
            experts, with their descriptions. "other" is always there and always means the base.
        classifier: the bank's expert under which pass 1 runs with strategy "classifier". It is
            asked as it was trained to be, which its file says (`adapt.asking`); other `categories`
            besides are refused. One whose file does not say it is asked like the base.
        mixtures: {category or task: mixture}, or a folder of found mixtures; a category that it
            does not name stands for the expert of that name.
        router, record: a `Router` and a `Record` of past performance, or the files that hold them,
            for the strategies of these names; tied by hash to the experts they were made for.
        chat: whether prompts go into the tokenizer's chat template: "auto", "on" or "off".
        row_order: "flat" or "batch", for models that flatten their batch inside (see
            `ExpertBank.use`), kept as the bank's own. Default: the bank's, or what is known of the
            model (`t2runtime.rows`).

    Raises ValueError where the classifier or a category, its own too, needs an expert that the bank
    lacks.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bank: t2k.ExpertBank,
        *,
        categories: Categories | None = None,
        classifier: str | None = None,
        mixtures: Mapping[str, Mixture] | str | Path | None = None,
        router: Router | str | Path | None = None,
        record: Record | str | Path | None = None,
        chat: str = "auto",
        row_order: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.bank, self.chat = model, tokenizer, bank, chat
        # A model has one routing at a time. Reentrant: a stream may ask something of its own.
        self._lock = threading.RLock()
        self.classifier = classifier
        bank.row_order = row_order or bank.row_order or row_order_of(model)
        uses_template(tokenizer, chat)  # raises for one that is asked for and not there
        saved = isinstance(mixtures, (str, Path))
        self.mixtures: dict[str, Mixture] = dict(
            load_mixtures(mixtures) if saved else mixtures or {}  # type: ignore[arg-type]
        )
        self.router = Router.load(router) if isinstance(router, (str, Path)) else router
        self.record = Record.load(record) if isinstance(record, (str, Path)) else record
        self._categories = categories
        self._told: set[str] = set()
        if classifier is not None:
            check_mixture(bank, classifier, "the classifier")
            self._own(classifier)
        if categories is not None:
            for name in categories.names:
                check_mixture(bank, self.mixture_of(name), f"category {name!r}")

    @classmethod
    def from_pretrained(
        cls,
        model_path: str,
        experts: str | Path | Mapping[str, str | Path | t2k.Expert] | None = None,
        *,
        targets: Any = "all-linear",
        dtype: str = "auto",
        device: str = "auto",
        factors: str | Path | None = None,
        classifier: str | Path | None = None,
        allow_mismatch: bool = False,
        **more: Any,
    ) -> Transformer2:
        """Load a model, convert it and fill the bank.

        Args:
            model_path: "small", a local folder, or a hub name.
            experts: a folder of expert files, which are named after them, or {name: file or
                Expert}.
            targets, factors: which layers, and a store made by `t2 decompose`; see
                `t2kernels.convert`.
            classifier: the name of one of the experts, or the file of one more.
            allow_mismatch: take experts that were made for another base weight.
            more: categories, mixtures, router, record, chat, row_order; see the class.
        """
        model, tokenizer = load(model_path, dtype, device)
        t2k.convert(model, targets=targets, decomposition=factors, progress=False)
        bank = t2k.ExpertBank(model)
        if isinstance(experts, Mapping):
            for name, given in experts.items():
                expert = given if isinstance(given, t2k.Expert) else t2k.Expert.load(given)
                bank.add(name, expert, allow_mismatch=allow_mismatch)
        elif experts is not None:
            bank.load(experts, allow_mismatch=allow_mismatch)
        if classifier is not None and str(classifier) not in bank:
            path, classifier = Path(classifier), Path(classifier).stem
            bank.add(classifier, t2k.Expert.load(path), allow_mismatch=allow_mismatch)
        sorter = None if classifier is None else str(classifier)
        return cls(model, tokenizer, bank, classifier=sorter, **more)

    # -- what pass 1 may say, and what it means ------------------------------------------------

    @property
    def categories(self) -> Categories:
        """What pass 1 may name now on the base: as given, or the bank's experts."""
        return self._categories or bank_categories(self.bank, self.classifier)

    def categories_of(self, strategy: str, hashed: Hashes | None = None) -> Categories:
        """What pass 1 asks with a strategy: under the classification expert what that was trained
        on, else `categories`. `hashed`: of the bank's experts, where they are known.
        """
        sorter = self.sorter(strategy)
        return (self._own(sorter, hashed) if sorter is not None else None) or self.categories

    def _own(self, sorter: str, hashed: Hashes | None = None) -> Categories | None:
        """What the classifier was trained on; looked up anew, since the bank may have changed."""
        return servable(self.bank, sorter, self._categories, self.mixture_of, self._told, hashed)

    def sorter(self, strategy: str) -> str | None:
        """The expert under which pass 1 runs with a strategy; None is the base."""
        return self.classifier if strategy in ("classifier", "record") else None

    def mixture_of(self, category: str, asked: Categories | None = None) -> Mixture:
        """The mixture that a category stands for; "other", or `asked.other`, means the base."""
        other = (asked or self._categories or Categories).other
        return None if category == other else self.mixtures.get(category, category)

    # -- the two passes --------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        strategy: str | Mapping[str, float] | Sequence[Mixture] | None = "prompt",
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = (),
        stream: Stream | None = None,
        task: str | None = None,
        batch_size: int | None = None,
    ) -> list[Output]:
        """Both passes, greedily; one output per prompt, in order.

        Args:
            prompts: texts or chats (lists of {"role", "content"}) of any lengths. Of a chat, pass 1
                looks at the last message, so that every turn is dispatched anew.
            strategy: "prompt" (pass 1 on the base names a category), "classifier" (pass 1 under
                the classification expert), "mixture" (pass 1 on the base; its probabilities are
                the weights, that of "other" is the base's share), "few-shot" (the found mixture of
                `task`, no pass 1), "router" (the router network turns what the base makes of the
                question into weights), "record" (pass 1 names a category, under the classification
                expert where there is one, else on the base; the category gets the expert that the
                record of past performance speaks for); else one mixture for all requests: an
                expert's name, a {name: weight}, None for the base; or a list of these, one per
                request. An expert that is called like a strategy is reached as {name: 1}.
            max_new_tokens: of each request, or a list with one entry per request; prompt and new
                tokens must fit into the context. Default: 256, or what the context leaves.
            stop: strings that end an answer and are not part of it.
            stream: called with (request, piece of text) while pass 2 runs. Of a request that fails
                then (logits that are not finite), pieces may have been given before.
            batch_size: so many prompts at once, in order, both passes of a batch before the next.
                Default: all at once. An output's seconds are those of its batch.

        In `t2kernels.batch_invariant()` a request's text depends on nothing else in the batch, nor
        on batch_size; see `t2runtime.invariant` for what that takes.

        Threads take turns: a call waits for that of another thread on this engine to end.

        Raises ValueError or TypeError for what concerns all requests: an unknown strategy
        or expert, an empty bank. What is wrong with one request is its `error`.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not all(isinstance(word, str) and word for word in stop):
            raise ValueError(f"stop must hold strings that are not empty, got {stop!r}")
        outputs: list[Output] = []
        with self._lock:
            for batch, first in self._decided(prompts, strategy, task, max_new_tokens, batch_size):
                start = self._now()
                with self._alone():
                    self._answer(batch, stop, stream)
                second = self._now() - start
                outputs += [request.output(first, second) for request in batch]
        return outputs

    def dispatch(
        self,
        prompts: Sequence[Prompt],
        strategy: str | Mapping[str, float] | Sequence[Mixture] | None = "prompt",
        *,
        task: str | None = None,
        batch_size: int | None = None,
    ) -> list[Output]:
        """Pass 1 alone: outputs with a mixture and no text, for whoever does something else than
        `generate` with the mixtures. Arguments and errors as there.
        """
        with self._lock:
            batches = self._decided(prompts, strategy, task, 1, batch_size)
            return [one.output(first, 0.0) for batch, first in batches for one in batch]

    def _decided(
        self, prompts: Sequence[Prompt], strategy: Any, task: str | None,
        max_new_tokens: int | Sequence[int] | None, batch_size: int | None,
    ) -> Iterator[tuple[list[Request], float]]:  # fmt: skip
        """Batch by batch: its requests with their mixtures, and the seconds of its pass 1 (0 where
        none ran).
        """
        requests = requests_of(prompts, max_new_tokens)
        size = len(requests) if batch_size is None else count("batch_size", batch_size)
        decide = Decision(self, strategy, task, requests).decide
        for begin in range(0, len(requests), size or 1):
            batch = requests[begin : begin + size]
            for request in batch:
                request.attempt(self._read)
            start = self._now()
            with self._alone():
                ran = decide(batch)
            yield batch, self._now() - start if ran else 0.0

    def _alone(self) -> AbstractContextManager[None]:
        """In batch-invariant mode the whole model is."""
        return invariant_model(self.model) if t2k.is_batch_invariant() else nullcontext()

    def _read(self, request: Request) -> None:
        """Token ids of the request, and how many new ones it may have."""
        request.ids = prompt_ids(self.tokenizer, request.prompt, self.chat)
        if not request.ids:
            raise ValueError("the prompt gives no token; write something")
        context = context_length(self.model)
        room = NEW_TOKENS if context is None else context - len(request.ids)
        request.budget = request.most or min(NEW_TOKENS, room)
        if context is not None and (room < request.budget or room < 1):
            asked, more = "at least one new one is needed", ""
            if request.most is not None:
                asked = f"{request.most} new ones are asked for (max_new_tokens)"
                more = " or lower max_new_tokens" if room >= 1 else ""
            raise ValueError(
                f"the prompt has {len(request.ids)} tokens and {asked}, the model's context holds "
                f"{context}. Shorten the prompt{more}"
            )

    def _answer(self, requests: list[Request], stop: Sequence[str], stream: Stream | None) -> None:
        """Pass 2 over the requests that are sound."""
        sound = [one for one in requests if one.error is None]
        if not sound:
            return
        passed_on: Stream | None = None
        if stream is not None:
            said = stream
            passed_on = lambda row, piece: said(sound[row].index, piece)  # noqa: E731
        with self.bank.use(routing(self.bank, [one.mixture for one in sound])):
            answers = answer(
                self.model, self.tokenizer, [one.ids for one in sound],
                [one.budget for one in sound], stop, passed_on,
            )  # fmt: skip
        for request, (text, error) in zip(sound, answers, strict=True):
            request.text, request.error = text, error

    def _now(self) -> float:
        """The clock, after the GPU has finished what it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
