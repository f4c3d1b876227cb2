"""Confusion matrix and calibration of pass 1, and the command that reports them."""

import json
from pathlib import Path
from typing import Any

import pytest

import t2kernels as t2k
from t2runtime.adapt.classifier import CategorySource
from t2runtime.adapt.confusion import report
from t2runtime.adapt.prompt import SMALL, Categories, Verdict
from t2runtime.cli import main
from t2runtime.commands.classify import asked
from t2runtime.sources import source
from t2runtime.tasks import Generated


def said(**probabilities: float) -> Verdict:
    return Verdict(max(probabilities, key=probabilities.__getitem__), probabilities)


def test_figures_by_hand() -> None:
    verdicts = [said(a=0.8, b=0.2), said(a=0.6, b=0.4), said(a=0.1, b=0.9), said(a=0.75, b=0.25)]
    found = report(verdicts, ["a", "b", "b", "a"])
    assert found.counts == ((2, 0), (1, 1))
    assert found.score.accuracy == 0.75 and found.recall() == {"a": 1.0, "b": 0.5}
    assert found.confused() == [("b", "a", 1)]
    assert [(b.count, b.accuracy) for b in found.bins] == [(1, 0.0), (2, 1.0), (1, 1.0)]
    assert found.error == pytest.approx((0.6 + 0.45 + 0.1) / 4)
    assert found.brier == pytest.approx((0.08 + 0.72 + 0.02 + 0.125) / 4)
    assert json.loads(json.dumps(found.facts()))["counts"] == [[2, 0], [1, 1]]


def test_a_sure_and_right_pass_has_no_error() -> None:
    found = report([said(a=1.0, b=0.0), said(a=0.0, b=1.0)], ["a", "b"])
    assert found.error == found.brier == found.log_loss == 0.0
    assert report([said(a=1.0, b=0.0)], ["b"]).log_loss > 600, "sure and wrong, yet finite"


def test_many_categories_show_their_mistakes() -> None:
    names = [f"intent_{i}" for i in range(77)]
    verdicts = [said(**{n: 0.5 if n == names[i // 2] else 0.5 / 76 for n in names})
                for i in range(77)]  # fmt: skip
    text = str(report(verdicts, names))
    assert "77 categories" in text and "named intent_" in text and len(text.splitlines()) < 20


def test_reports_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="as many, at least one, got 0 and 0"):
        report([], [])
    with pytest.raises(ValueError, match="got z"):
        report([said(a=1.0)], ["z"])
    with pytest.raises(ValueError, match="bins"):
        report([said(a=1.0)], ["a"], bins=0)


def test_questions_are_those_that_training_wraps() -> None:
    mixed = CategorySource({name: Generated(name) for name in ("add", "other")}, SMALL)
    categories, questions, answers = asked(mixed, 8, "test", 0)
    wrapped = mixed(8, "test", 0)
    assert [categories.prompt(question) for question in questions] == [p.prompt for p in wrapped]
    assert answers == [p.answer for p in wrapped]
    again, questions, _ = asked(source("category"), 8, "test", 0)
    assert again == SMALL and not any(question.startswith("kind?") for question in questions)
    with pytest.raises(ValueError, match="a file of labels, got 'add'"):
        asked(source("add"), 8, "test", 0)


def test_labels_of_a_file_are_categories(tmp_path: Path) -> None:
    rows = [{"prompt": f"message {i}: ", "answer": f"label_{i % 80}"} for i in range(2000)]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    categories, questions, answers = asked(source(str(path)), 50, "test", 0)
    assert len(categories.names) == 80 and len(questions) == 50
    assert isinstance(categories, Categories) and set(answers) <= set(categories.names)
    path.write_text("\n".join(json.dumps(r | {"answer": r["prompt"]}) for r in rows))
    with pytest.raises(ValueError, match="2000 different answers"):
        asked(source(str(path)), 50, "test", 0)


def test_the_command(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expert = tmp_path / "sorter.safetensors"
    here = t2k.Expert.from_model(small[0])
    t2k.Expert({name: 1.5 * z for name, z in here.z.items()}).save(expert)
    words = ("classify", "small", "--task", "category", "--limit", "40")
    assert main([*words, "--classifier", str(expert), "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)["reports"]
    assert set(reports) == {"base", "sorter"} and reports["base"]["accuracy"] > 0.8
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "rows: right, columns: named" in out and "calibration error" in out
