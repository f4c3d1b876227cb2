"""A claim and its verdict, from rows and from evidence."""

import pytest

from t2runtime.claims.claim import Claim, judge, verdict

SAID = ("more is better", "table 1", "points", "smaller;")


def claim(**more):
    return Claim(*SAID, kind="a", value=lambda row: row["x"], **more)


def rows(*values):
    return {"a": [{"unit": "a", "seed": seed, "x": x} for seed, x in enumerate(values)]}


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ((2.0, 3.0, 2.5), "confirmed"),
        ((-2.0, -3.0, -2.5), "not confirmed"),
        ((0.0, 0.0, 0.0), "not confirmed"),  # no difference is not a better one
        ((-2.0, 3.0, 1.0), "undecided"),
        ((2.0,), "not measured"),
        ((2.0, None), "not measured"),
    ],
)
def test_a_difference_above_nought(values, outcome):
    found = judge(claim(low=0), rows(*values))
    assert found["verdict"] == outcome
    assert found["expected"] == "above 0"
    assert found["command"] == 'make claims UNITS="a"'


def test_a_range_and_a_bound_from_above():
    flat = claim(low=-2, high=2)
    assert judge(flat, rows(0.1, -0.1, 0.2))["verdict"] == "confirmed"
    assert judge(flat, rows(5.0, 5.1, 5.2))["verdict"] == "not confirmed"
    assert judge(flat, rows(1.0, 2.0, 3.0))["verdict"] == "undecided"
    cheap = claim(high=0.5)
    assert (cheap.expected, flat.expected) == ("below 0.5", "-2 to 2")
    assert verdict(0.1, 0.2, cheap) == "confirmed"
    assert verdict(0.5, 0.6, cheap) == "not confirmed"


def test_rows_without_the_number_are_left_out():
    found = judge(claim(low=0), rows(1.0, None, 3.0))
    assert found["seeds"] == 2
    assert found["mean"] == 2.0


def test_evidence_answers_or_is_missing():
    asked = Claim(*SAID, low=0, evidence="SVF against LoRA")
    answer = {"difference": 0.2, "interval": [-0.4, 0.8], "seeds": 5}
    found = judge(asked, {}, {"SVF against LoRA": answer})
    assert (found["verdict"], found["mean"], found["seeds"]) == ("undecided", 0.2, 5)
    assert found["command"] == "make evidence"
    missing = judge(asked, {}, {"another": answer})
    assert missing["verdict"] == "not measured"
    assert "mean" not in missing


def test_the_command_names_what_its_unit_needs() -> None:
    """As `make claims` takes it."""
    told = Claim("", "", "", "", kind="compose-stories", value=lambda row: 1.0, low=0.0)
    assert told.command == 'make claims UNITS="compose-stories" STORIES=folder'
    seen = Claim("", "", "", "", kind="vision-vqa", value=lambda row: 1.0, low=0.0)
    assert seen.command == 'make claims UNITS="vision-vqa" DATA=folder'


def test_a_claim_must_say_what_answers_it():
    with pytest.raises(ValueError, match="kind and value, or evidence"):
        Claim(*SAID, low=0)
    with pytest.raises(ValueError, match="kind and value, or evidence"):
        Claim(*SAID, low=0, value=lambda row: row["x"], evidence="both")
    with pytest.raises(ValueError, match="low < high"):
        Claim(*SAID, evidence="q")
    with pytest.raises(ValueError, match="low < high"):
        Claim(*SAID, evidence="q", low=1, high=0)
