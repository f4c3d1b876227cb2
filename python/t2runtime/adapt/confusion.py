"""How well pass 1 names categories: what it confuses, and whether its probabilities mean what they
say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from t2runtime.adapt.prompt import Verdict
from t2runtime.evaluate import Score

#: Up to so many categories the whole matrix is shown.
_WIDE = 12


@dataclass(frozen=True)
class Bin:
    """Verdicts whose probability lies in (low, high]: how many, how sure, and how often right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Report:
    """Verdicts against the right categories.

    names: the K categories. counts[i][j]: questions of category i that were named j. error:
    expected calibration error, Σ bins (count / total) |confidence − accuracy|. brier: mean of
    Σ_k (p_k − 1[k is right])², 0 to 2. log_loss: mean of −log p(right), in nats.
    """

    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    score: Score
    bins: tuple[Bin, ...]
    error: float
    brier: float
    log_loss: float

    def recall(self) -> dict[str, float | None]:
        """Share of each category's questions that were named so; None where there were none."""
        return {
            name: row[i] / sum(row) if sum(row) else None
            for i, (name, row) in enumerate(zip(self.names, self.counts, strict=True))
        }

    def confused(self, most: int = 10) -> list[tuple[str, str, int]]:
        """(right, named, questions) of the commonest mistakes, the first the most."""
        pairs = [
            (self.names[i], self.names[j], count)
            for i, row in enumerate(self.counts)
            for j, count in enumerate(row)
            if i != j and count
        ]
        return sorted(pairs, key=lambda pair: -pair[2])[:most]

    def facts(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        low, high = self.score.interval
        return {
            "questions": self.score.total, "accuracy": self.score.accuracy, "interval": [low, high],
            "names": list(self.names), "counts": [list(row) for row in self.counts],
            "recall": self.recall(), "calibration_error": self.error, "brier": self.brier,
            "log_loss": self.log_loss, "bins": [vars(part) for part in self.bins],
        }  # fmt: skip

    def __str__(self) -> str:
        """The figures, then the matrix, or the commonest mistakes where it would be too wide."""
        lines = [
            f"named rightly {self.score} of {self.score.total}, {len(self.names)} categories",
            f"calibration error {100 * self.error:.1f} %, Brier {self.brier:.3f}, "
            f"log loss {self.log_loss:.3f}",
        ]
        for part in self.bins:
            lines.append(
                f"  sure {100 * part.confidence:5.1f} %   right {100 * part.accuracy:5.1f} %   "
                f"of {part.count}"
            )
        if len(self.names) > _WIDE:
            mistakes = self.confused()
            lines += [f"  {right} named {named}: {count}" for right, named, count in mistakes]
            return "\n".join(lines)
        width = max(map(len, self.names)) + 2
        lines.append("rows: right, columns: named")
        lines.append(" " * width + "".join(f"{name:>{width}}" for name in self.names))
        for name, row in zip(self.names, self.counts, strict=True):
            lines.append(f"{name:{width}}" + "".join(f"{count:{width}d}" for count in row))
        return "\n".join(lines)


def report(verdicts: Sequence[Verdict], answers: Sequence[str], bins: int = 10) -> Report:
    """Compare verdicts with the right categories, question by question.

    Raises ValueError for different numbers of both, for none, and for an answer that pass 1 cannot
    name.

    >>> said = Verdict("math", {"math": 0.75, "other": 0.25})
    >>> report([said, said], ["math", "other"]).counts
    ((1, 0), (1, 0))
    """
    if not verdicts or len(verdicts) != len(answers):
        raise ValueError(
            f"verdicts and answers must be as many, at least one, got {len(verdicts)} and "
            f"{len(answers)}"
        )
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    names = tuple(verdicts[0].probabilities)
    place = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(answers) - place.keys())
    if unknown:
        raise ValueError(
            f"answers must be categories ({', '.join(names):.200}), got {', '.join(unknown):.200}"
        )
    counts = [[0] * len(names) for _ in names]
    groups: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    brier = loss = 0.0
    for said, answer in zip(verdicts, answers, strict=True):
        counts[place[answer]][place[said.category]] += 1
        sure = said.probabilities[said.category]
        groups[min(bins - 1, max(0, math.ceil(sure * bins) - 1))].append(
            (sure, said.category == answer)
        )
        brier += sum((p - (name == answer)) ** 2 for name, p in said.probabilities.items())
        loss -= math.log(max(said.probabilities[answer], 1e-300))
    total = len(answers)
    filled = tuple(
        Bin(i / bins, (i + 1) / bins, len(part), sum(p for p, _ in part) / len(part),
            sum(right for _, right in part) / len(part))
        for i, part in enumerate(groups) if part
    )  # fmt: skip
    return Report(
        names, tuple(map(tuple, counts)),
        Score(sum(counts[i][i] for i in range(len(names))), total), filled,
        sum(part.count * abs(part.confidence - part.accuracy) for part in filled) / total,
        brier / total, loss / total,
    )  # fmt: skip
