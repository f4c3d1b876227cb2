"""The grid, the ledger, the statistics; and one short run in a process of its own."""

import json
import math

import pytest

from t2runtime.evidence import __main__ as evidence
from t2runtime.evidence import grid, report, work
from t2runtime.evidence.environment import environment
from t2runtime.evidence.ledger import Ledger, finish
from t2runtime.loading import load
from t2runtime.train import small_model


def row(arm, seed, trained, task="add", **more):
    facts = {"arm": arm, "task": task, "seed": seed, "lr": 0.02, "base": 40, "trained": trained}
    size = {"problems": 100, "values": 7, "seconds": 1.0, "peak_mib": 1.0, "validation": 0.5}
    return {**facts, **size, **more}


def test_arms_differ_in_one_thing_and_questions_name_them():
    for question in grid.QUESTIONS:
        first, second = grid.ARMS[question.first], grid.ARMS[question.second]
        names = ("method", "targets", "parametrisation", "settings")
        differing = [n for n in names if getattr(first, n) != getattr(second, n)]
        assert len(differing) == 1, question.text
    runs = [*grid.tuning(), *grid.comparisons(dict.fromkeys(grid.ARMS, 0.02), range(5))]
    assert len({run.key for run in runs}) == len(runs)


def test_a_difference_is_paired_and_its_interval_is_students():
    question = grid.QUESTIONS[0]
    rows = [row(question.first, s, 60 + s) for s in range(3)]
    rows += [row(question.second, s, 50 + 2 * s) for s in range(3)]
    found = report.answer(question, rows)
    assert found["difference"] == pytest.approx(9.0)
    half = 4.303 * 1.0 / math.sqrt(3)
    assert found["interval"] == pytest.approx((9 - half, 9 + half))
    assert found["outcome"] == "first is better"
    noisy = [row(question.first, 0, 90), row(question.first, 1, 10)]
    noisy += [row(question.second, s, 50) for s in range(2)]
    assert report.answer(question, noisy)["outcome"] == "undecided"


def test_the_learning_rate_is_the_best_by_validation():
    rows = [row("svf", grid.TUNING_SEED, 0, lr=lr, validation=v)
            for lr, v in ((0.005, 0.7), (0.02, 0.9), (0.05, 0.9))]  # fmt: skip
    others = [row(name, grid.TUNING_SEED, 0) for name in grid.ARMS if name != "svf"]
    rates = evidence.chosen_rates([*rows, *others])
    assert rates["svf"] == 0.02
    assert "svf, MLP" not in rates


def test_a_stopped_ledger_goes_on(tmp_path):
    path = tmp_path / "runs.jsonl"
    ledger = Ledger(path)
    ledger.add({"key": "a", "x": 1})
    with path.open("a") as file:
        file.write('{"key": "b", "x"')
    again = Ledger(path)
    assert again.rows == {"a": {"key": "a", "x": 1}}
    again.add({"key": "b", "x": 2})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_a_run_of_its_own_process_and_the_report(tmp_path):
    run = grid.Run("svf", "add", 0).with_settings(lr=0.02, steps=1, prompts=2, samples=2,
                                                  validation_problems=4)  # fmt: skip
    ledger = Ledger(tmp_path / "runs.jsonl")
    (found,) = finish([run], ledger, 1, "test")
    assert found["problems"] == 400
    assert found["values"] == 3584
    assert 0 < found["base"] < 400
    assert found["seconds"] > 0
    assert 1 < found["training_mib"] < found["peak_mib"]
    assert finish([run], ledger, 1, "test") == [found]
    with pytest.raises(RuntimeError, match="must be one of"):
        finish([grid.Run("svf", "nothing", 0).with_settings(lr=0.1)], ledger, 1, "test")

    names = {question.first for question in grid.QUESTIONS} | {q.second for q in grid.QUESTIONS}
    rows = [row(name, s, 50 + s + len(name)) for name in sorted(names) for s in range(2)]
    report.write(tmp_path, environment(), {"svf": 0.02}, rows, rows[:2])
    text = (tmp_path / "evidence.md").read_text()
    assert "SVF against LoRA, by reinforcement" in text
    result = json.loads((tmp_path / "evidence.json").read_text())
    assert len(result["answers"]) == len(grid.QUESTIONS)
    assert all("key" not in run for run in result["runs"])


def test_memory_of_a_method_beside_rows_that_lack_it():
    old = [row("svf", s, 50) for s in range(2)]
    (line,) = report.arms(old)
    assert line["training_mib"] is None
    (line,) = report.arms([*old, row("svf", 2, 50, training_mib=12.25)])
    assert line["training_mib"] == 12.25
    table = report._table(report.arms(old) + [line])
    assert "| – | 1 |" in table[2] and "| 12.2 | 1 |" in table[3]
    assert len({text.count("|") for text in table}) == 1


def test_what_training_holds_grows_with_its_rows_and_its_method():
    def held(method, prompts):
        pytest.importorskip("peft")
        run = grid.Run("x", "add", 0, method=method)
        cfg = small_model(steps=1, prompts=prompts, samples=2, validation_problems=4)
        source = work.source_of("add")
        model, tokenizer = load("small")
        adapter = work._adapter(run, model)
        return work.training_bytes(model, tokenizer, source, cfg, adapter)

    few, many, lora = held("svf", 2), held("svf", 16), held("lora", 2)
    assert few < many
    assert lora != few
    assert held("svf", 2) == few
