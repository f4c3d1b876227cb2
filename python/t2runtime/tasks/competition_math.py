r"""MATH: competition problems with an answer in \boxed{...}.

data        folder with train.jsonl and test.jsonl of {"problem", "solution", ...}, the solution
            holding its answer in a box; with "answer" besides or instead, that is taken
prompt      the problem, then the request to box the answer
answer      `rewards.boxed`: the last box, normalised; a completion without one is wrong. Answers
            that are equal by algebra only are told apart, as in the usual grading of this set
split       the data's own train and test; a tenth of train for validation
"""

from __future__ import annotations

from t2runtime import rewards
from t2runtime.tasks.base import ByAnswer, Problem
from t2runtime.tasks.files import Data, FileSource, OnBadLines, Row, text_of
from t2runtime.tasks.files import load as load_files

NAME = "math"
MAX_NEW_TOKENS = 768
PROMPT = (
    "Solve the problem step by step. Put the final answer in \\boxed{{}}.\n\n"
    "Problem: {problem}\nSolution:"
)


def read(row: Row) -> Problem:
    r"""One problem; its answer is kept in a box.

    >>> read({"problem": "1/2 + 1/4?", "solution": r"It is $\boxed{\frac{3}{4}}$."}).answer
    '\\boxed{0.75}'
    """
    if isinstance(row.get("answer"), str):
        answer: str | None = rewards.boxed("\\boxed{" + text_of(row, "answer") + "}")
    else:
        answer = rewards.boxed(text_of(row, "solution"))
    if answer is None:
        raise ValueError(f"expected \\boxed{{ANSWER}} in 'solution', got {str(row)[-60:]!r}")
    problem = text_of(row, "problem", "question").strip()
    return Problem(PROMPT.format(problem=problem), "\\boxed{" + answer + "}", NAME)


def load(
    data: Data, *, extract: rewards.Extract | None = None, on_bad_lines: OnBadLines = "error"
) -> FileSource:
    """The source; see the module."""
    grader = ByAnswer(extract or rewards.boxed, rewards.boxed)
    return load_files(
        NAME, data, read, max_new_tokens=MAX_NEW_TOKENS, grader=grader, on_bad_lines=on_bad_lines
    )
