"""The comparison: every strategy on the same problems, none of them a shot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import t2kernels as t2k
from t2runtime.adapt.compare import compare, text_table
from t2runtime.adapt.router import RouterConfig
from t2runtime.tasks import ByAnswer, Problem


class Fixed(ByAnswer):
    """Some problems; the first test problem is also a shot."""

    name, max_new_tokens = "fixed", 3

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__()
        self.problems = list(problems)

    def __call__(self, count: int, split: Any, seed: int) -> list[Problem]:
        test = self.problems[:3]
        return {"test": test, "validation": test[:1] + self.problems[3:]}.get(split, test)[:count]


def test_rows_and_table(bank: t2k.ExpertBank, tokenizer: Any, shots: list[Problem]) -> None:
    """The experts "a" and "b" are right together, which no strategy of one expert can find."""
    sources = {"a": Fixed(shots), "x": Fixed([Problem(f"{n}+=", "7", "x") for n in range(5)])}
    rows = compare(
        bank.model, tokenizer, bank, ["a", "b"], sources,
        {"prompt": lambda questions: ["a"] * len(questions), "fixed": lambda q: ["x"] * len(q)},
        methods=("cem", "random"), shots=2, validation=2, population=6, elites=2, generations=1,
        router=RouterConfig(hidden=4, steps=2, rows=4),
    )  # fmt: skip
    by_name = {row.strategy: row for row in rows}
    assert list(by_name) == [
        "base", "prompt", "fixed", "few-shot, cem", "few-shot, random", "router",
        "past performance",
    ]  # fmt: skip
    assert {row.score.total for row in rows} == {4}, "one of three left out of each task"
    assert by_name["few-shot, cem"].by_task["a"].accuracy == 1.0
    assert by_name["few-shot, cem"].forwards == 2 * (2 * 2 * 6)
    assert by_name["fixed"].score == by_name["base"].score, "no expert is called x"
    text = text_table(rows)
    assert "past performance" in text and len(text.splitlines()) == 9


def test_no_tasks(bank: t2k.ExpertBank, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="at least one task"):
        compare(bank.model, tokenizer, bank, ["a"], {}, {})
