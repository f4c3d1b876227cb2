"""Experts on a second base model: the unit with tiny settings, and what the rows say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t2runtime import base_model
from t2runtime.claims import transfer
from t2runtime.claims.claim import judge
from t2runtime.claims.units import KINDS, Context

TINY = {
    "second_steps": 2, "second_rows": 8, "problems": 4, "shots": 2, "population": 7,
    "generations": 1, "train.steps": 1, "train.prompts": 2, "train.samples": 2,
    "train.validation_problems": 2,
}  # fmt: skip


def context(out: Path, **more: Any) -> Context:
    return Context(out, settings={**KINDS["transfer"].settings, **TINY, **more})


def test_both_models_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = transfer.measure(0, context(tmp_path))
    assert set(row["first"]) == {"base", "shuffled", "own"}
    assert set(row["second"]) == {
        "base", "sigma", "shuffled", "own",
        "few-shot, sigma", "few-shot, shuffled",
    }  # fmt: skip
    for weights in (*row["first"].values(), *row["second"].values()):
        assert set(weights) == set(transfer.TASKS)
        assert all(0 <= v <= 100 and v % 25 == 0 for v in weights.values())
    assert sum(row["first"]["base"].values()) > 0  # the shipped model knows something
    for found in row["alpha"].values():
        assert all(len(alpha) == len(transfer.TASKS) for alpha in found.values())
        assert all(0 <= weight <= 1 for alpha in found.values() for weight in alpha)
    # The second model is made once, from its settings.
    monkeypatch.setattr(base_model, "make", None)
    assert transfer.second_model(context(tmp_path)).name == "base-1-2-8"
    with pytest.raises(TypeError):
        transfer.second_model(context(tmp_path, second_steps=3))


def row(sigma: float, shuffled: float, few: float, own: float) -> dict[str, Any]:
    def all_at(value: float) -> dict[str, float]:
        return dict.fromkeys(transfer.TASKS, value)

    return {
        "problems": dict.fromkeys(transfer.TASKS, 100),
        "first": {"base": all_at(40), "shuffled": all_at(shuffled), "own": all_at(own)},
        "second": {
            "base": all_at(40), "sigma": all_at(sigma), "shuffled": all_at(shuffled),
            "own": all_at(own), "few-shot, sigma": all_at(few), "few-shot, shuffled": all_at(few),
        },
    }  # fmt: skip


def test_claims_are_differences_of_means_over_tasks() -> None:
    rows = {"transfer": [row(30.0 + s, 20.0, 41.0 + s, 90.0) for s in range(3)]}
    found = [judge(claim, rows) for claim in transfer.CLAIMS]
    assert [f["mean"] for f in found] == pytest.approx([-9.0, 11.0, 2.0, 70.0, 0.0])
    assert [f["verdict"] for f in found] == [
        "not confirmed", "confirmed", "undecided", "confirmed", "not confirmed",
    ]  # fmt: skip


def test_the_section_shows_both_models() -> None:
    assert transfer.section({"transfer": [row(1, 2, 3, 4)]}) == []
    lines = transfer.section({"transfer": [row(30.0 + s, 20.0, 41.0, 90.0) for s in range(2)]})
    body = [line for line in lines if line.startswith("| ")]
    assert len(body) == 1 + 3 + 6
    assert sum(line.startswith("| second | few-shot, ") for line in body) == 2
    assert len({line.count("|") for line in body}) == 1
