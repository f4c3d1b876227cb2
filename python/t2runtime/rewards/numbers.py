"""Numbers in running text, in one form: "1,234.50", "$1234.5" and "2469/2" are the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from t2runtime.rewards.latex import whole_fractions

_MINUS = str.maketrans(dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-"))
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
#: Powers and indices are no numbers by themselves: the 2 of cm^2, of x_2.
_NUMBER = re.compile(
    rf"(?<![\w.^])(?<![\^_]\{{)(?P<top>[-+]?(?:{_UNSIGNED}))"
    rf"(?:[eE](?P<power>[-+]?\d{{1,3}})(?!\w)|/(?P<bottom>(?:{_UNSIGNED}))(?![\d/]))?"
)
_POWER = re.compile(r"\s?\^(?!\s?\{?\s?\\circ)")
_FRACTION = re.compile(rf"\\frac\s*\{{\s*([-+]?(?:{_UNSIGNED}))\s*\}}\s*\{{\s*({_UNSIGNED})\s*\}}")
_MIXED = re.compile(r"(?<![\w.,/])(\d{1,9})\s{1,3}(\d{1,9})/(\d{1,9})(?![\d/])")
#: Not a number of the kind that is read here, whatever stands before it.
_IRRATIONAL = re.compile(
    r"(?:[\d.,]{1,30}\s?)?\\(?:pi(?![a-zA-Z])|sqrt\s*(?:\[\d+\])?\s*(?:\{[^{}]*\}|\d))"
)
#: Exponents beyond this are not numbers of an answer, and would take long to write out.
_LARGEST_POWER = 300


def number(completion: str) -> str | None:
    r"""The last number: thousands separators removed, sign kept, currency and percent signs aside;
    equal values give equal text.

    >>> number("so 1,200 + 34 = 1,234.")
    '1234'
    >>> number("it fell to -5 degrees"), number("7-5")
    ('-5', '5')
    >>> number("3.0"), number("3/4"), number("1.2e3"), number("-$5")
    ('3', '0.75', '1200', '-5')
    >>> number(r"$x=-\frac{3}{4}$"), number("3 1/2 miles"), number("12 cm^2")
    ('-0.75', '3.5', '12')
    >>> number("none") is None
    True
    """
    found = list(_numbers(completion))
    return canonical(_value(found[-1])) if found else None


def first_number(completion: str) -> str | None:
    """As `number`, the first one."""
    found = next(_numbers(completion), None)
    return None if found is None else canonical(_value(found))


def canonical(value: Fraction) -> str:
    """An integer or a decimal where it ends, else numerator/denominator.

    >>> canonical(Fraction(5, 4)), canonical(Fraction(-1, 3)), canonical(Fraction(0))
    ('1.25', '-1/3', '0')
    """
    top, bottom = value.numerator, value.denominator
    twos, fives, rest = 0, 0, bottom
    while rest % 2 == 0:
        twos, rest = twos + 1, rest // 2
    while rest % 5 == 0:
        fives, rest = fives + 1, rest // 5
    if rest != 1:
        return f"{top}/{bottom}"
    places = max(twos, fives)
    digits = str(abs(top) * 10**places // bottom).rjust(places + 1, "0")
    sign = "-" if top < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def _numbers(completion: str) -> Iterator[re.Match[str]]:
    """All numbers; what has a power (the 10 of 10^3) is left out."""
    text = _plain(completion)
    return (m for m in _NUMBER.finditer(text) if not _POWER.match(text, m.end()))


def _plain(completion: str) -> str:
    """Plain digits, signs and fractions; what stands between two numbers as a minus is no sign."""
    text = completion.translate(_MINUS).replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    if "\\" in text:
        text = _IRRATIONAL.sub(" irrational ", whole_fractions(text))
        text = re.sub(r"(?<=\d)(?=\\frac)", " ", text)
        text = _FRACTION.sub(r"\1/\2", text)
    text = _MIXED.sub(_improper, text)
    text = re.sub(r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3})", "", text)
    text = re.sub(r"\\?[$\u20ac\u00a3\u00a5]\s*(?=[-+.\d])", "", text)
    return re.sub(r"(?<=[\d)])\s*-\s*(?=[\d.])", " - ", text)


def _improper(mixed: re.Match[str]) -> str:
    """3 1/2 as 7/2; 2024 7/2 is two numbers."""
    whole, top, bottom = map(int, mixed.groups())
    return f"{whole * bottom + top}/{bottom}" if top < bottom else mixed[0]


def _value(found: re.Match[str]) -> Fraction:
    # A long run of digits is no answer; without a limit it would take quadratic time.
    parts = {key: (part or "")[:400].replace(",", "") for key, part in found.groupdict().items()}
    value = Fraction(parts["top"])
    if parts["power"] and abs(int(parts["power"])) <= _LARGEST_POWER:
        return value * Fraction(10) ** int(parts["power"])
    if parts["bottom"]:
        below = Fraction(parts["bottom"])
        return value / below if below else below
    return value
