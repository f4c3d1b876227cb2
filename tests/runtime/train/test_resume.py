import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import t2kernels as t2k
from t2kernels.files import CorruptFileError
from t2runtime.train import Config, Peft, train

WORKER = Path(__file__).with_name("killed.py")


def without_times(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def changed(cfg: Config, **changes: Any) -> Config:
    return Config(**{**vars(cfg), **changes})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path / "out"), "1", "8"],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peace, killed = tmp_path / "out" / "peace", tmp_path / "out" / "killed"
    assert int(done.stdout) >= 3, "the run was killed several times"
    a, b = (t2k.Expert.load(folder / "z.safetensors") for folder in (peace, killed))
    assert any(bool((z != 1).any()) for z in a.z.values())
    assert all(torch.equal(a.z[name], b.z[name]) for name in a.z)
    assert a.metadata == b.metadata
    ours = without_times(killed / "metrics.jsonl")
    assert ours == without_times(peace / "metrics.jsonl")
    assert [line["step"] for line in ours] == list(range(1, 13)), "no line twice, none missing"


class Stop(Exception):
    """Not Ctrl-C, for which a run has a way out of its own."""


def stop_at(step: int) -> Any:
    def log(line: dict[str, Any]) -> None:
        if line["step"] == step:
            raise Stop

    return log


@pytest.mark.parametrize(
    "changes",
    [{"objective": "next-token"}, {"kl_estimator": "k3", "kl": 0.1}, {"optimiser": "adamw"}],
    ids=lambda c: next(iter(c.values())),
)
@pytest.mark.parametrize("step", [2, 5, 7, 12])
def test_stop_anywhere_and_resume(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, tmp_path: Path, changes: Any, step: int
) -> None:
    cfg = changed(quick, checkpoint_every=3, validate_every=2, **changes)
    whole = train(tiny, tokenizer, letter, cfg, tmp_path / "whole")
    with pytest.raises(Stop):
        train(tiny, tokenizer, letter, cfg, tmp_path / "parts", stop_at(step))
    parts = train(tiny, tokenizer, letter, cfg, tmp_path / "parts", resume=True)
    assert all(torch.equal(whole.z[name], parts.z[name]) for name in whole.z)
    assert whole.metadata == parts.metadata
    metrics = [without_times(tmp_path / n / "metrics.jsonl") for n in ("whole", "parts")]
    assert metrics[0] == metrics[1]


def test_lora_resumes(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    t2k.revert(tiny)
    adapter = Peft(tiny, "lora", rank=2)
    cfg = changed(quick, checkpoint_every=2, validate_every=2, steps=6)
    whole = train(tiny, tokenizer, letter, cfg, tmp_path / "whole", adapter=adapter)
    with pytest.raises(Stop):
        train(tiny, tokenizer, letter, cfg, tmp_path / "parts", stop_at(5), adapter=adapter)
    parts = train(tiny, tokenizer, letter, cfg, tmp_path / "parts", adapter=adapter, resume=True)
    assert all(torch.equal(whole.state[name], parts.state[name]) for name in whole.state)


def test_a_finished_run_is_not_trained_again(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, tmp_path: Path
) -> None:
    lines: list[Any] = []
    first = train(tiny, tokenizer, letter, quick, tmp_path)
    again = train(tiny, tokenizer, letter, quick, tmp_path, lines.append, resume=True)
    assert not lines and all(torch.equal(first.z[name], again.z[name]) for name in first.z)


def test_a_finished_run_may_start_anew(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, tmp_path: Path
) -> None:
    for _ in range(2):
        (tmp_path / "training.png").write_text("of the run before")
        train(tiny, tokenizer, letter, changed(quick, steps=2), tmp_path)
        assert not (tmp_path / "training.png").exists()
    assert len(without_times(tmp_path / "metrics.jsonl")) == 2


def test_an_unfinished_run_is_not_lost_by_forgetting_resume(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, tmp_path: Path
) -> None:
    cfg = changed(quick, checkpoint_every=2)
    with pytest.raises(Stop):
        train(tiny, tokenizer, letter, cfg, tmp_path, stop_at(5))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    said = "stands at step 4 and is not finished.*--resume.*--overwrite"
    with pytest.raises(ValueError, match=said):
        train(tiny, tokenizer, letter, cfg, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(tiny, tokenizer, letter, changed(cfg, steps=3), tmp_path, overwrite=True)
    assert [line["step"] for line in without_times(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_two_runs_cannot_share_a_folder(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, tmp_path: Path
) -> None:
    """Not even where the second would only resume; the first goes on unharmed."""
    cfg, said = changed(quick, steps=2, checkpoint_every=1), []

    def second(line: dict[str, Any]) -> None:
        for words in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(RuntimeError, match="written by another process") as refused:
                train(copy.deepcopy(tiny), tokenizer, letter, cfg, tmp_path, **words)
            said.append(str(refused.value))

    train(tiny, tokenizer, letter, cfg, tmp_path, second)
    assert len(said) == 6 and len(without_times(tmp_path / "metrics.jsonl")) == 2


def test_one_of_several_processes_is_refused(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, got WORLD_SIZE=2.*docs/training.md"):
        train(tiny, tokenizer, letter, quick, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    train(tiny, tokenizer, letter, changed(quick, steps=1), tmp_path / "run")


def test_more_steps_at_a_constant_rate(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, tmp_path: Path
) -> None:
    """To the bits of a run that was as long from the start."""
    cfg = changed(quick, steps=8, warmup=2)
    whole = train(tiny, tokenizer, letter, changed(cfg, steps=12), tmp_path / "whole")
    train(tiny, tokenizer, letter, cfg, tmp_path / "parts")
    longer = changed(cfg, steps=12)
    parts = train(tiny, tokenizer, letter, longer, tmp_path / "parts", resume=True)
    assert all(torch.equal(whole.z[name], parts.z[name]) for name in whole.z)
    metrics = [without_times(tmp_path / n / "metrics.jsonl") for n in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["steps"] == 12
    with pytest.raises(ValueError, match="steps 12, not 8"):
        train(tiny, tokenizer, letter, cfg, tmp_path / "parts", resume=True)


def test_steps_that_cannot_be_added(
    tiny: Any, tokenizer: Any, letters: Any, quick: Config, tmp_path: Path
) -> None:
    for changes, why in (
        ({"schedule": "cosine"}, "steps 4, not 8 .*'cosine' was laid out over 4"),
        ({"patience": 1, "validate_every": 1}, "steps 4, not 8 .*it ended by patience at step 2"),
    ):
        cfg, folder = changed(quick, steps=4, **changes), tmp_path / next(iter(changes))
        train(tiny, tokenizer, letters("never"), cfg, folder)
        with pytest.raises(ValueError, match=f"cannot resume .*{why}"):
            train(tiny, tokenizer, letters("never"), changed(cfg, steps=8), folder, resume=True)


def test_what_cannot_be_resumed(
    tiny: Any, tokenizer: Any, letter: Any, quick: Config, tmp_path: Path
) -> None:
    cfg = changed(quick, steps=2)
    with pytest.raises(ValueError, match="resume needs the folder"):
        train(tiny, tokenizer, letter, cfg, resume=True)
    train(tiny, tokenizer, letter, cfg, tmp_path, resume=True)
    metrics = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(metrics.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="at step 2, but metrics.jsonl holds 1 lines"):
        train(tiny, tokenizer, letter, cfg, tmp_path, resume=True)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-40])
    with pytest.raises(CorruptFileError, match="truncated"):
        train(tiny, tokenizer, letter, cfg, tmp_path, resume=True)
    assert all(bool((z == 1).all()) for z in t2k.Expert.from_model(tiny).z.values())
