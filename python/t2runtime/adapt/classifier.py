"""Pass 1 by classification expert: an expert whose task is to name the category, trained like any
other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2runtime.adapt.asking import KEY
from t2runtime.adapt.prompt import Categories
from t2runtime.tasks import Problem, Source, Split
from t2runtime.train import Config, Log, train


@dataclass(frozen=True)
class CategorySource:
    """Category questions drawn in equal parts from the sources, which are keyed by category.

    A split of the result holds questions of the same split of the sources: nothing is trained on
    test data.
    """

    sources: Mapping[str, Source]
    categories: Categories
    name: str = "category"

    def __post_init__(self) -> None:
        known = self.categories.all_names
        unknown = sorted(set(self.sources) - set(known))
        if unknown or not self.sources:
            raise ValueError(
                f"sources must be keyed by category, got {', '.join(unknown) or 'none'}; "
                f"known are {', '.join(known)}"
            )

    @property
    def max_new_tokens(self) -> int:
        """As pass 1 gives."""
        return self.categories.max_new_tokens

    @property
    def identity(self) -> dict[str, Any]:
        """Those of the sources, by category, and the way of asking; see `Source`."""
        parts = {
            f"{name} {key}": value
            for name, source in self.sources.items()
            for key, value in getattr(source, "identity", {"source": source}).items()
        }
        asked = {**self.categories.facts(), "names": self.categories.names}
        asked["descriptions"] = tuple(sorted(self.categories.descriptions.items()))
        return {**parts, **asked}

    def expert_metadata(self, chat: str) -> dict[str, Any]:
        """What the expert that is trained on these questions must say of itself: how they are
        asked. `chat`: "on" or "off", whether in the chat template.
        """
        return {KEY: replace(self.categories, chat=chat).facts()}

    @property
    def skipped(self) -> int:
        """Broken lines of all sources that were left out."""
        return sum(getattr(source, "skipped", 0) for source in self.sources.values())

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        """`count` questions as pass 1 asks them, in random order; fewer where the sources have no
        more.
        """
        return [
            replace(problem, prompt=self.categories.prompt(problem.prompt))
            for problem in self.questions(count, split, seed)
        ]

    def questions(self, count: int, split: Split, seed: int) -> list[Problem]:
        """The same questions without pass 1's words around them."""
        share = -(-count // len(self.sources))
        drawn = [
            Problem(problem.prompt, name, self.name)
            for name, source in self.sources.items()
            for problem in source(share, split, seed)
        ]
        random.Random(f"category/{split}/{seed}").shuffle(drawn)
        return drawn[:count]

    def target_ids(self, problems: Sequence[Problem], tokenizer: Any, chat: str) -> list[list[int]]:
        """The names as pass 1 scores them: behind the words of the prompt they may be other tokens
        than by themselves.
        """
        ways = self.categories.replies(tokenizer, chat)
        known = dict(zip(self.categories.all_names, ways, strict=True))
        return [known[problem.answer] for problem in problems]

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """Read as pass 1 reads; a reply that names no category is wrong, also where `other` is
        right.
        """
        return [
            self.categories.named(text) == problem.answer
            for problem, text in zip(problems, completions, strict=True)
        ]


def train_classifier(
    model: Any,
    tokenizer: Any,
    sources: Mapping[str, Source],
    categories: Categories,
    cfg: Config,
    out: Path | None = None,
    log: Log | None = None,
    overwrite: bool = False,
) -> Any:
    """Train the classification expert by the same REINFORCE loop, +1 for the right category and
    -1 otherwise. `overwrite`: see `train`.

    The expert's metadata hold how it was asked; see `adapt.asking`.
    """
    source = CategorySource(sources, categories)
    return train(model, tokenizer, source, cfg, out, log, overwrite=overwrite)
