"""Properties of a story: tasks for a model that knows nothing but how to tell one.

data        none; openings are generated, the model goes on
answer      right if the continuation has the property; there is no one right text
split       by the checksum of the opening

Measured on what is sampled and not on greedy text: the same opening can be continued in many ways.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from t2runtime.tasks.base import Problem, Split, draw_problems, split_of

PREFIX = "story:"
MAX_NEW_TOKENS = 96

_OPENINGS = (
    "Once upon a time, {name}",
    "One day, {name}",
    "{name} was a happy child. One day,",
    "There was a child named {name}.",
    "{name} went to the park with mom.",
    "In the morning, {name} woke up and",
)
_NAMES = (
    "Lily", "Tom", "Mia", "Ben", "Sue", "Tim", "Anna", "Max", "Lucy", "Sam", "Amy", "Jack",
    "Sara", "Bob", "Jane", "Leo", "Ella", "Joe", "Molly", "Spot", "Daisy", "Fin", "Mary", "John",
)  # fmt: skip
_ANIMALS = re.compile(
    r"\b(animal|bear|bee|bird|bunny|butterfly|cat|chicken|cow|dog|dragon|duck|elephant|fish|fox|"
    r"frog|goat|horse|kitten|kitty|lion|monkey|mouse|owl|pig|puppy|rabbit|sheep|snake|squirrel|"
    r"tiger|turtle|wolf)s?\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^.!?]+[.!?]")


def dialogue(text: str) -> bool:
    """Somebody speaks: a passage in quotation marks.

    >>> dialogue('Tom said, "Hello!"'), dialogue('He saw a "')
    (True, False)
    """
    return bool(re.search(r'"[^"]+"', text))


def animal(text: str) -> bool:
    """An animal occurs.

    >>> animal("She saw two birds."), animal("She caught a cold.")
    (True, False)
    """
    return bool(_ANIMALS.search(text))


def short_sentences(text: str) -> bool:
    """At least four whole sentences, of six words on average or fewer.

    >>> short_sentences("He ran. She ran. They fell. It was fun.")
    True
    >>> short_sentences("He ran to the very end of the long and winding road.")
    False
    """
    sentences = [found.split() for found in _SENTENCE.findall(text)]
    return len(sentences) >= 4 and sum(map(len, sentences)) <= 6 * len(sentences)


PROPERTIES: dict[str, Callable[[str], bool]] = {
    "dialogue": dialogue,
    "animal": animal,
    "short-sentences": short_sentences,
}


class Stories:
    """The source of one property, called "story:NAME"."""

    max_new_tokens = MAX_NEW_TOKENS

    def __init__(self, prop: str) -> None:
        if prop not in PROPERTIES:
            raise ValueError(
                f"task '{PREFIX}NAME': NAME must be one of {', '.join(PROPERTIES)}, got {prop!r}"
            )
        self.name = PREFIX + prop
        self._holds = PROPERTIES[prop]
        self._prompts: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
        for opening in _OPENINGS:
            for name in _NAMES:
                prompt = opening.format(name=name)
                self._prompts[split_of(prompt)].append(prompt)

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        """`count` openings; held-out ones are distinct, and fewer where there are no more."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        prompts = self._prompts[split]
        return draw_problems(lambda: Problem(rng.choice(prompts), "", self.name), count, split)

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """One verdict a problem."""
        return [self._holds(text) for _, text in zip(problems, completions, strict=True)]
