r"""Pieces of LaTeX that both readers of numbers and of formulas need: arguments and boxes."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")


def argument(text: str, start: int) -> str | None:
    """The braced group at `start`, braces inside it balanced, or the single token there."""
    if start >= len(text):
        return None
    if text[start] != "{":
        return text[start:].split()[0].rstrip("$.") if text[start:].split() else None
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "\\" and text[place + 1 : place + 2] in ("{", "}"):
            continue
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[start + 1 : place]
    return None


def last_box(completion: str) -> str | None:
    r"""What stands in the last \boxed{...} that is closed, as written.

    >>> last_box(r"\boxed{1}, or rather \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    found = None
    for match in _BOX.finditer(completion):
        content = argument(completion, match.end())
        found = content if content is not None else found
    return found


def whole_fractions(text: str) -> str:
    r"""\dfrac and \tfrac as \frac, \frac12 as \frac{1}{2}.

    >>> whole_fractions(r"\dfrac12 + \tfrac1{10}")
    '\\frac{1}{2} + \\frac{1}{10}'
    """
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    return re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
