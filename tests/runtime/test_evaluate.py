from typing import Any

import pytest

from t2runtime.evaluate import Score, evaluate, wilson
from t2runtime.tasks import EXACT, Problem


def test_wilson_against_the_textbook() -> None:
    # Roots of (p - share)^2 = z^2 p (1 - p) / n.
    low, high = wilson(15, 50)
    z, n, share = 1.959964, 50, 0.3
    for bound in (low, high):
        assert (bound - share) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n)
    assert low < share < high


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 10)[0] == pytest.approx(0.0)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert 0 < wilson(0, 10)[1] < 0.35


@pytest.mark.parametrize(("right", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(right: int, total: int) -> None:
    with pytest.raises(ValueError, match="wilson"):
        wilson(right, total)


def test_a_gain_needs_both_points_and_distance() -> None:
    assert Score(300, 400).gains_over(Score(200, 400))
    assert not Score(240, 400).gains_over(Score(200, 400)), "10 points are too few"
    assert not Score(7, 10).gains_over(Score(5, 10)), "20 points, but the intervals overlap"


def test_a_bar_on_a_terminal_where_it_has_a_label(
    tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [Problem(f"{i}=", "1", "one") for i in range(5)]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    evaluate(tiny, tokenizer, EXACT, problems, 1, rows=2)
    assert capsys.readouterr().err == ""
    evaluate(tiny, tokenizer, EXACT, problems, 1, rows=2, label="base, test")
    assert "base, test" in capsys.readouterr().err
