"""Tasks that read data: on made-up rows, and on the real sets where they are at hand."""

from __future__ import annotations

import csv
import json
import os
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from t2runtime.adapt.classifier import CategorySource
from t2runtime.adapt.prompt import SMALL
from t2runtime.sources import KNOWN, source, sources, task_name
from t2runtime.tasks import Problem, arc, competition_math, gsm8k
from t2runtime.tasks.files import FileSource, load

DATA = Path(os.environ.get("T2_DATA", Path(__file__).parents[3] / "shared" / "data"))


def real(name: str) -> Path:
    """The folder of a real data set."""
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not beside the checkout")
    return DATA / name


def write(path: Path, rows: list[Any]) -> Path:
    """JSON lines; text goes in as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def words(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"{i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1:,}"}
        for i in range(start, start + count)
    ]


def made(task: FileSource, split: Any) -> set[str]:
    return {problem.prompt for problem in task(10_000, split, 0)}


def test_a_folder_gives_its_own_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", words(200))
    write(tmp_path / "test.jsonl", words(50, start=190))
    task = gsm8k.load(tmp_path)
    train, validation, test = (made(task, s) for s in ("train", "validation", "test"))
    assert len(test) == 50, "the test file as it is"
    assert not train & test and not validation & test, "ten training rows are test questions"
    assert not train & validation and len(train) + len(validation) == 190
    assert 8 < len(validation) < 35
    write(tmp_path / "validation.jsonl", words(5, start=500))
    task = gsm8k.load(tmp_path)
    assert task.size("validation") == 5 and task.size("train") == 190


def test_one_file(tmp_path: Path) -> None:
    whole = gsm8k.load(write(tmp_path / "all.jsonl", words(100)))
    assert sum(whole.size(split) for split in ("train", "validation", "test")) == 100
    assert whole.size("test") > 2
    only_test = gsm8k.load(write(tmp_path / "test.jsonl", words(100)))
    assert only_test.size("test") == 100
    with pytest.raises(ValueError, match="no train problems"):
        only_test(1, "train", 0)


def test_draws(tmp_path: Path) -> None:
    task = gsm8k.load(write(tmp_path / "all.jsonl", words(100)))
    assert task(9, "train", 1) == task(9, "train", 1) != task(9, "train", 2)
    drawn = [p.prompt for p in task(20, "train", 3)]
    assert len(set(drawn)) == 20, "none twice while there are enough"
    assert len(task(500, "train", 3)) == 500
    first, more = task(3, "test", 0), task(5, "test", 9)
    assert more[:3] == first, "a larger sample holds the smaller one"
    with pytest.raises(ValueError, match="split must be one of"):
        task(1, "dev", 0)  # type: ignore[arg-type]


def broken(tmp_path: Path) -> Path:
    rows: list[Any] = [*words(40), "{", "[1]", {"question": "?"}, {"question": "?", "answer": "4"}]
    rows += [{"question": "?", "answer": "#### four"}, {"question": 3, "answer": "#### 4"}]
    return write(tmp_path / "some.jsonl", rows)


def test_broken_lines_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"some.jsonl, line 41: expected one JSON.*on_bad_lines"):
        gsm8k.load(broken(tmp_path))
    with pytest.raises(ValueError, match="'error' or 'skip'"):
        gsm8k.load(broken(tmp_path), on_bad_lines="ignore")  # type: ignore[arg-type]


def test_broken_lines_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = gsm8k.load(broken(tmp_path), on_bad_lines="skip")
    assert task.skipped == 6
    assert "6 broken lines left out" in caplog.text and "line 41" in caplog.text
    assert sum(task.size(split) for split in ("train", "validation", "test")) == 40


def test_all_broken_lines_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = broken(tmp_path)
    with pytest.raises(ValueError, match=r"line 41: .* Broken lines in all: 6\."):
        gsm8k.load(path)
    gsm8k.load(path, on_bad_lines="skip")
    assert all(f"line {number}:" in caplog.text for number in range(41, 47))
    caplog.clear()
    path = write(tmp_path / "more.jsonl", [*words(40), *["{"] * 30])
    gsm8k.load(path, on_bad_lines="skip")
    assert "30 broken lines left out" in caplog.text and "; and 10 more" in caplog.text


def test_a_byte_order_mark_is_no_broken_line(tmp_path: Path) -> None:
    rows = words(3)
    for name, text in (
        ("test.jsonl", "\n".join(map(json.dumps, rows))), ("test.json", json.dumps(rows)),
    ):  # fmt: skip
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert gsm8k.load(tmp_path / name).size("test") == 3


def test_prompts_that_come_again_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = [words(1, start=3)[0] | {"answer": "#### 99"}, words(1, start=4)[0]]
    write(tmp_path / "test.jsonl", [*words(10), *again])
    write(tmp_path / "train.jsonl", words(40, start=8))
    task = gsm8k.load(tmp_path)
    # Rows 8 and 9 of train are test questions; the checksum had put one into validation.
    assert (task.size("test"), task.repeated, task.shared, task.skipped) == (10, 3, 1, 0)
    assert {p.answer for p in task(99, "test", 0)} == {str(i + 1) for i in range(10)}, "the first"
    assert "3 held-out rows left out" in caplog.text and "1 training rows" in caplog.text


def test_another_way_to_read_completions(tmp_path: Path) -> None:
    gsm = source("gsm8k", data=write(tmp_path / "test.jsonl", words(12)), extract="boxed")
    problem = Problem("q", "10", "gsm8k")
    assert gsm.grade([problem] * 3, [r"\boxed{10}", r"\boxed{11}", "#### 10"]) == [
        True,
        False,
        False,
    ]
    rows = [{"problem": "?", "solution": r"\boxed{\frac{3}{4}}"}]
    path = write(tmp_path / "math.jsonl", rows)
    math = source("math", data=path, extract="number")
    assert math.grade([competition_math.read(rows[0])] * 2, ["so 3/4.", "so 0.5"]) == [True, False]
    write(path, [*rows, {"problem": "!", "solution": r"\boxed{x^2+1}"}])
    said = r"line 2: expected an answer that can be read with extract=number, got '.*x\^2"
    with pytest.raises(ValueError, match=said):
        source("math", data=path, extract="number")
    with pytest.raises(ValueError, match="line 1: .* extract=number, got 'B'"):
        source("arc-easy", data=write(tmp_path / "x.jsonl", [COLUMNS]), extract="number")
    mine = write(tmp_path / "mine.jsonl", [{"prompt": "q", "answer": r"\frac12"}])
    assert source(str(mine), extract="boxed").grade(
        [Problem("q", r"\frac12", "mine")], [r"It is \boxed{0.5}"]
    ) == [True]
    assert source("add", extract="boxed").grade([Problem("q", "85", "add")], [r"\boxed{85}"])[0]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(words(1)[0]).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2"):
        gsm8k.load(path)
    (tmp_path / "x.csv").write_bytes(b"text,category\na,b\n\xff,b\n")
    with pytest.raises(ValueError, match="line 3"):
        source("banking77", data=tmp_path / "x.csv")
    (tmp_path / "x.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="not a gzip file"):
        gsm8k.load(tmp_path / "x.jsonl.gz")
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="expected an array"):
        gsm8k.load(tmp_path / "x.json")


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        gsm8k.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must hold train and test"):
        gsm8k.load(tmp_path)
    with pytest.raises(ValueError, match="at least one problem"):
        gsm8k.load(write(tmp_path / "x.jsonl", []))


def test_the_hub_through_datasets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        source("gsm8k", data="hf://openai/gsm8k:main")
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str) -> dict[str, list[dict[str, str]]]:
        asked.append(names)
        return {"train": words(30), "test": words(5, start=30)}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = source("gsm8k", data="hf://openai/gsm8k:main")
    assert asked == [("openai/gsm8k", "main")]
    assert len(task(99, "test", 0)) == 5


def test_which_task() -> None:
    assert source("add").name == "add"
    with pytest.raises(ValueError, match="Did you mean 'gsm8k'"):
        source("gsm8")
    with pytest.raises(ValueError, match="'gsm8k' needs its data"):
        source("gsm8k")
    with pytest.raises(ValueError, match="reads no data"):
        source("add", data="x")
    with pytest.raises(ValueError, match="extract must be one of"):
        source("add", extract="letters")
    with pytest.raises(ValueError, match="leave out extract"):
        source("mbpp", data="x", extract="number")


def test_another_extractor(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "answer": f"{i:,}.0"} for i in range(2000, 2060)]
    path = write(tmp_path / "mine.jsonl", rows)
    problem = Problem("q", "2,000.0", "mine")
    assert source(str(path), extract="number").grade([problem], ["about 2000"]) == [True]
    assert source(str(path)).grade([problem], ["about 2000"]) == [False]
    with pytest.raises(ValueError, match="line 1: expected an answer that can be read"):
        source(
            str(write(tmp_path / "x.jsonl", [{"prompt": "q", "answer": "none"}])), extract="number"
        )


def test_gsm8k_grades(tmp_path: Path) -> None:
    problem = gsm8k.read(
        {"question": " How many? ", "answer": "12*100=<<12*100=1200>>\n#### 1,200"}
    )
    assert problem.answer == "1200" and "Question: How many?\n" in problem.prompt
    task = gsm8k.load(write(tmp_path / "test.jsonl", words(3)))
    replies = ["#### 1200", "1,200.00 apples", "#### 1200\n\nQuestion: 3?\n#### 3", "#### 12", ""]
    assert task.grade([problem] * 5, replies) == [True, True, True, False, False]


ORIGINAL = {
    "id": "1",
    "question": {
        "stem": "Which flies?",
        "choices": [{"text": "stone", "label": "1"}, {"text": "bird", "label": "2"}],
    },
    "answerKey": "2",
}
COLUMNS = {
    "question": "Which flies?",
    "choices": {"text": ["stone", "bird"], "label": ["A", "B"]},
    "answerKey": "B",
}
INSTRUCTION = {
    "instruction": "Please choose the correct answer to the question: Which flies?\n\n"
    "Answer1: stone Answer2: bird\n\nAnswer format: answer1/answer2",
    "answer": "answer2",
}


@pytest.mark.parametrize("row", [ORIGINAL, COLUMNS, INSTRUCTION], ids=["json", "hub", "text"])
def test_arc_layouts_become_one(row: dict[str, Any], tmp_path: Path) -> None:
    problem = arc.reader("arc-easy")(row)
    assert problem == Problem(arc.render("Which flies?", ["stone", "bird"]), "B", "arc-easy")
    task = source("arc-easy", data=write(tmp_path / "test.jsonl", [row]))
    replies = [" B", "2", "The answer is (b).", "answer2", "B. bird", "A", "stone"]
    assert task.grade([problem] * 7, replies) == [True] * 5 + [False] * 2


@pytest.mark.parametrize(
    "row",
    [
        COLUMNS | {"answerKey": "E"},
        COLUMNS | {"choices": {"text": ["one"], "label": ["B"]}},
        INSTRUCTION | {"answer": "answer3"},
        {"question": "Which?"},
    ],
)
def test_arc_refuses(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: "):
        source("arc-easy", data=write(tmp_path / "test.jsonl", [row]))


def test_math(tmp_path: Path) -> None:
    rows = [
        {"problem": "1/2+1/4?", "solution": r"So $\boxed{\dfrac{3}{4}}$.", "level": "Level 1",
         "type": "Prealgebra"},
        {"problem": "Area?", "solution": r"first \boxed{1}, so \boxed{12\text{ cm}^2}",
         "level": "Level 2", "type": "Geometry"},
        {"problem": "Pair?", "answer": r"\left(1, \frac12\right)", "subject": "Algebra"},
    ]  # fmt: skip
    task = source("math", data=write(tmp_path / "test.jsonl", rows))
    problems = [competition_math.read(row) for row in rows]
    assert [p.answer for p in problems] == [r"\boxed{0.75}", r"\boxed{12}", r"\boxed{(1,0.5)}"]
    right = [r"\boxed{0.75}", r"$\boxed{12}$ square", r"\boxed{(1,\tfrac{1}{2})}"]
    assert task.grade(problems, right) == [True] * 3
    assert task.grade(problems, ["0.75", r"\boxed{13}", r"\boxed{(0.5,1)}"]) == [False] * 3
    with pytest.raises(ValueError, match="line 1: expected .boxed"):
        source("math", data=write(tmp_path / "x.jsonl", [{"problem": "?", "solution": "4"}]))


def test_banking(tmp_path: Path) -> None:
    for name, count in (("train", 40), ("test", 6)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            writer.writerows(
                [f'{name} "{i}",\nsecond line', ("card_lost", "top_up?")[i % 2]]
                for i in range(count)
            )
    task = source("banking77", data=tmp_path)
    (problem, *_) = task(6, "test", 0)
    assert "card_lost, top_up?" in problem.prompt and "second line" in problem.prompt
    problem = Problem("q", "card_lost", "banking77")
    assert task.grade([problem] * 3, [" Card lost.\nBecause", "card_lost", "top_up"]) == [
        True, True, False,
    ]  # fmt: skip
    (tmp_path / "train.csv").write_text("text,category\na,b\na,b,c\n")
    with pytest.raises(ValueError, match=r"train.csv, line 3: expected 2 fields, got 3"):
        source("banking77", data=tmp_path)


def test_category_of_several_tasks(tmp_path: Path) -> None:
    for name, rows in (("gsm8k", words(60)), ("arc_easy", [
        COLUMNS | {"question": f"Which of {i} flies?"} for i in range(60)
    ])):  # fmt: skip
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", rows)
    task = source("category:gsm8k+arc-easy", data=tmp_path)
    assert isinstance(task, CategorySource)
    drawn = task(20, "train", 0)
    assert {p.answer for p in drawn} == {"gsm8k", "arc-easy"}
    assert task.grade(drawn, [p.answer for p in drawn]) == [True] * 20
    assert task.grade(drawn[:1], ["something else"]) == [False]
    for name, said in (("gsm8k", "two or more"), ("gsm8k+gsm", "got 'gsm'"),
                       ("gsm8k+mbpp", "must hold a folder 'mbpp'")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            source(f"category:{name}", data=tmp_path)


def own(path: Path, word: str) -> str:
    path.mkdir()
    rows = [{"prompt": f"{word} {i}", "answer": f"{i}"} for i in range(60)]
    write(path / "all.jsonl", rows)
    return str(path)


def test_categories_of_any_tasks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Folders, files, known data and generated skills, each called as one says."""
    (tmp_path / "gsm8k").mkdir()
    write(tmp_path / "gsm8k" / "train.jsonl", words(60))
    mine, rest = own(tmp_path / "mine", "count"), own(tmp_path / "rest", "say")
    name = f"category:gsm8k+{mine}+big={mine}/all.jsonl+add+other={rest}"
    task = source(name, data=tmp_path)
    assert isinstance(task, CategorySource) and not caplog.records
    assert task.categories.names == ("gsm8k", "mine", "big", "add")
    drawn = task.questions(50, "train", 0)
    assert {p.answer for p in drawn} == {"gsm8k", "mine", "big", "add", "other"}
    assert {p.answer for p in drawn if p.prompt.startswith("say ")} == {"other"}
    skills = source("category:add+max+other", small=True)
    assert isinstance(skills, CategorySource)
    assert skills.categories == replace(SMALL, names=("add", "max"))
    said = {"add": "adds\n numbers", "mine": "", "spare": "x"}
    shown = source(f"category:add+{mine}", descriptions=said)
    assert "- add: adds numbers\n- mine\n- other" in shown(1, "train", 0)[0].prompt
    assert [record.getMessage()[:40] for record in caplog.records] == [
        "no category leads to the experts spare", "no questions of category 'other': an exp",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "more", "said"),
    [
        ("add+Add=max", {}, "every category once, got 'add' and 'Add'"),
        ("add+add", {}, "every category once, got 'add' and 'add'"),
        ("add", {}, "two or more tasks"),
        ("add+Other=max", {}, "'other' always means the base"),
        ("add+max", {"data": "x"}, "none of add, max reads data="),
        ("add+gsm8k", {}, "task 'gsm8k' needs its data"),
        ("add+story:animal", {}, "whose questions differ, got 'story:animal'"),
        ("add+category", {}, "whose questions differ, got 'category'"),
        ("add+=max", {}, "TASK or NAME=TASK, got '=max'"),
        ("add+", {}, "TASK or NAME=TASK, got ''"),
        ("add+nowhere/", {}, "task must be one of .* got 'nowhere/'"),
        ("add+max", {"descriptions": {"add": "x"}}, "got max; the experts are add"),
        ("add+max", {"extract": "number"}, "leave out extract"),
    ],
)
def test_categories_that_cannot_be(parts: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        source(f"category:{parts}", **more)


def test_descriptions_are_for_categories() -> None:
    with pytest.raises(ValueError, match="descriptions of experts .* are for 'category:a.b'"):
        source("add", descriptions={})


def test_a_reader_that_fails_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"a": 1}])
    with pytest.raises(ValueError, match="line 1: no field 'prompt'"):
        load("mine", path, lambda row: Problem(row["prompt"], "", ""), max_new_tokens=1)


# The real sets.


def test_all_of_gsm8k() -> None:
    folder = real("gsm8k")
    task = gsm8k.load(folder)
    assert task.size("test") == 1319 and task.size("train") + task.size("validation") == 7473
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    problems = [gsm8k.read(row) for row in rows]
    assert all(task.grade(problems, [row["answer"] for row in rows]))
    for row, problem in zip(rows, problems, strict=True):
        assert float(problem.answer) == float(row["answer"].split("#### ")[1].replace(",", ""))


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("arc-easy", 2251, 2376), ("arc-challenge", 1119, 1172), ("openbookqa", 4957, 500)],
)
def test_all_of_arc(name: str, train: int, test: int) -> None:
    task = source(name, data=real(name.replace("-", "_")))
    assert isinstance(task, FileSource) and task.skipped == 0
    assert task.size("test") == test
    assert train - 5 <= task.size("train") + task.size("validation") <= train, "no test question"
    problems = task(test, "test", 0)
    assert {p.answer for p in problems} >= set("ABCD")
    lines = (
        next(line for line in p.prompt.splitlines() if line.startswith(f"{p.answer}. "))
        for p in problems
    )
    assert all(task.grade(problems, list(lines))), "the right line of the prompt is right"


def test_all_of_banking() -> None:
    task = source("banking77", data=real("banking77"))
    problems = task(5000, "test", 0)
    assert len(problems) > 3000 and len({p.answer for p in problems}) == 77
    assert all(f", {p.answer}" in p.prompt or f"\n{p.answer}," in p.prompt for p in problems)


def test_every_known_task_was_tested() -> None:
    assert set(KNOWN) == {
        "gsm8k", "mbpp", "arc-easy", "arc-challenge", "openbookqa", "math", "humaneval",
        "banking77",
    }  # fmt: skip
    assert zlib.crc32(b"37+48") % 10 > 1, "the rule of the splits"


@pytest.mark.parametrize("form", ["{}/mine", "{}/mine/", "{}/x/../mine", "{}/mine.jsonl"])
def test_a_task_has_one_name(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `source` calls it, `task_name` says without its data, in whatever way it is given."""
    (tmp_path / "x").mkdir()
    own(tmp_path / "mine", "count")
    write(tmp_path / "mine.jsonl", [{"prompt": f"q{i}", "answer": "1"} for i in range(60)])
    monkeypatch.chdir(tmp_path)
    for text in (form.format("."), form.format(tmp_path), form.format(".").removeprefix("./")):
        assert source(text).name == task_name(text) == "mine"
        assert source(f"sums={text}").name == task_name(f"sums={text}") == "sums"
    (tmp_path / "a=b").mkdir()
    (tmp_path / "mine" / "all.jsonl").rename(tmp_path / "a=b" / "all.jsonl")
    for text in ("a=b", "./a=b", str(tmp_path / "a=b")):
        assert source(text).name == task_name(text) == "a=b", "a folder, and no name"


def test_any_task_under_another_name(tmp_path: Path) -> None:
    """The same problems, and the name that data and results are given by."""
    write(tmp_path / "train.jsonl", words(200))
    write(tmp_path / "test.jsonl", words(50, start=190))
    made = sources(["sums=add", "school=gsm8k", "zoo=story:animal", "pass1=category:add+max"],
                   data=[f"school={tmp_path}"])  # fmt: skip
    assert list(made) == ["sums", "school", "zoo", "pass1"] == [one.name for one in made.values()]
    for split in ("train", "validation", "test"):
        plain, sums = (task(9, split, 3) for task in (source("add"), made["sums"]))
        assert sums == plain, "draws, phrasings and all"
    answers = [problem.answer for problem in made["sums"](5, "test", 0)]
    assert made["sums"].grade(made["sums"](5, "test", 0), answers) == [True] * 5
    assert len(made["school"](99, "test", 0)) == 50
    assert isinstance(made["pass1"], CategorySource)
    assert list(sources(["a=add", "b=add"])) == ["a", "b"]
    for text in ("=add", "sums="):
        with pytest.raises(ValueError, match="TASK or NAME=TASK, got"):
            source(text)
    with pytest.raises(ValueError, match="'add' is given twice; say NAME=TASK"):
        sources(["add", "add"])
