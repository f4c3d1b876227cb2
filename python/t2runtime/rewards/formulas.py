r"""The boxed answer of a competition problem, in one form.

What is the same up to notation becomes the same text: \dfrac and \frac, a/b and \frac{a}{b}, x^2
and x^{2}, 1{,}234 and 1234, 0.5 and \frac12, units and degrees left out. Two formulas that are
equal by algebra only stay different. The custom of the graders of MATH is followed but where it
takes unlike for like: a comma in brackets parts two numbers, \\ ends a row, 5m is no 5.
"""

from __future__ import annotations

import re
from fractions import Fraction

from t2runtime.rewards.latex import argument, last_box, whole_fractions
from t2runtime.rewards.numbers import canonical

_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|operatorname)\s*\{")
_NUMBER = r"-?(?:\d+(?:\.\d*)?|\.\d+)"
#: Words that may follow a number without changing it. Single letters are none: 5m may be 5·m.
_UNIT = re.compile(
    rf"^({_NUMBER}(?:/\d+)?)\s*(?:(?:square|cubic)?\s*(?:cent|dollar|degree|inche?|feet|foot|yard|"
    r"mile|met(?:er|re)|centimet(?:er|re)|kilomet(?:er|re)|unit|second|minute|hour|day|week|month|"
    r"year|way|student|people|person|point|gram|kilogram|liter|litre|gallon|pound|ounce|percent|"
    r"mph|cm|mm|km|kg|ft|in)s?\.?)(?:\^?\{?[23]\}?)?$"
)
#: Stands for the end of a row of a matrix, so that no rule takes its backslashes for others'.
_ROW = "\ue000"
_ATOM = r"(?:\w|\\[a-zA-Z]+(?:\{[^{}]*\})?|[\^_](?:\w|\{[^{}]*\}))"
_SLASH = re.compile(rf"(-?)(?:\(([^()/]+)\)|({_ATOM}+))/({_ATOM}|\d+)")
_BRACKETS = re.compile(r"[()\[\]]|\\[{}]")


def boxed(completion: str) -> str | None:
    r"""What stands in the last \boxed{...}, normalised; None without a closed box.

    >>> boxed(r"so $\boxed{\dfrac{3}{4}}$."), boxed(r"\boxed{0.75}"), boxed(r"\boxed{\frac34}")
    ('0.75', '0.75', '0.75')
    >>> boxed(r"\boxed{x = 1{,}234\text{ cm}^2}")
    '1234'
    >>> boxed(r"\boxed{\sqrt{\frac{a}{b}}}")
    '\\sqrt{\\frac{a}{b}}'
    """
    found = last_box(completion)
    return None if found is None else normalise(found) or None


def normalise(formula: str) -> str:
    r"""One form for what means the same; of that form itself, the same again.

    >>> normalise(r"\left( 3, \tfrac{1}{2} \right)"), normalise(r"50\%"), normalise(r"90^\circ")
    ('(3,0.5)', '50', '90')
    >>> normalise(r"2\frac{1}{2}"), normalise(r"\text{Monday}"), normalise("-.50")
    ('2.5', 'Monday', '-0.5')
    >>> normalise("x^{2}/y"), normalise("(1,234)"), normalise("1,234")
    ('\\frac{x^2}{y}', '(1,234)', '1234')
    """
    text = formula.replace("\u2212", "-").replace("\n", " ").replace("\\\\", _ROW).strip()
    text = text.replace("\\$", "").replace("$", "")
    text = re.sub(r"(?<=\d)(?:\{,\}|,\s*\\!|\\!\s*,|\\,)\s*(?=\d{3})", "", text)
    text = text.replace("\\!", "").replace("{,}", ",")
    text = re.sub(r"\\(?:left|right|big|Big|bigg|Bigg)(?![a-zA-Z])\s*", "", text)
    text = re.sub(r"\\[,;:> ]|\\(?:quad|qquad|displaystyle)(?![a-zA-Z])|~", " ", text)
    text = re.sub(r"\^\s*(?:\{\s*)?\\circ(?:\s*\})?|\\degree|\u00b0|\\?%", "", text)
    text = re.sub(r"\\[()\[\]]", "", text)
    text = _without_words(text)
    text = _short_arguments(text).strip().rstrip(".").strip()
    text = re.sub(r"^[a-zA-Z]\s*(?:=|\\in\b)\s*", "", text)
    bare = not _BRACKETS.search(text)
    if bare:
        text = re.sub(
            r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text
        )
    unit = _UNIT.match(text)
    text = unit[1] if unit else text
    text = re.sub(r"\s+", "" if "\\" in text or not text.replace(" ", "").isalpha() else " ", text)
    text = _numbers(_fraction(text)).replace(_ROW, "\\\\")
    # A space keeps the numbers of a list from being read as one.
    return text.replace(",", ", ") if bare else text


def _without_words(text: str) -> str:
    r"""\text{...} after a number is a unit and goes, with its power; elsewhere its words stay."""
    while match := _WORDS.search(text):
        content = argument(text, match.end() - 1)
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
    r"""\frac12 as \frac{1}{2}, \sqrt3 as \sqrt{3}, x^{2} as x^2, x^10 as x^{10}."""
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", whole_fractions(text))
    text = re.sub(r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2", text)
    return re.sub(r"([\^_])(\d{2,})", r"\1{\2}", text)


def _fraction(text: str) -> str:
    r"""a/b as \frac{a}{b} where that is all there is, with the sign before it.

    >>> _fraction("-3x/4"), _fraction("(x+1)/y"), _fraction(r"\frac{-a}{b}"), _fraction("1/2x")
    ('-\\frac{3x}{4}', '\\frac{x+1}{y}', '-\\frac{a}{b}', '1/2x')
    """
    slash = _SLASH.fullmatch(text) if len(text) < 200 else None
    if slash:
        text = f"{slash[1]}\\frac{{{slash[2] or slash[3]}}}{{{slash[4]}}}"
    return re.sub(r"^\\frac\{-([^{}+-]*)\}", r"-\\frac{\1}", text)


def _numbers(text: str) -> str:
    """Every part between top-level commas and brackets that is a number, as `canonical` has it."""
    parts = re.split(r"([,()\[\]]|\\[{}])", text)
    return "".join(_number(_fraction(part)) for part in parts)


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
