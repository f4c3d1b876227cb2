"""Past performance: posterior means decide, the other rules explore, files belong to experts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import t2kernels as t2k
from t2runtime.adapt.mixtures import hashes
from t2runtime.adapt.record import Record, measure_record
from t2runtime.adapt.shots import question_marks
from t2runtime.tasks import EXACT, Problem

NEW = 3


def test_the_best_posterior_mean_decides() -> None:
    record = Record({"a": "", "b": ""})
    assert record.choose("sums") is None, "nothing is known"
    record.add("sums", "a", 1, 1)
    record.add("sums", "b", 90, 100)
    assert record.choose("sums") == "b", "0.89 by many beats 0.67 by one"
    record.add("sums", None, 95, 100)
    assert record.choose("sums") is None
    record.add("poems", "a", 1, 2)
    assert record.choose("poems") is None, "a tie goes to the base"


def test_rules_that_explore_try_what_is_unknown() -> None:
    record = Record({"a": "", "b": ""})
    record.add("sums", "a", 6, 10)
    record.add("sums", None, 5, 10)
    assert record.choose("sums") == "a" and record.choose("sums", "ucb") == "b"
    rng = random.Random(0)
    drawn = [record.choose("sums", "thompson", rng) for _ in range(200)]
    assert {"a", "b", None} == set(drawn)
    record.add("sums", "a", 900, 1000)
    drawn = [record.choose("sums", "thompson", rng) for _ in range(200)]
    assert drawn.count("a") > 150


def test_measured_saved_and_tied_to_its_experts(
    bank: t2k.ExpertBank, tokenizer: Any, shots: list[Problem], tmp_path: Path
) -> None:
    problems = {"x": shots, "y": shots[:1]}
    record = measure_record(bank.model, tokenizer, bank, ["a", "b"], problems, NEW, EXACT)
    assert {name: tried for name, (_, tried) in record.counts["x"].items()} == {
        "base": 4, "a": 4, "b": 4,
    }  # fmt: skip
    path = tmp_path / "record.json"
    record.save(path)
    assert Record.load(path, bank) == record
    assert record.questions == question_marks(shots), "each problem once"
    whole = {k: v for k, v in json.loads(path.read_text()).items() if k != "digest"}
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != "questions"}))
    older = Record.load(path, bank)
    assert older.questions is None and older.counts == record.counts
    older.save(path)
    assert Record.load(path) == older
    path.write_text(json.dumps(whole | {"questions": [1]}))
    with pytest.raises(t2k.CorruptFileError, match="questions must be a list of texts"):
        Record.load(path)
    record.save(path)
    bank.add("a", bank["b"], overwrite=True)
    with pytest.raises(ValueError, match="the record was made for another expert 'a'"):
        Record.load(path, bank)
    text = path.read_text()
    path.write_text(text[:-30])
    with pytest.raises(t2k.CorruptFileError, match="truncated or damaged"):
        Record.load(path)
    path.write_text(json.dumps(whole | {"counts": {"x": {"a": [3, 2]}}}))
    with pytest.raises(t2k.CorruptFileError, match="right must be in"):
        Record.load(path)


def test_bad_arguments(bank: t2k.ExpertBank) -> None:
    record = Record(hashes(bank))
    with pytest.raises(ValueError, match="expert must be one of base, a, b, got 'c'"):
        record.add("sums", "c", 1)
    with pytest.raises(ValueError, match="right must be in"):
        record.add("sums", "a", 2, 1)
    record.add("sums", "a", 1)
    with pytest.raises(ValueError, match="rule must be"):
        record.choose("sums", "luck")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs rng"):
        record.choose("sums", "thompson")
    with pytest.raises(ValueError, match="taken for the base"):
        Record({"base": ""})
