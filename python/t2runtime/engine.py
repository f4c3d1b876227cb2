"""Two passes over one mixed batch: pass 1 decides a mixture per request, pass 2 answers with it.

Both passes run on stated weights: pass 1 on the base or on the classification expert, "other" on
the base. Nothing is carried from pass 1 to pass 2 but the names, in particular no key/value
cache.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from t2runtime.adapt.prompt import Categories, name_categories
from t2runtime.generation import complete

#: None is the base, a name is that expert at 1, a mapping gives weights.
Mixture = str | Mapping[str, float] | None


@dataclass(frozen=True)
class Output:
    """One answer. The seconds are those of the whole batch's pass, which all its requests waited
    for.
    """

    text: str
    mixture: Mixture
    category: str
    pass1_seconds: float
    pass2_seconds: float


@dataclass
class TwoPass:
    """Answers questions with the mixture that pass 1 chooses for each.

    bank: a `t2kernels.ExpertBank` of the model. classifier: the bank's expert under which pass 1
    runs (None: the base weights). mixtures: what each category means; by default the expert of
    the same name.
    """

    model: Any
    tokenizer: Any
    bank: Any
    categories: Categories
    classifier: str | None = None
    mixtures: Mapping[str, Mixture] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needed = {} if self.classifier is None else {self.classifier: "the classifier"}
        for category in self.categories.names:
            mixture = self.mixture_of(category)
            experts = [mixture] if isinstance(mixture, str) else list(mixture or ())
            needed |= dict.fromkeys(experts, f"category {category!r}")
        for name, use in needed.items():
            if name not in self.bank.names:
                raise ValueError(
                    f"{use} needs expert {name!r}, the bank has {', '.join(self.bank.names)}. "
                    "Add it, or say mixtures={category: None} for a category that the base answers."
                )

    def mixture_of(self, category: str) -> Mixture:
        """The mixture that a category stands for; "other" always means the base weights."""
        if category == self.categories.other:
            return None
        return self.mixtures.get(category, category)

    def generate(self, questions: Sequence[str], max_new_tokens: int) -> list[Output]:
        """Both passes, greedily; one output per question, in order."""
        start = self._now()
        names = name_categories(
            self.model, self.tokenizer, self.bank, self.categories, questions, self.classifier
        )
        middle = self._now()
        mixtures = [self.mixture_of(name) for name in names]
        with self.bank.use(mixtures):
            texts = complete(self.model, self.tokenizer, questions, max_new_tokens).texts
        end = self._now()
        return [
            Output(text, mixture, name, middle - start, end - middle)
            for text, mixture, name in zip(texts, mixtures, names, strict=True)
        ]

    def _now(self) -> float:
        """The clock, after the GPU has finished what it was given."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
