"""The comparison: every strategy on the same problems through the engine, none of them a shot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.adapt.mixtures import TaskMixture, hashes
from t2runtime.adapt.prompt import Categories
from t2runtime.adapt.record import Record
from t2runtime.adapt.router import Router, RouterConfig
from t2runtime.adapt.shots import question_mark, question_marks
from t2runtime.compare import compare, text_table
from t2runtime.engine import Transformer2
from t2runtime.generation import complete
from t2runtime.tasks import ByAnswer, Problem

NEW = 3
QUICK: dict[str, Any] = {"population": 6, "elites": 2, "generations": 1, "shots": 2}


class Fixed(ByAnswer):
    """Some problems a split; the first test problem is also a shot."""

    max_new_tokens = NEW

    def __init__(self, name: str, problems: Sequence[Problem]) -> None:
        super().__init__()
        self.name = name
        self.splits = {"test": problems[:3], "validation": [*problems[:1], problems[3]],
                       "train": [Problem("7", "7", name)]}  # fmt: skip

    def __call__(self, count: int, split: Any, seed: int) -> list[Problem]:
        return list(self.splits[split][:count])


@pytest.fixture
def t2(tiny: Any, tokenizer: Any) -> Transformer2:
    """Experts "a", "b" and a classifier, far enough from the base to change answers."""
    bank = t2k.ExpertBank(tiny)
    here = t2k.Expert.from_model(tiny)
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b", "sorter"):
        z = {n: 1 + torch.randn(v.shape, generator=generator) for n, v in here.z.items()}
        bank.add(name, t2k.Expert(z, here.fingerprints))
    ask = Categories(("a", "b"), "{question}", lead="")
    return Transformer2(tiny, tokenizer, bank, categories=ask, classifier="sorter")


@pytest.fixture
def sources(t2: Transformer2) -> dict[str, Fixed]:
    """Of "a" the right answers are what both experts at full weight say; "x" nobody knows."""
    prompts = ["12+34=", "flip 123=", "big 98=", "56+7="]
    with t2.bank.use({"a": 1.0, "b": 1.0}):
        texts = complete(t2.model, t2.tokenizer, prompts, NEW).texts
    known = [Problem(p, t.strip() or "7", "a") for p, t in zip(prompts, texts, strict=True)]
    return {
        "a": Fixed("a", known),
        "x": Fixed("x", [Problem(f"{n}+=", "no", "x") for n in range(4)]),
    }


def test_every_strategy_in_one_table(t2: Transformer2, sources: Any) -> None:
    strategies = [None, "a", {"a": 1.0, "b": 1.0}, "prompt", "classifier", "mixture", "few-shot",
                  "router", "record"]  # fmt: skip
    before = dict(vars(t2))
    rows = compare(t2, sources, strategies, methods=("cem", "random"), validation=2, rows=3,
                   router=RouterConfig(hidden=4, steps=2, rows=4), **QUICK)  # fmt: skip
    by_name = {row.strategy: row for row in rows}
    assert list(by_name) == [
        "base", "a", "a 1 + b 1", "prompt", "classifier", "mixture", "few-shot, cem",
        "few-shot, random", "router", "record",
    ]  # fmt: skip
    assert vars(t2) == before, "the engine is left as it is"
    assert {row.score.total for row in rows} == {4}, "one of three left out of each task, for all"
    assert {row.left_out for row in rows} == {2}
    assert {row.by_task["x"].right for row in rows} == {0}
    assert by_name["a 1 + b 1"].by_task["a"].accuracy == 1.0
    assert by_name["few-shot, cem"].by_task["a"].accuracy == 1.0, "both at 1 are in the search"
    assert by_name["a"].score == compare(t2, sources, ["a", "few-shot"], **QUICK)[0].score

    costs = {name: (row.shots, row.forwards) for name, row in by_name.items()}
    search = 2 * (2 * 2 * 6)  # two tasks of two shots under six members, answered and scored
    assert costs["few-shot, cem"] == costs["few-shot, random"] == (4, search)
    assert costs["prompt"] == costs["classifier"] == costs["mixture"] == (0, 4)
    assert costs["base"] == costs["a"] == (0, 0)
    assert costs["router"] == (1, 2 * 2 * 4 + 2 + 4), "the one training question of both is equal"
    assert costs["record"] == (4, 4 * 3 + 4)
    for row in rows:
        looked = row.strategy in ("prompt", "classifier", "mixture", "router", "record")
        assert (row.pass1_seconds > 0) == looked and row.pass2_seconds > 0
        assert row.ratio == pytest.approx(row.pass1_seconds / row.pass2_seconds)
        found = row.strategy.startswith(("few-shot", "router", "record"))
        assert (row.search_seconds > 0) == found
    facts = [row.facts() for row in rows]
    assert facts[0]["by_task"]["a"]["problems"] == 2 and facts[0]["problems"] == 4
    text = text_table(facts)
    assert "1 : 2" in text and len(text.splitlines()) == len(rows) + 1


def test_what_was_found_before(
    t2: Transformer2, sources: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Mixtures with the shots that they name, an engine's own router and record."""
    marks = hashes(t2.bank, ["a", "b"])
    shots = [question_mark(problem) for problem in sources["a"].splits["test"][:2]]
    both = TaskMixture("a", {"a": 1.0, "b": 1.0}, marks, budget=24, facts={"questions": shots})
    base = TaskMixture("x", {}, marks)
    (row,) = compare(t2, sources, ["few-shot"], mixtures={"a": both, "x": base})
    assert (row.shots, row.forwards, row.search_seconds) == (2, 24, 0.0)
    assert row.by_task["a"].total == 1 and row.by_task["a"].accuracy == 1.0
    assert row.by_task["x"].total == 3
    with t2.bank.use(None):
        texts = complete(t2.model, t2.tokenizer, ["1+1=", "big 12="], NEW).texts
    plain = [Problem(p, t.strip() or "7", "x") for p, t in zip(["1+1=", "big 12="], texts)]
    mixed = {"a": sources["a"], "x": Fixed("x", [*plain, plain[0], plain[0]])}
    (row,) = compare(t2, mixed, ["few-shot"], mixtures={"a": both, "x": base})
    assert row.score.accuracy == 1.0, "each task under its own mixture"
    with pytest.raises(ValueError, match="got none for x; there are a"):
        compare(t2, sources, ["few-shot"], mixtures={"a": both})
    unknown = TaskMixture("x", {}, marks, budget=1)
    with pytest.raises(ValueError, match="does not say which questions were its shots"):
        compare(t2, sources, ["few-shot"], mixtures={"a": both, "x": unknown})

    t2.record = Record(marks, {"a": {"b": (3, 4)}, "b": {"base": (0, 3)}})
    (row,) = compare(t2, sources, ["record"])
    assert (row.shots, row.forwards, row.search_seconds) == (4 + 3, 7 + 6, 0.0)
    assert "the record does not say which problems" in caplog.text


def test_what_routers_and_records_were_made_with_is_left_out(
    t2: Transformer2, sources: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of files as of what is made in the call, for all rows."""
    marks = hashes(t2.bank, ["a", "b"])
    seen = sources["a"].splits["test"]
    t2.record = Record(marks, questions=question_marks(seen[:1]))
    t2.router = Router(marks, t2.model.config.hidden_size, 4)
    t2.router.questions = question_marks([Problem(f" {seen[1].prompt.upper()}?", "", "x")])
    rows = compare(t2, sources, [None, "router", "record"])
    assert [row.by_task["a"].total for row in rows] == [1, 1, 1]
    assert [row.by_task["x"].total for row in rows] == [3, 3, 3]
    assert {row.left_out for row in rows} == {2} and not caplog.text


def test_shots_of_the_test_split_are_replaced(t2: Transformer2, sources: Any) -> None:
    base, row = compare(t2, {"a": sources["a"]}, [None, "few-shot"], problems=2,
                        shots_from="test", **{**QUICK, "shots": 1})  # fmt: skip
    assert base.score.total == row.score.total == 2 and row.shots == 1
    with pytest.raises(ValueError, match="all of 3 are shots"):
        compare(t2, {"a": sources["a"]}, ["few-shot"], shots_from="test", **{**QUICK, "shots": 3})


def test_a_problem_without_an_answer_counts_as_wrong(t2: Transformer2, sources: Any) -> None:
    long = Fixed("long", [Problem("1" * 80, "1", "x"), *sources["a"].splits["test"][1:], None])
    (row,) = compare(t2, {"long": long}, [{"a": 1.0, "b": 1.0}])
    assert row.failed == 1 and row.score.right == 2 and row.score.total == 3
    text = text_table([row.facts()])
    assert "without an answer, counted as wrong: 1; the first: the prompt has 81" in text


def test_saved_mixtures_are_looked_at_first(t2: Transformer2, sources: Any) -> None:
    """A router is not trained for a table that cannot be made."""
    for source in sources.values():
        source.splits["train"] = []  # whoever trains a router says so
    mixture = TaskMixture("a", {}, hashes(t2.bank, ["a"]))
    with pytest.raises(ValueError, match="got none for x; there are a"):
        compare(t2, sources, ["router", "few-shot"], mixtures={"a": mixture})
    with pytest.raises(ValueError, match="task 'a': budget must be at least 24 forwards"):
        compare(t2, sources, ["router", "few-shot"], budget=23, **QUICK)
    with pytest.raises(ValueError, match="problems must be at least 1, got 0"):
        compare(t2, sources, ["router"], problems=0)


def test_bad_input(t2: Transformer2, sources: Any) -> None:
    for given, strategies, said in (
        ({}, ["prompt"], "at least one task"),
        (sources, [], "strategies must hold one"),
        (sources, ["prompt", "prompt"], "prompt more than once"),
        (sources, ["few-shto"], "strategy must be one of"),
        (sources, [{"c": 1.0}], "needs expert 'c'"),
    ):
        with pytest.raises(ValueError, match=said):
            compare(t2, given, strategies)
