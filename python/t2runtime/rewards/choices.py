"""The chosen letter of a multiple-choice question."""

from __future__ import annotations

import re

_END = r"(?=\s*(?:[)\].,:;*!\"'\n]|$))"
_KEY = rf"(?P<key>[A-H]\b|[1-8]\b|[a-h]{_END})"
#: In this order; the last match of the first pattern that matches anything.
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        # "the answer is (C)", "Answer: 2", "answer3", "option B"; said last counts.
        rf"(?i:answer|option|choice)(?i:\s+(?:is|would\s+be|must\s+be))?\s*[:=]?\s*[(\[*\"']*{_KEY}",
        # The first thing said: "C. because", "C) a planet", "C".
        r"\A\s*[*\"'(\[]*(?P<key>[A-H]|[1-8]|[a-h])(?=[*\"')\]]*\s*(?:[.):\]](?!\d)|$|\n))",
        rf"\\boxed\s*\{{\s*(?:\\text\s*\{{)?\s*\(?{_KEY}",
        rf"[(\[]{_KEY}\s*[)\]]",
        # The same at the beginning of a later line.
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
