"""What the rows of models that see answer, and that they are measured only with data."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from t2runtime.claims import units, vision
from t2runtime.claims.claim import CONFIRMED, NOT_MEASURED, judge
from t2runtime.claims.units import Context
from t2runtime.vision.digits import DOMAINS, METHODS
from t2runtime.vision.easy_vqa import KINDS, SKILLS
from t2runtime.vision.vqa import WAYS

REACHED = {"visual": 0.9, "text": 0.8, "before": 0.4}


def vqa_row(seed):
    alone = {
        way: {
            skill: {
                kind: {"accuracy": (REACHED[way] if kind == skill else 0.1) + seed / 100}
                for kind in KINDS
            }
            for skill in SKILLS
        }
        for way in WAYS
    }
    forms = {"base": 0.5, "all at once": 0.3, "each its own": 0.7, "few-shot": 0.6 + seed / 100}
    mixed = {way: {form: {"accuracy": value} for form, value in forms.items()} for way in WAYS}
    base = {kind: {"accuracy": 0.5} for kind in KINDS}
    return {"seed": seed, "base": base, "alone": alone, "mixed": mixed}


def digits_row(seed):
    reached = {"base": 0.2, "svf": 0.5 + seed / 100, "lora": 0.6, "full": 0.7}
    row = {domain: {n: {"accuracy": v} for n, v in reached.items()} for domain in DOMAINS}
    return {**row, "one batch": {domain: {"accuracy": reached["svf"]} for domain in DOMAINS}}


ROWS = {
    vision.VQA: [vqa_row(seed) for seed in range(3)],
    vision.DIGITS: [digits_row(seed) for seed in range(3)],
}


def test_claims_read_the_numbers_that_they_name():
    found = {claim.text: judge(claim, ROWS) for claim in vision.CLAIMS}
    means = {text: round(one["mean"], 6) for text, one in found.items()}
    assert means == {
        "An expert trained on visual questions beats the base": 41,
        "Experts trained before the model saw images help on visual questions": -9,
        "Experts trained on text inside the LLaVA help on visual questions": 31,
        "A few-shot mixture of experts trained before it saw images beats the base": 11,
        "Each question under its kind's expert from before images beats one mixture for all": 9,
        "SVF adapts an image classifier": 31,
        "On it SVF beats LoRA": -9,
    }
    assert found["SVF adapts an image classifier"]["verdict"] == CONFIRMED
    assert all(judge(claim, {})["verdict"] == NOT_MEASURED for claim in vision.CLAIMS)


def test_the_section_shows_means_of_what_was_measured():
    text = "\n".join(vision.section(ROWS))
    assert "| before | 41.0 | 41.0 | 41.0 |" in text
    assert "| visual | 50.0 | 30.0 | 70.0 | 61.0 |" in text
    for domain in DOMAINS:
        assert f"| {domain} | 20.0 | 51.0 | 60.0 | 70.0 | 51.0 |" in text
    assert len(METHODS) == 3 and vision.section({}) == []


def test_without_data_nothing_is_measured(tmp_path):
    names = [vision.VQA, vision.DIGITS]
    made, lacking = units.units(names, [0], Context(tmp_path))
    assert made == [] and lacking == dict.fromkeys(names, "data")
    with pytest.raises(ValueError, match="need --data"):
        vision.measure_vqa(0, Context(tmp_path))
    made, lacking = units.units(names, [0, 1], Context(tmp_path, data="d"))
    assert len(made) == 4 and lacking == {}
    with pytest.raises(ValueError, match="is missing"):
        made[1].context and vision.measure_digits(
            0, Context(Path(tmp_path), data=str(tmp_path), settings=dict(made[1].settings))
        )
