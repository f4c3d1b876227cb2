r"""The boxed answer of a competition problem, in one form.

What is the same up to notation becomes the same text: \dfrac and \frac, 1{,}234 and 1234, 0.5 and
\frac12, units and degrees left out. Two formulas that are equal by algebra only stay different.
"""

from __future__ import annotations

import re
from fractions import Fraction

from t2runtime.rewards.numbers import canonical

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|operatorname)\s*\{")
_NUMBER = r"-?(?:\d+(?:\.\d*)?|\.\d+)"
#: Words that may follow a number without changing it.
_UNIT = re.compile(
    rf"^({_NUMBER}(?:/\d+)?)\s*(?:(?:square|cubic)?\s*(?:cent|dollar|degree|inche?|feet|foot|yard|"
    r"mile|met(?:er|re)|centimet(?:er|re)|kilomet(?:er|re)|unit|second|minute|hour|day|week|month|"
    r"year|way|student|people|person|point|gram|kilogram|liter|litre|gallon|pound|ounce|percent|"
    r"mph|cm|mm|km|kg|ft|in|m|g|s)s?\.?)(?:\^?\{?[23]\}?)?$"
)


def boxed(completion: str) -> str | None:
    r"""What stands in the last \boxed{...}, normalised; None without a closed box.

    >>> boxed(r"so $\boxed{\dfrac{3}{4}}$."), boxed(r"\boxed{0.75}"), boxed(r"\boxed{\frac34}")
    ('0.75', '0.75', '0.75')
    >>> boxed(r"\boxed{x = 1{,}234\text{ cm}^2}")
    '1234'
    >>> boxed(r"\boxed{\sqrt{\frac{a}{b}}}")
    '\\sqrt{\\frac{a}{b}}'
    """
    found = None
    for match in _BOX.finditer(completion):
        content = _argument(completion, match.end())
        found = content if content is not None else found
    return None if found is None else normalise(found) or None


def normalise(formula: str) -> str:
    r"""One form for what means the same.

    >>> normalise(r"\left( 3, \tfrac{1}{2} \right)"), normalise(r"50\%"), normalise(r"90^\circ")
    ('(3,0.5)', '50', '90')
    >>> normalise(r"2\frac{1}{2}"), normalise(r"\text{Monday}"), normalise("-.50")
    ('2.5', 'Monday', '-0.5')
    """
    text = formula.replace("\u2212", "-").replace("\n", " ").strip()
    text = text.replace("\\$", "").replace("$", "").replace("\\!", "").replace("{,}", ",")
    text = re.sub(r"\\(?:left|right|big|Big|bigg|Bigg)(?![a-zA-Z])\s*", "", text)
    text = re.sub(r"\\[,;:> ]|\\(?:quad|qquad|displaystyle)(?![a-zA-Z])|~", " ", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\^\s*(?:\{\s*)?\\circ(?:\s*\})?|\\degree|\u00b0|\\?%", "", text)
    text = re.sub(r"\\[()\[\]]", "", text)
    text = _without_words(text)
    text = _short_arguments(text).strip().rstrip(".").strip()
    text = re.sub(r"^[a-zA-Z]\s*(?:=|\\in\b)\s*", "", text)
    text = re.sub(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text)
    unit = _UNIT.match(text)
    text = unit[1] if unit else text
    text = re.sub(r"\s+", "" if "\\" in text or not text.replace(" ", "").isalpha() else " ", text)
    return _numbers(text)


def _argument(text: str, start: int) -> str | None:
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


def _without_words(text: str) -> str:
    r"""\text{...} after a number is a unit and goes, with its power; elsewhere its words stay."""
    while match := _WORDS.search(text):
        content = _argument(text, match.end() - 1)
        if content is None:
            return text
        end = match.end() + len(content) + 1
        before = text[: match.start()].rstrip()
        if re.search(r"[\d}]$", before):
            text = before + re.sub(r"^\s*\^\s*(?:\{\s*\d\s*\}|\d)", "", text[end:])
        else:
            text = text[: match.start()] + content.strip() + text[end:]
    return text


def _short_arguments(text: str) -> str:
    r"""\frac12 as \frac{1}{2}, \sqrt3 as \sqrt{3}."""
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    return re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)


def _numbers(text: str) -> str:
    """Every part between top-level commas and brackets that is a number, as `canonical` has it."""
    parts = re.split(r"([,()\[\]]|\\[{}])", text)
    return "".join(_number(part) for part in parts)


def _number(text: str) -> str:
    """A number in one form; anything else as it is."""
    mixed = re.fullmatch(r"(-?)(\d*)\\frac\{(-?)(\d+)\}\{(\d+)\}", text)
    if mixed and len(text) < 200 and int(mixed[5]):
        value = int(mixed[2] or 0) + Fraction(int(mixed[3] + mixed[4]), int(mixed[5]))
        return canonical(-value if mixed[1] else value)
    plain = re.fullmatch(rf"\+?({_NUMBER})(?:/(\d+))?", text)
    if plain and len(text) < 200 and int(plain[2] or 1):
        return canonical(Fraction(plain[1].rstrip(".")) / int(plain[2] or 1))
    return text
