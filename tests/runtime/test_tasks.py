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


def test_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(letter: str, count: int) -> str:
        return "\n".join(f'{{"prompt": "{letter}{i}", "answer": "{i}"}}' for i in range(count))

    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_text(rows("q", 60))
    (folder / "test.jsonl").write_text(rows("t", 2))
    mine = source(f"{folder}/")
    assert mine.name == "mine" == mine(1, "test", 0)[0].category
    assert {p.prompt for p in mine(9, "test", 0)} == {"t0", "t1"}
    held = {p.prompt for p in mine(60, "validation", 0)}
    assert held and held | {p.prompt for p in mine(60 - len(held), "train", 0)} == {
        f"q{i}" for i in range(60)
    }
    (folder / "validation.jsonl").write_text(rows("v", 3))
    mine = source(str(folder))
    assert [mine.size(s) for s in tasks.SPLITS] == [60, 3, 2]  # type: ignore[attr-defined]
    # A task's name means the task, whatever lies in the working directory.
    folder.rename(tmp_path / "add")
    monkeypatch.chdir(tmp_path)
    assert source("add")(1, "test", 0)[0].prompt != "t0"
    assert source("./add").size("test") == 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="itself the data"):
        source("./add", data="x")
    with pytest.raises(ValueError, match=r"task must be one of.*a folder with train\.jsonl"):
        source("")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="must hold train and test"):
        source("none")


def test_too_few_lines_name_a_way_that_there_is(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}')
    two = source(str(path))
    with pytest.raises(ValueError, match=r"'two' has no .* as the task a folder with train\.jsonl"):
        for split in tasks.SPLITS:
            two(1, split, 0)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("2", "2"),
        ("-0.5", "-0.5"),
        ("1.50", "1.5"),
        ("0", "0"),
        ("1" + "0" * 400, None),
        ("1e3", "1000.0"),
    ],
)
def test_answers_that_are_numbers(tmp_path: Path, answer: str, text: str | None) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(f'{{"prompt": "1+1=", "answer": {answer}}}')
    found = source(str(path))(1, "test", 0)[0].answer
    assert found == (answer if text is None else text)


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"prompt": "x"}', '{"prompt": 3, "answer": "y"}',
     *(f'{{"prompt": "x", "answer": {answer}}}'
       for answer in ("true", "false", "null", "[3]", "NaN", "1e999", '""'))],
)  # fmt: skip
def test_jsonl_says_which_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n' + line)
    with pytest.raises(ValueError, match="line 2: expected"):
        source(str(path))
