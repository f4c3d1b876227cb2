"""Problems, where they come from and how their answers are graded; and what a generated task is:
a question, the right procedure, and two procedures that compete with it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from t2runtime import rewards

Split = Literal["train", "validation", "test"]
#: So many draws in a row without a new question mean that there is none left.
_REPEATS = 5000
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Problem:
    """One question with its right answer; `category` is the name of the expert that should
    answer. `tests` are the programs that an answer made of code must pass (code tasks only).

    `answer` is what grading needs. What a model should write is `solution`, where that is another
    text: reasoning that ends in the answer, or a program. None: it is the answer itself; "": the
    data hold no such text.
    """

    prompt: str
    answer: str
    category: str
    tests: tuple[str, ...] = ()
    solution: str | None = None

    @property
    def target(self) -> str:
        """The text that next-token training learns.

        >>> Problem("1+1=", "2", "add").target, Problem("?", "2", "sum", solution="1+1 is 2").target
        ('2', '1+1 is 2')
        """
        return self.answer if self.solution is None else self.solution


class Grader(Protocol):
    """Says which completions are right."""

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """Completion i answers problem i; as many verdicts, in order."""


class Source(Grader, Protocol):
    """What training and evaluation ask for: problems by split, and their grading.

    A source may have an `identity`: a mapping of plain values and functions that decide its
    problems and rewards. A run is resumed only under an equal one; without it, the attributes that
    are plain values or functions are compared. The code of the class is compared in any case.
    It may have `expert_metadata(chat)`: {key: value} that goes into the metadata of an expert which
    is trained on it, `chat` being "on" or "off"; and `target_ids(problems, tokenizer, chat)`: the
    token ids that next-token training learns, where a target by itself would have others.
    """

    @property
    def name(self) -> str:
        """The task."""

    @property
    def max_new_tokens(self) -> int:
        """Enough for the answers of this task."""

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        """Problems of one split; the same arguments give the same problems."""


@dataclass(frozen=True)
class ByAnswer:
    """Grades by comparing what `extract` reads from the completion with the answer, which `own`
    reads where the task has its own way; see `rewards.gold`.
    """

    extract: rewards.Extract = rewards.text
    own: rewards.Extract | None = None

    def check(self, problem: Problem) -> None:
        """Raise ValueError where no completion can be right."""
        rewards.check_gold(problem.answer, self.extract, self.own)

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """One verdict a problem."""
        return [
            rewards.is_correct(text, problem.answer, self.extract, self.own)
            for problem, text in zip(problems, completions, strict=True)
        ]


#: The completion, spaces around it aside, is the answer.
EXACT = ByAnswer()


def split_of(data: str) -> Split:
    """The split that a question's data belong to, the same in every run: 80 / 10 / 10 by checksum.

    The base model, the experts and the classifier see training data only, whatever the phrasing.

    >>> split_of("37+48")
    'train'
    """
    bucket = zlib.crc32(data.encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def draw_problems(draw: Callable[[], Problem], count: int, split: Split) -> list[Problem]:
    """`count` problems; those held out are distinct, and fewer where no more can be found.

    A question asked twice would count twice, and the interval of the score would be too narrow.
    """
    if split == "train":
        return [draw() for _ in range(count)]
    found: dict[str, Problem] = {}
    repeats = 0
    while len(found) < count and repeats < _REPEATS:
        problem = draw()
        repeats = repeats + 1 if problem.prompt in found else 0
        found.setdefault(problem.prompt, problem)
    return list(found.values())


@dataclass(frozen=True)
class Task:
    """A generated task.

    `draw` makes the data of one question; `right` answers it; the two `shortcuts` answer it wrongly
    but systematically, the first more often than the second (only the base model's text uses them).
    The data stand last in every phrasing, just before "=", so that a phrasing moves no digit.
    """

    name: str
    phrasings: tuple[str, ...]
    draw: Callable[[random.Random], str]
    right: Callable[[str], str]
    shortcuts: tuple[Callable[[str], str], ...] = ()

    def data(self, rng: random.Random, split: Split) -> str:
        """Data of one question of `split`."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        while True:
            data = self.draw(rng)
            if split_of(data) == split:
                return data

    def prompt(self, rng: random.Random, data: str) -> str:
        """One of the phrasings around the data."""
        return rng.choice(self.phrasings) + data + "="

    def problem(self, rng: random.Random, split: Split) -> Problem:
        """One question of `split` with its right answer."""
        data = self.data(rng, split)
        return Problem(self.prompt(rng, data), self.right(data), self.name)

    def problems(self, count: int, split: Split, seed: int) -> list[Problem]:
        """`count` questions of `split`, the same for the same seed; see `draw_problems`."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        return draw_problems(lambda: self.problem(rng, split), count, split)
