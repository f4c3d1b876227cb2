"""`t2 adapt`: finds, saves, scores without the shots, and says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import t2kernels as t2k
from t2runtime.adapt.mixtures import load_mixture
from t2runtime.cli import main

QUICK = ["--shots", "3", "--population", "6", "--elites", "2", "--generations", "1",
         "--limit", "8"]  # fmt: skip


@pytest.fixture
def experts(small: Any, tmp_path: Path) -> Path:
    """A folder of two: the base under a name, and one that answers nothing rightly."""
    model, _ = small
    here = t2k.Expert.from_model(model)
    folder = tmp_path / "experts"
    folder.mkdir()
    here.save(folder / "still.safetensors")
    (8.0 * here).save(folder / "also.safetensors")
    far = {n: v * 0.0 for n, v in here.z.items()}
    t2k.Expert(far, here.fingerprints).save(folder / "far.safetensors")
    return folder


@pytest.mark.parametrize("shots_from", ["validation", "test"])
def test_finds_saves_and_scores(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shots_from: str
) -> None:
    out = tmp_path / "mixtures"
    argv = ["adapt", "small", "--task", "other", "--expert", str(experts), "--out", str(out)]
    assert main([*argv, *QUICK, "--shots-from", shots_from, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["on_shots"]["accuracy"] == 1.0, "the base knows this task"
    assert result["problems"] == 8 and result["leaked"] == (3 if shots_from == "test" else 0)
    assert result["forwards"] == result["budget"] == 2 * 3 * 6
    assert set(result["scores"]) == {"base", "mixture"}
    assert load_mixture(out, "other").weights == result["weights"]
    assert main([*argv, *QUICK, "--per", "layer", "--method", "random", "--name", "again"]) == 0
    shown = capsys.readouterr().out
    assert "(mean over the layers)" in shown and "again.json" in shown


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--shots", "0"], "--shots must be at least 1"),
        (["--high", "0.5"], "low..high must hold 0 (the base) and 1"),
        (["--budget", "10"], "budget must be at least 36 forwards"),
        (["--expert", "nowhere.safetensors"], "does not exist"),
        (["--name", "../up"], "task must consist of"),
        (["--name", "up", "--method", "record"], "by --task NAME=TASK"),
        (["--name", "up", "--method", "router"], "by --task NAME=TASK"),
    ],
)
def test_bad_input(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str],
    words: str,
) -> None:  # fmt: skip
    out = {"record": "m.json", "router": "m.safetensors"}.get(change[-1], "m")
    argv = ["adapt", "small", "--task", "other", "--out", str(tmp_path / out)]
    assert main([*argv, "--expert", str(experts), *QUICK, *change]) == 2
    assert words in capsys.readouterr().err


def test_no_experts_and_two_of_a_name(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["adapt", "small", "--task", "other", "--out", str(tmp_path / "m"), *QUICK]
    assert main(argv) == 2
    assert "--expert must be given at least once" in capsys.readouterr().err
    twice = ["--expert", str(experts), "--expert", str(experts / "far.safetensors")]
    assert main([*argv, *twice]) == 2
    assert "two files are called far" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([*argv, "--expert", str(tmp_path / "empty")]) == 2
    assert "holds no *.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["own.jsonl", "./own/", "own", "sums=./own"])
def test_a_mixture_is_recalled_by_the_words_it_was_found_with(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Or by its name; the error names the tasks that there are, as a command does."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "own").mkdir()
    for place in (tmp_path / "own.jsonl", tmp_path / "own" / "all.jsonl"):
        place.write_text("\n".join(map(json.dumps, rows)) + "\n")
    few = ["small", "--expert", str(experts), "--max-new-tokens", "4"]
    assert main(["adapt", *few, "--task", given, "--out", "mixtures", *QUICK]) == 0
    asked = ["generate", *few, "--strategy", "few-shot", "--mixtures", "mixtures", "--prompt",
             "3+1=", "--json"]  # fmt: skip
    name = "sums" if "=" in given else "own"
    capsys.readouterr()
    for task in (given, name, f"{name}=add"):
        assert main([*asked, "--task", task]) == 0
        assert json.loads(capsys.readouterr().out)["outputs"][0]["mixture"]["task"] == name
    scored = ["eval", *few, "--strategy", "few-shot", "--mixtures", "mixtures", "--limit", "3"]
    assert main([*scored, "--task", given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == [name]
    assert main([*asked, "--task", "other"]) == 2
    said = capsys.readouterr().err
    assert f"needs --task, one of the tasks that a mixture was found for ({name})" in said
    assert main([*scored, "--task", "count"]) == 2
    assert "or say NAME=TASK" in capsys.readouterr().err


def test_a_task_whose_name_is_no_file(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["adapt", "small", "--task", "story:animal", "--out", str(tmp_path)]
    assert main([*words, "--expert", str(experts)]) == 2
    assert "otherwise: --task NAME=story:animal" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["cem", "router", "record"])
def test_answers_that_cannot_fit_are_refused_before_any_work(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    """By all methods alike; a table of a saved router would only show problems without answers."""
    out = tmp_path / {"router": "r.safetensors", "record": "r.json"}.get(method, "r")
    words = ["--task", "other", "--expert", str(experts), "--max-new-tokens", "60"]
    few = [*QUICK[2:], "--method", method] if method == "cem" else ["--method", method]
    assert main(["adapt", "small", *words, *few, "--out", str(out)]) == 2
    assert "60 new ones are asked for (--max-new-tokens)" in capsys.readouterr().err
    assert not out.exists()
    if method != "cem":
        assert main(["eval", "small", *words, "--strategy", method]) == 2
        assert "60 new ones are asked for (--max-new-tokens)" in capsys.readouterr().err


def test_a_record_of_own_folders(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Its categories are experts: NAME=FOLDER makes them so, and without it adapt says that the
    record decides nothing."""
    rows = [{"prompt": f"say x{i}=", "answer": f"x{i}"} for i in range(60)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = ["adapt", "small", "--expert", str(experts), "--method", "record", "--out",
             str(tmp_path / "record.json"), "--problems", "3", "--limit", "3",
             "--max-new-tokens", "6"]  # fmt: skip
    assert main([*words, "--task", str(tmp_path / "mine.jsonl")]) == 0
    assert "never mine" in (shown := capsys.readouterr().out) and "--task NAME=TASK" in shown
    assert [record.getMessage() for record in caplog.records] == [
        "pass 1 names also, far, still, other, so never mine: what the record says of these "
        "decides nothing, and a category that it says nothing of gets the base. Call a task like "
        "the expert of its category: NAME=TASK"
    ]
    scored = ["eval", *words[1:4], "--strategy", "none", "record", "--limit", "3", "--json",
              "--max-new-tokens", "6"]  # fmt: skip
    caplog.clear()
    assert main([*scored, "--task", str(tmp_path / "mine.jsonl")]) == 0
    assert "so never mine" in caplog.text, "where the record is made in the call, too"
    caplog.clear()
    capsys.readouterr()
    assert main([*words, "--task", f"still={tmp_path / 'mine.jsonl'}", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["never_named"] == [] and list(made["chosen"]) == ["still"] and not caplog.records
    assert list(made["strategies"][1]["by_task"]) == ["still"]


def _own(folder: Path, lines: int, name: str = "own.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(lines)]
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / name


def test_fewer_shots_than_asked_for_are_said(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """With how many there are, and why: the file was split by checksum."""
    data = _own(tmp_path / "data", 40)
    argv = ["adapt", "small", "--expert", str(experts), "--max-new-tokens", "4", "--task",
            str(data), *QUICK]  # fmt: skip
    assert main([*argv, "--out", str(tmp_path / "a"), "--shots", "50", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["shots"]
    assert 0 < found < 10 and result["shots_asked"] == 50
    (said,) = [r.getMessage() for r in caplog.records if "asked for" in r.getMessage()]
    assert said.startswith(f"task 'own': 50 shots asked for, {found} found in the validation split")
    assert "split by checksum of the prompt" in said
    assert main([*argv, "--out", str(tmp_path / "b"), "--shots", "50"]) == 0
    assert f"cem on {found} shots (50 were asked for) of the val" in capsys.readouterr().out
    caplog.clear()
    assert main([*argv, "--out", str(tmp_path / "c"), "--shots", str(found)]) == 0
    assert "asked for" not in capsys.readouterr().out + caplog.text


def test_shots_that_leave_nothing_to_be_scored_are_refused_before_the_search(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a search began")

    monkeypatch.setattr("t2runtime.commands.adapt.search", never)
    monkeypatch.setattr("t2runtime.compare.search", never)
    folder = tmp_path / "data"
    _own(folder, 40, "train.jsonl")
    _own(folder, 3, "test.jsonl")
    given = ["small", "--task", str(folder), "--expert", str(experts), "--shots-from", "test",
             "--shots", "3"]  # fmt: skip
    assert main(["adapt", *given, "--out", str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    assert "all of 3 are shots" in said and "--shots-from" in said
    assert not (tmp_path / "m").exists()
    assert main(["eval", *given, "--strategy", "few-shot"]) == 2
    assert "all of 3 are shots" in capsys.readouterr().err


def test_a_file_that_is_there_is_replaced_with_a_note(
    experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["adapt", "small", "--task", "other", "--expert", str(experts)]
    record = ["--method", "record", "--problems", "2", "--limit", "4"]
    for more, out, file in (
        (QUICK, tmp_path / "m", tmp_path / "m" / "other.json"),
        (QUICK, tmp_path / "x.json", tmp_path / "x.json"),
        (record, tmp_path / "r.json", tmp_path / "r.json"),
    ):
        argv = [*given, *more, "--out", str(out)]
        assert main(argv) == 0
        first = capsys.readouterr()
        assert "note" not in first.err and "in place of" not in first.out
        assert main(argv) == 0
        again = capsys.readouterr()
        assert f"t2 adapt: note: {file} is there and will be replaced" in again.err
        assert f"saved: {file}, in place of the one that was there" in again.out
        assert main([*argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["replaced"] is True
