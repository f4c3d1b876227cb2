"""GSM8K: school mathematics in words.

data        folder with train.jsonl and test.jsonl of {"question", "answer"}; the answer's last line
            is "#### NUMBER"
prompt      the question, then the request to end with "#### " and the number
answer      `rewards.final_number`: after the first "####" (behind the last "=" of that line), else
            boxed, else the last number
solution    the data's worked answer, without its marks for a calculator (<<2+2=4>>)
split       the data's own train and test; a tenth of train for validation
"""

from __future__ import annotations

import re

from t2runtime import rewards
from t2runtime.tasks.base import ByAnswer, Problem
from t2runtime.tasks.files import Data, FileSource, OnBadLines, Row, text_of
from t2runtime.tasks.files import load as load_files

NAME = "gsm8k"
MAX_NEW_TOKENS = 400
PROMPT = (
    'Solve the problem step by step. End with "#### " and the number.\n\n'
    "Question: {question}\nAnswer:"
)
#: "2 + 2 = <<2+2=4>>4": marks for a calculator, no part of the text.
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def read(row: Row) -> Problem:
    """One problem.

    >>> read({"question": "2 + 2?", "answer": "2 + 2 = 4\\n#### 4"}).answer
    '4'
    """
    question, answer = text_of(row, "question"), text_of(row, "answer")
    if "####" not in answer:
        raise ValueError(f"expected '#### NUMBER' at the end of 'answer', got {answer[-40:]!r}")
    number = rewards.number(answer.rpartition("####")[2])
    if number is None:
        raise ValueError(f"expected a number after '####', got {answer[-40:]!r}")
    worked = _CALCULATOR.sub("", answer).strip()
    return Problem(PROMPT.format(question=question.strip()), number, NAME, solution=worked)


def load(
    data: Data, *, extract: rewards.Extract | None = None, on_bad_lines: OnBadLines = "error"
) -> FileSource:
    """The source; see the module."""
    grader = ByAnswer(extract or rewards.final_number, rewards.final_number)
    return load_files(
        NAME, data, read, max_new_tokens=MAX_NEW_TOKENS, grader=grader, on_bad_lines=on_bad_lines
    )
