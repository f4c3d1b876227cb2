"""HumanEval: functions to be completed from their signature and docstring, judged by tests.

data        the file HumanEval.jsonl(.gz) of {"task_id", "prompt", "entry_point", "test",
            "canonical_solution"}, or a folder with it
prompt      the data's prompt as it is: the completion goes on from there
answer      a body that goes on from the prompt, cut where it ends; or a fenced block, a whole
            function if it defines the entry point. Run in the sandbox against check(entry_point)
solution    the data's canonical_solution, "" where there is none
split       all of it is test: this set is for evaluation, and asking for training problems is an
            error
"""

from __future__ import annotations

import re

from t2runtime import rewards
from t2runtime.tasks.base import Problem, Split
from t2runtime.tasks.files import Data, FileSource, OnBadLines, Row, text_of
from t2runtime.tasks.files import load as load_files
from t2runtime.tasks.programs import ByTests

NAME = "humaneval"
MAX_NEW_TOKENS = 400
ADVICE = (
    "All of this set is test, by its authors' intent: evaluate on it, and train on another set of "
    "programs (mbpp)"
)


def read(row: Row) -> Problem:
    """One problem; the names that the prompt defines besides the entry point are also defined for
    the tests, so that an answer cannot change them there.
    """
    prompt, entry = text_of(row, "prompt"), text_of(row, "entry_point").strip()
    if not re.search(rf"^(?:async\s+)?def\s+{re.escape(entry)}\b", prompt, re.MULTILINE):
        raise ValueError(f"expected 'prompt' to define {entry!r}, the 'entry_point'")
    tests = [text_of(row, "test"), f"check({entry})"]
    before = _before(prompt, entry)
    if before.strip():
        tests.insert(0, before)
    # A body that goes on from the prompt, so its first spaces count.
    body = row.get("canonical_solution")
    worked = body.rstrip() if isinstance(body, str) else ""
    return Problem(prompt, entry, NAME, tuple(tests), worked)


def _before(prompt: str, entry: str) -> str:
    """Imports and helpers of the prompt: all that stands before the function asked for."""
    pieces = list(re.finditer(rf"^(?:async\s+)?def\s+{re.escape(entry)}\b", prompt, re.MULTILINE))
    return prompt[: pieces[-1].start()] if pieces else ""


def assemble(problem: Problem, completion: str) -> str | None:
    """The whole program of a completion.

    >>> p = Problem("def f(x):\\n", "f", NAME)
    >>> assemble(p, "    return x\\n\\nprint(f(1))\\n")
    'def f(x):\\n    return x\\n\\n'
    >>> assemble(p, "Sure:\\n```python\\ndef f(y):\\n    return y\\n```")
    'def f(y):\\n    return y\\n'
    """
    entry = problem.answer
    found = rewards.code(completion, entry)
    if found is None:
        return None
    if re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(entry)}\b", found, re.MULTILINE):
        return _before(problem.prompt, entry) + found
    # A body: it ends with the first line that stands at the margin.
    body = re.split(r"^(?=[^\s#])", found, maxsplit=1, flags=re.MULTILINE)
    lines = body[0] if body[0].strip() else "    " + found.replace("\n", "\n    ")
    return problem.prompt + lines


def _split(row: Row, problem: Problem) -> Split:
    return "test"


def load(
    data: Data, *, grader: ByTests | None = None, on_bad_lines: OnBadLines = "error"
) -> FileSource:
    """The source; see the module."""
    return load_files(
        NAME, data, read, max_new_tokens=MAX_NEW_TOKENS, on_bad_lines=on_bad_lines,
        grader=grader or ByTests(assemble), split_by=_split, advice=ADVICE,
    )  # fmt: skip
