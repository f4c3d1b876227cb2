"""Reading easy-VQA, its kinds of questions, and the same questions in words."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from t2runtime.vision.easy_vqa import (
    COLOURS,
    KINDS,
    SHAPES,
    Described,
    EasyVQA,
    kind_of,
    procedures,
)

DATA = Path(os.environ.get("T2_DATA", Path(__file__).parents[4] / "shared" / "data"))
REAL = DATA / "easy_vqa"


def test_a_folder_becomes_problems_of_every_kind_and_split(data: EasyVQA) -> None:
    assert data.images.shape == (38, 3, 32, 32)
    assert -1 <= data.images.min() < data.images.max() <= 1
    assert {s: len(k["colour"]) for s, k in data.problems.items()} == {
        "train": 27, "validation": 3, "test": 8,
    }  # fmt: skip
    assert len(data.captions) == 27 and set(data.captions) == {
        p for p in range(30) if p not in (0, 10, 20)
    }  # no caption of a validation or test image
    test = data.source("colour")(100, "test", 0)
    assert len({p.prompt for p in test}) == len(test) == 8
    assert all(int(p.prompt.split()[1].strip(">")) >= 30 for p in test)
    place = int(test[0].prompt.split()[1].strip(">"))
    red, green, blue = data.images[place, :, 15, 10].tolist()  # inside the rectangle
    seen = {"red": red > green, "blue": blue > green, "teal": red < green, "gray": red == green}
    assert seen[test[0].answer]


def test_source_grades_the_one_right_word(data: EasyVQA) -> None:
    source = data.source("negation")
    asked = source(2, "train", 0)
    assert asked == source(2, "train", 0)
    assert source.grade(asked, ["yes", "no"]) == [True, False]
    with pytest.raises(ValueError, match="kind must be one of"):
        data.source("size")


@pytest.mark.parametrize("kind", KINDS)
def test_questions_in_words_are_of_their_kind_and_answered_rightly(kind: str) -> None:
    asked = Described(kind)(300, "train", 0)
    answers = Counter(problem.answer for problem in asked)
    for problem in asked:
        told, _, question = problem.prompt.partition(". ")
        _, colour, shape = told.split()
        assert kind_of(question) == kind == problem.category
        words = question.rstrip("?").split()
        if kind == "colour":
            assert problem.answer == colour
        elif kind == "shape":
            assert problem.answer == shape
        else:
            thing = next(word for word in words if word in (*COLOURS, *SHAPES))
            assert (problem.answer == "yes") == ((thing in (colour, shape)) == (kind == "presence"))
    if kind in ("negation", "presence"):
        assert 0.4 < answers["yes"] / 300 < 0.6
    train = {p.prompt for p in Described(kind)(300, "train", 1)}
    assert not train & {p.prompt for p in Described(kind)(100, "test", 0)}


@pytest.mark.parametrize("kind", ["colour", "shape", "negation"])
def test_shortcuts_are_answers_of_the_kind_and_not_always_right(kind: str) -> None:
    possible = {"colour": COLOURS, "shape": SHAPES, "negation": ("yes", "no")}[kind]
    said = [procedures(kind, answer) for answer in possible]
    assert [row[0] for row in said] == list(possible)
    for shortcut in (1, 2):
        assert {row[shortcut] for row in said} <= set(possible)
        assert any(row[shortcut] != row[0] for row in said)
    assert procedures("presence", "yes") == ("yes",)


def test_damaged_folders_are_named(tmp_path: Path, drawings: Path) -> None:
    with pytest.raises(ValueError, match="questions.json is missing"):
        EasyVQA.read(tmp_path)
    (tmp_path / "train").mkdir()
    table = tmp_path / "train" / "questions.json"
    table.write_text("[]")
    with pytest.raises(ValueError, match="holds no questions"):
        EasyVQA.read(tmp_path)
    table.write_text(json.dumps([["is there a circle?", 3, 0]]))
    with pytest.raises(ValueError, match="rows must be"):
        EasyVQA.read(tmp_path)
    table.write_text(json.dumps([["is there a circle?", "yes", 0]]))
    with pytest.raises(ValueError, match=r"0\.png is missing"):
        EasyVQA.read(tmp_path)


def test_every_question_of_the_real_data_is_read_as_its_kind() -> None:
    """Its colours and shapes are answered by colours and shapes, its yes and no by yes and no."""
    if not REAL.exists():
        pytest.skip("easy-VQA is not beside this checkout (../shared/data/easy_vqa)")
    answers = {"colour": COLOURS, "shape": SHAPES}
    counts: Counter[str] = Counter()
    for part in ("train", "test"):
        rows = json.loads((REAL / part / "questions.json").read_text())
        for question, answer, _ in rows:
            kind = kind_of(question)
            counts[kind] += 1
            assert answer in answers.get(kind, ("yes", "no"))
    assert sum(counts.values()) == 48248 and set(counts) == set(KINDS)
