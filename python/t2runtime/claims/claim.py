"""A claim, and the rule by which it is judged.

A claim is a number and the range that it must lie in: a difference above 0, a ratio below 0.5, a
change of less than two points. With the 95 % Student interval over seeds it is confirmed where the
whole interval lies inside the range, not confirmed where it lies outside, else undecided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2runtime.claims.units import KINDS
from t2runtime.evidence.intervals import interval
from t2runtime.evidence.ledger import Row

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "not confirmed", "undecided"
NOT_MEASURED = "not measured"
VERDICTS = (CONFIRMED, REFUTED, UNDECIDED, NOT_MEASURED)


@dataclass(frozen=True)
class Claim:
    """What the paper says, and how it is tried here.

    text: the claim in one line; paper: where it stands there; number: what is measured, with its
    unit; differs: what is not as in the paper. low, high: the range that the claim puts the number
    in. kind, value: whose rows hold it, and where in a row (None: this row has none); or evidence:
    the question of the evidence that answers it.
    """

    text: str
    paper: str
    number: str
    differs: str
    kind: str = ""
    value: Callable[[Row], float | None] | None = None
    low: float = -math.inf
    high: float = math.inf
    evidence: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) == (not self.evidence) or bool(self.kind) != bool(self.value):
            raise ValueError(f"claim {self.text!r} must have kind and value, or evidence")
        if not self.low < self.high or (math.isinf(self.low) and math.isinf(self.high)):
            raise ValueError(
                f"claim {self.text!r} needs low < high, one of them finite, "
                f"got {self.low} and {self.high}"
            )

    @property
    def command(self) -> str:
        """What measures it."""
        if self.evidence:
            return "make evidence"
        needs = KINDS[self.kind].needs if self.kind in KINDS else ()
        return " ".join(
            [f'make claims UNITS="{self.kind}"', *(f"{n.upper()}=folder" for n in needs)]
        )

    @property
    def expected(self) -> str:
        """The range in words."""
        if math.isinf(self.high):
            return f"above {self.low:g}"
        if math.isinf(self.low):
            return f"below {self.high:g}"
        return f"{self.low:g} to {self.high:g}"


def verdict(low: float, high: float, claim: Claim) -> str:
    """What an interval says of a claim.

    >>> above = Claim("", "", "", "", evidence="q", low=0.0)
    >>> verdict(0.1, 0.3, above), verdict(-0.3, -0.1, above), verdict(-0.1, 0.1, above)
    ('confirmed', 'not confirmed', 'undecided')
    """
    if claim.low < low and high < claim.high:
        return CONFIRMED
    return REFUTED if high <= claim.low or low >= claim.high else UNDECIDED


def judge(
    claim: Claim, rows: Mapping[str, Sequence[Row]], evidence: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The claim with mean, interval, number of seeds and verdict, as JSON can hold it.

    rows: {kind: [row of each seed]}; evidence: {question: its answer}. Fewer than two values are
    not a measurement.
    """
    said = {
        "claim": claim.text, "paper": claim.paper, "number": claim.number,
        "expected": claim.expected, "differs": claim.differs, "command": claim.command,
    }  # fmt: skip
    if claim.evidence:
        answer = (evidence or {}).get(claim.evidence)
        if answer is None:
            return {**said, "verdict": NOT_MEASURED}
        mean, (low, high), seeds = answer["difference"], answer["interval"], answer.get("seeds")
    else:
        assert claim.value is not None
        each = [claim.value(row) for row in rows.get(claim.kind, ())]
        values = [value for value in each if value is not None]
        if len(values) < 2:
            return {**said, "verdict": NOT_MEASURED}
        (mean, low, high), seeds = interval(values), len(values)
    found = {"mean": mean, "interval": [low, high], "seeds": seeds}
    return {**said, **found, "verdict": verdict(low, high, claim)}
