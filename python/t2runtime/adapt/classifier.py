"""Pass 1 by classification expert: an expert whose task is to name the category, trained like any
other.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2runtime.adapt.prompt import Categories
from t2runtime.tasks import Problem, Split
from t2runtime.train import Config, Log, Source, train


def category_source(sources: Mapping[str, Source], categories: Categories) -> Source:
    """Category questions drawn in equal parts from the sources, which are keyed by category.

    A split of the result holds questions of the same split of the sources: nothing is trained on
    test data.
    """
    unknown = set(sources) - {*categories.names, categories.other}
    if unknown:
        raise ValueError(
            f"sources must be keyed by category, got {', '.join(sorted(unknown))}; "
            f"known are {', '.join((*categories.names, categories.other))}"
        )

    def draw(count: int, split: Split, seed: int) -> list[Problem]:
        share = -(-count // len(sources))
        drawn = [
            Problem(categories.prompt(problem.prompt), name, "category")
            for name, source in sources.items()
            for problem in source(share, split, seed)
        ]
        random.Random(f"category/{split}/{seed}").shuffle(drawn)
        return drawn[:count]

    return draw


def train_classifier(
    model: Any,
    tokenizer: Any,
    sources: Mapping[str, Source],
    categories: Categories,
    cfg: Config,
    out: Path | None = None,
    log: Log | None = None,
) -> Any:
    """Train the classification expert by the same REINFORCE loop, +1 for the right category and
    -1 otherwise.
    """
    return train(model, tokenizer, category_source(sources, categories), cfg, out, log)
