"""Questions from a file of the user's own: JSON lines of {"prompt": text, "answer": text}.

prompt      as it stands
answer      the whole completion, spaces around it aside, or what `extract` reads, from the right
            answer as from a completion
split       80 / 10 / 10 by the checksum of the prompt; a folder, or a file that is called train or
            test, as in `tasks.files`
"""

from __future__ import annotations

from t2runtime import rewards
from t2runtime.tasks.base import ByAnswer, Problem
from t2runtime.tasks.files import Data, FileSource, OnBadLines, Row
from t2runtime.tasks.files import load as load_files

MAX_NEW_TOKENS = 64


def load(
    name: str, data: Data, *, extract: rewards.Extract | None = None,
    on_bad_lines: OnBadLines = "error",
) -> FileSource:  # fmt: skip
    """The source; `name` is its category."""

    def read(row: Row) -> Problem:
        if not all(isinstance(row.get(key), str) and row[key] for key in ("prompt", "answer")):
            raise ValueError(f'expected {{"prompt": text, "answer": text}}, got {row!r:.60}')
        return Problem(row["prompt"], row["answer"], name)

    return load_files(
        name, data, read, max_new_tokens=MAX_NEW_TOKENS,
        grader=ByAnswer(extract or rewards.text), on_bad_lines=on_bad_lines,
    )  # fmt: skip
