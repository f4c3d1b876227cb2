import pytest

from t2runtime import rewards


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("1,234", "1234"),
        ("so it is -5", "-5"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("a total of $1,234,567.50!", "1234567.5"),
        ("3.0", "3"),
        ("-0", "0"),
        ("007", "7"),
        ("+8 points", "8"),
        ("12 apples and 30 pears", "30"),
        ("1,23", "23"),
        ("no digits", None),
        ("", None),
    ],
)
def test_number(completion: str, answer: str | None) -> None:
    assert rewards.number(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [("(C)", "C"), ("B", "B"), ("2", "B"), ("A or rather D.", "D"), ("Cat", None), ("9", None)],
)
def test_choice(completion: str, answer: str | None) -> None:
    assert rewards.choice(completion) == answer


def test_choices_keyed_by_digits_match_letters() -> None:
    assert rewards.is_correct("The answer is B.", "2", rewards.choice)


def test_reward_is_plus_or_minus_one() -> None:
    assert rewards.is_correct(" 85", "85") and not rewards.is_correct("", "85")
    assert rewards.reward_of(True) == 1.0
    assert rewards.reward_of(False) == -1.0
    assert rewards.reward_of(False, wrong=-0.1) == -0.1


def test_an_answer_without_an_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="answer must contain"):
        rewards.is_correct("3", "none", rewards.number)
