"""Properties of stories as tasks."""

import pytest

from t2runtime.tasks.stories import PROPERTIES, Stories


@pytest.mark.parametrize(
    ("name", "text", "holds"),
    [
        ("dialogue", 'Mom said, "Come here."', True),
        ("dialogue", 'Mom said, "Come', False),
        ("animal", "Two DOGS ran.", True),
        ("animal", "He was dogged. A catalogue.", False),
        ("short-sentences", "He ran. She ran! Who ran? They ran.", True),
        ("short-sentences", "He ran. She ran! Who ran?", False),
        ("short-sentences", "", False),
    ],
)
def test_properties(name, text, holds):
    source = Stories(name)
    assert source.grade(source(1, "train", 0), [text]) == [holds]


def test_openings_are_split_once_for_all():
    source = Stories("animal")
    held = {p.prompt for p in source(500, "test", 0)} | {
        p.prompt for p in source(500, "validation", 3)
    }
    trained = {p.prompt for p in source(2000, "train", 1)}
    assert held
    assert not held & trained
    assert source(5, "train", 4) == source(5, "train", 4)


def test_an_unknown_property_is_named():
    with pytest.raises(ValueError, match="one of dialogue, animal, short-sentences, got 'plot'"):
        Stories("plot")
    assert set(PROPERTIES) == {"dialogue", "animal", "short-sentences"}
