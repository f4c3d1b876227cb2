"""Numbers in running text, in one form: "1,234.50", "$1234.5" and "2469/2" are the same."""

from __future__ import annotations

import re
from fractions import Fraction

_MINUS = str.maketrans(dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-"))
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<top>[-+]?(?:{_UNSIGNED}))"
    rf"(?:[eE](?P<power>[-+]?\d{{1,3}})(?!\w)|/(?P<bottom>(?:{_UNSIGNED}))(?![\d/]))?"
)
#: Exponents beyond this are not numbers of an answer, and would take long to write out.
_LARGEST_POWER = 300


def number(completion: str) -> str | None:
    """The last number: thousands separators removed, sign kept, currency and percent signs aside;
    equal values give equal text.

    >>> number("so 1,200 + 34 = 1,234.")
    '1234'
    >>> number("it fell to -5 degrees"), number("7-5")
    ('-5', '5')
    >>> number("3.0"), number("3/4"), number("1.2e3"), number("-$5")
    ('3', '0.75', '1200', '-5')
    >>> number("none") is None
    True
    """
    found = list(_NUMBER.finditer(_plain(completion)))
    return canonical(_value(found[-1])) if found else None


def final_number(completion: str) -> str | None:
    r"""The number after the first "####", else in the last \boxed{...}, else the last number.

    >>> final_number("so 3 of 4. #### 12 apples\n\nQuestion: 99")
    '12'
    >>> final_number(r"The answer is \boxed{5} of 8")
    '5'
    """
    _, marked, after = completion.partition("####")
    if marked:
        first = _NUMBER.search(_plain(after))
        return None if first is None else canonical(_value(first))
    boxes = re.findall(r"\\boxed\s*\{([^{}]*)\}", completion)
    return (number(boxes[-1]) if boxes else None) or number(completion)


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


def _plain(completion: str) -> str:
    """Plain digits and signs; what stands between two numbers as a minus is no sign."""
    text = completion.translate(_MINUS).replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    text = re.sub(r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3})", "", text)
    text = re.sub(r"\\?[$\u20ac\u00a3\u00a5]\s*(?=[-+.\d])", "", text)
    return re.sub(r"(?<=[\d)])\s*-\s*(?=[\d.])", " - ", text)


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
