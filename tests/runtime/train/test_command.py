import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

import t2kernels as t2k
from t2runtime.cli import main
from t2runtime.commands import train as command
from t2runtime.loading import load
from t2runtime.sources import source

FEW = ("--steps", "2", "--prompts", "4", "--samples", "2", "--validation-problems", "4")


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = main(["train", "small", "--task", "add", *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, small: Any) -> None:
    """`small` skips where the model is missing."""
    monkeypatch.setattr(command, "TEST_PROBLEMS", 8)


def test_an_expert_with_its_card_and_resume(capsys: Any, tmp_path: Path) -> None:
    out = tmp_path / "e.safetensors"
    words = ("--out", str(out), *FEW, "--targets", "mlp", "--layers", "1-2")
    code, said, err = call(capsys, *words, "--json")
    assert code == 0, err
    result = json.loads(said)
    expert = t2k.Expert.load(out)
    assert {name.split(".")[2] for name in expert.z} == {"1", "2"}
    assert all("mlp" in name for name in expert.z) and len(expert.z) == 6
    assert result["values"] == sum(z.numel() for z in expert.z.values())
    assert expert.metadata["config"]["lr"] == 2e-2, "the small model's recipe"
    assert expert.metadata["config"]["max_new_tokens"] == 8, "the task's"
    assert expert.metadata["test"]["problems"] == 8
    card = out.with_suffix(".md").read_text()
    assert "t2runtime/small" in card and "accuracy" in card
    assert (tmp_path / "e" / "checkpoint.safetensors").exists()
    if result["plot"]:
        assert Path(result["plot"]).stat().st_size > 10_000

    code, said, err = call(capsys, *words, "--resume")
    assert code == 0 and "with 95 % intervals" in said, err
    again = t2k.Expert.load(out)
    assert all(again.z[name].equal(z) for name, z in expert.z.items())
    code, said, err = call(capsys, *words, "--resume", "--lr", "0.5")
    assert code == 2 and "lr 0.02, not 0.5" in err and len(err.splitlines()) == 1


def test_descriptions_are_no_paths(tmp_path: Path) -> None:
    """What the task is called, or what one says, on one line."""
    (tmp_path / "deep" / "sums").mkdir(parents=True)
    rows = [json.dumps({"prompt": f"{i}+1=", "answer": f"{i + 1}"}) for i in range(60)]
    (tmp_path / "deep" / "sums" / "all.jsonl").write_text("\n".join(rows))
    mine = str(tmp_path / "deep" / "sums")
    said = argparse.Namespace(description=None)
    for task, text in (("add", "add"), (mine, "sums"), (f"{mine}/all.jsonl", "all"),
                       (f"category:{mine}+add+other",
                        "names the category of a question: sums, add, other")):  # fmt: skip
        assert command.description_of(said, source(task)) == text
    said.description = " adds\n two "
    assert command.description_of(said, source("add")) == "adds two"
    said.description = " "
    with pytest.raises(ValueError, match="--description must say something"):
        command.description_of(said, source("add"))


def test_all_that_was_asked_for_is_saved(capsys: Any, tmp_path: Path) -> None:
    """In config.json of the run, the expert's metadata and the card."""
    texts = [f"ab{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    rows = [json.dumps({"prompt": f"say {text}=", "answer": text}) for text in texts]
    (tmp_path / "all.jsonl").write_text("\n".join([*rows, "{broken"]) + "\n")
    out = tmp_path / "e.safetensors"
    asked = {
        "--rank": 4, "--layers": "0", "--targets": "q_proj,up_proj",
        "--parametrisation": "sigmoid-normalised", "--dtype": "float32", "--extract": "label",
    }  # fmt: skip
    words = [word for pair in asked.items() for word in map(str, pair)]
    task = str(tmp_path / "all.jsonl")
    given = ["--skip-bad-lines", "--max-new-tokens", "6", "--out", str(out), *FEW, *words]
    assert main(["train", "small", "--task", task, *given]) == 0, capsys.readouterr()
    run = json.loads((tmp_path / "e" / "config.json").read_text())
    expert = t2k.Expert.load(out)
    card = out.with_suffix(".md").read_text()
    for options in (run["given"]["options"], expert.metadata["options"]):
        for name, value in asked.items():
            assert options[name[2:].replace("-", "_")] == value, name
        assert options["model"] == "small" and options["task"] == task
        assert options["skip_bad_lines"] is True and options["device"] == "cpu"
    for facts in (run["given"], expert.metadata):
        assert facts["skipped_lines"] == 1 and len(facts["data_digest"]) == 16
    assert run["run"]["rank"] == [4] and set(run["run"]["layers"]) == set(expert.z)
    assert run["given"]["started_in"] == os.getcwd() and run["run"]["dtype"] == "float32"
    for said in ('"parametrisation": "sigmoid-normalised"', '"layers": "0"', '"lr": 0.02',
                 "| skipped lines | 1 |", expert.metadata["data_digest"]):  # fmt: skip
        assert said in card, said


def test_an_unfinished_run_and_several_processes(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "e.safetensors"
    words = ("--out", str(out), *FEW, "--checkpoint-every", "1", "--validate-every", "1")

    def stop(line: Any) -> None:
        if line["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "_progress", stop)
        assert call(capsys, *words, "--steps", "3")[0] == 130
    code, _, err = call(capsys, *words, "--steps", "3")
    assert code == 2 and "stands at step 1 and is not finished" in err and "--overwrite" in err
    assert call(capsys, *words, "--steps", "3", "--resume", "--overwrite")[0] == 2
    assert call(capsys, *words, "--steps", "3", "--resume")[0] == 0
    assert call(capsys, *words, "--steps", "4", "--resume")[0] == 0, "the small recipe is constant"
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, err = call(capsys, *words)
    assert code == 2 and "WORLD_SIZE=4" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_peft_beside_it(capsys: Any, tmp_path: Path, method: str) -> None:
    peft = pytest.importorskip("peft")
    out = tmp_path / "adapter"
    words = ("--out", str(out), "--method", method, "--lora-rank", "2", *FEW)
    code, said, err = call(capsys, *words, "--json", "--objective", "next-token")
    assert code == 0, err
    assert json.loads(said)["method"] == method
    facts = json.loads((out / "training.json").read_text())
    assert facts["config"]["objective"] == "next-token" and facts["config"]["samples"] == 2
    peft.PeftModel.from_pretrained(load("small")[0], str(out))


def test_the_papers_recipe_by_name(capsys: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "e.safetensors")
    words = ("--out", out, "--recipe", "paper", "--steps", "1", "--prompts", "2")
    code, _, err = call(capsys, *words, "--parametrisation", "sigmoid-normalised")
    assert code == 0, err
    cfg = t2k.Expert.load(out).metadata["config"]
    assert (cfg["lr"], cfg["schedule"], cfg["samples"]) == (2e-3, "cosine", 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "x", "--method", "svf"), "must end in .safetensors"),
        (("--out", "x.safetensors", "--method", "lora"), "must be a folder"),
        (("--out", "x", "--method", "lora", "--rank", "4"), "--rank belongs to --method svf"),
        (
            ("--out", "x", "--method", "lora", "--parametrisation", "sigmoid-normalised"),
            "--parametrisation belongs to --method svf",
        ),
        (("--out", "x.safetensors", "--layers", "two"), "--layers must be like 0-3,8"),
        (("--out", "x.safetensors", "--layers", "9"), "--layers 9 names no block"),
        (("--out", "x.safetensors", "--kl", "-1"), "kl must be"),
        (("--out", "x.safetensors", "--chat", "on"), "needs a tokenizer with a chat template"),
        (("--out", "x.safetensors", "--max-new-tokens", "60"), "do not fit"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    capsys: Any, tmp_path: Path, monkeypatch: Any, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *words)
    assert code == 2 and not out
    assert said in err and len(err.splitlines()) == 1


def test_a_task_with_data_has_its_own_way(capsys: Any, tmp_path: Path) -> None:
    code, _, err = call(capsys, "--out", str(tmp_path / "e.safetensors"), "--data", "x.jsonl")
    assert code == 2 and "generated and reads no data" in err
