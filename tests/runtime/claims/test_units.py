"""Units are found, run in processes of their own and resumed; experts are trained once."""

import threading
import time

import pytest

from t2runtime.claims import experts, units
from t2runtime.claims.__main__ import main
from t2runtime.claims.units import KINDS, Context, Kind, Unit
from t2runtime.evidence.ledger import Ledger, finish
from t2runtime.tasks import SKILLS
from t2runtime.train import small_model

pytest.importorskip("transformers")


def test_units_a_kind_at_a_time_with_their_settings(tmp_path, monkeypatch):
    kinds = {
        "a": Kind("m", settings={"problems": 5}),
        "b": Kind("m", settings={"shots": 2}, needs=("stories", "data")),
    }
    monkeypatch.setattr(units, "KINDS", kinds)
    given = {"problems": 7, "train.steps": 1}
    made, lacking = units.units(["a", "b"], range(2), Context(tmp_path, data="d", settings=given))
    assert [(unit.name, unit.seed) for unit in made] == [("a", 0), ("a", 1)]
    assert made[0].settings == (("problems", 7), ("train.steps", 1))
    assert lacking == {"b": "stories"}
    made, lacking = units.units(["a", "b"], [0], Context(tmp_path, stories="s", data="d"))
    assert [unit.name for unit in made] == ["a", "b"]
    assert not lacking
    with pytest.raises(ValueError, match="units must be of a, b, got c"):
        units.units(["c"], [0], Context(tmp_path))
    with pytest.raises(ValueError, match="settings must be of problems, shots or begin"):
        units.units(["a", "b"], [0], Context(tmp_path, settings={"shot": 1}))


def test_the_key_is_all_but_the_folder(tmp_path):
    def key(folder="x", seed=0, **context):
        own = (("problems", 1),)
        return Unit("dispatch", seed, own, Context(tmp_path / folder, **context)).key

    assert key() == key("y")
    assert len({key(), key(seed=1), key(model="other"), key(stories="s")}) == 4


def test_every_kind_names_a_function():
    for name, kind in KINDS.items():
        assert callable(kind.measure), name


def test_an_expert_is_trained_once_and_by_one(tmp_path, monkeypatch):
    made = []

    def train(model, tokenizer, source, cfg):
        made.append((source.name, cfg.seed, cfg.steps))
        time.sleep(0.3)
        return real(model, tokenizer, source, cfg)

    real = experts.train
    monkeypatch.setattr(experts, "train", train)
    settings = {"train.steps": 1, "train.prompts": 2, "train.validation_problems": 4, "problems": 3}
    context = Context(tmp_path, settings=settings)
    found = []
    both = [threading.Thread(target=lambda: found.append(context.trained("add", 3)))
            for _ in range(2)]  # fmt: skip
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert made == [("add", 3, 1)]
    assert found[0] == found[1] == context.trained("add", 3)
    assert found[0].parent.parent == tmp_path / "experts"
    other = context.trained("add", 3, temperature=0.7)
    assert other != found[0]
    assert len(made) == 2


def test_recipes():
    assert experts.recipe("add", 7).seed == 7
    assert experts.recipe("classifier", 0).steps == 30
    assert experts.recipe("story:animal", 0).max_new_tokens == 48
    assert experts.recipe("add", 0, {"steps": 2}).steps == 2
    assert experts.recipe("add", 0).lr == small_model().lr
    source = experts.source_of("classifier")
    assert {p.answer for p in source(60, "train", 0)} == {*SKILLS, "other"}


def test_a_unit_that_fails_is_named(tmp_path):
    unit = Unit("dispatch", 0, (("problems", 1),), Context(tmp_path, model="nowhere"))
    with pytest.raises(RuntimeError, match="MODEL must be 'small', a folder"):
        finish([unit], Ledger(tmp_path / "runs.jsonl"), 1, "claims")


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--seeds", "1"], "at least 2"), (["--set", "problems"], "NAME=NUMBER"),
     (["--set", "nothing=1"], "settings must be of")],
)  # fmt: skip
def test_wrong_arguments(tmp_path, argv, said):
    with pytest.raises(SystemExit, match=said):
        main(["--out", str(tmp_path), *argv])
