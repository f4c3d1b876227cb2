"""MBPP: short Python functions, judged by running tests.

data        one file of JSON lines, or a folder with it, in one of three layouts, told by its keys:
            classic   {"task_id", "text" or "prompt", "code", "test_list", "test_setup_code" or
                      "test_imports"}
            plus      the same with "test", a program of more tests, which then is what counts
            Pro       {"raw_problem", "raw_solution", "new_problem", "new_solution", "test_code"}:
                      a function, and a second one to be built on it. As published, a problem ends
                      with the line of its `def` and the solution is the body, or it is all of it
prompt      the text, the tests that the data list (the first three asserts, as is usual for this
            set; without them names and arguments cannot be known), the request for a code block
answer      `rewards.code`, run in the sandbox: setup first, then every test. What a Pro problem
            imports is there for its answer and its tests
solution    the data's reference program, in such a block
split       by task_id as the data set defines it: 601 to 974 train, 511 to 600 validation, 11 to
            510 test, 1 to 10 (examples for prompts) unused. Pro, and rows without such an id:
            80 / 10 / 10 by the checksum of the prompt
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from t2runtime.rewards.code import parsed
from t2runtime.tasks.base import Problem, Split, split_of
from t2runtime.tasks.files import Data, FileSource, OnBadLines, Row, text_of
from t2runtime.tasks.files import load as load_files
from t2runtime.tasks.programs import ByTests, as_written

NAME = "mbpp"
MAX_NEW_TOKENS = 400
PROMPT = (
    "{text}\n\nThe code must pass these tests:\n{tests}\n\n"
    "Answer with the code in one block, ```python ... ```.\n"
)
PRO = (
    "Write two Python functions, the second with the help of the first.\n\nFirst:\n{raw}\n\n"
    "Second:\n{new}\n\nAnswer with the code of both in one block, ```python ... ```.\n"
)


def read(row: Row) -> Problem:
    """One problem; its answer is the name of the function.

    >>> made = read({"task_id": 601, "text": "Add.", "code": "def add(a, b): return a + b",
    ...              "test_list": ["assert add(1, 2) == 3"]})
    >>> made.answer, made.tests
    ('add', ('assert add(1, 2) == 3',))
    """
    if "new_problem" in row:
        return _pro(row)
    shown = _lines(row, "test_list")
    if not shown:
        raise ValueError("expected at least one test in 'test_list', got none")
    setup = _setup(row)
    tests = [*setup, text_of(row, "test")] if row.get("test") else [*setup, *shown]
    _check(tests)
    text = text_of(row, "text", "prompt").strip()
    prompt = PROMPT.format(text=text, tests="\n".join(shown[:3]))
    code = reference(row)
    return Problem(prompt, defined(code, shown), NAME, tuple(tests), block(code))


def block(code: str) -> str:
    """A program as the prompt asks for it.

    >>> block("x = 1\\r\\n")
    '```python\\nx = 1\\n```'
    """
    text = code.replace("\r\n", "\n").strip("\n")
    return f"```python\n{text.rstrip()}\n```"


def _pro(row: Row) -> Problem:
    tests = [text_of(row, "test_code")]
    _check(tests)
    raw, new = text_of(row, "raw_problem").strip(), text_of(row, "new_problem").strip()
    whole = reference(row)
    name = defined(whole, tests)
    if not name:
        raise ValueError(
            "expected 'new_problem' or 'new_solution' to define what 'test_code' calls"
        )
    tests = ["\n".join([*_imports(whole), *tests])]
    return Problem(PRO.format(raw=raw, new=new), name, NAME, tuple(tests), block(whole))


def reference(row: Row) -> str:
    """The right program of a row. Pro has two halves, each a whole function or the body of one that
    its problem begins.
    """
    if "new_problem" not in row:
        return text_of(row, "code")
    parts = []
    for half in ("raw", "new"):
        problem, solution = text_of(row, f"{half}_problem"), text_of(row, f"{half}_solution")
        joined = problem.rstrip() + "\n" + solution.rstrip() + "\n"
        found = [text for text in (solution, joined) if _is_python(text)]
        if not found:
            raise ValueError(
                f"expected Python in '{half}_problem' and '{half}_solution', or in the latter "
                f"alone, got {solution[:40]!r}"
            )
        parts.append(found[0])
    return "\n".join(parts)


def _is_python(text: str) -> bool:
    try:
        parsed(text)
    except ValueError:
        return False
    return True


def _check(tests: Sequence[str]) -> None:
    for test in tests:
        try:
            parsed(test)
        except ValueError as error:
            raise ValueError(f"expected tests in Python, got {test[:40]!r} ({error})") from None


def _imports(text: str) -> list[str]:
    """The lines at the margin that import something, in a program or in a text around one."""
    lines = re.findall(r"^(?:import|from)[ \t].*$", text, re.MULTILINE)
    return list(dict.fromkeys(line for line in lines if _is_python(line)))


def assemble(problem: Problem, completion: str) -> str | None:
    """The program of a completion, after what its problem imports.

    >>> p = Problem("First:\\nfrom typing import List\\ndef f(xs: List):", "f", NAME)
    >>> assemble(p, "```python\\ndef f(xs: List): pass\\n```")
    'from typing import List\\ndef f(xs: List): pass\\n'
    """
    program = as_written(problem, completion)
    return None if program is None else "\n".join([*_imports(problem.prompt), program])


def defined(reference: str, tests: list[str]) -> str:
    """The last name that the reference defines and the tests mention, "" if none.

    >>> defined("def helper(): pass\\ndef f(): return helper()", ["assert f() is None"])
    'f'
    """
    names = re.findall(r"^(?:def|class)\s+(\w+)", reference.replace("\r\n", "\n"), re.MULTILINE)
    named = [name for name in names if any(re.search(rf"\b{name}\b", test) for test in tests)]
    functions = [name for name in named if re.search(rf"^def\s+{name}\b", reference, re.MULTILINE)]
    return (functions or named or [""])[-1]


def _lines(row: Row, key: str) -> list[str]:
    value: Any = row.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"expected a list of texts in {key!r}, got {value!r:.60}")
    return value


def _setup(row: Row) -> list[str]:
    if "test_imports" in row:
        return _lines(row, "test_imports")
    setup = row.get("test_setup_code", "")
    if not isinstance(setup, str):
        raise ValueError(f"expected text in 'test_setup_code', got {setup!r:.60}")
    return [setup.replace("\r\n", "\n")] if setup.strip() else []


def split(row: Row, problem: Problem) -> Split | None:
    """The data set's own split by task id, the checksum's where there is none."""
    found = re.fullmatch(r"(?:Mbpp/)?(\d+)", str(row.get("task_id", "")))
    if "new_problem" in row or found is None:
        return split_of(problem.prompt)
    number = int(found[1])
    if number <= 10:
        return None
    return "test" if number <= 510 else "validation" if number <= 600 else "train"


def load(
    data: Data, *, grader: ByTests | None = None, on_bad_lines: OnBadLines = "error"
) -> FileSource:
    """The source; see the module."""
    return load_files(
        NAME, data, read, max_new_tokens=MAX_NEW_TOKENS, grader=grader or ByTests(assemble),
        on_bad_lines=on_bad_lines, split_by=split,
    )  # fmt: skip
