"""Questions from files of the user's own: JSON lines of {"prompt": text, "answer": text}.

prompt      as it stands
answer      the whole completion, spaces around it aside, or what `extract` reads, from the right
            answer as from a completion; a number is taken as Python writes it: 2 as "2"
split       of a file 80 / 10 / 10 by the checksum of the prompt; of a folder its files train, test
            and, where there is one, validation; see `tasks.files`
"""

from __future__ import annotations

import math
from typing import Any

from t2runtime import rewards
from t2runtime.tasks.base import ByAnswer, Problem
from t2runtime.tasks.files import Data, FileSource, OnBadLines, Row
from t2runtime.tasks.files import load as load_files

MAX_NEW_TOKENS = 64
_ADVICE = (
    "Give as the task a folder with train.jsonl, test.jsonl and, if you like, validation.jsonl, or "
    "one file of at least a few dozen lines, of which a tenth each, by checksum of the prompt, is "
    "for validation and test"
)


def load(
    name: str, data: Data, *, extract: rewards.Extract | None = None,
    on_bad_lines: OnBadLines = "error",
) -> FileSource:  # fmt: skip
    """The source; `name` is its category."""

    def read(row: Row) -> Problem:
        prompt, answer = row.get("prompt"), _text(row.get("answer"))
        if not (isinstance(prompt, str) and prompt and answer):
            raise ValueError(f'expected {{"prompt": text, "answer": text}}, got {row!r:.60}')
        return Problem(prompt, answer, name)

    return load_files(
        name, data, read, max_new_tokens=MAX_NEW_TOKENS,
        grader=ByAnswer(extract or rewards.text), on_bad_lines=on_bad_lines, advice=_ADVICE,
    )  # fmt: skip


def _text(answer: Any) -> str | None:
    """An answer as text; None for what is none: a bool, null, NaN, a list."""
    if isinstance(answer, str):
        return answer
    if isinstance(answer, float):
        return repr(answer) if math.isfinite(answer) else None
    return repr(answer) if isinstance(answer, int) and not isinstance(answer, bool) else None
