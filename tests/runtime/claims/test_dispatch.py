"""The unseen tasks, the numbers read from rows, pictures; all of it once, as small as it goes."""

import json
import subprocess
import sys

import pytest

from t2runtime.claims import dispatch_report, pictures
from t2runtime.claims.unseen import UNSEEN
from t2runtime.tasks import SKILLS

pytest.importorskip("transformers")


def test_unseen_problems_are_new_and_answered_rightly():
    for name, source in UNSEEN.items():
        problems = source(40, "test", 0)
        assert source.grade(problems, [p.answer for p in problems]) == [True] * 40, name
        assert source.grade(problems[:1], ["nothing"]) == [False]
        skill = SKILLS[problems[0].category]
        known = {p.prompt for seed in range(3) for p in skill.problems(500, "test", seed)}
        shared = known & {p.prompt for p in problems}
        assert bool(shared) == (name == "count"), name
        shots = {p.prompt for p in source(20, "validation", 0)}
        assert not shots & {p.prompt for p in problems}
    assert [UNSEEN["max of six"](1, "test", 0)[0].prompt[-7:-1].isdigit()] == [True]


def test_shots_hold_the_fewer_ones():
    for source in UNSEEN.values():
        assert source(20, "validation", 3)[:5] == source(5, "validation", 3)


def dispatch_row(seed=0, few=70.0):
    strategies = {"base": 40.0, "prompt": 50.0, "classifier": 55.0, "few-shot, cem": few}
    accuracy = {name: {"x": value, "y": value + 10} for name, value in strategies.items()}
    for name, value in (("x", 90.0), ("y", 80.0)):
        accuracy[f"expert {name}"] = {"x": value, "y": value}
    named = {"prompt": {"x": {"x": 50.0, "other": 50.0}, "y": {"other": 100.0}},
             "classifier": {"x": {"x": 90.0}, "y": {"y": 70.0}}}  # fmt: skip
    alpha = {"few-shot, cem": {"x": [1.0, 1.0], "y": [1.0, 0.0]},
             "few-shot, cem per layer": {"x": [[0.0, 1.0]] * 3, "y": [[0.5, 0.5]] * 3}}  # fmt: skip
    part = {"problems": {"x": 10, "y": 10}, "accuracy": accuracy, "named": named, "alpha": alpha,
            "seconds": {"pass1": 1.0, "pass2": 4.0}}  # fmt: skip
    return {"unit": "dispatch", "seed": seed, "trained": part, "unseen": part}


def shots_row(seed=0):
    part = {"accuracy": {"0": {"x": 40.0}, "3": {"x": 60.0}, "5": {"x": 62.0}, "20": {"x": 63.0}}}
    return {"unit": "shots", "seed": seed, **part}


def test_numbers_of_the_claims():
    rows = {"dispatch": dispatch_row(), "shots": shots_row()}
    found = {claim.text: claim.value(rows[claim.kind]) for claim in dispatch_report.CLAIMS}
    assert list(found.values()) == pytest.approx(
        [40.0, 10.0, 5.0, 15.0, 30.0, 55.0, 20.0, 1.0, 1.5, 0.25]
    )


def test_tables_need_two_seeds():
    assert dispatch_report.section({"dispatch": [dispatch_row()]}) == []
    lines = dispatch_report.section({
        "dispatch": [dispatch_row(0), dispatch_row(1, 72.0)], "shots": [shots_row()] * 2,
    })  # fmt: skip
    assert "| few-shot, cem | 76.0 | 63.3 to 88.7 | 71.0 | 81.0 |" in lines
    assert "| 20 | 63.0 | 63.0 to 63.0 | 63.0 |" in lines


def test_pictures_are_drawn_from_rows(tmp_path):
    pytest.importorskip("matplotlib")
    rows = {"dispatch": [dispatch_row(0), dispatch_row(1)], "shots": [shots_row(0), shots_row(1)]}
    made = dispatch_report.draw(rows, tmp_path)
    assert list(made) == ["claims-shots.png", "claims-alpha.png", "claims-alpha-layers.png"]
    for name in made:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert dispatch_report.draw({}, tmp_path) == {}


def test_without_matplotlib_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert pictures.shots(tmp_path / "a.png", {3: (1.0, 0.0, 2.0)}) == {}
    assert pictures.alpha(tmp_path / "a.png", {"x": [1.0]}, ["e"]) == {}
    assert pictures.alpha_layers(tmp_path / "a.png", {"x": [[1.0]]}, ["e"]) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_seeds_from_training_to_markdown(tmp_path):
    small = ["problems=2", "shots=1", "population=8", "generations=3", "router_steps=1"]
    train = ["train.steps=1", "train.prompts=2", "train.validation_problems=4"]
    command = [sys.executable, "-m", "t2runtime.claims", "--out", str(tmp_path), "--seeds", "2",
               "--jobs", "1", "--units", "dispatch", "--set", *small, *train]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "claims.json").read_text())
    assert [(row["unit"], row["seed"]) for row in result["rows"]] == [
        ("dispatch", 0),
        ("dispatch", 1),
    ]
    assert result["settings"]["dispatch"]["train.steps"] == 1
    assert len(list((tmp_path / "experts").iterdir())) == 10
    reached = result["rows"][0]["unseen"]["accuracy"]
    assert set(reached["base"]) == set(UNSEEN)
    assert {"base", "expert add", "mixture", "record", "few-shot, cem per layer"} <= set(reached)
    verdicts = {c["claim"]: c["verdict"] for c in result["claims"]}
    assert verdicts["SVF by reinforcement beats LoRA"] == "not measured"
    assert verdicts["Accuracy is flat from five shots on"] == "not measured"
    assert verdicts["An expert beats the base on its own task"] != "not measured"
    assert "## Unseen tasks by strategy" in (tmp_path / "claims.md").read_text()
