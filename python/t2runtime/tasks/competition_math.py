r"""MATH: competition problems with an answer in \boxed{...}.

data        folder with train.jsonl and test.jsonl of {"problem", "solution", ...}, the solution
            holding its answer in a box; with "answer" besides or instead, that is taken
prompt      the problem, then the request to box the answer
answer      `rewards.boxed`: the last box, normalised; a completion without one is wrong. Answers
            that are equal by algebra only are told apart, as in the usual grading of this set
solution    the data's worked solution; the boxed answer alone where that holds no box
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
    worked = row["solution"] if _has_box(row) else "\\boxed{" + text_of(row, "answer") + "}"
    prompt = PROMPT.format(problem=problem)
    return Problem(prompt, "\\boxed{" + answer + "}", NAME, solution=worked.strip())


def _has_box(row: Row) -> bool:
    """Whether the worked solution ends as the prompt asks for."""
    text = row.get("solution")
    return isinstance(text, str) and rewards.boxed(text) is not None


def load(
    data: Data, *, extract: rewards.Extract | None = None, on_bad_lines: OnBadLines = "error"
) -> FileSource:
    """The source; see the module."""
    grader = ByAnswer(extract or rewards.boxed, rewards.boxed)
    return load_files(
        NAME, data, read, max_new_tokens=MAX_NEW_TOKENS, grader=grader, on_bad_lines=on_bad_lines
    )
