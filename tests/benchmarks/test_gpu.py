"""The phases of a run on a GPU: what they would call, and what comes out of it."""

from __future__ import annotations

import importlib
import tarfile
from pathlib import Path

import gpu
import gpu_goals
import pytest
import sanitize

SCRIPTS = {path.name for path in Path(gpu.__file__).parent.glob("*.py")}


@pytest.mark.parametrize("dry", [True, False], ids=["rehearsal", "gpu"])
@pytest.mark.parametrize("phase", gpu.PHASES)
def test_every_phase_calls_its_scripts_with_options_that_they_know(phase, dry, tmp_path):
    commands = gpu.PHASES[phase](gpu.Run(tmp_path, dry)) if phase != "build" else []
    for command in commands:
        path = Path(command[1])
        if path.name not in SCRIPTS:
            continue
        module = importlib.import_module(path.stem)
        if hasattr(module, "build_parser"):
            args = module.build_parser().parse_args(command[2:])
            assert not hasattr(args, "device") or args.device == ("cpu" if dry else "cuda")
            assert not hasattr(args, "json") or args.json.parent == tmp_path


def test_phases_of_the_goals_exist():
    named = {phase for goal in gpu_goals.GOALS for phase in goal.phase.split(",")}
    assert named <= set(gpu.PHASES)


@pytest.mark.parametrize(("text", "expected"), [("decode, build", ["decode", "build"])])
def test_chosen(text, expected):
    assert gpu.chosen(text) == expected
    assert gpu.chosen("all") == list(gpu.PHASES)
    with pytest.raises(SystemExit, match="--phase must be"):
        gpu.chosen("bulid")


def test_more_files_than_may_travel_are_packed(tmp_path):
    for index in range(gpu.MAX_FILES):
        (tmp_path / f"{index}.log").write_text(str(index))
    gpu.pack(tmp_path)
    assert len(list(tmp_path.iterdir())) == gpu.MAX_FILES
    (tmp_path / "summary.json").write_text("{}")
    gpu.pack(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.tar.gz", "summary.json"]
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert len(archive.getnames()) == gpu.MAX_FILES


def test_a_phase_that_fails_says_so(tmp_path, monkeypatch, capsys):
    fails = [["sh", "-c", "echo why; exit 3"], ["sh", "-c", "echo never"]]
    monkeypatch.setitem(gpu.PHASES, "decode", lambda run: fails)
    found = gpu.execute("decode", gpu.Run(tmp_path, True), {})
    assert found["status"] == 3
    assert "FAILED (3)" in capsys.readouterr().out
    assert "never" not in (tmp_path / "decode.log").read_text().replace("echo never", "")


def test_the_sanitizer_says_why_it_does_nothing(capsys):
    assert sanitize.main(["--dry-run"]) == 0
    assert "int8 T=33" in capsys.readouterr().out
    if not sanitize.torch.cuda.is_available():
        assert sanitize.main([]) == 0
        assert "skipped, no CUDA kernels can run here" in capsys.readouterr().out


def test_phases_after_tuning_use_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    monkeypatch.delenv("T2_TUNING", raising=False)
    assert "T2_TUNING" not in gpu.environment(dry=False)
    (tmp_path / "tuning.json").write_text("{}")
    assert gpu.environment(dry=False)["T2_TUNING"] == str(tmp_path / "tuning.json")
    assert "T2_TUNING" not in gpu.environment(dry=True)
    make, copy = gpu.tune(gpu.Run(tmp_path / "out", False))
    assert make[make.index("--out") + 1] == copy[-2] and copy[-1] == str(
        tmp_path / "out/tuning.json"
    )
