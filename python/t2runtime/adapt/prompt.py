"""Pass 1 by prompt: the model is asked to name the category of a question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from t2runtime import tasks
from t2runtime.generation import complete

INSTRUCTION = (
    "Analyze the given question and classify it into one of these categories: {names}.\n"
    "Question: {question}\nAnswer with the name of the category only.\nCategory:"
)


@dataclass(frozen=True)
class Categories:
    """The names pass 1 may give, how it is asked, and the name that means "the base weights"."""

    names: tuple[str, ...]
    template: str = INSTRUCTION
    other: str = "other"
    max_new_tokens: int = 8

    def __post_init__(self) -> None:
        if "{question}" not in self.template:
            raise ValueError(f"template must contain {{question}}, got {self.template!r}")
        if not self.names:
            raise ValueError("names must hold at least one category, got none")

    def prompt(self, question: str) -> str:
        """The pass-1 prompt of a question."""
        everything = ", ".join(dict.fromkeys((*self.names, self.other)))
        filled = self.template.replace("{names}", everything)
        return filled.replace("{question}", question)

    def read(self, reply: str) -> str:
        """The first word of the reply that is a category; anything else means `other`.

        >>> Categories(("math", "code")).read(" Math.")
        'math'
        >>> Categories(("math", "code")).read("poetry")
        'other'
        """
        return self.named(reply) or self.other

    def named(self, reply: str) -> str | None:
        """The first word of the reply that is a category, None if no word is one."""
        known = {name.lower(): name for name in (*self.names, self.other)}
        for word in re.findall(r"[\w-]+", reply.lower()):
            if word in known:
                return known[word]
        return None


#: For the small model: its own way to ask, one name per generated skill.
SMALL = Categories(tuple(tasks.SKILLS), tasks.category.PREFIX + "{question}")


def name_categories(
    model: Any,
    tokenizer: Any,
    bank: Any,
    categories: Categories,
    questions: Sequence[str],
    under: Any = None,
) -> list[str]:
    """The category of each question, asked under stated weights: None is the base, else a mixture
    of `bank`.
    """
    weights: AbstractContextManager[Any] = bank.use(under)
    with weights:
        replies = complete(
            model,
            tokenizer,
            [categories.prompt(question) for question in questions],
            categories.max_new_tokens,
        ).texts
    return [categories.read(reply) for reply in replies]
