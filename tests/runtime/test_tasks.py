import json
import random
from pathlib import Path

import pytest

from t2runtime import tasks
from t2runtime.adapt.prompt import SMALL
from t2runtime.sources import source

ALL = [*tasks.SKILLS.values(), tasks.OTHER]


def data_of(problem: tasks.Problem) -> str:
    return problem.prompt.rstrip("=").split(" ", 1)[-1]


@pytest.mark.parametrize("task", ALL, ids=lambda t: t.name)
def test_splits_share_no_data_whatever_the_phrasing(task: tasks.Task) -> None:
    seen = {}
    for split in tasks.SPLITS:
        rng = random.Random(0)
        seen[split] = {task.data(rng, split) for _ in range(300)}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize("task", ALL, ids=lambda t: t.name)
def test_same_seed_same_problems(task: tasks.Task) -> None:
    assert task.problems(20, "test", 3) == task.problems(20, "test", 3)
    assert task.problems(20, "test", 3) != task.problems(20, "test", 4)


@pytest.mark.parametrize("name", [*tasks.CATEGORIES, "category"])
def test_held_out_problems_are_distinct(name: str) -> None:
    prompts = [p.prompt for p in tasks.problems(name, 400, "test", 0)]
    assert len(prompts) == len(set(prompts)) == 400


def test_as_many_as_there_are() -> None:
    prompts = [p.prompt for p in tasks.problems("order", 10_000, "test", 0)]
    assert 400 < len(prompts) == len(set(prompts)) < 1000
    assert len(tasks.problems("order", 2000, "train", 0)) == 2000


@pytest.mark.parametrize("task", list(tasks.SKILLS.values()), ids=lambda t: t.name)
def test_shortcuts_are_wrong_most_of_the_time(task: tasks.Task) -> None:
    rng = random.Random(0)
    data = [task.data(rng, "train") for _ in range(300)]
    for shortcut in task.shortcuts:
        assert sum(shortcut(d) == task.right(d) for d in data) < 150


def test_right_answers_by_another_route() -> None:
    rng = random.Random(1)
    for _ in range(50):
        data = tasks.SKILLS["add"].draw(rng)
        assert tasks.SKILLS["add"].right(data) == str(eval(data))
        data = tasks.SKILLS["order"].draw(rng)
        assert tasks.SKILLS["order"].right(data) == sorted(data.split())[0]
        data = tasks.SKILLS["count"].draw(rng)
        assert tasks.SKILLS["count"].right(data) == str(len(data[2:].split(data[0])) - 1)


def test_category_problems_name_every_category() -> None:
    asked = tasks.problems("category", 200, "test")
    assert {p.answer for p in asked} == set(tasks.CATEGORIES)
    assert all(p.prompt.startswith(tasks.category.PREFIX) for p in asked)
    assert SMALL.prompt("1+1=") == tasks.category.prompt("1+1=")


def test_unknown_task_suggests() -> None:
    with pytest.raises(ValueError, match="Did you mean 'reverse'"):
        tasks.problems("revers", 1, "test")


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        tasks.SKILLS["add"].problems(1, "dev", 0)  # type: ignore[arg-type]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"question {i}", "answer": str(i)} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows + rows)) + "\n\n")
    mine = source(str(path))
    drawn = {split: {p.prompt for p in mine(60, split, 0)} for split in tasks.SPLITS}
    assert not drawn["train"] & drawn["test"]
    assert len(mine(60, "test", 0)) == len(drawn["test"]), "each once"
    assert len(mine(7, "train", 0)) == 7
    assert mine(7, "train", 0) == mine(7, "train", 0)


@pytest.mark.parametrize("line", ["{", "[1]", '{"prompt": "x"}', '{"prompt": "x", "answer": 3}'])
def test_jsonl_says_which_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n' + line)
    with pytest.raises(ValueError, match="line 2: expected"):
        source(str(path))
