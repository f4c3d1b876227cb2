"""ARC-Easy, ARC-Challenge and OpenBookQA: questions of natural science with three to five choices.

data        folder with train and test (.json or .jsonl), in one of three layouts:
            {"question": {"stem", "choices": [{"label", "text"}]}, "answerKey"}, the original;
            {"question" or "question_stem", "choices": {"label": [], "text": []}, "answerKey"};
            {"instruction": "... question: STEM Answer1: ... Answer2: ...", "answer": "answer2"}
prompt      question and choices; keys are A, B, ... whatever the data call them (some say 1-4)
answer      `rewards.choice`: a letter, or the number of the choice
split       the data's own train and test (validation too, where it is there, else a tenth of train)
"""

from __future__ import annotations

import re
from collections.abc import Callable

from t2runtime import rewards
from t2runtime.tasks.base import ByAnswer, Problem
from t2runtime.tasks.files import Data, FileSource, OnBadLines, Row, text_of
from t2runtime.tasks.files import load as load_files

NAMES = ("arc-easy", "arc-challenge", "openbookqa")
MAX_NEW_TOKENS = 8
LETTERS = "ABCDEFGH"
_ASKED = re.compile(r"^.*?correct answer to the question:\s*", re.DOTALL)
_CHOICE = re.compile(r"(?:^|(?<=\s))Answer(\d):\s*")


def render(stem: str, choices: list[str]) -> str:
    """The prompt.

    >>> print(render("Which flies?", ["stone", "bird"]))
    Answer with the letter of the right choice.
    <BLANKLINE>
    Question: Which flies?
    A. stone
    B. bird
    Answer:
    """
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
    return "\n".join(
        ["Answer with the letter of the right choice.\n", f"Question: {stem}", *lines, "Answer:"]
    )


def _parts(row: Row) -> tuple[str, list[str], int]:
    """(question, choices, place of the right one)."""
    if "instruction" in row:
        asked = _ASKED.sub("", text_of(row, "instruction")).partition("\n\nAnswer format:")[0]
        stem, *rest = _CHOICE.split(asked)
        keys, texts = rest[0::2], [text.strip() for text in rest[1::2]]
        return stem.strip(), texts, keys.index(text_of(row, "answer").removeprefix("answer"))
    question, key = row.get("question"), str(row["answerKey"]).strip()
    if isinstance(question, dict):
        choices = question["choices"]
        labels, texts = [c["label"] for c in choices], [c["text"] for c in choices]
        stem = text_of(question, "stem")
    else:
        labels, texts = list(row["choices"]["label"]), list(row["choices"]["text"])
        stem = text_of(row, "question", "question_stem")
    if key not in labels:
        raise ValueError(f"answerKey must be one of {', '.join(labels)}, got {key!r}")
    return stem.strip(), [str(text).strip() for text in texts], labels.index(key)


def reader(name: str) -> Callable[[Row], Problem]:
    """Reads rows as problems of category `name`."""

    def read(row: Row) -> Problem:
        stem, choices, right = _parts(row)
        if not 2 <= len(choices) <= len(LETTERS):
            raise ValueError(f"expected 2 to {len(LETTERS)} choices, got {len(choices)}")
        return Problem(render(stem, choices), LETTERS[right], name)

    return read


def load(
    name: str, data: Data, *, extract: rewards.Extract | None = None,
    on_bad_lines: OnBadLines = "error",
) -> FileSource:  # fmt: skip
    """The source; see the module."""
    return load_files(
        name, data, reader(name), max_new_tokens=MAX_NEW_TOKENS,
        grader=ByAnswer(extract or rewards.choice, rewards.choice), on_bad_lines=on_bad_lines,
    )  # fmt: skip
