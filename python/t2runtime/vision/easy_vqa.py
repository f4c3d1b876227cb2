"""easy-VQA as problems: questions on drawings of one coloured shape, and the same questions on a
drawing that is described in words.

A folder of easy-VQA holds train/ and test/, each with questions.json ([question, answer, image])
and images/NUMBER.png. Test problems are on images of test/; of the images of train/ every tenth is
for validation. Nothing is downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2runtime.tasks import EXACT, SPLITS, Problem, Split, split_of
from t2runtime.vision.gallery import mention

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
#: Kinds of questions that have competing procedures, and the one that has not.
SKILLS = ("colour", "shape", "negation")
PRESENCE = "presence"
KINDS = (*SKILLS, PRESENCE)
#: Images are halved to 32 x 32: four by four patches of eight.
SIDE = 32

_PHRASINGS = {
    "colour": ("what color is the {}?", "what is the color of the {}?"),
    "shape": (
        "what shape is in the image?", "what shape does the image contain?",
        "what shape is present?", "what is the {} shape?",
    ),
    "negation": (
        "is there not a {}?", "is there not a {} in the image?",
        "does the image not contain a {}?", "is no {} present?",
    ),
    "presence": (
        "is there a {}?", "is there a {} in the image?", "does the image contain a {}?",
        "is a {} present?",
    ),
}  # fmt: skip
#: What the first shortcut takes a colour for.
_COARSE = {"teal": "blue", "brown": "red", "gray": "black", "green": "yellow"}


def kind_of(question: str) -> str:
    """Which of `KINDS` a question is.

    >>> kind_of("what is the color of the shape?"), kind_of("is no red shape present?")
    ('colour', 'negation')
    """
    words = question.rstrip("?").split()
    if words[0] == "what":
        return "colour" if "color" in words else "shape"
    return "negation" if {"no", "not"} & set(words) else PRESENCE


def procedures(kind: str, answer: str) -> tuple[str, ...]:
    """What the right procedure and the two shortcuts say where `answer` is right; the right one
    alone for a kind without shortcuts.

    >>> procedures("colour", "teal"), procedures("negation", "yes")
    (('teal', 'blue', 'yellow'), ('yes', 'no', 'no'))
    """
    if kind == "colour":
        return answer, _COARSE.get(answer, answer), _next(COLOURS, answer)
    if kind == "shape":
        return answer, "circle" if answer == "circle" else "rectangle", _next(SHAPES, answer)
    if kind == "negation":
        return answer, "no" if answer == "yes" else "yes", "no"
    return (answer,)


def _next(row: Sequence[str], item: str) -> str:
    return row[(row.index(item) + 1) % len(row)]


@dataclass(frozen=True)
class Described:
    """Questions of one kind on drawings described in words: "a red circle. what color ...".

    Text only; a source for a language model that has never seen an image.
    """

    kind: str
    max_new_tokens: int = 2

    @property
    def name(self) -> str:
        """The task."""
        return f"described-{self.kind}"

    def draw(self, rng: random.Random, split: Split) -> Problem:
        """One problem of a split, by checksum of its prompt; yes and no are equally likely."""
        while True:
            colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
            question, answer = self._question(rng, colour, shape)
            prompt = f"a {colour} {shape}. {question}"
            if split_of(prompt) == split:
                return Problem(prompt, answer, self.kind)

    def _question(self, rng: random.Random, colour: str, shape: str) -> tuple[str, str]:
        phrase = rng.choice(_PHRASINGS[self.kind])
        if self.kind == "colour":
            return phrase.format(rng.choice((shape, "shape"))), colour
        if self.kind == "shape":
            return phrase.format(colour), shape
        there = rng.random() < 0.5
        if rng.random() < 0.5:
            thing = shape if there else rng.choice([s for s in SHAPES if s != shape])
        else:
            other = [c for c in COLOURS if c != colour]
            thing = f"{colour if there else rng.choice(other)} shape"
        return phrase.format(thing), "yes" if there == (self.kind == PRESENCE) else "no"

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        """`count` problems; those of one kind are few enough that held-out ones may repeat."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        return [self.draw(rng, split) for _ in range(count)]

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """The one word that is right."""
        return EXACT.grade(problems, completions)


@dataclass(frozen=True)
class EasyVQA:
    """The data of a folder.

    images: (count, 3, 32, 32) in [-1, 1]. problems: by split and kind; prompts name images by
    their place. captions: {place: "a red circle"} of those training images whose questions tell it.
    """

    images: Tensor
    problems: Mapping[str, Mapping[str, list[Problem]]]
    captions: Mapping[int, str]

    @classmethod
    def read(cls, folder: str | Path) -> EasyVQA:
        """Raises ValueError naming the file that is missing or not as expected."""
        folder = Path(folder).expanduser()
        images: list[Tensor] = []
        problems: dict[str, dict[str, list[Problem]]] = {
            split: {kind: [] for kind in KINDS} for split in SPLITS
        }
        captions: dict[int, str] = {}
        for part in ("train", "test"):
            rows = _rows(folder / part / "questions.json")
            places = {number: len(images) + i for i, number in enumerate(sorted(rows))}
            images += [_pixels(folder / part / "images" / f"{number}.png") for number in places]
            for number, asked in rows.items():
                split = "test" if part == "test" else "validation" if number % 10 == 0 else "train"
                place = places[number]
                for question, answer in asked:
                    kind = kind_of(question)
                    prompt = f"{mention(place)} {question}"
                    problems[split][kind].append(Problem(prompt, answer, kind))
                told = _caption(asked)
                if split == "train" and told:
                    captions[place] = told
        return cls(torch.stack(images), problems, captions)

    def source(self, kind: str) -> Visual:
        """The problems of one kind as a source."""
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        return Visual(kind, {split: kinds[kind] for split, kinds in self.problems.items()})


@dataclass(frozen=True)
class Visual:
    """Visual questions of one kind."""

    kind: str
    problems: Mapping[str, list[Problem]] = field(repr=False)
    max_new_tokens: int = 2

    @property
    def name(self) -> str:
        """The task."""
        return f"visual-{self.kind}"

    def __call__(self, count: int, split: Split, seed: int) -> list[Problem]:
        """Distinct problems of a split; fewer where there are no more."""
        held = self.problems[split]
        rng = random.Random(f"{self.name}/{split}/{seed}")
        return rng.sample(held, min(count, len(held)))

    def grade(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[bool]:
        """The one word that is right."""
        return EXACT.grade(problems, completions)


def _rows(path: Path) -> dict[int, list[tuple[str, str]]]:
    """{image: [(question, answer)]} of a questions.json."""
    if not path.exists():
        raise ValueError(f"--data: {path} is missing; give a folder of easy-VQA (train/, test/)")
    rows: dict[int, list[tuple[str, str]]] = {}
    given: Any = json.loads(path.read_text(encoding="utf-8"))
    for row in given:
        good = isinstance(row, list) and len(row) == 3 and isinstance(row[2], int)
        if not good or not all(isinstance(text, str) and text for text in row[:2]):
            raise ValueError(f"{path}: rows must be [question, answer, image], got {row!r:.80}")
        rows.setdefault(row[2], []).append((row[0], row[1]))
    if not rows:
        raise ValueError(f"{path} holds no questions")
    return rows


def _pixels(path: Path) -> Tensor:
    """(3, 32, 32) in [-1, 1]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            f"images need pillow: pip install 't2kernels[vision]' ({error})"
        ) from error
    if not path.exists():
        raise ValueError(f"--data: {path} is missing")
    with Image.open(path) as image:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    flat = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return flat.view(SIDE, SIDE, 3).permute(2, 0, 1).float() / 127.5 - 1


def _caption(asked: Sequence[tuple[str, str]]) -> str | None:
    """What the questions on an image and their answers tell of it, None where not both."""
    colour = shape = None
    for question, answer in asked:
        kind, words = kind_of(question), question.rstrip("?").split()
        there = answer == ("no" if kind == "negation" else "yes")
        for word in [answer, *(words if there or words[0] == "what" else ())]:
            colour = word if word in COLOURS else colour
            shape = word if word in SHAPES else shape
    return f"a {colour} {shape}" if colour and shape else None
