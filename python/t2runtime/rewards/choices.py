"""The chosen letter of a multiple-choice question."""

from __future__ import annotations

import re

_END = r"(?=\s*(?:[)\].,:;*!\"'$}\n]|$))"
# A digit that goes on as a number (1,200 or 3.5 or 2/3) is no key.
_DIGIT = rf"[1-8](?![.,/:]?\d){_END}"
_KEY = rf"(?P<key>[A-H]\b|{_DIGIT}|[a-h]{_END})"
_OPEN = r"(?:\$?\\boxed\s*\{\s*(?:\\text\s*\{)?)?[(\[*\"'$]*"
_IS = r"(?:\s+(?i:is|would\s+be|must\s+be))?\s*[:=]?\s*"
#: In this order; the last match of the first pattern that matches anything. What is called the
#: answer goes before what is called an option, which may be a wrong one.
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        # "the answer is (C)", "Answer: 2", "answer3", "the correct option is B"; said last counts.
        rf"(?:(?i:answer)|(?i:correct|right|best)\s+(?i:option|choice)){_IS}"
        rf"(?:(?i:option|choice)\s+)?{_OPEN}{_KEY}",
        # "option A is correct", "(B) is right".
        r"\b(?P<key>[A-H])[)\]*\"']*\s+is\s+(?:the\s+)?(?:correct|right|best)\b",
        # The first thing said: "C. because", "C) a planet", "C".
        r"\A\s*[*\"'(\[]*(?P<key>[A-H]|[1-8]|[a-h])(?=[*\"')\]]*\s*(?:[.):\]](?!\d)|$|\n))",
        rf"\\boxed\s*\{{\s*(?:\\text\s*\{{)?\s*\(?{_KEY}",
        rf"(?i:option|choice){_IS}{_OPEN}{_KEY}",
        rf"[(\[]{_KEY}\s*[)\]]",
        # At the beginning of a later line.
        r"(?m:^)\s*[*\"']*(?P<key>[A-H]|[1-8]|[a-h])(?=\s*[*\"']*\s*(?:[.):](?!\d)|$))",
        # Standing alone; "A" before a word in small letters is the article.
        r"\b(?P<key>(?!A\s+[a-z])[A-H])\b(?!')",
        r"(?<![\d.,])\b(?P<key>[1-8])\b(?![.,]?\d)",
    )
)


def choice(completion: str) -> str | None:
    """The choice as a capital letter; keys 1-8 count as A-H.

    >>> choice("The answer is (C)."), choice("Option 3"), choice("answer3")
    ('C', 'C', 'C')
    >>> choice("The answer is (C). Option A is wrong."), choice("Answer: 1,200 (D)")
    ('C', 'D')
    >>> choice("B because a spider has 8 legs")
    'B'
    >>> choice("A planet rotates") is None
    True
    """
    for pattern in _PATTERNS:
        if keys := [found["key"] for found in pattern.finditer(completion)]:
            key: str = keys[-1]
            return "ABCDEFGH"[int(key) - 1] if key.isdigit() else key.upper()
    return None
