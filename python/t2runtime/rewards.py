"""From a completion to a reward: answer extraction as pure functions, and the paper's reward of
plus or minus one.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Extract = Callable[[str], str | None]

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_CHOICE = re.compile(r"\b([A-H]|[1-8])\b")


def text(completion: str) -> str | None:
    """The completion without the spaces around it; None if nothing is left.

    >>> text(" 85 ")
    '85'
    """
    return completion.strip() or None


def number(completion: str) -> str | None:
    """The last number, thousands separators removed, sign kept, "3.0" equal to "3".

    >>> number("so 1,200 + 34 = 1,234.")
    '1234'
    >>> number("it fell to -5 degrees")
    '-5'
    >>> number("7-5")
    '5'
    >>> number("none") is None
    True
    """
    found = _NUMBER.findall(_detach_minus(completion))
    if not found:
        return None
    digits = found[-1].replace(",", "").lstrip("+")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
    digits = digits.lstrip("0") or "0"
    digits = "0" + digits if digits.startswith(".") else digits
    return digits if digits == "0" else sign + digits


def _detach_minus(completion: str) -> str:
    """Between two numbers a minus is an operation and not a sign."""
    return re.sub(r"(?<=\d)\s*-\s*(?=\d)", " - ", completion)


def choice(completion: str) -> str | None:
    """The last choice letter; keys 1-8 count as A-H.

    >>> choice("The answer is (C).")
    'C'
    >>> choice("Option 3")
    'C'
    """
    found = _CHOICE.findall(completion)
    if not found:
        return None
    last: str = found[-1]
    return "ABCDEFGH"[int(last) - 1] if last.isdigit() else last


EXTRACTORS: dict[str, Extract] = {"text": text, "number": number, "choice": choice}


def is_correct(completion: str, answer: str, extract: Extract = text) -> bool:
    """Whether the completion's answer equals the expected one, both read in the same way."""
    expected = extract(answer)
    if expected is None:
        raise ValueError(f"answer must contain an answer to compare with, got {answer!r}")
    return extract(completion) == expected


def reward_of(right: bool, wrong: float = -1.0) -> float:
    """+1 for a right answer, `wrong` for any other (the paper's r; -0.1 in its vision runs).

    >>> reward_of(True), reward_of(False), reward_of(False, wrong=-0.1)
    (1.0, -1.0, -0.1)
    """
    return 1.0 if right else wrong
