"""`t2 eval --strategy`, `t2 adapt --method router | record`, and `t2 generate` with what they
wrote: one user's way from experts to a table.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import t2kernels as t2k
from t2runtime.cli import main
from t2runtime.sources import sources

QUICK = ["--shots", "2", "--population", "6", "--elites", "2", "--generations", "1",
         "--limit", "8"]  # fmt: skip
TWO = ["--task", "other", "--task", "add"]


@pytest.fixture
def experts(small: Any, tmp_path: Path) -> Path:
    """A folder of two: "add" is the base under this name, "far" answers nothing rightly."""
    here = t2k.Expert.from_model(small[0])
    folder = tmp_path / "experts"
    folder.mkdir()
    here.save(folder / "add.safetensors")
    far = {name: value * 0.0 for name, value in here.z.items()}
    t2k.Expert(far, here.fingerprints).save(folder / "far.safetensors")
    return folder


def result(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code = main([*words, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    made: dict[str, Any] = json.loads(out)
    return made


def test_from_experts_to_a_table(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--expert", str(experts)]
    router, record = str(tmp_path / "new" / "router.safetensors"), str(tmp_path / "record.json")
    made = result(capsys, "adapt", "small", *TWO, *given, "--method", "router", "--steps", "2",
                  "--out", router, "--limit", "8")  # fmt: skip
    assert [row["strategy"] for row in made["strategies"]] == ["base", "router"]
    words = ["adapt", "small", "--task", "other", "--task", "count", *given, "--method", "record"]
    words += ["--problems", "6", "--out", record, "--limit", "8"]
    made = result(capsys, *words)
    assert made["chosen"]["other"] is None, "a tie goes to the base"
    assert made["strategies"][1]["shots"] == 12 and made["strategies"][1]["forwards"] == 36 + 16
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "speaks for: other base" in shown and "never count" in shown and "record.json" in shown
    mixtures = str(tmp_path / "mixtures")
    for task in ("other", "add"):
        result(capsys, "adapt", "small", "--task", task, *given, "--out", mixtures, *QUICK)

    words = ["eval", "small", *TWO, *given, "--strategy", "none", "prompt", "classifier",
             "mixture", "few-shot", "router", "record", "far", "--router", router,
             "--record", record, "--mixtures", mixtures, "--limit", "8", "--rows", "5",
             "--classifier", str(experts / "far.safetensors")]  # fmt: skip
    table = result(capsys, *words)
    assert table["tasks"] == ["other", "add"] and table["problems"] == 16
    rows = {row["strategy"]: row for row in table["strategies"]}
    assert list(rows) == ["base", "prompt", "classifier", "mixture", "few-shot", "router",
                          "record", "far"]  # fmt: skip
    assert rows["base"]["by_task"]["other"]["accuracy"] == 1.0
    assert rows["far"]["accuracy"] == 0.0
    assert rows["few-shot"]["by_task"]["other"]["accuracy"] == 1.0
    assert rows["few-shot"]["shots"] == 4 and rows["few-shot"]["forwards"] == 2 * (2 * 2 * 6)
    assert rows["router"]["shots"] > 0 and rows["router"]["forwards"] > 2 * 2 * 64
    assert rows["prompt"]["pass1_seconds"] > 0 == rows["few-shot"]["pass1_seconds"]
    low, high = rows["base"]["interval"]
    assert low < rows["base"]["accuracy"] < high

    asked = ["generate", "small", *given, "--prompt", "37+48=", "--max-new-tokens", "4"]
    output = result(capsys, *asked, "--strategy", "router", "--router", router)["outputs"][0]
    assert set(output["mixture"]) == {"add", "far"} and output["error"] is None
    output = result(capsys, *asked, "--strategy", "record", "--record", record)["outputs"][0]
    assert output["mixture"] is None and output["category"] in ("add", "far", "other")

    other = ["--expert", str(experts / "far.safetensors"), "--prompt", "1+1="]
    assert main(["generate", "small", *other, "--strategy", "router", "--router", router]) == 2
    assert "the router needs expert 'add'" in capsys.readouterr().err


def test_the_table_as_text(experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Searches in the call itself; without --strategy several tasks show base and experts."""
    words = ["eval", "small", *TWO, "--expert", str(experts), *QUICK]
    few = ["--strategy", "few-shot", "--method", "cem", "random", "--shots-from", "test"]
    assert main([*words, *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("other + add, 16 distinct test problems, greedy")
    assert lines[1].startswith("4 of the problems drawn were left out")
    assert [line.split("  ")[1] for line in lines[3:]] == ["few-shot, cem", "few-shot, random"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["base", "add", "far"]


def test_each_task_has_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By TASK=PATH; a single task also by the path alone. What does not fit is reported."""
    path = tmp_path / "sums"
    path.mkdir()
    for split, question in (("train", "2+2="), ("test", "1+1=")):
        line = json.dumps({"question": question, "answer": "so\n#### 2"})
        (path / f"{split}.jsonl").write_text(line)
    named = sources(["gsm8k", "other"], data=[f"gsm8k={path}"])
    assert list(named) == ["gsm8k", "other"]
    assert "1+1=" in named["gsm8k"](5, "test", 0)[0].prompt
    assert "1+1=" in sources(["gsm8k"], data=[str(path)])["gsm8k"](5, "test", 0)[0].prompt
    words = ["eval", "small", "--task", "gsm8k", "--task", "other", "--data", f"gsm8k={path}"]
    table = result(capsys, *words, "--limit", "3", "--max-new-tokens", "8")
    (row,) = table["strategies"]
    assert row["by_task"]["other"]["right"] == 3
    assert row["by_task"]["gsm8k"]["right"] == 0 and row["by_task"]["gsm8k"]["problems"] == 1
    assert row["failed"] == 1 and "the model's context holds 64" in row["failure"]
    with pytest.raises(ValueError, match="task 'gsm8k' has its data given twice"):
        sources(["gsm8k", "add"], data=["gsm8k=a", "gsm8k=b"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strategy", "prmopt"], "--strategy must be one of prompt"),
        (["--strategy", "prompt"], "needs at least one --expert"),
        (["--strategy", "none", "--router", "x"], "--router is for --strategy router"),
        (["--strategy", "none", "none"], "base more than once"),
        (["--router", "x"], "--router is for --strategy"),
        (["--task", "max", "--data", "x"], "give --data 'TASK=PATH' for each"),
        (["--task", "max", "--data", "max=x"], "is generated and reads no data"),
        (["--task", "max", "--extract", "text"], "leave out --extract"),
        (["--task", "add"], "'add' is given twice"),
        (["--strategy", "few-shot", "--mixtures", "nowhere"], "needs at least one --expert"),
        (["--shots", "0", "--strategy", "few-shot"], "--shots must be"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "small", "--task", "add", "--limit", "4", *words]) == 2
    assert said in capsys.readouterr().err


def test_mistakes_with_experts(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--task", "add", "--expert", str(experts)]
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((experts / "add.safetensors").read_bytes()[:-9])
    asked = ["--prompt", "1+1=", "--expert", str(experts)]
    for words, said in (
        (["eval", *given, "--strategy", "classifier"], "needs --classifier FILE"),
        (["eval", *given, "--strategy", "router", "--router", "none.safetensors"], "not exist"),
        (["eval", *given, "--strategy", "router", "--router", str(broken)], "truncated"),
        (["eval", *given, "--strategy", "few-shot", "--mixtures", "nowhere"], "does not exist"),
        (["adapt", *given, "--method", "router", "--out", "x.json"], "ends in .safetensors"),
        (["adapt", *given, "--method", "record", "--out", "x"], "ends in .json"),
        (["adapt", *given, "--task", "max", "--out", "x"], "finds the mixture of one --task"),
        (["adapt", *given, "--method", "record", "--out", "x.json", "--problems", "0"], "must be"),
        (["generate", *asked, "--strategy", "router"], "go together"),
        (["generate", *asked, "--record", "x"], "go together"),
    ):
        assert main([words[0], "small", *words[1:]]) == 2
        assert said in capsys.readouterr().err


def test_bad_searches_are_found_before_any_work(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever stands before them in the table, and before the model is loaded."""

    def never(*args: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("t2runtime.commands.eval.loaded", never)
    monkeypatch.setattr("t2runtime.commands.adapt._engine", never)
    given = ["small", "--task", "other", "--expert", str(experts)]
    table = ["eval", *given, "--strategy", "none", "prompt", "few-shot", "--method"]
    found = ["adapt", *given, "--out", str(tmp_path / "found"), "--method"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "far.safetensors").write_bytes((experts / "far.safetensors").read_bytes())
    few = ["gradient", "--shots", "2", "--budget", "67"]
    for words, said in (
        ([*table, "cem", *few[:1], *few[1:3], "--budget", "127"], "at least 128 forwards"),
        ([*table, *few], "task 'other': budget must be at least 68 forwards"),
        ([*found, *few], "budget must be at least 68 forwards"),
        ([*table, "cem", "gradient", "--l1", "0.1"], "l1 and l2 are for method='gradient'"),
        ([*table, "gradient", "--l2", "-1"], "l2 must be a finite number of at least 0"),
        ([*table, "random", "cem", "--elites", "33"], "elites must be in 2..population = 32"),
        ([*table, "random", "--high", "0.5"], "low..high must hold 0"),
        ([*table, "random", "--generations", "0"], "generations must be at least 1"),
        ([*table, "random", "--rows-per-batch", "0"], "rows_per_batch must be at least 1"),
        ([*table, "cem", "cem"], "methods must be distinct, at least one, got cem, cem"),
        ([*table, "cem", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        ([*found, "cem", "--elites", "1"], "elites must be in 2..population"),
    ):
        assert main(words) == 2, words
        assert said in capsys.readouterr().err
    if importlib.util.find_spec("cmaes") is not None:
        table[table.index(str(experts))] = str(tmp_path / "one")
        assert main([*table, "cma-es"]) == 2
        assert "at least 2 dimensions" in capsys.readouterr().err
