"""The final number of a worked solution, by the marks that such solutions end with."""

from __future__ import annotations

import re

from t2runtime.rewards.formulas import normalise
from t2runtime.rewards.latex import last_box
from t2runtime.rewards.numbers import first_number, number

#: A number with words around it, or as what something equals: "about12apples", "2+3=5"; not "x-5".
_ALONE = re.compile(r"(?:.*=|[A-Za-z]{2}[A-Za-z.:]*)?(-?[\d.]+(?:/\d+)?)(?:[A-Za-z]{2}[A-Za-z.]*)?")


def final_number(completion: str) -> str | None:
    r"""The number after the first "####", else that of the last \boxed{...}, else the last number.

    After "####" the first number of that line counts, as in the usual grading of GSM8K; behind the
    last "=" where the line is a sum. A box that holds a formula and no number is no answer.

    >>> final_number("so 3 of 4. #### 12 apples\n\nQuestion: 99"), final_number("#### 2 + 3 = 5")
    ('12', '5')
    >>> final_number(r"The answer is \boxed{\frac{10}{2}} of 8")
    '5'
    >>> final_number(r"\boxed{5\sqrt{2}}") is None
    True
    """
    _, marked, after = completion.partition("####")
    if marked:
        lines = after.strip().splitlines()
        return first_number(lines[0].rpartition("=")[2]) if lines else None
    box = last_box(completion)
    if box is None or not box.strip():
        return number(completion)
    alone = _ALONE.fullmatch(normalise(box))
    return number(alone[1]) if alone else None
