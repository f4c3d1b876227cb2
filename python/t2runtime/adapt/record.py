"""A record of past performance: how often each expert was right in each category.

NOTE(paper): not in the paper, which takes the expert of the category's name. The record is filled
on validation problems (or from live feedback), and a category gets the expert that the record
speaks for, be it one of another name or the base.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import t2kernels as t2k
from t2runtime.adapt.mixtures import Hashes, check_experts, hashes
from t2runtime.adapt.shots import marks_in, question_marks
from t2runtime.adapt.stored import mapping, read_stored, text, whole_number, write_stored
from t2runtime.evaluate import evaluate
from t2runtime.tasks import Grader, Problem, Source

KIND, VERSION = "performance record", 1
BASE = "base"
Rule = Literal["mean", "thompson", "ucb"]


@dataclass
class Record:
    """{category: {expert or "base": (right, tried)}}.

    With no knowledge a share of right answers may be anything: the prior is Beta(1, 1), and the
    posterior after r of n right answers Beta(1 + r, 1 + n - r), with mean (1 + r) / (2 + n).
    experts: {name: hash}; the record is of no use for others. questions: the marks of the problems
    that it was measured on (`shots.question_mark`); None where they are not known.

    Raises ValueError or TypeError for a value that is none of these.
    """

    experts: dict[str, str]
    counts: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    questions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        mapping(self.experts, "experts", "{expert: hash}")
        for name, mark in self.experts.items():
            text(mark, f"the hash of expert {name!r:.80}")
        if BASE in self.experts:
            raise ValueError(f"an expert called {BASE!r} would be taken for the base; rename it")
        mapping(self.counts, "counts", "{category: {expert: (right, tried)}}")
        for category, row in self.counts.items():
            where = f"counts[{category!r:.80}]"
            mapping(row, where, "{expert: (right, tried)}")
            for name, pair in row.items():
                what = f"{where}[{name!r:.80}]"
                if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                    raise TypeError(f"{what} must be (right, tried), got {pair!r:.80}")
                for number in pair:
                    whole_number(number, what)
                self._check(category, name, *pair)
        marks_in({"questions": self.questions})

    def _check(self, category: str, name: str, right: int, tried: int) -> None:
        if name != BASE and name not in self.experts:
            known = ", ".join([BASE, *self.experts])
            raise ValueError(f"expert must be one of {known}, got {name!r}")
        if not 0 <= right <= tried:
            raise ValueError(
                f"right must be in 0..tried, got {right} of {tried} for {name!r} in {category!r}"
            )

    def add(self, category: str, name: str | None, right: int, tried: int = 1) -> None:
        """Count outcomes of an expert (None: the base) in a category."""
        name = BASE if name is None else name
        self._check(category, name, right, tried)
        before = self.counts.setdefault(category, {}).get(name, (0, 0))
        self.counts[category][name] = (before[0] + right, before[1] + tried)

    def choose(
        self, category: str, rule: Rule = "mean", rng: random.Random | None = None
    ) -> str | None:
        """The expert for a category, None for the base; ties go to the base, then to the first.

        "mean": the best posterior mean, to answer with. To go on learning from feedback:
        "thompson" (the best of one draw from each posterior; `rng` gives them), or "ucb" (the best
        mean + sqrt(2 ln N / (1 + n))). A category without any record gets the base.

        >>> record = Record({"a": "", "b": ""})
        >>> record.add("sums", "a", 8, 10); record.add("sums", None, 5, 10)
        >>> record.choose("sums"), record.choose("poems")
        ('a', None)
        """
        row = self.counts.get(category)
        if row is None:
            return None
        total = sum(tried for _, tried in row.values())

        def value(name: str) -> float:
            right, tried = row.get(name, (0, 0))
            if rule == "thompson":
                if rng is None:
                    raise ValueError("rule 'thompson' needs rng, a random.Random, got none")
                return rng.betavariate(1 + right, 1 + tried - right)
            mean = (1 + right) / (2 + tried)
            more = math.sqrt(2 * math.log(max(total, 1)) / (1 + tried)) if rule == "ucb" else 0.0
            return mean + more

        if rule not in ("mean", "thompson", "ucb"):
            raise ValueError(f"rule must be 'mean', 'thompson' or 'ucb', got {rule!r}")
        best = max([BASE, *self.experts], key=value)
        return None if best == BASE else best

    def check(self, bank: t2k.ExpertBank, hashed: Hashes | None = None) -> None:
        """ValueError unless the bank has the experts of the record, the same by hash."""
        check_experts(
            hashed or Hashes(bank), self.experts, "the record", made="made",
            again="make the record again",
        )  # fmt: skip

    @property
    def used(self) -> tuple[int, int]:
        """(labelled problems, answers) that the record was made from."""
        rows = [[tried for _, tried in row.values()] for row in self.counts.values()]
        return sum(max(row, default=0) for row in rows), sum(map(sum, rows))

    def save(self, path: str | Path) -> None:
        """One JSON file, whole or not at all."""
        counts = {c: {n: list(pair) for n, pair in row.items()} for c, row in self.counts.items()}
        facts: dict[str, Any] = {"experts": self.experts, "counts": counts}
        if self.questions is not None:
            facts["questions"] = list(self.questions)
        write_stored(path, KIND, VERSION, facts)

    @classmethod
    def load(cls, path: str | Path, bank: t2k.ExpertBank | None = None) -> Record:
        """What `save` wrote; with `bank` checked to be of its experts (ValueError).

        Raises CorruptFileError for a file that is truncated, damaged or of another kind. One
        without a checksum, as written by hand, is read, and the log warns.
        """
        facts = read_stored(
            path, KIND, VERSION, required=("experts", "counts"), optional=("questions",)
        )
        try:
            made = cls(facts["experts"], facts["counts"], marks_in(facts))
        except (TypeError, ValueError, RecursionError) as error:
            raise t2k.CorruptFileError(f"{path} is not a whole record: {error}.") from error
        made.counts = {c: {n: (r, t) for n, (r, t) in row.items()}
                       for c, row in made.counts.items()}  # fmt: skip
        if bank is not None:
            made.check(bank)
        return made


def record_of_tasks(
    model: Any,
    tokenizer: Any,
    bank: t2k.ExpertBank,
    names: Sequence[str],
    sources: Mapping[str, Source],
    count: int,
    *,
    max_new_tokens: int | None = None,
    seed: int = 0,
    rows: int = 256,
    chat: str = "auto",
) -> Record:
    """`measure_record` on `count` validation problems of each source; its key is the category.

    max_new_tokens: default what each source says.
    """
    record = Record(hashes(bank, list(names)))
    marks: list[str] = []
    for task, source in sources.items():
        part = measure_record(
            model, tokenizer, bank, names, {task: source(count, "validation", seed)},
            max_new_tokens or source.max_new_tokens, source, rows=rows, chat=chat,
        )  # fmt: skip
        record.counts.update(part.counts)
        marks += part.questions or ()
    record.questions = tuple(dict.fromkeys(marks))
    return record


def measure_record(
    model: Any,
    tokenizer: Any,
    bank: t2k.ExpertBank,
    names: Sequence[str],
    problems: Mapping[str, Sequence[Problem]],
    max_new_tokens: int,
    grader: Grader,
    *,
    rows: int = 256,
    chat: str = "auto",
) -> Record:
    """The record of the base and of each expert alone on problems by category (validation ones:
    test problems would tell what they are to be chosen for).
    """
    used = question_marks(problem for asked in problems.values() for problem in asked)
    record = Record(hashes(bank, list(names)), questions=used)
    for name in (None, *names):
        with bank.use(name):
            for category, asked in problems.items():
                got = evaluate(
                    model, tokenizer, grader, asked, max_new_tokens, rows=rows, chat=chat
                )
                record.add(category, name, got.right, got.total)
    return record
