"""Banking77: which of 77 intents a customer's message has.

data        folder with train.csv and test.csv of the columns text, category
prompt      the intents that occur in the training file, the message, the request for the intent
answer      `rewards.label`: the first line in small letters, words joined by underscores
split       the data's own train and test; a tenth of train for validation
"""

from __future__ import annotations

from pathlib import Path

from t2runtime import rewards
from t2runtime.tasks.base import ByAnswer, Problem
from t2runtime.tasks.files import HUB, Data, FileSource, OnBadLines, Row, rows_of, text_of
from t2runtime.tasks.files import load as load_files

NAME = "banking77"
MAX_NEW_TOKENS = 16
PROMPT = (
    "Which of these intents does the customer's message have?\n{names}\n\nMessage: {text}\nIntent:"
)


def intents(data: Data) -> list[str]:
    """The labels that the first file of `data` uses, sorted; [] where they cannot be had so."""
    path = Path(data).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("train.csv*"))
    if str(data).startswith(HUB) or not files:
        return []
    rows = [row for _, row in rows_of(files[0]) if isinstance(row, dict) and "category" in row]
    return sorted({name for row in rows if (name := rewards.label(row["category"])) is not None})


def load(
    data: Data, *, extract: rewards.Extract | None = None, on_bad_lines: OnBadLines = "error"
) -> FileSource:
    """The source; see the module."""
    names = ", ".join(intents(data))

    def read(row: Row) -> Problem:
        text, answer = text_of(row, "text").strip(), rewards.label(text_of(row, "category"))
        if answer is None:
            raise ValueError(f"expected a name in 'category', got {row['category']!r}")
        return Problem(PROMPT.format(names=names, text=text), answer, NAME)

    return load_files(
        NAME, data, read, max_new_tokens=MAX_NEW_TOKENS,
        grader=ByAnswer(extract or rewards.label, rewards.label), on_bad_lines=on_bad_lines,
    )  # fmt: skip
