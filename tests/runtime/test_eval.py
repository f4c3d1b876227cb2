"""`t2 eval`."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.cli import main
from t2runtime.commands import eval as command
from t2runtime.evaluate import Score
from t2runtime.loading import load


@pytest.fixture
def expert(small: Any, tmp_path: Path) -> Path:
    """Far from the base, so that it answers nothing rightly."""
    model, _ = small
    here = t2k.Expert.from_model(model)
    z = {name: -torch.ones_like(value) for name, value in here.z.items()}
    path = tmp_path / "far.safetensors"
    t2k.Expert(z, here.fingerprints, here.base_model).save(path)
    return path


def test_base_and_experts_in_one_table(expert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "small", "--task", "other", "--limit", "40", "--expert", str(expert)]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    base, far = result["scores"]["base"], result["scores"]["far"]
    assert result["problems"] == 40 and result["task"] == "other" and result["split"] == "test"
    assert base["accuracy"] > 0.9 and far["accuracy"] < 0.1
    assert base["interval"][0] < base["accuracy"] <= base["interval"][1]
    assert far["points_over_base"] == pytest.approx(100 * (far["accuracy"] - base["accuracy"]))
    assert main(words) == 0
    table = capsys.readouterr().out.splitlines()
    assert "40 distinct test problems" in table[0] and len(table) == 3
    assert table[1].split()[0] == "base" and table[2].split()[-1] == "points"


def test_data_of_the_users_own(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "test.jsonl"
    rows = [json.dumps({"prompt": f"say ab{c}d=", "answer": f"ab{c}d"}) for c in "abcdefgh"]
    path.write_text("\n".join([*rows, "{broken"]))
    words = ["eval", "small", "--task", str(path), "--max-new-tokens", "8", "--rows", "3"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "line 9" in err and "leave such lines out with --skip-bad-lines" in err
    assert main([*words, "--skip-bad-lines"]) == 0
    out = capsys.readouterr().out
    assert "8 distinct test problems" in out and "1 broken lines" in out


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA that leaves nothing of what the model can do, and of the base's small settings."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(load("small")[0], config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=9.0)
    wrapped.save_pretrained(str(tmp_path / "far_lora"))
    return tmp_path / "far_lora"


def test_adapters_of_peft_beside_experts(
    adapter: Path, expert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "small", "--task", "other", "--limit", "40", "--chat", "off", "--json"]
    assert main([*words, "--expert", str(adapter), "--expert", str(expert)]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert list(scores) == ["base", "far_lora", "far"]
    assert scores["base"]["accuracy"] > 0.9 and scores["far_lora"]["accuracy"] < 0.1
    assert main([*words, "--expert", str(expert)]) == 0
    alone = json.loads(capsys.readouterr().out)["scores"]
    assert alone["far"] == scores["far"] and alone["base"] == scores["base"]


def test_an_svf_adapter_of_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    svf = pytest.importorskip("t2runtime.peft")
    model = peft.get_peft_model(load("small")[0], svf.SVFConfig(target_modules=["up_proj"]))
    model.save_pretrained(str(tmp_path / "new"))
    words = ["eval", "small", "--task", "other", "--limit", "20", "--expert", str(tmp_path / "new")]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main([*words, "--json"]) == 0
    assert not [w for w in said if "is_gradient_checkpointing" in str(w.message)]
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["new"]["right"] == scores["base"]["right"], "a new adapter is the base"


def test_inspect_says_what_a_folder_is(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / "training.json").write_text('{"task": "other", "method": "lora"}')
    assert main(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    assert "lora, rank 2, an adapter of PEFT, no expert: 8 tensors" in out
    assert "task         other" in out and "t2 eval scores it" in out
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    for words, said in (
        ((str(run),), "the folder of a run, which trained the expert"),
        ((str(tmp_path),), "no kind of folder that is known"),
        ((str(adapter), str(adapter)), "only experts are compared"),
    ):
        assert main(["inspect", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["eval", "small", "--task", "other", "--expert", str(run)]) == 2
    assert "expected an expert file or the folder of an adapter" in capsys.readouterr().err


def test_adapters_that_cannot_be_used_are_refused(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "small", "--task", "other", "--limit", "4", "--expert", str(adapter)]
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"r": 3}))
    assert main(words) == 2
    assert "far_lora does not fit this model" in capsys.readouterr().err
    path.write_text(json.dumps(config | {"peft_type": "PREFIX_TUNING"}))
    assert main(words) == 2
    assert "type PREFIX_TUNING; expected one of LORA, IA3, SVF" in capsys.readouterr().err
    path.write_text("{")
    assert main(words) == 2
    assert "is no JSON" in capsys.readouterr().err


def test_stories_are_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "small", "--task", "story:dialogue", "--max-new-tokens", "8", "--limit", "3"]
    code = main([*words, "--json"])
    assert code == 0 and json.loads(capsys.readouterr().out)["task"] == "story:dialogue"
    for more, said in (
        (("--task", "story:plot"), "one of dialogue, animal"),
        (("--task", "story:animal", "--data", "x"), "reads no data, got --data 'x'"),
        (("--task", "story:animal", "--extract", "text"), "leave out --extract"),
        (("--task", "storys"), "story:animal"),
    ):
        assert main(["eval", "small", *more]) == 2
        assert said in capsys.readouterr().err


def test_every_row_has_its_bar(expert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str | None] = []

    def spy(*words: Any, label: str | None = None, **more: Any) -> Score:
        shown.append(label)
        return Score(1, 2)

    monkeypatch.setattr(command, "evaluate", spy)
    words = ["eval", "small", "--task", "other", "--limit", "2", "--expert", str(expert)]
    assert main(words) == 0 and shown == ["base", "far"]


def test_chat_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ("eval", "small", "--task", "other", "--limit", "2"),
        ("generate", "small", "--prompt", "say abcd="),
    ):
        assert main([*words, "--chat", "on"]) == 2
        err = capsys.readouterr().err
        assert "--chat on needs a tokenizer with a chat template" in err and "--chat off" in err
        assert main([*words, "--chat", "off"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--task", "gsm8k"), "needs its data: give the file or folder with --data PATH"),
        (("--task", "other", "--extract", "number"), "can be read with --extract number"),
        (("--task", "gsm8"), "Did you mean 'gsm8k'"),
        (("--task", "add", "--limit", "0"), "--limit must be"),
        (("--task", "add", "--rows", "0"), "--rows must be"),
        (("--task", "gsm8k", "--data", "nowhere"), "no such file or folder"),
        (("--task", "add", "--expert", "base.safetensors"), "rename"),
        (("--task", "add", "--extract", "nubmer"), "Did you mean number?"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["eval", "small", *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and not out and said in err and len(err.splitlines()) == 1
