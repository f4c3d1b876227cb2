"""Tasks whose answers are programs: on made-up rows, and on the real sets where they are there."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from t2runtime import sandbox
from t2runtime.sandbox import Limits
from t2runtime.sources import source
from t2runtime.tasks import humaneval, mbpp
from t2runtime.tasks.files import FileSource
from t2runtime.tasks.programs import ByTests

DATA = Path(os.environ.get("T2_DATA", Path(__file__).parents[3] / "shared" / "data"))
PATIENT = Limits(seconds=60)


def real(name: str) -> Path:
    """The folder of a real data set."""
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not beside the checkout")
    return DATA / name


@pytest.fixture
def _runs_programs() -> None:
    if sys.platform != "linux" or sandbox.isolation().level == "none":
        pytest.skip("programs cannot be isolated here")


def write(path: Path, rows: list[Any]) -> Path:
    """JSON lines; text goes in as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def made(task: FileSource, split: Any) -> set[str]:
    return {problem.prompt for problem in task(10_000, split, 0)}


def add_row(task_id: int) -> dict[str, Any]:
    return {
        "task_id": task_id, "text": f"Add {task_id}.", "code": "def add(a, b):\r\n  return a + b",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": "",
    }  # fmt: skip


def test_mbpp_split_is_the_data_sets_own(tmp_path: Path) -> None:
    rows = [add_row(i) for i in (1, 10, 11, 510, 511, 600, 601, 974)]
    task = mbpp.load(write(tmp_path / "mbpp.jsonl", rows))
    for split, ids in (("test", (11, 510)), ("validation", (511, 600)), ("train", (601, 974))):
        assert {p.split("\n")[0] for p in made(task, split)} == {f"Add {i}." for i in ids}
    with pytest.raises(ValueError, match="no test"):
        mbpp.load(write(tmp_path / "train.jsonl", [add_row(601)]))(1, "test", 0)


PRO = {
    "raw_problem": "Add two numbers.", "raw_solution": "def add(a, b):\n    return a + b",
    "new_problem": "Add three numbers.",
    "new_solution": "def add3(a, b, c):\n    return add(add(a, b), c)",
    "test_code": "assert add3(1, 2, 3) == 6\nassert add3(0, 0, 0) == 0",
}  # fmt: skip
#: As published: the solutions are bodies, which the problems begin.
PRO_BODIES = {
    "id": 0,
    "raw_problem": "from typing import List\n\n\ndef close(xs: List[float], t: float) -> bool:\n"
    '    """Whether two are closer than t."""\n',
    "raw_solution": "    return any(abs(a - b) < t for i, a in enumerate(xs) for b in xs[:i])\n",
    "new_problem": "# Places of the lists with two numbers closer than t.\nimport math\n"
    "def close_lists(lists: List[List[float]], t: float) -> List[int]:\n",
    "new_solution": "    return [i for i, xs in enumerate(lists) if close(xs, t)]\n\n",
    "test_code": "\nassert close_lists([[1.0, 2.0], [1.0, 1.1]], 0.5) == [1]\n"
    "assert math.isclose(sum(close_lists([[1, 1]], 1)), 0)",
}  # fmt: skip
PLUS = {
    "task_id": 2, "prompt": "Add.", "code": "def add(a, b):\n    return a + b", "test_imports": [],
    "test_list": ["assert add(1, 2) == 3"],
    "test": "import math\nfor a, b in [(1, 2), (3, 4)]:\n    assert math.isclose(add(a, b), a + b)",
}  # fmt: skip


@pytest.mark.usefixtures("_runs_programs")
def test_mbpp_layouts() -> None:
    grader = ByTests(limits=PATIENT, workers=2)
    classic, pro, plus = mbpp.read(add_row(601)), mbpp.read(PRO), mbpp.read(PLUS | {"task_id": "x"})
    assert (classic.answer, pro.answer, plus.answer) == ("add", "add3", "add")
    assert "assert add(1, 2) == 3" in classic.prompt and "raw" not in pro.prompt
    good = "Here:\n```python\ndef add(a, b):\n    return b + a\n```"
    both = f"```python\n{PRO['raw_solution']}\n{PRO['new_solution']}\n```"
    listed_only = "```python\ndef add(a, b):\n    return 3\n```"
    problems = [classic, pro, plus, plus, classic, classic]
    replies = [good, both, good, listed_only, "I do not know.", ""]
    assert grader.grade(problems, replies) == [True, True, True, False, False, False]


@pytest.mark.usefixtures("_runs_programs")
def test_mbpp_pro_as_published(tmp_path: Path) -> None:
    (tmp_path / "mbpp_pro.json").write_text(json.dumps([PRO_BODIES] * 2))
    task = source("mbpp", data=tmp_path)
    assert isinstance(task, FileSource) and task.skipped == 0
    problem = mbpp.read(PRO_BODIES)
    assert problem.answer == "close_lists"
    whole = mbpp.reference(PRO_BODIES)
    first, second = whole[: whole.index("# Places")], whole[whole.index("# Places") :]
    own = "def close_lists(lists, t):\n    return [1] if len(lists) > 1 else [0]\n"
    bare = second.replace("import math\n", "")
    replies = [
        f"```python\n{whole}```",
        f"First:\n```python\n{first}```\nSecond:\n```python\n{second}```\nDone.",
        f"```python\n{second}```\nwith\n```python\n{first}```",
        f"```python\n{first.replace('from typing import List', '')}{bare}```",
        f"```python\n{own}```",
        f"```python\n{second}```",
        f"```python\n{first}```",
    ]
    grader = mbpp.load(tmp_path, grader=ByTests(mbpp.assemble, PATIENT, workers=2))
    assert grader.grade([problem] * 7, replies) == [True] * 5 + [False] * 2


def test_mbpp_pro_refuses(tmp_path: Path) -> None:
    for change, said in (
        ({"test_code": "assert other(1)"}, "to define what 'test_code' calls"),
        ({"test_code": "assert ("}, "expected tests in Python"),
        ({"new_solution": "return )"}, "expected Python in 'new_problem' and 'new_solution'"),
    ):
        with pytest.raises(ValueError, match=f"line 1: .*{said}"):
            mbpp.load(write(tmp_path / "x.jsonl", [PRO_BODIES | change]))


@pytest.mark.parametrize(
    "change",
    [{"test_list": []}, {"test_list": "assert"}, {"test_list": ["assert ("]}, {"code": ""},
     {"test_setup_code": 3}, {"text": None}],
)  # fmt: skip
def test_mbpp_refuses(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: expected"):
        mbpp.load(write(tmp_path / "mbpp.jsonl", [add_row(11) | change]))


HUMAN = {
    "task_id": "HumanEval/0",
    "prompt": "import math\n\n\ndef twice(x):\n    return 2 * x\n\n\n"
    "def area(r):\n    '''Of a circle.'''\n",
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert twice(3) == 6\n"
    "    assert abs(candidate(1) - 3.14) < 0.01\n",
}


@pytest.mark.usefixtures("_runs_programs")
def test_humaneval_layouts(tmp_path: Path) -> None:
    task = humaneval.load(write(tmp_path / "HumanEval.jsonl", [HUMAN]))
    (problem,) = task(10, "test", 0)
    assert problem.prompt == HUMAN["prompt"]
    with pytest.raises(
        ValueError, match=r"no train problems.*evaluate on it, and train on another"
    ):
        task(1, "train", 0)
    body = HUMAN["canonical_solution"]
    replies = [
        body,
        body + "\nprint(area(2))\n\ndef more(): pass\n",
        f"```python\n{HUMAN['prompt']}{body}```",
        "Sure.\n```python\ndef area(q):\n    return 3.14 * q ** 2\n```",
        "return math.pi * r * r",
        f"```python\n{body}```",
        "    return 3.5\n",
        "def twice(x): return 6\ndef area(r): return 3",
        "",
    ]
    assert task.grade([problem] * 9, replies) == [True] * 6 + [False] * 3


def test_humaneval_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to define 'volume'"):
        humaneval.load(write(tmp_path / "x.jsonl", [HUMAN | {"entry_point": "volume"}]))


# The real sets.


@pytest.mark.usefixtures("_runs_programs")
def test_references_of_mbpp_pass() -> None:
    path = real("mbpp") / "mbpp.jsonl"
    task = mbpp.load(path)
    assert [task.size(split) for split in ("train", "validation", "test")] == [374, 90, 500]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # Some with classes and a tree built by the tests' setup among them.
    chosen = random.Random(0).sample(rows, 18) + [r for r in rows if r["test_setup_code"]][:2]
    problems = [mbpp.read(row) for row in chosen]
    grader = ByTests(limits=PATIENT)
    assert all(grader.grade(problems, [f"```python\n{row['code']}\n```" for row in chosen]))
    shifted = [f"```python\n{row['code']}\n```" for row in chosen[1:] + chosen[:1]]
    assert not any(grader.grade(problems[:5], shifted[:5]))


@pytest.mark.usefixtures("_runs_programs")
def test_references_of_humaneval_pass() -> None:
    path = real("humaneval") / "HumanEval.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert humaneval.load(path).size("test") == len(rows) == 164
    # 32, 38 and 50 use functions of the prompt in their tests.
    chosen = [rows[i] for i in (0, 32, 38, 50, 64, 80, 99, 120, 140, 163)]
    grader = ByTests(humaneval.assemble, PATIENT)
    problems = [humaneval.read(row) for row in chosen]
    assert all(grader.grade(problems, [row["canonical_solution"] for row in chosen]))
    assert not any(grader.grade(problems[:4], ["    return None\n"] * 4))
