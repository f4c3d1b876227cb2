import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2runtime.cli import build_parser, main
from t2runtime.commands import train as train_command
from t2runtime.loading import SMALL_MODEL
from t2runtime.options import parse_expert
from t2runtime.tasks import split_of


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("trian", "small"), "Did you mean train?"),
        (("generate", "small", "--promt", "x"), "Did you mean --prompt?"),
        (("train", "small", "--tsk", "add", "--out", "x"), "Did you mean --task?"),
        (("train", "small", "--task", "add", "--out", "x", "--rollout", "merge"), "mean merged?"),
        (("train", "small", "--task", "revers", "--out", "x.safetensors"), "mean 'reverse'?"),
    ],
)
def test_typos_are_answered(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], hint: str
) -> None:
    code, out, err = call(capsys, *words)
    assert code == 2 and not out
    assert hint in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("inspect", "nowhere.safetensors"), "no such file"),
        (("generate", "./nowhere", "--prompt", "x"), "no such folder"),
        (("generate", "a/b/c", "--prompt", "x"), "MODEL must be"),
        (("generate", "small", "--prompt", "x", "--classifier", "c.st"), "--strategy classifier"),
        (("generate", "small", "--prompt", "x", "--strategy", "prompt"), "at least one --expert"),
        (("generate", "small", "--prompt", "x", "--task", "t"), "--strategy few-shot"),
        (("chat", "small", "--strategy", "few-shot", "--expert", "f"), "--mixtures FOLDER"),
        (("generate", "small"), "--prompt must be given"),
        (("generate", "small", "--prompt", "x", "--max-new-tokens", "0"), "at least 1, got 0"),
        (("generate", "small", "--prompt", "x", "--rows", "0"), "--rows must be at least 1"),
        (("generate", "small", "--prompt", "x", "--max-new-tokens", "-3"), "at least 1, got -3"),
        (("generate", "small", "--prompt", "x", "--expert", "f=big"), "FILE=WEIGHT"),
        (("train", "small", "--task", "add", "--out", "x.pt"), ".safetensors"),
        (("train", "small", "--task", "add", "--out", "x.safetensors", "--steps", "0"), "steps"),
        (("demo", "--expert", "x"), "--model"),
        (("train", "small", "--task", "a", "--task", "b", "--out", "x"), "given 'a' and 'b'"),
        (("adapt", "small", "--task", "a", "--out", "x", "--out=y"), "--out takes one value"),
        (("quality", "small", "--expert", "x", "--expert", "y"), "--expert takes one value"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    code, out, err = call(capsys, *words)
    assert code == 2 and not out
    assert said in err and len(err.splitlines()) == 1


def test_what_is_not_given_twice() -> None:
    """A number is corrected, options that take several keep all, and a new call starts anew."""
    words = ["eval", "small", "--task", "add", "--task", "max", "--limit", "3", "--limit", "5"]
    for _ in range(2):
        args = build_parser().parse_args([*words, "--router", "x"])
        assert args.task == ["add", "max"] and args.limit == 5 and args.router == "x"


def test_help_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "t2runtime", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("env", "decompose", "train", "generate", "chat", "inspect", "bench", "demo"):
        assert command in done.stdout


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "env", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["backends"]["torch"] is None and facts["backends"]["reference"] is None
    code, out, _ = call(capsys, "env")
    assert code == 0 and "backend    torch     available" in out


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "bench", "--size", "64", "--device", "cpu", "--json")
    assert code == 0
    assert all(row["svf_each_us"] > 0 for row in json.loads(out)["rows"])


def test_parse_expert() -> None:
    assert parse_expert("a=b.safetensors=0.5") == (Path("a=b.safetensors"), 0.5)
    assert parse_expert("plain.safetensors") == (Path("plain.safetensors"), 1.0)


def test_inspect_an_expert(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    t2k.Expert({"layer": torch.tensor([1.0, 3.0])}, {"layer": "abc"}, "base", "why").save(path)
    code, out, _ = call(capsys, "inspect", str(path), "--json")
    layer = json.loads(out)["layers"]["layer"]
    assert code == 0
    assert (layer["rank"], layer["mean"], layer["max"]) == (2, 2.0, 3.0)
    assert layer["fingerprint"] == "abc"
    code, out, _ = call(capsys, "inspect", str(path))
    assert code == 0 and "why" in out


def test_inspect_refuses_another_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    path.write_bytes(b"not tensors at all")
    code, _, err = call(capsys, "inspect", str(path))
    assert code == 2 and len(err.splitlines()) == 1


def test_train_generate_inspect_decompose(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way of a user, with a training run of two steps."""
    store, expert = str(tmp_path / "store"), str(tmp_path / "add.safetensors")
    code, _, err = call(capsys, "decompose", "small", "--out", store)
    assert code == 0, err
    code, out, _ = call(capsys, "inspect", store, "--json")
    assert code == 0 and len(json.loads(out)["layers"]) == 28

    code, out, err = call(
        capsys, "train", "small", "--task", "add", "--out", expert, "--steps", "2", "--json",
        "--prompts", "4", "--samples", "4",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["problems"] == 256
    assert (tmp_path / "add" / "metrics.jsonl").read_text().count("\n") == 2

    asked = ("--prompt", "37+48=", "--prompt", "flip 12345=", "--max-new-tokens", "8")
    code, out, err = call(
        capsys, "generate", "small", "--expert", f"{expert}=0.5", *asked, "--json",
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads(out)["outputs"]
    assert [row["mixture"] for row in rows] == [{"add": 0.5}] * 2
    code, out, err = call(
        capsys, "generate", "small", "--expert", expert, *asked, "--strategy", "prompt", "--json"
    )
    assert code == 0, err
    assert all(row["category"] in {"add", "other"} for row in json.loads(out)["outputs"])

    sorter = tmp_path / "sorter.safetensors"
    shutil.copy(expert, sorter)
    both = ("--expert", expert, "--expert", str(sorter), "--classifier", str(sorter))
    code, out, err = call(
        capsys, "generate", "small", *both, *asked, "--strategy", "classifier", "--json"
    )
    assert code == 0, err
    assert set(json.loads(out)["outputs"][0]["probabilities"]) == {"add", "other"}

    lines = iter(["37+48=", "/experts", "/new", "/what", "x" * 70, "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    code, out, err = call(
        capsys, "chat", "small", "--expert", expert, "--strategy", "prompt",
        "--max-new-tokens", "4",
    )  # fmt: skip
    assert code == 0, err
    assert "pass 1: add" in out and "no chat template" in out and "add: add\n" in out
    assert "error: the prompt has 71 tokens" in out and out.endswith("2 turns\n")


def test_generate_says_which_request_failed(capsys: pytest.CaptureFixture[str], small: Any) -> None:
    words = ("generate", "small", "--prompt", "x" * 70, "--prompt", "1+1=", "--max-new-tokens", "2")
    code, out, err = call(capsys, *words)
    assert code == 1 and not err
    assert "error: the prompt has 71 tokens" in out and "[base] 1+1=\n" in out
    assert call(capsys, *words, "--rows", "1") == (code, out, err)


def test_a_byte_that_is_no_text_fails_alone(capsys: pytest.CaptureFixture[str], small: Any) -> None:
    """The shell's words come with lone surrogates in their place; output cannot hold these."""
    words = ["--prompt", "1+1\udcff=", "--prompt", "1+1=", "--max-new-tokens", "2"]
    assert main(["generate", "small", *words]) == 1
    first, _, second = capsys.readouterr().out.encode("utf-8").partition(b"\n\n")
    assert first.startswith(b"[base] 1+1\\udcff=\nerror: a prompt must be text that UTF-8 can hold")
    assert second.startswith(b"[base] 1+1=\n") and b"error" not in second


def test_what_decompose_did(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Weights that an earlier run made are not counted as work."""
    store = tmp_path / "store"
    words = ("decompose", "small", "--out", str(store), "--targets")
    _, out, _ = call(capsys, *words, r".*layers\.0\.mlp.*")
    assert "3 weights" in out and "s of decomposition" in out and "earlier" not in out
    _, out, _ = call(capsys, *words, "mlp")
    assert "12 weights" in out and "3 of them made earlier" in out
    before = {path.name: path.stat().st_mtime_ns for path in store.glob("*.safetensors")}
    code, out, _ = call(capsys, *words, "mlp")
    assert code == 0 and out.startswith("nothing to do: 12 weights") and "decomposition" not in out
    assert before == {path.name: path.stat().st_mtime_ns for path in store.glob("*.safetensors")}
    code, out, _ = call(capsys, *words, "mlp", "--json")
    result = json.loads(out)
    assert (result["weights"], result["made"], result["seconds"]) == (12, 0, 0)


def test_the_shipped_model_is_small() -> None:
    path = SMALL_MODEL / "model.safetensors"
    if not path.exists():
        pytest.skip("the small model is not in this checkout")
    assert path.stat().st_size <= 2_000_000
    card = json.loads((SMALL_MODEL / "training.json").read_text())
    assert card["seed"] == 0 and set(card["accuracy"]) >= {"add", "reverse", "order", "category"}


def test_a_store_serves_generate_and_train(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Any
) -> None:
    store = str(tmp_path / "store")
    assert call(capsys, "decompose", "small", "--out", store, "--targets", "q_proj")[0] == 0
    common = ("small", "--factors", store, "--targets", "q_proj")
    code, _, err = call(capsys, "generate", *common, "--prompt", "1+1=", "--max-new-tokens", "2")
    assert code == 0, err
    code, _, err = call(
        capsys, "train", *common, "--task", "add", "--out", str(tmp_path / "e.safetensors"),
        "--steps", "1", "--prompts", "2", "--samples", "2",
    )  # fmt: skip
    assert code == 0, err
    expert = t2k.Expert.load(tmp_path / "e.safetensors")
    assert expert.base_model == "t2runtime/small", "a path of this machine helps nobody"
    code, out, _ = call(capsys, "inspect", store)
    assert code == 0 and "128x128" in out and "{" not in out


def test_damaged_weights_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Any
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(SMALL_MODEL, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = call(capsys, "generate", str(copy), "--prompt", "1+1=")
    assert code == 2 and "truncated" in err and len(err.splitlines()) == 1
    out = str(tmp_path / "e.safetensors")
    code, _, err = call(capsys, "train", str(copy), "--task", "add", "--out", out)
    assert code == 2 and len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["generate", "decompose"])
def test_a_device_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    store = tmp_path / "store"
    words = ("--prompt", "x") if command == "generate" else ("--out", str(store))
    code, _, err = call(capsys, command, "small", "--device", "cuda", *words)
    assert code == 2 and "--device cuda" in err and len(err.splitlines()) == 1
    assert not store.exists()


def test_an_expert_of_another_base(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Any
) -> None:
    here = t2k.Expert.from_model(small[0])
    marks = dict.fromkeys(here.z, "another")
    path = tmp_path / "e.safetensors"
    t2k.Expert(here.z, marks).save(path)
    words = ("generate", "small", "--expert", str(path), "--prompt", "1+1=")
    code, _, err = call(capsys, *words)
    assert code == 2 and "--allow-mismatch" in err and "=True" not in err
    code, _, err = call(capsys, *words, "--allow-mismatch", "--max-new-tokens", "2")
    assert code == 0, err


def test_data_without_test_lines_is_refused_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"q{i}", "answer": "a"} for i in range(60)]
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(json.dumps(r) for r in rows if split_of(r["prompt"]) != "test"))
    out = tmp_path / "new" / "e.safetensors"
    code, _, err = call(capsys, "train", "small", "--task", str(data), "--out", str(out))
    assert code == 2 and "no test problems" in err and len(err.splitlines()) == 1
    assert not out.parent.exists()


def test_ctrl_c_saves_the_best(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Any, monkeypatch: Any
) -> None:
    def stop(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "_progress", stop)
    path = tmp_path / "e.safetensors"
    code, out, err = call(
        capsys, "train", "small", "--task", "add", "--out", str(path), "--prompts", "2",
        "--samples", "2",
    )  # fmt: skip
    assert code == 130, err
    assert "interrupted at step 1" in out and str(path) in out
    assert t2k.Expert.load(path).metadata["interrupted_at_step"] == 1


def test_one_turn_is_a_turn() -> None:
    from t2runtime.commands import chat

    assert [chat.show({"turns": [{}] * count}) for count in (0, 1, 2)] == [
        "0 turns", "1 turn", "2 turns",
    ]  # fmt: skip
