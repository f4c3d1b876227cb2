"""Program text in a completion."""

from __future__ import annotations

import ast
import builtins
import re
import warnings

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+.-]*)[^\n]*\n", re.MULTILINE)
_LANGUAGES = ("", "python", "python3", "py", "py3", "pycon", "sage")
#: Where answers end that go on with something else.
_STOPS = ("[DONE]", "<|endoftext|>", "<|eot_id|>", "</s>")


def blocks(completion: str) -> list[str]:
    """Fenced blocks in Python or in no named language; one that is never closed ends with the text.

    >>> blocks("Sure:\\n```python\\nx = 1\\n```\\nand ~~~ no")
    ['x = 1\\n']
    """
    found, place = [], 0
    while opened := _FENCE.search(completion, place):
        mark = opened[1]
        closing = re.compile(rf"^[ \t]*{mark[0]}{{{len(mark)},}}[ \t]*$", re.MULTILINE)
        closed = closing.search(completion, opened.end())
        end = closed.start() if closed else len(completion)
        if opened[2].lower() in _LANGUAGES:
            found.append(completion[opened.end() : end])
        place = closed.end() if closed else len(completion)
    return found


def code(completion: str, defines: str | None = None) -> str | None:
    """The first fenced block that defines `defines` (without it: that defines anything), else the
    first block, else the whole text up to a mark of its end. The other blocks that define what it
    uses come before it. None if that is empty.

    >>> code("```py\\nprint(f(1))\\n```\\n```py\\ndef f(x): return x\\n```", "f")
    'def f(x): return x\\n'
    >>> code("[BEGIN]\\ndef f(): pass\\n[DONE] more")
    '\\ndef f(): pass\\n'
    """
    text = completion.replace("\r\n", "\n")
    for stop in _STOPS:
        text = text.split(stop)[0]
    text = text.split("[BEGIN]")[-1]
    found = blocks(text)
    name = r"\w+" if defines is None else re.escape(defines)
    definition = re.compile(rf"^\s*(?:async\s+def|def|class)\s+{name}\b|^{name}\s*=", re.MULTILINE)
    before = text.split("```")[0]
    if text.count("```") == 1 and definition.search(before):
        found = [before]  # the prompt had opened the fence
    fitting = [block for block in found if definition.search(block)] or found or [text]
    return _with_helpers(fitting[0], found) if fitting[0].strip() else None


def _with_helpers(chosen: str, found: list[str]) -> str:
    """The block after those others, in order, that define what it or they use."""
    program = {block: names for block in found if (names := _names(block)) is not None}
    if len(program) < 2 or chosen not in program:
        return chosen
    own, wanted = program.pop(chosen)
    helpers: list[str] = []
    missing = wanted - own
    while missing:
        more = [b for b, (defines, _) in program.items() if defines & missing and b not in helpers]
        if not more:
            break
        helpers.append(more[0])
        own |= program[more[0]][0]
        missing = (missing | program[more[0]][1]) - own
    return "".join(block for block in found if block in helpers) + chosen


def parsed(program: str) -> ast.Module:
    """The tree of a program, without warnings; ValueError if it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts like "\\d"
        try:
            return ast.parse(program)
        except SyntaxError as error:
            raise ValueError(str(error)) from None


def _names(block: str) -> tuple[set[str], set[str]] | None:
    """The names that a block defines at the margin, and those it reads; None if it is no Python."""
    try:
        tree = parsed(block)
    except (ValueError, RecursionError, MemoryError):
        return None
    defined: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return defined, read - set(dir(builtins))
